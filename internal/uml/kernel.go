package uml

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// kernel is a running linux.uml with all its helper processes: one process group in a session of its own.
type kernel struct {
	pid   int
	done  chan error // gets the end of the process, once
	guard *guard
}

// startKernel starts linux.uml on a filled exchange folder.
func startKernel(ctx context.Context, x *exchange, g Guest) (*kernel, error) {
	path, err := kernelPath()
	if err != nil {
		return nil, err
	}
	console, err := os.OpenFile(x.path("console.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer console.Close()
	cmd := exec.CommandContext(context.WithoutCancel(ctx), path, kernelArgs(x, g)...) // wait kills the whole group at the end of ctx, not the one process
	cmd.Dir = x.dir
	cmd.Env = []string{"PATH=" + searchPath, "TMPDIR=" + memoryDir(x, g)}
	cmd.Stdout, cmd.Stderr = console, console
	if x.scratch != nil {
		cmd.ExtraFiles = []*os.File{x.scratch}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	k := &kernel{done: make(chan error, 1)}
	if k.guard, err = startGuard(ctx, x.dir); err != nil {
		return nil, err
	}
	begun := make(chan error)
	go k.run(cmd, begun)
	if err := <-begun; err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", path, err), k.guard.stop())
	}
	return k, nil
}

// run is the kernel's goroutine from its start to its end.
func (k *kernel) run(cmd *exec.Cmd, begun chan<- error) {
	// Pdeathsig is sent when the starting thread ends, not the process (prctl(2)): keep the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Start()
	if err == nil {
		k.pid = cmd.Process.Pid
		err = k.guard.watch(k.pid)
	}
	begun <- err
	if err != nil {
		if k.pid != 0 {
			k.kill()
			_ = cmd.Wait()
		}
		return
	}
	k.awaitAndKill()
	err = cmd.Wait()
	k.done <- errors.Join(err, k.guard.stop())
}

// awaitAndKill returns when the kernel ended, with whatever of its group is still there killed. The process is not reaped yet, so that
// its number cannot be another's group.
func (k *kernel) awaitAndKill() {
	for {
		err := unix.Waitid(unix.P_PID, k.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			break
		}
	}
	k.kill()
}

// kill ends all processes of the guest at once.
func (k *kernel) kill() {
	_ = syscall.Kill(-k.pid, syscall.SIGKILL) // no such group: that is what is wanted
}

// wake gives the kernel a timer interrupt.
func (k *kernel) wake() { _ = syscall.Kill(k.pid, syscall.SIGALRM) } // gone: wait tells

// doing says what the kernel's process is doing, as far as the host sees it.
func (k *kernel) doing() string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", k.pid))
	if err != nil {
		return err.Error()
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // proc_pid_stat(5), from field 3 on
	wchan, _ := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", k.pid))
	if len(fields) < 13 {
		return string(stat)
	}
	return fmt.Sprintf("in state %s, in %s, with %s+%s ticks of processor time", fields[0], wchan, fields[11], fields[12])
}

// wait returns the end of the kernel, which it brings about when ctx ends. Then some helpers may not be gone yet: they belong to the
// host's first process now, so they can be watched for a moment but not waited for.
func (k *kernel) wait(ctx context.Context) error {
	select {
	case err := <-k.done:
		return err
	case <-ctx.Done():
	}
	k.kill()
	err := <-k.done
	for range 100 {
		if syscall.Kill(-k.pid, 0) == syscall.ESRCH {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// kernelArgs is the kernel's command line (linux.uml --help; Documentation/admin-guide/kernel-parameters.txt).
func kernelArgs(x *exchange, g Guest) []string {
	args := []string{
		fmt.Sprintf("mem=%dK", g.Memory>>10),
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw", // unset, root= would be 98:0: mount and lsblk would show /dev/ubda as hostfs
		`init="` + x.path("init") + `"`,
		"umid=guest", "uml_dir=./", // in the exchange folder, which is the working directory: a socket's path has 108 bytes
		"con=null", "con0=null,fd:1",
		"noreboot", "panic=-1", // a panic, and a reboot in the guest, end the process
	}
	if x.scratch != nil {
		args = append(args, "ubd0=/proc/self/fd/3") // the first of ExtraFiles
	}
	return args
}

// memoryDir chooses where linux.uml puts its memory: a tmpfs that holds it and may map it executable, else the disk.
func memoryDir(x *exchange, g Guest) string {
	var s unix.Statfs_t
	err := unix.Statfs("/dev/shm", &s)
	if err != nil || s.Type != unix.TMPFS_MAGIC || s.Flags&unix.ST_NOEXEC != 0 {
		return x.dir
	}
	if int64(s.Bavail)*s.Bsize < g.Memory || unix.Access("/dev/shm", unix.W_OK|unix.X_OK) != nil {
		return x.dir
	}
	return "/dev/shm"
}
