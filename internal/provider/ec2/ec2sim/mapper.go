package ec2sim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
)

// controlNode is device mapper's own device.
const controlNode = "/dev/mapper/control"

// noDeviceMapper says why there is no device mapper, or "".
func noDeviceMapper(ctx context.Context) string {
	f, err := os.OpenFile(controlNode, os.O_RDWR, 0)
	if err != nil {
		return "no device mapper: " + err.Error()
	}
	_ = f.Close()
	if _, err := dmsetup(ctx, "version"); err != nil {
		return "no device mapper: " + err.Error()
	}
	return ""
}

// dmsetup runs dmsetup(8) so that it makes and removes the nodes itself and
// waits for no udev, which the guest does not have.
func dmsetup(ctx context.Context, args ...string) ([]byte, error) {
	return host.Run(ctx, "env", append([]string{"DM_DISABLE_UDEV=1", "dmsetup"}, args...)...)
}

func dmName(id backup.VolumeID) string { return "ec2sim-" + string(id) }

// dmNode finds the node of a volume's dm device; "" if it has none.
func dmNode(id backup.VolumeID) (string, error) {
	names, err := filepath.Glob("/sys/block/dm-*/dm/name")
	if err != nil {
		return "", err
	}
	for _, path := range names {
		text, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(text)) == dmName(id) {
			return "/dev/" + strings.Split(path, "/")[3], nil
		}
	}
	return "", nil
}

// linear lays a dm-linear device over a loop device, so that it can be
// suspended.
func linear(ctx context.Context, local backup.VolumeID, loop string) (string, error) {
	sectors, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop), "size"))
	if err != nil {
		return loop, err
	}
	table := fmt.Sprintf("0 %s linear %s 0", strings.TrimSpace(string(sectors)), loop)
	if _, err := dmsetup(ctx, "create", "--noudevrules", "--noudevsync", dmName(local), "--table", table); err != nil {
		return loop, err
	}
	node, err := dmNode(local)
	if err == nil && node == "" {
		err = fmt.Errorf("device mapper has no %s: %w", dmName(local), backup.ErrNotFound)
	}
	return node, err
}

// removeDevice removes the dm device of a volume. None: nil. Used: ErrInUse.
func (s *Server) removeDevice(ctx context.Context, local backup.VolumeID) error {
	node, err := dmNode(local)
	if err != nil || node == "" {
		return err
	}
	if text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(node), "dm", "suspended")); err == nil && strings.TrimSpace(string(text)) == "1" {
		if _, err := dmsetup(ctx, "resume", "--noudevsync", dmName(local)); err != nil {
			return err
		}
	}
	if _, err := dmsetup(ctx, "remove", "--noudevsync", dmName(local)); err != nil {
		return fmt.Errorf("%w: %w", err, backup.ErrInUse)
	}
	return nil
}

// suspend holds up all writes to the dm devices of volumes, and returns what
// lets them go on: nil if suspend failed, as then they go on already. The ioctl
// (linux/dm-ioctl.h) and not dmsetup(8): starting programs would keep writers
// waiting for a quarter of a second in the guest, and while devices stand still
// nothing is to be read from a disk. DM_SKIP_LOCKFS: no filesystem is frozen,
// as EBS knows none.
func suspend(locals []backup.VolumeID) (resume func() error, err error) {
	control, err := os.OpenFile(controlNode, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	// Suspending waits for the writes on their way, so all at the same time.
	all := func(flags uint32) error {
		errs := make([]error, len(locals))
		var done sync.WaitGroup
		for i, id := range locals {
			done.Go(func() { errs[i] = setSuspended(control, id, flags) })
		}
		done.Wait()
		return errors.Join(errs...)
	}
	resume = func() error { return errors.Join(all(0), control.Close()) }
	if err := all(unix.DM_SUSPEND_FLAG | unix.DM_SKIP_LOCKFS_FLAG); err != nil {
		return nil, errors.Join(err, resume())
	}
	return resume, nil
}

// setSuspended suspends a device or, without flags, resumes it. Resuming one
// that is not suspended does nothing.
func setSuspended(control *os.File, id backup.VolumeID, flags uint32) error {
	arg := unix.DmIoctl{Version: [3]uint32{unix.DM_VERSION_MAJOR}, Data_size: uint32(unsafe.Sizeof(unix.DmIoctl{})), Flags: flags}
	copy(arg.Name[:], dmName(id))
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_DEV_SUSPEND, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR: // a signal of Go's runtime; the device is as it was
		default:
			return fmt.Errorf("suspend or resume %s (DM_DEV_SUSPEND): %w", dmName(id), errno)
		}
	}
}
