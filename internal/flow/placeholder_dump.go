package flow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"

	"cleancut/internal/backup"
)

// CheckDumpOptions stands for that of the dump helper's branch, which takes this
// file's place at the merge.
type CheckDumpOptions struct {
	ID         backup.ID
	Name       string
	Identities []string
	Jobs       int
}

// CheckDump, as above. This one only reads the dump to its end.
func (f *Flow) CheckDump(ctx context.Context, o CheckDumpOptions) (k backup.DumpCheck, err error) {
	k = backup.DumpCheck{Backup: o.ID, Dump: o.Name, Tool: f.Tool, Host: f.Host, Time: time.Now().UTC()}
	r, err := f.Catalog.Dump(ctx, o.ID, o.Name)
	if err != nil {
		return k, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	z, err := zstd.NewReader(r)
	if err != nil {
		return k, err
	}
	defer z.Close()
	b, err := io.ReadAll(z)
	c := backup.Check{Name: "read to its end", Result: backup.Passed}
	if err != nil || !bytes.Contains(b, []byte("-- PostgreSQL database cluster dump complete")) {
		c.Result, err = backup.Failed, fmt.Errorf("dump %s of backup %s: %w", o.Name, o.ID, errors.Join(backup.ErrDamage, err))
	}
	k.Checks = []backup.Check{c}
	return k, err
}
