package drill

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/load"
	"cleancut/internal/wal"
)

// Way is one way to recover an image, and what it must hold then.
type Way struct {
	Recovery string        `json:"recovery"`          // Crash or Archive
	Target   string        `json:"target,omitempty"`  // of recovery by shipped WAL, as --target takes it; "": none is needed
	Promise  *load.Promise `json:"promise,omitempty"` // nil: the rows are not compared
}

// JudgeImage restores a backup into a throwaway copy in that way, compares its
// rows with the promise and runs every check of level full. Damage is in the
// result; the error is for what kept it from being judged.
func JudgeImage(ctx context.Context, f *flow.Flow, id backup.ID, w Way) (v backup.Verdict, found *load.Finding, err error) {
	o := flow.VerifyOptions{ID: id, Level: backup.LevelFull, AllowTorn: true, CrashOnly: w.Recovery == Crash}
	if w.Target != "" {
		if o.Target, err = backup.ParseTarget(w.Target); err != nil {
			return v, nil, err
		}
	}
	o.Look = func(ctx context.Context, r flow.Restored) error {
		if w.Promise == nil {
			return nil
		}
		conn, err := r.Instance.Connect(ctx, "postgres")
		if err != nil {
			return err
		}
		defer conn.Close(context.WithoutCancel(ctx))
		f, err := load.Judge(ctx, conn, *w.Promise)
		if err != nil {
			return err
		}
		found = &f
		if problems := f.Problems(); len(problems) > 0 {
			return errors.New(strings.Join(problems, "; "))
		}
		return nil
	}
	v, err = f.Verify(ctx, o)
	if err != nil && (!errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrLeft) || ctx.Err() != nil) {
		return v, found, err
	}
	return v, found, nil
}

// The files of a kept image set beside its images.
const (
	manifestFile  = "manifest.json"
	waysFile      = "ways.json"
	promiseFile   = "promise.json" // of earlier drills: what crash recovery must give
	catalogFolder = "catalog"      // the WAL that the ways need
)

func imageFile(member int) string { return fmt.Sprintf("member-%d.img", member) }

// keepWays writes all of a kept image set but the images.
func keepWays(ctx context.Context, from *catalog.Catalog, m backup.Manifest, ways []Way, dir string) error {
	manifest, err := backup.EncodeManifest(m)
	if err != nil {
		return err
	}
	said, err := json.Marshal(ways)
	if err != nil {
		return fmt.Errorf("keep images: %w", err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, manifestFile), manifest, 0o644), os.WriteFile(filepath.Join(dir, waysFile), said, 0o644)); err != nil {
		return fmt.Errorf("keep images: %w", err)
	}
	to := catalog.New(catalog.NewDir(filepath.Join(dir, catalogFolder)), "drill")
	if m.Bracket != nil {
		return copyWAL(ctx, from.BackupWAL(m.ID), to.BackupWAL(m.ID), 0, ^uint64(0), m.Server.WALSegmentSize)
	}
	for _, w := range ways {
		if w.Target == "" {
			continue
		}
		until, err := backup.ParseTarget(w.Target)
		if err != nil {
			return err
		}
		size := m.Server.WALSegmentSize
		return copyShipped(ctx, from.WAL(), to.WAL(), wal.At(0, m.Cut.FlushLSN, size).Number, wal.At(0, until.LSN, size).Number)
	}
	return nil
}

// takeWAL puts the WAL of a kept image set where recovery looks for it.
func takeWAL(ctx context.Context, dir string, to *catalog.Catalog, m backup.Manifest) error {
	from := catalog.New(catalog.NewDir(filepath.Join(dir, catalogFolder)), "drill")
	if m.Bracket != nil {
		return copyWAL(ctx, from.BackupWAL(m.ID), to.BackupWAL(m.ID), 0, ^uint64(0), m.Server.WALSegmentSize)
	}
	if _, err := from.WAL().System(ctx); errors.Is(err, backup.ErrNotFound) {
		return nil // no way needs any
	}
	return copyShipped(ctx, from.WAL(), to.WAL(), 0, ^uint64(0))
}

// copyShipped copies WAL that was shipped, with the record of whose it is.
func copyShipped(ctx context.Context, from, to catalog.WAL, first, last uint64) error {
	system, err := from.System(ctx)
	if err != nil {
		return err
	}
	if err := to.Claim(ctx, system); err != nil {
		return err
	}
	return copyWAL(ctx, from, to, first, last, system.SegmentSize)
}

// copyWAL copies the segments with those numbers.
func copyWAL(ctx context.Context, from, to catalog.WAL, first, last uint64, size wal.Size) error {
	files, err := from.List(ctx)
	if err != nil {
		return err
	}
	for _, f := range files {
		s, err := f.File.Segment(size)
		if err != nil || f.File.Kind != wal.Whole || s.Number < first || s.Number > last {
			continue
		}
		var content bytes.Buffer
		if err := from.Get(ctx, f.File, wal.System{}, &content); err != nil {
			return err
		}
		if err := to.Put(ctx, f.File, bytes.NewReader(content.Bytes()), int64(content.Len())); err != nil {
			return err
		}
	}
	return nil
}

// readKept reads the manifest and the ways. An early drill kept a promise, or
// not even that, and no WAL: then the image alone is all there is.
func readKept(dir string) (m backup.Manifest, ways []Way, err error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return m, nil, backup.Hint(fmt.Errorf("%w: kept images: %w", backup.ErrUsage, err), "name a folder below images/ of a drill's output folder")
	}
	if m, err = backup.DecodeManifest(b); err != nil {
		return m, nil, err
	}
	if b, err = os.ReadFile(filepath.Join(dir, waysFile)); err == nil {
		err = json.Unmarshal(b, &ways)
	} else if errors.Is(err, os.ErrNotExist) {
		way := Way{Recovery: Crash}
		if b, err = os.ReadFile(filepath.Join(dir, promiseFile)); err == nil && m.Bracket == nil { // a bracketed one's was of its end
			err = json.Unmarshal(b, &way.Promise)
		} else if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		ways = []Way{way}
	}
	if err != nil {
		return m, nil, fmt.Errorf("kept images: %s: %w", dir, err)
	}
	return m, ways, nil
}
