package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// Resolve tells which provider's volume a whole block device is.
type Resolve func(ctx context.Context, device string) (backup.Volume, error)

// Tree describes the block device with that number down to the volumes. What
// it cannot vouch for is refused by name: an error that wraps ErrUnsupported.
// A leaf that resolve does not know is refused too.
func Tree(ctx context.Context, major, minor int, resolve Resolve) (backup.Device, error) {
	if major == 0 { // Documentation/admin-guide/devices.txt: unnamed devices
		return backup.Device{}, fmt.Errorf("not on a block device of its own (overlay, btrfs, tmpfs, network, …; xfs and ext4 are done so far): %w", backup.ErrUnsupported)
	}
	link := fmt.Sprintf("/sys/dev/block/%d:%d", major, minor)
	dir, err := filepath.EvalSymlinks(link)
	if err != nil {
		return backup.Device{}, fmt.Errorf("block device %d:%d is unknown to sysfs: %w", major, minor, backup.ErrUnsupported)
	}
	return treeAt(ctx, dir, resolve)
}

func treeAt(ctx context.Context, dir string, resolve Resolve) (backup.Device, error) {
	d := backup.Device{Name: filepath.Base(dir)}
	sectors, err := readInt(dir, "size")
	if err != nil {
		return d, err
	}
	d.Size = backup.Bytes(sectors * 512) // sysfs counts in 512-byte sectors whatever the device's block size
	switch {
	case exists(dir, "md"):
		return arrayTree(ctx, dir, d, resolve)
	case exists(dir, "dm"):
		// A provider may show its volumes as device-mapper devices.
		v, err := resolve(ctx, "/dev/"+d.Name)
		if errors.Is(err, backup.ErrNotFound) {
			if uuid := volumeUUID.FindStringSubmatch(readString(dir, "dm/uuid")); uuid != nil {
				return logicalTree(ctx, d, uuid, resolve)
			}
			return d, refuseDM(dir, d.Name)
		}
		if err != nil {
			return d, fmt.Errorf("resolve /dev/%s: %w", d.Name, err)
		}
		d.Kind, d.Volume = backup.DeviceVolume, &v
		return d, nil
	case exists(dir, "bcache"):
		return d, fmt.Errorf("%s is a bcache device: a snapshot of its backing device misses what only the cache holds: %w", d.Name, backup.ErrUnsupported)
	case exists(dir, "partition"):
		return partitionTree(ctx, dir, d, resolve)
	}
	if slaves, _ := os.ReadDir(filepath.Join(dir, "slaves")); len(slaves) > 0 {
		return d, fmt.Errorf("%s is stacked on %s by a driver cleancut does not know: %w", d.Name, slaves[0].Name(), backup.ErrUnsupported)
	}
	v, err := resolve(ctx, "/dev/"+d.Name)
	if err != nil {
		if errors.Is(err, backup.ErrNotFound) {
			return d, backup.Hint(fmt.Errorf("/dev/%s is no volume of the provider: %w: %w", d.Name, backup.ErrUnsupported, err),
				"a backup must hold every device of the cluster; move the data to volumes of the provider, or choose the provider that owns this device")
		}
		return d, fmt.Errorf("resolve /dev/%s: %w", d.Name, err)
	}
	d.Kind, d.Volume = backup.DeviceVolume, &v
	return d, nil
}

func partitionTree(ctx context.Context, dir string, d backup.Device, resolve Resolve) (backup.Device, error) {
	number, err1 := readInt(dir, "partition")
	start, err2 := readInt(dir, "start")
	if err := errors.Join(err1, err2); err != nil {
		return d, err
	}
	whole, err := treeAt(ctx, filepath.Dir(dir), resolve)
	if err != nil {
		return d, err
	}
	if err := refuseBelow(d, whole); err != nil {
		return d, err
	}
	d.Kind = backup.DevicePartition
	d.Partition = &backup.Partition{Number: int(number), Start: backup.Bytes(start * 512), Size: d.Size}
	d.Members = []backup.Device{whole}
	return d, nil
}

func refuseDM(dir, name string) error {
	return fmt.Errorf("%s (%s) is a device mapper device that is neither a volume of the provider nor LVM's (cache, crypt, …): %w",
		name, readString(dir, "dm/name"), backup.ErrUnsupported)
}

// arrayTree follows the kernel's Documentation/admin-guide/md.rst.
func arrayTree(ctx context.Context, dir string, d backup.Device, resolve Resolve) (backup.Device, error) {
	md := filepath.Join(dir, "md")
	level := readString(md, "level")
	if level != "raid0" && level != "linear" {
		return d, fmt.Errorf("%s is an md array of level %q (raid0 and linear are done so far): %w", d.Name, level, backup.ErrUnsupported)
	}
	if pos := readString(md, "reshape_position"); pos != "none" && pos != "" {
		return d, fmt.Errorf("%s is being reshaped: %w", d.Name, backup.ErrUnsupported)
	}
	if state := readString(md, "array_state"); !slices.Contains([]string{"clean", "active", "active-idle", "write-pending"}, state) {
		return d, fmt.Errorf("%s is in state %q: %w", d.Name, state, backup.ErrUnsupported)
	}
	if n := readString(md, "degraded"); n != "" && n != "0" {
		return d, fmt.Errorf("%s is degraded: %w", d.Name, backup.ErrUnsupported)
	}
	// A restore tells the members apart by their superblocks (ReadSuperblock).
	if v := readString(md, "metadata_version"); !strings.HasPrefix(v, "1.") {
		return d, fmt.Errorf("%s has metadata %q (1.0, 1.1 and 1.2 are done so far): %w", d.Name, v, backup.ErrUnsupported)
	}
	slots, err := arraySlots(md)
	if err != nil {
		return d, fmt.Errorf("%s: %w", d.Name, err)
	}
	out, err := Run(ctx, "mdadm", "--detail", "--export", "/dev/"+d.Name)
	if err != nil {
		return d, err
	}
	detail := parseExport(out)
	chunk, _ := readInt(md, "chunk_size")
	layout, _ := readInt(md, "layout")
	d.Kind = backup.DeviceArray
	d.Array = &backup.Array{UUID: detail["MD_UUID"], Name: detail["MD_NAME"], Level: level, Metadata: readString(md, "metadata_version"),
		ChunkBytes: backup.Bytes(chunk), Layout: int(layout)}
	if d.Array.UUID == "" {
		return d, fmt.Errorf("%s has no array UUID (metadata %q): %w", d.Name, d.Array.Metadata, backup.ErrUnsupported)
	}
	for _, block := range slots {
		m, err := treeAt(ctx, block, resolve)
		if err != nil {
			return d, fmt.Errorf("member of %s: %w", d.Name, err)
		}
		if err := refuseBelow(d, m); err != nil {
			return d, err
		}
		d.Members = append(d.Members, m)
	}
	return d, nil
}

// arraySlots returns the sysfs folders of an array's members in slot order,
// and an error unless every slot is held by one that is in sync.
func arraySlots(md string) ([]string, error) {
	disks, err := readInt(md, "raid_disks")
	if err != nil {
		return nil, err
	}
	devs, err := filepath.Glob(filepath.Join(md, "dev-*"))
	if err != nil {
		return nil, err
	}
	sort.Strings(devs)
	slots := make([]string, disks)
	for _, dev := range devs {
		n, err := strconv.Atoi(readString(dev, "slot"))
		if err != nil || n < 0 || n >= len(slots) || slots[n] != "" {
			return nil, fmt.Errorf("member %s has slot %q: %w", filepath.Base(dev), readString(dev, "slot"), backup.ErrUnsupported)
		}
		if state := readString(dev, "state"); state != "in_sync" {
			return nil, fmt.Errorf("member %s is %q: %w", filepath.Base(dev), state, backup.ErrUnsupported)
		}
		block, err := filepath.EvalSymlinks(filepath.Join(dev, "block"))
		if err != nil {
			return nil, fmt.Errorf("member %s: %w", filepath.Base(dev), err)
		}
		slots[n] = block
	}
	if i := slices.Index(slots, ""); i >= 0 {
		return nil, fmt.Errorf("slot %d of %d is empty: %w", i, disks, backup.ErrUnsupported)
	}
	return slots, nil
}

func exists(elem ...string) bool {
	_, err := os.Lstat(filepath.Join(elem...))
	return err == nil
}

func readString(elem ...string) string {
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func readInt(elem ...string) (int64, error) {
	v, err := strconv.ParseInt(readString(elem...), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", filepath.Join(elem...), err)
	}
	return v, nil
}
