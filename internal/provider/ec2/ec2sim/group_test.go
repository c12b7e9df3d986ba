package ec2sim_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
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

	longest time.Duration // one number on all devices
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
			began := time.Now()
			for _, f := range files {
				if _, err := f.WriteAt(page, 0); err != nil {
					w.err = err
					return
				}
			}
			w.longest = max(w.longest, time.Since(began))
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
	w.end(t)
	held := w.longest
	stamp(t, devices) // until the end of the test
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
	t.Logf("NOTE %d groups, each one instant; a write took at most %s; %d of 3 skewed sets were not one", cuts, held.Round(time.Millisecond), skewed)
}

// TestAGroup is one test, so that one guest starts for all of it.
func TestAGroup(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	t.Run("holds what is attached and not excluded", groupMembers)
	t.Run("goes wrong as the fault table says", groupFaults)
	t.Run("can be cut by the stock AWS CLI", groupByCLI)
	t.Run("that a killed server left suspended is taken away by the next", groupOfTheKilled)
}

// attachedPair starts a server with two tagged volumes on instance A, each
// holding its own id.
func attachedPair(t *testing.T) (*sim, []string) {
	t.Helper()
	s := start(t, ec2sim.Options{Pool: labtest.Pool(t, "xfs", 2<<30), Completion: time.Millisecond})
	volumes := []string{s.create(), s.create()}
	slices.Sort(volumes) // the order of a group
	for i, v := range volumes {
		must[*ec2.CreateTagsOutput](t)(s.CreateTags(t.Context(), &ec2.CreateTagsInput{Resources: []string{v}, Tags: []types.Tag{{Key: aws.String("of"), Value: &v}}}))
		write(t, s.attach(v, instanceA, "/dev/sd"+string(rune('f'+i))), v)
	}
	return s, volumes
}

// members asks for a group and returns the snapshots by their volumes.
func (s *sim) members(in types.InstanceSpecification, change ...func(*ec2.CreateSnapshotsInput)) map[string]types.SnapshotInfo {
	s.t.Helper()
	in.InstanceId = aws.String(instanceA)
	request := &ec2.CreateSnapshotsInput{InstanceSpecification: &in}
	for _, c := range change {
		c(request)
	}
	out := must[*ec2.CreateSnapshotsOutput](s.t)(s.CreateSnapshots(s.t.Context(), request))
	got := map[string]types.SnapshotInfo{}
	for _, m := range out.Snapshots {
		got[*m.VolumeId] = m
	}
	if len(got) != len(out.Snapshots) {
		s.t.Errorf("a volume twice in %v", out.Snapshots)
	}
	return got
}

func groupMembers(t *testing.T) {
	s, volumes := attachedPair(t)
	root, other := s.root(instanceA), s.create()
	noBoot := types.InstanceSpecification{ExcludeBootVolume: aws.Bool(true)}
	names := func(got map[string]types.SnapshotInfo) string { return fmt.Sprint(slices.Sorted(maps.Keys(got))) }
	sorted := func(ids ...string) string { slices.Sort(ids); return fmt.Sprint(ids) }

	if got := names(s.members(types.InstanceSpecification{})); got != sorted(volumes[0], volumes[1], root) {
		t.Errorf("with nothing excluded: %s", got)
	}
	if got := names(s.members(types.InstanceSpecification{ExcludeBootVolume: aws.Bool(true), ExcludeDataVolumeIds: volumes[:1]})); got != sorted(volumes[1]) {
		t.Errorf("without the boot volume and one other: %s", got)
	}
	for _, id := range []string{root, other} {
		_, err := s.CreateSnapshots(t.Context(), &ec2.CreateSnapshotsInput{InstanceSpecification: &types.InstanceSpecification{InstanceId: aws.String(instanceA), ExcludeDataVolumeIds: []string{id}}})
		refused(t, err, "InvalidParameterValue")
	}
	got := s.members(noBoot, func(in *ec2.CreateSnapshotsInput) {
		in.Description, in.CopyTagsFromSource = aws.String("told"), types.CopyTagsFromSourceVolume
		in.TagSpecifications = []types.TagSpecification{{ResourceType: types.ResourceTypeSnapshot, Tags: []types.Tag{{Key: aws.String("cut"), Value: aws.String("7")}}}}
	})
	for v, m := range got {
		tags := map[string]string{}
		for _, tag := range m.Tags {
			tags[*tag.Key] = *tag.Value
		}
		if *m.Description != "told" || len(tags) != 2 || tags["of"] != v || tags["cut"] != "7" {
			t.Errorf("%s: %s, %v", v, *m.Description, tags)
		}
	}
	s.detach(volumes[0])
	if got := names(s.members(noBoot)); got != sorted(volumes[1]) {
		t.Errorf("with one detached: %s", got)
	}
}

func groupFaults(t *testing.T) {
	s, volumes := attachedPair(t)
	noBoot := types.InstanceSpecification{ExcludeBootVolume: aws.Bool(true)}
	strike := func(kind ec2sim.Kind) map[string]types.SnapshotInfo {
		t.Helper()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: kind, Nth: 1})
		got := s.members(noBoot)
		if unused := s.ClearFaults(); len(unused) > 0 {
			t.Errorf("not hit: %v", unused)
		}
		return got
	}
	if got := strike(ec2sim.MissingMember); len(got) != 1 {
		t.Errorf("one missing: %v", got)
	}
	swapped := strike(ec2sim.SwapAnswer)
	truth := must[*ec2.DescribeSnapshotsOutput](t)(s.DescribeSnapshots(t.Context(), &ec2.DescribeSnapshotsInput{SnapshotIds: []string{*swapped[volumes[0]].SnapshotId}}))
	if *truth.Snapshots[0].VolumeId != volumes[1] {
		t.Errorf("the answer was not swapped: %v", truth.Snapshots[0])
	}
	bytes := strike(ec2sim.SwapBytes)
	ids := []string{*bytes[volumes[0]].SnapshotId, *bytes[volumes[1]].SnapshotId}
	s.completed(ids...)
	for i, id := range ids {
		described := must[*ec2.DescribeSnapshotsOutput](t)(s.DescribeSnapshots(t.Context(), &ec2.DescribeSnapshotsInput{SnapshotIds: []string{id}}))
		if *described.Snapshots[0].VolumeId != volumes[i] {
			t.Errorf("described as of %s", *described.Snapshots[0].VolumeId)
		}
		if got := s.content(id, "/dev/sd"+string(rune('p'+i))); got != volumes[1-i] {
			t.Errorf("%s of %s holds %s", id, volumes[i], got)
		}
	}
	for _, m := range strike(ec2sim.EndInError) {
		until(t, "error", func() bool { return s.snapshotState(*m.SnapshotId) == types.SnapshotStateError })
	}
	extra := strike(ec2sim.ExtraMember)
	if len(extra) != 3 {
		t.Errorf("one too many: %v", extra)
	}
	for v := range extra {
		if !slices.Contains(volumes, v) && *s.volume(v).Attachments[0].InstanceId != instanceA {
			t.Errorf("%s is not attached", v)
		}
	}
}

// content makes a volume of a snapshot and reads the volume id that is written
// at its start.
func (s *sim) content(snapshot, name string) string {
	s.t.Helper()
	out := must[*ec2.CreateVolumeOutput](s.t)(s.CreateVolume(s.t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), SnapshotId: &snapshot, VolumeType: types.VolumeTypeGp3}))
	until(s.t, "available", func() bool { return s.volume(*out.VolumeId).State == types.VolumeStateAvailable })
	return read(s.t, s.attach(*out.VolumeId, instanceB, name), len(noVolume))
}
