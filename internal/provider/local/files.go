package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// tempFile opens a file without a name in dir: a crash leaves nothing of it
// (open(2), O_TMPFILE).
func tempFile(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
}

// held is an exclusive flock(2) on a file.
type held struct{ file *os.File }

func (h *held) release() { _ = h.file.Close() }

// putFile makes the file name with these bytes, whole or not at all, and
// returns it locked: nobody can have locked it before. ErrExists if the name
// is taken. The caller fsyncs the folder.
func putFile(name string, text []byte) (*held, error) {
	f, err := writeTemp(name, text)
	if err != nil {
		return nil, err
	}
	if err := linkTemp(f, name); err != nil {
		_ = f.Close()
		if errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%s: %w", name, backup.ErrExists)
		}
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	return &held{f}, nil
}

// replaceFile exchanges the contents of name, whole or not at all. The caller
// holds the lock of name, which ends with this call: it is on the file that
// was replaced.
func replaceFile(name string, text []byte) error {
	f, err := writeTemp(name, text)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// rename(2) needs a name to rename; a crash before it leaves one that the
	// next replacement, or the deletion of name, removes.
	next := name + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := linkTemp(f, next); err != nil {
		return fmt.Errorf("make %s: %w", next, err)
	}
	if err := os.Rename(next, name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

func writeTemp(name string, text []byte) (*os.File, error) {
	f, err := tempFile(filepath.Dir(name))
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write %s: %w", name, err)
	}
	return f, nil
}

// linkTemp gives a file of tempFile its name; the form with /proc is the one
// of open(2) that needs no capability.
func linkTemp(f *os.File, name string) error {
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
}

// lockFile waits for the exclusive lock of an existing file. The sidecar of a
// volume or snapshot is its lock: it is there from the first to the last. A
// file that was replaced or deleted meanwhile is opened again; gone for good:
// ErrNotFound.
func lockFile(ctx context.Context, name string) (*held, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", name, backup.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			if sameFile(f, name) {
				return &held{f}, nil
			}
			_ = f.Close()
			continue
		}
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
}

func sameFile(f *os.File, name string) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(name)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// sleep waits, or returns ctx's error.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// removePair deletes an image and then its sidecar, so that a crash between
// the two leaves what List shows and a repetition finishes. The caller holds
// the sidecar's lock.
func (p *Pool) removePair(ctx context.Context, image, sidecar string) error {
	err := effect(ctx, "local.unlink.image", func() error {
		if st, err := os.Stat(image); err == nil && st.Size() > 0 {
			if err := p.markFreed(); err != nil {
				return err
			}
		}
		return removeDurably(image)
	})
	if err != nil {
		return err
	}
	return effect(ctx, "local.unlink.sidecar", func() error {
		if err := os.Remove(sidecar + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return removeDurably(sidecar)
	})
}

func removeDurably(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// markFreed notes that extents are being freed: XFS does that in the
// background and clones take several times as long meanwhile (lab.md).
func (p *Pool) markFreed() error {
	name := filepath.Join(p.dir, "freed")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_ = f.Close()
	now := time.Now()
	return os.Chtimes(name, now, now)
}

// freedLately reports whether something was deleted a short time ago.
func (p *Pool) freedLately() bool {
	st, err := os.Stat(filepath.Join(p.dir, "freed"))
	return err == nil && time.Since(st.ModTime()) < p.opts.freedWindow
}
