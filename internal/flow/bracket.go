package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
// catalog.
func (f *Flow) checkKeptWAL(ctx context.Context, m backup.Manifest) error {
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

// proveKeptWAL reads the WAL of a bracketed backup with pg_waldump, from the
// start of backup mode to its end, before anything is made: every record must
// be whole, and of a primary there must be the one that ends this backup
// (XLOG_BACKUP_END with its start). backup.ErrDamage: it is not so;
// backup.ErrIncomplete: some of it is missing.
func (f *Flow) proveKeptWAL(ctx context.Context, m backup.Manifest, inst postgres.Installation) error {
	b := m.Bracket
	if b == nil {
		return nil
	}
	if err := f.checkKeptWAL(ctx, m); err != nil {
		return err
	}
	tool, err := inst.Tool(ctx, "pg_waldump")
	if err == nil {
		err = f.roomFor(int64(len(b.WAL)) * int64(m.Server.WALSegmentSize))
	}
	if err != nil {
		f.Log.Warn("the WAL of backup mode is not read before the copy is made: recovery itself will find it whole or not", "reason", err)
		return nil
	}
	f.tell("wal", "reading that of backup mode")
	dir, err := f.walDumpFolder()
	if err != nil {
		return err
	}
	defer closeWALDump(dir)
	open := f.segment(m)
	for _, name := range b.WAL {
		if err := copyTo(ctx, filepath.Join(dir.Name(), name), name, open); err != nil {
			return fmt.Errorf("the WAL that was kept with backup %s: %w", m.ID, err)
		}
	}
	cmd := exec.CommandContext(ctx, tool, "--path="+dir.Name(), "--timeline="+strconv.FormatUint(uint64(b.Timeline), 10),
		"--start="+b.StartLSN.String(), "--end="+b.End.String(), "--rmgr=XLOG") // all records are read, those of XLOG printed
	cmd.Env = []string{"LC_ALL=C"}
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil && !b.Standby() && !strings.Contains(string(out), "desc: BACKUP_END "+b.StartLSN.String()) {
		err = errors.New("the record that ends the backup is not in it")
	}
	if err != nil {
		return backup.Hint(fmt.Errorf("backup %s: the WAL of backup mode, from %s to %s, is not whole: %w: %w: %s", m.ID, b.StartLSN, b.End, backup.ErrDamage, err, strings.Join(strings.Fields(said.String()), " ")),
			"take another backup; see `cleancut list` for those that are sound")
	}
	return nil
}

// roomFor demands that the state folder's filesystem keeps as much again free
// when so many bytes lie there for a moment.
func (f *Flow) roomFor(bytes int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(f.State.Path(), &fs); err != nil {
		return fmt.Errorf("free space of %s: %w", f.State.Path(), err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < 2*bytes {
		return fmt.Errorf("%s has %s free, and the WAL has %s", f.State.Path(), backup.Bytes(free), backup.Bytes(bytes))
	}
	return nil
}

// copyTo writes what open gives into a new file.
func copyTo(ctx context.Context, path, name string, open func(ctx context.Context, name string) (io.ReadCloser, error)) error {
	from, err := open(ctx, name)
	if err != nil {
		return err
	}
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = io.Copy(to, from)
		err = errors.Join(err, to.Close())
	}
	return errors.Join(err, from.Close())
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
