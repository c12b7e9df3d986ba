package ec2sim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

func TestAMountedDeviceStaysBusyUntilItIsUnmounted(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	v := s.create()
	device := s.attach(v, instanceA, "/dev/sdf")
	run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1", device)
	dir := t.TempDir()
	run(t, "mount", device, dir)
	out, err := s.DetachVolume(t.Context(), &ec2.DetachVolumeInput{VolumeId: &v})
	if err != nil || out.State != types.VolumeAttachmentStateDetaching {
		t.Errorf("got %v, %v", out, err)
	}
	until(t, "busy", func() bool {
		now := s.volume(v)
		return now.State == types.VolumeStateInUse && now.Attachments[0].State == types.VolumeAttachmentStateBusy
	})
	if s.node(v, instanceA) != device {
		t.Error("a busy device is not seen any more")
	}
	run(t, "umount", dir)
	until(t, "available", func() bool { return s.volume(v).State == types.VolumeStateAvailable })
	if left := s.node(v, instanceA); left != "" {
		t.Errorf("%s is still seen", left)
	}
}

func TestOnXenADeviceHasTheNameThatWasAskedForAndNoSerial(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{Instances: []ec2sim.Instance{{ID: instanceA, Xen: true}, {ID: instanceB}}})
	v := s.create()
	if node := s.attach(v, instanceA, "/dev/sdf"); node != "" {
		t.Errorf("a serial number of %s", node)
	}
	link := filepath.Join(s.Devices(instanceA), "dev/xvdf")
	target, err := os.Readlink(link)
	if err != nil || !strings.HasPrefix(target, "/dev/") {
		t.Fatalf("got %q, %v", target, err)
	}
	write(t, link, "by its name")
	s.detach(v)
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the name is left: %v", err)
	}
	if got := read(t, s.attach(v, instanceB, "/dev/sdg"), 11); got != "by its name" {
		t.Errorf("got %q", got)
	}
}

func TestASerialNumberIsPaddedAsNVMeDoes(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	v := s.create()
	device := s.attach(v, instanceA, "/dev/sdf")
	for name, want := range map[string]string{"serial": fmt.Sprintf("%-20s\n", strings.Replace(v, "-", "", 1)), "model": fmt.Sprintf("%-40s\n", "Amazon Elastic Block Store")} {
		got, err := os.ReadFile(filepath.Join(s.Devices(instanceA), "sys/block", filepath.Base(device), "device", name))
		if err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

// filter makes one of the SDK's.
func filter(name string, values ...string) types.Filter {
	return types.Filter{Name: &name, Values: values}
}

func TestDescribesChooseByIdByFilterAndByPage(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	ctx := t.Context()
	var all []string
	for i := range 7 {
		out := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(ctx, &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(int32(i + 1)),
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: []types.Tag{{Key: aws.String("n"), Value: aws.String(fmt.Sprint(i % 2))}}}}}))
		all = append(all, *out.VolumeId)
	}
	until(t, "available", func() bool { return s.volume(all[6]).State == types.VolumeStateAvailable })
	s.attach(all[0], instanceA, "/dev/sdf")
	rootB := s.root(instanceB)
	for _, c := range []struct {
		name    string
		filters []types.Filter
		want    []string
	}{
		{"by a tag", []types.Filter{filter("tag:n", "1")}, []string{all[1], all[3], all[5]}},
		{"by a tag's key", []types.Filter{filter("tag-key", "n")}, all},
		{"by one of two values", []types.Filter{filter("size", "2", "5")}, []string{all[1], all[4]}},
		{"by all filters", []types.Filter{filter("size", "2", "5"), filter("tag:n", "0")}, []string{all[4]}},
		{"by a pattern", []types.Filter{filter("tag:n", "?"), filter("volume-id", all[2][:12]+"*")}, []string{all[2]}},
		{"by its instance", []types.Filter{filter("attachment.instance-id", instanceA), filter("attachment.device", "/dev/sdf")}, []string{all[0]}},
		{"by its state", []types.Filter{filter("attachment.instance-id", instanceB), filter("status", "in-use")}, []string{rootB}},
		{"by what none is", []types.Filter{filter("tag:n", "2")}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := must[*ec2.DescribeVolumesOutput](t)(s.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{Filters: c.filters}))
			var got []string
			for _, v := range out.Volumes {
				got = append(got, *v.VolumeId)
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
	t.Run("in pages, of which the filter leaves some empty", func(t *testing.T) {
		pages := ec2.NewDescribeVolumesPaginator(s, &ec2.DescribeVolumesInput{MaxResults: aws.Int32(5), Filters: []types.Filter{filter("size", "7")}})
		var counts []int
		for pages.HasMorePages() {
			counts = append(counts, len(must[*ec2.DescribeVolumesOutput](t)(pages.NextPage(ctx)).Volumes))
		}
		if fmt.Sprint(counts) != "[0 1]" {
			t.Errorf("got %v", counts)
		}
	})
	t.Run("snapshots by volume and tag, and of others none", func(t *testing.T) {
		out := must[*ec2.CreateSnapshotOutput](t)(s.CreateSnapshot(ctx, &ec2.CreateSnapshotInput{VolumeId: &all[0], Description: aws.String("d"),
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSnapshot, Tags: []types.Tag{{Key: aws.String("cut"), Value: aws.String("1")}}}}}))
		s.completed(*out.SnapshotId)
		must[*ec2.CreateTagsOutput](t)(s.CreateTags(ctx, &ec2.CreateTagsInput{Resources: []string{*out.SnapshotId}, Tags: []types.Tag{{Key: aws.String("later"), Value: aws.String("")}}}))
		for owner, want := range map[string]int{"self": 1, ec2sim.Account: 1, "amazon": 0} {
			got := must[*ec2.DescribeSnapshotsOutput](t)(s.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{OwnerIds: []string{owner},
				Filters: []types.Filter{filter("volume-id", all[0]), filter("tag:cut", "1"), filter("tag-key", "later"), filter("status", "completed")}}))
			if len(got.Snapshots) != want {
				t.Errorf("owner %s: %d", owner, len(got.Snapshots))
			}
			if want == 1 && (*got.Snapshots[0].Progress != "100%" || *got.Snapshots[0].Description != "d" || *got.Snapshots[0].VolumeSize != 1) {
				t.Errorf("got %+v", got.Snapshots[0])
			}
		}
	})
	t.Run("instances by what is attached", func(t *testing.T) {
		out := must[*ec2.DescribeInstancesOutput](t)(s.DescribeInstances(ctx, &ec2.DescribeInstancesInput{Filters: []types.Filter{filter("block-device-mapping.volume-id", all[0])}}))
		i := out.Reservations[0].Instances[0]
		if len(out.Reservations) != 1 || *i.InstanceId != instanceA || len(i.BlockDeviceMappings) != 2 || *i.Placement.AvailabilityZone != zone || i.InstanceType != "m5.2xlarge" {
			t.Errorf("got %+v", out.Reservations)
		}
	})
}

func TestFaults(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{Completion: time.Millisecond})
	ctx := t.Context()
	v := s.create()
	owned := func() int {
		t.Helper()
		return len(must[*ec2.DescribeSnapshotsOutput](t)(s.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{OwnerIds: []string{"self"}})).Snapshots)
	}
	cleared := func(t *testing.T) {
		t.Helper()
		if unused := s.ClearFaults(); len(unused) > 0 {
			t.Errorf("not hit: %v", unused)
		}
	}
	t.Run("throttled three times, then served", func(t *testing.T) {
		before := owned()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Throttle, Times: 3})
		for range 3 {
			refused(t, s.snapshotErr(v), "RequestLimitExceeded")
		}
		if err := s.snapshotErr(v); err != nil || owned() != before+1 {
			t.Errorf("then: %v, %d more", err, owned()-before)
		}
		cleared(t)
	})
	t.Run("the second call fails after its effect", func(t *testing.T) {
		before := owned()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.FailAfter, Nth: 2, Code: "InternalError"})
		if err := s.snapshotErr(v); err != nil {
			t.Error(err)
		}
		refused(t, s.snapshotErr(v), "InternalError")
		if owned() != before+2 {
			t.Errorf("%d more", owned()-before)
		}
		cleared(t)
	})
	t.Run("an answer is lost, its effect not", func(t *testing.T) {
		before := owned()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.LoseAnswer, Times: 1})
		if err := s.snapshotErr(v); err == nil || !strings.Contains(err.Error(), "EOF") {
			t.Errorf("got %v", err)
		}
		if owned() != before+1 {
			t.Errorf("%d more", owned()-before)
		}
		cleared(t)
	})
	t.Run("what was made is not seen by the next two describes", func(t *testing.T) {
		before := owned()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Stale, N: 2, Times: 1})
		if err := s.snapshotErr(v); err != nil {
			t.Error(err)
		}
		if got := []int{owned() - before, owned() - before, owned() - before}; fmt.Sprint(got) != "[0 0 1]" {
			t.Errorf("seen: %v", got)
		}
		cleared(t)
	})
	t.Run("what was deleted is seen once more", func(t *testing.T) {
		snap := s.snapshot(v)
		s.Inject(ec2sim.Fault{Action: "DeleteSnapshot", Kind: ec2sim.Stale, N: 1})
		s.deleteSnapshots([]string{snap})
		if got := s.snapshotState(snap); got != types.SnapshotStateCompleted {
			t.Errorf("got %s", got)
		}
		_, err := s.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{SnapshotIds: []string{snap}})
		refused(t, err, "InvalidSnapshot.NotFound")
		cleared(t)
	})
	t.Run("a snapshot ends in error", func(t *testing.T) {
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.EndInError, Nth: 1})
		out := must[*ec2.CreateSnapshotOutput](t)(s.CreateSnapshot(ctx, &ec2.CreateSnapshotInput{VolumeId: &v}))
		until(t, "error", func() bool { return s.snapshotState(*out.SnapshotId) == types.SnapshotStateError })
		refused(t, s.createErr(func(in *ec2.CreateVolumeInput) { in.SnapshotId = out.SnapshotId }), "IncorrectState")
		cleared(t)
	})
	t.Run("an attachment hangs and can be undone", func(t *testing.T) {
		s.Inject(ec2sim.Fault{Action: "AttachVolume", Kind: ec2sim.NeverAttach, Nth: 1})
		if err := s.attachErr(v, instanceA, "/dev/sdf"); err != nil {
			t.Fatal(err)
		}
		if a := s.volume(v).Attachments[0]; a.State != types.VolumeAttachmentStateAttaching {
			t.Errorf("got %s", a.State)
		}
		s.detach(v)
		cleared(t)
	})
	t.Run("a hook comes before the effect", func(t *testing.T) {
		var then int
		before := owned()
		s.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Hook, Nth: 1, Do: func(context.Context) { then = owned() - before }})
		if err := s.snapshotErr(v); err != nil || then != 0 || owned() != before+1 {
			t.Errorf("%v: %d, then %d", err, then, owned()-before)
		}
		cleared(t)
	})
	t.Run("one that never hits is told", func(t *testing.T) {
		s.Inject(ec2sim.Fault{Action: "DeleteVolume", Kind: ec2sim.Throttle})
		if unused := s.ClearFaults(); len(unused) != 1 {
			t.Errorf("got %v", unused)
		}
	})
}

func TestCloseNamesWhatItCouldNotTakeAway(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := labtest.Pool(t, "xfs", 512<<20)
	first, err := ec2sim.New(t.Context(), ec2sim.Options{Pool: pool})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ec2sim.New(t.Context(), ec2sim.Options{Pool: pool}); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("a second server on the same devices: %v", err)
	}
	s := serve(t, first)
	kept, gone := s.create(), s.create()
	device := s.attach(kept, instanceA, "/dev/sdf")
	s.attach(gone, instanceA, "/dev/sdg")
	s.snapshot(kept)
	hold, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = first.Close()
	if !errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), kept) || strings.Contains(err.Error(), gone) {
		t.Errorf("got %v, want one that names %s", err, kept)
	}
	if err := errors.Join(hold.Close(), first.Close()); err != nil {
		t.Error(err)
	}
	second, err := ec2sim.New(t.Context(), ec2sim.Options{Pool: pool})
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(pool, "*s", "*.img"))
	if err != nil || len(left) > 0 {
		t.Errorf("the next server left %v, %v", left, err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.CommandContext(labtest.Context(t), argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}
