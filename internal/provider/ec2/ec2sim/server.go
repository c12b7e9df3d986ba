package ec2sim

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider/local"
)

// Account owns every volume and snapshot.
const Account = "123456789012"

// The long-term key that the server knows beside those that IMDS gives out.
// They are no secret: the server listens on this machine only.
const (
	AccessKey = "AKIAEC2SIM0000000000"
	SecretKey = "ec2sim"
)

// tagServer marks in the pool what a server made; its value is Options.Devices,
// which only one server has at a time. tagID is what it is to EC2.
const (
	tagServer = "cleancut:ec2sim"
	tagID     = "cleancut:ec2sim-id"
)

const gib = backup.Bytes(1 << 30)

const (
	keyAction   = "action"
	keyError    = "error"
	keyReason   = "reason"
	keySnapshot = "snapshot"
	keyTook     = "took"
	keyVolume   = "volume"
)

// Options say what the server plays. Only Pool is needed.
type Options struct {
	Pool    string // folder of a local pool; one that is none yet becomes one
	Region  string // default eu-central-1
	Zone    string // default Region + "a"
	Devices string // folder below which each instance sees its devices; default POOL/ec2sim

	Instances  []Instance    // default: two on Nitro in Zone
	Completion time.Duration // a snapshot is pending at least so long; default 50 ms
	Transition time.Duration // creating, attaching, detaching and deleting take at least so long; default 50 ms
	RateWindow time.Duration // one snapshot per volume in it; default 15 s, as EBS
	Latency    time.Duration // added to every EC2 call before its effect
	Session    time.Duration // how long credentials of IMDS are good; default 6 h
	Log        *slog.Logger  // default: none
}

// Instance is one EC2 instance.
type Instance struct {
	ID         string // "i-" and 17 hexadecimal digits
	Xen        bool   // devices by name, without serials; else Nitro
	Zone       string // default Options.Zone
	MaxVolumes int    // attached at once, with the root volume; default 27, as most Nitro types with one network interface
}

// Server is an EC2 endpoint. Its methods may be called at the same time.
type Server struct {
	opts Options
	log  *slog.Logger
	pool *local.Pool
	dm   string   // why there are no group cuts; "" where there are
	lock *os.File // of Options.Devices

	spawn func(work func(ctx context.Context)) // in the background, until Close
	stop  context.CancelFunc
	work  sync.WaitGroup
	close sync.Once

	mu        sync.Mutex // guards all below and every field of volumes and snapshots
	instances map[string]*instance
	volumes   map[string]*volume
	snapshots map[string]*snapshot
	tokens    map[string]token // of CreateVolume
	calls     map[string]int
	faults    []*armed
	closing   bool
	sessions  map[string]session // by access key id
	imds      map[string]imdsToken
}

type instance struct {
	Instance
	launched time.Time
	root     *volume
}

// New starts a server. It makes Options.Pool a pool if it is none, takes away
// what a server that was killed left in Options.Devices, and refuses a folder
// that another server uses (backup.ErrInUse). ctx is only used meanwhile.
func New(ctx context.Context, o Options) (*Server, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("ec2sim: %w", err)
	}
	if err := local.Init(ctx, o.Pool); err != nil && !errors.Is(err, backup.ErrExists) {
		return nil, fmt.Errorf("ec2sim: %w", err)
	}
	// EBS has no headroom to run out of, so the pool's is not asked for.
	pool, err := local.Open(ctx, o.Pool, o.Log, local.Headroom(0, 0))
	if err != nil {
		return nil, fmt.Errorf("ec2sim: %w", err)
	}
	s := &Server{opts: o, log: o.Log, pool: pool, instances: map[string]*instance{}, volumes: map[string]*volume{}, snapshots: map[string]*snapshot{},
		tokens: map[string]token{}, calls: map[string]int{}, sessions: map[string]session{}, imds: map[string]imdsToken{}}
	if s.lock, err = lockFolder(o.Devices); err != nil {
		return nil, fmt.Errorf("ec2sim: %w", err)
	}
	s.dm = noDeviceMapper(ctx)
	if s.dm != "" {
		s.log.WarnContext(ctx, "CreateSnapshots is not supported here", slog.String(keyReason, s.dm))
	}
	if err := s.sweep(ctx); err != nil {
		_ = s.lock.Close()
		return nil, fmt.Errorf("ec2sim: take away what an earlier server left: %w", err)
	}
	background, stop := context.WithCancel(context.Background()) // what ctx carries, such as injected faults, is the caller's
	s.stop = stop
	s.spawn = func(work func(context.Context)) { s.work.Go(func() { work(background) }) }
	for _, i := range o.Instances {
		s.launch(i)
	}
	return s, nil
}

func (o Options) withDefaults() (Options, error) {
	if o.Pool == "" {
		return o, fmt.Errorf("no pool: %w", backup.ErrUsage)
	}
	var err error
	if o.Pool, err = filepath.Abs(o.Pool); err != nil {
		return o, err
	}
	if o.Devices, err = filepath.Abs(cmp.Or(o.Devices, filepath.Join(o.Pool, "ec2sim"))); err != nil {
		return o, err
	}
	o.Region = cmp.Or(o.Region, "eu-central-1")
	o.Zone = cmp.Or(o.Zone, o.Region+"a")
	o.Completion = cmp.Or(o.Completion, 50*time.Millisecond)
	o.Transition = cmp.Or(o.Transition, 50*time.Millisecond)
	o.RateWindow = cmp.Or(o.RateWindow, 15*time.Second)
	o.Session = cmp.Or(o.Session, 6*time.Hour)
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
	if len(o.Instances) == 0 {
		o.Instances = []Instance{{ID: "i-0000000000000000a"}, {ID: "i-0000000000000000b"}}
	}
	o.Instances = slices.Clone(o.Instances)
	seen := map[string]bool{}
	for n := range o.Instances {
		i := &o.Instances[n]
		i.Zone = cmp.Or(i.Zone, o.Zone)
		i.MaxVolumes = cmp.Or(i.MaxVolumes, 27)
		if !instancePattern.MatchString(i.ID) || seen[i.ID] {
			return o, fmt.Errorf("instance id %q is no i- with 17 hexadecimal digits, or stands there twice: %w", i.ID, backup.ErrUsage)
		}
		seen[i.ID] = true
	}
	return o, nil
}

// The forms of ids.
var (
	instancePattern = regexp.MustCompile(`^i-[0-9a-f]{17}$`)
	volumePattern   = regexp.MustCompile(`^vol-[0-9a-f]{17}$`)
	snapshotPattern = regexp.MustCompile(`^snap-[0-9a-f]{17}$`)
)

// launch adds an instance with its root volume, which has no device and no
// bytes: it is there so that a group cut that forgets to exclude it shows.
func (s *Server) launch(i Instance) {
	now := time.Now().UTC()
	root := &volume{id: "vol-0" + randomHex(8), size: 8, kind: "gp3", iops: 3000, throughput: 125, zone: i.Zone, created: now, state: inUse, tags: backup.Tags{}}
	root.at = &attachment{instance: i.ID, name: "/dev/xvda", state: attached, since: now, root: true}
	s.instances[i.ID] = &instance{Instance: i, launched: now, root: root}
	s.volumes[root.id] = root
}

// Calls returns how often each action was called, dry runs under
// "ACTION(DryRun)". Calls that were refused count, also those without a valid
// signature.
func (s *Server) Calls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls)
}

// Devices returns the folder below which an instance sees its devices: what
// the provider's option of that name wants.
func (s *Server) Devices(instance string) string {
	return filepath.Join(s.opts.Devices, instance)
}

// Instances returns the ids of the instances, in the order of Options.
func (s *Server) Instances() []string {
	var ids []string
	for _, i := range s.opts.Instances {
		ids = append(ids, i.ID)
	}
	return ids
}

// GroupCuts says why CreateSnapshots is refused here, or "" where it works.
func (s *Server) GroupCuts() string { return s.dm }

// Close detaches and deletes all that the server made. What it could not is
// named in an error that wraps backup.ErrLeft. Called twice: nil. Requests
// that come later are refused.
func (s *Server) Close() error {
	var err error
	s.close.Do(func() {
		s.mu.Lock()
		s.closing = true
		s.mu.Unlock()
		s.stop()
		s.work.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = s.sweep(ctx)
		err = errors.Join(err, os.Remove(s.lock.Name()), s.lock.Close())
		_ = os.Remove(s.opts.Devices) // others may have files there
		if err != nil {
			err = fmt.Errorf("ec2sim: %w", errors.Join(err, backup.ErrLeft))
		}
	})
	return err
}

// sweep takes away everything in the pool that carries the mark of a server on
// these Devices, and what the instances see.
func (s *Server) sweep(ctx context.Context) error {
	mine := backup.Tags{tagServer: s.opts.Devices}
	inv, err := s.pool.List(ctx, mine)
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range inv.Volumes {
		err := s.removeDevice(ctx, v.ID)
		if err == nil {
			err = s.pool.Detach(ctx, v.ID)
		}
		if err == nil {
			err = s.pool.DeleteVolume(ctx, v.ID, mine)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", v.Tags[tagID], err))
		}
	}
	var ids []backup.SnapshotID
	for _, snap := range inv.Snapshots {
		ids = append(ids, snap.ID)
	}
	errs = append(errs, s.pool.DeleteSnapshots(ctx, ids, mine))
	seen, err := filepath.Glob(filepath.Join(s.opts.Devices, "i-*"))
	for _, dir := range seen {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(append(errs, err)...)
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never returns an error (Go 1.24)
	return hex.EncodeToString(b)
}

// pause waits, or returns ctx's error.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var _ http.Handler = (*Server)(nil)
