package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// The two ioctls of Linux include/uapi/linux/fs.h that x/sys/unix lacks:
// _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// Freezer freezes a list of filesystems for a moment. Between Freeze and Thaw
// every writer on them waits in the kernel, unkillable; the watchdog, another
// process, thaws them if this one does not.
type Freezer struct {
	targets  []target
	watchdog *Watchdog
	note     string
	begun    bool
	closed   bool
	thawed   bool
	thawErr  error // of the one Thaw
}

type target struct {
	dir    *os.File
	frozen bool // FIFREEZE returned 0 and FITHAW has not been called
	held   bool // FIFREEZE returned 0
	record backup.Frozen
}

// Arm opens every mount point and starts the watchdog with the command argv (see Watch). When it returns, all
// is ready and nothing is frozen. Close must be called.
func Arm(ctx context.Context, argv []string, mountpoints []string, deadline time.Duration) (*Freezer, error) {
	f := &Freezer{}
	for _, mp := range mountpoints {
		dir, err := os.OpenFile(mp, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open %s to freeze it: %w", mp, err), f.Close())
		}
		f.targets = append(f.targets, target{dir: dir, record: backup.Frozen{Mountpoint: mp}})
	}
	if err := fault.Point(ctx, "host.arm"); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	wd, err := startWatchdog(ctx, argv, mountpoints, deadline)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("arm the watchdog: %w", err), f.Close())
	}
	f.watchdog, f.note = wd, wd.note
	if err := fault.Point(ctx, "host.arm done"); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Note returns what the watchdog could not do to protect itself, or "".
func (f *Freezer) Note() string { return f.note }

// Sync writes out what is dirty on every filesystem (syncfs), one after the
// other, and returns how long that took.
func (f *Freezer) Sync(ctx context.Context) (time.Duration, error) {
	if err := fault.Point(ctx, "host.syncfs"); err != nil {
		return 0, err
	}
	start := time.Now()
	for _, t := range f.targets {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if err := unix.Syncfs(int(t.dir.Fd())); err != nil {
			return 0, fmt.Errorf("syncfs %s: %w", t.record.Mountpoint, err)
		}
	}
	return time.Since(start), nil
}

// Freeze freezes all filesystems at the same time: each waits for its own log
// to reach the disk (XFS: xfs_log_quiesce), and one after the other these waits
// would add up (docs/benchmarks.md). The watchdog's clock runs from the
// beginning. A freeze that is flushing cannot be interrupted; ctx is looked at
// before each. On any error the caller must call Close, which thaws those that
// are frozen. Any errno means "not frozen" (Linux fs/super.c, freeze_super).
func (f *Freezer) Freeze(ctx context.Context) error {
	if f.begun || f.thawed || f.closed {
		return errors.New("freeze: called twice, or after Thaw or Close")
	}
	f.begun = true
	if err := f.watchdog.begin(ctx); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	errs := make([]error, len(f.targets))
	var all sync.WaitGroup
	for i := range f.targets {
		all.Go(func() { errs[i] = f.targets[i].freeze(ctx) })
	}
	all.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// held reports whether any filesystem was frozen, thawed by now or not.
func (f *Freezer) held() bool {
	return slices.ContainsFunc(f.targets, func(t target) bool { return t.held })
}

func (t *target) freeze(ctx context.Context) error {
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "host.freeze")); err != nil {
		return err
	}
	t.record.Called = time.Now()
	err := unix.IoctlSetInt(int(t.dir.Fd()), fiFreeze, 0)
	t.record.Held = time.Now()
	if err != nil {
		return freezeError(t.record.Mountpoint, err)
	}
	t.frozen, t.held = true, true
	return fault.Point(ctx, "host.freeze done")
}

func freezeError(mountpoint string, err error) error {
	err = fmt.Errorf("freeze %s: %w", mountpoint, err)
	switch {
	case errors.Is(err, unix.EBUSY):
		return backup.Hint(fmt.Errorf("%w: it is frozen already, by somebody else: %w", err, backup.ErrInUse),
			"if that is a left-over of a crash: `cleancut thaw`, or `fsfreeze -u "+mountpoint+"`")
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: this filesystem cannot be frozen: %w", err, backup.ErrUnsupported)
	case errors.Is(err, unix.EPERM):
		return backup.Hint(err, "run as root: freezing needs CAP_SYS_ADMIN")
	}
	return err
}

// Thaw thaws every filesystem, whatever happens to one of them, then asks the
// watchdog whether it had to act. The error wraps backup.ErrVoid if any of
// them was thawed by somebody else inside the window, or the watchdog fired:
// then the snapshots do not belong together. Called twice: nothing more is
// done, and the records and the error are returned again. Without a Freeze
// before it there is nothing to thaw, and no Freeze comes after it.
func (f *Freezer) Thaw() ([]backup.Frozen, error) {
	if !f.thawed && f.begun {
		f.thawErr = f.thawAll()
		err := f.watchdog.done()
		if err != nil && f.held() {
			err = fmt.Errorf("%w: %w", err, backup.ErrVoid)
		}
		f.thawErr = errors.Join(f.thawErr, err)
	}
	f.thawed = true
	records := make([]backup.Frozen, len(f.targets))
	for i, t := range f.targets {
		records[i] = t.record
	}
	return records, f.thawErr
}

func (f *Freezer) thawAll() error {
	var errs []error
	for i := len(f.targets) - 1; i >= 0; i-- {
		t := &f.targets[i]
		if !t.frozen {
			continue
		}
		t.frozen = false
		if err := unix.IoctlSetInt(int(t.dir.Fd()), fiThaw, 0); err != nil {
			errs = append(errs, fmt.Errorf("thaw %s: it was thawed inside the window (%w): %w", t.record.Mountpoint, err, backup.ErrVoid))
		}
		t.record.Thawed = time.Now()
	}
	return errors.Join(errs...)
}

// Close thaws what is still frozen, ends the watchdog and releases what Arm
// opened. It may be called twice.
func (f *Freezer) Close() error {
	if f.closed {
		return nil
	}
	var errs []error
	if f.begun && !f.thawed {
		_, err := f.Thaw()
		errs = append(errs, err)
	}
	f.closed = true
	if f.watchdog != nil {
		errs = append(errs, f.watchdog.stop())
	}
	for _, t := range f.targets {
		_ = t.dir.Close() // a directory opened for reading has nothing to lose
	}
	return errors.Join(errs...)
}

// Thaw thaws the filesystem mounted at mountpoint until it answers that it is
// not frozen, and reports whether it was.
func Thaw(mountpoint string) (was bool, err error) {
	dir, err := os.OpenFile(mountpoint, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("thaw: %w", err)
	}
	defer dir.Close()
	for {
		err := unix.IoctlSetInt(int(dir.Fd()), fiThaw, 0)
		switch {
		case err == nil:
			was = true
		case errors.Is(err, unix.EINVAL): // not frozen
			return was, nil
		default:
			return was, fmt.Errorf("thaw %s: %w", mountpoint, err)
		}
	}
}
