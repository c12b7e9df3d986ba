package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/providertest"
)

func TestTheWatchdogThawsWhenTheFreezerCannot(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	dirs := volumes(t, 2)

	t.Run("the freezer is killed", func(t *testing.T) {
		staysThawed(t, dirs...)
		c := frozen(t, far, dirs...)
		kill(t, c.pid(), syscall.SIGKILL)
		becomesThawed(t, dirs...)
	})

	t.Run("the freezer's whole process group is killed", func(t *testing.T) {
		staysThawed(t, dirs...)
		c := frozen(t, far, dirs...)
		kill(t, -c.pid(), syscall.SIGKILL)
		becomesThawed(t, dirs...)
	})

	t.Run("the freezer's whole cgroup is killed", func(t *testing.T) {
		staysThawed(t, dirs...)
		group := cgroup(t)
		c := startFreezer(t, far, dirs...)
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(c.pid())), 0); err != nil {
			t.Fatal(err)
		}
		c.arm(t, dirs[0])
		own := fmt.Sprintf("cleancut-watchdog-%d", c.watchdog)
		if got := read(t, "/proc/%d/cgroup", c.watchdog); !strings.Contains(got, "0::/"+own+"\n") {
			t.Errorf("the watchdog's cgroups: got %q, want its own %s", got, own)
		}
		c.does(t, "freeze", "ok")
		if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		if err := c.cmd.Wait(); err == nil {
			t.Error("the freezer outlived its cgroup")
		}
		becomesThawed(t, dirs...)
		if _, err := os.Stat(filepath.Join(filepath.Dir(group), own)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the watchdog left its cgroup: %v", err)
		}
	})

	t.Run("the freezer is stopped beyond the deadline", func(t *testing.T) {
		staysThawed(t, dirs...)
		c := frozen(t, 200*time.Millisecond, dirs...)
		kill(t, c.pid(), syscall.SIGSTOP)
		for _, dir := range dirs {
			if err := within(t, "a write", func() error { return writeDurably(filepath.Join(dir, "late"), 1) }); err != nil {
				t.Error(err)
			}
		}
		kill(t, c.pid(), syscall.SIGCONT)
		c.does(t, "thaw", "void")
		c.does(t, "close", "ok")
		becomesThawed(t, dirs...)
	})

	t.Run("the freezer forgets to thaw", func(t *testing.T) {
		staysThawed(t, dirs...)
		f, err := host.Arm(t.Context(), watchdogCommand(), dirs, 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := within(t, "a write", func() error { return writeDurably(filepath.Join(dirs[1], "late"), 1) }); err != nil {
			t.Error(err)
		}
		records, err := f.Thaw()
		if !errors.Is(err, backup.ErrVoid) || !strings.Contains(err.Error(), "deadline") || len(records) != 2 {
			t.Errorf("got %v and %v, want two records, ErrVoid and the deadline", records, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		becomesThawed(t, dirs...)
	})

	t.Run("the watchdog is told to end while it guards", func(t *testing.T) {
		staysThawed(t, dirs...)
		c := frozen(t, far, dirs...)
		for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE} {
			kill(t, c.watchdog, s)
		}
		eventually(t, "no signal is pending", func() bool {
			return strings.Contains(read(t, "/proc/%d/status", c.watchdog), "ShdPnd:\t0000000000000000")
		})
		kill(t, c.pid(), syscall.SIGKILL)
		becomesThawed(t, dirs...)
	})

	t.Run("the program itself plays the watchdog", func(t *testing.T) {
		staysThawed(t, dirs...)
		f, err := host.Arm(t.Context(), labtest.Watchdog(t), dirs, far)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Freeze(t.Context()), f.Close()); err != nil {
			t.Error(err)
		}
		becomesThawed(t, dirs...)
	})
}

func TestTheWatchdogThatIsLost(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	dir := volumes(t, 1)[0]

	t.Run("before the freeze: nothing is frozen", func(t *testing.T) {
		staysThawed(t, dir)
		c := armed(t, far, dir)
		kill(t, c.watchdog, syscall.SIGKILL)
		eventually(t, "the watchdog is dead", func() bool { return len(watchdogs(t, dir)) == 0 })
		c.does(t, "freeze", "error freeze: the watchdog")
		if isFrozen(t, dir) {
			t.Error("frozen without a watchdog")
		}
		c.does(t, "close", "error")
		removeCgroup(t, c.watchdog)
	})

	t.Run("before the freeze, stopped: nothing is frozen", func(t *testing.T) {
		staysThawed(t, dir)
		ctx, cancel := context.WithCancel(t.Context())
		f := arm(t, t.Context(), dir)
		dog := watchdogs(t, dir)[0]
		kill(t, dog, syscall.SIGSTOP)
		eventually(t, "the watchdog is stopped", func() bool { return strings.Trim(threadStates(dog), "T") == "" })
		defer cancel()
		limit := time.AfterFunc(200*time.Millisecond, cancel)
		defer limit.Stop()
		if err := f.Freeze(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want canceled", err)
		}
		if isFrozen(t, dir) {
			t.Error("frozen without a watchdog")
		}
		kill(t, dog, syscall.SIGCONT)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})

	t.Run("inside the window: thawed, and the cut is void", func(t *testing.T) {
		staysThawed(t, dir)
		c := frozen(t, far, dir)
		kill(t, c.watchdog, syscall.SIGKILL)
		c.does(t, "thaw", "void")
		c.does(t, "close", "error watchdog: signal: killed")
		becomesThawed(t, dir)
		removeCgroup(t, c.watchdog)
	})
}

func TestTheWatchdogItself(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	dir := volumes(t, 1)[0]

	t.Run("protects itself before it says armed", func(t *testing.T) {
		staysThawed(t, dir)
		f := arm(t, t.Context(), dir)
		dog := watchdogs(t, dir)[0]
		if got := read(t, "/proc/%d/oom_score_adj", dog); f.Note() == "" && got != "-1000\n" {
			t.Errorf("oom_score_adj: got %q", got)
		}
		if got := read(t, "/proc/%d/status", dog); strings.Contains(got, "VmLck:\t       0 kB") {
			t.Error("nothing of it is locked in memory")
		}
		_, stat, _ := strings.Cut(read(t, "/proc/%d/stat", dog), ") ")
		if fields := strings.Fields(stat); fields[2] != strconv.Itoa(dog) || fields[3] != strconv.Itoa(dog) {
			t.Errorf("process group %s, session %s, want %d", fields[2], fields[3], dog)
		}
		if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", dog)); err != nil || cwd != "/" {
			t.Errorf("works in %q (%v), want /", cwd, err)
		}
		for line := range strings.Lines(read(t, "/proc/%d/cgroup", dog)) {
			if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); parts[1] != "" && parts[2] != "/" {
				t.Errorf("still in cgroup %s", line)
			}
		}
	})

	t.Run("ends when it was never needed, and leaves no cgroup", func(t *testing.T) {
		staysThawed(t, dir)
		f := arm(t, t.Context(), dir)
		dog := watchdogs(t, dir)[0]
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if root := unified(t); root != "" {
			if _, err := os.Stat(filepath.Join(root, fmt.Sprintf("cleancut-watchdog-%d", dog))); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its cgroup: %v", err)
			}
		}
	})

	t.Run("thaws nothing when the freezer dies before it froze", func(t *testing.T) {
		staysThawed(t, dir)
		c := armed(t, far, dir)
		if err := ioctl(t, dir, fiFreeze); err != nil {
			t.Fatal(err)
		}
		kill(t, c.pid(), syscall.SIGKILL)
		eventually(t, "the watchdog ends", func() bool { return len(watchdogs(t, dir)) == 0 })
		if was, err := host.Thaw(dir); err != nil || !was {
			t.Errorf("the other's freeze: got frozen %t and %v, want true", was, err)
		}
	})

	t.Run("shares the freezer's pipe with nobody, whatever starts at the same time", func(t *testing.T) {
		staysThawed(t, dir)
		var all sync.WaitGroup
		defer all.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		started := make(chan bool)
		for range 8 {
			all.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					cmd := exec.CommandContext(ctx, "/bin/sleep", "1000")
					if n > 20 {
						cmd = exec.CommandContext(ctx, "/bin/true")
					}
					if err := cmd.Start(); err != nil {
						continue
					}
					if n == 0 {
						started <- true
					}
					all.Go(func() { _ = cmd.Wait() })
				}
			})
			<-started
		}
		f := arm(t, t.Context(), dir)
		cancel()
		dog := watchdogs(t, dir)[0]
		pipe, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", dog))
		if err != nil {
			t.Fatal(err)
		}
		for pid := range processes(t) {
			fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			for _, fd := range fds {
				if to, err := os.Readlink(fd); err == nil && to == pipe && pid != dog && pid != os.Getpid() {
					t.Errorf("%s is the pipe, too", fd)
				}
			}
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestTheWatchdogOutlivesAFreezeInProgress: a FIFREEZE that still flushes
// cannot be undone. The volume lies on another filesystem that the test
// freezes itself, so that the volume takes no write until the test wants it.
func TestTheWatchdogOutlivesAFreezeInProgress(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	outer := providertest.Mount(t, "xfs", 700<<20)
	staysThawed(t, outer)
	inner := nested(t, outer)
	staysThawed(t, inner)

	for _, c := range []struct {
		name     string
		deadline time.Duration                    // each another, to know its line in the kernel's log
		blocked  func(t *testing.T) (wait func()) // makes the freeze take until outer is thawed
		meanTime func(t *testing.T, f *child)     // while it flushes
		after    string                           // what a living freezer says then
		einval   bool                             // FITHAW does not even wait for it
	}{
		{"killed while dirty pages are flushed", far, dirty(inner, outer), killed, "", false},
		{"killed while a long write is waited for", far, longWrite(inner, outer), killed, "", true},
		{"the deadline passes while dirty pages are flushed", 101 * time.Millisecond, dirty(inner, outer), deadlinePassed, "void", false},
		{"the deadline passes while a long write is waited for", 102 * time.Millisecond, longWrite(inner, outer), deadlinePassed, "void", true},
		{"the deadline passes, then the freezer is killed", 103 * time.Millisecond, longWrite(inner, outer),
			func(t *testing.T, f *child) { deadlinePassed(t, f); killed(t, f) }, "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			staysThawed(t, outer, inner)
			f := armed(t, c.deadline, inner)
			thawed := sync.OnceFunc(func() {
				if err := ioctl(t, outer, fiThaw); err != nil {
					t.Error(err)
				}
			})
			t.Cleanup(thawed)
			wait := c.blocked(t)
			f.tell(t, "freeze")
			eventually(t, "FIFREEZE runs", func() bool { return inFreeze(t, f.pid()) })
			c.meanTime(t, f)
			if c.einval { // the premise: one EINVAL proves nothing
				if err := ioctl(t, inner, fiThaw); !errors.Is(err, unix.EINVAL) {
					t.Errorf("FITHAW during FIFREEZE: got %v, want EINVAL", err)
				}
			}
			if !inFreeze(t, f.pid()) {
				t.Fatal("the freeze did not last: this test shows nothing")
			}
			if len(watchdogs(t, inner)) != 1 {
				t.Error("the watchdog has gone while FIFREEZE runs")
			}
			thawed()
			wait()
			if c.after != "" {
				if got := f.answer(t); got != "ok" {
					t.Errorf("freeze: got %q", got)
				}
				f.does(t, "thaw", c.after)
				f.does(t, "close", "ok")
			}
			becomesThawed(t, inner)
		})
	}
}

// TestTheWatchdogOutlivesASlowFlush kills the freezer of a volume whose
// writeback is limited for the whole machine (the root blkio cgroup).
func TestTheWatchdogOutlivesASlowFlush(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	const limits = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device"
	_, err := os.Stat(limits)
	limited := err == nil // else killed at some moment; TestTheWatchdogOutlivesAFreezeInProgress chooses the moment
	dir := volumes(t, 1)[0]
	m, err := host.MountOf(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := armed(t, far, dir)
	if err := writeDurably(filepath.Join(dir, "big"), 60<<20); err != nil {
		t.Fatal(err)
	}
	limit := func(bps int) {
		if !limited {
			return
		}
		if err := os.WriteFile(limits, fmt.Appendf(nil, "%d:%d %d", m.Major, m.Minor, bps), 0); err != nil {
			t.Error(err)
		}
	}
	limit(20 << 20)
	t.Cleanup(func() { limit(0) })
	f, err := os.OpenFile(filepath.Join(dir, "big"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(make([]byte, 60<<20))
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	c.tell(t, "freeze")
	if limited {
		eventually(t, "FIFREEZE runs", func() bool { return inFreeze(t, c.pid()) })
	}
	kill(t, c.pid(), syscall.SIGKILL)
	becomesThawed(t, dir)
}

// dirty freezes outer under dirty pages of inner.
func dirty(inner, outer string) func(t *testing.T) func() {
	return func(t *testing.T) func() {
		f, err := os.Create(filepath.Join(inner, "dirty"))
		if err != nil {
			t.Fatal(err)
		}
		// The blocks exist beforehand, so that only data is dirty.
		_, err1 := f.Write(make([]byte, 8<<20))
		_, err2 := f.WriteAt(make([]byte, 8<<20), 0)
		if err := errors.Join(err1, err2, f.Close()); err != nil {
			t.Fatal(err)
		}
		if err := ioctl(t, outer, fiFreeze); err != nil {
			t.Fatal(err)
		}
		return func() {}
	}
}

// longWrite begins a synchronous write on inner that ends when outer thaws.
func longWrite(inner, outer string) func(t *testing.T) func() {
	return func(t *testing.T) func() {
		f, err := os.OpenFile(filepath.Join(inner, "long"), os.O_CREATE|os.O_WRONLY|unix.O_DSYNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
		if err := ioctl(t, outer, fiFreeze); err != nil {
			t.Fatal(err)
		}
		w := &writer{dir: inner}
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			w.tid.Store(int64(unix.Gettid()))
			_, err := f.WriteAt(make([]byte, 64<<10), 0)
			done <- errors.Join(err, f.Close())
		}()
		eventually(t, "the write waits", w.waits)
		return func() {
			if err := within(t, "the long write", func() error { return <-done }); err != nil {
				t.Error(err)
			}
		}
	}
}

func killed(t *testing.T, f *child) {
	t.Helper()
	kill(t, f.pid(), syscall.SIGKILL)
	// Every thread but the one in the kernel ends.
	eventually(t, "the freezer is dead but for FIFREEZE", func() bool { return strings.Trim(threadStates(f.pid()), "ZX") == "D" })
}

// deadlinePassed waits until the watchdog has begun to thaw, by its line in
// the kernel's log.
func deadlinePassed(t *testing.T, f *child) {
	t.Helper()
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	mountpoint := f.cmd.Args[len(f.cmd.Args)-1]
	eventually(t, "the watchdog says that the deadline passed", func() bool {
		for b := make([]byte, 8192); ; { // a read is a record; EAGAIN after the last
			n, err := unix.Read(int(log.Fd()), b)
			if errors.Is(err, unix.EPIPE) {
				continue // overtaken
			}
			if err != nil {
				return false
			}
			if line := string(b[:n]); strings.Contains(line, "deadline of "+f.cmd.Args[2]) && strings.Contains(line, mountpoint+"\n") {
				return true
			}
		}
	})
}

func frozen(t *testing.T, deadline time.Duration, mountpoints ...string) *child {
	t.Helper()
	c := armed(t, deadline, mountpoints...)
	c.does(t, "freeze", "ok")
	return c
}

func kill(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, format string, args ...any) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// inFreeze reports whether a thread is inside FIFREEZE. Where the kernel does
// not tell system calls (User Mode Linux), a thread that waits unkillably is.
func inFreeze(t *testing.T, pid int) bool {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), fmt.Sprintf(" %#x ", uint(fiFreeze))) {
			return true
		}
	}
	return len(paths) == 0 && strings.Contains(threadStates(pid), "D")
}

// unified returns where the unified cgroup hierarchy is mounted, or "".
func unified(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc/self/mountinfo")) {
		if before, after, _ := strings.Cut(line, " - "); strings.HasPrefix(after, "cgroup2 ") {
			return strings.Fields(before)[4]
		}
	}
	return ""
}

// cgroup makes a cgroup that can be killed whole.
func cgroup(t *testing.T) string {
	t.Helper()
	root := unified(t)
	if root == "" {
		t.Fatal("no unified cgroup hierarchy is mounted")
	}
	dir, err := os.MkdirTemp(root, "cct-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "the cgroup is empty", func() bool { return !errors.Is(os.Remove(dir), unix.EBUSY) })
	})
	return dir
}

// removeCgroup takes away what a killed watchdog had to leave.
func removeCgroup(t *testing.T, watchdog int) {
	t.Helper()
	if root := unified(t); root != "" {
		if err := os.Remove(filepath.Join(root, fmt.Sprintf("cleancut-watchdog-%d", watchdog))); err != nil {
			t.Error(err)
		}
	}
}

// nested mounts a filesystem that lies in a file of outer.
func nested(t *testing.T, outer string) string {
	t.Helper()
	image := filepath.Join(outer, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 320<<20)); err != nil {
		t.Fatal(err)
	}
	device := run(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() { run(t, "losetup", "--detach", device) })
	run(t, "mkfs.xfs", "-q", device)
	dir := t.TempDir()
	run(t, "mount", device, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}
