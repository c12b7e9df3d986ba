package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"cleancut/internal/lab/labtest"
)

// follow polls a file that the program writes until it holds text; false if
// the program ended first.
func follow(file, text string, ended <-chan struct{}) bool {
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), text) {
			return true
		}
		select {
		case <-ended:
			return false
		case <-tick.C:
		}
	}
}

// stopped runs the program and calls stop when its log or its progress shows
// text. It reports whether that was reached.
func (l *lab) stopped(t *testing.T, text string, attributes *syscall.SysProcAttr, stop func(cmd *exec.Cmd), args ...string) (outcome, bool) {
	t.Helper()
	cmd, result := l.command(t, nil, args...)
	cmd.SysProcAttr = attributes
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	file := cmd.Stderr.(*os.File).Name()
	if _, err := os.Stat(cmd.Stderr.(*os.File).Name()); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(text, "  ") { // a fault point
		file = strings.TrimSuffix(file, ".err") + ".log"
	}
	reached := follow(file, text, ended)
	if reached {
		stop(cmd)
	}
	select {
	case <-ended:
	case <-time.After(patience):
		kill(cmd)
		t.Fatalf("%q did not end within %s", args, patience)
	}
	return result(), reached
}

func TestSIGINTAndSIGTERMInEveryPhaseLeaveNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	id := string(p.backup(t))
	root := filepath.Join(p.dir, "copy", "a")
	for _, c := range []struct {
		args   []string
		phases []string
	}{
		{[]string{"backup"}, []string{"discover", "cut", "manifest", "complete"}},
		{[]string{"restore", id, "--to", root}, []string{"snapshots", "volumes", "devices", "mount", "recover"}},
		{[]string{"verify", "--level", "full", id}, []string{"volumes", "recover", "check", "undo"}},
		{[]string{"dump", id}, []string{"mount", "dump"}},
		{[]string{"dump", id, "--to", filepath.Join(p.dir, "out.zst")}, []string{"dump"}},
	} {
		for _, phase := range c.phases {
			for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
				t.Run(strings.Join([]string{c.args[0], phase, s.String()}, " "), func(t *testing.T) {
					o, reached := p.stopped(t, "  "+phase+" ", nil, func(cmd *exec.Cmd) { _ = cmd.Process.Signal(s) }, c.args...)
					if !reached {
						t.Errorf("phase %s was not reached: exit %d\n%s", phase, o.code, o.err)
					}
					if o.code != 0 && o.code != 1 && o.code != 3 {
						t.Errorf("exit %d, want 1 (or 3, or 0 if it was done)\n%s", o.code, o.err)
					}
					if o.code != 0 && (!strings.Contains(o.err, "stopping and undoing") || !strings.Contains(o.err, "context canceled")) {
						t.Errorf("the message does not say that it was interrupted:\n%s", o.err)
					}
					if o.code == 0 && c.args[0] == "restore" {
						p.must(t, "restore", "--undo", root)
					}
					p.clean(t)
					if files, _ := filepath.Glob(filepath.Join(p.dir, ".cleancut-*")); len(files) > 0 {
						t.Errorf("left: %q", files)
					}
					if _, err := os.Stat(filepath.Join(p.dir, "out.zst")); err == nil && o.code != 0 {
						t.Error("a dump that was interrupted has its final name")
					}
					_ = os.Remove(filepath.Join(p.dir, "out.zst"))
				})
			}
		}
	}
}

// killedWhileFrozen halts a backup (SIGSTOP) while it holds the filesystems
// frozen and then kills it; the moment is short, so it takes a few tries.
func (p *production) killedWhileFrozen(t *testing.T, attributes func() *syscall.SysProcAttr, killAll func(cmd *exec.Cmd)) {
	t.Helper()
	for range 20 {
		var watchdogs []int
		o, _ := p.stopped(t, "host.freeze done", attributes(), func(cmd *exec.Cmd) {
			_ = cmd.Process.Signal(syscall.SIGSTOP)
			watchdogs = processes(p.dir, "watchdog")
			killAll(cmd)
		}, "backup")
		// Before the last clone was done it cannot have thawed.
		frozen := slices.Contains([]string{"host.freeze done", "host.freeze", "local.clone"}, o.points[len(o.points)-1])
		p.flows(t)
		p.answers(t)
		if o.code != -1 {
			t.Errorf("exit %d, want it killed\n%s", o.code, o.err)
		}
		for _, pid := range watchdogs {
			for _, root := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/unified/"} {
				if _, err := os.Stat(root + "cleancut-watchdog-" + strconv.Itoa(pid)); err == nil {
					t.Errorf("the watchdog %d left its cgroup", pid)
				}
			}
		}
		p.swept(t)
		if frozen {
			return
		}
	}
	t.Error("it was never caught while it froze")
}

func TestWhoeverKillsABackupThatFreezesProductionIsThawed(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	t.Run("the process alone", func(t *testing.T) {
		p.killedWhileFrozen(t, func() *syscall.SysProcAttr { return nil }, kill)
	})
	t.Run("its process group", func(t *testing.T) {
		p.killedWhileFrozen(t, func() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} },
			func(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	})
	t.Run("its session's other members too", func(t *testing.T) {
		p.killedWhileFrozen(t, func() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} },
			func(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	})
	t.Run("its cgroup", func(t *testing.T) {
		var group *os.File
		p.killedWhileFrozen(t, func() *syscall.SysProcAttr { group = newCgroup(t); return inCgroup(group) }, func(*exec.Cmd) { killCgroup(t, group) })
	})
}

func inCgroup(group *os.File) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
}

func killCgroup(t *testing.T, group *os.File) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group.Name(), "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Error(err)
	}
}

func TestSIGKILLOfGroupOrCgroupInEveryPhaseIsSwept(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	id := string(p.backup(t))
	root := filepath.Join(p.dir, "copy", "a")
	for _, c := range []struct {
		args   []string
		phases []string
	}{
		{[]string{"backup"}, []string{"discover", "cut", "manifest", "complete"}},
		{[]string{"restore", id, "--to", root}, []string{"snapshots", "volumes", "devices", "mount", "recover"}},
		{[]string{"verify", "--level", "rows", id}, []string{"check", "undo"}},
		{[]string{"dump", id}, []string{"dump"}},
	} {
		for _, phase := range c.phases {
			after := func(t *testing.T, o outcome, reached bool) {
				t.Helper()
				if !reached || o.code != -1 {
					t.Errorf("reached %v, exit %d, want it killed\n%s", reached, o.code, o.err)
				}
				p.flows(t)
				p.answers(t)
				p.swept(t)
			}
			t.Run(c.args[0]+" "+phase+", the group", func(t *testing.T) {
				o, reached := p.stopped(t, "  "+phase+" ", &syscall.SysProcAttr{Setpgid: true}, func(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }, c.args...)
				after(t, o, reached)
			})
			t.Run(c.args[0]+" "+phase+", the cgroup", func(t *testing.T) {
				group := newCgroup(t) // in one that was killed once, Linux 6.18 kills at the start
				o, reached := p.stopped(t, "  "+phase+" ", inCgroup(group), func(*exec.Cmd) { killCgroup(t, group) }, c.args...)
				after(t, o, reached)
			})
		}
	}
}

// newCgroup makes a group in the unified hierarchy, which is mounted if it is
// not.
func newCgroup(t *testing.T) *os.File {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		t.Fatal(err)
	}
	var root string
	if i := slices.IndexFunc(infos, func(i *mountinfo.Info) bool { return i.Root == "/" }); i >= 0 {
		root = infos[i].Mountpoint
	} else {
		root = filepath.Join(labtest.Folder(t), "cgroup")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("none", root, "cgroup2", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(root, 0) })
	}
	dir, err := os.MkdirTemp(root, "cleancut-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}
