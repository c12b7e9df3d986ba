package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// GroupSpec describes a volume group to make, with one logical volume that
// takes all of it.
type GroupSpec struct {
	Group   string
	Volume  string
	Striped bool         // over all devices; else one after the other
	Stripe  backup.Bytes // of a striped one: a power of two
	Devices []string
}

// CreateGroup makes the group and its volume and returns the volume's device.
// The devices lose what they held. On an error what was made of it may stand;
// Release takes it away. A group of that name: an error, nothing is made.
func CreateGroup(ctx context.Context, spec GroupSpec) (string, error) {
	devices, err := kernelNames(spec.Devices)
	if err != nil {
		return "", err
	}
	if _, err := lvmTool(ctx, "lvm", append([]string{"vgcreate", "--yes", spec.Group}, devices...)...); err != nil {
		return "", err
	}
	args := []string{"lvcreate", "--yes", "--zero", "n", "--wipesignatures", "n", "--extents", "100%FREE", "--name", spec.Volume}
	if spec.Striped && len(devices) > 1 {
		args = append(args, "--type", "striped", "--stripes", fmt.Sprint(len(devices)), "--stripesize", fmt.Sprintf("%dk", int64(spec.Stripe)/1024))
	}
	if _, err := lvmTool(ctx, "lvm", append(append(args, spec.Group), devices...)...); err != nil {
		return "", err
	}
	return activate(ctx, devices, "")
}

// ActivateGroup brings up the one volume group that lies on just these
// devices, as after a reboot, and returns the device of its one logical
// volume. Up already: the same again. Devices of no group, of several, or of
// one that has others too: ErrNotOurs.
func ActivateGroup(ctx context.Context, devices []string) (string, error) {
	devices, err := kernelNames(devices)
	if err != nil {
		return "", err
	}
	return activate(ctx, devices, "")
}

// ImportVolume brings up a logical volume on the copies of its physical
// volumes, under a new identity of its group, so that the copy can stand beside
// its original in one kernel. It returns the device. The members are those of
// want, in its order. LVM is shown these devices and no others, and what they
// say of themselves is held against want before anything is changed: another
// group, another order, a missing or a foreign one are ErrNotOurs. What
// something else (udev) has activated on them is taken down first, but only if
// every device below it is one of these; else ErrNotOurs. Imported before
// under that name (another volume of the same group): only brought up.
func ImportVolume(ctx context.Context, members []string, want backup.LogicalVolume, group string) (string, error) {
	members, err := kernelNames(members)
	if err != nil {
		return "", err
	}
	unlock, err := lockDevices(ctx, members)
	if err != nil {
		return "", err
	}
	defer unlock()
	now, err := groupOn(ctx, members)
	if err != nil {
		return "", err
	}
	if now.name != group || now.uuid == want.Group.UUID {
		if err := checkOriginal(now, members, want); err != nil {
			return "", err
		}
		if err := removeVolumes(ctx, members, want.Group.UUID); err != nil {
			return "", fmt.Errorf("take over: %w", err)
		}
		args := append([]string{"vgimportclone", "--config", onlyDevices(members, group), "--basevgname", group}, members...)
		if _, err := lvmTool(ctx, "lvm", args...); err != nil {
			return "", err
		}
		if now, err = groupOn(ctx, members); err != nil {
			return "", err
		}
	}
	if err := checkImported(now, members, want, group); err != nil {
		return "", err
	}
	// What udev began before the devices were locked may have come in between.
	if err := removeVolumes(ctx, members, want.Group.UUID); err != nil {
		return "", fmt.Errorf("take over: %w", err)
	}
	return activate(ctx, members, want.UUID)
}

// checkOriginal demands that the devices are the wanted physical volumes, each
// in its place, of the group as it was cut.
func checkOriginal(g volumeGroup, members []string, want backup.LogicalVolume) error {
	if g.uuid != want.Group.UUID {
		return backup.Hint(fmt.Errorf("%s hold volume group %s (%s), wanted is %s (%s): %w", members, g.name, g.uuid, want.Group.Name, want.Group.UUID, backup.ErrNotOurs),
			"if an import was cut short, remove this copy and restore again")
	}
	got, _, err := g.inOrder(members, want.UUID)
	if err != nil {
		return err
	}
	for i := range members {
		if len(members) != len(want.PhysicalVolumes) || got.PhysicalVolumes[i] != want.PhysicalVolumes[i] {
			return fmt.Errorf("%s is physical volume %s, the backup says %s: %w", members[i], got.PhysicalVolumes[i], want.PhysicalVolumes, backup.ErrNotOurs)
		}
	}
	if !sameMap(got.Segments, want.Segments) {
		return fmt.Errorf("logical volume %s has the map %+v, the backup says %+v: %w", want.Name, got.Segments, want.Segments, backup.ErrNotOurs)
	}
	return nil
}

// checkImported demands the same volume with the same map on the same devices,
// in a group with the new name and another UUID. The physical volumes have new
// UUIDs by then.
func checkImported(g volumeGroup, members []string, want backup.LogicalVolume, group string) error {
	got, _, err := g.inOrder(members, want.UUID)
	if err != nil {
		return err
	}
	if g.name != group || g.uuid == want.Group.UUID || !sameMap(got.Segments, want.Segments) {
		return fmt.Errorf("after its import the group is %s (%s) with %s mapped as %+v, wanted was %s with %+v: %w",
			g.name, g.uuid, want.Name, got.Segments, group, want.Segments, backup.ErrNotOurs)
	}
	return nil
}

// inOrder is describe with the members in the order given, which must be all
// of the group's, and their numbers.
func (g volumeGroup) inOrder(members []string, uuid string) (backup.LogicalVolume, [][2]int, error) {
	lv, devices, err := g.describe(uuid)
	if err != nil {
		return lv, nil, fmt.Errorf("%w: %w", backup.ErrNotOurs, err)
	}
	place := make([]int, len(devices)) // of describe's member in members
	numbers, uuids := make([][2]int, len(members)), make([]string, len(members))
	for i, m := range members {
		major, minor, err := deviceNumber(m)
		if err != nil {
			return lv, nil, err
		}
		numbers[i] = [2]int{major, minor}
		at := slices.Index(devices, numbers[i])
		if at < 0 || uuids[i] != "" || len(devices) != len(members) {
			return lv, nil, fmt.Errorf("volume group %s has %d physical volumes, and %s is none of them; wanted are %s: %w", g.name, len(devices), m, members, backup.ErrNotOurs)
		}
		place[at], uuids[i] = i, lv.PhysicalVolumes[at]
	}
	for _, s := range lv.Segments {
		for i := range s.Stripes {
			s.Stripes[i].Member = place[s.Stripes[i].Member]
		}
	}
	lv.PhysicalVolumes = uuids
	return lv, numbers, nil
}

// groupOn returns the one volume group that LVM finds on these devices when it
// sees no others.
func groupOn(ctx context.Context, devices []string) (volumeGroup, error) {
	for _, d := range devices {
		if !plainPath.MatchString(d) {
			return volumeGroup{}, fmt.Errorf("device %q in a filter of lvm: %w", d, backup.ErrUnsupported)
		}
	}
	out, err := lvmTool(ctx, "lvm", append(reportArgs(), "--config", onlyDevices(devices, ""))...)
	if err != nil {
		return volumeGroup{}, err
	}
	groups, err := parseReport(out)
	if err != nil {
		return volumeGroup{}, err
	}
	if len(groups) != 1 || len(groups[0].physical) != len(devices) {
		var found []string
		for _, g := range groups {
			found = append(found, fmt.Sprintf("%s (%s) of %d", g.name, g.uuid, len(g.physical)))
		}
		return volumeGroup{}, backup.Hint(fmt.Errorf("%s are not the physical volumes of one group, lvm finds %v: %w", devices, found, backup.ErrNotOurs),
			"if an import was cut short, remove this copy and restore again")
	}
	return groups[0], nil
}

// plainPath is what stands for itself in a pattern of LVM's.
var plainPath = regexp.MustCompile(`^/dev/[0-9A-Za-z_/-]+$`)

// onlyDevices is a configuration for --config (lvm.conf(5)) under which LVM
// sees these devices and no others, whatever the host's lvm.conf and devices
// file say, keeps no archive of metadata on this host, and activates nothing
// but that group ("": as the host has it). A filter, as --devices and devices
// files came with LVM 2.03.12.
//
// Under it LVM must not be told to deactivate or reload anything of a group
// that has not got its new identity yet: device mapper knows its volumes by
// the UUIDs that the original's bear too.
func onlyDevices(devices []string, group string) string {
	var accept strings.Builder
	for _, d := range devices {
		fmt.Fprintf(&accept, `"a|^%s$|",`, d)
	}
	filter := "[" + accept.String() + `"r|.*|"]`
	config := "devices { use_devicesfile=0 filter=" + filter + " global_filter=" + filter + " } " + keepNothing
	if group != "" {
		config += ` activation { volume_list=["` + group + `"] }`
	}
	return config
}

// activate brings up one logical volume of the group on these devices ("": its
// only one) and returns its device, proved to be mapped onto them.
func activate(ctx context.Context, devices []string, uuid string) (string, error) {
	g, err := groupOn(ctx, devices)
	if err != nil {
		return "", err
	}
	for u := range g.logical {
		if uuid == "" && len(g.logical) == 1 {
			uuid = u
		}
	}
	lv, numbers, err := g.inOrder(devices, uuid)
	if err != nil {
		return "", err
	}
	if _, err := lvmTool(ctx, "lvm", "lvchange", "--config", onlyDevices(devices, g.name), "--activate", "y", "--ignoreactivationskip", g.name+"/"+lv.Name); err != nil {
		return "", err
	}
	want := "LVM-" + strings.ReplaceAll(g.uuid+uuid, "-", "")
	all, err := filepath.Glob("/sys/block/dm-*")
	if err != nil {
		return "", fmt.Errorf("device mapper devices: %w", err)
	}
	for _, dir := range all {
		if readString(dir, "dm/uuid") == want {
			dev := "/dev/" + filepath.Base(dir)
			if err := checkMap(ctx, dev, lv, numbers); err != nil {
				return "", fmt.Errorf("%w: %w", backup.ErrNotOurs, err)
			}
			return dev, nil
		}
	}
	return "", fmt.Errorf("device of %s/%s: %w", g.name, lv.Name, backup.ErrNotFound)
}

// removeVolumes takes down the logical volumes of one group ("": of any) that
// stand on the devices. One that also stands on others: ErrNotOurs.
func removeVolumes(ctx context.Context, devices []string, group string) error {
	above, err := standingOn(devices)
	if err != nil {
		return err
	}
	of := "LVM-" + strings.ReplaceAll(group, "-", "")
	above = slices.DeleteFunc(above, func(dev string) bool { return !strings.HasPrefix(dmUUID(dev), of) })
	if err := allOn(above, devices); err != nil {
		return err
	}
	for _, dev := range above {
		if err := removeVolume(ctx, dev); err != nil {
			return err
		}
	}
	return nil
}

// removeVolume takes one logical volume down in device mapper itself, by its
// own name: `vgchange` goes by UUIDs that a copy shares with its original until
// it is imported, and needs metadata that are whole. Not there: nil. In use:
// ErrInUse.
func removeVolume(ctx context.Context, dev string) error {
	uuid, name := dmUUID(dev), readString("/sys/block", filepath.Base(dev), "dm/name")
	for try := 0; ; try++ {
		if uuid == "" || dmUUID(dev) != uuid {
			return removeLinks(name)
		}
		_, err := lvmTool(ctx, "dmsetup", "remove", name)
		if err == nil && try <= 25 {
			continue // look whether it is gone
		}
		if try > 25 || pause(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("take down logical volume %s (%s): %w: %w", name, dev, backup.ErrInUse, errors.Join(ctx.Err(), err))
		}
	}
}

// removeLinks removes /dev/GROUP/VOLUME, which LVM makes and device mapper does
// not know of, where no udev did it. Only what leads to the removed node goes.
func removeLinks(name string) error {
	const hyphen = "\x00" // a hyphen in either name is doubled (dm_build_dm_name)
	group, volume, ok := strings.Cut(strings.ReplaceAll(name, "--", hyphen), "-")
	if !ok {
		return nil
	}
	dir := filepath.Join("/dev", strings.ReplaceAll(group, hyphen, "-"))
	link := filepath.Join(dir, strings.ReplaceAll(volume, hyphen, "-"))
	if to, err := os.Readlink(link); err != nil || to != "/dev/mapper/"+name {
		return nil
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("link to %s: %w", name, err)
	}
	return RemoveEmpty(dir, dir)
}

func dmUUID(dev string) string { return readString("/sys/block", filepath.Base(dev), "dm/uuid") }
