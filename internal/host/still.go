package host

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// HoldStill takes whole devices for itself (O_EXCL): nothing of them is mounted
// or assembled, and nothing can be until release is called. What the kernel still
// has to write to them is written, and their own caches are flushed. ErrInUse:
// somebody has one of them. On an error nothing is held. release may be called
// twice.
func HoldStill(ctx context.Context, devices []string) (release func(), err error) {
	if err := fault.Point(ctx, "host.still"); err != nil {
		return nil, err
	}
	var held []int
	release = func() {
		for _, fd := range held {
			_ = unix.Close(fd) // nothing was written through it
		}
		held = nil
	}
	for _, dev := range devices {
		// Read-only is enough for fsync; the end of a writer would let udev look at the device anew.
		fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			held = append(held, fd)
			err = unix.Fsync(fd)
		}
		if errors.Is(err, unix.EBUSY) {
			err = backup.ErrInUse
		}
		if err != nil {
			release()
			return nil, fmt.Errorf("hold %s still: %w", dev, err)
		}
	}
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "host.still done")); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// TreeOf is Tree for a device's path.
func TreeOf(ctx context.Context, device string, resolve Resolve) (backup.Device, error) {
	major, minor, err := deviceNumber(device)
	if err != nil {
		return backup.Device{}, err
	}
	return Tree(ctx, major, minor, resolve)
}
