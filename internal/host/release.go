package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// Release takes away everything that stands on the given whole devices:
// mounts first, then arrays, so that the devices can be detached. An array
// that also holds a device not in the list is not touched: ErrNotOurs.
// Nothing there: nil.
func Release(ctx context.Context, devices []string) error {
	blocks, err := withPartitions(devices)
	if err != nil {
		return err
	}
	arrays, err := arraysHolding(blocks)
	if err != nil {
		return err
	}
	for _, md := range arrays {
		held, err := membersOf(md)
		if err != nil {
			return err
		}
		for _, h := range held {
			if !slices.Contains(blocks, h) {
				return fmt.Errorf("array %s also holds %s: %w", md, h, backup.ErrNotOurs)
			}
		}
	}
	if err := unmountAll(ctx, append(slices.Clone(arrays), blocks...)); err != nil {
		return err
	}
	for _, md := range arrays {
		if err := StopArray(ctx, md); err != nil {
			return err
		}
	}
	return nil
}

func unmountAll(ctx context.Context, blocks []string) error {
	ours := map[[2]int]bool{}
	var dirs []string
	for _, b := range blocks {
		major, minor, err := deviceNumber(b)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		ours[[2]int{major, minor}] = true
		mounts, err := MountsOf(major, minor)
		if err != nil {
			return err
		}
		for _, m := range mounts {
			dirs = append(dirs, m.Mountpoint)
		}
	}
	slices.Sort(dirs)
	slices.Reverse(dirs)     // nested ones first
	for _, d := range dirs { // once a mount, so that stacked ones go, too
		infos, err := mountedOn(d)
		if err != nil {
			return fmt.Errorf("unmount %s: %w", d, err)
		}
		top := topmost(infos)
		if top != nil && !ours[[2]int{top.Major, top.Minor}] {
			return fmt.Errorf("unmount %s: %s is mounted over it: %w", d, top.Source, backup.ErrInUse)
		}
		if err := unmount(ctx, top); err != nil {
			return err
		}
	}
	return nil
}

func withPartitions(devices []string) ([]string, error) {
	var out []string
	for _, d := range devices {
		name, err := kernelName(d)
		if err != nil {
			return nil, err
		}
		out = append(out, "/dev/"+name)
		parts, err := filepath.Glob(filepath.Join("/sys/class/block", name, "*/partition"))
		if err != nil {
			return nil, fmt.Errorf("partitions of %s: %w", d, err)
		}
		for _, p := range parts {
			out = append(out, "/dev/"+filepath.Base(filepath.Dir(p)))
		}
	}
	return out, nil
}

// RemoveEmpty removes the folders from path upwards while they are empty, up
// to and including root.
func RemoveEmpty(path, root string) error {
	for path == root || strings.HasPrefix(path, root+"/") {
		err := unix.Rmdir(path) // os.Remove would take a file, too
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove empty folder %s: %w", path, err)
		}
		path = filepath.Dir(path)
	}
	return nil
}
