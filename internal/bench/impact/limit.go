package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

const (
	blkio  = "/sys/fs/cgroup/blkio"
	memory = "/sys/fs/cgroup/memory"
)

// groupOf is this process's cgroup (version 1) of a controller, or an error
// with what to do.
func groupOf(controller string) (string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 && f[1] == controller {
			return f[2], nil
		}
	}
	return "", backup.Hint(fmt.Errorf("no cgroup of version 1 with the controller %s: %w", controller, backup.ErrNotFound), "boot with systemd.unified_cgroup_hierarchy=0")
}

// limitVolume limits a block device for everybody, the kernel's writeback
// included, by the root blkio cgroup: limits of other groups do not bind
// writeback. undo takes the limits away; one that stays is an error.
func limitVolume(device string, iops int, throughput backup.Bytes) (undo func() error, err error) {
	group, err := groupOf("blkio")
	if err != nil {
		return nil, err
	}
	if group != "/" {
		return nil, backup.Hint(fmt.Errorf("this process is in the blkio cgroup %s, which the root's limits do not bind", group), "start it in the root blkio cgroup: echo $$ > "+blkio+"/cgroup.procs")
	}
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	limits := map[string]int64{"read_iops": int64(iops), "write_iops": int64(iops), "read_bps": int64(throughput), "write_bps": int64(throughput)}
	file := func(name string) string { return filepath.Join(blkio, "blkio.throttle."+name+"_device") }
	undo = func() error {
		var errs []error
		for name := range limits {
			errs = append(errs, os.WriteFile(file(name), []byte(number+" 0"), 0), gone(file(name), number))
		}
		return errors.Join(errs...)
	}
	for name, limit := range limits {
		if err := os.WriteFile(file(name), fmt.Appendf(nil, "%s %d", number, limit), 0); err != nil {
			return nil, errors.Join(fmt.Errorf("limit %s: %w", device, err), undo())
		}
	}
	return undo, nil
}

// gone reports a limit that is still there.
func gone(file, number string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, number+" ") {
			return backup.Hint(fmt.Errorf("%s still holds %q: %w", file, strings.TrimSpace(line), backup.ErrLeft), fmt.Sprintf("echo '%s 0' > %s", number, file))
		}
	}
	return nil
}

// memoryGroup is a memory cgroup: the machine's memory, as far as the server
// and the tools see it. The kernel's page cache counts.
type memoryGroup struct{ dir, parent string }

func newMemoryGroup(limit backup.Bytes) (memoryGroup, error) {
	group, err := groupOf("memory")
	if err != nil {
		return memoryGroup{}, err
	}
	g := memoryGroup{parent: filepath.Join(memory, group)}
	g.dir = filepath.Join(g.parent, fmt.Sprintf("cleancut-impact-%d", os.Getpid()))
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return g, fmt.Errorf("memory cgroup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(g.dir, "memory.limit_in_bytes"), []byte(strconv.FormatInt(int64(limit), 10)), 0); err != nil {
		return g, errors.Join(fmt.Errorf("memory cgroup: %w", err), os.Remove(g.dir))
	}
	return g, nil
}

// run runs f on a thread that is in the group, so that all processes that f
// starts are, too: a child begins in the group of the thread that forks it.
func (g memoryGroup) run(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		tid := strconv.AppendInt(nil, int64(unix.Gettid()), 10)
		if err := os.WriteFile(filepath.Join(g.dir, "tasks"), tid, 0); err != nil {
			result <- fmt.Errorf("memory cgroup: %w", err)
			return // the thread ends with this goroutine
		}
		err := f()
		if back := os.WriteFile(filepath.Join(g.parent, "tasks"), tid, 0); back == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// remove removes the group, when the last of its processes is gone.
func (g memoryGroup) remove() error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 200 {
		if err := os.Remove(g.dir); !errors.Is(err, unix.EBUSY) {
			return err
		}
		<-tick.C
	}
	tasks, _ := os.ReadFile(filepath.Join(g.dir, "tasks"))
	return fmt.Errorf("memory cgroup %s with the threads %q: %w", g.dir, strings.Fields(string(tasks)), backup.ErrLeft)
}
