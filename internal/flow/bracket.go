package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

// bracketed takes a cut in backup mode and keeps the WAL from its start to its
// end with the backup:
//
//	WAL received → backup mode on → cut → still on? → pg_control of a standby → backup mode off → WAL to the end → catalog
//
// The receiver begins first, so that nothing of the window can be recycled
// before it was received. On an error the server is out of backup mode and the
// slot is gone; what of the WAL lies in the catalog goes with the backup.
func (f *Flow) bracketed(ctx context.Context, o BackupOptions, m *backup.Manifest, take func() error) (err error) {
	dir := f.captureDir(m.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("folder for received WAL: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	f.tell("wal", "receiving")
	capture, err := replication.StartCapture(ctx, o.Target, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, capture.Stop()) }()
	f.tell("backup mode", "checkpoint")
	mode, err := postgres.StartBackup(ctx, o.Target, postgres.BackupModeOptions{Label: "cleancut " + string(m.ID), Fast: o.FastCheckpoint})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mode.Abort(ctx)) }()
	start := mode.Start()
	b := &backup.Bracket{StartLSN: start.StartLSN, Timeline: start.Timeline, Started: start.Began}
	if err := take(); err != nil {
		if lost := mode.Check(ctx); lost != nil && ctx.Err() == nil { // it says why, if the server or the session was lost
			err = fmt.Errorf("%w; %w", lost, err)
		}
		return err
	}
	if err := mode.Check(ctx); err != nil {
		return err
	}
	if start.Standby {
		var control postgres.Control
		if b.Control, control, err = postgres.ReadLiveControl(filepath.Join(m.Server.DataDirectory, "global", "pg_control")); err != nil {
			return err
		}
		if control.State != postgres.ControlInArchiveRecovery {
			return fmt.Errorf("the standby left recovery during the backup (its pg_control says %s): %w", control.State, backup.ErrVoid)
		}
		b.End = backup.LSN(control.MinRecoveryLSN)
	}
	b.Stopping = time.Now().UTC()
	stop, err := mode.Stop(ctx)
	if err != nil {
		return err
	}
	b.Stopped = time.Now().UTC()
	b.StopLSN, b.Label, b.Map = stop.StopLSN, stop.LabelFile, stop.MapFile
	if !start.Standby {
		b.End = b.StopLSN
	}
	f.tell("wal", "up to "+b.End.String())
	if err := capture.Until(ctx, b.End); err != nil {
		return err
	}
	if b.WAL, err = f.keepWAL(ctx, m, b, dir); err != nil {
		return err
	}
	m.Bracket, m.Server.Timeline, m.Cut.FlushLSN = b, b.Timeline, b.End
	return nil
}

// captureDir is where WAL is received to during a bracketed backup.
func (f *Flow) captureDir(id backup.ID) string {
	return filepath.Join(f.State.Path(), "capture-"+string(id))
}

// keepWAL stores the segments from the bracket's start to its end.
func (f *Flow) keepWAL(ctx context.Context, m *backup.Manifest, b *backup.Bracket, dir string) (names []string, err error) {
	size := m.Server.WALSegmentSize
	keep := f.Catalog.BackupWAL(m.ID)
	last := wal.At(wal.Timeline(b.Timeline), b.End-1, size)
	for s := wal.At(wal.Timeline(b.Timeline), b.StartLSN, size); s.Number <= last.Number; s = s.Next() {
		file := s.File(size)
		content, err := os.Open(filepath.Join(dir, file.String()))
		if err != nil {
			return nil, fmt.Errorf("received WAL: %w", err)
		}
		if err := errors.Join(keep.Put(ctx, file, content, int64(size)), content.Close()); err != nil {
			return nil, err
		}
		names = append(names, file.String())
	}
	return names, nil
}

// checkKeptWAL refuses a bracketed backup of which WAL is missing in the
// catalog, before anything is made.
func (f *Flow) checkKeptWAL(ctx context.Context, m backup.Manifest) error {
	if m.Bracket == nil {
		return nil
	}
	kept, err := f.Catalog.BackupWAL(m.ID).List(ctx)
	if err != nil {
		return err
	}
	for _, name := range m.Bracket.WAL {
		if !slices.ContainsFunc(kept, func(w wal.Stored) bool { return w.File.String() == name }) {
			return backup.Hint(fmt.Errorf("backup %s was taken in backup mode, and %s of the WAL that was kept with it is not in the catalog: %w", m.ID, name, backup.ErrIncomplete),
				"without it the image is not consistent and is not started; `catalog rebuild` cannot bring it back. Take another backup: see `cleancut list`")
		}
	}
	return nil
}

// segment opens a file of the WAL that lies with a bracketed backup. What is
// damaged or of another cluster ends the reading with an error.
func (f *Flow) segment(m backup.Manifest) func(ctx context.Context, name string) (io.ReadCloser, error) {
	return func(ctx context.Context, name string) (io.ReadCloser, error) {
		file, err := wal.ParseFile(name)
		if err != nil {
			return nil, err
		}
		r, w := io.Pipe()
		go func() {
			err := f.Catalog.BackupWAL(m.ID).Get(ctx, file, wal.System{Identifier: m.Server.SystemIdentifier, SegmentSize: m.Server.WALSegmentSize}, w)
			_ = w.CloseWithError(err) // always nil
		}()
		return r, nil
	}
}
