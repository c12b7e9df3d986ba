package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/dump"
	"cleancut/internal/flow/restore"
	"cleancut/internal/flow/verify"
	"cleancut/internal/postgres"
)

// RestoreOptions says what to restore and where to.
type RestoreOptions struct {
	ID      backup.ID
	Root    string // folder of the copy; empty: a folder of our own below the state folder
	Purpose backup.Purpose
	Recovery
	// AllowTorn restores what the drill cut without protection. No command sets it.
	AllowTorn bool
	// CrashOnly leaves to a bracketed backup nothing but its images, as if they
	// had been cut without backup mode: no label, no map, none of the WAL kept
	// with it. The drill shows by it what bracketing is for. No command sets it.
	CrashOnly bool
	// production is what the copy is going to be in the end; see Produce.
	production *backup.Production

	standby *StandbyOptions // nil: none
	// failed is given what stands when the restore has failed, before it is
	// removed; it may be nil.
	failed func(ctx context.Context, c backup.Copy, err error)
}

// Restored is a running copy.
type Restored struct {
	Copy         backup.Copy
	Manifest     backup.Manifest
	Instance     *postgres.Instance
	Installation postgres.Installation
}

// Restore makes a copy of a backup, recovers it and leaves it running. On an
// error everything of it is removed again. The returned release gives up the
// lock on the copy; the copy stays.
func (f *Flow) Restore(ctx context.Context, o RestoreOptions) (r Restored, release func(), err error) {
	entry, err := f.Catalog.Backup(ctx, o.ID)
	if err != nil {
		return r, nil, err
	}
	m := entry.Manifest
	if m.Cut.Achieved == backup.Torn && !o.AllowTorn {
		return r, nil, fmt.Errorf("backup %s is %s: the drill made it, and nothing else restores it: %w", m.ID, m.Cut.Achieved, backup.ErrUnsupported)
	}
	if o.CrashOnly && m.Bracket != nil {
		// What was flushed when backup mode began is all that is known to have
		// been flushed before the first cut.
		m.Cut.FlushLSN, m.Bracket = m.Bracket.StartLSN, nil
	}
	inst, err := postgres.FindInstallation(ctx, m.Server.Major(), f.BinDirs)
	if err != nil {
		return r, nil, err
	}
	if err := f.proveKeptWAL(ctx, m, inst); err != nil {
		return r, nil, err
	}
	copyID := backup.NewID(time.Now())
	beyond, err := f.planRecovery(ctx, m, o.Recovery, inst, copyID)
	if err != nil {
		return r, nil, err
	}
	seed, err := f.planStandby(ctx, m, o.standby, copyID)
	if err != nil {
		return r, nil, err
	}
	c := backup.Copy{ID: copyID, Backup: m.ID, Cluster: m.Cluster, Host: f.Host, Purpose: o.Purpose, Created: time.Now().UTC(), Major: m.Server.Major(), Production: o.production}
	release, err = f.State.Lock(lockCopy(c.ID))
	if err != nil {
		return r, nil, err
	}
	if c.Root, err = f.makeRoot(o.Root, c.ID); err != nil {
		release()
		return r, nil, err
	}
	c.Standby = seed.record(c)
	if err := f.State.PutCopy(c); err != nil {
		release()
		return r, nil, errors.Join(err, os.Remove(c.Root))
	}
	r = Restored{Manifest: m, Installation: inst}
	r.Copy, r.Instance, err = restore.Run(ctx, f.Provider, restore.Options{Manifest: m, Digest: entry.Complete.Digest, Copy: c, Installation: inst,
		Segment: f.segment(m), Archive: beyond, Standby: f.standby(seed, c), NewTimeline: o.production != nil, Settings: productionSettings(m, o.production), Save: f.State.PutCopy, Progress: f.tell})
	if err != nil {
		if o.failed != nil {
			o.failed(ctx, r.Copy, err)
		}
		err = errors.Join(err, f.undoCopy(ctx, r.Copy))
		release()
		return r, nil, err
	}
	return r, release, nil
}

// makeRoot makes the folder of a copy. It must be new or empty.
func (f *Flow) makeRoot(root string, id backup.ID) (string, error) {
	if root == "" {
		root = filepath.Join(f.State.Path(), "mnt", string(id))
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return "", fmt.Errorf("folder of the copy: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return "", fmt.Errorf("folder of the copy: %w", err)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(root))
	if err != nil {
		return "", fmt.Errorf("folder of the copy: %w", err)
	}
	root = filepath.Join(parent, filepath.Base(root))
	if err := os.Mkdir(root, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("folder of the copy: %w", err)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", fmt.Errorf("folder of the copy: %w", err)
	}
	if len(entries) > 0 {
		return "", backup.Hint(fmt.Errorf("%s is not empty: %w", root, backup.ErrUsage), "choose a new folder; nothing there is overwritten")
	}
	return root, nil
}

// undoCopy removes a copy and forgets it, on a context of its own.
func (f *Flow) undoCopy(ctx context.Context, c backup.Copy) error {
	ctx, cancel := undoing(ctx)
	defer cancel()
	f.tell("undo", "removing copy "+string(c.ID))
	if err := f.notInService(c.ID); err != nil {
		return err
	}
	if c.Ready { // from here on it is not meant to stay: sweep ends what we do not
		c.Ready = false
		if err := f.State.PutCopy(c); err != nil {
			return fmt.Errorf("copy %s: %w: %w", c.ID, backup.ErrLeft, err)
		}
	}
	return f.takeDown(ctx, c)
}

// RemoveCopy takes down the copy that stands at root on this host.
func (f *Flow) RemoveCopy(ctx context.Context, root string) (backup.Copy, error) {
	c, release, err := f.standing(root)
	if err != nil {
		return c, err
	}
	defer release()
	return c, f.undoCopy(ctx, c)
}

// VerifyOptions says what to verify and how deep.
type VerifyOptions struct {
	ID    backup.ID
	Level backup.Level
	Recovery
	// AllowTorn verifies what the drill cut without protection. No command sets it.
	AllowTorn bool
	// CrashOnly is that of RestoreOptions. No command sets it.
	CrashOnly bool
	// Look runs on the recovered copy before the checks; it may be nil. An
	// error of it is a failed check.
	Look func(ctx context.Context, r Restored) error
}

// Verify restores a backup into a throwaway copy, checks it, removes the copy
// and records the verdict in the catalog. Damage is an error that wraps
// backup.ErrDamage; so is an image that cannot be mounted or does not recover;
// of the latter, level full still checks the filesystems.
// What this host lacks to judge it is an error and no verdict.
func (f *Flow) Verify(ctx context.Context, o VerifyOptions) (v backup.Verdict, err error) {
	id, level := o.ID, o.Level
	start := time.Now()
	tell := func(check string) { f.tell("check", check) }
	var disks []backup.Check
	r, release, err := f.Restore(ctx, RestoreOptions{ID: id, Purpose: backup.ForVerify, Recovery: o.Recovery, AllowTorn: o.AllowTorn, CrashOnly: o.CrashOnly,
		failed: func(ctx context.Context, c backup.Copy, err error) {
			if level == backup.LevelFull && errors.Is(err, restore.ErrNoStart) && restore.Blamed(err) != backup.CheckMounted {
				disks = verify.Filesystems(ctx, c, tell)
			}
		}})
	switch {
	case errors.Is(err, restore.ErrNoStart) && !errors.Is(err, backup.ErrLeft) && ctx.Err() == nil:
		v = backup.Verdict{Backup: id, Level: level, Time: start.UTC(), Checks: []backup.Check{{Name: restore.Blamed(err), Result: backup.Failed, Detail: err.Error()}}}
		v.Checks = append(v.Checks, disks...)
	case err != nil:
		return v, err
	default:
		defer release()
		var looked error
		if o.Look != nil {
			looked = o.Look(ctx, r)
		}
		v, err = verify.Run(ctx, verify.Options{Copy: r.Copy, Manifest: r.Manifest, Instance: r.Instance, Installation: r.Installation, Level: level, Progress: tell})
		if err = errors.Join(err, f.undoCopy(ctx, r.Copy)); err != nil {
			return v, err
		}
		if looked != nil {
			v.Checks = append(v.Checks, backup.Check{Name: backup.CheckOwner, Result: backup.Failed, Detail: looked.Error()})
		}
	}
	v.Tool, v.Host, v.Seconds = f.Tool, f.Host, time.Since(start).Seconds()
	if o.Target.Kind != "" && o.Target.Kind != backup.TargetEnd {
		v.Target = o.Target.String()
	}
	if err := f.Catalog.PutVerdict(ctx, v); err != nil {
		return v, err
	}
	if !v.Good() {
		return v, errors.Join(fmt.Errorf("backup %s: %w", id, backup.ErrDamage), err)
	}
	return v, nil
}

// DumpOptions says where the dump goes.
type DumpOptions struct {
	ID    backup.ID
	Level int
	Recovery
	// Out gets the archive; nil puts it into the catalog under Name.
	Out      io.Writer
	Name     string
	Progress func(sql, compressed backup.Bytes)

	// Placeholders of the nightly branch for the dump helper's fields.
	Format     backup.DumpFormat
	Jobs       int
	Recipients []string
}

// Dump restores a backup into a throwaway copy, streams pg_dumpall from it and
// removes the copy.
func (f *Flow) Dump(ctx context.Context, o DumpOptions) (res dump.Result, err error) {
	r, release, err := f.Restore(ctx, RestoreOptions{ID: o.ID, Purpose: backup.ForDump, Recovery: o.Recovery})
	if err != nil {
		return res, err
	}
	defer release()
	defer func() { err = errors.Join(err, f.undoCopy(ctx, r.Copy)) }()
	f.tell("dump", "pg_dumpall")
	options := dump.Options{Instance: r.Instance, Original: r.Copy.Original, Level: o.Level, Progress: o.Progress}
	if o.Out != nil {
		return dump.Run(ctx, o.Out, options)
	}
	return f.dumpToCatalog(ctx, o, options)
}

// dumpToCatalog streams through a pipe, so that a failed dump fails the Put,
// which then leaves nothing.
func (f *Flow) dumpToCatalog(ctx context.Context, o DumpOptions, options dump.Options) (res dump.Result, err error) {
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		var err error
		res, err = dump.Run(ctx, pw, options)
		_ = pw.CloseWithError(err) // nil is EOF; a PipeWriter's Close never fails
		done <- err
	}()
	err = f.Catalog.PutDump(ctx, o.ID, o.Name, pr)
	_ = pr.CloseWithError(errors.New("the catalog stopped reading"))
	return res, errors.Join(err, <-done)
}
