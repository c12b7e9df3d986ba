package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/providertest"
)

// disks are loop devices over files in a pool that can clone.
type disks struct {
	pool  string
	count int
}

func newDisks(t *testing.T) *disks { return &disks{pool: providertest.Mount(t, "xfs", 4<<30)} }

// make returns n devices of 96 MiB that live as long as the test.
func (d *disks) make(t *testing.T, n int) []string {
	t.Helper()
	var out []string
	for range n {
		d.count++
		image := filepath.Join(d.pool, fmt.Sprintf("disk%d", d.count))
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 96<<20)); err != nil {
			t.Fatal(err)
		}
		out = append(out, attach(t, image))
	}
	return out
}

// detach waits until the device has let go of its file. Where udev runs it may
// open the device for a moment, which makes losetup's detach a lazy one, or
// assemble its array anew meanwhile.
func detach(t *testing.T, device, image string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	eventually(t, device+" is detached", func() bool {
		file, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
		if err != nil || strings.TrimSpace(string(file)) != image {
			return true // gone, or somebody else's by now
		}
		arrays, err := host.ArraysOn([]string{device})
		for _, a := range arrays {
			err = errors.Join(err, host.StopArray(ctx, a))
		}
		if err == nil {
			_ = exec.Command("losetup", "--detach", device).Run() // the next look tells
		}
		return false
	})
}

// clones returns files: FICLONE of the disks.
func (d *disks) clones(t *testing.T, of []string) []string {
	t.Helper()
	var files []string
	for _, device := range of {
		files = append(files, strings.TrimSpace(read(t, "/sys/block/%s/loop/backing_file", filepath.Base(device))))
	}
	return d.clonesOfFiles(t, files)
}

func (d *disks) clonesOfFiles(t *testing.T, files []string) []string {
	t.Helper()
	var out []string
	for _, from := range files {
		d.count++
		image := filepath.Join(d.pool, fmt.Sprintf("clone%d", d.count))
		src, err1 := os.Open(from)
		dst, err2 := os.Create(image)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())), src.Close(), dst.Close()); err != nil {
			t.Fatal(err)
		}
		out = append(out, image)
	}
	return out
}

func attach(t *testing.T, image string) string {
	t.Helper()
	device := run(t, "losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", image)
	t.Cleanup(func() { detach(t, device, image) })
	return device
}

func mdadm(t *testing.T, args ...string) { t.Helper(); run(t, append([]string{"mdadm"}, args...)...) }

// resolver knows the given devices, each by its own path.
func resolver(known ...string) host.Resolve {
	return func(_ context.Context, device string) (backup.Volume, error) {
		if !slices.Contains(known, device) {
			return backup.Volume{}, fmt.Errorf("volume of %s: %w", device, backup.ErrNotFound)
		}
		return backup.Volume{ID: backup.VolumeID(device)}, nil
	}
}

func number(t *testing.T, device string) (major, minor int) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		t.Fatal(err)
	}
	return int(unix.Major(st.Rdev)), int(unix.Minor(st.Rdev))
}

func treeOf(t *testing.T, device string, known ...string) (backup.Device, error) {
	t.Helper()
	major, minor := number(t, device)
	return host.Tree(t.Context(), major, minor, resolver(known...))
}

// refusal demands an error of that kind that holds the words.
func refusal(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("got %v, want it to be %q", err, kind)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("got %q, want it to say %q", err, w)
		}
	}
}

func create(t *testing.T, level string, members []string) string {
	t.Helper()
	dev, err := host.CreateArray(t.Context(), host.ArraySpec{Name: "t", Level: level, Chunk: 64 << 10, Members: members})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.StopArray(labtest.Context(t), dev); err != nil {
			t.Error(err)
		}
	})
	return dev
}

func leaves(d backup.Device) []string {
	if d.Volume != nil {
		return []string{string(d.Volume.ID)}
	}
	var out []string
	for _, m := range d.Members {
		out = append(out, leaves(m)...)
	}
	return out
}

func TestArraysAreDescribedOrRefusedByName(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	d := newDisks(t)
	// Twice the same devices, in another order: slots, not names, decide.
	four := d.make(t, 4)
	crossed := []string{four[2], four[0], four[3], four[1]}

	for _, level := range []string{"raid0", "linear"} {
		t.Run(level+" is described in slot order", func(t *testing.T) {
			dev := create(t, level, crossed)
			got, err := treeOf(t, dev, four...)
			if err != nil {
				t.Fatal(err)
			}
			if l := leaves(got); !slices.Equal(l, crossed) {
				t.Errorf("members: got %v, want %v", l, crossed)
			}
			uuid, err := host.ArrayUUID(t.Context(), dev)
			if err != nil {
				t.Fatal(err)
			}
			a := got.Array
			if got.Kind != backup.DeviceArray || a.Level != level || a.UUID != uuid || len(uuid) != 35 || a.Metadata != "1.2" || !strings.HasSuffix(a.Name, "t") {
				t.Errorf("got %+v", *a)
			}
			if level == "raid0" && (a.ChunkBytes != 64<<10 || a.Layout == 0) {
				t.Errorf("chunk %d, layout %d, want 65536 and one", a.ChunkBytes, a.Layout)
			}
			if size := run(t, "blockdev", "--getsize64", dev); fmt.Sprint(int64(got.Size)) != size {
				t.Errorf("size: got %d, want %s", got.Size, size)
			}
			for i, m := range crossed {
				sb, err := host.ReadSuperblock(m)
				if err != nil {
					t.Fatal(err)
				}
				if sb.Role != i || sb.RaidDisks != 4 || sb.SetUUID.String() != uuid || sb.Version != 2 {
					t.Errorf("superblock of %s: got %+v, want role %d of 4", m, sb, i)
				}
			}
			if on, err := host.ArraysOn(four[1:2]); err != nil || !slices.Equal(on, []string{dev}) {
				t.Errorf("arrays on a member: got %v and %v, want %s", on, err, dev)
			}
			_, err = treeOf(t, dev, four[:3]...)
			refusal(t, err, backup.ErrUnsupported, "member of "+filepath.Base(dev), four[3], "no volume of the provider")
		})
	}

	t.Run("an array over partitions, with a partition on it", func(t *testing.T) {
		two := d.make(t, 2)
		for _, dev := range two {
			partition(t, dev, 2048, 40<<11)
		}
		dev := create(t, "raid0", []string{two[1] + "p1", two[0] + "p1"})
		partition(t, dev, 2048, 20<<11)
		got, err := treeOf(t, dev+"p1", two...)
		if err != nil {
			t.Fatal(err)
		}
		if got.Kind != backup.DevicePartition || got.Partition.Start != 1<<20 || got.Partition.Size != 20<<20 {
			t.Errorf("got %+v %+v, want 20 MiB at 1 MiB", got, got.Partition)
		}
		if l := leaves(got); !slices.Equal(l, []string{two[1], two[0]}) {
			t.Errorf("volumes: got %v, want %s first", l, two[1])
		}
		if _, err := host.CreateArray(t.Context(), host.ArraySpec{Name: "u", Level: "raid0", Chunk: 64 << 10, Members: []string{two[0] + "p1", two[1] + "p1"}}); err == nil {
			t.Error("created an array over members that are in use")
		}
	})

	t.Run("raid1, raid5 and a degraded array are refused", func(t *testing.T) {
		dev := "/dev/md90"
		for _, c := range []struct {
			level string
			want  string
			args  []string
		}{
			{"1", `"raid1"`, four[:2]},
			{"1", `"raid1"`, []string{four[0], "missing"}},
			{"5", `"raid5"`, four[:3]},
			{"5", `"raid5"`, []string{four[0], four[1], "missing"}},
		} {
			mdadm(t, append([]string{"--create", dev, "--run", "--assume-clean", "--config=none", "--bitmap=none", "--level=" + c.level,
				fmt.Sprintf("--raid-devices=%d", len(c.args))}, c.args...)...)
			_, err := treeOf(t, dev, four...)
			refusal(t, err, backup.ErrUnsupported, "md90", c.want)
			if err := host.StopArray(t.Context(), dev); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("an array without a superblock of version 1 is refused", func(t *testing.T) {
		mdadm(t, "--create", "/dev/md91", "--run", "--config=none", "--metadata=0.90", "--level=linear", "--raid-devices=2", four[0], four[1])
		_, err := treeOf(t, "/dev/md91", four...)
		refusal(t, err, backup.ErrUnsupported, "md91", `"0.90"`)
		if err := host.StopArray(t.Context(), "/dev/md91"); err != nil {
			t.Fatal(err)
		}
		mdadm(t, "--build", "/dev/md91", "--level=0", "--raid-devices=2", "--chunk=64", four[0], four[1])
		_, err = treeOf(t, "/dev/md91", four...)
		refusal(t, err, backup.ErrUnsupported, "md91", `"none"`)
		if err := host.StopArray(t.Context(), "/dev/md91"); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("stopping what is mounted is refused, stopping twice is not", func(t *testing.T) {
		dev := create(t, "raid0", four)
		if err := host.MakeFilesystem(t.Context(), "ext4", dev, "x"); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := host.MountDevice(t.Context(), dev, dir, "ext4", nil); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		refusal(t, host.StopArray(ctx, dev), backup.ErrInUse, dev)
		refusal(t, host.Release(t.Context(), four[:1]), backup.ErrNotOurs, dev)
		for range 2 {
			if err := host.Release(t.Context(), four); err != nil {
				t.Error(err)
			}
		}
		for range 2 {
			if err := host.StopArray(t.Context(), dev); err != nil {
				t.Error(err)
			}
		}
		if on, err := host.ArraysOn(four); err != nil || len(on) > 0 {
			t.Errorf("still there: %v, %v", on, err)
		}
	})

	t.Run("device mapper is refused", func(t *testing.T) {
		t.Setenv("DM_DISABLE_UDEV", "1")
		size := run(t, "blockdev", "--getsz", four[0])
		run(t, "dmsetup", "create", "cctline", "--table", "0 "+size+" linear "+four[0]+" 0")
		_, err := treeOf(t, "/dev/mapper/cctline", four...)
		refusal(t, err, backup.ErrUnsupported, "device mapper", "cctline")
		// An array above does not hide it.
		mdadm(t, "--build", "/dev/md92", "--level=linear", "--force", "--raid-devices=1", "/dev/mapper/cctline")
		_, err = treeOf(t, "/dev/md92", four...)
		refusal(t, err, backup.ErrUnsupported)
		if err := host.StopArray(t.Context(), "/dev/md92"); err != nil {
			t.Fatal(err)
		}
		run(t, "dmsetup", "remove", "cctline")
	})
}

// partition writes an MBR with one Linux partition, in 512-byte sectors, and
// makes the kernel read it.
func partition(t *testing.T, device string, start, sectors uint32) {
	t.Helper()
	mbr := make([]byte, 4096)
	block := uint32(512)
	if run(t, "blockdev", "--getss", device) == "4096" { // entries count in logical blocks
		block = 4096
	}
	entry := mbr[446:]
	entry[4] = 0x83
	for i := range 4 {
		entry[8+i] = byte(start * 512 / block >> (8 * i))
		entry[12+i] = byte(sectors * 512 / block >> (8 * i))
	}
	mbr[510], mbr[511] = 0x55, 0xaa
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(mbr)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(filepath.Base(device), "loop") {
		run(t, "partx", "--add", device)
	} else {
		run(t, "blockdev", "--rereadpt", device)
	}
	if got, err := host.WaitDevice(t.Context(), device, 1); err != nil || got != device+"p1" {
		t.Fatalf("got %q and %v, want %sp1", got, err, device)
	}
}
