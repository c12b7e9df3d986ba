package host

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// thawer owns one filesystem's descriptor and a thread of its own, because
// FITHAW blocks while a freeze is flushing and must not hold up the others.
type thawer struct {
	dir  *os.File
	pass chan chan error // ask for one FITHAW
}

func openThawers(mountpoints []string) ([]*thawer, error) {
	var out []*thawer
	for _, mp := range mountpoints {
		dir, err := os.OpenFile(mp, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", mp, err)
		}
		t := &thawer{dir: dir, pass: make(chan chan error)}
		go func() {
			runtime.LockOSThread()
			for answer := range t.pass {
				answer <- unix.IoctlSetInt(int(t.dir.Fd()), fiThaw, 0)
			}
		}()
		out = append(out, t)
	}
	return out, nil
}

// thawUntil repeats FITHAW on every filesystem until over has returned and,
// after that, each of them has answered EINVAL to a FITHAW begun later.
func thawUntil(thawers []*thawer, over func()) {
	ended := make(chan struct{})
	go func() { over(); close(ended) }()
	var all sync.WaitGroup
	for _, t := range thawers {
		all.Go(func() {
			answer := make(chan error)
			for {
				last := isClosed(ended)
				t.pass <- answer
				err := <-answer
				if last && errors.Is(err, unix.EINVAL) {
					return
				}
				if err != nil {
					time.Sleep(5 * time.Millisecond)
				}
			}
		})
	}
	all.Wait()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// harden makes sure that nothing but the kernel ends this process before it
// is done. A container that lacks CAP_SYS_RESOURCE cannot exempt it from the
// OOM killer: that is returned as a note for the manifest, since the freeze is
// still guarded against everything else.
func harden() (note string, err error) {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT)
	debug.SetGCPercent(-1)
	err = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	if errors.Is(err, os.ErrPermission) {
		note, err = "the watchdog is not exempt from the OOM killer (CAP_SYS_RESOURCE is missing)", nil
	}
	if err != nil {
		return "", fmt.Errorf("exempt the watchdog from the OOM killer: %w", err)
	}
	if err := faultInText(); err != nil {
		return "", err
	}
	// ONFAULT: lock what is or comes into memory, not the runtime's reservations.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return "", fmt.Errorf("lock the watchdog in memory: %w", err)
	}
	return note, nil
}

// faultInText reads the program's own code into memory, so that no page of it
// must come from a disk that may be frozen or full.
func faultInText() error {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("read own memory map: %w", err)
	}
	for line := range strings.SplitSeq(string(maps), "\n") {
		f := strings.Fields(line)
		if len(f) < 6 || !strings.Contains(f[1], "r") || !strings.HasPrefix(f[5], "/") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		a, err1 := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil {
			continue
		}
		// MADV_POPULATE_READ came with Linux 5.14; before it MADV_WILLNEED must do.
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, uintptr(a), uintptr(b-a), unix.MADV_POPULATE_READ); e == unix.EINVAL {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(a), uintptr(b-a), unix.MADV_WILLNEED)
		}
	}
	return nil
}

// leaveCgroup moves this process out of the cgroups it was started in, so
// that killing or limiting those does not reach it: into a cgroup of its own
// in the unified hierarchy, into the root of each old one. The returned undo
// removes the own cgroup again.
func leaveCgroup() (undo func(), err error) {
	undo = func() {}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return undo, nil // a kernel without cgroups
		}
		return undo, err
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	for line := range strings.SplitSeq(strings.TrimSpace(string(own)), "\n") {
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 {
			continue
		}
		root, err := cgroupRoot(parts[1])
		switch {
		case err != nil:
			return undo, err
		case root == "" && parts[2] == "/":
			continue // not mounted, and not in any group of it
		case root == "":
			return undo, fmt.Errorf("hierarchy %q is not mounted and we are in its %s", parts[1], parts[2])
		}
		to := root
		if parts[1] == "" {
			group := filepath.Join(root, "cleancut-watchdog-"+string(pid))
			// It exists if a killed watchdog had our number.
			if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return undo, err
			}
			undo = func() {
				_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), pid, 0)
				_ = os.Remove(group)
			}
			to = group
		}
		if err := os.WriteFile(filepath.Join(to, "cgroup.procs"), pid, 0); err != nil {
			return undo, err
		}
	}
	return undo, nil
}

// cgroupRoot returns where a hierarchy is mounted: the unified one for "",
// else the old one with exactly these controllers. "" if it is not mounted.
func cgroupRoot(controllers string) (string, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.FSType != "cgroup" && i.FSType != "cgroup2", false
	})
	if err != nil {
		return "", fmt.Errorf("read mountinfo: %w", err)
	}
	for _, i := range infos {
		if controllers == "" && i.FSType == "cgroup2" {
			return i.Mountpoint, nil
		}
		if controllers != "" && i.FSType == "cgroup" && hasAll(i.VFSOptions, controllers) {
			return i.Mountpoint, nil
		}
	}
	return "", nil
}

func hasAll(options, controllers string) bool {
	for c := range strings.SplitSeq(controllers, ",") {
		if !strings.Contains(","+options+",", ","+c+",") {
			return false
		}
	}
	return true
}

// tellKernelLog leaves a line where an operator looks first and where writing
// cannot block on a frozen filesystem. It is best effort: there may be no
// /dev/kmsg.
func tellKernelLog(line string) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.WriteString(line + "\n")
}
