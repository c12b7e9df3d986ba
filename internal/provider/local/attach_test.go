package local_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/provider/local"
)

func detachAtEnd(t testing.TB, p *local.Pool, id backup.VolumeID) {
	t.Helper()
	t.Cleanup(func() {
		if err := p.Detach(context.WithoutCancel(t.Context()), id); err != nil {
			t.Error(err)
		}
	})
}

func command(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestADeviceHas4096ByteBlocksAndDirectIOAsABlankVolumeAndAsACopy(t *testing.T) {
	for fs, size := range filesystems() {
		t.Run(fs, func(t *testing.T) {
			p, _ := openPool(t, fs, size)
			v, device := volume(t, p, "one", 16<<20)
			_, copied := restore(t, p, "two", complete(t, p, cut(t, p, v)))
			for _, d := range []string{device, copied} {
				if got := command(t, "losetup", "--list", "--noheadings", "--output", "LOG-SEC,DIO,AUTOCLEAR,RO", d); strings.Join(strings.Fields(got), " ") != "4096 1 0 0" {
					t.Errorf("%s: got %s", d, got)
				}
			}
		})
	}
}

func TestAMountedDeviceIsNotDetachedAndTheMountIsNamed(t *testing.T) {
	p, _ := openPool(t, "xfs", 512<<20)
	v, device := volume(t, p, "one", 64<<20)
	command(t, "mkfs.ext4", "-q", device)
	dir := t.TempDir()
	command(t, "mount", device, dir)
	err := p.Detach(t.Context(), v.ID)
	command(t, "umount", dir)
	if !errors.Is(err, backup.ErrInUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want %v that names %s", err, backup.ErrInUse, dir)
	}
	if got, err := p.Resolve(t.Context(), device); err != nil || got != v {
		t.Errorf("after the refusal: %v, %v", got, err)
	}
}

func TestADeviceWithAMountedPartitionIsNotDetached(t *testing.T) {
	p, _ := openPool(t, "xfs", 512<<20)
	v, device := volume(t, p, "one", 64<<20)
	partition(t, device)
	command(t, "mkfs.ext4", "-q", device+"p1")
	dir := t.TempDir()
	command(t, "mount", device+"p1", dir)
	err := p.Detach(t.Context(), v.ID)
	_, foreign := p.Resolve(t.Context(), device+"p1")
	command(t, "umount", dir)
	if !errors.Is(err, backup.ErrInUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want %v that names %s", err, backup.ErrInUse, dir)
	}
	if !errors.Is(foreign, backup.ErrNotFound) {
		t.Errorf("the partition resolves: %v", foreign)
	}
}

// partition adds one of 32 MiB after the first MiB, by BLKPG, because not every
// kernel reads partition tables.
func partition(t *testing.T, device string) {
	t.Helper()
	f, err := os.Open(device)
	must(t, err)
	defer func() { must(t, f.Close()) }()
	part := unix.BlkpgPartition{Start: 1 << 20, Length: 32 << 20, Pno: 1}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatalf("add a partition to %s (BLKPG): %v", device, errno)
	}
}

func TestAVolumeAttachedByHandInAnotherWayIsRefused(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	must(t, p.Detach(t.Context(), v.ID))
	device := command(t, "losetup", "--show", "--find", image(dir, v))
	_, err := p.Attach(t.Context(), v.ID)
	refused(t, err, backup.ErrUnsupported, device, "losetup -d")
	_, err = p.Prepare(t.Context(), set(v))
	refused(t, err, backup.ErrUnsupported, device)
}

func TestAFileOfTheSameNameElsewhereIsNotTheVolume(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	must(t, p.Detach(t.Context(), v.ID))
	other := filepath.Join(t.TempDir(), filepath.Base(image(dir, v)))
	must(t, os.WriteFile(other, make([]byte, 16<<20), 0o600))
	foreign := command(t, "losetup", "--show", "--find", other)
	defer command(t, "losetup", "--detach", foreign)
	if got, err := p.Resolve(t.Context(), foreign); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v, %v", got, err)
	}
	device, err := p.Attach(t.Context(), v.ID)
	must(t, err)
	if device == foreign {
		t.Errorf("got %s, which is %s", device, other)
	}
}

func TestADeviceIsKnownByAnyOfItsNodes(t *testing.T) {
	p, _ := openPool(t, "xfs", 512<<20)
	v, device := volume(t, p, "one", 16<<20)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(device, link))
	if got, err := p.Resolve(t.Context(), link); err != nil || got != v {
		t.Errorf("got %v, %v", got, err)
	}
}
