package ec2_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	sdk "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

// TestAnInstanceKnowsItselfByItsMetadata opens without options: region,
// instance, zone and credentials come from IMDSv2.
func TestAnInstanceKnowsItselfByItsMetadata(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	c := start(t, ec2sim.Options{})
	onInstance(t, c, instanceB)
	p := c.open(t, ec2.Quick(ec2.Options{Endpoint: c.url, Devices: c.Devices(instanceB)}, 10*time.Second))
	owner := backup.Tags{backup.TagBackup: "x", backup.TagCluster: "imds"}
	v, err := p.CreateVolume(t.Context(), provider.VolumeSpec{Token: "imds", Size: gib, Tags: owner})
	if err != nil {
		t.Fatal(err)
	}
	device, err := p.Attach(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Resolve(t.Context(), device); err != nil || got != v {
		t.Errorf("got %v, %v", got, err)
	}
	inv, err := c.open(t, c.options(instanceA)).List(t.Context(), owner)
	if err != nil || len(inv.Volumes) != 1 || inv.Volumes[0].Attached != instanceB {
		t.Errorf("instance A sees %+v, %v", inv, err)
	}
}

// onInstance makes this process look like one on an instance, with the role's
// credentials only.
func onInstance(t *testing.T, c *cloud, instance string) {
	t.Helper()
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", ec2sim.MetadataEndpoint(c.url, instance))
}

// TestCredentialsThatExpireAreSeenBeforeAndInTheWindow has a role whose
// credentials are good for a moment.
func TestCredentialsThatExpireAreSeenBeforeAndInTheWindow(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	f := newField(t, ec2sim.Options{Session: 2 * time.Second})
	set := f.set(f.volumes(1)...)
	onInstance(t, f.cloud, instanceA)
	p := f.open(t, f.options(instanceA))
	_, err := p.Prepare(t.Context(), set)
	f.hinted(err, "renew")
	c, err := f.open(t, ec2.Lasting(f.options(instanceA), 0)).Prepare(t.Context(), set)
	f.must(err)
	<-time.After(2 * time.Second) // the session's end
	_, err = c.Take(t.Context())
	f.hinted(err, "renew")
	if f.calls("CreateSnapshot") != 0 {
		t.Error("EC2 was asked all the same")
	}
	f.must(c.Close())
}

func TestWithoutARegionTheHintSaysWhereToNameIt(t *testing.T) {
	h := httptest.NewServer(nil)
	defer h.Close()
	for _, name := range []string{"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", h.URL)
	_, err := ec2.Open(t.Context(), ec2.Options{}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(backup.HintOf(err), "AWS_REGION") {
		t.Errorf("got %v with the hint %q", err, backup.HintOf(err))
	}
}

// TestNewVolumesAreMadeAsConfigured looks at what EC2 was asked for.
func TestNewVolumesAreMadeAsConfigured(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	f := newField(t, ec2sim.Options{}, func(o ec2.Options) ec2.Options {
		o.IOPS, o.Throughput, o.InitializationRate, o.KMSKey = 4000, 250, 300, "alias/backup"
		return o
	})
	describe := func(id backup.VolumeID) types.Volume {
		out, err := f.aws.DescribeVolumes(f.Context(), &sdk.DescribeVolumesInput{VolumeIds: []string{string(id)}})
		f.must(err)
		return out.Volumes[0]
	}
	spec := f.spec()
	spec.Token, spec.Size = strings.Repeat("ü", 40), 8*gib-1 // longer than a client token, and not in GiB
	v, err := f.p.CreateVolume(f.Context(), spec)
	f.must(err)
	got := describe(v.ID)
	if v.Size != 8*gib || *got.Size != 8 || got.VolumeType != types.VolumeTypeGp3 || *got.Iops != 4000 || *got.Throughput != 250 || aws.ToString(got.KmsKeyId) != "alias/backup" || aws.ToInt32(got.VolumeInitializationRate) != 0 {
		t.Errorf("got %+v and %+v", v, got)
	}
	_, err = f.p.Attach(f.Context(), v.ID)
	f.must(err)
	taken, err := f.take(f.set(v.ID))
	f.must(err)
	f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 1)))
	copied, err := f.p.CreateVolume(f.Context(), provider.VolumeSpec{Token: "copy", From: taken.Members[0].Snapshot, Tags: f.owner})
	f.must(err)
	if got := describe(copied.ID); copied.Size != 8*gib || aws.ToInt32(got.VolumeInitializationRate) != 300 || got.VolumeType != types.VolumeTypeGp3 {
		t.Errorf("got %+v and %+v", copied, got)
	}
	f.sweep(1)
}

func TestMoreThanFortyOthersAreNoGroup(t *testing.T) {
	for others, ok := range map[int]bool{40: true, 41: false} {
		s := &rawEC2{others: others, calls: map[string]int{}}
		h := httptest.NewServer(s)
		t.Setenv("AWS_ACCESS_KEY_ID", ec2sim.AccessKey)
		t.Setenv("AWS_SECRET_ACCESS_KEY", ec2sim.SecretKey)
		p, err := ec2.Open(t.Context(), ec2.Quick(ec2.Options{Region: region, Endpoint: h.URL, Instance: instanceA}, time.Second), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		c, err := p.Prepare(t.Context(), provider.Set{Group: true, Members: []provider.Member{{Volume: backup.VolumeID(rawID(0)), Tags: rawTags()}}})
		if (err == nil) != ok || !ok && (!errors.Is(err, backup.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "41")) {
			t.Errorf("%d others: %v", others, err)
		}
		if err == nil {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		h.Close()
	}
}

func TestPureNames(t *testing.T) {
	for token, want := range map[string]int{"20261122T211704Z-5f3a9c-0": 25, "with a space": 64, "ü": 64, strings.Repeat("x", 64): 64, strings.Repeat("x", 65): 64} {
		if got := ec2.ClientToken(token); len(got) != want || (want == 25 && got != token) {
			t.Errorf("client token of %q: got %q", token, got)
		}
	}
	if a, b := ec2.ClientToken(strings.Repeat("x", 65)), ec2.ClientToken(strings.Repeat("x", 66)); a == b {
		t.Error("two tokens became one")
	}
	for name, want := range map[string]string{
		"/dev/sdf": "[xvdf sdf]", "/dev/xvdba": "[xvdba sdba]", "xvdf": "[xvdf sdf]", "/dev/sda1": "[xvda1 sda1 xvda sda]",
		"/dev/nvme1n1": "[]", "": "[]", "/dev/sd": "[]", "/dev/sd/../../etc": "[]",
	} {
		if got := fmt.Sprint(ec2.Candidates(name)); got != want {
			t.Errorf("candidates of %q: got %s, want %s", name, got, want)
		}
	}
	seen := map[string]bool{}
	for _, name := range ec2.DeviceNames() {
		if seen[name] {
			t.Errorf("%s twice", name)
		}
		seen[name] = true
	}
	if got := ec2.DeviceNames(); len(got) < 60 || got[0] != "/dev/sdf" || got[10] != "/dev/sdp" || got[11] != "/dev/xvdba" {
		t.Errorf("got %v", got)
	}
	if got := ec2.Literal(`a*b?c\d`); got != `a\*b\?c\\d` {
		t.Errorf("got %s", got)
	}
}

// TestInstanceMetadataIsAskedAgainAfterAStandstill: no answer within the SDK's
// five seconds is not yet a machine outside EC2.
func TestInstanceMetadataIsAskedAgainAfterAStandstill(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	c := start(t, ec2sim.Options{})
	gaveUp := make(chan struct{})
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-gaveUp:
		case <-r.Context().Done():
			return
		}
		to, err := url.Parse(c.url)
		if err != nil {
			t.Error(err)
			return
		}
		httputil.NewSingleHostReverseProxy(to).ServeHTTP(w, r)
	}))
	t.Cleanup(h.Close)
	onInstance(t, c, instanceB)
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", ec2sim.MetadataEndpoint(h.URL, instanceB))
	log := slog.New(slog.NewTextHandler(writer(func(line []byte) {
		if bytes.Contains(line, []byte("does not answer")) {
			close(gaveUp)
		}
	}), nil))
	if _, err := ec2.Open(t.Context(), ec2.Options{Endpoint: c.url, Devices: c.Devices(instanceB)}, log); err != nil {
		t.Error(err)
	}
	select {
	case <-gaveUp:
	default:
		t.Error("it never stood still")
	}
}

type writer func(line []byte)

func (w writer) Write(line []byte) (int, error) {
	w(line)
	return len(line), nil
}
