package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/bench"
	"cleancut/internal/evidence"
)

// sizes measures backups and restores of databases of each size, at rest and
// without a limit: first on a volume as it was made, then on the same volume
// aged.
func (o options) sizes(ctx context.Context, d *evidence.Diary) error {
	for _, want := range o.Sizes {
		if d.HasSize(want, false) && d.HasSize(want, true) {
			continue
		}
		if err := o.size(ctx, d, want); err != nil {
			return fmt.Errorf("database of %s: %w", want, err)
		}
	}
	return nil
}

func (o options) size(ctx context.Context, d *evidence.Diary, want backup.Bytes) (err error) {
	say("database of %s", want)
	s, err := o.newSite(ctx, 2*want+backup.Bytes(o.Extents)*6<<10+4<<30, []string{"autovacuum = off"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.undo.End(ctx)) }()
	s.undo.Later(s.server.Stop)
	if err := s.server.Start(ctx); err != nil {
		return err
	}
	empty, err := s.databases(ctx)
	if err != nil {
		return err
	}
	// Seven rows of 1,150 bytes, of which some 1,130 are text, fill a page of
	// 8 KiB; they are below the size from which PostgreSQL compresses.
	rows := max(0, want-empty) / 8192 * 7
	if err := s.exec(ctx, "CREATE TABLE filler (n bigint, filler text)", fmt.Sprintf("INSERT INTO filler SELECT g, repeat(md5(g::text), 35) FROM generate_series(1, %d) g", rows)); err != nil {
		return err
	}
	for _, aged := range []bool{false, true} {
		if aged {
			if err := bench.Age(s.mount, s.image, filepath.Join(s.pool, "aged.img"), o.Extents); err != nil {
				return err
			}
		}
		if d.HasSize(want, aged) {
			continue
		}
		r, err := s.timeBackups(ctx)
		if err != nil {
			return err
		}
		r.Want, r.Aged = want, aged
		if err := d.AddSize(r); err != nil {
			return err
		}
		say("  %s in %d extents: backups %.2f s, restores %.2f s", r.Database, r.Extents, r.Backups, r.Restores)
	}
	return nil
}

// timeBackups times backups and then restores of the last one.
func (s *site) timeBackups(ctx context.Context) (r evidence.Size, err error) {
	if err := errors.Join(s.exec(ctx, "CHECKPOINT"), s.sync()); err != nil {
		return r, err
	}
	if r.Database, err = s.databases(ctx); err != nil {
		return r, err
	}
	if r.Extents, err = bench.Extents(s.image); err != nil {
		return r, err
	}
	var m backup.Manifest
	for i := range s.Conditions.Backups + 1 {
		began := time.Now()
		if err := s.answer(ctx, &m, "backup", "--mode", "freeze", "--deadline", "2m"); err != nil {
			return r, err
		}
		if i > 0 { // what was left to write back is not the backup's
			r.Backups, r.Frozen = append(r.Backups, time.Since(began).Seconds()), append(r.Frozen, m.Cut.FreezeMS)
		}
	}
	for range s.Conditions.Restores {
		root := filepath.Join(s.dir, "copy")
		var c backup.Copy
		if err := s.answer(ctx, &c, "restore", string(m.ID), "--to", root); err != nil {
			return r, err
		}
		r.Restores = append(r.Restores, c.Answered)
		if err := s.answer(ctx, nil, "restore", "--undo", root); err != nil {
			return r, err
		}
	}
	return r, nil
}
