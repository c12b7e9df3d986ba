package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// Dump tells of a dump in the catalog: a folder of parts whose manifest was
// written last, or a single file, as cleancut made them before.
type Dump struct {
	Name     string
	Size     backup.Bytes // as stored
	Modified time.Time    // of the last part
	Complete bool         // its manifest is there, or it is a single file
	File     bool         // it is a single file
}

const (
	dumpBegun    = "begun.json"
	dumpManifest = "manifest.json"
	dumpChecks   = "checks"
)

// BeginDump stores who makes a dump, before its first part. backup.ErrExists:
// the name is taken.
func (c *Catalog) BeginDump(ctx context.Context, b backup.DumpBegun) error {
	key, err := c.key(b.Backup, "dumps", b.Name, dumpBegun)
	if err != nil {
		return err
	}
	return c.putJSON(ctx, key, b)
}

// DumpBegun reads who made a dump, or makes it. backup.ErrNotFound: a single
// file has none.
func (c *Catalog) DumpBegun(ctx context.Context, id backup.ID, name string) (b backup.DumpBegun, err error) {
	key, err := c.key(id, "dumps", name, dumpBegun)
	if err != nil {
		return b, err
	}
	return b, c.readJSON(ctx, key, &b)
}

// PutDumpPart stores a part of a dump. r is read to its end without holding it
// in memory; where r fails, nothing is stored.
func (c *Catalog) PutDumpPart(ctx context.Context, id backup.ID, name, part string, r io.Reader) error {
	key, err := c.key(id, "dumps", name, part)
	if err != nil {
		return err
	}
	return c.store.Put(ctx, key, r)
}

// DumpPart opens a part for reading; the caller closes it.
func (c *Catalog) DumpPart(ctx context.Context, id backup.ID, name, part string) (io.ReadCloser, error) {
	key, err := c.key(id, "dumps", name, part)
	if err != nil {
		return nil, err
	}
	return c.store.Get(ctx, key)
}

// PutDumpManifest stores the manifest, by which the dump is complete.
func (c *Catalog) PutDumpManifest(ctx context.Context, m backup.DumpManifest) error {
	key, err := c.key(m.Backup, "dumps", m.Name, dumpManifest)
	if err != nil {
		return err
	}
	b, err := backup.EncodeDumpManifest(m)
	if err != nil {
		return err
	}
	return c.store.Put(ctx, key, bytes.NewReader(b))
}

// DumpManifest reads the manifest of a dump. backup.ErrNotFound: the dump is
// incomplete, or a single file, or not there. backup.ErrDamage: it is
// unreadable or of another dump.
func (c *Catalog) DumpManifest(ctx context.Context, id backup.ID, name string) (backup.DumpManifest, error) {
	key, err := c.key(id, "dumps", name, dumpManifest)
	if err != nil {
		return backup.DumpManifest{}, err
	}
	b, err := c.read(ctx, key)
	if err != nil {
		return backup.DumpManifest{}, err
	}
	m, err := backup.DecodeDumpManifest(b)
	if err == nil && (m.Backup != id || m.Cluster != c.cluster || m.Name != name) {
		err = fmt.Errorf("it is of dump %s of backup %s of cluster %s", m.Name, m.Backup, m.Cluster)
	}
	if errors.Is(err, backup.ErrUnsupported) {
		return m, fmt.Errorf("%s: %w", key, err)
	}
	if err != nil {
		return m, backup.Hint(fmt.Errorf("%s: %w: %v", key, backup.ErrDamage, err), hintDamaged)
	}
	return m, nil
}

// PutDumpCheck stores what a check of a dump found, under its time to the
// microsecond.
func (c *Catalog) PutDumpCheck(ctx context.Context, k backup.DumpCheck) error {
	key, err := c.key(k.Backup, "dumps", k.Dump, dumpChecks, k.Time.UTC().Format("20060102T150405.000000Z")+".json")
	if err != nil {
		return err
	}
	return c.putJSON(ctx, key, k)
}

// DumpChecks returns the checks of a dump, the newest last. With an error it
// still returns those it could read.
func (c *Catalog) DumpChecks(ctx context.Context, id backup.ID, name string) ([]backup.DumpCheck, error) {
	objects, err := c.list(ctx, id, "dumps", name, dumpChecks)
	if err != nil {
		return nil, err
	}
	return readAll[backup.DumpCheck](ctx, c, objects)
}

// Dumps returns the dumps of a backup, sorted by name.
func (c *Catalog) Dumps(ctx context.Context, id backup.ID) ([]Dump, error) {
	objects, err := c.list(ctx, id, "dumps")
	return dumps(objects), err
}

// RemoveDump deletes a dump: its manifest first, so that nobody takes it for
// whole, and begun.json last, so that sweep finds what a crash leaves. Nothing
// there: nil. It may be called again after an error.
func (c *Catalog) RemoveDump(ctx context.Context, id backup.ID, name string) error {
	objects, err := c.list(ctx, id, "dumps", name)
	if err != nil {
		return err
	}
	first, err1 := c.key(id, "dumps", name, dumpManifest)
	last, err2 := c.key(id, "dumps", name, dumpBegun)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	keys := []string{first}
	for _, o := range objects {
		if o.Key != first && o.Key != last {
			keys = append(keys, o.Key)
		}
	}
	for _, key := range append(keys, last) {
		if err := c.store.Delete(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// dumps sums up the objects of a backup's folder dumps, sorted as they are.
func dumps(objects []Object) []Dump {
	var out []Dump
	for _, o := range objects {
		parts := strings.Split(o.Key, "/") // clusters/NAME/backups/ID/dumps/DUMP[/PART]
		if n := len(out); n == 0 || out[n-1].Name != parts[5] {
			out = append(out, Dump{Name: parts[5]})
		}
		d := &out[len(out)-1]
		d.File = len(parts) == 6
		d.Complete = d.Complete || d.File || len(parts) == 7 && parts[6] == dumpManifest
		if len(parts) < 8 { // not the checks
			d.Size += o.Size
			if o.Modified.After(d.Modified) {
				d.Modified = o.Modified
			}
		}
	}
	return out
}
