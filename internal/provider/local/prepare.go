package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// What FICLONE of a file with a live loop device costs, at most: per extent,
// and once. lab.md ("Native, without md") has 20 µs an extent for XFS and 9 µs
// for btrfs, one file alone. Clones in one pool at the same time take as long
// as one after the other, so the extents of all members count, and then btrfs
// took 12 to 21 µs, XFS 8 to 12 µs (BenchmarkTake, 4 and 32 members).
const (
	cloneExtent      = 20 * time.Microsecond
	cloneOnce        = 20 * time.Millisecond
	freeingFactorXFS = 5 // while extents of deleted clones are being freed
)

// Prepare makes the snapshots' sidecars, state pending, and their empty files,
// and opens all descriptors. On an error it removes what it made.
func (p *Pool) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	c, err := p.prepare(ctx, set)
	if err != nil {
		return nil, fmt.Errorf("prepare cut: %w", err)
	}
	return c, nil
}

func (p *Pool) prepare(ctx context.Context, set provider.Set) (_ *cut, err error) {
	if err := checkSet(ctx, set); err != nil {
		return nil, err
	}
	if set.Group {
		return nil, backup.Hint(fmt.Errorf("the local provider cannot cut several volumes at one instant by itself: %w", backup.ErrUnsupported), "freeze them: --mode freeze")
	}
	if err := p.checkHeadroom(); err != nil {
		return nil, err
	}
	c := &cut{skew: set.Skew, members: make([]*member, len(set.Members))}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.abandon(context.WithoutCancel(ctx), p))
		}
	}()
	var count int64
	for i, m := range set.Members {
		c.members[i] = &member{tags: m.Tags}
		n, err := p.openSource(c.members[i], m.Volume)
		if err != nil {
			return nil, err
		}
		count += n
	}
	c.estimate = p.estimate(count)
	if err := p.announce(ctx, c.members); err != nil {
		return nil, err
	}
	return c, c.standBy()
}

func checkSet(ctx context.Context, set provider.Set) error {
	if len(set.Members) == 0 {
		return fmt.Errorf("%w: no volume in the set", backup.ErrUsage)
	}
	seen := map[backup.VolumeID]bool{}
	for _, m := range set.Members {
		if seen[m.Volume] {
			return fmt.Errorf("%w: volume %s twice in the set", backup.ErrUsage, m.Volume)
		}
		if !ours(m.Tags) {
			return fmt.Errorf("%w: volume %s without a tag of cleancut for its snapshot", backup.ErrUsage, m.Volume)
		}
		seen[m.Volume] = true
	}
	return ctx.Err()
}

func (p *Pool) checkHeadroom() error {
	var st unix.Statfs_t
	if err := unix.Statfs(p.dir, &st); err != nil {
		return fmt.Errorf("free space of pool %s: %w", p.dir, err)
	}
	free := backup.Bytes(int64(st.Bavail) * st.Bsize)
	size := backup.Bytes(int64(st.Blocks) * st.Bsize)
	need := max(size/100*backup.Bytes(p.opts.headroomPercent), p.opts.headroomMin)
	if free >= need {
		return nil
	}
	return backup.Hint(fmt.Errorf("pool %s has %s of %s free, less than %s: after a cut overwritten blocks need new space, and production would stop when there is none", p.dir, free, size, need),
		"delete old backups (`cleancut delete`) or enlarge the pool")
}

// openSource checks that a member is an attached volume, opens its file and
// counts its extents.
func (p *Pool) openSource(m *member, id backup.VolumeID) (int64, error) {
	v, err := p.readVolume(id)
	if err != nil {
		return 0, err
	}
	l, err := p.attached(id)
	if err != nil {
		return 0, err
	}
	if l == nil {
		return 0, backup.Hint(fmt.Errorf("volume %s is not attached", id), "a cut is of volumes in use on this host; see `cleancut topology`")
	}
	image, err := inodeOf(p.volumeFile(id, ".img"))
	if err != nil {
		return 0, err
	}
	if err := l.verify(image, v.Size); err != nil {
		return 0, err
	}
	m.volume = v.volume()
	if m.source, err = os.Open(p.volumeFile(id, ".img")); err != nil {
		return 0, err
	}
	return extents(m.source)
}

func (p *Pool) estimate(extents int64) time.Duration {
	cost := time.Duration(extents)*cloneExtent + cloneOnce
	if p.fs == fsXFS && p.freedLately() {
		cost *= freeingFactorXFS
	}
	return cost
}

// announce makes sidecars and empty files, durably, the sidecars first. Their
// locks are held meanwhile, so that nobody deletes half of one.
func (p *Pool) announce(ctx context.Context, members []*member) error {
	folder := filepath.Join(p.dir, "snapshots")
	var locks []*held
	defer func() {
		for _, l := range locks {
			l.release()
		}
	}()
	err := effect(ctx, "local.snapshot.sidecars", func() error {
		for _, m := range members {
			id := backup.SnapshotID("snap-" + newTail())
			text, err := encode(snapshotInfo{Version: sidecarVersion, Snapshot: provider.Snapshot{ID: id, Volume: m.volume.ID,
				Size: m.volume.Size, State: provider.Pending, Started: time.Now().UTC(), Tags: m.tags}})
			if err != nil {
				return err
			}
			lock, err := putFile(p.snapshotFile(id, ".json"), text)
			if err != nil {
				return err
			}
			m.id = id
			locks = append(locks, lock)
		}
		return syncDir(folder)
	})
	if err != nil {
		return err
	}
	return effect(ctx, "local.snapshot.images", func() error {
		for _, m := range members {
			var err error
			m.target, err = os.OpenFile(p.snapshotFile(m.id, ".img"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
			if err != nil {
				return err
			}
			if err := m.target.Sync(); err != nil {
				return err
			}
		}
		return syncDir(folder)
	})
}

// abandon undoes a Prepare that failed.
func (c *cut) abandon(ctx context.Context, p *Pool) error {
	var errs []error
	for _, m := range c.members {
		if m == nil {
			continue
		}
		m.closeFiles()
		if m.id != "" {
			errs = append(errs, p.deleteSnapshot(ctx, m.id))
		}
	}
	return errors.Join(errs...)
}
