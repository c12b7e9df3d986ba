package ec2

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go/logging"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// Name is the provider's name in backup.Volume.
const Name = "ec2"

// DefaultVolumeType is the type of volumes that CreateVolume makes. EC2's own
// default is gp2.
const DefaultVolumeType = string(types.VolumeTypeGp3)

// The keys of log lines.
const (
	keyVolume   = "volume"
	keyDevice   = "device"
	keySnapshot = "snapshot"
	keyWait     = "wait"
)

// Options says where EC2 is and how new volumes are made. The zero value is
// this machine's: credentials, region and endpoint of the SDK's chain
// (environment, shared files, instance metadata).
type Options struct {
	Region   string // "": the SDK's chain, then the instance metadata
	Endpoint string // URL of another EC2, for tests; "": the SDK's chain
	Instance string // id of this instance; "": the instance metadata (IMDSv2)
	Devices  string // folder that stands for / where sys/block and dev are looked for; "": /

	VolumeType         string // "": DefaultVolumeType
	IOPS               int32  // 0: the type's baseline; not for types without (st1, sc1)
	Throughput         int32  // MiB/s, gp3 only; 0: the type's baseline
	InitializationRate int32  // MiB/s, 100 to 300, of volumes made from snapshots; 0: lazily. Costs per GiB
	KMSKey             string // key of new volumes; "": the snapshot's, or the account's default

	// SnapshotGap is what EC2 wants between two snapshots of one volume; Prepare
	// waits so long. 0: 15 s, as EBS. A test server may want less.
	SnapshotGap time.Duration

	pace pace // zero fields: defaultPace
}

// pace is how long things may take and how often is looked.
type pace struct {
	poll, pollMax time.Duration // first and longest pause between two looks
	complete      time.Duration // longest pause while snapshots complete, for hours
	settle        time.Duration // how long EC2 may not know yet what it has just made
	change        time.Duration // creating → available, attaching → attached, detaching, deleting
	device        time.Duration // from attached to the device node, from available to no node
	rate          time.Duration // between two snapshots of one volume (aws-ebs-csi-driver #1608)
	backoffMax    time.Duration // longest pause before a call is repeated
	attempts      int           // of a call outside of cuts
	attempt       time.Duration // one attempt
	credentials   time.Duration // what must be left of them when a cut is prepared
}

func defaultPace() pace {
	return pace{
		poll: 200 * time.Millisecond, pollMax: 5 * time.Second, complete: 30 * time.Second,
		settle: 30 * time.Second, change: 5 * time.Minute, device: time.Minute, rate: 15 * time.Second,
		backoffMax: 10 * time.Second, attempts: 60, attempt: time.Minute, credentials: time.Minute,
	}
}

// Provider is EBS as a provider.Provider, with Examine and Permissions. Its
// methods may be called at the same time.
type Provider struct {
	o   Options
	cfg aws.Config
	api *ec2.Client
	log *slog.Logger

	identity identity
	made     memory
	turns    turns
	names    names
}

var _ provider.Provider = (*Provider)(nil)

// Open reads the SDK's configuration (no secret is logged) and finds the
// region; it calls no action of EC2. Which instance this is, is asked when it
// is first needed, so that a machine outside EC2 can list and delete. The
// error is hinted when no region is configured.
func Open(ctx context.Context, o Options, log *slog.Logger) (*Provider, error) {
	if o.VolumeType == "" {
		o.VolumeType = DefaultVolumeType
	}
	if o.Devices == "" {
		o.Devices = "/"
	}
	if o.pace == (pace{}) {
		o.pace = defaultPace()
	}
	if o.SnapshotGap > 0 {
		o.pace.rate = o.SnapshotGap
	}
	load := []func(*config.LoadOptions) error{config.WithLogger(sdkLog(log))}
	if o.Region != "" {
		load = append(load, config.WithRegion(o.Region))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("read the configuration of AWS: %w", err), "see ~/.aws/config and the variables AWS_…")
	}
	p := &Provider{o: o, cfg: cfg, log: log}
	p.identity.known.instance = o.Instance
	if p.cfg.Region == "" {
		known, err := p.self(ctx)
		if err != nil || known.region == "" {
			return nil, backup.Hint(fmt.Errorf("open EC2: no region: %w", errors.Join(err, ctx.Err(), errNoRegion)), "name it in the configuration ([provider.ec2] region) or as AWS_REGION")
		}
		p.cfg.Region = known.region
	}
	p.api = ec2.NewFromConfig(p.cfg, p.endpoint, func(o *ec2.Options) {
		o.Retryer = p.patience()
		o.HTTPClient = p.httpClient(0)
	})
	return p, nil
}

// sdkLog puts what the SDK has to say, which would go to stderr, into our log.
func sdkLog(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(_ logging.Classification, format string, args ...any) {
		log.Debug("AWS SDK: " + fmt.Sprintf(format, args...))
	})
}

var errNoRegion = errors.New("none is configured and the instance metadata tells none")

func (p *Provider) endpoint(o *ec2.Options) {
	if p.o.Endpoint != "" {
		o.BaseEndpoint = aws.String(p.o.Endpoint)
	}
}

// patience repeats calls outside of cuts: EC2 throttles by an account-wide
// token bucket that another tool may keep empty for minutes. The SDK's own
// quota of retries is off, as parallel calls would use it up within seconds.
func (p *Provider) patience() aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = p.o.pace.attempts
		o.MaxBackoff = p.o.pace.backoffMax
		o.Backoff = retry.NewExponentialJitterBackoff(p.o.pace.backoffMax)
		o.RateLimiter = ratelimit.None
	})
}

// httpClient makes a client that follows no redirect (the SDK's own follows
// 307 and 308, which sends a call twice) and speaks HTTP/1.1 (HTTP/2 repeats
// what a GOAWAY refused). cut: it keeps that many connections for the calls
// of a cut, whose time is limited by the context alone.
func (p *Provider) httpClient(cut int) *http.Client {
	base, ok := p.cfg.HTTPClient.(*awshttp.BuildableClient) // with AWS_CA_BUNDLE
	if !ok {
		base = awshttp.NewBuildableClient()
	}
	transport := base.GetTransport()
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	transport.ForceAttemptHTTP2 = false
	transport.TLSNextProto = nil
	if cut > 0 {
		transport.MaxIdleConns, transport.MaxIdleConnsPerHost, transport.MaxConnsPerHost = 0, cut, 0
		// A connection that the other side has closed meanwhile fails the call,
		// as it may not be repeated; a new one costs a few milliseconds.
		transport.IdleConnTimeout = 10 * time.Second
		transport.ResponseHeaderTimeout = 0
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if cut == 0 {
		client.Timeout = p.o.pace.attempt
	}
	return client
}

// identity is what this instance knows of itself, asked once.
type identity struct {
	mu    sync.Mutex
	known self
}

type self struct{ instance, region, zone string }

// self tells which instance this is: configured, or of IMDSv2's identity
// document (instance metadata category dynamic/instance-identity/document).
func (p *Provider) self(ctx context.Context) (self, error) {
	p.identity.mu.Lock()
	defer p.identity.mu.Unlock()
	if p.identity.known.instance != "" && (p.cfg.Region != "" || p.identity.known.region != "") {
		return p.identity.known, nil
	}
	if err := ctx.Err(); err != nil {
		return self{}, err
	}
	doc, err := p.document(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return self{}, ctx.Err()
		}
		return self{}, backup.Hint(fmt.Errorf("ask the instance metadata which instance this is: %w", err),
			"on an EC2 instance: allow IMDSv2 (in a container with a hop limit of 2); elsewhere name an instance in the configuration ([provider.ec2] instance)")
	}
	known := self{instance: doc.InstanceID, region: doc.Region, zone: doc.AvailabilityZone}
	if p.identity.known.instance != "" { // configured; the metadata is of the machine, for its region only
		known.instance, known.zone = p.identity.known.instance, ""
	}
	p.identity.known = known
	return known, nil
}

// document asks the instance metadata. The SDK gives a call five seconds
// (imds: defaultOperationTimeout), which pass while a busy machine or its
// hypervisor stands still; then it is asked once more.
func (p *Provider) document(ctx context.Context) (doc *imds.GetInstanceIdentityDocumentOutput, err error) {
	for range 3 {
		doc, err = imds.NewFromConfig(p.cfg).GetInstanceIdentityDocument(ctx, &imds.GetInstanceIdentityDocumentInput{})
		if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			break
		}
		p.log.Info("the instance metadata does not answer")
	}
	return doc, err
}

// zone returns the availability zone of this instance: volumes can only be
// attached within it.
func (p *Provider) zone(ctx context.Context) (string, error) {
	me, err := p.self(ctx)
	if err != nil || me.zone != "" {
		return me.zone, err
	}
	inst, err := p.instance(ctx, me.instance)
	if err != nil {
		return "", err
	}
	if inst.Placement == nil || aws.ToString(inst.Placement.AvailabilityZone) == "" {
		return "", fmt.Errorf("instance %s has no availability zone", me.instance)
	}
	p.identity.mu.Lock()
	defer p.identity.mu.Unlock()
	p.identity.known.zone = *inst.Placement.AvailabilityZone
	return p.identity.known.zone, nil
}
