package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/provider"
)

// What FICLONE of a file with a live loop device costs, measured (lab.md,
// "Native, without md"): per extent, and once.
const (
	cloneExtentXFS   = 20 * time.Microsecond
	cloneExtentBtrfs = 9 * time.Microsecond
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
	if err := p.checkHeadroom(); err != nil {
		return nil, err
	}
	c := &cut{skew: set.Skew, quit: make(chan struct{}), members: make([]*member, len(set.Members))}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.abandon(context.WithoutCancel(ctx), p))
		}
	}()
	var worst int64
	for i, m := range set.Members {
		c.members[i] = &member{tags: m.Tags}
		n, err := p.openSource(c.members[i], m.Volume)
		if err != nil {
			return nil, err
		}
		worst = max(worst, n)
	}
	c.estimate = p.estimate(worst)
	if err := p.announce(ctx, c.members); err != nil {
		return nil, err
	}
	c.standBy()
	return c, nil
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
		"delete old backups (`cleancut prune`) or enlarge the pool")
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
	each := cloneExtentXFS
	if p.fs == fsBtrfs {
		each = cloneExtentBtrfs
	}
	cost := time.Duration(extents)*each + cloneOnce
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

// cut is a prepared cut. Each member has a goroutine on a thread of its own
// that waits for its start and owns the member's descriptors.
type cut struct {
	members  []*member
	skew     time.Duration
	estimate time.Duration

	used    atomic.Bool
	quit    chan struct{} // closed by Close
	closing sync.Once
	running sync.WaitGroup
}

type member struct {
	volume backup.Volume
	tags   backup.Tags
	id     backup.SnapshotID
	source *os.File
	target *os.File

	start                chan context.Context
	done                 chan struct{}
	requested, responded time.Time // valid after done, as is err
	err                  error
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

func (m *member) closeFiles() {
	if m.source != nil {
		_ = m.source.Close()
	}
	if m.target != nil {
		_ = m.target.Close()
	}
}

// standBy starts the goroutines and returns when all of them wait.
func (c *cut) standBy() {
	// Go lends each thread in a system call one of GOMAXPROCS tickets and takes
	// it back after up to 10 ms (runtime/proc.go, retake): on two processors the
	// third FICLONE began 12 ms after the first. Only ever raised, as another
	// cut may be waiting.
	if need := len(c.members) + 2; runtime.GOMAXPROCS(0) < need {
		runtime.GOMAXPROCS(need)
	}
	var ready sync.WaitGroup
	for _, m := range c.members {
		m.start, m.done = make(chan context.Context, 1), make(chan struct{})
		ready.Add(1)
		c.running.Go(func() {
			// Never unlocked: the thread ends with the goroutine and takes its
			// priority along. Best effort: without CAP_SYS_NICE the spread is
			// only larger on a busy host.
			runtime.LockOSThread()
			_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
			defer m.closeFiles()
			defer close(m.done)
			ready.Done()
			select {
			case ctx := <-m.start:
				m.take(ctx)
			case <-c.quit:
				m.err = errors.New("the cut was closed")
			}
		})
	}
	ready.Wait()
}

func (m *member) take(ctx context.Context) {
	if m.err = ctx.Err(); m.err != nil {
		return
	}
	if m.err = fault.Point(ctx, "local.clone"); m.err != nil {
		return
	}
	m.requested = time.Now()
	m.err = clone(m.target, m.source)
	m.responded = time.Now()
	if m.err == nil {
		m.err = fault.Point(ctx, "local.clone.done")
	}
}

func (c *cut) Estimate() time.Duration { return c.estimate }

// Take clones all files. When ctx ends it returns at once; a FICLONE that is
// running cannot be stopped and ends by itself, harmless: nobody writes to its
// target.
func (c *cut) Take(ctx context.Context) (provider.Taken, error) {
	if c.used.Swap(true) {
		return provider.Taken{}, errors.New("take cut: taken already")
	}
	if err := ctx.Err(); err != nil {
		return provider.Taken{}, fmt.Errorf("take cut: %w", err)
	}
	for i, m := range c.members {
		if i > 0 && c.skew > 0 {
			if err := c.pause(ctx, c.members[i-1]); err != nil {
				return provider.Taken{}, fmt.Errorf("take cut: %w", err)
			}
		}
		m.start <- ctx
	}
	taken := provider.Taken{}
	var errs []error
	for _, m := range c.members {
		select {
		case <-m.done:
		case <-ctx.Done():
			return provider.Taken{}, fmt.Errorf("take cut: %w", ctx.Err())
		}
		if m.err != nil {
			errs = append(errs, fmt.Errorf("snapshot of %s: %w", m.volume.ID, m.err))
			continue
		}
		taken.Members = append(taken.Members, provider.TakenMember{Snapshot: m.id, Volume: m.volume, Requested: m.requested, Responded: m.responded})
	}
	if err := errors.Join(errs...); err != nil {
		return provider.Taken{}, fmt.Errorf("take cut: %w", err)
	}
	return taken, nil
}

// pause waits for the member before and then as long as the set's skew.
func (c *cut) pause(ctx context.Context, before *member) error {
	select {
	case <-before.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if before.err != nil {
		return fmt.Errorf("snapshot of %s: %w", before.volume.ID, before.err)
	}
	return sleep(ctx, c.skew)
}

// Close ends the goroutines that never started. One that is in a FICLONE
// closes its descriptors when that returns.
func (c *cut) Close() error {
	c.closing.Do(func() { close(c.quit) })
	return nil
}
