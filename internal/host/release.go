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
// mounts first, then arrays and logical volumes, uppermost first, so that the
// devices can be detached. What also stands on a device not in the list is not
// touched: ErrNotOurs. Nothing there: nil.
func Release(ctx context.Context, devices []string) error {
	blocks, err := withPartitions(devices)
	if err != nil {
		return err
	}
	for range 5 { // udev, which saw the devices come, may activate a group once more
		above, err := standingOn(blocks)
		if err != nil {
			return err
		}
		if err := releaseAll(ctx, above, blocks); err != nil || len(above) == 0 {
			return err
		}
	}
	return nil
}

func releaseAll(ctx context.Context, above, blocks []string) (err error) {
	if err := allOn(above, blocks); err != nil {
		return err
	}
	if err := unmountAll(ctx, append(slices.Clone(above), blocks...)); err != nil {
		return err
	}
	for _, dev := range above {
		if exists("/sys/block", filepath.Base(dev), "md") {
			err = StopArray(ctx, dev)
		} else {
			err = removeVolume(ctx, dev)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// standingOn returns the arrays and logical volumes that stand on any of the
// blocks, also on one another, by the kernel's lists of holders; each before
// those that it stands on.
func standingOn(blocks []string) ([]string, error) {
	var out []string
	seen := map[string]bool{}
	var visit func(block string) error
	visit = func(block string) error {
		holders, err := os.ReadDir(filepath.Join("/sys/class/block", filepath.Base(block), "holders"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("holders of %s: %w", block, err)
		}
		for _, h := range holders {
			dev := "/dev/" + h.Name()
			if seen[dev] || !exists("/sys/block", h.Name(), "md") && !volumeUUID.MatchString(dmUUID(dev)) {
				continue
			}
			seen[dev] = true
			if err := visit(dev); err != nil {
				return err
			}
			out = append(out, dev)
		}
		return nil
	}
	for _, b := range blocks {
		if err := visit(b); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(out, func(a, b string) int { return heightOf(b, 0) - heightOf(a, 0) })
	return out, nil
}

// heightOf is how many layers of devices are below one.
func heightOf(dev string, over int) int {
	high := 0
	if below, err := membersOf(dev); err == nil && over < 16 {
		for _, b := range below {
			high = max(high, 1+heightOf(b, over+1))
		}
	}
	return high
}

// allOn demands that each of above stands on blocks and on one another alone.
func allOn(above, blocks []string) error {
	for _, dev := range above {
		held, err := membersOf(dev)
		if err != nil {
			return err
		}
		for _, h := range held {
			if slices.Contains(blocks, h) || slices.Contains(above, h) {
				continue
			}
			if exists("/sys/block", filepath.Base(dev), "md") {
				return fmt.Errorf("array %s also holds %s: %w", dev, h, backup.ErrNotOurs)
			}
			return backup.Hint(fmt.Errorf("logical volume %s (%s) also stands on %s: %w", readString("/sys/block", filepath.Base(dev), "dm/name"), dev, h, backup.ErrNotOurs),
				"something activated a mixture of two sets; take it down by `dmsetup remove`, and put `event_activation = 0` into lvm.conf on restore hosts")
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

// MountsOver returns the mounts of everything that stands on the given whole
// devices: themselves, their partitions, arrays and logical volumes.
func MountsOver(devices []string) ([]Mount, error) {
	blocks, err := withPartitions(devices)
	if err != nil {
		return nil, err
	}
	above, err := standingOn(blocks)
	if err != nil {
		return nil, err
	}
	var out []Mount
	for _, b := range append(above, blocks...) {
		major, minor, err := deviceNumber(b)
		if err != nil {
			return nil, err
		}
		mounts, err := MountsOf(major, minor)
		if err != nil {
			return nil, err
		}
		out = append(out, mounts...)
	}
	return out, nil
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
