package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/providertest"
)

// on makes a filesystem with mkfs's own arguments on a new loop device.
func on(t *testing.T, size backup.Bytes, mkfs ...string) (device string) {
	t.Helper()
	device = providertest.Loop(t, size)
	run(t, append(mkfs, device)...)
	return device
}

// mounted mounts until the end of the test.
func mounted(t *testing.T, args ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	run(t, append(append([]string{"mount"}, args...), dir)...)
	t.Cleanup(func() {
		if err := host.Unmount(labtest.Context(t), dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func mountOf(t *testing.T, path string) host.Mount {
	t.Helper()
	m, err := host.MountOf(path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestDevicesAreDescribedOrRefusedByName(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	whole := providertest.Loop(t, 16<<20)
	t.Run("a whole device is its volume", func(t *testing.T) {
		got, err := treeOf(t, whole, whole)
		if err != nil || got.Kind != backup.DeviceVolume || got.Size != 16<<20 || got.Name != filepath.Base(whole) || !slices.Equal(leaves(got), []string{whole}) {
			t.Errorf("got %+v and %v", got, err)
		}
	})
	t.Run("a device that is no volume is refused", func(t *testing.T) {
		_, err := treeOf(t, whole)
		refusal(t, err, backup.ErrUnsupported, whole, "no volume of the provider")
		if backup.HintOf(err) == "" {
			t.Error("no hint")
		}
	})
	t.Run("an error of the provider is not a refusal", func(t *testing.T) {
		broken := errors.New("out of order")
		major, minor := number(t, whole)
		_, err := host.Tree(t.Context(), major, minor, func(context.Context, string) (backup.Volume, error) { return backup.Volume{}, broken })
		refusal(t, err, broken, whole)
		if errors.Is(err, backup.ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a partition is described with its place on the whole device", func(t *testing.T) {
		disk := providertest.Loop(t, 16<<20)
		partition(t, disk, 2048, 8<<11)
		t.Cleanup(func() { run(t, "partx", "--delete", disk) })
		got, err := treeOf(t, disk+"p1", disk)
		if err != nil {
			t.Fatal(err)
		}
		want := backup.Partition{Number: 1, Start: 1 << 20, Size: 8 << 20}
		if got.Kind != backup.DevicePartition || *got.Partition != want || got.Size != 8<<20 || !slices.Equal(leaves(got), []string{disk}) {
			t.Errorf("got %+v, want %+v on %s", got, want, disk)
		}
		if dev, err := host.WaitDevice(t.Context(), disk, 0); err != nil || dev != disk {
			t.Errorf("partition 0: got %q and %v, want %s", dev, err, disk)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := host.WaitDevice(ctx, disk, 2); !errors.Is(err, context.Canceled) {
			t.Errorf("partition 2: got %v, want canceled", err)
		}
	})
	t.Run("a number without a device is refused", func(t *testing.T) {
		for _, n := range [][2]int{{0, 99}, {7, 999999}} {
			_, err := host.Tree(t.Context(), n[0], n[1], resolver())
			refusal(t, err, backup.ErrUnsupported)
		}
	})
}

func TestFilesystemsThatCannotBeCutAreRefusedByName(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	xfs := on(t, 300<<20, "mkfs.xfs", "-q")
	ext4 := on(t, 16<<20, "mkfs.ext4", "-q")
	xdir, edir := mounted(t, xfs), mounted(t, ext4)
	check := func(path, device string) error { return host.CheckCuttable(mountOf(t, path), device) }

	for _, c := range []struct{ dir, device string }{{xdir, xfs}, {edir, ext4}} {
		if err := check(c.dir, c.device); err != nil {
			t.Errorf("%s: %v", c.device, err)
		}
	}
	t.Run("the root filesystem", func(t *testing.T) {
		err := check("/", "/dev/none")
		refusal(t, err, backup.ErrUnsupported, "/", "whole system")
		if backup.HintOf(err) == "" {
			t.Error("no hint")
		}
	})
	t.Run("XFS with its log elsewhere", func(t *testing.T) {
		log := providertest.Loop(t, 70<<20)
		device := on(t, 300<<20, "mkfs.xfs", "-q", "-l", "logdev="+log+",size=64m")
		refusal(t, check(mounted(t, "-o", "logdev="+log, device), device), backup.ErrUnsupported, "logdev="+log)
	})
	t.Run("ext4 with its journal elsewhere", func(t *testing.T) {
		journal := on(t, 16<<20, "mke2fs", "-q", "-b", "4096", "-O", "journal_dev")
		device := on(t, 16<<20, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-J", "device="+journal)
		refusal(t, check(mounted(t, device), device), backup.ErrUnsupported, device, "journal")
	})
	t.Run("tmpfs", func(t *testing.T) {
		refusal(t, check(mounted(t, "-t", "tmpfs", "tmpfs"), ""), backup.ErrUnsupported, "tmpfs")
	})
	t.Run("btrfs", func(t *testing.T) {
		device := on(t, 128<<20, "mkfs.btrfs", "-q")
		dir := mounted(t, device)
		refusal(t, check(dir, device), backup.ErrUnsupported, "btrfs")
		m := mountOf(t, dir)
		_, err := host.Tree(t.Context(), m.Major, m.Minor, resolver(device))
		refusal(t, err, backup.ErrUnsupported, "btrfs")
	})
	t.Run("a read-only mount", func(t *testing.T) {
		run(t, "mount", "-o", "remount,ro", edir)
		refusal(t, check(edir, ext4), backup.ErrUnsupported, edir, "read-only")
		run(t, "mount", "-o", "remount,rw", edir)
		if err := check(edir, ext4); err != nil {
			t.Error(err)
		}
	})
	t.Run("a filesystem that an error made read-only under its mount", func(t *testing.T) {
		m := mountOf(t, edir)
		m.SuperOptions = append(slices.Clone(m.SuperOptions), "ro")
		refusal(t, host.CheckCuttable(m, ext4), backup.ErrUnsupported, "read-only")
	})
	t.Run("a bind mount of a part", func(t *testing.T) {
		if err := os.Mkdir(filepath.Join(xdir, "part"), 0o755); err != nil {
			t.Fatal(err)
		}
		part := mounted(t, "--bind", filepath.Join(xdir, "part"))
		refusal(t, check(part, xfs), backup.ErrUnsupported, part, "/part")
		if m := mountOf(t, filepath.Join(part, ".")); m.Mountpoint != part {
			t.Errorf("got mount %s, want %s", m.Mountpoint, part)
		}
		if err := check(mounted(t, "--bind", xdir), xfs); err != nil {
			t.Errorf("a bind mount of the whole: %v", err)
		}
	})
}

func TestIdentifyAndOptions(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	label := `a b"c\d`
	device := on(t, 16<<20, "mkfs.ext4", "-q", "-L", label, "-U", "11111111-2222-3333-4444-555555555555")
	got, err := host.Identify(t.Context(), device)
	if want := (host.Identity{Type: "ext4", UUID: "11111111-2222-3333-4444-555555555555", Label: label}); err != nil || got != want {
		t.Errorf("got %+v and %v, want %+v", got, err, want)
	}
	if _, err := host.Identify(t.Context(), providertest.Loop(t, 1<<20)); err == nil {
		t.Error("identified an empty device")
	}
	refusal(t, host.MakeFilesystem(t.Context(), "vfat", device, "x"), backup.ErrUsage, "vfat")

	for _, c := range []struct {
		fstype, options string
		size            backup.Bytes
	}{{"ext4", "noatime,nodev,data=ordered", 16 << 20}, {"xfs", "noatime,nosuid,inode64", 300 << 20}} {
		device := providertest.Loop(t, c.size)
		if err := host.MakeFilesystem(t.Context(), c.fstype, device, "lab"); err != nil {
			t.Fatal(err)
		}
		first := mountOf(t, mounted(t, "-o", c.options, device))
		options := first.AllOptions()
		for _, o := range options {
			if o == "rw" || o == "" || o == "attr2" {
				t.Errorf("%s: option %q", c.fstype, o)
			}
		}
		if !slices.Contains(options, "noatime") {
			t.Errorf("%s: got %v, want noatime", c.fstype, options)
		}
		if err := host.Unmount(t.Context(), first.Mountpoint); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for range 2 { // mounted there already: nil
			if err := host.MountDevice(t.Context(), device, dir, c.fstype, options); err != nil {
				t.Fatal(err)
			}
		}
		if again := mountOf(t, dir).AllOptions(); !slices.Equal(again, options) {
			t.Errorf("%s: got %v, want %v", c.fstype, again, options)
		}
		if n := len(mountsOf(t, device)); n != 1 {
			t.Errorf("mounted %d times", n)
		}
		if err := host.Unmount(t.Context(), dir); err != nil {
			t.Error(err)
		}
		if said, err := host.CheckFilesystem(t.Context(), c.fstype, device); err != nil {
			t.Errorf("%s: %s: %v", c.fstype, said, err)
		}
		spoil(t, device, c.fstype)
		if _, err := host.CheckFilesystem(t.Context(), c.fstype, device); !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%s, damaged: got %v, want ErrDamage", c.fstype, err)
		}
	}
	if _, err := host.CheckFilesystem(t.Context(), "btrfs", device); !errors.Is(err, backup.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

// spoil writes over the first allocation group's headers or the first group's
// bitmaps, not over the superblock.
func spoil(t *testing.T, device, fstype string) {
	t.Helper()
	at, n := int64(512), 1536 // XFS: AGF, AGI and AGFL
	if fstype == "ext4" {
		at, n = 8<<10, 256<<10
	}
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte(strings.Repeat("\xa5", n)), at)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func mountsOf(t *testing.T, device string) []host.Mount {
	t.Helper()
	ms, err := host.MountsOf(number(t, device))
	if err != nil {
		t.Fatal(err)
	}
	return ms
}

func TestUnmountAndReleaseTakeTheirOwnAndNoMore(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	ours, others := on(t, 16<<20, "mkfs.ext4", "-q"), on(t, 16<<20, "mkfs.ext4", "-q")

	t.Run("a busy filesystem is in use until it is not", func(t *testing.T) {
		dir := mounted(t, ours)
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		refusal(t, host.Unmount(ctx, dir), backup.ErrInUse, dir)
		refusal(t, host.Release(ctx, []string{ours}), backup.ErrInUse, dir)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := host.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		}
		if n := len(mountsOf(t, ours)); n != 0 {
			t.Errorf("still mounted %d times", n)
		}
		if err := host.Unmount(t.Context(), filepath.Join(dir, "none")); err != nil {
			t.Errorf("what is not there: %v", err)
		}
	})
	t.Run("what is mounted below ours stays", func(t *testing.T) {
		dir := mounted(t, others)
		run(t, "mount", ours, dir)
		if err := host.Release(t.Context(), []string{ours}); err != nil {
			t.Error(err)
		}
		if n := len(mountsOf(t, others)); n != 1 {
			t.Errorf("the other filesystem is mounted %d times, want 1", n)
		}
	})
	t.Run("what is mounted over ours is in use", func(t *testing.T) {
		dir := mounted(t, ours)
		run(t, "mount", others, dir)
		refusal(t, host.Release(t.Context(), []string{ours}), backup.ErrInUse, others, "mounted over it")
		if err := host.Unmount(t.Context(), dir); err != nil {
			t.Error(err)
		}
		if len(mountsOf(t, others)) != 0 || len(mountsOf(t, ours)) != 1 {
			t.Error("one unmount takes the topmost mount only")
		}
	})
	t.Run("another device mounted there is in use", func(t *testing.T) {
		dir := mounted(t, others)
		refusal(t, host.MountDevice(t.Context(), ours, dir, "ext4", nil), backup.ErrInUse, others)
	})
	t.Run("nested, stacked and bound mounts of ours all go", func(t *testing.T) {
		dir := mounted(t, ours)
		inner := filepath.Join(dir, "in ner")
		if err := os.Mkdir(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "mount", others, inner)
		bound := t.TempDir()
		for range 3 { // stacked
			run(t, "mount", "--bind", dir, bound)
		}
		for range 2 {
			if err := host.Release(t.Context(), []string{ours, others}); err != nil {
				t.Error(err)
			}
		}
		for _, m := range append(mountsOf(t, ours), mountsOf(t, others)...) {
			t.Errorf("still there: %+v", m)
		}
	})
	t.Run("empty folders go, up to the root and no further", func(t *testing.T) {
		top := t.TempDir()
		root := filepath.Join(top, "root")
		deep := filepath.Join(root, "a", "b")
		if err := errors.Join(os.MkdirAll(deep, 0o755), os.WriteFile(filepath.Join(root, "kept"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := host.RemoveEmpty(deep, root); err != nil {
				t.Error(err)
			}
		}
		if err := host.RemoveEmpty(filepath.Join(root, "kept"), root); err == nil {
			t.Error("removed a file, or said so")
		}
		if _, err := os.Stat(filepath.Join(root, "kept")); err != nil {
			t.Error(err)
		}
		if err := errors.Join(os.Remove(filepath.Join(root, "kept")), host.RemoveEmpty(deep, root)); err != nil {
			t.Error(err)
		}
		if entries, err := os.ReadDir(top); err != nil || len(entries) != 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	})
}

func TestForeignDataIsFound(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"pg/data/base", "pg/data/pg_wal", "pg/other", "pg/.hidden", "lost+found", ".snapshots", "wal", "home/joe"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"pg/data/PG_VERSION", ".bashrc", "notes", "pg/datax"} {
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		rels []string
		want []string
	}{
		{"the whole filesystem is ours", []string{"."}, nil},
		{"the whole and a part of it", []string{"pg/data", "."}, nil},
		{"one deep place", []string{"pg/data"}, []string{"home", "notes", "pg/datax", "pg/other", "wal"}},
		{"a place inside another", []string{"pg/data", "pg/data/pg_wal"}, []string{"home", "notes", "pg/datax", "pg/other", "wal"}},
		{"two places", []string{"wal", "pg/data"}, []string{"home", "notes", "pg/datax", "pg/other"}},
		{"a place whose name begins like another", []string{"pg", "wal", "notes"}, []string{"home"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := host.Foreign(dir, c.rels)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, w := range c.want {
				want = append(want, filepath.Join(dir, w))
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
	if _, err := host.Foreign(dir, []string{"none/data"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
}
