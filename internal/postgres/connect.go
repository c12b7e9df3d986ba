package postgres

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

// Target says where the running server is. One of the two is enough.
type Target struct {
	// DSN is a connection string, keyword/value or URL (libpq, "Connection
	// Strings"). Passwords come from pgpass or the environment.
	DSN string
	// DataDirectory is used without a DSN: postmaster.pid names the socket. Its
	// owner is whom a root process poses as for peer authentication.
	DataDirectory string
}

// Connect opens a session with application_name cleancut and all time-outs
// off, so that nothing ends it between two calls that belong together. Its
// search_path is pg_catalog: a superuser must not meet functions that somebody
// planted in public (CVE-2018-1058).
//
// Debian's pg_hba.conf lets in over the socket only whoever has the uid of the
// role's namesake (peer). A root process therefore connects with the effective
// uid of the data directory's owner, or of the socket's owner where the
// directory is not known. That owner's name is also the default role.
//
// Without a DSN and with the server down the error has a hint.
func Connect(ctx context.Context, t Target) (*pgx.Conn, error) {
	cfg, err := t.config()
	if err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("connect to PostgreSQL: %w", err),
			"see that the server runs and that pg_hba.conf lets the role in; name another with user= in dsn")
	}
	if err := guard(ctx, conn); err != nil {
		_ = conn.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	return conn, nil
}

// ConnectReplication is Connect for the physical replication protocol
// (documentation, "Streaming Replication Protocol"): a walsender answers. The
// role must be a superuser or have REPLICATION, and pg_hba.conf must let it
// into the database "replication".
func ConnectReplication(ctx context.Context, t Target) (*pgconn.PgConn, error) {
	cfg, err := t.config()
	if err != nil {
		return nil, err
	}
	cfg.RuntimeParams["replication"] = "true"
	conn, err := pgconn.ConnectConfig(ctx, &cfg.Config)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("connect to PostgreSQL for replication: %w", err),
			"see that the server runs, that pg_hba.conf lets the role into \"replication\", and that max_wal_senders has room")
	}
	return conn, nil
}

func (t Target) config() (*pgx.ConnConfig, error) {
	dsn := t.DSN
	if dsn == "" {
		if t.DataDirectory == "" {
			return nil, fmt.Errorf("%w: neither a dsn nor a data_directory is given", backup.ErrUsage)
		}
		lock, err := readLock(t.DataDirectory)
		if err != nil || !alive(lock.PID) {
			return nil, backup.Hint(fmt.Errorf("no server runs in %s: %w", t.DataDirectory, orNotFound(err)),
				"start it, or see that data_directory names the directory with postmaster.pid")
		}
		dsn = fmt.Sprintf("host=%s port=%d", quoteKeyword(lock.host()), lock.Port)
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		// pgx quotes the string and redacts only what it recognizes.
		return nil, fmt.Errorf("%w: the dsn cannot be read (keyword=value pairs or a postgres:// URL)", backup.ErrUsage)
	}
	cfg.RuntimeParams["application_name"] = "cleancut"
	socket := ""
	if strings.HasPrefix(cfg.Host, "/") {
		socket = filepath.Join(cfg.Host, fmt.Sprintf(".s.PGSQL.%d", cfg.Port))
	}
	uid, gid, known := peer(t.DataDirectory, socket)
	if os.Geteuid() == 0 && !namesUser(dsn) && cfg.User == userName(0) {
		cfg.User = "postgres"
		if known && uid != 0 {
			cfg.User = userName(uid)
		}
	}
	if cfg.Database == "" {
		cfg.Database = "postgres"
	}
	if socket != "" && os.Geteuid() == 0 && known && uid != 0 {
		cfg.DialFunc = dialAs(uid, gid)
	}
	return cfg, nil
}

// peer returns whom to pose as: the owner of the data directory, else of the
// socket.
func peer(dataDirectory, socket string) (uid, gid uint32, known bool) {
	for _, path := range []string{dataDirectory, socket} {
		if path == "" {
			continue
		}
		if uid, gid, err := owner(path); err == nil {
			return uid, gid, true
		}
	}
	return 0, 0, false
}

// owner returns the numeric owner of what path leads to.
func owner(path string) (uid, gid uint32, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("owner of %s: %w", path, backup.ErrUnsupported)
	}
	return st.Uid, st.Gid, nil
}

// userName returns the name of uid, and postgres where passwd has none.
func userName(uid uint32) string {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return "postgres"
	}
	return u.Username
}

var userKeyword = regexp.MustCompile(`(^|\s)user\s*=`)

// namesUser reports whether the connection string names a role itself. pgx
// fills in the name of the process' user, which for root is no role anywhere.
func namesUser(dsn string) bool {
	if u, err := url.Parse(dsn); err == nil && strings.HasPrefix(u.Scheme, "postgres") {
		return u.User.Username() != "" || u.Query().Get("user") != ""
	}
	return userKeyword.MatchString(dsn)
}

// quoteKeyword quotes a value of a keyword/value connection string.
func quoteKeyword(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// guard takes from the session everything that could end it or mislead it.
// Asking pg_settings which of the names exist keeps it free of versions:
// idle_session_timeout came with 14, transaction_timeout with 17.
func guard(ctx context.Context, conn *pgx.Conn) error {
	if _, err := conn.Exec(ctx, `SET search_path = pg_catalog, pg_temp`); err != nil {
		return fmt.Errorf("prepare the session: %w", err)
	}
	_, err := conn.Exec(ctx, `SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN (
		'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')`)
	if err != nil {
		return fmt.Errorf("switch the session's time-outs off: %w", err)
	}
	return nil
}

// dialAs returns a dialer for unix sockets whose connect(2) is seen by the
// other end as done by uid and gid. The kernel records the effective ids of
// the calling thread then (SO_PEERCRED, unix(7)).
func dialAs(uid, gid uint32) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		var conn net.Conn
		err := onThread(func() error {
			if err := setThreadIDs(uid, gid); err != nil {
				return err
			}
			var err error
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}
