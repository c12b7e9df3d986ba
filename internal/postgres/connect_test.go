package postgres_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func TestRootConnectsThroughPeerAuthenticationAsTheOwnerOfTheData(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := pgtest.New(t, pgtest.Options{HBA: "local all postgres peer\n"})
	targets := map[string]postgres.Target{
		"only the data directory is known":      {DataDirectory: s.DataDirectory},
		"only the socket is known":              {DSN: "host=" + s.SocketDir},
		"a URL without a role":                  {DSN: "postgres:///postgres?host=" + s.SocketDir},
		"the role is named":                     {DSN: "host=" + s.SocketDir + " user=postgres", DataDirectory: s.DataDirectory},
		"the port is named":                     {DSN: "port=5432 host=" + s.SocketDir},
		"another database than the role's name": {DSN: "host=" + s.SocketDir + " dbname=template1"},
	}
	for name, target := range targets {
		t.Run(name, func(t *testing.T) {
			conn, err := postgres.Connect(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			if got := query(t, conn, `SELECT current_user || ' ' || current_setting('application_name')`); got != "postgres cleancut" {
				t.Errorf("got %q", got)
			}
			if err := conn.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
	if os.Geteuid() != 0 {
		t.Errorf("this process has uid %d afterwards, want 0", os.Geteuid())
	}
}

func TestManyConnectionsAtOnceLeaveTheProcessRoot(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := pgtest.New(t, pgtest.Options{HBA: "local all postgres peer\n"})
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				conn, err := postgres.Connect(t.Context(), postgres.Target{DataDirectory: s.DataDirectory})
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.Close(t.Context())
			}
		})
		wg.Go(func() {
			for range 200 {
				if _, err := os.ReadFile(secret); err != nil {
					t.Errorf("root's own file: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func TestTheSessionIsNotEndedByTheServersTimeouts(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Settings: map[string]string{
		"statement_timeout": "7s", "lock_timeout": "7s", "idle_session_timeout": "7s", "idle_in_transaction_session_timeout": "7s", "synchronous_commit": "off",
	}})
	conn := s.Connect(t, "postgres")
	got := query(t, conn, `SELECT string_agg(setting, ' ') FROM pg_settings WHERE name IN
		('statement_timeout', 'lock_timeout', 'idle_session_timeout', 'idle_in_transaction_session_timeout')`)
	if got != "0 0 0 0" {
		t.Errorf("got time-outs %s, want none", got)
	}
	if got := query(t, conn, `SELECT current_setting('synchronous_commit') || ' ' || current_setting('search_path')`); got != "off pg_catalog, pg_temp" {
		t.Errorf("got %q", got)
	}
	r := inspect(t, s)
	if got := r.Server.Settings["statement_timeout"]; got != "7s" && got != "7000ms" {
		t.Errorf("recorded %q, want the server's own statement_timeout", got)
	}
}

func TestAServerThatIsDownGivesAHint(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	s.Stop(t)
	for name, target := range map[string]postgres.Target{
		"by its data directory": {DataDirectory: s.DataDirectory},
		"by its socket":         {DSN: s.DSN("postgres")},
		"by nothing":            {DataDirectory: t.TempDir()},
	} {
		if _, err := postgres.Connect(t.Context(), target); err == nil || backup.HintOf(err) == "" {
			t.Errorf("%s: got %v with hint %q", name, err, backup.HintOf(err))
		}
	}
	if _, err := postgres.Connect(t.Context(), postgres.Target{}); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("got %v, want ErrUsage", err)
	}
}

func TestAStalePidFileOfACrashedServerIsNotTakenForARunningOne(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	s.Crash(t)
	if _, err := os.Stat(filepath.Join(s.DataDirectory, "postmaster.pid")); err != nil {
		t.Fatal(err)
	}
	_, err := postgres.Connect(t.Context(), postgres.Target{DataDirectory: s.DataDirectory})
	if !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func TestAnUnreadableDSNDoesNotLeakItsPassword(t *testing.T) {
	_, err := postgres.Connect(t.Context(), postgres.Target{DSN: "host=x password='hunter2 sslmode=nonsense"})
	if !errors.Is(err, backup.ErrUsage) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
}
