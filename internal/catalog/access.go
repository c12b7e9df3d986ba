package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// key returns the key of an object of a backup.
func (c *Catalog) key(id backup.ID, parts ...string) (string, error) {
	if err := backup.CheckClusterName(c.cluster); err != nil {
		return "", err
	}
	if _, err := backup.ParseID(string(id)); err != nil {
		return "", err
	}
	for _, name := range parts {
		if strings.Contains(name, "/") {
			return "", fmt.Errorf("%w: name %q holds a slash", backup.ErrUsage, name)
		}
	}
	key := "clusters/" + c.cluster + "/backups/" + string(id) + "/" + strings.Join(parts, "/")
	return key, CheckKey(key)
}

func (c *Catalog) intentKey(id backup.ID) (string, error) {
	if err := backup.CheckClusterName(c.cluster); err != nil {
		return "", err
	}
	if _, err := backup.ParseID(string(id)); err != nil {
		return "", err
	}
	return "clusters/" + c.cluster + "/intents/" + string(id) + ".json", nil
}

// list returns the objects of a backup, or of one folder of it.
func (c *Catalog) list(ctx context.Context, id backup.ID, folder ...string) ([]Object, error) {
	key, err := c.key(id, append(folder, "x")...)
	if err != nil {
		return nil, err
	}
	return c.store.List(ctx, strings.TrimSuffix(key, "x"))
}

// maxRecord is far above any record (a member is under a kilobyte) and keeps a
// damaged one from filling the memory.
const maxRecord = 16 << 20

func (c *Catalog) read(ctx context.Context, key string) ([]byte, error) {
	r, err := c.store.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxRecord+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, fmt.Errorf("read %s: %w", key, err)
	}
	if len(b) > maxRecord {
		return nil, backup.Hint(fmt.Errorf("%s: %w: it is larger than %v", key, backup.ErrDamage, backup.Bytes(maxRecord)), hintDamaged)
	}
	return b, nil
}

// readJSON tolerates keys it does not know: unlike a manifest these records
// only ever gain some.
func (c *Catalog) readJSON(ctx context.Context, key string, into any) error {
	b, err := c.read(ctx, key)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return backup.Hint(fmt.Errorf("%s: %w: cut short or no JSON: %w", key, backup.ErrDamage, err), hintDamaged)
	}
	return nil
}

func (c *Catalog) putJSON(ctx context.Context, key string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	return c.store.Put(ctx, key, bytes.NewReader(append(b, '\n')))
}

// readAll reads the objects as T, in their order, and joins the errors. What
// was deleted since it was listed is passed over.
func readAll[T any](ctx context.Context, c *Catalog, objects []Object) ([]T, error) {
	var out []T
	var errs []error
	for _, o := range objects {
		var v T
		switch err := c.readJSON(ctx, o.Key, &v); {
		case errors.Is(err, backup.ErrNotFound):
		case err != nil:
			errs = append(errs, err)
		default:
			out = append(out, v)
		}
	}
	return out, errors.Join(errs...)
}

// faultStore has a fault point before and after every call of a store:
// "catalog.put manifest", "catalog.put manifest done".
type faultStore struct{ next Store }

// Tidy removes what killed processes left half written, if the store has such
// a thing and it is older than that. It returns how many.
func (c *Catalog) Tidy(ctx context.Context, olderThan time.Duration) (int, error) {
	store, ok := c.store.next.(interface {
		Tidy(context.Context, time.Duration) (int, error)
	})
	if !ok {
		return 0, nil
	}
	n, err := store.Tidy(ctx, olderThan)
	if errors.Is(err, backup.ErrNotFound) { // no catalog yet
		err = nil
	}
	return n, err
}

func (f faultStore) Put(ctx context.Context, key string, r io.Reader) error {
	return pointed(ctx, "catalog.put "+kind(key), func() error { return f.next.Put(ctx, key, r) })
}

func (f faultStore) Get(ctx context.Context, key string) (r io.ReadCloser, err error) {
	err = pointed(ctx, "catalog.get "+kind(key), func() (err error) {
		r, err = f.next.Get(ctx, key)
		return err
	})
	if err != nil && r != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, err
}

func (f faultStore) List(ctx context.Context, prefix string) (out []Object, err error) {
	err = pointed(ctx, "catalog.list "+kind(prefix), func() (err error) {
		out, err = f.next.List(ctx, prefix)
		return err
	})
	return out, err
}

func (f faultStore) Delete(ctx context.Context, key string) error {
	return pointed(ctx, "catalog.delete "+kind(key), func() error { return f.next.Delete(ctx, key) })
}

func pointed(ctx context.Context, name string, call func() error) error {
	if err := fault.Point(ctx, name); err != nil {
		return err
	}
	if err := call(); err != nil {
		return err
	}
	return fault.Point(ctx, name+" done")
}

// kind says in one word what a key or prefix is of.
func kind(key string) string {
	parts := strings.Split(strings.TrimSuffix(key, "/"), "/")
	switch {
	case len(parts) > 4 && parts[2] == "backups":
		return strings.TrimSuffix(strings.TrimSuffix(parts[4], ".json"), "s") // manifest, complete, verdict, file, dump
	case len(parts) == 4 && parts[2] == "backups":
		return "backup"
	case len(parts) > 3 && parts[2] == "intents":
		return "intent"
	case len(parts) > 4 && parts[2] == "wal":
		return "wal"
	}
	return parts[len(parts)-1] // clusters, backups, intents
}
