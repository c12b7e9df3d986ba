package ec2_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	sdk "github.com/aws/aws-sdk-go-v2/service/ec2"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2/ec2sim"
	"cleancut/internal/provider/providertest"
)

// grouped asks for a group wherever the contract's tests do not ask for skew.
type grouped struct{ provider.Provider }

func (g grouped) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	set.Group = set.Skew == 0
	return g.Provider.Prepare(ctx, set)
}

func groupOf(set provider.Set) provider.Set {
	set.Group = true
	return set
}

// TestGroupCuts needs device mapper, with which ec2sim cuts several volumes at
// one instant.
func TestGroupCuts(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	pool := labtest.Pool(t, "xfs", 512<<20) // one for all: it takes seconds in the guest
	for _, c := range []struct {
		sentence string
		run      func(f *field)
	}{
		{"the members and nothing else are cut by one call, and each has its own tags", groupExact},
		{"a volume attached between Prepare and the call is left out", groupLateVolume},
		{"a volume attached a second before the call: the cut is void, and the snapshot too many is found", groupExtra},
		{"a member that is missing in the answer: the cut is void", groupMissing},
		{"an answer with two members exchanged: the cut is void when it is completed", groupSwapped},
		{"the answer of CreateSnapshots is lost: it is not asked again, and what it made is found", groupLost},
		{"CreateSnapshots is throttled: it is not asked again", groupThrottled},
		{"one of the group ends in error: the backup is void", groupBreaks},
		{"the members' own tags are refused after the cut: the snapshots are found by the common ones", groupUntagged},
		{"the process ends between the cut and the tags: the snapshots are found by the common ones", groupKilled},
		{"the root volume may be a member", groupRoot},
	} {
		t.Run(c.sentence, func(t *testing.T) { c.run(newField(t, ec2sim.Options{Pool: pool})) })
	}
	t.Run("the contract", func(t *testing.T) {
		providertest.Run(t, func(t *testing.T) providertest.Harness {
			c := start(t, ec2sim.Options{Pool: pool})
			return providertest.Harness{Provider: grouped{c.open(t, c.options(instanceA))}, Size: gib, Foreign: providertest.Loop(t, 1<<20), Hold: claim}
		})
	})
}

func groupExact(f *field) {
	all := f.volumes(4)
	ids := []backup.VolumeID{all[2], all[0], all[3]}
	taken, err := f.take(groupOf(f.set(ids...)))
	f.must(err)
	if !taken.Atomic || len(taken.Members) != 3 || f.calls("CreateSnapshots") != 1 || f.calls("CreateSnapshot") != 0 {
		f.Errorf("got %+v and the calls %v", taken, f.Calls())
	}
	f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 3)))
	described, err := f.p.Snapshots(f.Context(), idsOf(taken))
	f.must(err)
	for i, s := range described {
		if taken.Members[i].Volume.ID != ids[i] || s.Volume != ids[i] || s.Tags[backup.TagMember] != fmt.Sprint(i) || s.Tags[backup.TagVolume] != string(ids[i]) || !s.Tags.Match(f.owner) {
			f.Errorf("member %d: %+v", i, s)
		}
		if s.Tags[backup.TagCut] == "" || s.Tags[backup.TagCut] != described[0].Tags[backup.TagCut] || !s.Started.Equal(described[0].Started) {
			f.Errorf("member %d is not of one cut: %+v", i, s)
		}
	}
	f.sweep(3)
}

func groupLateVolume(f *field) {
	ids := f.volumes(2)
	c, err := f.p.Prepare(f.Context(), groupOf(f.set(ids...)))
	f.must(err)
	f.volumes(1)
	taken, err := c.Take(f.Context())
	f.must(errors.Join(err, c.Close()))
	f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)))
	f.sweep(2)
}

func groupExtra(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.ExtraMember, Nth: 1})
	_, err := f.take(groupOf(f.set(ids...)))
	f.want(err, backup.ErrVoid)
	f.sweep(3)
}

func groupMissing(f *field) {
	ids := f.volumes(3)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.MissingMember, Nth: 1})
	_, err := f.take(groupOf(f.set(ids...)))
	f.want(err, backup.ErrVoid)
	f.sweep(2)
}

func groupSwapped(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.SwapAnswer, Nth: 1})
	taken, err := f.take(groupOf(f.set(ids...)))
	f.must(err)
	f.want(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)), backup.ErrVoid)
	f.sweep(2)
}

func groupLost(f *field) {
	ids := f.volumes(3)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.LoseAnswer, Nth: 1})
	_, err := f.take(groupOf(f.set(ids...)))
	f.hinted(err, "sweep")
	if f.calls("CreateSnapshots") != 1 {
		f.Errorf("%v", f.Calls())
	}
	f.sweep(3)
}

func groupThrottled(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.Throttle})
	_, err := f.take(groupOf(f.set(ids...)))
	f.hinted(err, "request rate")
	if f.calls("CreateSnapshots") != 1 {
		f.Errorf("%v", f.Calls())
	}
	f.sweep(0)
}

func groupBreaks(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: ec2sim.EndInError, Nth: 1, Delay: 50 * time.Millisecond})
	taken, err := f.take(groupOf(f.set(ids...)))
	f.must(err)
	f.want(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)), backup.ErrVoid)
	f.sweep(2)
}

func groupUntagged(f *field) {
	ids := f.volumes(2)
	f.Inject(ec2sim.Fault{Action: "CreateTags", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"})
	_, err := f.take(groupOf(f.set(ids...)))
	f.hinted(err, "ec2:CreateTags")
	f.sweep(2)
}

func groupKilled(f *field) {
	ids := f.volumes(2)
	c, err := f.p.Prepare(f.Context(), groupOf(f.set(ids...)))
	f.must(err)
	passed := &fault.Injector{Action: "error", At: 2}
	_, err = c.Take(fault.With(f.Context(), passed))
	f.want(err, fault.ErrInjected)
	if got := passed.Passed(); !slices.Equal(got, []string{"ec2.CreateSnapshots", "ec2.CreateSnapshots.done"}) {
		f.Errorf("passed %v", got)
	}
	f.must(c.Close())
	f.sweep(2)
}

func groupRoot(f *field) {
	ids := f.volumes(2)
	out, err := f.aws.DescribeVolumes(f.Context(), &sdk.DescribeVolumesInput{})
	f.must(err)
	for _, v := range out.Volumes {
		if at := v.Attachments; len(at) == 1 && aws.ToString(at[0].InstanceId) == instanceA && aws.ToString(at[0].Device) == "/dev/xvda" {
			ids[1] = backup.VolumeID(*v.VolumeId)
		}
	}
	taken, err := f.take(groupOf(f.set(ids...)))
	f.must(err)
	f.must(f.p.Complete(f.Context(), idsOf(taken), make([]backup.Tags, 2)))
	f.sweep(2)
}
