package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
)

// Running is what was seen of a running server. It is plain data; Preflight
// judges it.
type Running struct {
	Server        backup.Server
	DataDirectory string // real path
	WALDirectory  string // real path of pg_wal
	Tablespaces   []Tablespace
	ConfigFiles   []string // configuration files outside of the data directory, no keys
	Links         []string // other links in the data directory that lead out of it: "link → target"
	Postmaster    int      // process id
	Started       time.Time
	InRecovery    bool
	Superuser     bool // the role of the session
	Prepared      int  // prepared transactions
	BackupLabel   bool // an exclusive backup (13, 14) has its label in the data directory
}

// Tablespace is a tablespace that lies outside of the data directory.
type Tablespace struct {
	OID  uint32
	Name string
	Link string // relative to the data directory: pg_tblspc/16384
	Path string // real path
	// Fresh: made after the last checkpoint began, or just before. Recovery
	// of a cut taken now repeats its creation.
	Fresh bool
}

const (
	manyDatabases    = 500              // beyond, unlogged tables are not looked for
	databasePatience = 10 * time.Second // for one database
)

// Inspect looks at the server behind conn, which comes from Connect. The
// server must run on this machine: the session's own process must be a child of
// the postmaster named in the data directory seen here, and that one must work
// there. Else, and for a role that may not see the settings, the error has a
// hint. It only reads; the unlogged tables need one short session for every
// database, and what cannot be seen of one becomes a note.
func Inspect(ctx context.Context, conn *pgx.Conn) (Running, error) {
	var r Running
	if err := conn.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&r.Superuser); err != nil {
		return Running{}, fmt.Errorf("inspect the server: %w", err)
	}
	if !r.Superuser {
		return Running{}, backup.Hint(fmt.Errorf("role %s is no superuser, so the server hides where its files are", conn.Config().User),
			"name a superuser with user= in dsn")
	}
	steps := []func(context.Context, *pgx.Conn, *Running) error{
		askServer, seePlaces, seeLocal, askTablespaces, askConfigFiles, askSettings, askDatabases, askCollations,
	}
	for _, step := range steps {
		if err := step(ctx, conn, &r); err != nil {
			return Running{}, fmt.Errorf("inspect the server: %w", err)
		}
	}
	askUnlogged(ctx, conn, &r)
	return r, ctx.Err()
}

func askServer(ctx context.Context, conn *pgx.Conn, r *Running) error {
	var identifier int64
	var timeline, blockSize, walBlock, walSegment int64
	err := conn.QueryRow(ctx, `SELECT
			current_setting('server_version_num')::int, version(), current_user::text, pg_is_in_recovery(), pg_postmaster_start_time(),
			(SELECT system_identifier FROM pg_control_system()),
			CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id::bigint FROM pg_control_checkpoint())
				ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint END,
			current_setting('block_size')::bigint, current_setting('wal_block_size')::bigint,
			(SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
			current_setting('data_checksums') = 'on', current_setting('data_directory'),
			(SELECT count(*) FROM pg_prepared_xacts)`).Scan(
		&r.Server.VersionNum, &r.Server.Version, &r.Server.Superuser, &r.InRecovery, &r.Started,
		&identifier, &timeline, &blockSize, &walBlock, &walSegment,
		&r.Server.DataChecksums, &r.DataDirectory, &r.Prepared)
	if err != nil {
		return err
	}
	r.Server.SystemIdentifier = backup.SystemIdentifier(identifier)
	r.Server.Timeline = uint32(timeline)
	r.Server.BlockSize, r.Server.WALBlockSize, r.Server.WALSegmentSize = backup.Bytes(blockSize), backup.Bytes(walBlock), backup.Bytes(walSegment)
	return nil
}

// seePlaces follows the paths on this machine.
func seePlaces(_ context.Context, _ *pgx.Conn, r *Running) error {
	real, err := filepath.EvalSymlinks(r.DataDirectory)
	if err != nil {
		return backup.Hint(fmt.Errorf("the server's data directory is not on this machine: %w", err), "run cleancut on the database server itself")
	}
	r.DataDirectory, r.Server.DataDirectory = real, real
	if r.Server.UID, r.Server.GID, err = owner(real); err != nil {
		return err
	}
	if u, err := user.LookupId(strconv.FormatUint(uint64(r.Server.UID), 10)); err == nil {
		r.Server.User = u.Username
	}
	if r.WALDirectory, err = filepath.EvalSymlinks(filepath.Join(real, "pg_wal")); err != nil {
		return err
	}
	_, err = os.Lstat(filepath.Join(real, "backup_label"))
	r.BackupLabel = err == nil
	r.Links, err = strayLinks(real)
	return err
}

// strayLinks lists the links at the top of the data directory, in base and in
// global that leave it, besides those of pg_wal. Nothing of PostgreSQL makes
// such links; people do.
func strayLinks(data string) ([]string, error) {
	var out []string
	for _, dir := range []string{".", "base", "global"} {
		entries, err := os.ReadDir(filepath.Join(data, dir))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			path := filepath.Join(data, dir, e.Name())
			if e.Type()&os.ModeSymlink == 0 || path == filepath.Join(data, "pg_wal") {
				continue
			}
			if real, err := filepath.EvalSymlinks(path); err != nil || !below(data, real) {
				target, _ := os.Readlink(path)
				out = append(out, filepath.Join(dir, e.Name())+" → "+target)
			}
		}
	}
	return out, nil
}

// seeLocal proves that the server that answers is the one whose files are
// here: a data directory of the same path exists on a standby's host too.
func seeLocal(ctx context.Context, conn *pgx.Conn, r *Running) error {
	remote := func(why string) error {
		return backup.Hint(fmt.Errorf("the server that answers does not run on this machine in %s: %s", r.DataDirectory, why),
			"run cleancut on the database server itself, and outside of the server's container")
	}
	lock, err := readLock(r.DataDirectory)
	if err != nil {
		return remote(err.Error())
	}
	if !worksIn(lock.PID, r.DataDirectory) {
		return remote(fmt.Sprintf("process %d of postmaster.pid is no postgres that works there", lock.PID))
	}
	var backend int
	if err := conn.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&backend); err != nil {
		return err
	}
	if parent := parentOf(backend); parent != lock.PID {
		return remote(fmt.Sprintf("the session's process %d is no child of process %d", backend, lock.PID))
	}
	control, err := ReadControl(filepath.Join(r.DataDirectory, "global", "pg_control"))
	switch {
	case errors.Is(err, ErrControlVersion): // a later release; the two proofs above stand
	case err != nil:
		return err
	case backup.SystemIdentifier(control.SystemIdentifier) != r.Server.SystemIdentifier:
		return remote("its system identifier is another one")
	}
	r.Postmaster = lock.PID
	return nil
}

// parentOf returns the parent of pid, 0 if there is no such process.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "PPid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// askTablespaces leaves out pg_default and pg_global, whose location is empty,
// and in-place tablespaces (15+), whose location is relative and inside the
// data directory (pg_tablespace_location).
func askTablespaces(ctx context.Context, conn *pgx.Conn, r *Running) error {
	rows, err := conn.Query(ctx, `SELECT oid, spcname::text FROM pg_tablespace WHERE pg_tablespace_location(oid) LIKE '/%' ORDER BY oid`)
	if err != nil {
		return err
	}
	r.Tablespaces, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Tablespace, error) {
		var t Tablespace
		err := row.Scan(&t.OID, &t.Name)
		return t, err
	})
	if err != nil {
		return err
	}
	var checkpoint time.Time // when it began, to the second; its redo position is later
	if err := conn.QueryRow(ctx, `SELECT checkpoint_time FROM pg_control_checkpoint()`).Scan(&checkpoint); err != nil {
		return err
	}
	for i := range r.Tablespaces {
		t := &r.Tablespaces[i]
		t.Link = filepath.Join("pg_tblspc", strconv.FormatUint(uint64(t.OID), 10))
		if t.Path, err = filepath.EvalSymlinks(filepath.Join(r.DataDirectory, t.Link)); err != nil {
			return fmt.Errorf("tablespace %s: %w", t.Name, err)
		}
		// The link is made a moment before the record that tells of it.
		info, err := os.Lstat(filepath.Join(r.DataDirectory, t.Link))
		if err != nil {
			return fmt.Errorf("tablespace %s: %w", t.Name, err)
		}
		t.Fresh = info.ModTime().Add(time.Second).After(checkpoint)
	}
	return nil
}

// askConfigFiles lists the files that a restore of the server would miss.
// Private keys are left out on purpose: a backup must not spread them.
func askConfigFiles(ctx context.Context, conn *pgx.Conn, r *Running) error {
	// pg_hba_file_rules and pg_ident_file_mappings tell the file of each line
	// since 16, where such files can include others.
	query := `SELECT setting FROM pg_settings WHERE setting <> '' AND name IN
			('config_file', 'hba_file', 'ident_file', 'ssl_cert_file', 'ssl_ca_file', 'ssl_crl_file', 'ssl_dh_params_file')
		UNION SELECT sourcefile FROM pg_file_settings WHERE sourcefile IS NOT NULL`
	if r.Server.Major() >= 16 {
		query += ` UNION SELECT file_name FROM pg_hba_file_rules WHERE file_name IS NOT NULL
			UNION SELECT file_name FROM pg_ident_file_mappings WHERE file_name IS NOT NULL`
	}
	rows, err := conn.Query(ctx, query+` ORDER BY 1`)
	if err != nil {
		return err
	}
	files, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	var config string
	if err := conn.QueryRow(ctx, `SHOW config_file`).Scan(&config); err != nil {
		return err
	}
	for _, name := range []string{"start.conf", "pg_ctl.conf", "environment"} { // of Debian's postgresql-common; elsewhere they are not there
		if beside := filepath.Join(filepath.Dir(config), name); !slices.Contains(files, beside) {
			files = append(files, beside)
		}
	}
	for _, f := range files {
		if !filepath.IsAbs(f) {
			f = filepath.Join(r.DataDirectory, f)
		}
		// Compare real paths: postgresql.conf may be a link that leads out.
		real, err := filepath.EvalSymlinks(f)
		if err == nil && !below(r.DataDirectory, real) {
			r.ConfigFiles = append(r.ConfigFiles, f)
		}
	}
	return nil
}

func askDatabases(ctx context.Context, conn *pgx.Conn, r *Running) error {
	// datconnlimit -2 marks a database whose DROP was interrupted.
	rows, err := conn.Query(ctx, `SELECT datname::text, pg_database_size(oid) FROM pg_database WHERE datconnlimit <> -2 ORDER BY datname`)
	if err != nil {
		return err
	}
	r.Server.Databases, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (backup.Database, error) {
		var d backup.Database
		err := row.Scan(&d.Name, &d.Size)
		return d, err
	})
	return err
}

// askCollations notes the versions of the libraries that order text: on a host
// with others, indexes over text are wrong without any damage (amcheck.sgml).
func askCollations(ctx context.Context, conn *pgx.Conn, r *Running) error {
	rows, err := conn.Query(ctx, `SELECT DISTINCT CASE collprovider WHEN 'c' THEN 'libc' WHEN 'i' THEN 'ICU' ELSE 'builtin' END || ' ' || collversion
		FROM pg_collation WHERE collversion IS NOT NULL ORDER BY 1 LIMIT 8`)
	if err != nil {
		return err
	}
	versions, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil && len(versions) > 0 {
		r.Server.Notes = append(r.Server.Notes, "collation versions: "+strings.Join(versions, ", "))
	}
	if err != nil || r.Server.Major() < 15 {
		return err
	}
	rows, err = conn.Query(ctx, `SELECT datname::text FROM pg_database
		WHERE datcollversion IS NOT NULL AND datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) ORDER BY 1`)
	if err != nil {
		return err
	}
	stale, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil && len(stale) > 0 {
		r.Server.Notes = append(r.Server.Notes, "indexes were built with another collation version already in production: "+strings.Join(stale, ", "))
	}
	return err
}

// askUnlogged never fails: an unlogged table comes back empty whether it was
// named or not.
func askUnlogged(ctx context.Context, conn *pgx.Conn, r *Running) {
	note := func(format string, a ...any) {
		r.Server.Notes = append(r.Server.Notes, "unlogged tables: "+fmt.Sprintf(format, a...))
	}
	rows, err := conn.Query(ctx, `SELECT datname::text FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname`)
	if err != nil {
		note("%v", err)
		return
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		note("%v", err)
		return
	}
	if len(names) > manyDatabases {
		note("looked for in %d of %d databases", manyDatabases, len(names))
		names = names[:manyDatabases]
	}
	for _, name := range names {
		tables, err := unloggedOf(ctx, conn.Config(), name)
		if err != nil {
			note("database %s: %v", name, err)
		}
		r.Server.Unlogged = append(r.Server.Unlogged, tables...)
	}
}

// unloggedOf lists them as database.schema.table.
func unloggedOf(ctx context.Context, cfg *pgx.ConnConfig, database string) (_ []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, databasePatience)
	defer cancel()
	cfg.Database = database
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	if err := guard(ctx, conn); err != nil {
		return nil, err
	}
	rows, err := conn.Query(ctx, `SELECT current_database() || '.' || nspname || '.' || relname
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE relpersistence = 'u' AND relkind IN ('r', 'm', 'S') ORDER BY 1`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
