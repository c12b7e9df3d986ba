package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

const (
	sqlNotInState   = "55000" // object_not_in_prerequisite_state
	labelLimit      = 512     // bytes; the server takes 1024 (MAXPGPATH)
	sidePatience    = 5 * time.Second
	abortPatience   = 30 * time.Second
	abortInsistence = 2 * time.Second // then the backend is told to end
	abortPause      = 20 * time.Millisecond
)

// BackupModeOptions is how backup mode starts.
type BackupModeOptions struct {
	// Label is the free text of backup_label: 1 to 512 printable ASCII
	// characters.
	Label string
	// Fast makes the checkpoint at the start immediate. Without it the
	// checkpoint is spread over checkpoint_completion_target of
	// checkpoint_timeout, so StartBackup takes minutes and disturbs nobody.
	Fast bool
}

// BackupStart is what is known once backup mode has started.
type BackupStart struct {
	StartLSN backup.LSN // recovery needs all WAL from here on
	Timeline uint32     // of StartLSN
	Standby  bool       // the server is in recovery
	PID      int        // of the session's backend
	Began    time.Time  // when the start was asked for, by this host's clock
	Started  time.Time  // when it was done
}

// BackupStop is what the server gave at the end of backup mode.
type BackupStop struct {
	// StopLSN is the end of the backup: no recovery may end before it. It lies
	// in the last WAL file that is needed, or at its end.
	StopLSN   backup.LSN
	LabelFile []byte    // backup_label, byte for byte
	MapFile   []byte    // tablespace_map, byte for byte; empty without tablespaces. 13 does not escape a backslash in it, 14 and later do
	Label     Label     // LabelFile, read
	Time      time.Time // when the answer came, by this host's clock
}

// BackupMode is one session in which the server is in non-exclusive backup
// mode: between start and stop, files may be copied at any time and in any
// order, if the WAL from start to stop is kept (backup.sgml, "Making a Base
// Backup Using the Low Level API"). The end of the session ends backup mode by
// itself, without a label, so nothing stays behind in the server whatever
// happens here. Its methods may be called at the same time; one waits for the
// other.
type BackupMode struct {
	target Target
	label  string
	major  int
	server time.Time // when the postmaster started
	born   time.Time // when the backend did: a process id alone may come again
	start  BackupStart

	mu     sync.Mutex // for the session
	conn   *pgx.Conn
	over   bool // Stop or Abort was called
	gone   bool // and the backend was seen to be gone
	unhook func() bool
}

// StartBackup opens a session of its own, which nothing idle ends, and starts
// non-exclusive backup mode in it: pg_start_backup(label, fast, false) of 13 and
// 14, pg_backup_start of 15 and later. It returns when the checkpoint is done.
//
// ctx covers all of backup mode: when it ends before Stop has returned, the
// session is closed as by Abort. On an error nothing is left in the server.
//
// Refused, with a hint: a role that may not call both functions, wal_level
// minimal, an exclusive backup in progress (13, 14), and a pooler between here
// and the server. Errors of the server are passed on; of a standby they tell
// that the primary's full_page_writes is or was off.
func StartBackup(ctx context.Context, t Target, o BackupModeOptions) (_ *BackupMode, err error) {
	if err := checkLabelText(o.Label); err != nil {
		return nil, err
	}
	conn, err := Connect(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("start backup mode: %w", err)
	}
	b := &BackupMode{target: t, label: o.Label, conn: conn}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start backup mode: %w", err), b.Abort(ctx))
		}
	}()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unhook = context.AfterFunc(ctx, func() { _ = b.Abort(ctx) })
	if err := b.look(ctx); err != nil {
		return nil, err
	}
	b.start.Began = time.Now()
	if err := effect(ctx, "backup.start", func() error { return b.enter(ctx, o.Fast) }); err != nil {
		return nil, err
	}
	b.start.Started = time.Now()
	if err := b.check(ctx); err != nil { // the same session as before?
		return nil, err
	}
	return b, nil
}

// checkLabelText: whatever is not plain text could break the lines of
// backup_label.
func checkLabelText(s string) error {
	odd := func(r rune) bool { return r < ' ' || r > '~' }
	if s == "" || len(s) > labelLimit || strings.ContainsFunc(s, odd) {
		return fmt.Errorf("%w: the label of a backup is 1 to %d printable ASCII characters", backup.ErrUsage, labelLimit)
	}
	return nil
}

// look prepares the session and refuses what could not end well.
func (b *BackupMode) look(ctx context.Context) error {
	// SQL_ASCII: what the server gives at the stop arrives unconverted, also a
	// path in tablespace_map that is no valid text. Keepalives are for TCP; over
	// a socket they mean nothing.
	_, err := b.conn.Exec(ctx, `SELECT set_config(name, value, false) FROM (VALUES
		('client_encoding', 'SQL_ASCII'), ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '6')) s(name, value)`)
	if err != nil {
		return fmt.Errorf("prepare the session: %w", err)
	}
	var walLevel string
	err = b.conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int / 10000, pg_postmaster_start_time(),
			pid, backend_start, pg_is_in_recovery(), current_setting('wal_level')
		FROM pg_stat_activity WHERE pid = pg_backend_pid()`).
		Scan(&b.major, &b.server, &b.start.PID, &b.born, &b.start.Standby, &walLevel)
	if err != nil {
		return fmt.Errorf("look at the session: %w", err)
	}
	// A pooler answers the start packet itself, with a process id of its own.
	if key := int(b.conn.PgConn().PID()); key != b.start.PID {
		return pooled(key, b.start.PID)
	}
	if b.major < oldest {
		return fmt.Errorf("PostgreSQL %d is older than %d: %w", b.major, oldest, backup.ErrUnsupported)
	}
	if walLevel == "minimal" && !b.start.Standby {
		return backup.Hint(errors.New("wal_level is minimal: the WAL does not hold what a backup needs"), "set wal_level = replica and restart the server")
	}
	return b.permitted(ctx)
}

func pooled(a, b int) error {
	return backup.Hint(fmt.Errorf("the session changed from process %d to %d: a connection pooler lies between here and the server", a, b),
		"name the server itself in dsn: its socket, or its own port")
}

// permitted asks for both functions: a role that may only start would lose the
// backup at the end.
func (b *BackupMode) permitted(ctx context.Context) error {
	functions := []string{"pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"}
	if b.major < 15 {
		functions = []string{"pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)"}
	}
	var may bool
	var role, database string
	err := b.conn.QueryRow(ctx, `SELECT bool_and(has_function_privilege('pg_catalog.' || f, 'EXECUTE')), current_user::text, current_database()::text FROM unnest($1::text[]) f`, functions).
		Scan(&may, &role, &database)
	if err != nil {
		return fmt.Errorf("ask for the role's permissions: %w", err)
	}
	if !may {
		return backup.Hint(fmt.Errorf("role %s may not start and stop a backup in database %s", role, database),
			fmt.Sprintf("as a superuser in that database: GRANT EXECUTE ON FUNCTION %s TO %s", strings.Join(functions, ", "), pgx.Identifier{role}.Sanitize()))
	}
	if b.major >= 15 {
		return nil
	}
	var exclusive bool
	if err := b.conn.QueryRow(ctx, `SELECT pg_is_in_backup()`).Scan(&exclusive); err != nil {
		return fmt.Errorf("ask for an exclusive backup: %w", err)
	}
	if exclusive {
		return backup.Hint(fmt.Errorf("an exclusive backup runs, whose backup_label lies in the data directory: %w", backup.ErrInUse),
			"end it with SELECT pg_stop_backup()")
	}
	return nil
}

// enter calls the function that starts backup mode. The checkpoint that it
// made is the last one of the control file, and tells the timeline.
func (b *BackupMode) enter(ctx context.Context, fast bool) error {
	call := `SELECT pg_backup_start($1, $2)::text`
	if b.major < 15 {
		call = `SELECT pg_start_backup($1, $2, false)::text`
	}
	var lsn string
	if err := b.conn.QueryRow(ctx, call, b.label, fast).Scan(&lsn); err != nil {
		return b.explain(ctx, err)
	}
	var err error
	if b.start.StartLSN, err = backup.ParseLSN(lsn); err != nil {
		return err
	}
	var timeline int64
	if err := b.conn.QueryRow(ctx, `SELECT timeline_id::bigint FROM pg_control_checkpoint()`).Scan(&timeline); err != nil {
		return b.explain(ctx, err)
	}
	b.start.Timeline = uint32(timeline)
	return nil
}

// Start tells what was known at the start.
func (b *BackupMode) Start() BackupStart { return b.start }

// Check asks whether the server is still in backup mode, in the same session,
// and a standby still a standby. Call it after the last cut and the thaw: had
// backup mode ended between two cuts, pages could have been written without
// full images in the WAL. Its error wraps ErrVoid and means that the backup is
// void; Abort must follow. If ctx ends during the call, so does the session.
func (b *BackupMode) Check(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := effect(ctx, "backup.check", func() error { return b.check(ctx) }); err != nil {
		return fmt.Errorf("%w: backup mode: %w", backup.ErrVoid, err)
	}
	return nil
}

func (b *BackupMode) check(ctx context.Context) error {
	if b.over {
		return errors.New("it was ended before")
	}
	var pid int
	var standby bool
	if err := b.conn.QueryRow(ctx, `SELECT pg_backend_pid(), pg_is_in_recovery()`).Scan(&pid, &standby); err != nil {
		return b.explain(ctx, err)
	}
	if pid != b.start.PID {
		return pooled(b.start.PID, pid)
	}
	if b.start.Standby && !standby {
		return errors.New("the standby was promoted during the backup")
	}
	return nil
}

// Stop ends backup mode without waiting for the archive: a time-out in that
// wait would lose the label for good (do_pg_backup_stop forgets the backup
// first). It must not be called while a filesystem is frozen, because it writes
// WAL. What the server gives is checked against the start.
//
// An error wraps ErrVoid: the backup is void and the session is closed as by
// Abort. After Stop the session is closed in any case, and a second call is an
// error.
func (b *BackupMode) Stop(ctx context.Context) (BackupStop, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var s BackupStop
	err := effect(ctx, "backup.stop", func() (err error) {
		if err = b.check(ctx); err == nil {
			s, err = b.leave(ctx)
		}
		return err
	})
	if err != nil {
		return BackupStop{}, errors.Join(fmt.Errorf("%w: stop backup mode: %w", backup.ErrVoid, err), b.end(ctx))
	}
	b.over, b.gone = true, true // backup mode is: it ended in the server before the answer
	b.unhook()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sidePatience)
	defer cancel()
	_ = b.conn.Close(ctx) // all that was wanted of it is here
	return s, nil
}

// leave calls the function that stops backup mode.
func (b *BackupMode) leave(ctx context.Context) (s BackupStop, err error) {
	call := `SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(false)`
	if b.major < 15 {
		call = `SELECT lsn::text, labelfile, spcmapfile FROM pg_stop_backup(false, false)`
	}
	var lsn string
	if err := b.conn.QueryRow(ctx, call).Scan(&lsn, &s.LabelFile, &s.MapFile); err != nil {
		return s, b.explain(ctx, err)
	}
	s.Time = time.Now()
	if s.StopLSN, err = backup.ParseLSN(lsn); err != nil {
		return s, err
	}
	if s.Label, err = ParseLabel(s.LabelFile); err != nil {
		return s, err
	}
	l, want := s.Label, b.start
	if l.StartLSN != want.StartLSN || l.Timeline != want.Timeline || l.Standby != want.Standby || l.Text != b.label {
		return s, fmt.Errorf("the label is of another backup: it started at %s on timeline %d as %q, this one at %s on timeline %d as %q",
			l.StartLSN, l.Timeline, l.Text, want.StartLSN, want.Timeline, b.label)
	}
	if s.StopLSN < s.Label.StartLSN {
		return s, fmt.Errorf("the backup ends at %s, before its start %s", s.StopLSN, s.Label.StartLSN)
	}
	return s, nil
}

// Abort closes the session, upon which the server ends backup mode by itself,
// and returns once the backend is gone from the server; after two seconds it
// is told to end. It uses half a minute at most, whether ctx has ended or not.
// After Stop it does nothing. It may be called again: once it returned nil it
// does nothing more. A server that is down has no backup mode.
func (b *BackupMode) Abort(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.end(ctx)
}

func (b *BackupMode) end(ctx context.Context) error {
	b.over = true
	b.unhook()
	if b.gone {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortPatience)
	defer cancel()
	_ = b.conn.Close(ctx) // a broken session is as good
	select {
	case <-b.conn.PgConn().CleanupDone(): // the request to cancel a query was sent
	case <-ctx.Done():
	}
	if err := b.awaitEnd(ctx); err != nil {
		return backup.Hint(fmt.Errorf("abort backup mode: %w", err),
			fmt.Sprintf("see that the server has no process %d any more; else SELECT pg_terminate_backend(%d)", b.start.PID, b.start.PID))
	}
	b.gone = true
	return nil
}

// awaitEnd returns nil once the server has no such backend, or there is no
// server. A server that is starting or stopping is asked again.
func (b *BackupMode) awaitEnd(ctx context.Context) error {
	if b.start.PID == 0 { // nothing was started in it
		return nil
	}
	began := time.Now()
	tick := time.NewTicker(abortPause)
	defer tick.Stop()
	for {
		left, err := b.seeBackend(ctx, time.Since(began) > abortInsistence)
		if err == nil && !left || isDown(err) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err == nil {
				err = errors.New("its backend does not end")
			}
			return fmt.Errorf("process %d: %w", b.start.PID, err)
		}
	}
}

// seeBackend reports whether the backend is still there, and may tell it to
// end. Whoever is listed no more has left backup mode before
// (before_shmem_exit runs ahead of on_shmem_exit).
func (b *BackupMode) seeBackend(ctx context.Context, insist bool) (left bool, err error) {
	conn, err := Connect(ctx, b.target)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close(ctx) }()
	err = conn.QueryRow(ctx, `SELECT count(*) FILTER (WHERE NOT $3 OR pg_terminate_backend(pid)) > 0 FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2`,
		b.start.PID, b.born, insist).Scan(&left)
	return left, err
}

// isDown reports whether nobody listens where the server was.
func isDown(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) || errors.Is(err, backup.ErrNotFound)
}

// explain adds to an error of the session what happened to it and what to do.
func (b *BackupMode) explain(ctx context.Context, err error) error {
	var pg *pgconn.PgError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case b.conn.IsClosed():
		return b.lost(ctx, err)
	case errors.As(err, &pg) && pg.Code == sqlNotInState && b.start.Standby:
		return backup.Hint(err, "on the primary: full_page_writes = on and CHECKPOINT; then, once the standby has replayed it, back up again")
	}
	return err
}

// lost tells a session that was ended from a server that was restarted.
func (b *BackupMode) lost(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(ctx, sidePatience)
	defer cancel()
	var started time.Time
	conn, err2 := Connect(ctx, b.target)
	if err2 == nil {
		err2 = errors.Join(conn.QueryRow(ctx, `SELECT pg_postmaster_start_time()`).Scan(&started), conn.Close(ctx))
	}
	switch {
	case err2 != nil:
		return backup.Hint(fmt.Errorf("the session was lost, and the server cannot be asked why: %w", err), "see that the server runs, and its log")
	case !started.Equal(b.server):
		return backup.Hint(fmt.Errorf("the server was restarted during the backup, at %s: %w", started.Format(time.RFC3339), err), "take a new backup")
	}
	return backup.Hint(fmt.Errorf("the session was ended during the backup: %w", err),
		"see the server's log for process "+fmt.Sprint(b.start.PID)+" (pg_terminate_backend, a time-out, a broken connection) and take a new backup")
}
