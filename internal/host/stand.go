package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"cleancut/internal/backup"
)

// RenewFilesystem gives an unmounted filesystem, whose log is clean, another
// UUID: it can then be named by it beside the one that it is a copy of. Done
// before: nil. xfs_admin says nothing where it changes nothing (a dirty log),
// so the device is asked afterwards.
func RenewFilesystem(ctx context.Context, fstype, device, uuid string) error {
	now, err := Identify(ctx, device)
	if err != nil || now.UUID == uuid {
		return err
	}
	switch fstype {
	case "xfs":
		_, err = Run(ctx, "xfs_admin", "-U", uuid, device)
	case "ext4":
		// tune2fs wants one that was checked since it was mounted last; 1 is
		// "errors corrected" (e2fsck(8)).
		if _, err = Run(ctx, "e2fsck", "-f", "-p", device); exitCode(err) == 1 {
			err = nil
		}
		if err == nil {
			_, err = Run(ctx, "tune2fs", "-U", uuid, device)
		}
	default:
		return fmt.Errorf("new UUID of %s: %s: %w", device, fstype, backup.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if now, err = Identify(ctx, device); err == nil && now.UUID != uuid {
		err = fmt.Errorf("%s still has the UUID %s after it was given %s: %w", device, now.UUID, uuid, backup.ErrUnsupported)
	}
	return err
}

// CheckVacant refuses a mount point on which something is mounted, that holds
// anything, or that a link leads to. It need not exist.
func CheckVacant(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	infos, err := mountedOn(real)
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if top := topmost(infos); top != nil {
		return fmt.Errorf("%s is mounted on %s: %w", top.Source, dir, backup.ErrInUse)
	}
	if real != filepath.Clean(dir) {
		return fmt.Errorf("%s leads to %s by a link: %w", dir, real, backup.ErrInUse)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s holds %s: %w", dir, entries[0].Name(), backup.ErrInUse)
	}
	return nil
}

// MissingFolders lists the folders that must be made for dir to be there,
// outer ones first.
func MissingFolders(dir string) []string {
	var out []string
	for ; dir != "/" && !exists(dir); dir = filepath.Dir(dir) {
		out = append([]string{dir}, out...)
	}
	return out
}

// PlaceFile writes a file whole, with its permissions and owner; a crash leaves
// what was there or the new one. Its folder is there.
func PlaceFile(path string, content []byte, mode os.FileMode, uid, gid int) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".cleancut-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chown(uid, gid), tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}
