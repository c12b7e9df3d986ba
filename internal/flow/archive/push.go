package archive

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/wal"
)

// maxText is far above any history or backup label file.
const maxText = 1 << 20

// Push stores the file at path, which PostgreSQL hands to archive_command,
// under its own name. system is that of the server, zero if it is not known.
// It is stored already: nil. backup.ErrExists: with other content.
// backup.ErrNotOurs: the catalog keeps another system's WAL under this name.
// backup.ErrDamage: the file is not what its name says, or what is stored is
// damaged. After nil it is durable in the catalog.
func Push(ctx context.Context, to catalog.WAL, path string, system wal.System) error {
	return push(ctx, to, path, system, to.Claim)
}

// push asks claim for leave to put WAL of a system into the catalog.
func push(ctx context.Context, to catalog.WAL, path string, system wal.System, claim func(context.Context, wal.System) error) error {
	name, err := wal.ParseFile(filepath.Base(path))
	if err != nil {
		return fmt.Errorf("push WAL: %w", err)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("push WAL: %w", err)
	}
	defer func() { _ = f.Close() }() // it is only read
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("push WAL: %w", err)
	}
	of, err := examine(name, f, info.Size(), system)
	if err != nil {
		return backup.Hint(fmt.Errorf("push %s: %w", path, err), "the server's pg_wal holds what it cannot have written: see its log and its disk")
	}
	if of != (wal.System{}) {
		if err := claim(ctx, of); err != nil {
			return fmt.Errorf("push %s: %w", path, err)
		}
	}
	return to.Put(ctx, name, f, info.Size())
}

// examine proves that a file is what its name says and returns whose it is.
func examine(name wal.File, f io.ReaderAt, size int64, system wal.System) (wal.System, error) {
	if name.Kind == wal.Whole || name.Kind == wal.Partial {
		head := make([]byte, wal.HeaderSize)
		n, err := f.ReadAt(head, 0)
		if err != nil && err != io.EOF {
			return system, err
		}
		h, err := wal.ParseHeader(head[:n])
		if err == nil {
			err = h.Proves(name, system)
		}
		if err == nil && size != int64(h.System.SegmentSize) {
			err = fmt.Errorf("%w: a segment of %d bytes instead of %d", backup.ErrDamage, size, int64(h.System.SegmentSize))
		}
		return h.System, err
	}
	if size > maxText {
		return system, fmt.Errorf("%w: it has %d bytes", backup.ErrDamage, size)
	}
	text := make([]byte, size)
	if _, err := f.ReadAt(text, 0); err != nil && err != io.EOF {
		return system, err
	}
	if name.Kind == wal.Journal {
		if _, err := wal.ParseHistory(name.Timeline, text); err != nil {
			return system, err
		}
	}
	return system, nil
}
