// Package lab gives the demo, the benchmarks and the tests real storage on
// this machine: a pool on a filesystem of its own, natively or in the
// user-mode guest.
//
//	Where → native | uml → Pool → … → undo
//
// What always holds: the undo of Pool takes away what Pool attached and
// mounted, by its own name, and fails if something is still in use.
package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/uml"
)

// Place is where real md arrays can be had.
type Place string

// The two places.
const (
	Native Place = "native"
	UML    Place = "uml"
)

// Where returns Native if this process is root on a kernel with md, which may
// be the guest's, else UML.
func Where(ctx context.Context) Place {
	if os.Geteuid() == 0 && host.HasMD(ctx) {
		return Native
	}
	return UML
}

// scratch is the guest's spare disk (uml.Guest.Scratch).
const scratch = "/dev/ubda"

// Pool makes a filesystem that can clone files ("xfs" or "btrfs"; "ext4"
// cannot) and mounts it on dir. In the guest it takes the scratch disk, else a
// sparse file of that size beside dir. Needs root.
func Pool(ctx context.Context, dir, fstype string, size backup.Bytes) (undo func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("pool: %w", err)
	}
	device, release, err := disk(ctx, dir+".img", size)
	if err != nil {
		return nil, err
	}
	mkfs := map[string][]string{"xfs": {"-q", "-f", "-K", "-m", "reflink=1", device}, "btrfs": {"-q", "-f", device}, "ext4": {"-q", "-F", device}}[fstype]
	_, err = host.Run(ctx, "mkfs."+fstype, mkfs...)
	if err == nil {
		err = host.MountDevice(ctx, device, dir, fstype, nil)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pool: %w", err), release())
	}
	return func() error {
		ctx := context.WithoutCancel(ctx)
		return errors.Join(host.Unmount(ctx, dir), release(), os.Remove(dir))
	}, nil
}

// disk returns a block device of our own.
func disk(ctx context.Context, image string, size backup.Bytes) (device string, release func() error, err error) {
	if uml.Inside() && !inUse(scratch) {
		return scratch, func() error { return nil }, nil
	}
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return "", nil, fmt.Errorf("disk image: %w", err)
	}
	if err := errors.Join(f.Truncate(int64(size)), f.Close()); err != nil {
		return "", nil, errors.Join(fmt.Errorf("disk image: %w", err), os.Remove(image))
	}
	out, err := host.Run(ctx, "losetup", "--find", "--show", "--sector-size", "4096", image)
	if err != nil {
		return "", nil, errors.Join(err, os.Remove(image))
	}
	device = strings.TrimSpace(string(out))
	return device, func() error {
		_, err := host.Run(context.WithoutCancel(ctx), "losetup", "--detach", device)
		return errors.Join(err, os.Remove(image))
	}, nil
}

// inUse reports whether a device is mounted or missing.
func inUse(device string) bool {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return true
	}
	mounts, err := host.MountsOf(int(unix.Major(st.Rdev)), int(unix.Minor(st.Rdev)))
	return err != nil || len(mounts) > 0
}

// Left lists what stands on this machine that points below dir: mounts, loop
// devices with their files there, arrays on those, and processes working
// there. A clean teardown leaves nothing.
func Left(dir string) ([]string, error) {
	var out []string
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.HasPrefix(string(b), dir+"/") {
			out = append(out, "loop device /dev/"+strings.Split(f, "/")[3]+" on "+strings.TrimSpace(string(b)))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			out = append(out, "mount "+f[4])
		}
	}
	cwds, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		return nil, err
	}
	for _, c := range cwds {
		cwd, err := os.Readlink(c)
		if err == nil && strings.HasPrefix(cwd, dir+"/") {
			out = append(out, "process "+strings.Split(c, "/")[2]+" in "+cwd)
		}
	}
	return out, nil
}
