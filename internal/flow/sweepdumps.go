package flow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/postgres"
)

// The folders below the state folder that last as long as a command works in
// them, by what their names begin with.
const (
	dumpSpoolPrefix = "spool-" // pg_dump's directory format
	checkPrefix     = "check-" // a server that a dump is loaded into
)

// elsewhere is a link in such a folder to the one that holds its content.
const elsewhere = "elsewhere"

// lockedFolder makes a folder below the state folder. While it is open sweep
// leaves it alone.
func (f *Flow) lockedFolder(prefix string) (*os.File, error) {
	path, err := os.MkdirTemp(f.State.Path(), prefix)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err == nil {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(path))
	}
	return dir, nil
}

// workFolder makes a folder to work in, below the state folder or in another
// one, into which any user may go. remove ends servers in it and takes it away;
// what it cannot remove wraps backup.ErrLeft.
func (f *Flow) workFolder(ctx context.Context, prefix, in string) (path string, remove func(ctx context.Context) error, err error) {
	dir, err := f.lockedFolder(prefix)
	if err != nil {
		return "", nil, err
	}
	remove = func(ctx context.Context) error {
		ctx, cancel := undoing(ctx)
		defer cancel()
		if err := errors.Join(removeWork(ctx, dir.Name()), dir.Close()); err != nil {
			return fmt.Errorf("%s: %w: %w", dir.Name(), backup.ErrLeft, err)
		}
		return nil
	}
	path = dir.Name()
	err = os.Chmod(path, 0o711)
	if in != "" && err == nil {
		path = filepath.Join(in, "cleancut-"+filepath.Base(path))
		if path, err = filepath.Abs(path); err == nil {
			err = os.Symlink(path, filepath.Join(dir.Name(), elsewhere))
		}
		if err == nil {
			err = os.Mkdir(path, 0o711)
		}
	}
	if err != nil {
		return "", nil, errors.Join(err, remove(ctx))
	}
	return path, remove, nil
}

// removeWork ends what runs in a work folder and removes it.
func removeWork(ctx context.Context, path string) error {
	if to, err := os.Readlink(filepath.Join(path, elsewhere)); err == nil {
		if err := errors.Join(postgres.Kill(ctx, to), os.RemoveAll(to)); err != nil {
			return err
		}
	}
	return errors.Join(postgres.Kill(ctx, path), os.RemoveAll(path))
}

// sweepFolders removes the work folders of processes that were killed: nobody
// holds their lock.
func (f *Flow) sweepFolders(ctx context.Context) error {
	var errs []error
	for _, prefix := range []string{walDumpPrefix, dumpSpoolPrefix, checkPrefix} {
		paths, err := filepath.Glob(filepath.Join(f.State.Path(), prefix+"*"))
		errs = append(errs, err)
		for _, path := range paths {
			dir, err := os.Open(path)
			if err != nil {
				continue // it has just gone
			}
			if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				errs = append(errs, removeWork(ctx, path))
			}
			_ = dir.Close()
		}
	}
	return errors.Join(errs...)
}

func lockDump(b backup.DumpBegun) string { return "dump-" + string(b.Backup) + "-" + b.Name }

// dumpFacts lists the dumps that were begun and have no manifest, and which of
// them are being made on this host.
func (f *Flow) dumpFacts(ctx context.Context, x *Facts, entries []catalog.Entry) error {
	for _, e := range entries {
		for _, d := range e.Dumps {
			if d.Complete {
				continue
			}
			b, err := f.Catalog.DumpBegun(ctx, e.ID, d.Name)
			if errors.Is(err, backup.ErrNotFound) {
				continue // it has just gone
			}
			if err != nil {
				return err
			}
			b.Backup, b.Name = e.ID, d.Name // whatever it says
			release, err := f.State.Lock(lockDump(b))
			switch {
			case errors.Is(err, backup.ErrInUse):
				x.Busy[lockDump(b)] = true
			case err != nil:
				return err
			default:
				release()
			}
			x.Dumps = append(x.Dumps, b)
		}
	}
	return nil
}

func planDumps(x Facts) (out []Action) {
	for _, d := range x.Dumps {
		a := Action{Kind: RemoveDump, Name: "dump " + d.Name + " of backup " + string(d.Backup), Why: "it was interrupted before it was whole", Dump: d}
		switch {
		case d.Host != x.Host:
			a.Kind, a.Why = OnlyList, "is made by host "+d.Host+", or was: run sweep there"
		case x.Busy[lockDump(d)]:
			a.Kind, a.Why = OnlyList, "it is being made"
		}
		out = append(out, a)
	}
	return out
}

// removeBegun removes a dump unless it has become whole.
func (f *Flow) removeBegun(ctx context.Context, b backup.DumpBegun) error {
	_, err := f.Catalog.DumpManifest(ctx, b.Backup, b.Name)
	if errors.Is(err, backup.ErrNotFound) {
		return f.Catalog.RemoveDump(ctx, b.Backup, b.Name)
	}
	if err == nil {
		err = fmt.Errorf("it has become whole since the plan was made: %w", backup.ErrInUse)
	}
	return err
}
