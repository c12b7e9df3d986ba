package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// detachPatience is how long Detach waits for those who have the device open
// but do not claim it: udev and blkid look at every device for a moment.
const detachPatience = time.Second

// Resolve tells which volume of this pool is behind a loop device. The
// contract is provider.Provider's.
func (p *Pool) Resolve(ctx context.Context, device string) (backup.Volume, error) {
	if err := ctx.Err(); err != nil {
		return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
	}
	foreign := fmt.Errorf("resolve %s: not of pool %s: %w", device, p.dir, backup.ErrNotFound)
	l, err := loopOf(device)
	if err != nil {
		return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
	}
	if l == nil {
		return backup.Volume{}, foreign
	}
	behind, ok, err := l.backing()
	if err != nil {
		return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
	}
	if !ok {
		return backup.Volume{}, foreign
	}
	ids, err := p.names(ctx, "volumes", volumePattern)
	if err != nil {
		return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
	}
	for _, id := range ids {
		image, err := inodeOf(p.volumeFile(backup.VolumeID(id), ".img"))
		if err != nil || image != behind {
			continue
		}
		v, err := p.readVolume(backup.VolumeID(id))
		if err != nil {
			return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
		}
		return v.volume(), nil
	}
	return backup.Volume{}, foreign
}

// loopOf returns the loop device that a path leads to, by its device number;
// nil for partitions, other devices and what is no device.
func loopOf(device string) (*loop, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "stat", Path: device, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, nil
	}
	sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l loop
	name := filepath.Base(sys)
	if n, err := fmt.Sscanf(name, "loop%d", &l.number); n != 1 || err != nil || name != strings.TrimPrefix(l.node(), "/dev/") {
		return nil, nil
	}
	return &l, nil
}

// Attach attaches a volume as a loop device with BlockSize, direct I/O and
// partition scan. The contract is provider.Provider's.
func (p *Pool) Attach(ctx context.Context, id backup.VolumeID) (string, error) {
	device, err := p.attach(ctx, id)
	if err != nil {
		return "", fmt.Errorf("attach %s: %w", id, err)
	}
	p.log.DebugContext(ctx, "volume attached", slog.String(keyVolume, string(id)), slog.String(keyDevice, device))
	return device, nil
}

func (p *Pool) attach(ctx context.Context, id backup.VolumeID) (string, error) {
	if _, err := p.readVolume(id); err != nil {
		return "", err
	}
	lock, err := lockFile(ctx, p.volumeFile(id, ".json"))
	if err != nil {
		return "", err
	}
	defer lock.release()
	v, err := p.readVolume(id)
	if err != nil {
		return "", err
	}
	if !v.Ready {
		return "", backup.Hint(errors.New("the volume was not made to its end"), "create it again with the same token, or delete it with `cleancut sweep`")
	}
	file, err := os.OpenFile(p.volumeFile(id, ".img"), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	image, err := inodeOf(file.Name())
	if err != nil {
		return "", err
	}
	if l, err := p.attached(id); err != nil {
		return "", err
	} else if l != nil {
		return l.node(), l.verify(image, v.Size)
	}
	var l *loop
	err = effect(ctx, "local.attach", func() error {
		if l, err = takeLoop(ctx, file); err != nil {
			return err
		}
		if err := l.verify(image, v.Size); err != nil {
			return errors.Join(err, l.clear())
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return l.node(), nil
}

// takeLoop puts the file behind a free loop device. Between asking for one
// and taking it others may have taken it: then the next.
func takeLoop(ctx context.Context, image *os.File) (*loop, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("find a free loop device: %w", err), "run as root and load the module: `modprobe loop`")
	}
	defer func() { _ = control.Close() }()
	for try := 0; ; try++ {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device (LOOP_CTL_GET_FREE): %w", err)
		}
		l := &loop{number}
		err = l.configure(image)
		if err == nil {
			return l, nil
		}
		raced := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINTR)
		if !raced || try == 100 {
			return nil, fmt.Errorf("set up %s (LOOP_CONFIGURE): %w", l.node(), err)
		}
		if err := sleep(ctx, time.Duration(try)*time.Millisecond); err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
	}
}

// Detach takes the loop device of a volume away. The contract is
// provider.Provider's; a volume that does not exist is not attached.
func (p *Pool) Detach(ctx context.Context, id backup.VolumeID) error {
	if err := p.detach(ctx, id); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	return nil
}

func (p *Pool) detach(ctx context.Context, id backup.VolumeID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !volumePattern.MatchString(string(id)) {
		return nil
	}
	lock, err := lockFile(ctx, p.volumeFile(id, ".json"))
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.release()
	return effect(ctx, "local.detach", func() error {
		deadline := time.Now().Add(detachPatience)
		for {
			l, err := p.attached(id)
			if err != nil || l == nil {
				return err
			}
			err = l.clear()
			if err == nil {
				continue // until the kernel says that it is gone
			}
			if !errors.Is(err, backup.ErrInUse) || time.Now().After(deadline) {
				return err
			}
			if err := sleep(ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
	})
}
