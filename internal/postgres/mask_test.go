package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
)

// maskSecret is in a row, and so in WAL, of every maskLab.
const maskSecret = "ann@example.invalid"

// maskLab is a running copy with something to hide.
type maskLab struct {
	*postgres.Instance
	dir string // for scripts; the server may write there
}

func newMaskLab(t *testing.T, c *cluster) *maskLab {
	t.Helper()
	p := c.copyFiles(t)
	l := &maskLab{Instance: start(t, p), dir: filepath.Join(p.Root, "masks")}
	if err := os.Mkdir(l.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(l.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return l
}

func newMaskCluster(t *testing.T, settings map[string]string) *cluster {
	t.Helper()
	all := map[string]string{"autovacuum": "off"} // its ANALYZE would take samples of the secret
	maps.Copy(all, settings)
	c := newCluster(t, all)
	c.Exec(t, "CREATE TABLE person (id int PRIMARY KEY, mail text)", "INSERT INTO person SELECT g, '"+maskSecret+"' FROM generate_series(1, 5000) g",
		"CREATE ROLE app LOGIN PASSWORD 'of production'", "CREATE DATABASE other")
	c.Exec(t, "ANALYZE person", "CHECKPOINT", "UPDATE person SET id = id + 10000") // some in WAL that is replayed
	return c
}

// script writes a mask.
func (l *maskLab) script(t *testing.T, text string) string {
	t.Helper()
	f, err := os.CreateTemp(l.dir, "*.sql")
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// halting is a mask that says when it has begun, and goes on when it is told.
func (l *maskLab) halting() string {
	return fmt.Sprintf("COPY (SELECT 1) TO '%[1]s/begun';\nDO $$BEGIN WHILE pg_stat_file('%[1]s/go', true) IS NULL LOOP PERFORM pg_sleep(0.01); END LOOP; END$$;\n", l.dir)
}

func (l *maskLab) begun(t *testing.T) {
	t.Helper()
	maskEventually(t, "the mask begins", func() bool { return exists(filepath.Join(l.dir, "begun")) })
}

func maskEventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !is() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s", what)
		}
	}
}

func (l *maskLab) mask(ctx context.Context, keep bool, files ...string) error {
	return l.Mask(ctx, postgres.MaskOptions{Files: files, KeepPasswords: keep, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
}

func (l *maskLab) hba(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.SocketDir, "pg_hba.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// isLocked fails the test unless nobody is let in.
func (l *maskLab) isLocked(t *testing.T) {
	t.Helper()
	conn, err := l.Connect(t.Context(), "postgres")
	if err == nil {
		_ = conn.Close(t.Context())
		t.Error("a session was let in")
	} else if !strings.Contains(err.Error(), "no pg_hba.conf entry") {
		t.Errorf("got %v", err)
	}
	if err := l.mask(t.Context(), false); !errors.Is(err, backup.ErrInUse) || !strings.Contains(backup.HintOf(err), "destroy") {
		t.Errorf("masked again: got %v, hint %q", err, backup.HintOf(err))
	}
}

// holding lists the files of the copy's data directory that hold the text.
func (l *maskLab) holding(t *testing.T, text string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(l.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, l.dir) {
			return nil // the server removes files under us
		}
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(text)) {
			out = append(out, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestNobodyElseCanConnectWhileACopyIsMasked(t *testing.T) {
	t.Parallel()
	c := newMaskCluster(t, nil)
	c.Crash(t)
	l := newMaskLab(t, c)
	if len(l.holding(t, maskSecret)) < 2 {
		t.Fatal("the secret is not in the copy's table and WAL")
	}
	before := l.hba(t)
	other, err := l.Connect(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close(context.WithoutCancel(t.Context())) }()
	mute, err := (&net.Dialer{}).DialContext(t.Context(), "unix", filepath.Join(l.SocketDir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	done := make(chan error, 1)
	go func() {
		done <- l.mask(t.Context(), false, l.script(t, l.halting()+"UPDATE person SET mail = 'x';\nVACUUM (FULL, ANALYZE) person;\nVACUUM FULL pg_statistic;\nCREATE TABLE made (x int);\n"),
			"other:"+l.script(t, "CREATE TABLE here (x int);\n\\connect postgres\nCREATE TABLE there (x int);\n"))
	}()
	l.begun(t)
	if conn, err := l.Connect(t.Context(), "postgres"); err == nil {
		_ = conn.Close(t.Context())
		t.Error("a session was let in")
	}
	if _, err := other.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("a session that was there is still there")
	}
	hello, err := (&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersionNumber, Parameters: map[string]string{"user": "postgres"}}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = mute.Write(hello)
	if n, _ := mute.Read(make([]byte, 1)); n > 0 {
		t.Error("a connection that had not said yet who it is was let in by the old rules")
	}
	if got := l.hba(t); strings.Count(got, "\nlocal") != 1 || !strings.Contains(got, "\nlocal all cleancut_mask_") {
		t.Errorf("pg_hba.conf is\n%s", got)
	}
	if err := os.WriteFile(filepath.Join(l.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := l.hba(t); got != before {
		t.Errorf("pg_hba.conf is\n%swant\n%s", got, before)
	}
	for query, want := range map[string]string{
		`SELECT string_agg(DISTINCT mail, ',') FROM person`:                                                                 "x",
		`SELECT count(*)::text FROM pg_authid WHERE rolpassword IS NOT NULL OR rolname LIKE 'cleancut%'`:                    "0",
		`SELECT string_agg(tableowner, ',') FROM pg_tables WHERE tablename IN ('made', 'there')`:                            "postgres,postgres",
		`SELECT count(*)::text FROM pg_file_settings WHERE name = 'wal_recycle'`:                                            "0",
		`SELECT count(*)::text FROM pg_stat_activity WHERE usesysid IS NOT NULL AND pid <> pg_backend_pid()`:                "0",
		`SELECT count(*)::text FROM pg_settings WHERE name = 'hba_file' AND setting LIKE '%/.cleancut/pg_hba.conf'`:         "1",
		`SELECT string_agg(datname, ',' ORDER BY datname) FROM pg_database WHERE datname IN ('other', 'postgres')`:          "other,postgres",
		`SELECT count(*)::text FROM pg_class WHERE relname = 'here'`:                                                        "0",
		`SELECT string_agg(DISTINCT coalesce(rolpassword, 'none'), ',') FROM pg_authid WHERE rolname IN ('app','postgres')`: "none",
	} {
		if got := ask[string](t, l.Instance, query); got != want {
			t.Errorf("%s: got %q, want %q", query, got, want)
		}
	}
	maskEventually(t, "the old rows are in no file", func() bool { return len(l.holding(t, maskSecret)) == 0 })
	if got := l.holding(t, "SCRAM-SHA-256$"); len(got) > 0 {
		t.Errorf("passwords are still in %v", got)
	}
	// once more, with nothing to do
	if err := l.mask(t.Context(), false); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := l.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAMaskThatFailsLeavesTheCopyLocked(t *testing.T) {
	t.Parallel()
	c := newMaskCluster(t, nil)
	c.Stop(t)
	for _, k := range []struct{ name, database, text, words string }{
		{"a statement", "", "SELECT 1;\n\nUPDATE persona SET mail = '';\nSELECT 2;\n", `, line 3: ERROR:  relation "persona" does not exist`},
		{"its own transaction is left open", "", "BEGIN;\nUPDATE person SET mail = '';\n", "ends inside a transaction that it did not commit"},
		{"a string that does not end", "", "UPDATE person SET mail = 'x;\n", "unterminated quoted string"},
		{"an \\if that does not end", "", "\\if true\nUPDATE person SET mail = '';\n", "without finding closing"},
		{"a database that is not there", "nowhere:", "SELECT 1;\n", `database "nowhere" does not exist`},
		{"a \\connect to one", "", "SELECT 1;\n\\connect nowhere\nSELECT 1;\n", `database "nowhere" does not exist`},
		{"a \\connect as somebody else", "", "\\connect postgres postgres\nUPDATE person SET mail = '';\n", "no pg_hba.conf entry"},
	} {
		t.Run(k.name, func(t *testing.T) {
			l := newMaskLab(t, c)
			path := l.script(t, k.text)
			err := l.mask(t.Context(), false, k.database+path)
			if err == nil || !strings.Contains(err.Error(), k.words) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v\nwant %q in one line", err, k.words)
			}
			l.isLocked(t)
			// also after its server was started again
			if err := l.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if again, err := postgres.Start(t.Context(), postgres.Copy{Root: l.Root, Data: l.DataDirectory, Server: c.running.Server, Installation: l.Installation}); err == nil {
				_ = again.Stop(t.Context())
				t.Error("started again it lets its superuser in")
			}
		})
	}
}

func TestAMaskThatIsCancelledOrKilledLeavesTheCopyLocked(t *testing.T) {
	t.Parallel()
	c := newMaskCluster(t, nil)
	c.Stop(t)
	t.Run("cancelled", func(t *testing.T) {
		l := newMaskLab(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.mask(ctx, false, l.script(t, l.halting())) }()
		l.begun(t)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		l.isLocked(t)
	})
	t.Run("killed", func(t *testing.T) {
		l := newMaskLab(t, c)
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestMaskInAnotherProcess$")
		cmd.Env = append(os.Environ(), "CLEANCUT_TEST_MASK="+l.script(t, l.halting()), "CLEANCUT_TEST_ROOT="+l.Root)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		l.begun(t)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		l.isLocked(t)
	})
	t.Run("an error at every point", func(t *testing.T) {
		l := newMaskLab(t, c)
		before, count := l.hba(t), &fault.Injector{}
		if err := l.mask(fault.With(t.Context(), count), false, l.script(t, "SELECT 1;\n")); err != nil {
			t.Fatal(err)
		}
		if len(count.Passed()) < 14 {
			t.Errorf("only %v", count.Passed())
		}
		for n, name := range count.Passed() {
			err := l.mask(fault.With(t.Context(), &fault.Injector{Action: "error", At: n + 1}), false, l.script(t, "SELECT 1;\n"))
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("at %s: got %v", name, err)
			}
			open := l.hba(t) == before
			if want := strings.Contains(name, "mask.role") || name == "postgres.mask.lock" || name == "postgres.mask.unlock.done"; open != want {
				t.Errorf("at %s: open %v, want %v", name, open, want)
			}
			l.reopen(t, before)
		}
	})
}

// reopen lets others in by hand.
func (l *maskLab) reopen(t *testing.T, hba string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(l.SocketDir, "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(l.PID, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	maskEventually(t, "it lets others in", func() bool {
		conn, err := l.Connect(t.Context(), "postgres")
		return err == nil && conn.Close(t.Context()) == nil
	})
}

// TestMaskInAnotherProcess is a process that another test starts and kills.
func TestMaskInAnotherProcess(t *testing.T) {
	root := os.Getenv("CLEANCUT_TEST_ROOT")
	if root == "" {
		return
	}
	inst, err := postgres.Open(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	err = inst.Mask(t.Context(), postgres.MaskOptions{Files: []string{os.Getenv("CLEANCUT_TEST_MASK")}, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	t.Fatalf("it ended: %v", err)
}

func TestPasswordsAreKeptWhereAskedAndAScriptMaySetThem(t *testing.T) {
	t.Parallel()
	c := newMaskCluster(t, nil)
	c.Crash(t)
	l := newMaskLab(t, c)
	const password = `SELECT coalesce((SELECT rolpassword FROM pg_authid WHERE rolname = 'app'), 'none')`
	was := ask[string](t, l.Instance, password)
	if err := errors.Join(l.mask(t.Context(), true), l.mask(t.Context(), true, l.script(t, "SELECT 1;\n"))); err != nil {
		t.Fatal(err)
	}
	if got := ask[string](t, l.Instance, password); got != was || !strings.HasPrefix(got, "SCRAM") {
		t.Errorf("got %q, want %q", got, was)
	}
	if err := l.mask(t.Context(), false, l.script(t, "ALTER ROLE app PASSWORD 'for tests';\n")); err != nil {
		t.Fatal(err)
	}
	if got := ask[string](t, l.Instance, password); got == was || !strings.HasPrefix(got, "SCRAM") {
		t.Errorf("got %q, want that of the script", got)
	}
}

func TestRowsOfAPreparedTransactionDoNotEscapeTheMask(t *testing.T) {
	t.Parallel()
	c := newMaskCluster(t, map[string]string{"max_prepared_transactions": "2"})
	conn := c.Connect(t, "postgres")
	if _, err := conn.Exec(t.Context(), "BEGIN; UPDATE public.person SET mail = mail || '!'; PREPARE TRANSACTION 'it''s odd'"); err != nil {
		t.Fatal(err)
	}
	c.Crash(t)
	l := newMaskLab(t, c)
	if err := l.mask(t.Context(), false, l.script(t, "UPDATE person SET mail = 'x';\n")); err != nil {
		t.Fatal(err)
	}
	if got := ask[string](t, l.Instance, "SELECT concat((SELECT count(*) FROM pg_prepared_xacts), string_agg(DISTINCT mail, ',')) FROM person"); got != "0x" {
		t.Errorf("got %q", got)
	}
}

func TestMasksAreCheckedBeforeAnythingIsMade(t *testing.T) {
	dir := t.TempDir()
	good, large := filepath.Join(dir, "a:b.sql"), filepath.Join(dir, "large.sql")
	err := errors.Join(os.WriteFile(good, []byte("SELECT 1;\n"), 0o600), os.WriteFile(large, nil, 0o600), os.Truncate(large, 65<<20),
		os.WriteFile(filepath.Join(dir, "empty.sql"), nil, 0o600), syscall.Mkfifo(filepath.Join(dir, "pipe.sql"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if err := postgres.CheckMask([]string{good, "app:" + good}); err != nil {
		t.Error(err)
	}
	for spec, words := range map[string]string{
		filepath.Join(dir, "missing.sql"): "no such file",
		dir:                               "is no regular file",
		filepath.Join(dir, "pipe.sql"):    "is no regular file",
		filepath.Join(dir, "empty.sql"):   "is empty",
		"app:" + large:                    "more than 64.0 MiB",
		"app:":                            "DATABASE:FILE",
		":" + good:                        "DATABASE:FILE",
		"":                                "DATABASE:FILE",
	} {
		if err := postgres.CheckMask([]string{good, spec}); !errors.Is(err, backup.ErrUsage) || !strings.Contains(err.Error(), words) {
			t.Errorf("%q: got %v, want %q", spec, err, words)
		}
	}
}
