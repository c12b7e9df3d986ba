package ec2

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
)

// tagBatch is how many resources one CreateTags takes.
const tagBatch = 500

// deleteTries is how often a member is tried whose deletion fails while the
// others are gone: a part of a set is worth nothing.
const deleteTries = 3

// Complete waits, if need be for hours, until every snapshot is completed. It
// demands that the cut's own tag is on exactly these snapshots, one of each
// volume, before and after the wait; otherwise the error wraps backup.ErrVoid,
// as it does for a snapshot that ended in `error`. The contract is
// provider.Provider's.
func (p *Provider) Complete(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error {
	if err := p.complete(ctx, ids, tags); err != nil {
		return fmt.Errorf("complete the snapshots: %w", err)
	}
	return nil
}

func (p *Provider) complete(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error {
	if len(ids) != len(tags) || len(ids) == 0 {
		return fmt.Errorf("%w: %d snapshots and tags for %d", backup.ErrUsage, len(ids), len(tags))
	}
	for _, t := range tags {
		if err := checkTags(t); err != nil {
			return err
		}
	}
	if err := p.checkCut(ctx, ids); err != nil {
		return err
	}
	if err := p.waitCompleted(ctx, ids); err != nil {
		return err
	}
	// Once more: what a lost answer had made may have come to light late.
	if err := p.checkCut(ctx, ids); err != nil {
		return err
	}
	return p.addTags(ctx, ids, tags)
}

// checkCut compares the snapshots that carry the cut's tag with the wanted.
func (p *Provider) checkCut(ctx context.Context, ids []backup.SnapshotID) error {
	found, missing, err := p.snapshotsByID(ctx, ids)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("snapshot %s: %w", strings.Join(missing, ", "), backup.ErrNotFound)
	}
	cut := tagsOf(found[ids[0]].Tags)[backup.TagCut]
	for _, id := range ids {
		if got := tagsOf(found[id].Tags)[backup.TagCut]; cut == "" || got != cut {
			return fmt.Errorf("snapshots %s and %s are not of one cut (tag %s %q and %q): %w", ids[0], id, backup.TagCut, cut, got, backup.ErrVoid)
		}
	}
	all, err := p.snapshots(ctx, ownAccount(), filter("tag:"+backup.TagCut, literal(cut)))
	if err != nil {
		return err
	}
	volumes := map[string]backup.SnapshotID{}
	for _, s := range all { // the wanted ones are known from above, even if this list is behind
		found[backup.SnapshotID(aws.ToString(s.SnapshotId))] = s
	}
	for _, id := range slices.Sorted(maps.Keys(found)) {
		volume := aws.ToString(found[id].VolumeId)
		if other, twice := volumes[volume]; twice {
			return void("the cut has two snapshots of volume %s, %s and %s", volume, other, id)
		}
		if !slices.Contains(ids, id) {
			return void("the cut has a snapshot too many: %s of volume %s", id, volume)
		}
		if tagged := tagsOf(found[id].Tags)[backup.TagVolume]; tagged != "" && tagged != volume {
			return void("snapshot %s is of volume %s, and its tags say of %s", id, volume, tagged)
		}
		volumes[volume] = id
	}
	return nil
}

func void(format string, args ...any) error {
	return backup.Hint(fmt.Errorf(format+": %w", append(args, backup.ErrVoid)...), "take another backup; the snapshots of this one are found by their tags (`cleancut sweep`)")
}

// waitCompleted polls without end: EC2 copies for hours.
func (p *Provider) waitCompleted(ctx context.Context, ids []backup.SnapshotID) error {
	reported := -1
	return p.until(ctx, 0, p.o.pace.complete, func() (bool, error) {
		found, missing, err := p.snapshotsByID(ctx, ids)
		if err != nil {
			return false, err
		}
		if len(missing) > 0 {
			return false, fmt.Errorf("snapshot %s: %w", strings.Join(missing, ", "), backup.ErrNotFound)
		}
		completed := 0
		for _, id := range ids {
			switch s := found[id]; s.State {
			case types.SnapshotStateCompleted:
				completed++
			case types.SnapshotStatePending:
			default:
				return false, void("snapshot %s of volume %s ended in state %s %s", id, aws.ToString(s.VolumeId), s.State, aws.ToString(s.StateMessage))
			}
		}
		if completed != reported {
			p.log.DebugContext(ctx, "snapshots completed", slog.Int("completed", completed), slog.Int("of", len(ids)))
			reported = completed
		}
		return completed == len(ids), nil
	})
}

// addTags adds tags[i] to ids[i], with one call for all that get the same.
func (p *Provider) addTags(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error {
	done := make([]bool, len(ids))
	for i := range ids {
		if done[i] || len(tags[i]) == 0 {
			continue
		}
		var same []string
		for k := i; k < len(ids) && len(same) < tagBatch; k++ {
			if !done[k] && maps.Equal(tags[k], tags[i]) {
				done[k] = true
				same = append(same, string(ids[k]))
			}
		}
		err := p.settled(ctx, same[0], func() error {
			return effect(ctx, "CreateTags", func() error {
				_, err := p.api.CreateTags(ctx, &ec2.CreateTagsInput{Resources: same, Tags: awsTags(tags[i])})
				return err
			})
		})
		if err != nil {
			return fmt.Errorf("tag %s: %w", strings.Join(same, ", "), err)
		}
	}
	return nil
}

// DeleteSnapshots deletes a whole set by DeleteSnapshot, after a fresh
// description of all of it. A snapshot of another account is ErrNotOurs. A
// member whose deletion fails is tried again, the others are deleted
// meanwhile, and the error names what is left. The contract is
// provider.Provider's.
func (p *Provider) DeleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error {
	if err := p.deleteSnapshots(ctx, ids, owner); err != nil {
		return fmt.Errorf("delete snapshots: %w", err)
	}
	return nil
}

func (p *Provider) deleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(ids) == 0 {
		return nil
	}
	found, _, err := p.snapshotsByID(ctx, ids)
	if err != nil {
		return err
	}
	for _, id := range ids {
		s, there := found[id]
		if tags := tagsOf(s.Tags); there && (!tags.Match(owner) || !ours(tags)) {
			return fmt.Errorf("%s: %w", id, backup.ErrNotOurs)
		}
	}
	var left []backup.SnapshotID
	for id := range found {
		left = append(left, id)
	}
	slices.Sort(left)
	var errs []error
	wait := p.o.pace.poll
	for try := range deleteTries {
		if try > 0 {
			if err := pause(ctx, wait); err != nil {
				return errors.Join(append(errs, err)...)
			}
			wait *= 2
		}
		if left, errs = p.deleteEach(ctx, left); len(left) == 0 {
			return p.waitDeleted(ctx, ids)
		}
	}
	return backup.Hint(errors.Join(errs...), "the rest of the set is gone: repeat, until nothing of it is left")
}

// deleteEach deletes what it can and returns the others.
func (p *Provider) deleteEach(ctx context.Context, ids []backup.SnapshotID) (left []backup.SnapshotID, errs []error) {
	for _, id := range ids {
		err := effect(ctx, "DeleteSnapshot", func() error {
			_, err := p.api.DeleteSnapshot(ctx, &ec2.DeleteSnapshotInput{SnapshotId: aws.String(string(id))})
			return err
		})
		if err != nil && !errors.Is(err, backup.ErrNotFound) {
			left, errs = append(left, id), append(errs, fmt.Errorf("%s: %w", id, err))
			continue
		}
		p.made.forget(string(id))
	}
	return left, errs
}

// waitDeleted waits until EC2 does not show the snapshots any more.
func (p *Provider) waitDeleted(ctx context.Context, ids []backup.SnapshotID) error {
	return p.until(ctx, p.o.pace.change, p.o.pace.pollMax, func() (bool, error) {
		found, _, err := p.snapshotsByID(ctx, ids)
		return len(found) == 0, err
	})
}
