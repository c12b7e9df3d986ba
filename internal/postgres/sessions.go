package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"cleancut/internal/backup"
)

// Sessions is who uses a copy's server.
type Sessions struct {
	Count int `json:"count"` // of clients, walsenders included, without cleancut's own
	// Newest is the age of the query that was begun last, or of the session
	// where it has sent none, in seconds; nil: there is no session.
	Newest *float64 `json:"seconds_since_newest_query"`
}

// Sessions asks the server who uses it.
func (i *Instance) Sessions(ctx context.Context) (s Sessions, err error) {
	conn, err := i.Connect(ctx, "postgres")
	if err != nil {
		return s, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	err = conn.QueryRow(ctx, `SELECT count(*), extract(epoch FROM clock_timestamp() - max(coalesce(query_start, backend_start)))::float8
		FROM pg_catalog.pg_stat_activity WHERE backend_type IN ('client backend', 'walsender') AND pid <> pg_backend_pid() AND application_name <> 'cleancut'`).Scan(&s.Count, &s.Newest)
	if err != nil {
		return s, fmt.Errorf("sessions of the copy in %s: %w", i.Root, err)
	}
	return s, nil
}

// Runs reports whether any process of a server works below root, also one that
// answers nobody. A folder that is not there has none.
func Runs(root string) (bool, error) {
	root, err := filepath.EvalSymlinks(root)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	pids, err := postgresBelow(root)
	return len(pids) > 0, err
}

// CheckRoot refuses a folder for a copy in which the path of its server's
// socket would be too long. The error wraps ErrUsage.
func CheckRoot(root string) error {
	socket := filepath.Join(root, Private, ".s.PGSQL.65535")
	if len(socket) <= socketLimit {
		return nil
	}
	return backup.Hint(fmt.Errorf("%w: a socket's path may have %d bytes, and %s has %d", backup.ErrUsage, socketLimit, socket, len(socket)), "choose a shorter folder for the copy")
}

// Psql returns what to replace this process with to talk to the copy's server
// by psql: its path, argument list and environment, of which everything of
// libpq's own is taken out.
func (i *Instance) Psql(ctx context.Context, args, environ []string) (path string, argv, env []string, err error) {
	if path, err = i.Installation.Tool(ctx, "psql"); err != nil {
		return "", nil, nil, err
	}
	for _, e := range environ {
		if len(e) < 2 || e[:2] != "PG" {
			env = append(env, e)
		}
	}
	env = append(env, "PGHOST="+i.SocketDir, fmt.Sprintf("PGPORT=%d", i.Port), "PGUSER="+i.Superuser, "PGDATABASE=postgres", "PGSSLMODE=disable")
	return path, append([]string{"psql"}, args...), env, nil
}
