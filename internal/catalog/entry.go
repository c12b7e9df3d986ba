package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"cleancut/internal/backup"
)

// Entry is what the catalog knows of one backup.
type Entry struct {
	ID       backup.ID
	Manifest backup.Manifest  // the zero value if it is missing or unreadable
	Digest   string           // of the manifest's bytes, "" like Manifest
	Complete *backup.Complete // nil if it is missing, unreadable or of another manifest
	Verdicts []backup.Verdict // newest last; only those that are readable
	Dumps    []Dump
	Holds    []backup.Hold // oldest first, also ended ones; only those that are readable

	// Err says why the backup may not be restored, nil if the catalog knows no
	// reason: backup.ErrIncomplete, ErrDamage, ErrUnsupported, or what the
	// store said. Only ErrIncomplete means that it was interrupted; with any
	// other the backup may be whole, and nothing of it may be deleted for it.
	Err error
	// VerdictErr says which verdicts are unreadable. It hinders no restore,
	// but the last of Verdicts may then not be the newest.
	VerdictErr error
	// HoldErr says which holds are unreadable: the backup then counts as held.
	HoldErr error
}

// Backups returns every backup of the cluster, the newest last. One that
// cannot be read is there with its Err and does not hide the others; the error
// is for the whole list.
func (c *Catalog) Backups(ctx context.Context) ([]Entry, error) {
	if err := backup.CheckClusterName(c.cluster); err != nil {
		return nil, err
	}
	prefix := "clusters/" + c.cluster + "/backups/"
	objects, err := c.store.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	var out []Entry
	for len(objects) > 0 {
		id, _, _ := strings.Cut(strings.TrimPrefix(objects[0].Key, prefix), "/")
		n := 0
		for n < len(objects) && strings.HasPrefix(objects[n].Key, prefix+id+"/") {
			n++
		}
		if n == 0 { // a file beside the backups, no backup
			objects = objects[1:]
			continue
		}
		out = append(out, c.entry(ctx, backup.ID(id), objects[:n]))
		objects = objects[n:]
	}
	return out, ctx.Err()
}

// Backup returns one backup that may be restored. Otherwise the error is the
// Err of its Entry, and the Entry is as full as can be; backup.ErrNotFound if
// the catalog has nothing of it.
func (c *Catalog) Backup(ctx context.Context, id backup.ID) (Entry, error) {
	objects, err := c.list(ctx, id)
	if err == nil && len(objects) == 0 {
		err = backup.Hint(fmt.Errorf("backup %s of cluster %s: %w", id, c.cluster, backup.ErrNotFound), "see `cleancut list`")
	}
	if err != nil {
		return Entry{ID: id, Err: err}, err
	}
	e := c.entry(ctx, id, objects)
	return e, e.Err
}

// Remove deletes everything the catalog has of a backup. complete.json goes
// first and manifest.json last, so that what a crash leaves is incomplete but
// still says which snapshots were its own. Called again it goes on; nothing
// left: nil. The snapshots are the caller's to delete, after Retract and
// before Remove.
func (c *Catalog) Remove(ctx context.Context, id backup.ID) error {
	if err := c.Retract(ctx, id); err != nil {
		return err
	}
	objects, err := c.list(ctx, id)
	if err != nil {
		return err
	}
	manifest, err := c.key(id, "manifest.json")
	if err != nil {
		return err
	}
	for _, o := range objects {
		if o.Key == manifest {
			continue
		}
		if err := c.store.Delete(ctx, o.Key); err != nil {
			return err
		}
	}
	return c.store.Delete(ctx, manifest)
}

// entry reads what the objects of one backup say.
func (c *Catalog) entry(ctx context.Context, id backup.ID, objects []Object) Entry {
	e := Entry{ID: id}
	if _, err := backup.ParseID(string(id)); err != nil {
		e.Err = err
		return e
	}
	e.Verdicts, e.VerdictErr = readAll[backup.Verdict](ctx, c, below(objects, "verdicts"))
	e.Dumps = dumps(below(objects, "dumps"))
	e.Holds, e.HoldErr = readAll[backup.Hold](ctx, c, below(objects, "holds"))
	e.Manifest, e.Digest, e.Err = c.Manifest(ctx, id)
	if errors.Is(e.Err, backup.ErrNotFound) {
		e.Err = incomplete(id, "it has no manifest")
	}
	if e.Err != nil {
		return e
	}
	done, err := c.complete(ctx, id, e.Digest)
	if err != nil {
		e.Err = err
		return e
	}
	e.Complete = &done
	return e
}

// below keeps the objects in that folder of their backup.
func below(objects []Object, folder string) []Object {
	var out []Object
	for _, o := range objects {
		if parts := strings.Split(o.Key, "/"); len(parts) > 5 && parts[4] == folder {
			out = append(out, o)
		}
	}
	return out
}

func incomplete(id backup.ID, why string) error {
	return backup.Hint(fmt.Errorf("backup %s: %w: %s", id, backup.ErrIncomplete, why),
		"it is still being made or deleted, or that was interrupted; `cleancut sweep` removes what an interrupted one left")
}

const hintDamaged = "something other than cleancut changed the catalog: put that file back from a copy of the catalog; the other backups are not concerned, see `cleancut list`"
