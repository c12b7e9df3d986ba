package host_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
)

// group is a volume group with hyphens in its name on three devices: data is
// striped over the last and the first, wal has a linear segment on each of
// those, and nothing lies on the second.
type group struct {
	*disks
	devices   []string
	data, wal backup.Device
	mounts    []string
}

const groupName, copyName = "vg-cct.a", "cleancut_copy_x"

func lvmRun(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, append([]string{"lvm"}, args...)...)
}

// filter shows LVM some devices only.
func filter(devices ...string) string {
	return `devices { filter=["a|^` + strings.Join(devices, `$|","a|^`) + `$|","r|.*|"] } backup { backup=0 archive=0 }`
}

func newGroup(t *testing.T) *group {
	t.Helper()
	if exec.Command("udevadm", "control", "--ping").Run() != nil {
		t.Setenv("DM_DISABLE_UDEV", "1")
	}
	g := &group{disks: newDisks(t)}
	g.devices = g.make(t, 3)
	lvmRun(t, append([]string{"vgcreate", "-q", groupName}, g.devices...)...)
	t.Cleanup(func() {
		if err := host.Release(labtest.Context(t), g.devices); err != nil {
			t.Error(err)
		}
	})
	lvmRun(t, "lvcreate", "-q", "-y", "-Zn", "-Wn", "-n", "data", "--type", "striped", "-i", "2", "-I", "64k", "-l", "30", groupName, g.devices[2], g.devices[0])
	lvmRun(t, "lvcreate", "-q", "-y", "-Zn", "-Wn", "-n", "w-al", "-l", "3", groupName, g.devices[0])
	lvmRun(t, "lvextend", "-q", "-l", "+2", groupName+"/w-al", g.devices[2])
	for _, lv := range []struct {
		name string
		to   *backup.Device
	}{{"data", &g.data}, {"w-al", &g.wal}} {
		path := "/dev/" + groupName + "/" + lv.name
		if err := host.MakeFilesystem(t.Context(), "ext4", path, lv.name); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := host.MountDevice(t.Context(), path, dir, "ext4", nil); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "content"), content()[:2<<20], 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		if *lv.to, err = treeOf(t, path, g.devices...); err != nil {
			t.Fatal(err)
		}
		g.mounts = append(g.mounts, dir)
	}
	return g
}

// copies clones the devices while both filesystems are frozen.
func (g *group) copies(t *testing.T) []string {
	t.Helper()
	f := arm(t, t.Context(), g.mounts...)
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	images := g.clones(t, g.devices)
	_, err := f.Thaw()
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return images
}

// inOrder returns the copies of the members in the order of a logical volume.
func (g *group) inOrder(copies []string, d backup.Device) []string {
	var out []string
	for _, m := range d.Members {
		out = append(out, copies[slices.Index(g.devices, string(m.Volume.ID))])
	}
	return out
}

// isAsBefore demands that the original bears its identities, is mapped as it
// was, and is the only one that /etc/lvm knows of.
func (g *group) isAsBefore(t *testing.T) {
	t.Helper()
	for _, want := range []backup.Device{g.data, g.wal} {
		got, err := treeOf(t, "/dev/"+want.Name, g.devices...)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("the original is now %+v, %v; was %+v", got, err, want)
		}
	}
	kept, err := filepath.Glob("/etc/lvm/*/cleancut*")
	if err != nil || len(kept) > 0 {
		t.Errorf("kept: %v, %v", kept, err)
	}
}

// pvUUID reads a physical volume's own label.
func pvUUID(t *testing.T, device string) string {
	t.Helper()
	id, err := host.Identify(t.Context(), device)
	if err != nil || id.Type != "LVM2_member" {
		t.Fatalf("%s: %+v, %v", device, id, err)
	}
	return id.UUID
}

// dmOn returns the names of the device mapper devices on any of the devices.
func dmOn(t *testing.T, devices []string) []string {
	t.Helper()
	var out []string
	for _, d := range devices {
		holders, err := filepath.Glob("/sys/block/" + filepath.Base(d) + "/holders/dm-*")
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range holders {
			if name := read(t, "/sys/block/%s/dm/name", filepath.Base(h)); !slices.Contains(out, strings.TrimSpace(name)) {
				out = append(out, strings.TrimSpace(name))
			}
		}
	}
	slices.Sort(out)
	return out
}

func holdsContentOf(t *testing.T, dev string) {
	t.Helper()
	dir := t.TempDir()
	if err := host.MountDevice(t.Context(), dev, dir, "ext4", nil); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "content"))
	if err != nil || !slices.Equal(got, content()[:2<<20]) {
		t.Errorf("the copy's content differs (%d bytes, error %v)", len(got), err)
	}
	if err := host.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func TestACopyOfAVolumeGroupStandsBesideItsOriginal(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	g := newGroup(t)
	copies := attachAll(t, g.copies(t))
	order := g.inOrder(copies, g.data)
	want := *g.data.LogicalVolume
	blank := g.make(t, 1)[0]
	foreign := g.make(t, 1)[0]
	lvmRun(t, "vgcreate", "-q", "cctother", foreign)

	if got := mapText(want.Segments); got != "striped 0+120 64K 0@1 1@1" || order[0] != copies[2] || order[1] != copies[0] || order[2] != copies[1] {
		t.Fatalf("data: %s on %v of %v", got, order, copies)
	}
	if got := mapText(g.wal.LogicalVolume.Segments); got != "linear 0+12 0@61, linear 12+8 1@61" {
		t.Fatalf("wal: %s", got)
	}
	otherMap := want
	otherMap.Segments = g.wal.LogicalVolume.Segments
	otherVolume := want
	otherVolume.UUID = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg"

	for _, c := range []struct {
		name    string
		members []string
		want    backup.LogicalVolume
		say     string
	}{
		{"the wrong order", []string{order[1], order[0], order[2]}, want, "is physical volume"},
		{"a member of another group", []string{order[0], foreign, order[2]}, want, "cctother"},
		{"a missing member", order[:2], want, "not the physical volumes of one group"},
		{"a member twice", []string{order[0], order[0], order[2]}, want, "1 of its physical volumes are missing"},
		{"a device without a label", []string{order[0], blank, order[2]}, want, "1 of its physical volumes are missing"},
		{"a member that the original holds", []string{order[0], g.devices[0], order[2]}, want, "also stands on"},
		{"another group altogether", []string{foreign}, want, "wanted is " + groupName},
		{"a volume that the group does not have", order, otherVolume, otherVolume.UUID},
		{"a volume with another map", order, otherMap, "has the map"},
	} {
		t.Run(c.name+" is refused and nothing is changed", func(t *testing.T) {
			labels := map[string]string{}
			for _, d := range copies {
				labels[d] = pvUUID(t, d)
			}
			got, err := host.ImportVolume(t.Context(), c.members, c.want, copyName)
			if got != "" {
				t.Errorf("got %s", got)
			}
			refusal(t, err, backup.ErrNotOurs, c.say)
			for d, label := range labels {
				if now := pvUUID(t, d); now != label {
					t.Errorf("%s is now %s, was %s", d, now, label)
				}
			}
			if on := dmOn(t, copies); len(on) > 0 {
				t.Errorf("activated: %v", on)
			}
			g.isAsBefore(t)
		})
	}

	t.Run("to release copies that are not imported does not touch the original, whose UUIDs they share", func(t *testing.T) {
		if err := errors.Join(host.Release(t.Context(), copies), host.Unmount(t.Context(), g.mounts[1])); err != nil {
			t.Fatal(err)
		}
		if err := host.Release(t.Context(), copies); err != nil {
			t.Error(err)
		}
		g.isAsBefore(t)
		if err := host.MountDevice(t.Context(), "/dev/"+g.wal.Name, g.mounts[1], "ext4", nil); err != nil {
			t.Error(err)
		}
	})

	t.Run("both volumes come up under a new identity", func(t *testing.T) {
		first, err := host.ImportVolume(t.Context(), order, want, copyName)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := host.ImportVolume(t.Context(), order, want, copyName); err != nil || again != first {
			t.Errorf("again: got %q and %v, want %s", again, err, first)
		}
		second, err := host.ImportVolume(t.Context(), g.inOrder(copies, g.wal), *g.wal.LogicalVolume, copyName)
		if err != nil || second == first {
			t.Fatalf("the second: got %q and %v", second, err)
		}
		holdsContentOf(t, first)
		holdsContentOf(t, second)
		tree, err := treeOf(t, first, copies...)
		if err != nil {
			t.Fatal(err)
		}
		got := *tree.LogicalVolume
		if got.Group.Name != copyName || got.Group.UUID == want.Group.UUID || got.UUID != want.UUID || !reflect.DeepEqual(got.Segments, want.Segments) || !slices.Equal(leaves(tree), order) {
			t.Errorf("got %+v on %v, want it as %+v on %v", got, leaves(tree), want, order)
		}
		for _, uuid := range got.PhysicalVolumes {
			if slices.Contains(want.PhysicalVolumes, uuid) {
				t.Errorf("physical volume %s keeps its UUID", uuid)
			}
		}
		g.isAsBefore(t)
		refusal(t, host.Release(t.Context(), copies[:1]), backup.ErrNotOurs, "also stands on", copyName)
		for range 2 {
			if err := host.Release(t.Context(), copies); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Lstat("/dev/" + copyName); !errors.Is(err, os.ErrNotExist) || len(dmOn(t, copies)) > 0 {
			t.Errorf("left: /dev/%s (%v), %v", copyName, err, dmOn(t, copies))
		}
		g.isAsBefore(t)
	})

	t.Run("a group of which some members are imported and some are not is refused with a hint", func(t *testing.T) {
		fresh := attachAll(t, g.copies(t))
		mixed := g.inOrder([]string{copies[0], copies[1], fresh[2]}, g.data)
		_, err := host.ImportVolume(t.Context(), mixed, want, copyName)
		refusal(t, err, backup.ErrNotOurs)
		if !strings.Contains(backup.HintOf(err), "restore again") {
			t.Errorf("hint: got %q", backup.HintOf(err))
		}
		if err := host.Release(t.Context(), mixed); err != nil {
			t.Error(err)
		}
		g.isAsBefore(t)
	})

	t.Run("an import that is cut short at any moment is finished or refused, and can be released", func(t *testing.T) {
		finished := 0
		for delay := 100 * time.Millisecond; delay < 2*time.Second; delay += 300 * time.Millisecond {
			fresh := attachAll(t, g.copies(t))
			ctx, cancel := context.WithTimeout(t.Context(), delay)
			_, err := host.ImportVolume(ctx, g.inOrder(fresh, g.data), want, copyName)
			cancel()
			if err != nil {
				if _, err = host.ImportVolume(t.Context(), g.inOrder(fresh, g.data), want, copyName); err != nil {
					refusal(t, err, backup.ErrNotOurs)
				}
			}
			if err == nil {
				finished++
			}
			if err := host.Release(t.Context(), fresh); err != nil {
				t.Error(err)
			}
			if on := dmOn(t, fresh); len(on) > 0 {
				t.Errorf("left: %v", on)
			}
			for _, d := range fresh { // no second group of that name for the next one
				run(t, "wipefs", "-q", "-a", d)
			}
		}
		t.Logf("NOTE %d of 7 imports that were cut short were finished by the next", finished)
		g.isAsBefore(t)
	})

	t.Run("what stands on other logical volumes, or is not what its metadata say, is refused", func(t *testing.T) {
		lvmRun(t, "lvcreate", "-q", "-y", "-Zn", "-Wn", "-n", "below", "-l", "5", groupName)
		below := "/dev/" + groupName + "/below"
		lvmRun(t, "vgcreate", "-q", "--config", "devices/scan_lvs=1", "cctnested", below)
		lvmRun(t, "lvcreate", "-q", "-y", "-Zn", "-Wn", "--config", "devices/scan_lvs=1", "-n", "top", "-l", "2", "cctnested")
		_, err := treeOf(t, "/dev/cctnested/top", g.devices...)
		refusal(t, err, backup.ErrUnsupported)
		run(t, "dmsetup", "remove", "cctnested-top")
		if err := os.RemoveAll("/dev/cctnested"); err != nil {
			t.Fatal(err)
		}
		mdadm(t, "--create", "/dev/md91", "--run", "--config=none", "--metadata=1.2", "--level=linear", "--force", "--raid-devices=1", below)
		_, err = treeOf(t, "/dev/md91", g.devices...)
		refusal(t, err, backup.ErrUnsupported, "lies on the logical volume "+groupName+"/below")
		if err := host.StopArray(t.Context(), "/dev/md91"); err != nil {
			t.Fatal(err)
		}
		const name = "vg--cct.a-below"
		table := run(t, "dmsetup", "table", name)
		start := table[strings.LastIndexByte(table, ' ')+1:]
		run(t, "dmsetup", "load", name, "--table", strings.TrimSuffix(table, start)+"8192")
		run(t, "dmsetup", "resume", name)
		_, err = treeOf(t, below, g.devices...)
		refusal(t, err, backup.ErrUnsupported, "the kernel maps it")
		if !strings.Contains(backup.HintOf(err), "lvchange --refresh") {
			t.Errorf("hint: %q", backup.HintOf(err))
		}
		lvmRun(t, "lvremove", "-q", "-y", groupName+"/below")

		run(t, "modprobe", "dm-snapshot")
		lvmRun(t, "lvcreate", "-q", "-y", "-s", "-n", "snap", "-l", "2", groupName+"/w-al")
		_, err = treeOf(t, "/dev/"+groupName+"/w-al", g.devices...)
		refusal(t, err, backup.ErrUnsupported, "w-al", "origin")
		_, err = treeOf(t, "/dev/mapper/vg--cct.a-snap-cow", g.devices...)
		refusal(t, err, backup.ErrUnsupported, "keeps to itself", "-cow")
		lvmRun(t, "lvremove", "-q", "-y", groupName+"/snap")
		_, err = treeOf(t, "/dev/"+groupName+"/w-al", g.devices[:2]...)
		refusal(t, err, backup.ErrUnsupported, "no volume of the provider", g.devices[2])
	})
}

// TestVolumesThatSomethingElseActivatedAreTakenOver does what an event of a
// host without the original does: it activates the copies under the original's
// identity.
func TestVolumesThatSomethingElseActivatedAreTakenOver(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	g := newGroup(t)
	image := g.copies(t)
	want := *g.data.LogicalVolume
	if err := host.Release(t.Context(), g.devices); err != nil {
		t.Fatal(err)
	}
	a, b := attachAll(t, g.clonesOfFiles(t, image)), attachAll(t, g.clonesOfFiles(t, image))

	t.Run("a mixture of two copies is refused, and nothing is taken down", func(t *testing.T) {
		mixed := []string{a[0], b[1], b[2]}
		lvmRun(t, "vgchange", "-q", "-ay", "--config", filter(mixed...), groupName)
		up := dmOn(t, mixed)
		_, err := host.ImportVolume(t.Context(), g.inOrder(a, g.data), want, copyName)
		refusal(t, err, backup.ErrNotOurs, "also stands on")
		err = host.Release(t.Context(), a)
		refusal(t, err, backup.ErrNotOurs, "also stands on")
		if !strings.Contains(backup.HintOf(err), "event_activation") || len(up) != 2 || !slices.Equal(dmOn(t, mixed), up) {
			t.Errorf("hint %q; up were %v, are %v", backup.HintOf(err), up, dmOn(t, mixed))
		}
		if err := host.Release(t.Context(), slices.Concat(a, b)); err != nil {
			t.Error(err)
		}
	})
	t.Run("all of ours: taken down, imported, brought up", func(t *testing.T) {
		lvmRun(t, "vgchange", "-q", "-ay", "--config", filter(a...), groupName)
		dev, err := host.ImportVolume(t.Context(), g.inOrder(a, g.data), want, copyName)
		if err != nil {
			t.Fatal(err)
		}
		holdsContentOf(t, dev)
		if on := dmOn(t, a); len(on) != 1 || on[0] != copyName+"-data" {
			t.Errorf("up: %v", on)
		}
	})
	t.Run("a group to be brought up whose UUIDs are taken by a copy is not mistaken for it", func(t *testing.T) {
		lvmRun(t, "vgchange", "-q", "-ay", "--config", filter(b...), groupName)
		lvmRun(t, "lvremove", "-q", "-y", "--config", filter(g.devices...), groupName+"/w-al")
		_, err := host.ActivateGroup(t.Context(), g.devices)
		refusal(t, err, backup.ErrNotOurs)
	})
	if err := host.Release(t.Context(), slices.Concat(a, b)); err != nil {
		t.Error(err)
	}
	t.Run("while udev does the same", func(t *testing.T) {
		// Not by run: the daemon would keep its pipe open.
		if err := exec.Command("/lib/systemd/systemd-udevd", "--daemon").Run(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { run(t, "udevadm", "control", "--exit") })
		t.Setenv("DM_DISABLE_UDEV", "")
		if err := os.Unsetenv("DM_DISABLE_UDEV"); err != nil {
			t.Fatal(err)
		}
		for _, d := range slices.Concat(a, b, g.devices) {
			run(t, "wipefs", "-q", "-a", d)
		}
		run(t, "udevadm", "settle")
		for wait := range 3 {
			fresh := attachAll(t, g.clonesOfFiles(t, image))
			if wait == 0 {
				eventually(t, "udev has activated the copies", func() bool {
					run(t, "udevadm", "settle")
					return len(dmOn(t, fresh)) == 2
				})
			}
			dev, err := host.ImportVolume(t.Context(), g.inOrder(fresh, g.data), want, copyName)
			if err != nil {
				t.Fatal(err)
			}
			holdsContentOf(t, dev)
			if err := host.Release(t.Context(), fresh); err != nil {
				t.Error(err)
			}
			run(t, "udevadm", "settle")
			if on := dmOn(t, fresh); len(on) > 0 {
				t.Logf("udev brought up again: %v", on)
			}
			if err := host.Release(t.Context(), fresh); err != nil {
				t.Error(err)
			}
			for _, d := range fresh {
				run(t, "wipefs", "-q", "-a", d)
			}
		}
	})
}

func TestAGroupIsMadeAndBroughtUpAgain(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	d := newDisks(t)
	disk := d.make(t, 1)[0]
	partition(t, disk, 2048, 64<<11)
	spec := host.GroupSpec{Group: "cct_part", Volume: "data", Striped: true, Stripe: 64 << 10, Devices: []string{disk + "p1"}}
	dev, err := host.CreateGroup(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := treeOf(t, dev, disk)
	if err != nil || tree.Members[0].Kind != backup.DevicePartition || mapText(tree.LogicalVolume.Segments) != "linear 0+60 0@1" {
		t.Errorf("got %+v and %v", tree, err)
	}
	if _, err := host.CreateGroup(t.Context(), host.GroupSpec{Group: "cct_part", Volume: "data", Devices: d.make(t, 1)}); err == nil {
		t.Error("made a second group of that name")
	}
	for range 2 {
		if err := host.Release(t.Context(), []string{disk}); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if got, err := host.ActivateGroup(t.Context(), spec.Devices); err != nil || got == "" {
			t.Errorf("got %q and %v", got, err)
		}
	}
	image := d.clones(t, []string{disk})
	c := attachAll(t, image)
	run(t, "partx", "--add", c[0])
	copied, err := host.ImportVolume(t.Context(), []string{c[0] + "p1"}, *tree.LogicalVolume, copyName)
	if err != nil || copied == dev {
		t.Errorf("got %q and %v", copied, err)
	}
	if err := host.Release(t.Context(), []string{disk, c[0]}); err != nil {
		t.Error(err)
	}
	run(t, "partx", "--delete", disk)
	run(t, "partx", "--delete", c[0])
}
