package postgres

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs do on an operating system thread of its own that ends with
// it: whatever do changes of the thread (ids, mount namespace) touches no
// other goroutine. A goroutine that returns without unlocking ends its thread
// (runtime.LockOSThread), except the process's first one, which the runtime
// keeps: that one is never used, because /proc/self would show its state.
func onThread(do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- onThread(do) // on another: this one is held here meanwhile
			runtime.UnlockOSThread()
			return
		}
		done <- do()
	}()
	return <-done
}

// setThreadIDs changes the effective ids of the calling thread only.
// syscall.Setresuid would change every thread of the process, as POSIX wants
// (nptl(7)); the raw call does not. The gid goes first, while it is allowed.
func setThreadIDs(uid, gid uint32) error {
	const keep = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(gid), keep); errno != 0 {
		return fmt.Errorf("take gid %d for a connection: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
		return fmt.Errorf("take uid %d for a connection: %w", uid, errno)
	}
	return nil
}
