package postgres

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

const (
	maskLimit    = 64 << 20 // bytes of one file: more is a dump that was named by mistake
	maskPatience = time.Minute
	maskTail     = 4 << 10 // bytes kept of what psql says

	sqlNotAuthorized = "28000"
	hbaName          = "pg_hba.conf"
)

// MaskOptions says what makes a copy fit to be given away.
type MaskOptions struct {
	// Files are SQL scripts of psql, run in this order: FILE in database
	// postgres, DATABASE:FILE in another one. What stands before the first colon
	// names a database unless it holds a slash.
	Files []string
	// KeepPasswords leaves the passwords of roles as they are in production.
	KeepPasswords bool
	Log           *slog.Logger
}

// mask is one script.
type mask struct{ database, path string }

func parseMask(spec string) mask {
	if database, path, ok := strings.Cut(spec, ":"); ok && !strings.Contains(database, "/") {
		return mask{database, path}
	}
	return mask{"postgres", spec}
}

func (m mask) open() (*os.File, error) {
	if m.database == "" || m.path == "" {
		return nil, errors.New("want FILE or DATABASE:FILE")
	}
	f, err := os.OpenFile(m.path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a fifo must not hold us up
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is no regular file", m.path)
	case info.Size() == 0:
		err = fmt.Errorf("%s is empty", m.path)
	case info.Size() > maskLimit:
		err = fmt.Errorf("%s has %s, more than %s", m.path, backup.Bytes(info.Size()), backup.Bytes(maskLimit))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// CheckMask looks at the scripts of MaskOptions before anything is made: each
// is there, a regular file that can be read, not empty and not larger than
// 64 MiB. The error wraps backup.ErrUsage.
func CheckMask(files []string) error {
	for _, spec := range files {
		f, err := parseMask(spec).open()
		if err != nil {
			return fmt.Errorf("%w: mask %q: %w", backup.ErrUsage, spec, err)
		}
		_ = f.Close() // it was only read
	}
	return nil
}

// Mask makes a running copy fit to be given away, while nobody else can
// connect to it. In this order:
//
//   - the copy's pg_hba.conf lets in a single role, which is made for this, is a
//     superuser and has a name that cannot be guessed; all other sessions are
//     ended, also those that are still logging in;
//   - prepared transactions are rolled back: they hold rows that no script sees;
//   - every role's password is set to NULL, unless kept. Over TCP nobody can log
//     in with a password then, until somebody sets one; a script may;
//   - the scripts run, each in a psql of its own, statement by statement: the
//     first error ends it. current_user is the copy's superuser;
//   - where there are scripts, WAL from before is removed from pg_wal, which holds
//     rows as they were. It takes as long as writing as much as pg_wal holds;
//   - pg_hba.conf is put back as it was and the role is dropped.
//
// What a script changed stays in its table's files as dead rows until the
// script itself rewrites them (VACUUM FULL); pageinspect shows them to a
// superuser.
//
// On any error, and when ctx ends, the copy stays locked and is in an unknown
// state: it must be destroyed. Mask then refuses it (ErrInUse). After success it
// may be called again. Without scripts and with passwords kept it does nothing.
func (i *Instance) Mask(ctx context.Context, o MaskOptions) error {
	if len(o.Files) == 0 && o.KeepPasswords {
		return nil
	}
	if err := CheckMask(o.Files); err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("mask the copy in %s: %w", i.Root, err) }
	if _, err := i.Installation.Tool(ctx, "psql"); err != nil {
		return fail(err)
	}
	l, err := i.lock(ctx)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = l.conn.Close(context.WithoutCancel(ctx)) }()
	steps := []struct {
		name string
		do   func(context.Context) error
		skip bool
	}{
		{"mask.prepared", l.endPrepared, false},
		{"mask.passwords", l.resetPasswords, o.KeepPasswords},
		{"mask.files", func(ctx context.Context) error { return l.runAll(ctx, o) }, false},
		{"mask.wal", l.forgetWAL, len(o.Files) == 0},
		{"mask.unlock", l.unlock, false},
	}
	for _, s := range steps {
		if s.skip {
			continue
		}
		if err := effect(ctx, s.name, func() error { return s.do(ctx) }); err != nil {
			return fail(err)
		}
	}
	return nil
}

// locked is an instance that only one role may connect to.
type locked struct {
	*Instance
	role   string
	opened []byte // content of pg_hba.conf that lets others in
	conn   *pgx.Conn
}

// lock returns once no session is there but its own, and none can come.
func (i *Instance) lock(ctx context.Context) (_ *locked, err error) {
	l := &locked{Instance: i, role: "cleancut_mask_" + strings.ToLower(rand.Text())}
	if l.opened, err = os.ReadFile(filepath.Join(i.SocketDir, hbaName)); err != nil {
		return nil, err
	}
	first, err := i.Connect(ctx, "postgres")
	if refused(err) {
		return nil, backup.Hint(fmt.Errorf("it lets nobody in, as after a mask that failed: %w", backup.ErrInUse), "destroy this copy and make another one")
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(l.admitOne(ctx, first), first.Close(context.WithoutCancel(ctx))); err != nil {
		return nil, err
	}
	if err := i.until(ctx, "the copy refuses its superuser", func() (bool, error) {
		conn, err := i.Connect(ctx, "postgres")
		if err == nil {
			return false, conn.Close(ctx)
		}
		if refused(err) {
			return true, nil
		}
		return false, err
	}); err != nil {
		return nil, err
	}
	if l.conn, err = l.session(ctx, "postgres"); err != nil {
		return nil, err
	}
	if err := i.until(ctx, "all other sessions end", func() (bool, error) { return l.alone(ctx) }); err != nil {
		return nil, errors.Join(err, l.conn.Close(context.WithoutCancel(ctx)))
	}
	return l, nil
}

// admitOne makes the role and the rules that let in nobody but it.
func (l *locked) admitOne(ctx context.Context, conn *pgx.Conn) error {
	if err := guard(ctx, conn); err != nil {
		return err
	}
	var recovering bool
	if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&recovering); err != nil {
		return err
	}
	if recovering {
		return fmt.Errorf("it is a standby, which takes no changes: %w", backup.ErrUnsupported)
	}
	err := effect(ctx, "mask.role", func() error {
		_, err := conn.Exec(ctx, "CREATE ROLE "+quoteName(l.role)+" LOGIN SUPERUSER")
		return err
	})
	if err != nil {
		return err
	}
	return effect(ctx, "mask.lock", func() error {
		return l.reload(ctx, conn, "# Written by cleancut while the copy is masked.\nlocal all "+l.role+" trust\n")
	})
}

// refused: no line of pg_hba.conf lets the role in.
func refused(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == sqlNotAuthorized
}

// reload replaces the copy's pg_hba.conf and has the server read it.
func (i *Instance) reload(ctx context.Context, conn *pgx.Conn, hba string) error {
	r, err := os.OpenRoot(i.SocketDir)
	if err != nil {
		return err
	}
	if err := errors.Join(writeOwned(r, hbaName, hba, int(i.UID), int(i.GID)), r.Close()); err != nil {
		return err
	}
	_, err = conn.Exec(ctx, "SELECT pg_reload_conf()")
	return err
}

// until asks is again and again until it is so; after a minute it gives up.
func (i *Instance) until(ctx context.Context, what string, is func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, maskPatience, fmt.Errorf("in vain for %s", maskPatience))
	defer cancel()
	tick := time.NewTicker(startPause)
	defer tick.Stop()
	for {
		done, err := is()
		if done || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, context.Cause(ctx))
		}
	}
}

// session connects as the only role that may.
func (l *locked) session(ctx context.Context, database string) (*pgx.Conn, error) {
	as := *l.Instance
	as.Superuser = l.role
	conn, err := as.Connect(ctx, database)
	if err != nil {
		return nil, err
	}
	if err := guard(ctx, conn); err != nil {
		return nil, errors.Join(err, conn.Close(context.WithoutCancel(ctx)))
	}
	return conn, nil
}

// alone ends what other sessions it finds and reports whether there was none.
// A connection that has not said yet who it is was let in under the old rules
// and is in no view: it is seen as a process of the server that the view lacks.
func (l *locked) alone(ctx context.Context) (bool, error) {
	processes, err := postgresBelow(l.Root)
	if err != nil {
		return false, err
	}
	rows, err := l.conn.Query(ctx, `SELECT pid, usesysid IS NOT NULL FROM pg_stat_activity WHERE pid <> pg_backend_pid()`)
	if err != nil {
		return false, err
	}
	known := map[int]bool{l.PID: true, int(l.conn.PgConn().PID()): true}
	var pid int
	var session bool
	var sessions []int
	if _, err := pgx.ForEachRow(rows, []any{&pid, &session}, func() error {
		known[pid] = true
		if session {
			sessions = append(sessions, pid)
		}
		return nil
	}); err != nil {
		return false, err
	}
	if _, err := l.conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) pid`, sessions); err != nil {
		return false, err
	}
	hidden := 0
	for _, pid := range processes {
		if known[pid] || isCollector(pid) {
			continue
		}
		hidden++
		if h, err := hold(pid); err == nil {
			if concerns(pid, l.Root) && isPostgres(pid) {
				err = h.signal(unix.SIGTERM)
			}
			h.close()
			if err != nil {
				return false, err
			}
		}
	}
	return len(sessions)+hidden == 0, nil
}

// isCollector: the statistics collector of 13 and 14 is in no view and takes
// no connections.
func isCollector(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && bytes.Contains(b, []byte("stats collector"))
}

// endPrepared rolls prepared transactions back, each in its own database: rows
// that one of them holds would come out of it as they were.
func (l *locked) endPrepared(ctx context.Context) error {
	rows, err := l.conn.Query(ctx, `SELECT database::text, gid FROM pg_prepared_xacts`)
	if err != nil {
		return err
	}
	type prepared struct{ Database, GID string }
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[prepared])
	if err != nil {
		return err
	}
	for _, p := range found {
		conn, err := l.session(ctx, p.Database)
		if err != nil {
			return err
		}
		_, err = conn.Exec(ctx, "ROLLBACK PREPARED '"+strings.ReplaceAll(p.GID, "'", "''")+"'")
		if err := errors.Join(err, conn.Close(context.WithoutCancel(ctx))); err != nil {
			return fmt.Errorf("roll prepared transaction %q back: %w", p.GID, err)
		}
	}
	return nil
}

// resetPasswords also rewrites pg_authid, so that the old ones are gone from it.
func (l *locked) resetPasswords(ctx context.Context) error {
	rows, err := l.conn.Query(ctx, `SELECT rolname::text FROM pg_authid WHERE rolpassword IS NOT NULL`)
	if err != nil {
		return err
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, r := range roles {
		if _, err := l.conn.Exec(ctx, "ALTER ROLE "+quoteName(r)+" PASSWORD NULL"); err != nil {
			return fmt.Errorf("reset the password of role %q: %w", r, err)
		}
	}
	_, err = l.conn.Exec(ctx, "VACUUM FULL pg_authid")
	return err
}

func (l *locked) runAll(ctx context.Context, o MaskOptions) error {
	for _, spec := range o.Files {
		m, began := parseMask(spec), time.Now()
		if err := l.run(ctx, m); err != nil {
			return err
		}
		o.Log.Debug("masked", "file", m.path, "database", m.database, "seconds", time.Since(began).Seconds())
	}
	return nil
}

// run feeds one script to psql. Nothing is wrapped in a transaction: a script
// that fails ends with the copy, \connect would lose the transaction in
// silence, and VACUUM could not run in it. One that leaves its own transaction
// open has changed nothing, which psql takes for success: so it is asked.
func (l *locked) run(ctx context.Context, m mask) error {
	f, err := m.open()
	if err != nil {
		return fmt.Errorf("%w: mask %s: %w", backup.ErrUsage, m.path, err)
	}
	defer func() { _ = f.Close() }()
	cmd := l.Command(ctx, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", "-c", stillOpen)
	// The server sees our role; the script's objects shall not belong to it.
	cmd.Env = append(cmd.Env, "PGUSER="+l.role, "PGDATABASE="+m.database, "PGCLIENTENCODING=UTF8", "PGOPTIONS=-c role="+quoteOption(l.Superuser))
	said := &tail{}
	cmd.Stdin, cmd.Stderr = f, said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("a script in database %s: %w: %s", m.database, err, said.about(m.path))
	}
	return nil
}

// stillOpen fails in a transaction that has written something.
const stillOpen = `DO $$BEGIN IF pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL THEN
RAISE 'the script ends inside a transaction that it did not commit'; END IF; END$$`

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = append(t.b[:0], t.b[max(0, len(t.b)-maskTail):]...)
	return len(p), nil
}

// about is psql's message in one line, with the line of the script.
func (t *tail) about(path string) string {
	text := strings.TrimSpace(string(t.b))
	if at := max(strings.LastIndex(text, "\npsql:"), strings.LastIndex(text, "\nERROR:")); at >= 0 {
		text = text[at+1:]
	}
	text, _, _ = strings.Cut(text, "\nLINE ") // the statement itself, which may hold data
	text = strings.ReplaceAll(text, "psql:<stdin>:", path+", line ")
	return cmp.Or(strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' }), "; "), "psql said nothing")
}

// forgetWAL removes all segments that were there, also those that were set
// aside for later with old records still in them (PreallocXlogFiles,
// InstallXLogFileSegment): it switches from one to the next, which fills the
// rest of it with zeros, and lets checkpoints delete instead of recycle.
func (l *locked) forgetWAL(ctx context.Context) error {
	if _, err := l.conn.Exec(ctx, "ALTER SYSTEM SET wal_recycle = off"); err != nil {
		return err
	}
	if _, err := l.conn.Exec(ctx, "SELECT pg_reload_conf()"); err != nil {
		return err
	}
	var first, last, now string // as files are named, without the timeline
	if err := l.conn.QueryRow(ctx, segments).Scan(&first, &last); err != nil {
		return err
	}
	for first <= last {
		if _, err := l.conn.Exec(ctx, "SELECT pg_switch_wal()"); err != nil {
			return err
		}
		if _, err := l.conn.Exec(ctx, "SELECT pg_logical_emit_message(false, 'cleancut', '')"); err != nil { // so that there is something to switch from
			return err
		}
		if err := l.conn.QueryRow(ctx, "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 9)").Scan(&now); err != nil {
			return err
		}
		if now <= last {
			continue
		}
		if _, err := l.conn.Exec(ctx, "CHECKPOINT"); err != nil {
			return err
		}
		var newest string
		if err := l.conn.QueryRow(ctx, segments).Scan(&first, &newest); err != nil {
			return err
		}
		if newest > now { // recycled before the setting had reached the checkpointer
			last = newest
		}
	}
	if _, err := l.conn.Exec(ctx, "ALTER SYSTEM RESET wal_recycle"); err != nil {
		return err
	}
	_, err := l.conn.Exec(ctx, "SELECT pg_reload_conf()")
	return err
}

const segments = `SELECT coalesce(min(substr(name, 9)), 'none'), coalesce(max(substr(name, 9)), '') FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}'`

// unlock lets in whom the old pg_hba.conf lets in, and drops the role.
func (l *locked) unlock(ctx context.Context) error {
	if err := l.reload(ctx, l.conn, string(l.opened)); err != nil {
		return err
	}
	if err := l.conn.Close(ctx); err != nil {
		return err
	}
	var conn *pgx.Conn
	if err := l.until(ctx, "the copy lets its superuser in", func() (bool, error) {
		var err error
		if conn, err = l.Connect(ctx, "postgres"); refused(err) {
			return false, nil
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	_, err := conn.Exec(ctx, "DROP ROLE "+quoteName(l.role))
	return errors.Join(err, conn.Close(context.WithoutCancel(ctx)))
}

func quoteName(name string) string { return pgx.Identifier{name}.Sanitize() }

// quoteOption quotes a value in PGOPTIONS, which is split at blanks (pg_split_opts).
func quoteOption(s string) string {
	return strings.NewReplacer(`\`, `\\`, " ", `\ `).Replace(s)
}
