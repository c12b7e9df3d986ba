package providertest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

// Loop puts a sparse file of that size behind a loop device until the test
// ends. Needs root.
func Loop(t testing.TB, size backup.Bytes) (device string) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real loop device: run `make test`")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	image := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(int64(size)), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	device, err = run(t, "losetup", "--show", "--find", image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := run(t, "losetup", "--detach", device); err != nil {
			t.Error(err)
		}
	})
	return device
}

// Mount makes a filesystem ("xfs" with reflinks, "btrfs", "ext4") of that size
// on a loop device and mounts it until the test ends. XFS needs 300 MiB. A
// loop device that still has a file of it by then fails the test.
func Mount(t testing.TB, fs string, size backup.Bytes) (dir string) {
	t.Helper()
	device := Loop(t, size)
	mkfs := map[string][]string{
		"xfs":   {"mkfs.xfs", "-q", "-m", "reflink=1", device},
		"btrfs": {"mkfs.btrfs", "-q", device},
		"ext4":  {"mkfs.ext4", "-q", device},
	}
	if _, err := run(t, mkfs[fs]...); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if _, err := run(t, "mount", "-t", fs, device, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		detachLeft(t, dir)
		if _, err := run(t, "umount", dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// detachLeft fails the test for every loop device that still has a file of
// dir, and detaches it.
func detachLeft(t testing.TB, dir string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Error(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(b), dir+"/") {
			continue
		}
		device := "/dev/" + strings.Split(name, "/")[3]
		t.Errorf("left behind: %s of %s", device, strings.TrimSpace(string(b)))
		if _, err := run(t, "losetup", "--detach", device); err != nil {
			t.Error(err)
		}
	}
}

func run(t testing.TB, argv ...string) (string, error) {
	t.Helper()
	// Clean-ups run programs, too, and then the test's context has ended.
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), argv[0], argv[1:]...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		err = errors.New(strings.Join(argv, " ") + ": " + err.Error() + "\n" + text)
	}
	return text, err
}
