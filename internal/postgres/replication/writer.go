package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/wal"
)

// writer puts WAL into segments of a folder.
type writer struct {
	dir     string
	system  wal.System
	file    *os.File // NAME.partial of segment at; nil: none is open
	at      wal.Segment
	written backup.LSN // where the next byte goes
	durable backup.LSN
}

// start sets the position to the beginning of a segment.
func (w *writer) start(g wal.Segment) {
	w.close()
	w.at, w.written = g, g.Start(w.system.SegmentSize)
	w.durable = w.written
}

func (w *writer) close() {
	if w.file != nil {
		_ = w.file.Close() // what was not synced does not count
		w.file = nil
	}
}

// path returns the path of a segment, and that of its partial.
func (w *writer) path(g wal.Segment) (whole, partial string) {
	whole = filepath.Join(w.dir, g.File(w.system.SegmentSize).String())
	return whole, whole + ".partial"
}

// write writes what begins at lsn, up to the end of the segment, and returns
// the rest. done: the segment is whole and durable under its name.
func (w *writer) write(ctx context.Context, lsn backup.LSN, data []byte) (rest []byte, done bool, err error) {
	if lsn != w.written {
		return nil, false, fmt.Errorf("the server sent WAL from %s instead of %s", lsn, w.written)
	}
	size := w.system.SegmentSize
	_, partial := w.path(w.at)
	if w.file == nil {
		// Not truncated: it may hold more than what will come now.
		if w.file, err = os.OpenFile(partial, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return nil, false, fmt.Errorf("receive WAL: %w", err)
		}
		if err := syncFolder(w.dir); err != nil {
			return nil, false, err
		}
	}
	n := min(len(data), int(w.at.End(size)-w.written))
	if _, err := w.file.WriteAt(data[:n], int64(w.written-w.at.Start(size))); err != nil {
		return nil, false, fmt.Errorf("receive WAL: %w", err)
	}
	w.written += backup.LSN(n)
	if w.written < w.at.End(size) {
		return nil, false, nil
	}
	return data[n:], true, w.finish(ctx)
}

// sync makes what was written durable.
func (w *writer) sync(ctx context.Context) error {
	if w.file == nil || w.durable == w.written {
		return nil
	}
	if err := errors.Join(fault.Point(ctx, "replication.sync"), w.file.Sync()); err != nil {
		return fmt.Errorf("receive WAL: %w", err)
	}
	w.durable = w.written
	return fault.Point(ctx, "replication.sync done")
}

// finish gives the full segment its name and goes on to the next.
func (w *writer) finish(ctx context.Context) error {
	head := make([]byte, wal.HeaderSize)
	if _, err := w.file.ReadAt(head, 0); err != nil {
		return fmt.Errorf("receive WAL: %w", err)
	}
	h, err := wal.ParseHeader(head)
	if err == nil {
		err = h.Proves(w.at.File(w.system.SegmentSize), w.system)
	}
	if err != nil {
		return fmt.Errorf("the server sent what is not segment %s: %w", w.at.File(w.system.SegmentSize), err)
	}
	if err := w.sync(ctx); err != nil {
		return err
	}
	whole, partial := w.path(w.at)
	if err := fault.Point(ctx, "replication.rename"); err != nil {
		return err
	}
	if err := errors.Join(os.Rename(partial, whole), syncFolder(w.dir)); err != nil {
		return fmt.Errorf("receive WAL: %w", err)
	}
	w.start(w.at.Next())
	return fault.Point(ctx, "replication.rename done")
}

// writeWhole writes a file of that size under its name, durable, whole or not
// at all; what content does not fill is zeros. It replaces what is there.
func writeWhole(path string, size int64, content io.Reader) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Truncate(size), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
