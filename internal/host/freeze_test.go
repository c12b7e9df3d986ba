package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
)

// far is a deadline that no test reaches.
const far = 10 * time.Minute

func arm(t *testing.T, ctx context.Context, mountpoints ...string) *host.Freezer {
	t.Helper()
	f, err := host.Arm(ctx, watchdogCommand(), mountpoints, far)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// writer writes and syncs on one filesystem until it is stopped.
type writer struct {
	dir   string
	tid   atomic.Int64
	count atomic.Int64
	stop  atomic.Bool
	err   error
}

func (w *writer) run() {
	runtime.LockOSThread()
	w.tid.Store(int64(unix.Gettid()))
	f, err := os.Create(filepath.Join(w.dir, "written"))
	if err != nil {
		w.err = err
		return
	}
	for !w.stop.Load() && w.err == nil {
		_, err := f.WriteAt(make([]byte, 8192), 0)
		w.err = errors.Join(err, f.Sync())
		w.count.Add(1)
	}
	w.err = errors.Join(w.err, f.Close())
}

func (w *writer) waits() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", w.tid.Load()))
	return err == nil && strings.Contains(string(b), ") D ")
}

func TestFreeze(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	dirs := volumes(t, 3)

	t.Run("writers stop at the freeze and go on at the thaw", func(t *testing.T) {
		staysThawed(t, dirs...)
		var all sync.WaitGroup
		writers := make([]*writer, len(dirs))
		for i, dir := range dirs {
			writers[i] = &writer{dir: dir}
			all.Go(writers[i].run)
		}
		f := arm(t, t.Context(), dirs...)
		for _, w := range writers {
			eventually(t, "the writer writes", func() bool { return w.count.Load() > 2 })
		}
		if took, err := f.Sync(t.Context()); err != nil || took <= 0 {
			t.Errorf("sync: got %v and %v", took, err)
		}
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		frozen := make([]int64, len(dirs))
		for i, w := range writers {
			eventually(t, "the writer waits in the kernel", w.waits)
			frozen[i] = w.count.Load()
		}
		for _, dir := range dirs {
			if !isFrozen(t, dir) {
				t.Errorf("%s is not frozen", dir)
			}
		}
		for i, w := range writers {
			if n := w.count.Load() - frozen[i]; n > 1 { // one write may have ended just before
				t.Errorf("%s: %d writes ended while it was frozen", w.dir, n)
			}
		}
		records, err := f.Thaw()
		if err != nil {
			t.Fatal(err)
		}
		for i, w := range writers {
			then := w.count.Load()
			eventually(t, "the writer goes on", func() bool { return w.count.Load() > then+2 })
			r := records[i]
			if r.Mountpoint != dirs[i] || r.Called.IsZero() || r.Held.Before(r.Called) || r.Thawed.Before(r.Held) {
				t.Errorf("record %d: got %+v", i, r)
			}
			w.stop.Store(true)
		}
		all.Wait()
		for _, w := range writers {
			if w.err != nil {
				t.Error(w.err)
			}
		}
		again, err := f.Thaw()
		if err != nil || len(again) != len(records) || again[0] != records[0] {
			t.Errorf("thaw again: got %v and %v, want %v", again, err, records)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if again, err := f.Thaw(); err != nil || len(again) != len(records) {
			t.Errorf("thaw after close: got %v and %v", again, err)
		}
	})

	t.Run("Close thaws", func(t *testing.T) {
		staysThawed(t, dirs...)
		f := arm(t, t.Context(), dirs...)
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
		becomesThawed(t, dirs...)
	})

	t.Run("freezing twice, after a thaw or after a close is an error", func(t *testing.T) {
		staysThawed(t, dirs...)
		f := arm(t, t.Context(), dirs...)
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := f.Freeze(t.Context()); err == nil {
			t.Error("froze twice")
		}
		if _, err := f.Thaw(); err != nil {
			t.Error(err)
		}
		if err := f.Freeze(t.Context()); err == nil {
			t.Error("froze after a thaw")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := f.Freeze(t.Context()); err == nil {
			t.Error("froze after a close")
		}
	})

	t.Run("a thaw without a freeze does nothing, and neither does its close", func(t *testing.T) {
		staysThawed(t, dirs...)
		f := arm(t, t.Context(), dirs...)
		if _, err := f.Thaw(); err != nil {
			t.Error(err)
		}
		if err := f.Freeze(t.Context()); err == nil {
			t.Error("froze after a thaw")
		}
	})

	t.Run("a second filesystem that cannot be frozen thaws the first", func(t *testing.T) {
		staysThawed(t, dirs...)
		tmpfs := t.TempDir()
		run(t, "mount", "-t", "tmpfs", "tmpfs", tmpfs)
		t.Cleanup(func() { run(t, "umount", tmpfs) })
		f := arm(t, t.Context(), dirs[0], tmpfs, dirs[1])
		err := f.Freeze(t.Context())
		if !errors.Is(err, backup.ErrUnsupported) || !strings.Contains(err.Error(), tmpfs) {
			t.Errorf("got %v, want ErrUnsupported and the mount point", err)
		}
		if !isFrozen(t, dirs[0]) {
			t.Error("before Close the first is not frozen: nothing is proven")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		becomesThawed(t, dirs[0], dirs[1])
	})

	t.Run("a second filesystem that somebody else froze thaws the first and stays frozen", func(t *testing.T) {
		staysThawed(t, dirs...)
		if err := ioctl(t, dirs[1], fiFreeze); err != nil {
			t.Fatal(err)
		}
		f := arm(t, t.Context(), dirs...)
		err := f.Freeze(t.Context())
		if !errors.Is(err, backup.ErrInUse) || !strings.Contains(backup.HintOf(err), "fsfreeze -u "+dirs[1]) {
			t.Errorf("got %v (hint %q), want ErrInUse and a hint", err, backup.HintOf(err))
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		becomesThawed(t, dirs[0], dirs[2])
		if was, err := host.Thaw(dirs[1]); err != nil || !was {
			t.Errorf("the other's freeze: got frozen %t and %v, want true", was, err)
		}
		if was, err := host.Thaw(dirs[1]); err != nil || was {
			t.Errorf("thawed again: got frozen %t and %v, want false", was, err)
		}
	})

	t.Run("a foreign thaw inside the window voids the cut", func(t *testing.T) {
		staysThawed(t, dirs...)
		f := arm(t, t.Context(), dirs...)
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := ioctl(t, dirs[1], fiThaw); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := f.Thaw(); !errors.Is(err, backup.ErrVoid) || !strings.Contains(err.Error(), dirs[1]) {
				t.Errorf("got %v, want ErrVoid and the mount point, each time", err)
			}
		}
		becomesThawed(t, dirs...)
	})

	t.Run("the end of ctx between two freezes leaves nothing frozen", func(t *testing.T) {
		staysThawed(t, dirs...)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var frozen atomic.Int64
		ctx = fault.With(ctx, &fault.Injector{Log: func(name string) {
			if name == "host.freeze done" {
				frozen.Add(1)
				cancel()
			}
		}})
		f := arm(t, ctx, dirs...)
		if err := f.Freeze(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want canceled", err)
		}
		if frozen.Load() == 0 {
			t.Error("nothing was frozen before ctx ended")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		becomesThawed(t, dirs...)
	})

	t.Run("a failure at any point leaves nothing frozen and no watchdog", func(t *testing.T) {
		var passed int
		for at := 0; at <= passed; at++ { // 0 only counts
			i := &fault.Injector{Action: "error", At: at}
			ctx := fault.With(t.Context(), i)
			err := func() (err error) {
				f, err := host.Arm(ctx, watchdogCommand(), dirs[:2], far)
				if err != nil {
					if f != nil {
						t.Errorf("at %d: both a freezer and an error", at)
					}
					return err
				}
				defer func() { err = errors.Join(err, f.Close()) }()
				if _, err := f.Sync(ctx); err != nil {
					return err
				}
				if err := f.Freeze(ctx); err != nil {
					return err
				}
				_, err = f.Thaw()
				return err
			}()
			if got := errors.Is(err, fault.ErrInjected); got != (at > 0) || !got && err != nil {
				t.Errorf("at %d: got %v", at, err)
			}
			if errors.Is(err, backup.ErrVoid) {
				t.Errorf("at %d: a cut that never began is not void: %v", at, err)
			}
			becomesThawed(t, dirs[:2]...)
			passed = max(passed, len(i.Passed()))
		}
		if passed < 6 {
			t.Errorf("passed %d points only", passed)
		}
	})
}

func TestArmThatFailsFreezesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	dir := volumes(t, 1)[0]
	for _, c := range []struct {
		name string
		argv []string
		more []string
		say  string
	}{
		{"the watchdog is not there", []string{"/nonexistent/watchdog"}, nil, "start /nonexistent/watchdog"},
		{"the watchdog says something else", []string{"/bin/echo", "hello"}, nil, `said "hello`},
		{"the watchdog ends without a word", []string{"/bin/true"}, nil, `said ""`},
		{"the watchdog fails", []string{"/bin/false"}, nil, `exit status 1`},
		{"the watchdog cannot open a mount point", append(watchdogCommand(), "nonsense"), nil, `said ""`},
		{"a mount point is not there", watchdogCommand(), []string{filepath.Join(dir, "none")}, "to freeze it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			staysThawed(t, dir)
			f, err := host.Arm(t.Context(), c.argv, append([]string{dir}, c.more...), far)
			if err == nil || f != nil || !strings.Contains(err.Error(), c.say) {
				t.Errorf("got %v and error %v, want none and %q", f, err, c.say)
			}
			if isFrozen(t, dir) {
				t.Error("frozen")
			}
		})
	}
	t.Run("ctx ends before the watchdog has answered", func(t *testing.T) {
		staysThawed(t, dir)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f, err := host.Arm(ctx, []string{"/bin/sh", "-c", "cat >/dev/null"}, []string{dir}, far)
		if !errors.Is(err, context.Canceled) || f != nil {
			t.Errorf("got %v and %v, want canceled", f, err)
		}
	})
}

func TestThawRefusesWhatIsNoMountPoint(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	if _, err := host.Thaw(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
}
