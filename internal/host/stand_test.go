package host_test

import (
	"os"
	"path/filepath"
	"testing"

	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
)

// TestAFilesystemGetsAnotherUUID: of both kinds, mounted before, with what was
// on it; done twice it is the same.
func TestAFilesystemGetsAnotherUUID(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	const uuid = "5f3a9c00-1111-8222-9333-444455556666"
	for _, fstype := range []string{"xfs", "ext4"} {
		t.Run(fstype, func(t *testing.T) {
			dir := labtest.Folder(t)
			image := filepath.Join(dir, "image")
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, 400<<20); err != nil {
				t.Fatal(err)
			}
			device := run(t, "losetup", "--find", "--show", image)
			t.Cleanup(func() { run(t, "losetup", "--detach", device) })
			if err := host.MakeFilesystem(t.Context(), fstype, device, "x"); err != nil {
				t.Fatal(err)
			}
			mnt := filepath.Join(dir, "m")
			for round, options := range [][]string{nil, {"noatime"}} {
				if err := host.MountDevice(t.Context(), device, mnt, fstype, options); err != nil {
					t.Fatal(err)
				}
				if round == 0 {
					if err := os.WriteFile(filepath.Join(mnt, "file"), []byte("x"), 0o600); err != nil {
						t.Fatal(err)
					}
				} else if _, err := os.Stat(filepath.Join(mnt, "file")); err != nil {
					t.Error(err)
				}
				if err := host.CheckVacant(mnt); err == nil {
					t.Error("a mount point is said to be free")
				}
				if err := host.Unmount(t.Context(), mnt); err != nil {
					t.Fatal(err)
				}
				if err := host.RenewFilesystem(t.Context(), fstype, device, uuid); err != nil {
					t.Fatal(err)
				}
				if id, err := host.Identify(t.Context(), device); err != nil || id.UUID != uuid {
					t.Errorf("got %+v, %v", id, err)
				}
			}
			if said, err := host.CheckFilesystem(t.Context(), fstype, device); err != nil {
				t.Errorf("%v: %s", err, said)
			}
		})
	}
}
