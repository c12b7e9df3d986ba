package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// Undo removes everything of a copy in reverse: the server, the mounts, the
// logical volumes and arrays, the attachments, the volumes, the folders. It goes by the tags that
// the provider confirms, not by what the ledger hopes for, so it also works
// after a crash in the middle of Run and may be called again. What it cannot
// remove is in the error, which then wraps backup.ErrLeft.
// What has become production is never undone: ErrInUse.
func Undo(ctx context.Context, p Provider, c backup.Copy) error {
	if err := NotInService(c); err != nil {
		return err
	}
	var err error
	for range 3 { // udev may bring an array or a group up once more before its volumes are detached
		var again bool
		if again, err = undoVolumes(ctx, p, c); !again {
			break
		}
	}
	if err != nil {
		return err
	}
	if err := withdraw(c); err != nil {
		return fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, err)
	}
	return removeFolders(c)
}

// undoVolumes also says whether a volume was in use when it was to be detached.
func undoVolumes(ctx context.Context, p Provider, c backup.Copy) (again bool, err error) {
	inv, err := p.List(ctx, c.Tags())
	if err != nil {
		return false, fmt.Errorf("volumes of copy %s: %w: %w", c.ID, backup.ErrLeft, err)
	}
	if c.Root != "" {
		if err := postgres.Kill(ctx, c.Root); err != nil {
			return false, fmt.Errorf("%w: %w", backup.ErrLeft, err)
		}
	}
	var devices []string
	for _, v := range inv.Volumes {
		if v.Attached != "" {
			devices = append(devices, v.Attached)
		}
	}
	if err := host.Release(ctx, devices); err != nil {
		return false, fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, err)
	}
	var errs []error
	for _, v := range inv.Volumes {
		if err := p.Detach(ctx, v.ID); err != nil {
			again = again || errors.Is(err, backup.ErrInUse) && ctx.Err() == nil
			errs = append(errs, fmt.Errorf("detach %s: %w", v.ID, err))
			continue
		}
		if err := p.DeleteVolume(ctx, v.ID, c.Tags()); err != nil {
			errs = append(errs, fmt.Errorf("delete %s: %w", v.ID, err))
		}
	}
	if len(errs) > 0 {
		return again, fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, errors.Join(errs...))
	}
	return false, nil
}

// removeFolders removes the private folder and the mount points, and nothing
// that still has something in it.
func removeFolders(c backup.Copy) error {
	if c.Root == "" {
		return nil
	}
	if err := os.RemoveAll(c.PrivateDir()); err != nil {
		return fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, err)
	}
	dirs := []string{c.Root}
	for _, fs := range c.Filesystems {
		dirs = append(dirs, fs.Mountpoint)
	}
	slices.Sort(dirs)
	slices.Reverse(dirs)
	for _, d := range dirs {
		if err := host.RemoveEmpty(d, c.Root); err != nil {
			return fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, err)
		}
	}
	return nil
}

// NotInService refuses what has become production: ErrInUse.
func NotInService(c backup.Copy) error {
	if !c.InService() {
		return nil
	}
	return backup.Hint(fmt.Errorf("%s of cluster %s is production since it was put into service: %w", c.DataDirectory, c.Cluster, backup.ErrInUse),
		"nothing removes it but `cleancut storage destroy`, with its server stopped: see docs/runbook.md")
}
