package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"cleancut/internal/backup"
)

// Reinstate stores a manifest again, byte for byte as it was written once, and
// returns its digest. The same bytes there already: nil. Others: they stay,
// and the error wraps backup.ErrExists. It takes every manifest that Manifest
// reads, also of older versions.
func (c *Catalog) Reinstate(ctx context.Context, manifest []byte) (digest string, err error) {
	m, err := backup.DecodeManifest(manifest)
	if err != nil {
		return "", fmt.Errorf("reinstate: %w", err)
	}
	if m.Cluster != c.cluster {
		return "", fmt.Errorf("reinstate %s: it is of cluster %q, the catalog of %q", m.ID, m.Cluster, c.cluster)
	}
	key, err := c.key(m.ID, "manifest.json")
	if err != nil {
		return "", err
	}
	digest = backup.Digest(manifest)
	err = c.store.Put(ctx, key, bytes.NewReader(manifest))
	if errors.Is(err, backup.ErrExists) {
		there, errRead := c.read(ctx, key)
		if errRead != nil {
			return "", errors.Join(err, errRead)
		}
		if bytes.Equal(there, manifest) {
			return digest, nil
		}
	}
	if err != nil {
		return "", err
	}
	return digest, nil
}
