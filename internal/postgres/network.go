package postgres

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// newNetwork makes a network namespace (network_namespaces(7)) that holds
// nothing but a loopback interface of its own, which is up: before version 15
// PostgreSQL sends its statistics over it. Sockets in the filesystem are not
// part of it and work across (unix(7)).
//
// Where the kernel or a container does not allow one it returns none, and why.
// The caller closes it; it ends with the last process in it.
func newNetwork() (ns *os.File, whyNot string, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare(CLONE_NEWNET)", err)
		}
		if err := raiseLoopback(); err != nil {
			return fmt.Errorf("bring the loopback interface up: %w", err)
		}
		ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	for _, no := range []error{unix.EPERM, unix.EINVAL, unix.ENOSPC, unix.ENOSYS} {
		if errors.Is(err, no) {
			return nil, err.Error(), nil
		}
	}
	return ns, "", err
}

// raiseLoopback brings up lo of the thread's network (netdevice(7)).
func raiseLoopback() (err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		return err
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// enterNetwork takes the calling thread into ns; nil: it stays where it is.
func enterNetwork(ns *os.File) error {
	if ns == nil {
		return nil
	}
	return os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET))
}

// apart reports whether a process has another network than this one. The
// links of a process that is not ours to look at cannot be read: not apart.
func apart(pid int) bool {
	own, err := os.Readlink("/proc/self/ns/net")
	other, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && err2 == nil && own != other
}
