package ec2_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	sdk "github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
	"cleancut/internal/provider/providertest"
)

// field is a server, a provider on instance A, and what tests do with them.
type field struct {
	*cloud
	*testing.T
	p     *ec2.Provider
	aws   *sdk.Client // somebody else in the account
	owner backup.Tags
	count int
}

func newField(t *testing.T, o ec2sim.Options, change ...func(ec2.Options) ec2.Options) *field {
	t.Helper()
	c := start(t, o)
	options := c.options(instanceA)
	for _, f := range change {
		options = f(options)
	}
	return &field{cloud: c, T: t, p: c.open(t, options),
		aws:   sdk.New(sdk.Options{Region: region, BaseEndpoint: &c.url, RetryMaxAttempts: 1, Credentials: credentials.NewStaticCredentialsProvider(ec2sim.AccessKey, ec2sim.SecretKey, "")}),
		owner: backup.Tags{backup.TagBackup: string(backup.NewID(time.Now())), backup.TagCluster: "luck"}}
}

func (f *field) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *field) want(err, sentinel error) {
	f.Helper()
	if !errors.Is(err, sentinel) || sentinel != nil && err == nil {
		f.Errorf("got %v, want %v", err, sentinel)
	}
}

// hinted fails the test unless err says what to do, in these words.
func (f *field) hinted(err error, words string) {
	f.Helper()
	if err == nil || !strings.Contains(backup.HintOf(err), words) {
		f.Errorf("got %v with the hint %q, want %q in it", err, backup.HintOf(err), words)
	}
}

func (f *field) spec() provider.VolumeSpec {
	f.count++
	return provider.VolumeSpec{Token: fmt.Sprintf("luck-%d", f.count), Size: gib, Tags: f.owner}
}

// volumes makes volumes and attaches them to instance A.
func (f *field) volumes(n int) (ids []backup.VolumeID) {
	f.Helper()
	for range n {
		v, err := f.p.CreateVolume(f.Context(), f.spec())
		f.must(err)
		_, err = f.p.Attach(f.Context(), v.ID)
		f.must(err)
		ids = append(ids, v.ID)
	}
	return ids
}

func (f *field) set(ids ...backup.VolumeID) (set provider.Set) {
	for i, id := range ids {
		tags := f.owner.With(backup.TagMember, fmt.Sprint(i)).With(backup.TagVolume, string(id))
		set.Members = append(set.Members, provider.Member{Volume: id, Tags: tags})
	}
	return set
}

// prepare and take, each with its error.
func (f *field) take(set provider.Set) (provider.Taken, error) {
	f.Helper()
	c, err := f.p.Prepare(f.Context(), set)
	f.must(err)
	taken, err := c.Take(f.Context())
	f.must(c.Close())
	return taken, err
}

func idsOf(taken provider.Taken) (ids []backup.SnapshotID) {
	for _, m := range taken.Members {
		ids = append(ids, m.Snapshot)
	}
	return ids
}

// listed returns the snapshots of the owner.
func (f *field) listed() []provider.Snapshot {
	f.Helper()
	inv, err := f.p.List(f.Context(), f.owner)
	f.must(err)
	return inv.Snapshots
}

// sweep deletes the snapshots of the owner, of which there must be n.
func (f *field) sweep(n int) {
	f.Helper()
	var ids []backup.SnapshotID
	for _, s := range f.listed() {
		ids = append(ids, s.ID)
	}
	if len(ids) != n {
		f.Errorf("%d snapshots are found by their tags, want %d", len(ids), n)
	}
	f.must(f.p.DeleteSnapshots(f.Context(), ids, f.owner))
	if left := f.listed(); len(left) > 0 {
		f.Errorf("left: %+v", left)
	}
}

// calls is how often an action was called since before.
func (f *field) calls(action string) int { return f.Calls()[action] }

func TestBadLuck(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := labtest.Pool(t, "xfs", 512<<20)
	for _, c := range []struct {
		sentence string
		run      func(f *field)
		o        ec2sim.Options
	}{
		{"EC2 throttles everything for a minute: all outside of the cut is repeated until it succeeds", throttledForAMinute, ec2sim.Options{}},
		{"a call of the cut that is throttled is not repeated", throttledInside, ec2sim.Options{}},
		{"one of four snapshots is refused: the cut fails, the others are found and removed", oneRefused, ec2sim.Options{}},
		{"one of four snapshots ends in error: it is named, and the backup is void", oneBreaks, ec2sim.Options{}},
		{"the answer of CreateSnapshot is lost: it is not asked again, and what it made is found", lostSnapshot, ec2sim.Options{}},
		{"a cut is cancelled while a call is on its way: its snapshot is found though it comes later", cancelledOnTheWay, ec2sim.Options{}},
		{"CreateSnapshot fails after its effect: the snapshot is found", failsAfter, ec2sim.Options{}},
		{"the answer of CreateVolume is lost: there is one volume", lostVolume, ec2sim.Options{}},
		{"EC2 has forgotten a client token: the volume is found by its tag", forgottenToken, ec2sim.Options{}},
		{"the answers of AttachVolume, DetachVolume, CreateTags and the deletions are lost: done once", lostOthers, ec2sim.Options{}},
		{"a second snapshot turns up with the cut's tag: the cut is void", secondSnapshot, ec2sim.Options{}},
		{"a snapshot's tags name another volume: the cut is void", swappedTags, ec2sim.Options{}},
		{"a volume never attaches: it is detached again, and the error says so", neverAttaches, ec2sim.Options{}},
		{"credentials are refused inside the window: the error says what to do", expiredInside, ec2sim.Options{}},
		{"what is not ours is not deleted, whoever names it", notOurs, ec2sim.Options{}},
		{"a member whose deletion fails is tried again, and named when it stays", deletionFails, ec2sim.Options{}},
		{"a snapshot of the volume was taken a moment ago: Prepare waits for the rate", rateWindow, ec2sim.Options{RateWindow: 300 * time.Millisecond}},
		{"five snapshots of a volume are pending: Prepare refuses", pendingLimit, ec2sim.Options{}},
		{"a permission is missing: the error names it, and is none to fall back from", denied, ec2sim.Options{}},
		{"a device name is taken: the next one", nameTaken, ec2sim.Options{}},
		{"the instance has no attachment left: the limit is explained", attachLimit, ec2sim.Options{Instances: []ec2sim.Instance{{ID: instanceA, MaxVolumes: 2}, {ID: instanceB}}}},
		{"a volume that is attached elsewhere is in use, and no member without attachment", elsewhere, ec2sim.Options{}},
		{"volumes on two instances are no group", twoInstances, ec2sim.Options{}},
	} {
		t.Run(c.sentence, func(t *testing.T) {
			c.o.Pool = pool
			f := newField(t, c.o, func(o ec2.Options) ec2.Options {
				o.SnapshotGap = c.o.RateWindow
				return o
			})
			c.run(f)
		})
	}
}

func throttledForAMinute(f *field) {
	for _, action := range []string{"CreateVolume", "DescribeVolumes", "DescribeInstances", "AttachVolume", "DescribeSnapshots", "CreateSnapshot(DryRun)", "CreateTags",
		"DeleteSnapshot", "DetachVolume", "DeleteVolume"} {
		f.Inject(ec2sim.Fault{Action: action, Kind: ec2sim.Throttle, Nth: 1, Times: 30})
	}
	ids := f.volumes(2)
	taken, err := f.take(f.set(ids...))
	f.must(err)
	f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)))
	f.must(f.p.Complete(f.Context(), idsOf(taken), []backup.Tags{{backup.TagDigest: "5ca1ab1e"}, {backup.TagDigest: "5ca1ab1e"}}))
	f.sweep(2)
	for _, id := range ids {
		f.must(f.p.Detach(f.Context(), id))
		f.must(f.p.DeleteVolume(f.Context(), id, f.owner))
	}
}

func throttledInside(f *field) {
	ids := f.volumes(4)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Throttle})
	_, err := f.take(f.set(ids...))
	f.hinted(err, "request rate")
	if n := f.calls("CreateSnapshot"); n != 4 {
		f.Errorf("%d calls", n)
	}
	f.sweep(0)
}

func oneRefused(f *field) {
	ids := f.volumes(4)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Refuse, Nth: 2, Code: "SnapshotLimitExceeded"})
	_, err := f.take(f.set(ids...))
	f.hinted(err, "quota")
	f.sweep(3)
}

func oneBreaks(f *field) {
	ids := f.volumes(4)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.EndInError, Nth: 3, Delay: 100 * time.Millisecond})
	taken, err := f.take(f.set(ids...))
	f.must(err)
	err = f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 4))
	f.want(err, backup.ErrVoid)
	described, snapErr := f.p.Snapshots(f.Context(), idsOf(taken))
	f.must(snapErr)
	broken := 0
	for _, s := range described {
		if s.State == provider.Broken {
			broken++
			if !strings.Contains(err.Error(), string(s.ID)) {
				f.Errorf("%v does not name %s", err, s.ID)
			}
		}
	}
	if broken != 1 {
		f.Errorf("%d are broken", broken)
	}
	f.sweep(4)
}

func lostSnapshot(f *field) {
	ids := f.volumes(4)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.LoseAnswer, Nth: 2})
	_, err := f.take(f.set(ids...))
	f.hinted(err, "sweep")
	if n := f.calls("CreateSnapshot"); n != 4 {
		f.Errorf("%d calls", n)
	}
	f.sweep(4)
}

func cancelledOnTheWay(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Skew, Delay: 300 * time.Millisecond})
	c, err := f.p.Prepare(f.Context(), f.set(ids...))
	f.must(err)
	ctx, cancel := context.WithTimeout(f.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = c.Take(ctx)
	f.want(err, context.DeadlineExceeded)
	f.must(c.Close())
	f.sweep(2)
}

func failsAfter(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.FailAfter, Nth: 1, Code: "InternalError"})
	_, err := f.take(f.set(ids...))
	f.hinted(err, "sweep")
	f.sweep(2)
}

func lostVolume(f *field) {
	for _, kind := range []ec2sim.Kind{ec2sim.LoseAnswer, ec2sim.FailAfter} {
		f.Inject(ec2sim.Fault{Action: "CreateVolume", Kind: kind, Nth: 1, Code: "InternalError"})
		spec := f.spec()
		v, err := f.p.CreateVolume(f.Context(), spec)
		f.must(err)
		again, err := f.p.CreateVolume(f.Context(), spec)
		f.must(err)
		inv, err := f.p.List(f.Context(), f.owner)
		f.must(err)
		if again != v || len(inv.Volumes) != 1 {
			f.Errorf("%s: got %v and %v, listed %v", kind, v, again, inv.Volumes)
		}
		f.must(f.p.DeleteVolume(f.Context(), v.ID, f.owner))
	}
}

func forgottenToken(f *field) {
	spec := f.spec()
	var list []types.Tag
	for k, v := range f.owner.With("cleancut:token", spec.Token) {
		list = append(list, types.Tag{Key: aws.String(k), Value: aws.String(v)})
	}
	made, err := f.aws.CreateVolume(f.Context(), &sdk.CreateVolumeInput{AvailabilityZone: aws.String(region + "a"), Size: aws.Int32(1), VolumeType: types.VolumeTypeGp3,
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: list}}})
	f.must(err)
	v, err := f.p.CreateVolume(f.Context(), spec)
	f.must(err)
	if string(v.ID) != *made.VolumeId {
		f.Errorf("got %v", v)
	}
	spec.Size *= 2
	_, err = f.p.CreateVolume(f.Context(), spec)
	f.want(err, backup.ErrExists)
}

func lostOthers(f *field) {
	for _, action := range []string{"AttachVolume", "DetachVolume", "CreateTags", "DeleteSnapshot", "DeleteVolume"} {
		f.Inject(ec2sim.Fault{Action: action, Kind: ec2sim.LoseAnswer, Nth: 1})
	}
	ids := f.volumes(1)
	taken, err := f.take(f.set(ids...))
	f.must(err)
	f.must(f.p.Complete(f.Context(), idsOf(taken), []backup.Tags{{backup.TagDigest: "5ca1ab1e"}}))
	if got := f.listed(); len(got) != 1 || got[0].Tags[backup.TagDigest] != "5ca1ab1e" {
		f.Errorf("got %+v", got)
	}
	f.sweep(1)
	f.must(f.p.Detach(f.Context(), ids[0]))
	f.must(f.p.DeleteVolume(f.Context(), ids[0], f.owner))
}

func secondSnapshot(f *field) {
	for _, of := range []int{0, 1} { // of the member, and of another volume
		ids := f.volumes(2)
		taken, err := f.take(f.set(ids[0]))
		f.must(err)
		var list []types.Tag
		for k, v := range f.listed()[0].Tags {
			if k != backup.TagVolume {
				list = append(list, types.Tag{Key: aws.String(k), Value: aws.String(v)})
			}
		}
		late, err := f.aws.CreateSnapshot(f.Context(), &sdk.CreateSnapshotInput{VolumeId: aws.String(string(ids[of])),
			TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeSnapshot, Tags: list}}})
		f.must(err)
		err = f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 1))
		f.want(err, backup.ErrVoid)
		if err != nil && !strings.Contains(err.Error(), *late.SnapshotId) {
			f.Errorf("%v does not name %s", err, *late.SnapshotId)
		}
		f.sweep(2)
	}
}

func swappedTags(f *field) {
	ids := f.volumes(2)
	set := f.set(ids...)
	set.Members[0].Tags, set.Members[1].Tags = set.Members[1].Tags, set.Members[0].Tags
	taken, err := f.take(set)
	f.must(err)
	f.want(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)), backup.ErrVoid)
	f.sweep(2)
}

func neverAttaches(f *field) {
	v, err := f.p.CreateVolume(f.Context(), f.spec())
	f.must(err)
	hasty := f.open(f.T, ec2.Quick(f.options(instanceA), 200*time.Millisecond))
	f.Inject(ec2sim.Fault{Action: "AttachVolume", Kind: ec2sim.NeverAttach, Nth: 1})
	_, err = hasty.Attach(f.Context(), v.ID)
	f.hinted(err, "repeat")
	if _, err = f.p.Attach(f.Context(), v.ID); err != nil { // and it does help
		f.Error(err)
	}
	f.must(f.p.Detach(f.Context(), v.ID))
}

func expiredInside(f *field) {
	ids := f.volumes(2)
	for _, code := range []string{"RequestExpired", "ExpiredToken"} {
		f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Refuse, Times: 2, Code: code})
		_, err := f.take(f.set(ids...))
		f.hinted(err, "credentials")
		if errors.Is(err, backup.ErrUnsupported) {
			f.Errorf("one could fall back from %v", err)
		}
		f.sweep(0)
	}
}

func notOurs(f *field) {
	ids := f.volumes(2)
	taken, err := f.take(f.set(ids...))
	f.must(err)
	other, err := f.aws.CreateSnapshot(f.Context(), &sdk.CreateSnapshotInput{VolumeId: aws.String(string(ids[0]))})
	f.must(err)
	foreign := backup.SnapshotID(*other.SnapshotId)
	f.want(f.p.DeleteSnapshots(f.Context(), append(idsOf(taken), foreign), f.owner), backup.ErrNotOurs)
	if _, err := f.p.Snapshots(f.Context(), append(idsOf(taken), foreign)); err != nil || f.calls("DeleteSnapshot") != 0 {
		f.Errorf("%v, %d calls of DeleteSnapshot", err, f.calls("DeleteSnapshot"))
	}
	made, err := f.aws.CreateVolume(f.Context(), &sdk.CreateVolumeInput{AvailabilityZone: aws.String(region + "a"), Size: aws.Int32(1), VolumeType: types.VolumeTypeGp3,
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: []types.Tag{{Key: aws.String("Name"), Value: aws.String("production")}}}}})
	f.must(err)
	for _, owner := range []backup.Tags{f.owner, nil, {"Name": "production"}} {
		f.want(f.p.DeleteVolume(f.Context(), backup.VolumeID(*made.VolumeId), owner), backup.ErrNotOurs)
	}
	if f.calls("DeleteVolume") != 0 {
		f.Error("DeleteVolume was called")
	}
	f.sweep(2)
}

func deletionFails(f *field) {
	taken, err := f.take(f.set(f.volumes(3)...))
	f.must(err)
	f.Inject(ec2sim.Fault{Action: "DeleteSnapshot", Kind: ec2sim.Refuse, Nth: 2, Code: "IncorrectState"})
	f.must(f.p.DeleteSnapshots(f.Context(), idsOf(taken), f.owner))
	if left := f.listed(); len(left) > 0 {
		f.Errorf("left: %+v", left)
	}
	inv, err := f.p.List(f.Context(), f.owner)
	f.must(err)
	var ids []backup.VolumeID
	for _, v := range inv.Volumes {
		ids = append(ids, v.ID)
	}
	taken, err = f.take(f.set(ids...))
	f.must(err)
	f.Inject(ec2sim.Fault{Action: "DeleteSnapshot", Kind: ec2sim.Refuse, Nth: 2, Code: "InvalidSnapshot.InUse"}, ec2sim.Fault{Action: "DeleteSnapshot", Kind: ec2sim.Refuse, Nth: 4, Times: 9, Code: "InvalidSnapshot.InUse"})
	err = f.p.DeleteSnapshots(f.Context(), idsOf(taken), f.owner)
	f.want(err, backup.ErrInUse)
	left := f.listed()
	if len(left) != 1 || !strings.Contains(fmt.Sprint(err), string(left[0].ID)) {
		f.Errorf("%v, left %+v", err, left)
	}
	f.ClearFaults()
	f.sweep(1)
}

func rateWindow(f *field) {
	ids := f.volumes(2)
	for range 3 {
		taken, err := f.take(f.set(ids...))
		f.must(err)
		f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)))
	}
	f.sweep(6)
}

func pendingLimit(f *field) {
	ids := f.volumes(1)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.NeverComplete})
	for range 5 {
		_, err := f.take(f.set(ids...))
		f.must(err)
	}
	_, err := f.p.Prepare(f.Context(), f.set(ids...))
	f.hinted(err, "completed")
	if f.calls("CreateSnapshot") != 5 {
		f.Error("it was called")
	}
	f.sweep(5)
}

func denied(f *field) {
	ids := f.volumes(1)
	for action, group := range map[string]bool{"CreateSnapshot": false, "CreateSnapshots": true} {
		f.Inject(ec2sim.Fault{Action: action + "(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"})
		set := f.set(ids...)
		set.Group = group
		_, err := f.p.Prepare(f.Context(), set)
		f.hinted(err, "ec2:"+action)
		if errors.Is(err, backup.ErrUnsupported) {
			f.Errorf("one could fall back from %v", err)
		}
		f.ClearFaults()
	}
	taken, err := f.take(f.set(ids...))
	f.must(err)
	f.Inject(ec2sim.Fault{Action: "CreateTags(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"})
	_, err = f.p.Prepare(f.Context(), f.set(ids...))
	f.hinted(err, "ec2:CreateTags")
	f.must(f.p.DeleteSnapshots(f.Context(), idsOf(taken), f.owner))
}

func nameTaken(f *field) {
	f.Inject(ec2sim.Fault{Action: "AttachVolume", Kind: ec2sim.Refuse, Nth: 1, Times: 3, Code: "InvalidParameterValue"})
	f.volumes(1)
	inv, err := f.p.List(f.Context(), f.owner)
	f.must(err)
	v, err := f.aws.DescribeVolumes(f.Context(), &sdk.DescribeVolumesInput{VolumeIds: []string{string(inv.Volumes[0].ID)}})
	f.must(err)
	if got := *v.Volumes[0].Attachments[0].Device; got != "/dev/sdi" {
		f.Errorf("got %s", got)
	}
}

func attachLimit(f *field) {
	f.volumes(1) // and the root volume
	v, err := f.p.CreateVolume(f.Context(), f.spec())
	f.must(err)
	_, err = f.p.Attach(f.Context(), v.ID)
	f.hinted(err, "28")
}

func elsewhere(f *field) {
	v, err := f.p.CreateVolume(f.Context(), f.spec())
	f.must(err)
	if _, err := f.p.Prepare(f.Context(), f.set(v.ID)); err == nil || errors.Is(err, backup.ErrUnsupported) {
		f.Errorf("a volume without attachment: %v", err)
	}
	other := f.open(f.T, f.options(instanceB))
	device, err := other.Attach(f.Context(), v.ID)
	f.must(err)
	_, err = f.p.Attach(f.Context(), v.ID)
	f.want(err, backup.ErrInUse)
	_, err = f.p.Resolve(f.Context(), device)
	f.want(err, backup.ErrNotFound)
	mistaken := f.options(instanceA) // it sees the other's devices
	mistaken.Devices = f.Devices(instanceB)
	_, err = f.open(f.T, mistaken).Resolve(f.Context(), device)
	f.want(err, backup.ErrNotFound)
	f.must(f.p.Detach(f.Context(), v.ID)) // not attached here
	inv, err := f.p.List(f.Context(), f.owner)
	f.must(err)
	if len(inv.Volumes) != 1 || inv.Volumes[0].Attached != instanceB {
		f.Errorf("got %+v", inv.Volumes)
	}
	f.must(other.Detach(f.Context(), v.ID))
}

func twoInstances(f *field) {
	ids := f.volumes(1)
	v, err := f.p.CreateVolume(f.Context(), f.spec())
	f.must(err)
	other := f.open(f.T, f.options(instanceB))
	_, err = other.Attach(f.Context(), v.ID)
	f.must(err)
	set := f.set(ids[0], v.ID)
	set.Group = true
	_, err = f.p.Prepare(f.Context(), set)
	f.want(err, backup.ErrUnsupported)
	f.hinted(err, "--mode freeze")
	set.Group = false
	taken, err := f.take(set)
	f.must(err)
	f.must(f.p.DeleteSnapshots(f.Context(), idsOf(taken), f.owner))
	f.must(other.Detach(f.Context(), v.ID))
}

// TestEC2KeepsTheContractThoughItsDescriptionsAreOld runs the contract while
// every effect stays unseen for the next three descriptions.
func TestEC2KeepsTheContractThoughItsDescriptionsAreOld(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := labtest.Pool(t, "xfs", 512<<20)
	providertest.Run(t, func(t *testing.T) providertest.Harness {
		c := start(t, ec2sim.Options{Pool: pool})
		for _, action := range []string{"CreateVolume", "DeleteVolume", "AttachVolume", "DetachVolume", "CreateSnapshot"} {
			c.Inject(ec2sim.Fault{Action: action, Kind: ec2sim.Stale, N: 3})
		}
		t.Cleanup(func() { c.ClearFaults() }) // not every case needs them all
		return providertest.Harness{Provider: c.open(t, c.options(instanceA)), Size: gib, Foreign: providertest.Loop(t, 1<<20), Hold: claim}
	})
}
