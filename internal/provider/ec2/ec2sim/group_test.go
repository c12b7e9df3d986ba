package ec2sim_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"golang.org/x/sys/unix"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

// stamper writes 1, 2, 3 … to all devices, each number to one device after the
// other, and each write durable before the next. At any instant no device holds
// more than one before it, and none is behind the first by more than one.
type stamper struct {
	stop func()
	done sync.WaitGroup
	err  error
	last uint64
}

func stamp(t *testing.T, devices []string) *stamper {
	t.Helper()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	w := &stamper{stop: stop}
	files := make([]*os.File, len(devices))
	for i, d := range devices {
		f, err := os.OpenFile(d, os.O_WRONLY|unix.O_DSYNC|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		files[i] = f
	}
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned, as O_DIRECT demands
	if err != nil {
		t.Fatal(err)
	}
	w.done.Go(func() {
		defer func() { w.err = errors.Join(w.err, unix.Munmap(page)) }()
		for _, f := range files {
			defer func() { w.err = errors.Join(w.err, f.Close()) }()
		}
		for ; ctx.Err() == nil && w.err == nil; w.last++ {
			binary.LittleEndian.PutUint64(page, w.last+1)
			for _, f := range files {
				if _, err := f.WriteAt(page, 0); err != nil {
					w.err = err
					return
				}
			}
		}
	})
	t.Cleanup(func() { w.end(t) })
	return w
}

// end stops the writer and returns the last number.
func (w *stamper) end(t *testing.T) uint64 {
	t.Helper()
	w.stop()
	w.done.Wait()
	if w.err != nil {
		t.Error(w.err)
	}
	return w.last
}

// stamps reads what snapshots hold, from the pool's files, in the order of ids.
func stamps(t *testing.T, pool string, ids []string) []uint64 {
	t.Helper()
	sidecars, err := filepath.Glob(filepath.Join(pool, "snapshots", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	images := map[string]string{}
	for _, s := range sidecars {
		var of struct {
			Tags map[string]string `json:"tags"`
		}
		b, err := os.ReadFile(s)
		if err == nil {
			err = json.Unmarshal(b, &of)
		}
		if err != nil {
			t.Fatal(err)
		}
		images[of.Tags["cleancut:ec2sim-id"]] = strings.TrimSuffix(s, ".json") + ".img"
	}
	var out []uint64
	for _, id := range ids {
		if images[id] == "" {
			t.Fatalf("%s is not in the pool", id)
		}
		out = append(out, binary.LittleEndian.Uint64([]byte(read(t, images[id], 8))))
	}
	return out
}

// oneInstant reports whether stamps can have stood on the devices at once.
func oneInstant(stamps []uint64) bool {
	for i, s := range stamps {
		if i > 0 && s > stamps[i-1] || s+1 < stamps[0] {
			return false
		}
	}
	return true
}

// group asks for a group of all data volumes and returns the snapshots in the
// order of volumes.
func (s *sim) group(volumes []string) []string {
	s.t.Helper()
	out := must[*ec2.CreateSnapshotsOutput](s.t)(s.CreateSnapshots(s.t.Context(), &ec2.CreateSnapshotsInput{
		InstanceSpecification: &types.InstanceSpecification{InstanceId: aws.String(instanceA), ExcludeBootVolume: aws.Bool(true)}}))
	of := map[string]string{}
	for _, m := range out.Snapshots {
		of[*m.VolumeId] = *m.SnapshotId
		if !m.StartTime.Equal(*out.Snapshots[0].StartTime) || m.State != types.SnapshotStatePending {
			s.t.Errorf("%s is %s, started %s; the first %s", *m.SnapshotId, m.State, m.StartTime, out.Snapshots[0].StartTime)
		}
	}
	if len(of) != len(volumes) {
		s.t.Fatalf("got %v, want one for each of %v", of, volumes)
	}
	var ids []string
	for _, v := range volumes {
		ids = append(ids, of[v])
	}
	return ids
}

func (s *sim) deleteSnapshots(ids []string) {
	s.t.Helper()
	for _, id := range ids {
		must[*ec2.DeleteSnapshotOutput](s.t)(s.DeleteSnapshot(s.t.Context(), &ec2.DeleteSnapshotInput{SnapshotId: &id}))
	}
}

// parallel asks for one snapshot of each volume at the same time.
func (s *sim) parallel(volumes []string) []string {
	s.t.Helper()
	ids, errs := make([]string, len(volumes)), make([]error, len(volumes))
	var all sync.WaitGroup
	for i, v := range volumes {
		all.Go(func() {
			out, err := s.CreateSnapshot(s.t.Context(), &ec2.CreateSnapshotInput{VolumeId: &v})
			if errs[i] = err; err == nil {
				ids[i] = *out.SnapshotId
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		s.t.Fatal(err)
	}
	return ids
}

func TestAGroupIsOneInstantAndParallelSnapshotsAreNot(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	pool := labtest.Pool(t, "xfs", 2<<30)
	s := start(t, ec2sim.Options{Pool: pool, Completion: time.Millisecond})
	if s.GroupCuts() != "" {
		t.Fatal(s.GroupCuts())
	}
	var volumes, devices []string
	for _, letter := range "fghi" {
		v := s.create()
		volumes = append(volumes, v)
		devices = append(devices, s.attach(v, instanceA, "/dev/sd"+string(letter)))
	}
	w := stamp(t, devices)
	const cuts = 15
	moved := map[uint64]bool{}
	for range cuts {
		ids := s.group(volumes)
		s.completed(ids...)
		got := stamps(t, pool, ids)
		if !oneInstant(got) {
			t.Errorf("the group holds %v", got)
		}
		moved[got[0]] = true
		s.deleteSnapshots(ids)
	}
	if len(moved) < cuts/2 {
		t.Errorf("the writer stood still: %v", moved)
	}
	s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Skew, Delay: 100 * time.Millisecond})
	skewed := 0
	for range 3 {
		ids := s.parallel(volumes)
		if !oneInstant(stamps(t, pool, ids)) {
			skewed++
		}
		s.deleteSnapshots(ids)
	}
	if skewed == 0 {
		t.Error("no skewed set shows it: this test could not have found a group that is not atomic")
	}
	t.Logf("NOTE %d groups, each one instant; %d of 3 skewed sets were not; %d writes", cuts, skewed, w.end(t))
}
