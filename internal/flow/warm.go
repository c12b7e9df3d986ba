package flow

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/hydrate"
)

// HydrateOptions says how fast to read a copy's volumes and who is told.
type HydrateOptions struct {
	Rate  backup.Bytes // a second, over all volumes; 0: as fast as it goes
	Begin func(volumes []backup.VolumeID, sizes []backup.Bytes)
	Read  func(i int, n backup.Bytes) // called by several goroutines
}

// Hydrate reads the volumes of a running copy through and keeps in its ledger
// how far that came. The caller holds the copy's lock. The copy stays on every
// error and when ctx ends; then the result says how far it came.
func (f *Flow) Hydrate(ctx context.Context, c backup.Copy, o HydrateOptions) (backup.Copy, error) {
	begin := func(sizes []backup.Bytes) {
		var ids []backup.VolumeID
		var all backup.Bytes
		for i, v := range c.Volumes {
			ids = append(ids, v.Volume)
			all += sizes[i]
		}
		f.tell("hydrate", fmt.Sprintf("%d volumes, %s", len(ids), all))
		if o.Begin != nil {
			o.Begin(ids, sizes)
		}
	}
	for _, v := range c.Volumes { // the kernel's names may have changed since, by a reboot
		if on, err := f.Provider.Resolve(ctx, v.Device); err != nil || on.ID != v.Volume {
			return c, errors.Join(fmt.Errorf("%s is not volume %s of the copy at %s: %w", v.Device, v.Volume, c.Root, backup.ErrNotOurs), err)
		}
	}
	res, err := hydrate.Run(ctx, hydrate.Options{Volumes: c.Volumes, Rate: o.Rate, Begin: begin, Read: o.Read})
	if res.Complete {
		res.SinceRestore = time.Since(c.Created).Seconds()
	}
	c.Hydrated = &res
	if err := errors.Join(err, f.State.PutCopy(c)); err != nil {
		return c, backup.Hint(fmt.Errorf("the copy at %s is up and stays, but of its volumes only %s of %s were read: %w", c.Root, res.Bytes, res.Size, err),
			"it can be used meanwhile; read on with `cleancut restore --hydrate --to "+c.Root+"`, or remove it with `cleancut restore --undo "+c.Root+"`")
	}
	return c, nil
}

// HydrateAt is Hydrate for the restored copy that stands at root on this host.
func (f *Flow) HydrateAt(ctx context.Context, root string, o HydrateOptions) (backup.Copy, error) {
	c, release, err := f.standing(root)
	if err != nil {
		return c, err
	}
	defer release()
	if !c.Ready {
		return c, fmt.Errorf("copy %s at %s is half made or half removed: %w", c.ID, c.Root, backup.ErrIncomplete)
	}
	return f.Hydrate(ctx, c, o)
}

// standing finds and locks the copy at root.
func (f *Flow) standing(root string) (backup.Copy, func(), error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return backup.Copy{}, nil, err
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	}
	copies, err := f.State.Copies()
	for _, c := range copies {
		if c.Root != abs {
			continue
		}
		release, err := f.State.Lock(lockCopy(c.ID))
		if err != nil {
			return c, nil, fmt.Errorf("copy %s is being worked on: %w", c.ID, err)
		}
		return c, release, nil
	}
	return backup.Copy{}, nil, errors.Join(backup.Hint(fmt.Errorf("no copy at %s: %w", abs, backup.ErrNotFound), "`cleancut sweep --dry-run` lists what stands on this host"), err)
}
