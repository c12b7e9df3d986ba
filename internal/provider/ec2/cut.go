package ec2

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/provider"
)

// cut is a prepared cut. It has nothing open but idle connections.
type cut struct {
	p        *Provider
	api      *ec2.Client // sends each call once
	http     *http.Client
	expires  aws.Credentials
	members  []member
	common   backup.Tags // what the tags of all members have in common
	group    bool
	instance string
	exclude  exclusion
	skew     time.Duration

	used atomic.Bool
}

type member struct {
	volume backup.Volume
	tags   backup.Tags
}

// Estimate is not known: EC2 promises no time for its calls.
func (c *cut) Estimate() time.Duration { return 0 }

// Take sends CreateSnapshots, or one CreateSnapshot for each member at the same
// time, each once: on any error, also a lost answer, it returns that error. It
// describes and verifies nothing while writers wait; Complete does. In a group,
// where nobody waits, it describes the instance once more before, and adds the
// members' own tags after.
func (c *cut) Take(ctx context.Context) (provider.Taken, error) {
	taken, err := c.take(ctx)
	if err != nil {
		return provider.Taken{}, fmt.Errorf("take cut: %w", err)
	}
	return taken, nil
}

func (c *cut) take(ctx context.Context) (provider.Taken, error) {
	if c.used.Swap(true) {
		return provider.Taken{}, errors.New("taken or closed already")
	}
	if err := ctx.Err(); err != nil {
		return provider.Taken{}, err
	}
	if c.expires.CanExpire && !time.Now().Before(c.expires.Expires) {
		return provider.Taken{}, backup.Hint(errors.New("the credentials for AWS have expired since the cut was prepared"), advice("ExpiredToken", ""))
	}
	if c.group {
		return c.takeGroup(ctx)
	}
	// A caller without a deadline shall not stay frozen for ever.
	ctx, cancel := context.WithTimeout(ctx, c.p.o.pace.attempt)
	defer cancel()
	if c.skew > 0 {
		return c.takeSkewed(ctx)
	}
	taken := provider.Taken{Members: make([]provider.TakenMember, len(c.members))}
	errs := make([]error, len(c.members))
	var all sync.WaitGroup
	for i, m := range c.members {
		// All are waited for, also when one has failed: what the others make is
		// then in the past, and found by its tags.
		all.Go(func() { taken.Members[i], errs[i] = c.snapshot(ctx, m) })
	}
	all.Wait()
	return taken, errors.Join(errs...)
}

// takeSkewed is for the drill.
func (c *cut) takeSkewed(ctx context.Context) (taken provider.Taken, err error) {
	for i, m := range c.members {
		if i > 0 {
			if err := pause(ctx, c.skew); err != nil {
				return taken, err
			}
		}
		t, err := c.snapshot(ctx, m)
		if err != nil {
			return taken, err
		}
		taken.Members = append(taken.Members, t)
	}
	return taken, nil
}

// snapshot sends one CreateSnapshot. Its point in time lies between the request
// and the answer, which says pending or completed (EBS user guide, "Create EBS
// snapshots").
func (c *cut) snapshot(ctx context.Context, m member) (t provider.TakenMember, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("snapshot of %s: %w", m.volume.ID, err)
		}
	}()
	if err := fault.Point(ctx, "ec2.CreateSnapshot"); err != nil {
		return t, err
	}
	requested := time.Now()
	out, err := c.api.CreateSnapshot(ctx, m.input())
	responded := time.Now()
	if err != nil {
		if unknownEffect(err) {
			c.p.made.add(lostKey(m.tags[backup.TagCut], string(m.volume.ID)), m.tags)
		}
		return t, inside(ctx, "CreateSnapshot", err)
	}
	t = provider.TakenMember{Snapshot: backup.SnapshotID(aws.ToString(out.SnapshotId)), Volume: m.volume, Requested: requested, Responded: responded}
	c.p.made.add(string(t.Snapshot), m.tags)
	if volume := aws.ToString(out.VolumeId); t.Snapshot == "" || volume != string(m.volume.ID) || !begun(out.State) {
		return t, fmt.Errorf("EC2 answered snapshot %q of volume %q in state %q: %w", t.Snapshot, volume, out.State, backup.ErrVoid)
	}
	return t, fault.Point(ctx, "ec2.CreateSnapshot.done")
}

func begun(s types.SnapshotState) bool {
	return s == types.SnapshotStatePending || s == types.SnapshotStateCompleted
}

// unknownEffect reports whether a call that failed may have had, or may yet
// have, its effect. List then waits for that a while.
func unknownEffect(err error) bool {
	var answered smithy.APIError
	if !errors.As(err, &answered) {
		return true
	}
	switch answered.ErrorCode() {
	case "InternalError", "InternalFailure", "Unavailable", "ServiceUnavailable":
		return true
	}
	return false
}

// inside turns an error of a call of the cut into ours. Without an answer of
// EC2 the call may have had its effect, and is not repeated.
func inside(ctx context.Context, action string, err error) error {
	var answered smithy.APIError
	if ctx.Err() == nil && !errors.As(err, &answered) {
		return backup.Hint(fmt.Errorf("%s: the answer was lost: %w", action, err), "whatever it made carries the backup's tags and is removed by them (`cleancut sweep`); take another backup")
	}
	return border(ctx, action, err)
}

// takeGroup sends CreateSnapshots and compares what it took with the members.
func (c *cut) takeGroup(ctx context.Context) (taken provider.Taken, err error) {
	var ids []backup.VolumeID
	for _, m := range c.members {
		ids = append(ids, m.volume.ID)
	}
	// A volume attached since Prepare. If this fails, what Prepare found will
	// do: a volume too many is seen in the answer.
	if fresh, err := c.p.exclusion(ctx, c.api, c.instance, ids); err == nil {
		c.exclude = fresh
	}
	if err := fault.Point(ctx, "ec2.CreateSnapshots"); err != nil {
		return taken, err
	}
	limited, cancel := context.WithTimeout(ctx, c.p.o.pace.attempt)
	defer cancel()
	requested := time.Now()
	out, err := c.api.CreateSnapshots(limited, c.groupInput())
	responded := time.Now()
	if err != nil {
		for _, m := range c.members {
			if unknownEffect(err) {
				c.p.made.add(lostKey(m.tags[backup.TagCut], string(m.volume.ID)), c.common)
			}
		}
		return taken, inside(limited, "CreateSnapshots", err)
	}
	for _, s := range out.Snapshots {
		c.p.made.add(aws.ToString(s.SnapshotId), c.common)
	}
	taken, err = c.compare(out.Snapshots, requested, responded)
	if err != nil {
		return taken, err
	}
	if err := fault.Point(ctx, "ec2.CreateSnapshots.done"); err != nil {
		return taken, err
	}
	err = c.addMemberTags(ctx, taken)
	if errors.Is(err, backup.ErrUnsupported) { // which would ask for another cut
		err = void("%v", err)
	}
	return taken, err
}

// compare demands exactly the members, begun at one time: StartTime "is the
// same for all snapshots initiated by the same request" (EC2 API reference,
// SnapshotInfo).
func (c *cut) compare(got []types.SnapshotInfo, requested, responded time.Time) (provider.Taken, error) {
	taken := provider.Taken{Atomic: true}
	byVolume, wanted := map[string]types.SnapshotInfo{}, map[string]bool{}
	for _, m := range c.members {
		wanted[string(m.volume.ID)] = true
	}
	for _, s := range got {
		volume := aws.ToString(s.VolumeId)
		if _, twice := byVolume[volume]; twice {
			return taken, void("CreateSnapshots took volume %s twice", volume)
		}
		if !wanted[volume] {
			return taken, void("CreateSnapshots took a volume too many, %s (%s): it was attached a moment before", volume, aws.ToString(s.SnapshotId))
		}
		byVolume[volume] = s
	}
	for _, m := range c.members {
		s, ok := byVolume[string(m.volume.ID)]
		if !ok {
			return taken, void("CreateSnapshots left out volume %s", m.volume.ID)
		}
		switch first := got[0]; {
		case aws.ToString(s.SnapshotId) == "" || !begun(s.State):
			return taken, void("CreateSnapshots answered snapshot %q of volume %s in state %q", aws.ToString(s.SnapshotId), m.volume.ID, s.State)
		case s.StartTime == nil || first.StartTime == nil || !s.StartTime.Equal(*first.StartTime):
			return taken, void("CreateSnapshots began %s and %s at different times, %s and %s", aws.ToString(first.SnapshotId), aws.ToString(s.SnapshotId), aws.ToTime(first.StartTime), aws.ToTime(s.StartTime))
		}
		taken.Members = append(taken.Members, provider.TakenMember{Snapshot: backup.SnapshotID(aws.ToString(s.SnapshotId)), Volume: m.volume, Requested: requested, Responded: responded})
	}
	return taken, nil
}

// addMemberTags adds what the members' tags do not have in common: all
// snapshots of one CreateSnapshots get the same tags.
func (c *cut) addMemberTags(ctx context.Context, taken provider.Taken) error {
	errs := make([]error, len(c.members))
	var all sync.WaitGroup
	for i, m := range c.members {
		own := maps.Clone(m.tags)
		maps.DeleteFunc(own, func(key, _ string) bool { _, common := c.common[key]; return common })
		if len(own) == 0 {
			continue
		}
		all.Go(func() {
			errs[i] = c.p.addTags(ctx, []backup.SnapshotID{taken.Members[i].Snapshot}, []backup.Tags{own})
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// Close lets the connections go.
func (c *cut) Close() error {
	c.used.Store(true)
	c.http.CloseIdleConnections()
	return nil
}

// String is for messages.
func (x exclusion) String() string {
	out := slices.Clone(x.data)
	if x.root {
		out = append(out, "the root volume")
	}
	if len(out) == 0 {
		return "nothing"
	}
	return strings.Join(out, ", ")
}
