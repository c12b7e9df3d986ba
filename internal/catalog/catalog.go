package catalog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// Catalog gives the objects of one cluster their meaning. Its methods may be
// called at the same time. Every error of the store comes through wrapped:
// backup.ErrExists where something is there already (nothing is overwritten),
// backup.ErrNotFound where nothing is. A malformed cluster name, id or name is
// backup.ErrUsage.
type Catalog struct {
	store   faultStore
	cluster string
}

// New returns the catalog of the cluster in store. It touches nothing yet; a
// cluster name that backup.CheckClusterName refuses makes every method fail.
func New(store Store, cluster string) *Catalog {
	return &Catalog{store: faultStore{store}, cluster: cluster}
}

// PutManifest stores the record of a cut, once, and returns its digest.
func (c *Catalog) PutManifest(ctx context.Context, m backup.Manifest) (digest string, err error) {
	key, err := c.key(m.ID, "manifest.json")
	if err != nil {
		return "", err
	}
	if m.Cluster != c.cluster {
		return "", fmt.Errorf("put manifest %s: it is of cluster %q, the catalog of %q", m.ID, m.Cluster, c.cluster)
	}
	b, err := backup.EncodeManifest(m)
	if err != nil {
		return "", fmt.Errorf("put manifest %s: %w", m.ID, err)
	}
	if err := c.store.Put(ctx, key, bytes.NewReader(b)); err != nil {
		return "", err
	}
	return backup.Digest(b), nil
}

// Manifest reads the record of a cut and the digest of its bytes, whether or
// not the backup is complete. backup.ErrNotFound: there is none.
// backup.ErrUnsupported: a newer cleancut wrote it. backup.ErrDamage: it is
// cut short, does not hold together or is of another backup.
func (c *Catalog) Manifest(ctx context.Context, id backup.ID) (backup.Manifest, string, error) {
	key, err := c.key(id, "manifest.json")
	if err != nil {
		return backup.Manifest{}, "", err
	}
	b, err := c.read(ctx, key)
	if err != nil {
		return backup.Manifest{}, "", err
	}
	m, err := backup.DecodeManifest(b)
	if err == nil && (m.ID != id || m.Cluster != c.cluster) {
		err = fmt.Errorf("it is of backup %s of cluster %s", m.ID, m.Cluster)
	}
	if errors.Is(err, backup.ErrUnsupported) {
		return backup.Manifest{}, "", fmt.Errorf("%s: %w", key, err)
	}
	if err != nil {
		// Not %w: inside are ErrVoid or ErrUsage, true of a manifest about to
		// be written, not of one that was read.
		return backup.Manifest{}, "", backup.Hint(fmt.Errorf("%s: %w: %v", key, backup.ErrDamage, err), hintDamaged)
	}
	return m, backup.Digest(b), nil
}

// PutComplete stores that every snapshot of a backup is durable. The manifest
// must be there and have the digest that done names.
func (c *Catalog) PutComplete(ctx context.Context, done backup.Complete) error {
	key, err := c.key(done.ID, "complete.json")
	if err != nil {
		return err
	}
	_, digest, err := c.Manifest(ctx, done.ID)
	if err != nil {
		return err
	}
	if done.Digest != digest {
		return fmt.Errorf("complete %s: manifest has digest %q, not %q", done.ID, digest, done.Digest)
	}
	return c.putJSON(ctx, key, done)
}

// Complete reads that second fact of a backup and checks that it belongs to
// the manifest as it is stored now. backup.ErrIncomplete: there is none.
// backup.ErrDamage: it is unreadable or the manifest is not the one it was
// written for. Otherwise the errors of Manifest.
func (c *Catalog) Complete(ctx context.Context, id backup.ID) (backup.Complete, error) {
	_, digest, err := c.Manifest(ctx, id)
	if err != nil {
		return backup.Complete{}, err
	}
	return c.complete(ctx, id, digest)
}

func (c *Catalog) complete(ctx context.Context, id backup.ID, digest string) (backup.Complete, error) {
	key, err := c.key(id, "complete.json")
	if err != nil {
		return backup.Complete{}, err
	}
	var done backup.Complete
	err = c.readJSON(ctx, key, &done)
	if errors.Is(err, backup.ErrNotFound) {
		return backup.Complete{}, incomplete(id, "it has no complete.json")
	}
	if err != nil {
		return backup.Complete{}, err
	}
	if done.ID != id || done.Digest != digest {
		return backup.Complete{}, backup.Hint(fmt.Errorf("%s: %w: it was written for manifest %s of backup %s, the manifest there is %s",
			key, backup.ErrDamage, done.Digest, done.ID, digest), hintDamaged)
	}
	return done, nil
}

// Retract deletes complete.json, after which the backup is neither restored
// nor counted. It comes before the snapshots of a backup are deleted. Gone
// already: nil.
func (c *Catalog) Retract(ctx context.Context, id backup.ID) error {
	key, err := c.key(id, "complete.json")
	if err != nil {
		return err
	}
	return c.store.Delete(ctx, key)
}

// PutVerdict stores what a verification found, under its time to the
// microsecond.
func (c *Catalog) PutVerdict(ctx context.Context, v backup.Verdict) error {
	key, err := c.key(v.Backup, "verdicts", v.Time.UTC().Format("20060102T150405.000000Z")+".json")
	if err != nil {
		return err
	}
	return c.putJSON(ctx, key, v)
}

// Verdicts returns the verdicts of a backup, the newest last. With an error it
// still returns those it could read.
func (c *Catalog) Verdicts(ctx context.Context, id backup.ID) ([]backup.Verdict, error) {
	objects, err := c.list(ctx, id, "verdicts")
	if err != nil {
		return nil, err
	}
	return readAll[backup.Verdict](ctx, c, objects)
}

// PutSideFile stores side file number n of a backup, which was at path, and
// returns its entry for the manifest.
func (c *Catalog) PutSideFile(ctx context.Context, id backup.ID, n int, path string, content []byte) (backup.SideFile, error) {
	sum := sha256.Sum256(content)
	f := backup.SideFile{Path: path, Name: strconv.Itoa(n), SHA256: hex.EncodeToString(sum[:])}
	key, err := c.key(id, "files", f.Name)
	if err != nil {
		return backup.SideFile{}, err
	}
	return f, c.store.Put(ctx, key, bytes.NewReader(content))
}

// SideFile returns the content of a side file that the manifest of a backup
// names. backup.ErrDamage: it is not what was stored.
func (c *Catalog) SideFile(ctx context.Context, id backup.ID, f backup.SideFile) ([]byte, error) {
	key, err := c.key(id, "files", f.Name)
	if err != nil {
		return nil, err
	}
	b, err := c.read(ctx, key)
	if errors.Is(err, backup.ErrNotFound) {
		err = backup.Hint(fmt.Errorf("side file %s: %w", f.Path, err),
			"it was lost with the catalog, if that was rebuilt from the snapshots' tags: they hold no side files; take it from another backup or from the server")
	}
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != f.SHA256 {
		return nil, backup.Hint(fmt.Errorf("%s (%s): %w: its SHA-256 is not the manifest's", key, f.Path, backup.ErrDamage), hintDamaged)
	}
	return b, nil
}

// SideFiles returns the names of the side files that are there.
func (c *Catalog) SideFiles(ctx context.Context, id backup.ID) ([]string, error) {
	objects, err := c.list(ctx, id, "files")
	var out []string
	for _, o := range objects {
		out = append(out, o.Key[strings.LastIndexByte(o.Key, '/')+1:])
	}
	return out, err
}

// PutIntent stores what is about to be made or deleted outside, before the
// first call that does. backup.ErrExists: an earlier run left one for that id.
func (c *Catalog) PutIntent(ctx context.Context, i backup.Intent) error {
	key, err := c.intentKey(i.ID)
	if err != nil {
		return err
	}
	if i.Cluster != c.cluster {
		return fmt.Errorf("put intent %s: it is of cluster %q, the catalog of %q", i.ID, i.Cluster, c.cluster)
	}
	return c.putJSON(ctx, key, i)
}

// Intents returns what is or was being made or deleted, the oldest first. With
// an error it still returns those it could read; who deletes by them must not
// take the rest for absent.
func (c *Catalog) Intents(ctx context.Context) ([]backup.Intent, error) {
	if err := backup.CheckClusterName(c.cluster); err != nil {
		return nil, err
	}
	objects, err := c.store.List(ctx, "clusters/"+c.cluster+"/intents/")
	if err != nil {
		return nil, err
	}
	return readAll[backup.Intent](ctx, c, objects)
}

// EndIntent deletes the intent when all it names is accounted for. Gone
// already: nil.
func (c *Catalog) EndIntent(ctx context.Context, id backup.ID) error {
	key, err := c.intentKey(id)
	if err != nil {
		return err
	}
	return c.store.Delete(ctx, key)
}
