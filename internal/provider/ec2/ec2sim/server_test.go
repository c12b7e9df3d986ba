package ec2sim_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

const (
	instanceA = "i-0000000000000000a"
	instanceB = "i-0000000000000000b"
	zone      = "eu-central-1a"
)

// sim is a server over a pool of its own, with a client of the real SDK that
// does not retry.
type sim struct {
	*ec2sim.Server
	*ec2.Client
	t   *testing.T
	url string
}

func start(t *testing.T, o ec2sim.Options) *sim {
	t.Helper()
	if o.Pool == "" {
		o.Pool = labtest.Pool(t, "xfs", 512<<20)
	}
	if o.RateWindow == 0 {
		o.RateWindow = time.Nanosecond
	}
	if o.Transition == 0 {
		o.Transition = 20 * time.Millisecond
	}
	s, err := ec2sim.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, s)
}

// serve puts a server on the network until the end of the test.
func serve(t *testing.T, s *ec2sim.Server) *sim {
	t.Helper()
	h := httptest.NewServer(s)
	t.Cleanup(func() {
		h.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &sim{Server: s, Client: client(h.URL, ec2sim.AccessKey), t: t, url: h.URL}
}

func client(url, key string) *ec2.Client {
	return ec2.New(ec2.Options{Region: "eu-central-1", BaseEndpoint: &url, RetryMaxAttempts: 1, Credentials: credentials.NewStaticCredentialsProvider(key, ec2sim.SecretKey, "")})
}

// must ends the test on an error of a call of the SDK.
func must[T any](t *testing.T) func(out T, err error) T {
	return func(out T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

// refused fails the test unless the server refused with one of the codes.
func refused(t *testing.T, err error, code string) {
	t.Helper()
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != code {
		t.Errorf("got %v, want %s", err, code)
	}
}

// until polls until ok.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func (s *sim) volume(id string) types.Volume {
	s.t.Helper()
	out := must[*ec2.DescribeVolumesOutput](s.t)(s.DescribeVolumes(s.t.Context(), &ec2.DescribeVolumesInput{VolumeIds: []string{id}}))
	return out.Volumes[0]
}

// create makes a blank volume and waits until it is available.
func (s *sim) create() string {
	s.t.Helper()
	out := must[*ec2.CreateVolumeOutput](s.t)(s.CreateVolume(s.t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(1), VolumeType: types.VolumeTypeGp3}))
	if out.State != types.VolumeStateCreating {
		s.t.Errorf("a new volume is %s", out.State)
	}
	until(s.t, "available", func() bool { return s.volume(*out.VolumeId).State == types.VolumeStateAvailable })
	return *out.VolumeId
}

// attach attaches a volume and returns its kernel device.
func (s *sim) attach(volume, instance, name string) string {
	s.t.Helper()
	out := must[*ec2.AttachVolumeOutput](s.t)(s.AttachVolume(s.t.Context(), &ec2.AttachVolumeInput{VolumeId: &volume, InstanceId: &instance, Device: &name}))
	if out.State != types.VolumeAttachmentStateAttaching {
		s.t.Errorf("it is %s", out.State)
	}
	until(s.t, "attached", func() bool { return s.volume(volume).Attachments[0].State == types.VolumeAttachmentStateAttached })
	return s.node(volume, instance)
}

// node finds the device of a volume by its serial number, as on Nitro; "" if
// there is none.
func (s *sim) node(volume, instance string) string {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.Devices(instance), "sys/block/*/device/serial"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == strings.ReplaceAll(volume, "-", "") {
			return "/dev/" + strings.Split(strings.TrimPrefix(f, s.Devices(instance)), "/")[3]
		}
	}
	return ""
}

func (s *sim) detach(volume string) {
	s.t.Helper()
	must[*ec2.DetachVolumeOutput](s.t)(s.DetachVolume(s.t.Context(), &ec2.DetachVolumeInput{VolumeId: &volume}))
	until(s.t, "detached", func() bool { return s.volume(volume).State == types.VolumeStateAvailable })
}

// snapshot takes one and waits until it is completed.
func (s *sim) snapshot(volume string) string {
	s.t.Helper()
	out := must[*ec2.CreateSnapshotOutput](s.t)(s.CreateSnapshot(s.t.Context(), &ec2.CreateSnapshotInput{VolumeId: &volume}))
	s.completed(*out.SnapshotId)
	return *out.SnapshotId
}

func (s *sim) completed(ids ...string) {
	s.t.Helper()
	for _, id := range ids {
		until(s.t, "completed", func() bool { return s.snapshotState(id) == types.SnapshotStateCompleted })
	}
}

func (s *sim) snapshotState(id string) types.SnapshotState {
	s.t.Helper()
	out := must[*ec2.DescribeSnapshotsOutput](s.t)(s.DescribeSnapshots(s.t.Context(), &ec2.DescribeSnapshotsInput{SnapshotIds: []string{id}}))
	return out.Snapshots[0].State
}

func write(t *testing.T, device, text string) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, device string, n int) string {
	t.Helper()
	f, err := os.Open(device)
	b := make([]byte, n)
	if err == nil {
		_, err = f.ReadAt(b, 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAVolumeKeepsItsBytesThroughASnapshotToAnotherInstance(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	v := s.create()
	device := s.attach(v, instanceA, "/dev/sdf")
	if device == "" || s.node(v, instanceB) != "" {
		t.Fatalf("instance A sees %q, B %q", device, s.node(v, instanceB))
	}
	write(t, device, "cut here")
	snap := s.snapshot(v)
	write(t, device, "too late")
	made := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), SnapshotId: &snap, VolumeType: types.VolumeTypeGp3}))
	until(t, "available", func() bool { return s.volume(*made.VolumeId).State == types.VolumeStateAvailable })
	if got := read(t, s.attach(*made.VolumeId, instanceB, "/dev/sdf"), 8); got != "cut here" {
		t.Errorf("the copy holds %q", got)
	}
	for _, id := range []string{v, *made.VolumeId} {
		s.detach(id)
		must[*ec2.DeleteVolumeOutput](t)(s.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id}))
		until(t, "deleted", func() bool {
			_, err := s.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{VolumeIds: []string{id}})
			var api smithy.APIError
			return errors.As(err, &api) && api.ErrorCode() == "InvalidVolume.NotFound"
		})
	}
	must[*ec2.DeleteSnapshotOutput](t)(s.DeleteSnapshot(t.Context(), &ec2.DeleteSnapshotInput{SnapshotId: &snap}))
	_, err := s.DescribeSnapshots(t.Context(), &ec2.DescribeSnapshotsInput{SnapshotIds: []string{snap}})
	refused(t, err, "InvalidSnapshot.NotFound")
}
