package host

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel is what uname(2) says of the running kernel.
type Kernel struct {
	Release      string // 6.1.0-18-amd64
	Major, Minor int    // 0, 0 where the release is not in that form
}

// AtLeast reports whether the kernel is that version or newer.
func (k Kernel) AtLeast(major, minor int) bool {
	return k.Major > major || k.Major == major && k.Minor >= minor
}

// RunningKernel asks for the version of the kernel.
func RunningKernel() (Kernel, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Kernel{}, fmt.Errorf("uname: %w", err)
	}
	k := Kernel{Release: unix.ByteSliceToString(u.Release[:])}
	_, _ = fmt.Sscanf(k.Release, "%d.%d", &k.Major, &k.Minor) // another form stays 0, 0
	return k, nil
}

// HasLoop reports whether loop devices can be had (loop(4)): a device to ask
// for a free one is there. Without root it cannot be told from one that may
// not be opened.
func HasLoop() bool {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return errors.Is(err, os.ErrPermission)
	}
	_ = f.Close()
	return true
}

// MissingCapabilities returns those of the wanted capabilities ("CAP_KILL")
// that the calling thread does not have in effect (proc(5), CapEff). Not
// /proc/self: that is the first thread, whose ids a connection may have changed
// for good (package postgres, onThread). A name that cleancut does not know is
// an error.
func MissingCapabilities(wanted []string) ([]string, error) {
	bits := map[string]int{"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_KILL": unix.CAP_KILL, "CAP_SETGID": unix.CAP_SETGID,
		"CAP_SETUID": unix.CAP_SETUID, "CAP_IPC_LOCK": unix.CAP_IPC_LOCK, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_SYS_RESOURCE": unix.CAP_SYS_RESOURCE}
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil, fmt.Errorf("own capabilities: %w", err)
	}
	var has uint64
	found := false
	for line := range strings.SplitSeq(string(status), "\n") {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			has, err = strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			found = err == nil
		}
	}
	if !found {
		return nil, fmt.Errorf("own capabilities: /proc/thread-self/status has no CapEff: %w", errors.ErrUnsupported)
	}
	var missing []string
	for _, name := range wanted {
		bit, known := bits[name]
		if !known {
			return nil, fmt.Errorf("capability %q is unknown", name)
		}
		if has&(1<<bit) == 0 {
			missing = append(missing, name)
		}
	}
	return missing, nil
}
