package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// Mount is one mounted filesystem as /proc/self/mountinfo shows it.
type Mount struct {
	Major, Minor int
	Root         string // "/" unless only a subtree is mounted
	Mountpoint   string
	Type         string
	Source       string
	Options      []string // per mount: rw, noatime, …
	SuperOptions []string // per filesystem
}

// MountOf returns the mount that holds path (links followed), by the kernel's
// mount id (statx STATX_MNT_ID), so that bind mounts and hidden mounts do not
// confuse it.
func MountOf(path string) (Mount, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st); err != nil {
		return Mount{}, fmt.Errorf("statx %s: %w", path, err)
	}
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return Mount{}, fmt.Errorf("read mountinfo: %w", err)
	}
	for _, i := range infos {
		if uint64(i.ID) == st.Mnt_id {
			return fromInfo(i), nil
		}
	}
	return Mount{}, fmt.Errorf("mount of %s: %w", path, backup.ErrNotFound)
}

// MountsOf returns every mount of the block device with that number.
func MountsOf(major, minor int) ([]Mount, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.Major != major || i.Minor != minor, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	out := make([]Mount, len(infos))
	for n, i := range infos {
		out[n] = fromInfo(i)
	}
	return out, nil
}

func fromInfo(i *mountinfo.Info) Mount {
	return Mount{Major: i.Major, Minor: i.Minor, Root: i.Root, Mountpoint: i.Mountpoint, Type: i.FSType, Source: i.Source,
		Options: strings.Split(i.Options, ","), SuperOptions: strings.Split(i.VFSOptions, ",")}
}

// AllOptions returns the options of the mount and of its filesystem, each
// once, fit for `mount -o`. Options that newer kernels refuse though older
// ones show them, and those that mount adds by itself, are left out.
func (m Mount) AllOptions() []string {
	drop := []string{"attr2", "noattr2", "ikeep", "noikeep", "barrier", "nobarrier", "seclabel", "rw", ""}
	var out []string
	for _, o := range append(slices.Clone(m.Options), m.SuperOptions...) {
		if !slices.Contains(drop, o) && !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}

// MountDevice mounts device on dir, which is made if it is missing. Mounted
// there already from the same device: nil. Another one mounted there: ErrInUse,
// never on top of it.
func MountDevice(ctx context.Context, device, dir, fstype string, options []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if same, err := mountedHere(device, dir); err != nil || same {
		return err
	}
	args := []string{"-t", fstype}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	_, err := Run(ctx, "mount", append(args, "--", device, dir)...)
	return err
}

// mountedHere reports whether device is what is mounted on dir.
func mountedHere(device, dir string) (bool, error) {
	major, minor, err := deviceNumber(device)
	if err != nil {
		return false, err
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, fmt.Errorf("mount point: %w", err)
	}
	infos, err := mountedOn(real)
	if err != nil {
		return false, fmt.Errorf("mount %s: %w", device, err)
	}
	top := topmost(infos)
	if top != nil && (top.Major != major || top.Minor != minor) {
		return false, fmt.Errorf("mount %s: %s is mounted on %s: %w", device, top.Source, dir, backup.ErrInUse)
	}
	return top != nil, nil
}

// Unmount unmounts what is mounted on dir, the topmost if there are several,
// and returns when it is gone. Not a mount point: nil. It waits out short
// openers (udev probing) until ctx ends, five seconds at most; then ErrInUse.
// Never lazy: a lazily unmounted filesystem still writes.
func Unmount(ctx context.Context, dir string) error {
	infos, err := mountedOn(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return unmount(ctx, topmost(infos))
}

// mountedOn returns every mount on dir, in no order. It asks the kernel's list
// and not the filesystem: one that has shut down answers no stat.
func mountedOn(dir string) ([]*mountinfo.Info, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(parent, filepath.Base(dir))
	}
	return mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != dir, false })
}

// topmost returns the mount of one mount point that a path meets: nothing is
// mounted on it there. nil for none.
func topmost(infos []*mountinfo.Info) *mountinfo.Info {
	for _, i := range infos {
		if !slices.ContainsFunc(infos, func(over *mountinfo.Info) bool { return over.Parent == i.ID && over != i }) {
			return i
		}
	}
	return nil
}

// unmount takes exactly this mount away, none above or below it. nil: nothing
// to do.
func unmount(ctx context.Context, mount *mountinfo.Info) error {
	if err := fault.Point(ctx, "host.umount"); err != nil {
		return err
	}
	for try := 0; mount != nil; try++ {
		infos, err := mountedOn(mount.Mountpoint)
		if err != nil {
			return fmt.Errorf("unmount %s: %w", mount.Mountpoint, err)
		}
		if !slices.ContainsFunc(infos, func(i *mountinfo.Info) bool { return i.ID == mount.ID }) {
			break
		}
		if top := topmost(infos); top.ID != mount.ID {
			return fmt.Errorf("unmount %s of %s: %s is mounted over it: %w", mount.Source, mount.Mountpoint, top.Source, backup.ErrInUse)
		}
		err = unix.Unmount(mount.Mountpoint, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EBUSY) || try > 50 {
			return fmt.Errorf("unmount %s: %w: %w", mount.Mountpoint, backup.ErrInUse, err)
		}
		if perr := pause(ctx, 100*time.Millisecond); perr != nil {
			return fmt.Errorf("unmount %s: %w: %w: %w", mount.Mountpoint, backup.ErrInUse, err, perr)
		}
	}
	return fault.Point(ctx, "host.umount done")
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func deviceNumber(path string) (major, minor int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, fmt.Errorf("%s is no block device: %w", path, backup.ErrUsage)
	}
	return int(unix.Major(st.Rdev)), int(unix.Minor(st.Rdev)), nil
}
