package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// From linux/loop.h.
const (
	loFlagAutoclear = 4
	loFlagPartscan  = 8
	loFlagDirectIO  = 16
)

// loop is a loop device by its number.
type loop struct{ number int }

func (l *loop) node() string { return "/dev/loop" + strconv.Itoa(l.number) }

func (l *loop) sys(name string) string {
	return filepath.Join("/sys/block", "loop"+strconv.Itoa(l.number), name)
}

// read returns one attribute from sysfs.
func (l *loop) read(name string) (string, error) {
	b, err := os.ReadFile(l.sys(name))
	return strings.TrimSpace(string(b)), err
}

// open opens the device. In a container /dev may lack the node, then it is
// made from the numbers in sysfs.
func (l *loop) open(flag int) (*os.File, error) {
	f, err := os.OpenFile(l.node(), flag, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	numbers, err := l.read("dev")
	if err != nil {
		return nil, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(numbers, "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("device number %q of %s: %w", numbers, l.node(), err)
	}
	err = unix.Mknod(l.node(), unix.S_IFBLK|0o660, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make node %s: %w", l.node(), err)
	}
	return os.OpenFile(l.node(), flag, 0)
}

// loops returns the loop devices that have a file behind them whose name the
// caller wants. The name only saves opening devices of others: identity is
// for backs to prove.
func loops(want func(base string) bool) ([]*loop, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var out []*loop
	for _, path := range paths {
		number, err := strconv.Atoi(strings.TrimPrefix(strings.Split(path, "/")[3], "loop"))
		if err != nil {
			continue // not a loop device
		}
		l := &loop{number}
		file, err := l.read("loop/backing_file")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // detached since the folder was read
		}
		if err != nil {
			return nil, err
		}
		if want(filepath.Base(strings.TrimSuffix(file, " (deleted)"))) {
			out = append(out, l)
		}
	}
	return out, nil
}

// inode is the identity of a file.
type inode struct{ device, number uint64 }

func inodeOf(path string) (inode, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return inode{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return inode{st.Dev, st.Ino}, nil
}

// backing returns the identity of the file behind the device, from the kernel
// (LOOP_GET_STATUS64): lo_file_name is what somebody wrote there and cut to 64
// bytes. ok is false when nothing is attached.
func (l *loop) backing() (id inode, ok bool, err error) {
	f, err := l.open(os.O_RDONLY)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist) {
		return inode{}, false, nil
	}
	if err != nil {
		return inode{}, false, err
	}
	defer func() { _ = f.Close() }()
	st, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return inode{}, false, nil
	}
	if err != nil {
		return inode{}, false, fmt.Errorf("ask %s what it is (LOOP_GET_STATUS64): %w", l.node(), err)
	}
	return inode{st.Device, st.Inode}, true, nil
}

// attached returns the loop device of a volume, or nil.
func (p *Pool) attached(id backup.VolumeID) (*loop, error) {
	image, err := inodeOf(p.volumeFile(id, ".img"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	candidates, err := loops(func(base string) bool { return base == string(id)+".img" })
	if err != nil {
		return nil, err
	}
	for _, l := range candidates {
		behind, ok, err := l.backing()
		if err != nil {
			return nil, err
		}
		if ok && behind == image {
			return l, nil
		}
	}
	return nil, nil
}

// configure puts the file behind the device. EBUSY: somebody else took it.
// No AUTOCLEAR: a volume stays until Detach.
func (l *loop) configure(image *os.File) error {
	f, err := l.open(os.O_RDWR)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	config := &unix.LoopConfig{Fd: uint32(image.Fd()), Size: BlockSize}
	config.Info.Flags = loFlagDirectIO | loFlagPartscan
	return unix.IoctlLoopConfigure(int(f.Fd()), config)
}

// verify reads back whether the device is that file and as it was asked for.
// The kernel falls back to buffered I/O without an error (loop(4)).
func (l *loop) verify(image inode, size backup.Bytes) error {
	behind, ok, err := l.backing()
	if err != nil {
		return err
	}
	if !ok || behind != image {
		return fmt.Errorf("%s is another file: %w", l.node(), backup.ErrNotFound)
	}
	wants := []struct{ attribute, value, means string }{
		{"loop/dio", "1", "direct I/O"},
		{"loop/partscan", "1", "partition scan"},
		{"queue/logical_block_size", strconv.Itoa(BlockSize), "block size"},
		{"size", strconv.FormatInt(int64(size)/512, 10), "sectors"},
	}
	for _, w := range wants {
		got, err := l.read(w.attribute)
		if err != nil {
			return fmt.Errorf("check %s: %w", l.node(), err)
		}
		if got != w.value {
			return backup.Hint(fmt.Errorf("%s: %s is %s, not %s: %w", l.node(), w.means, got, w.value, backup.ErrUnsupported),
				fmt.Sprintf("if it was attached by hand, `losetup -d %s` and attach it with cleancut; else see whether the disk below the pool takes 4096-byte direct I/O", l.node()))
		}
	}
	return nil
}

// clear detaches the file, or says ErrInUse. LOOP_CLR_FD on a device that
// others have open returns 0 and only marks it to go with its last user
// (loop(4), LO_FLAGS_AUTOCLEAR); so it is looked at afterwards and the mark is
// taken back.
func (l *loop) clear() error {
	// Mounts, arrays and volume groups claim a device or its partitions, and
	// refuse O_EXCL; plain openers do not.
	f, err := l.open(os.O_RDONLY | unix.O_EXCL)
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is %s: %w", l.node(), l.users(), backup.ErrInUse)
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // the last close takes the file away
	err = ignore(unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0), unix.ENXIO)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is open: %w", l.node(), backup.ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("detach %s (LOOP_CLR_FD): %w", l.node(), err)
	}
	st, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("detach %s (LOOP_GET_STATUS64): %w", l.node(), err)
	}
	st.Flags &^= loFlagAutoclear
	if err := ignore(unix.IoctlLoopSetStatus64(int(f.Fd()), st), unix.ENXIO); err != nil {
		return fmt.Errorf("keep %s (LOOP_SET_STATUS64): %w", l.node(), err)
	}
	return fmt.Errorf("%s is open: %w", l.node(), backup.ErrInUse)
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

// users says who claims the device or a partition of it, as far as can be
// seen from here.
func (l *loop) users() string {
	disk := filepath.Base(l.node())
	parts, _ := filepath.Glob(l.sys(disk + "p*"))
	var by []string
	for _, dir := range append([]string{l.sys("")}, parts...) {
		holders, _ := filepath.Glob(filepath.Join(dir, "holders", "*"))
		for _, h := range holders {
			by = append(by, "part of "+filepath.Base(h))
		}
		node := "/dev/" + filepath.Base(dir)
		number, _ := os.ReadFile(filepath.Join(dir, "dev"))
		mounts, _ := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			same := m.Source == node || fmt.Sprintf("%d:%d", m.Major, m.Minor) == strings.TrimSpace(string(number))
			return !same, false
		})
		for _, m := range mounts {
			by = append(by, "mounted on "+m.Mountpoint)
		}
	}
	if len(by) == 0 {
		return "claimed by somebody"
	}
	return strings.Join(by, ", ")
}
