package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func TestInspectFindsTablespacesLinkedWALAndConfigurationOutside(t *testing.T) {
	t.Parallel()
	dir := pgtest.Folder(t)
	outside := pgtest.Mkdir(t, filepath.Join(dir, "etc"))
	pgtest.Append(t, filepath.Join(outside, "extra.conf"), "work_mem = '5MB'\narchive_command = 'aws --key TOPSECRET %p'\n")
	pgtest.Append(t, filepath.Join(outside, "hba.conf"), "local all all trust\n")
	s := pgtest.New(t, pgtest.Options{Dir: dir, WALDir: filepath.Join(dir, "wal"), NoStart: true, Checksums: true, Settings: map[string]string{
		"hba_file": filepath.Join(outside, "hba.conf"), "shared_preload_libraries": "pg_stat_statements",
		"primary_conninfo": "password=TOPSECRET", "ssl_passphrase_command": "echo TOPSECRET", "max_prepared_transactions": "5",
	}})
	pgtest.Append(t, filepath.Join(s.DataDirectory, "postgresql.conf"), "include '"+filepath.Join(outside, "extra.conf")+"'\n")
	s.Start(t)
	space := pgtest.Mkdir(t, filepath.Join(dir, "space"))
	s.Exec(t, "CREATE TABLESPACE far LOCATION '"+space+"'", "CREATE DATABASE shop", `CREATE UNLOGGED TABLE "Lost One"(x serial)`,
		"BEGIN", "CREATE TABLE t()", "PREPARE TRANSACTION 'in doubt'")

	conn, err := postgres.Connect(t.Context(), postgres.Target{DataDirectory: s.DataDirectory})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	r, err := postgres.Inspect(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	control, err := postgres.ReadControl(filepath.Join(s.DataDirectory, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, got, want any) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	check("data directory", r.DataDirectory, s.DataDirectory)
	check("WAL directory", r.WALDirectory, filepath.Join(dir, "wal"))
	check("number of tablespaces", len(r.Tablespaces), 1)
	check("tablespace", r.Tablespaces[0], postgres.Tablespace{OID: r.Tablespaces[0].OID, Name: "far", Link: fmt.Sprintf("pg_tblspc/%d", r.Tablespaces[0].OID), Path: space, Fresh: true})
	check("configuration files", r.ConfigFiles, []string{filepath.Join(outside, "extra.conf"), filepath.Join(outside, "hba.conf")})
	check("postmaster", r.Postmaster, s.PID())
	check("superuser", r.Superuser, true)
	check("in recovery", r.InRecovery, false)
	check("prepared transactions", r.Prepared, 1)
	check("links", len(r.Links), 0)
	check("system identifier", r.Server.SystemIdentifier, control.SystemIdentifier)
	check("timeline", r.Server.Timeline, 1)
	check("major", r.Server.Major(), 15)
	check("block size", r.Server.BlockSize, backup.Bytes(8192))
	check("WAL block size", r.Server.WALBlockSize, backup.Bytes(8192))
	check("WAL segment size", r.Server.WALSegmentSize, backup.Bytes(16<<20))
	check("checksums", r.Server.DataChecksums, true)
	check("owner", r.Server.UID, s.UID)
	check("role", r.Server.Superuser, "postgres")
	check("unlogged", r.Server.Unlogged, []string{"postgres.public.Lost One", "postgres.public.Lost One_x_seq"})
	check("work_mem", r.Server.Settings["work_mem"], "5MB")
	check("max_connections", r.Server.Settings["max_connections"], "30")
	check("fsync", r.Server.Settings["fsync"], "off")
	check("full_page_writes", r.Server.Settings["full_page_writes"], "on")
	check("preloaded", r.Server.Settings["shared_preload_libraries"], "pg_stat_statements")
	for name, value := range r.Server.Settings {
		if strings.Contains(value, "TOPSECRET") || strings.Contains(name, "_command") {
			t.Errorf("%s = %s must not be recorded", name, value)
		}
	}
	if !slices.ContainsFunc(r.Server.Databases, func(d backup.Database) bool { return d.Name == "shop" && d.Size > 1<<20 }) {
		t.Errorf("got databases %v, want shop with its size", r.Server.Databases)
	}
	if !slices.ContainsFunc(r.Server.Notes, func(n string) bool { return strings.HasPrefix(n, "collation versions: ") }) {
		t.Errorf("got notes %q, want the collation versions", r.Server.Notes)
	}
	s.Exec(t, "ROLLBACK PREPARED 'in doubt'")
}

func TestInspectRefusesARoleThatMayNotSeeTheFiles(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	s.Exec(t, "CREATE ROLE plain LOGIN")
	conn, err := postgres.Connect(t.Context(), postgres.Target{DSN: "host=" + s.SocketDir + " user=plain dbname=postgres"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	if _, err := postgres.Inspect(t.Context(), conn); err == nil || backup.HintOf(err) == "" {
		t.Errorf("got %v with hint %q", err, backup.HintOf(err))
	}
}

// A server in a container is reached over its socket, but its process ids and
// perhaps its paths mean something else here.
func TestInspectRefusesAServerInAnotherProcessNamespace(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := pgtest.New(t, pgtest.Options{NoStart: true})
	inner := s.Command(t.Context(), "postgres", "-D", s.DataDirectory)
	cmd := exec.CommandContext(t.Context(), "unshare", append([]string{
		"--pid", "--fork", "--kill-child", fmt.Sprintf("--setuid=%d", s.UID), fmt.Sprintf("--setgid=%d", s.GID), "--"}, inner.Args...)...)
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := postgres.Kill(context.WithoutCancel(t.Context()), s.DataDirectory); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
	}()
	for {
		conn, err := postgres.Connect(t.Context(), postgres.Target{DSN: s.DSN("postgres"), DataDirectory: s.DataDirectory})
		if err != nil {
			if t.Context().Err() != nil {
				t.Fatal(err)
			}
			continue // starting
		}
		_, err = postgres.Inspect(t.Context(), conn)
		if err == nil || !strings.Contains(err.Error(), "does not run on this machine") || backup.HintOf(err) == "" {
			t.Errorf("got %v", err)
		}
		_ = conn.Close(t.Context())
		return
	}
}

func TestADatabaseThatCannotBeLookedIntoBecomesANote(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	// As on a host that lacks the locale of one database.
	s.Exec(t, "CREATE DATABASE foreign_locale TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
		"UPDATE pg_database SET datcollate = 'xx_XX' WHERE datname = 'foreign_locale'")
	r := inspect(t, s)
	if !slices.ContainsFunc(r.Server.Notes, func(n string) bool { return strings.HasPrefix(n, "unlogged tables: database foreign_locale: ") }) {
		t.Errorf("got notes %q", r.Server.Notes)
	}
}

func texts(findings []postgres.Finding, refused bool) string {
	var b strings.Builder
	for _, f := range findings {
		if f.Refuse == refused {
			b.WriteString(f.Text + "\n")
		}
	}
	return b.String()
}

func TestPreflightRefusesWhatMakesRecoveryUnsound(t *testing.T) {
	good := func() postgres.Running {
		return postgres.Running{Superuser: true, Server: backup.Server{VersionNum: 150018, DataChecksums: true,
			Settings: map[string]string{"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}}}
	}
	cases := []struct {
		name   string
		change func(*postgres.Running)
		allow  postgres.Allow
		refuse string // "" for no refusal
		note   string
		is     error
	}{
		{name: "a good server"},
		{name: "fsync off", change: func(r *postgres.Running) { r.Server.Settings["fsync"] = "off" }, refuse: "fsync"},
		{name: "full_page_writes off", change: func(r *postgres.Running) { r.Server.Settings["full_page_writes"] = "off" }, refuse: "full_page_writes"},
		{name: "full_page_writes off where the storage does not tear", change: func(r *postgres.Running) { r.Server.Settings["full_page_writes"] = "off" },
			allow: postgres.Allow{NoFullPageWrites: true}, note: "full_page_writes"},
		{name: "a standby", change: func(r *postgres.Running) { r.InRecovery = true }, refuse: "standby", is: backup.ErrUnsupported},
		{name: "no superuser", change: func(r *postgres.Running) { r.Superuser = false }, refuse: "superuser"},
		{name: "version 12", change: func(r *postgres.Running) { r.Server.VersionNum = 120022 }, refuse: "older", is: backup.ErrUnsupported},
		{name: "version 18", change: func(r *postgres.Running) { r.Server.VersionNum = 180006 }},
		{name: "an exclusive backup", change: func(r *postgres.Running) { r.BackupLabel = true }, refuse: "exclusive"},
		{name: "a database behind a link", change: func(r *postgres.Running) { r.Links = []string{"base/16384 → /elsewhere"} }, refuse: "base/16384", is: backup.ErrUnsupported},
		{name: "the log behind a link", change: func(r *postgres.Running) { r.Links = []string{"log → /var/log/postgresql"} }, note: "log →"},
		{name: "synchronous_commit off", change: func(r *postgres.Running) { r.Server.Settings["synchronous_commit"] = "off" }, note: "wal_writer_delay"},
		{name: "no checksums", change: func(r *postgres.Running) { r.Server.DataChecksums = false }, note: "checksums"},
		{name: "unlogged tables", change: func(r *postgres.Running) { r.Server.Unlogged = []string{"a.b.c"} }, note: "a.b.c"},
		{name: "configuration outside", change: func(r *postgres.Running) { r.ConfigFiles = []string{"/etc/x.conf"} }, note: "/etc/x.conf"},
		{name: "a tablespace newer than the last checkpoint", change: func(r *postgres.Running) {
			r.Tablespaces = []postgres.Tablespace{{Name: "far", Path: "/far", Fresh: true}}
		}, note: "folder /far"},
		{name: "prepared transactions", change: func(r *postgres.Running) { r.Prepared = 2 }, note: "2 prepared"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := good()
			if c.change != nil {
				c.change(&r)
			}
			got := postgres.Preflight(r, c.allow)
			refused, noted, err := texts(got, true), texts(got, false), postgres.Refused(got)
			if (c.refuse == "") != (refused == "") || !strings.Contains(refused, c.refuse) || !strings.Contains(noted, c.note) {
				t.Errorf("refused %q and noted %q, want %q and %q", refused, noted, c.refuse, c.note)
			}
			if (err != nil) != (c.refuse != "") || (c.is != nil && !errors.Is(err, c.is)) {
				t.Errorf("got error %v, want %v", err, c.is)
			}
		})
	}
}

func TestARunningServerWithoutFsyncOrFullPagesIsRefused(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Settings: map[string]string{"full_page_writes": "off"}}) // fsync is off in tests
	got := texts(postgres.Preflight(inspect(t, s), postgres.Allow{}), true)
	if !strings.Contains(got, "fsync is off") || !strings.Contains(got, "full_page_writes is off") {
		t.Errorf("refused %q, want both settings named", got)
	}
	if err := os.Symlink("/nonexistent", filepath.Join(s.DataDirectory, "base", "99")); err != nil {
		t.Fatal(err)
	}
	if got := texts(postgres.Preflight(inspect(t, s), postgres.Allow{}), true); !strings.Contains(got, "base/99") {
		t.Errorf("refused %q, want the link named", got)
	}
	if err := os.Remove(filepath.Join(s.DataDirectory, "base", "99")); err != nil {
		t.Fatal(err)
	}
}

func TestARunningStandbyIsRefused(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Options{Sync: true})
	standby := primary.Standby(t, nil)
	r := inspect(t, standby)
	if !r.InRecovery || r.Server.Timeline != 1 {
		t.Errorf("got %+v, want a server in recovery on timeline 1", r)
	}
	if err := postgres.Refused(postgres.Preflight(r, postgres.Allow{Standby: true})); err != nil {
		t.Errorf("for a bracketed backup: %v", err)
	}
	if err := postgres.Refused(postgres.Preflight(r, postgres.Allow{})); !errors.Is(err, backup.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
	standby.Stop(t)
}
