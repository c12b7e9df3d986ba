package postgres

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

// Standby makes Prepare and Start make a standby of a copy: it stays in
// recovery and follows a primary.
type Standby struct {
	Primary  string // connection string, see Conninfo
	Password string // goes into Passfile; "": none
	Slot     string // on the primary; "": none
	Name     string // application_name and cluster_name
	Restore  string // restore_command
	Listen   string // ADDRESS:PORT for clients with passwords; "": only the socket
}

// Passfile is where the password lies that a standby's server shows to its
// primary, below the copy's root.
const Passfile = Private + "/pgpass"

// PassfileKeyword names it in a connection string.
func PassfileKeyword(root string) string {
	return "passfile=" + quoteKeyword(filepath.Join(root, Passfile))
}

// clients lets in over TCP who knows a password.
const clients = "host all all all scram-sha-256\nhost replication all all scram-sha-256\n"

// address takes Listen apart.
func (s Standby) address() (host string, port int, err error) {
	i := strings.LastIndexByte(s.Listen, ':')
	if i > 0 {
		port, err = strconv.Atoi(s.Listen[i+1:])
	}
	if i <= 0 || err != nil || port < 1 || port > 65535 {
		return "", 0, fmt.Errorf("%w: %q is no ADDRESS:PORT", backup.ErrUsage, s.Listen)
	}
	return strings.Trim(s.Listen[:i], "[]"), port, nil
}

// Check refuses what Start could not use. The error wraps backup.ErrUsage.
func (s Standby) Check() error {
	if s.Listen == "" {
		return nil
	}
	_, _, err := s.address()
	return err
}

// settings beat those that isolate other copies. The password is in none of
// them: everybody on the host can read a command line.
func (s Standby) settings() map[string]string {
	out := map[string]string{
		"primary_conninfo": s.Primary, "primary_slot_name": s.Slot, "restore_command": s.Restore,
		"recovery_target_timeline": "latest", "cluster_name": s.Name,
	}
	if host, _, err := s.address(); err == nil {
		out["listen_addresses"] = host
	}
	return out
}

// port is what the server's socket is named by.
func (s *Standby) port() int {
	if s != nil {
		if _, port, err := s.address(); err == nil {
			return port
		}
	}
	return copyPort
}

// placeStandby writes the passfile.
func (c *image) placeStandby(context.Context) error {
	s := c.plan.Standby
	if s == nil || s.Password == "" {
		return nil
	}
	if strings.ContainsAny(s.Password, "\n\r\x00") {
		return fmt.Errorf("%w: a password with a line break", backup.ErrUnsupported)
	}
	return c.write(c.root, Passfile, "*:*:*:*:"+strings.NewReplacer(`\`, `\\`, `:`, `\:`).Replace(s.Password)+"\n")
}

// signal names the file that tells the server what to do in the end.
func (c *image) signal() string {
	if c.plan.Standby != nil {
		return "standby.signal"
	}
	return "recovery.signal"
}

var keyword = regexp.MustCompile(`([a-z_]+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)`)

// carriedKeys are the keywords of a connection string that a standby's server
// and this program both know; the rest is made here, or refused.
func carriedKeys() []string {
	return []string{"sslmode", "sslkey", "sslcert", "sslrootcert", "sslnegotiation", "sslsni", "krbsrvname", "target_session_attrs", "connect_timeout"}
}

// Conninfo returns the connection string for the server of a standby that is
// to follow t, and the password that Connect would use, which is not in it. It
// names the role that Connect uses; name is its application_name. What the
// environment of this process adds (PGHOST, PGUSER, PGSSLMODE) is in it,
// because the server has another one. The error wraps backup.ErrUsage.
func Conninfo(t Target, name string) (conninfo, password string, err error) {
	cfg, err := t.config()
	if err != nil {
		return "", "", err
	}
	given, err := keywords(t.DSN)
	if err != nil {
		return "", "", err
	}
	var hosts, ports []string
	seen := map[string]bool{}
	for _, f := range append([]*pgconn.FallbackConfig{{Host: cfg.Host, Port: cfg.Port}}, cfg.Fallbacks...) { // the same once more without TLS, and further hosts
		if at := fmt.Sprint(f.Host, " ", f.Port); !seen[at] {
			hosts, ports, seen[at] = append(hosts, f.Host), append(ports, strconv.Itoa(int(f.Port))), true
		}
	}
	out := []string{"host=" + quoteKeyword(strings.Join(hosts, ",")), "port=" + quoteKeyword(strings.Join(ports, ",")), "user=" + quoteKeyword(cfg.User)}
	for _, k := range carriedKeys() {
		v := cmp.Or(given[k], os.Getenv(environmentOf(k)))
		if v != "" {
			out = append(out, k+"="+quoteKeyword(v))
		}
	}
	return strings.Join(append(out, "application_name="+quoteKeyword(name)), " "), cfg.Password, nil
}

// environmentOf names the variable of a keyword (libpq, "Environment Variables").
func environmentOf(key string) string {
	if key == "target_session_attrs" {
		return "PGTARGETSESSIONATTRS"
	}
	return "PG" + strings.ToUpper(strings.ReplaceAll(key, "_", ""))
}

// keywords reads a connection string that pgx has read, and refuses what a
// standby's server cannot be given.
func keywords(dsn string) (map[string]string, error) {
	out := map[string]string{}
	if u, err := url.Parse(dsn); err == nil && strings.HasPrefix(u.Scheme, "postgres") {
		for k := range u.Query() {
			out[k] = u.Query().Get(k)
		}
	} else {
		for _, m := range keyword.FindAllStringSubmatch(dsn, -1) {
			v := strings.TrimSuffix(strings.TrimPrefix(m[2], "'"), "'")
			out[m[1]] = escaped.ReplaceAllString(v, "$1")
		}
	}
	dropped := []string{"host", "hostaddr", "port", "user", "password", "passfile", "dbname", "database", "application_name", "fallback_application_name"}
	for k := range out {
		if !slices.Contains(dropped, k) && !slices.Contains(carriedKeys(), k) {
			return nil, backup.Hint(fmt.Errorf("%w: a standby's connection cannot have %s", backup.ErrUsage, k), "write host, port, user and the ssl keywords into --primary")
		}
	}
	if os.Getenv("PGSERVICE") != "" {
		return nil, backup.Hint(fmt.Errorf("%w: a standby's connection cannot come from a service file", backup.ErrUsage), "unset PGSERVICE, and write host, port and user into --primary")
	}
	return out, nil
}

var escaped = regexp.MustCompile(`(?s)\\(.)`)

var listed = regexp.MustCompile(`"((?:[^"]|"")*)"|[^\s,()"]+`)

// Synchronous reports whether a standby with that application_name is meant by
// a value of synchronous_standby_names: it would then acknowledge commits
// (syncrep.c, SyncRepGetStandbyPriority).
func Synchronous(names, application string) bool {
	for _, m := range listed.FindAllStringSubmatch(names, -1) {
		name := m[0]
		if strings.HasPrefix(name, `"`) {
			name = strings.ReplaceAll(m[1], `""`, `"`)
		}
		if name == "*" || strings.EqualFold(name, application) {
			return true
		}
	}
	return false
}

// Following is how far a standby's server has come.
type Following struct {
	InRecovery bool
	Paused     bool       // replay waits for somebody
	Timeline   uint32     // that it follows, or of its own after it was promoted
	Replayed   backup.LSN // 0: nothing yet
	Streaming  bool       // its receiver is connected and has begun
	Begun      backup.LSN // where the receiver began; 0: there is none
	Received   backup.LSN // by the receiver, on disk
	Ahead      backup.LSN // the end of the primary's WAL, as it said last; 0: it has not
	LastCommit time.Time  // that was replayed; zero: none
}

// Following asks the server.
func (i *Instance) Following(ctx context.Context) (f Following, err error) {
	conn, err := i.Connect(ctx, "postgres")
	if err != nil {
		return f, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var timeline int64
	var lsn [4]string
	var last *time.Time
	err = conn.QueryRow(ctx, `SELECT pg_is_in_recovery(),
			CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END,
			CASE WHEN pg_is_in_recovery() THEN coalesce(r.received_tli, nullif(c.min_recovery_end_timeline, 0), (SELECT timeline_id FROM pg_control_checkpoint()))::bigint
				ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint END,
			coalesce(pg_last_wal_replay_lsn(), '0/0')::text, coalesce(r.status = 'streaming', false),
			coalesce(r.receive_start_lsn, '0/0')::text, coalesce(r.flushed_lsn, '0/0')::text, coalesce(r.latest_end_lsn, '0/0')::text, pg_last_xact_replay_timestamp()
		FROM pg_control_recovery() c LEFT JOIN pg_stat_wal_receiver r ON true`).Scan(
		&f.InRecovery, &f.Paused, &timeline, &lsn[0], &f.Streaming, &lsn[1], &lsn[2], &lsn[3], &last)
	if err != nil {
		return f, fmt.Errorf("ask the standby in %s: %w", i.Root, err)
	}
	f.Timeline = uint32(timeline)
	if last != nil {
		f.LastCommit = *last
	}
	for n, to := range []*backup.LSN{&f.Replayed, &f.Begun, &f.Received, &f.Ahead} {
		if *to, err = backup.ParseLSN(lsn[n]); err != nil {
			return f, err
		}
	}
	return f, nil
}

// Promote ends a standby's recovery and returns once it is out of it. One that
// is out already: nil.
func (i *Instance) Promote(ctx context.Context) error {
	conn, err := i.Connect(ctx, "postgres")
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	return effect(ctx, "promote", func() error {
		// A pg_promote that waits holds a snapshot, and recovery may have to wait
		// for that one first (max_standby_streaming_delay).
		tick := time.NewTicker(startPause)
		defer tick.Stop()
		for asked := false; ; asked = true {
			in := false
			err := conn.QueryRow(ctx, `SELECT pg_is_in_recovery()`).Scan(&in)
			if err == nil && !in {
				return nil
			}
			if err == nil && !asked {
				_, err = conn.Exec(ctx, `SELECT pg_promote(false)`)
			}
			if err != nil {
				return fmt.Errorf("promote the standby in %s: %w", i.Root, err)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
}

// LogTail returns the last lines of a copy's log that tell of an error, "" if
// there are none.
func LogTail(root string) string {
	var out []string
	for line := range strings.Lines((&Instance{SocketDir: filepath.Join(root, Private)}).readLog(0)) {
		if trouble.MatchString(line) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return strings.Join(out[max(0, len(out)-3):], "\n")
}

var trouble = regexp.MustCompile(`(?:FATAL|ERROR|PANIC|DETAIL):  `)

// Alive reports whether the server runs.
func (i *Instance) Alive() bool { return worksIn(i.PID, i.DataDirectory) }
