package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

const (
	sqlCannotConnectNow = "57P03"
	sqlNoDatabase       = "3D000"
	logTail             = 15       // lines shown of a failed start
	logLimit            = 64 << 10 // bytes read of it
)

// ErrNotUp is what Start's error wraps where the server itself failed on its
// data: it ended, or runs and lets nobody in. Any other error of Start is of
// this host or of the caller.
var ErrNotUp = errors.New("the server did not come up")

// notUp marks an error with ErrNotUp and leaves its text alone.
type notUp struct{ error }

func (e notUp) Unwrap() error        { return e.error }
func (e notUp) Is(target error) bool { return target == ErrNotUp }

// await returns once the server answers out of recovery. Until postmaster.pid
// says that it takes connections none is tried: each would fork a process and
// leave a line in the log.
func (i *Instance) await(ctx context.Context, died <-chan error, offset int64) error {
	tick := time.NewTicker(startPause)
	defer tick.Stop()
	for {
		select {
		case err := <-died:
			return i.deathError(err, offset)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if died == nil && !alive(i.PID) { // of a process that is not our child
			return i.deathError(nil, offset)
		}
		l, err := readLock(i.DataDirectory)
		if err != nil || l.PID != i.PID || (l.Status != "ready" && (l.Status != "standby" || i.cold)) {
			continue
		}
		done, err := i.ask(ctx)
		if err != nil {
			return err
		}
		if done {
			return nil
		}
	}
}

// ask reports whether the server is out of recovery and takes EndOfRecovery.
// A server that does not take connections yet is not out of it; any other
// refusal of a session is an error, because waiting does not mend it.
func (i *Instance) ask(ctx context.Context) (done bool, err error) {
	conn, err := i.connectAnywhere(ctx)
	var pg *pgconn.PgError
	switch {
	case errors.As(err, &pg) && pg.Code != sqlCannotConnectNow:
		return false, withHint(notUp{fmt.Errorf("the server runs but lets nobody in: %w", err)}, pg.Message)
	case err != nil:
		return false, ctx.Err()
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var recovering bool
	var replayed *string
	if err := conn.QueryRow(ctx, `SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn()::text`).Scan(&recovering, &replayed); err != nil {
		return false, ctx.Err() // the session may end as recovery does
	}
	if recovering && !i.standby {
		return false, nil
	}
	if replayed != nil {
		i.EndOfRecovery, err = backup.ParseLSN(*replayed)
	}
	return err == nil, err
}

// connectAnywhere opens a session for what concerns the whole server: not
// every cluster has a database postgres.
func (i *Instance) connectAnywhere(ctx context.Context) (*pgx.Conn, error) {
	conn, err := i.Connect(ctx, "postgres")
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == sqlNoDatabase {
		return i.Connect(ctx, "template1")
	}
	return conn, err
}

// Connect opens a session in database, as the superuser of the copy.
func (i *Instance) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=%d user=%s dbname=%s sslmode=disable",
		quoteKeyword(i.SocketDir), i.Port, quoteKeyword(i.Superuser), quoteKeyword(database)))
	if err != nil {
		return nil, fmt.Errorf("connect to the copy in %s: %w", i.Root, err)
	}
	cfg.RuntimeParams = map[string]string{"application_name": "cleancut"}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the copy in %s: %w", i.Root, err)
	}
	return conn, nil
}

// deathError tells why the server ended, from its log.
func (i *Instance) deathError(end error, offset int64) error {
	log := i.readLog(offset)
	lines := strings.Split(strings.TrimRight(log, "\n"), "\n")
	if len(lines) > logTail {
		lines = lines[len(lines)-logTail:]
	}
	how := "exit status 0"
	if end != nil {
		how = end.Error()
	}
	err := fmt.Errorf("postgres ended (%s) before it could be asked; its log %s ends:\n%s",
		how, filepath.Join(i.SocketDir, "postgres.log"), strings.Join(lines, "\n"))
	if !noSpace.MatchString(log) { // a full filesystem says nothing about the image
		err = notUp{err}
	}
	return withHint(err, log)
}

// readLog returns what the log holds from offset on, its end if that is much.
func (i *Instance) readLog(offset int64) string {
	b, err := os.ReadFile(filepath.Join(i.SocketDir, "postgres.log"))
	if err != nil {
		return err.Error()
	}
	b = b[min(offset, int64(len(b))):]
	return string(b[max(0, len(b)-logLimit):])
}

// hints are the well-known reasons why a copy does not start. Only the hint
// depends on the text, and of decisions only the one of noSpace; lc_messages is C.
func hints() []struct {
	pattern *regexp.Regexp
	hint    string // $1 is the pattern's group
} {
	return []struct {
		pattern *regexp.Regexp
		hint    string // $1 is the pattern's group
	}{
		{regexp.MustCompile(`could not access file "([^"]+)"`), `production preloads the library "$1", which this host lacks: install the extension's package for the same major version here`},
		{regexp.MustCompile(`recovery aborted because of (insufficient) parameter settings`), `a setting is smaller than production's: see the log lines above it`},
		{regexp.MustCompile(`could not locate (?:a valid|required) checkpoint record|invalid (?:primary )?checkpoint (?:record|link)`), `the image's pg_wal does not hold the WAL that recovery begins with: the backup is damaged, or pg_wal was not on the volumes`},
		{regexp.MustCompile(`WAL ends before`), `WAL up to the end of the backup is missing: see that the archive holds it`},
		{regexp.MustCompile(`could not restore file .*: command not (?:executable|found)`), `the owner of the copy's data must be able to run the program cleancut itself: see its mode and those of the folders above it`},
		{regexp.MustCompile(`requested timeline`), `the image and the WAL are of different timelines`},
		{regexp.MustCompile(`directory "([^"]+)" does not exist(?s:.*)Create this directory for the tablespace`), `the cut holds a CREATE TABLESPACE after its last checkpoint, and redo looks for production's folder: create $1, empty, on this host (the copy's own is shown in its place), or take a new backup`},
		{regexp.MustCompile(`Read-only file system`), `the server tried to write outside of the copy; redo of a CREATE TABLESPACE just before the cut does so: take a new backup`},
		{regexp.MustCompile(`(?:directory|data directory) "([^"]+)" .*(?:wrong ownership|invalid permissions)`), `the folder $1 must belong to the copy's uid and be closed to others`},
		{regexp.MustCompile(`could not (?:create shared memory segment|map anonymous shared memory|resize shared memory)`), `the host has too little memory for production's max_connections, max_locks_per_transaction and max_prepared_transactions`},
		{regexp.MustCompile(`database files are incompatible with server`), `these programs were built with other block sizes than production's`},
		{regexp.MustCompile(`unrecognized configuration parameter "([^"]+)"`), `this build of PostgreSQL does not know $1`},
		{regexp.MustCompile(`invalid value for parameter "(lc_[a-z]+)"|locale is incompatible|not recognized by setlocale`), `this host lacks a locale of production's: generate it (locale-gen) or install the same locales`},
		{regexp.MustCompile(`could not (?:access|open|change).*Permission denied`), `every folder above the copy must let the copy's uid pass (chmod o+x)`},
		{regexp.MustCompile(`No space left on device`), `the copy's filesystem is full: recovery needs room for WAL and relations`},
	}
}

func withHint(err error, text string) error {
	for _, h := range hints() {
		if m := h.pattern.FindStringSubmatchIndex(text); m != nil {
			return backup.Hint(err, string(h.pattern.ExpandString(nil, h.hint, text, m)))
		}
	}
	return err
}

// noSpace is ENOSPC and EDQUOT as strerror(3) has them in the C locale.
var noSpace = regexp.MustCompile(`No space left on device|Disk quota exceeded`)

var redoDone = regexp.MustCompile(`redo done at .* elapsed: ([0-9.]+) s`)

// recoveryTook takes the time of redo from the log.
func recoveryTook(log string) time.Duration {
	m := redoDone.FindStringSubmatch(log)
	if m == nil {
		return 0
	}
	d, err := time.ParseDuration(m[1] + "s")
	if err != nil {
		return 0
	}
	return d
}
