package main_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
)

// cloneAddress is one of this host that nobody listens on now.
func cloneAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// cloneEnter connects over TCP as a client would.
func cloneEnter(t *testing.T, address, role, password string) (*pgx.Conn, error) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://%s:%s@%s/postgres?sslmode=disable", role, password, address))
	if err == nil {
		t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	}
	return conn, err
}

// TestAGoldenCloneIsMaskedAndLetsClientsInByPassword puts together what is
// tested part by part elsewhere.
func TestAGoldenCloneIsMaskedAndLetsClientsInByPassword(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newCloneLab(t)
	l.server.Exec(t, "CREATE ROLE qa LOGIN PASSWORD 'of-production'", "GRANT SELECT ON ledger TO qa", "CREATE TABLE secret AS SELECT 'name'::text AS word", "GRANT SELECT ON secret TO qa")
	l.id = string(l.backup(t))
	mask, broken := filepath.Join(l.dir, "mask.sql"), filepath.Join(l.dir, "broken.sql")
	for file, sql := range map[string]string{mask: "UPDATE secret SET word = 'masked';\nALTER ROLE qa PASSWORD 'of-the-clone';\n", broken: "SELECT 1;\nUPDATE nothing SET word = '';\n"} {
		if err := os.WriteFile(file, []byte(sql), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	address := cloneAddress(t)
	s := l.create(t, "golden", "--golden", "--mask", mask, "--listen", address)
	if !s.Golden || s.MadeOf == s.Backup || string(s.Backup) != l.id || len(s.Masked) != 1 || s.Listen != address {
		t.Errorf("made: %+v", s)
	}
	reads := func(password string) {
		t.Helper()
		conn, err := cloneEnter(t, address, "qa", password)
		if err != nil {
			t.Fatal(err)
		}
		var word string
		if err := conn.QueryRow(t.Context(), "SELECT word FROM secret").Scan(&word); err != nil || word != "masked" {
			t.Errorf("%q, %v", word, err)
		}
		_ = conn.Close(t.Context())
	}
	reads("of-the-clone")
	for _, who := range [][2]string{{"qa", "of-production"}, {"qa", ""}, {"postgres", ""}, {"postgres", "postgres"}} {
		if _, err := cloneEnter(t, address, who[0], who[1]); err == nil || !strings.Contains(err.Error(), "password") {
			t.Errorf("%q over TCP: %v", who, err)
		}
	}

	t.Run("a failing mask leaves no clone", func(t *testing.T) {
		l.run(t, "clone", "create", l.id, "--name", "broken", "--golden", "--mask", broken).refused(t, 1, "broken.sql, line 2", "nothing")
		l.run(t, "clone", "show", "broken").refused(t, 1, "no clone broken")
		l.gone(t, "golden")
	})
	t.Run("an address that is taken leaves none", func(t *testing.T) {
		if o := l.run(t, "clone", "create", l.id, "--name", "late", "--golden", "--listen", address); o.code != 1 || !strings.Contains(o.err, "choose another port") {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
		l.gone(t, "golden")
	})
	t.Run("its server is killed and started again, and lets clients in as before", func(t *testing.T) {
		pid, err := os.ReadFile(filepath.Join(s.DataDirectory, "postmaster.pid"))
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(pid), "\n")
		n, err := strconv.Atoi(first)
		if err == nil {
			err = syscall.Kill(n, syscall.SIGKILL)
		}
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the list says that it is down", func() bool { return l.show(t, "golden").Down != "" })
		if s := cloneRead(t, l.run(t, "clone", "start", "golden", "--json")); s.State != flow.CloneReady {
			t.Errorf("started: %+v", s)
		}
		reads("of-the-clone")
	})
	l.must(t, "clone", "destroy", "golden", "--force")
	l.gone(t)
	if _, err := cloneEnter(t, address, "qa", "of-the-clone"); err == nil {
		t.Error("somebody still listens")
	}
	l.clean(t)
}
