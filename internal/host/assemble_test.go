package host_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
)

// filled makes an array with a filesystem that holds known content, and
// returns its members in slot order and the array.
func filled(t *testing.T, d *disks) (members []string, dev string) {
	t.Helper()
	members = d.make(t, 4)
	slices.Reverse(members) // names say nothing of slots
	dev = create(t, "raid0", members)
	if err := host.MakeFilesystem(t.Context(), "xfs", dev, "kept"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := host.MountDevice(t.Context(), dev, dir, "xfs", nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Unmount(labtest.Context(t), dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "content"), content(), 0o600); err != nil {
		t.Fatal(err)
	}
	return members, dev
}

// content covers every member many times.
func content() []byte {
	var b bytes.Buffer
	for i := range uint32(1 << 20) {
		b.Write([]byte{byte(i), byte(i >> 8), byte(i >> 16), 0xcc})
	}
	return b.Bytes()
}

// frozenCopies clones the members while their filesystem is frozen.
func (d *disks) frozenCopies(t *testing.T, members []string, dev string) (images []string) {
	t.Helper()
	mounts, err := host.MountsOf(number(t, dev))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("mounts of %s: %v, %v", dev, mounts, err)
	}
	f := arm(t, t.Context(), mounts[0].Mountpoint)
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	images = d.clones(t, members)
	_, err = f.Thaw()
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return images
}

// holdsContent mounts the copy beside its original and reads it.
func holdsContent(t *testing.T, dev string) {
	t.Helper()
	dir := t.TempDir()
	if err := host.MountDevice(t.Context(), dev, dir, "xfs", []string{"nouuid"}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "content"))
	if err != nil || !bytes.Equal(got, content()) {
		t.Errorf("the copy's content differs (%d bytes, error %v)", len(got), err)
	}
	if err := host.Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func setUUID(t *testing.T, device string) string {
	t.Helper()
	sb, err := host.ReadSuperblock(device)
	if err != nil {
		t.Fatal(err)
	}
	return sb.SetUUID.String()
}

func attachAll(t *testing.T, images []string) (devices []string) {
	t.Helper()
	for _, image := range images {
		devices = append(devices, attach(t, image))
	}
	t.Cleanup(func() {
		if err := host.Release(labtest.Context(t), devices); err != nil {
			t.Error(err)
		}
	})
	return devices
}

func TestACopyOfAnArrayStandsBesideItsOriginal(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	d := newDisks(t)
	members, dev := filled(t, d)
	original := setUUID(t, members[0])
	copies := attachAll(t, d.frozenCopies(t, members, dev))
	other := d.make(t, 4)
	if err := host.StopArray(t.Context(), create(t, "raid0", other)); err != nil {
		t.Fatal(err)
	}
	uuid := host.NewArrayUUID()

	swapped := []string{copies[1], copies[0], copies[2], copies[3]}
	foreign := []string{copies[0], other[1], copies[2], copies[3]}
	for _, c := range []struct {
		name    string
		members []string
		err     error
		say     string
	}{
		{"the wrong order", swapped, backup.ErrNotOurs, copies[1] + " is member 1 of 4"},
		{"a member of another array", foreign, backup.ErrNotOurs, other[1] + " is of array"},
		{"a missing member", copies[:3], backup.ErrNotOurs, "wanted is member 0 of 3"},
		{"a member twice", []string{copies[0], copies[0], copies[2], copies[3]}, backup.ErrNotOurs, "wanted is member 1"},
		{"a device that is no member", []string{copies[0], d.make(t, 1)[0], copies[2], copies[3]}, host.ErrNoSuperblock, "member 1"},
		{"a device that is not there", []string{copies[0], "/dev/none", copies[2], copies[3]}, os.ErrNotExist, "/dev/none"},
		{"a member that the original holds", []string{copies[0], copies[1], members[2], copies[3]}, backup.ErrNotOurs, "not part of this set"},
	} {
		t.Run(c.name+" is refused and nothing is changed", func(t *testing.T) {
			got, err := host.AssembleArray(t.Context(), c.members, uuid)
			if got != "" {
				t.Errorf("got %s", got)
			}
			refusal(t, err, c.err, c.say)
			if on, err := host.ArraysOn(copies); err != nil || len(on) > 0 {
				t.Errorf("assembled: %v, %v", on, err)
			}
			for _, m := range copies {
				if got := setUUID(t, m); got != original {
					t.Errorf("%s has now UUID %s", m, got)
				}
			}
		})
	}

	t.Run("the right members are assembled, whatever links name them", func(t *testing.T) {
		links := make([]string, len(copies))
		dir := t.TempDir()
		for i, m := range copies {
			links[i] = filepath.Join(dir, filepath.Base(m))
			if err := os.Symlink(m, links[i]); err != nil {
				t.Fatal(err)
			}
		}
		second, err := host.AssembleArray(t.Context(), links, uuid)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := host.ArrayUUID(t.Context(), second); err != nil || got != uuid || second == dev {
			t.Errorf("got %s with UUID %s and %v, want another with %s", second, got, err, uuid)
		}
		holdsContent(t, second)
		again, err := host.AssembleArray(t.Context(), copies, uuid)
		if err != nil || again != second {
			t.Errorf("again: got %q and %v, want %s", again, err, second)
		}
		tree, err := treeOf(t, second, copies...)
		if err != nil || !slices.Equal(leaves(tree), copies) {
			t.Errorf("got %v and %v, want %v", leaves(tree), err, copies)
		}
		if got := setUUID(t, members[0]); got != original {
			t.Errorf("the original has now UUID %s", got)
		}
		third := host.NewArrayUUID()
		moved, err := host.AssembleArray(t.Context(), copies, third)
		if err != nil || setUUID(t, copies[3]) != third {
			t.Errorf("under a third UUID: got %q and %v", moved, err)
		}
		if err := host.Release(t.Context(), copies); err != nil {
			t.Error(err)
		}
	})

	t.Run("what a run left that was cut short between two members is refused with a hint", func(t *testing.T) {
		fresh := attachAll(t, d.frozenCopies(t, members, dev))
		mixed := append(slices.Clone(copies[:2]), fresh[2:]...)
		_, err := host.AssembleArray(t.Context(), mixed, setUUID(t, copies[0]))
		refusal(t, err, backup.ErrNotOurs, "cut short")
		if !strings.Contains(backup.HintOf(err), "restore again") {
			t.Errorf("hint: got %q", backup.HintOf(err))
		}
		if on, err := host.ArraysOn(mixed); err != nil || len(on) > 0 {
			t.Errorf("assembled: %v, %v", on, err)
		}
	})

	t.Run("an array with a member of another copy is refused, and nothing is stopped", func(t *testing.T) {
		image := d.frozenCopies(t, members, dev)
		if err := host.Release(t.Context(), members); err != nil {
			t.Fatal(err)
		}
		a := attachAll(t, d.clonesOfFiles(t, image))
		b := attachAll(t, d.clonesOfFiles(t, image))
		mixed := "/dev/md93"
		mdadm(t, "--assemble", mixed, "--config=none", a[0], b[1], b[2], b[3])
		_, err := host.AssembleArray(t.Context(), a, host.NewArrayUUID())
		refusal(t, err, backup.ErrNotOurs, mixed, "not part of this set")
		if !strings.Contains(backup.HintOf(err), "AUTO -all") {
			t.Errorf("hint: got %q", backup.HintOf(err))
		}
		refusal(t, host.Release(t.Context(), a), backup.ErrNotOurs, mixed)
		on, err := host.ArraysOn(a[:1])
		if err != nil || !slices.Equal(on, []string{mixed}) {
			t.Errorf("arrays on slot 0: got %v and %v, want %s", on, err, mixed)
		}
		if state := strings.TrimSpace(read(t, "/sys/block/md93/md/array_state")); state != "clean" && state != "active" {
			t.Errorf("state: got %q", state)
		}
		if err := errors.Join(host.StopArray(t.Context(), mixed), host.Release(t.Context(), append(slices.Clone(a), b...))); err != nil {
			t.Error(err)
		}
	})
}

func TestArraysThatUdevAssembledAreTakenOver(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	d := newDisks(t)
	members, dev := filled(t, d)
	image := d.frozenCopies(t, members, dev)
	if err := host.Release(t.Context(), members); err != nil { // udev assembles no second array of a UUID
		t.Fatal(err)
	}
	// Not by run: the daemon would keep its pipe open.
	if err := exec.Command("/lib/systemd/systemd-udevd", "--daemon").Run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { run(t, "udevadm", "control", "--exit") })
	run(t, "udevadm", "trigger", "--subsystem-match=block")
	run(t, "udevadm", "settle")
	if err := host.Release(t.Context(), members); err != nil { // udev saw the original, too
		t.Fatal(err)
	}

	t.Run("every member is ours: stopped and assembled anew", func(t *testing.T) {
		copies := attachAll(t, d.clonesOfFiles(t, image))
		var auto []string
		eventually(t, "udev has assembled the copies", func() bool {
			run(t, "udevadm", "settle")
			on, err := host.ArraysOn(copies)
			if err != nil || len(on) != 1 {
				return false
			}
			auto = on
			state, _ := os.ReadFile("/sys/block/" + filepath.Base(on[0]) + "/md/array_state")
			return strings.HasPrefix(string(state), "clean") || strings.HasPrefix(string(state), "active")
		})
		t.Logf("udev assembled %v", auto)
		uuid := host.NewArrayUUID()
		got, err := host.AssembleArray(t.Context(), copies, uuid)
		if err != nil {
			t.Fatal(err)
		}
		if got == auto[0] {
			t.Errorf("got %s, udev's own", got)
		}
		run(t, "udevadm", "settle")
		if on, err := host.ArraysOn(copies); err != nil || !slices.Equal(on, []string{got}) {
			t.Errorf("arrays on the copies: got %v and %v, want %s", on, err, got)
		}
		holdsContent(t, got)
		if again, err := host.AssembleArray(t.Context(), copies, uuid); err != nil || again != got {
			t.Errorf("again: got %q and %v, want %s", again, err, got)
		}
		if err := host.Release(t.Context(), copies); err != nil {
			t.Error(err)
		}
	})

	t.Run("assembled while udev does the same", func(t *testing.T) {
		for range 3 {
			copies := attachAll(t, d.clonesOfFiles(t, image)) // and no wait for udev
			got, err := host.AssembleArray(t.Context(), copies, host.NewArrayUUID())
			if err != nil {
				t.Fatal(err)
			}
			holdsContent(t, got)
			if err := host.Release(t.Context(), copies); err != nil {
				t.Error(err)
			}
		}
	})
}
