package postgres_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func target(s *pgtest.Server) postgres.Target {
	return postgres.Target{DSN: s.DSN("postgres"), DataDirectory: s.DataDirectory}
}

func startBackup(t *testing.T, s *pgtest.Server) *postgres.BackupMode {
	t.Helper()
	b, err := postgres.StartBackup(t.Context(), target(s), postgres.BackupModeOptions{Label: "cleancut test", Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Abort(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// until polls the condition; the test's own limit ends it.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("waited for %s", what)
		}
	}
}

// backends counts the server's processes with that id.
func backends(t *testing.T, s *pgtest.Server, pid int) int {
	t.Helper()
	conn := s.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	var n int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE pid = $1`, pid).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// void demands that both ways on say that the backup is void, and why.
func void(t *testing.T, b *postgres.BackupMode, why string) {
	t.Helper()
	if err := b.Check(t.Context()); !errors.Is(err, backup.ErrVoid) || !strings.Contains(err.Error(), why) {
		t.Errorf("Check: got %v, want void: %s", err, why)
	}
	if s, err := b.Stop(t.Context()); !errors.Is(err, backup.ErrVoid) || s.LabelFile != nil {
		t.Errorf("Stop: got %+v, %v, want void", s, err)
	}
	if err := b.Abort(t.Context()); err != nil {
		t.Errorf("Abort: %v", err)
	}
}

func refused(t *testing.T, tg postgres.Target, why, hint string) {
	t.Helper()
	_, err := postgres.StartBackup(t.Context(), tg, postgres.BackupModeOptions{Label: "refused", Fast: true})
	if err == nil || !strings.Contains(err.Error(), why) || !strings.Contains(backup.HintOf(err), hint) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v (hint %q), want %q (hint %q)", err, backup.HintOf(err), why, hint)
	}
}

func TestBackupModeOnEveryMajor(t *testing.T) {
	for _, i := range pgtest.Majors(t) {
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			t.Parallel()
			s := pgtest.New(t, pgtest.Options{Major: i.Major, Small: true, Settings: map[string]string{
				"checkpoint_timeout": "1h", "autovacuum": "off", "bgwriter_lru_maxpages": "0"}})
			t.Run("gives the label and the map as they are", func(t *testing.T) { labelAndMap(t, s) })
			t.Run("two at once do not disturb each other", func(t *testing.T) { twoAtOnce(t, s) })
			t.Run("ends with Abort", func(t *testing.T) { abort(t, s) })
			t.Run("ends with its context", func(t *testing.T) { contextEnds(t, s) })
			t.Run("that is cancelled while it starts leaves nothing", func(t *testing.T) { cancelledStart(t, s) })
			t.Run("is void when its session was ended", func(t *testing.T) { sessionEnded(t, s) })
			t.Run("asks for permissions", func(t *testing.T) { permissions(t, s) })
			if i.Major < 15 {
				t.Run("is refused beside an exclusive one", func(t *testing.T) { exclusive(t, s) })
			}
			t.Run("is void when the server was restarted", func(t *testing.T) { restarted(t, s) })
			t.Run("is refused with wal_level minimal", func(t *testing.T) { minimal(t, s) })
		})
	}
}

func labelAndMap(t *testing.T, s *pgtest.Server) {
	space := pgtest.Mkdir(t, filepath.Join(s.Dir, "sp\n\\ä"))
	s.Exec(t, "CREATE TABLESPACE odd LOCATION '"+space+"'")
	defer s.Exec(t, "DROP TABLESPACE odd")
	conn := s.Connect(t, "postgres")
	before := query(t, conn, `SELECT pg_current_wal_lsn()::text`)
	b := startBackup(t, s)
	if err := b.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	during := query(t, conn, `SELECT pg_current_wal_lsn()::text`)
	stop, err := b.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	order := []backup.LSN{0, b.Start().StartLSN, 0, stop.StopLSN}
	for i, text := range map[int]string{0: before, 2: during} {
		if order[i], err = backup.ParseLSN(text); err != nil {
			t.Fatal(err)
		}
	}
	for i := range order[1:] {
		if order[i] > order[i+1] {
			t.Errorf("before, start, during, stop: %v is not in order", order)
		}
	}
	if got := b.Start(); got.Timeline != 1 || got.Standby || got.PID == 0 || got.Began.IsZero() || got.Started.Before(got.Began) {
		t.Errorf("start: %+v", got)
	}
	if l := stop.Label; l.StartLSN != b.Start().StartLSN || l.Standby || l.Text != "cleancut test" || l.Timeline != 1 {
		t.Errorf("label: %+v", l)
	}
	oid := query(t, conn, `SELECT oid::text FROM pg_tablespace WHERE spcname = 'odd'`)
	escape := strings.NewReplacer("\n", "\\\n") // 13 does not escape a backslash
	if s.Installation.Major > 13 {
		escape = strings.NewReplacer(`\`, `\\`, "\n", "\\\n")
	}
	want := oid + " " + escape.Replace(space) + "\n"
	if string(stop.MapFile) != want {
		t.Errorf("map: got %q, want %q", stop.MapFile, want)
	}
	until(t, "the end of the session", func() bool { return backends(t, s, b.Start().PID) == 0 })
	if _, err := b.Stop(t.Context()); !errors.Is(err, backup.ErrVoid) {
		t.Errorf("a second stop: got %v, want ErrVoid", err)
	}
	if err := b.Abort(t.Context()); err != nil {
		t.Errorf("an abort after the stop: %v", err)
	}
}

func twoAtOnce(t *testing.T, s *pgtest.Server) {
	a, b := startBackup(t, s), startBackup(t, s)
	first, err := a.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Check(t.Context()); err != nil {
		t.Error(err)
	}
	second, err := b.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if first.Label.StartLSN >= second.Label.StartLSN || first.StopLSN >= second.StopLSN {
		t.Errorf("got %+v and %+v, want two backups, one behind the other", first, second)
	}
}

func abort(t *testing.T, s *pgtest.Server) {
	b := startBackup(t, s)
	for range 2 {
		if err := b.Abort(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := backends(t, s, b.Start().PID); n != 0 {
		t.Errorf("the session is still there after the abort")
	}
	log, err := os.ReadFile(s.Log())
	if err != nil || strings.Count(string(log), "aborting backup due to backend exiting") != 1 {
		t.Errorf("want the server to say once that it aborted the backup, %v:\n%s", err, log)
	}
	void(t, b, "ended before")
}

func contextEnds(t *testing.T, s *pgtest.Server) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b, err := postgres.StartBackup(ctx, target(s), postgres.BackupModeOptions{Label: "cancelled", Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	until(t, "the end of the session", func() bool { return backends(t, s, b.Start().PID) == 0 })
	void(t, b, "ended before")
}

func cancelledStart(t *testing.T, s *pgtest.Server) {
	// A spread checkpoint waits 100 ms after each of these pages.
	s.Exec(t, "DROP TABLE IF EXISTS pages", "CREATE TABLE pages AS SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failed := make(chan error)
	go func() {
		_, err := postgres.StartBackup(ctx, target(s), postgres.BackupModeOptions{Label: "spread"})
		failed <- err
	}()
	conn := s.Connect(t, "postgres")
	waiting := func() bool {
		return query(t, conn, `SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%backup%$1, $2%' AND pid <> pg_backend_pid() AND wait_event LIKE 'Checkpoint%'`) == "1"
	}
	until(t, "a start that waits for its checkpoint", waiting)
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	if waiting() {
		t.Errorf("the session is still there after a cancelled start")
	}
}

func sessionEnded(t *testing.T, s *pgtest.Server) {
	b := startBackup(t, s)
	s.Exec(t, fmt.Sprintf("SELECT pg_terminate_backend(%d)", b.Start().PID))
	until(t, "the end of the session", func() bool { return backends(t, s, b.Start().PID) == 0 })
	void(t, b, "the session was ended during the backup")
}

func permissions(t *testing.T, s *pgtest.Server) {
	s.Exec(t, `CREATE ROLE "back-up" LOGIN`)
	tg := postgres.Target{DSN: fmt.Sprintf("host=%s port=%d user=back-up dbname=postgres", s.SocketDir, s.Port)}
	start := "pg_backup_start(text, boolean)"
	if s.Installation.Major < 15 {
		start = "pg_start_backup(text, boolean, boolean)"
	}
	refused(t, tg, `role back-up may not start and stop a backup in database postgres`, "GRANT EXECUTE ON FUNCTION "+start)
	s.Exec(t, "GRANT EXECUTE ON FUNCTION "+start+` TO "back-up"`) // half of it is not enough
	_, err := postgres.StartBackup(t.Context(), tg, postgres.BackupModeOptions{Label: "x", Fast: true})
	_, grant, _ := strings.Cut(backup.HintOf(err), ": ")
	s.Exec(t, grant)
	b, err := postgres.StartBackup(t.Context(), tg, postgres.BackupModeOptions{Label: "x", Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func exclusive(t *testing.T, s *pgtest.Server) {
	s.Exec(t, "SELECT pg_start_backup('exclusive', true)")
	refused(t, target(s), "an exclusive backup runs", "pg_stop_backup()")
	s.Exec(t, "SELECT pg_stop_backup()")
}

func restarted(t *testing.T, s *pgtest.Server) {
	b := startBackup(t, s)
	s.Stop(t)
	s.Start(t)
	void(t, b, "the server was restarted during the backup")
	b = startBackup(t, s)
	s.Crash(t)
	void(t, b, "cannot be asked why")
	s.Start(t)
}

func minimal(t *testing.T, s *pgtest.Server) {
	s.Exec(t, "ALTER SYSTEM SET wal_level = minimal", "ALTER SYSTEM SET max_wal_senders = 0")
	s.Stop(t)
	s.Start(t)
	refused(t, target(s), "wal_level is minimal", "wal_level = replica")
	s.Stop(t)
	refused(t, postgres.Target{DataDirectory: s.DataDirectory}, "no server runs", "start it")
}

func TestAFaultAtAnyCallOfBackupModeLeavesNoSession(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	// run goes from start to stop and leaves as soon as something fails.
	run := func(ctx context.Context) error {
		b, err := postgres.StartBackup(ctx, target(s), postgres.BackupModeOptions{Label: "faults", Fast: true})
		if err != nil {
			return err
		}
		if err = b.Check(ctx); err == nil {
			_, err = b.Stop(ctx)
		}
		return errors.Join(err, b.Abort(ctx))
	}
	count := &fault.Injector{}
	if err := run(fault.With(t.Context(), count)); err != nil || len(count.Passed()) != 6 {
		t.Fatalf("got %v at %v, want 6 points", err, count.Passed())
	}
	conn := s.Connect(t, "postgres")
	for n, name := range count.Passed() {
		err := run(fault.With(t.Context(), &fault.Injector{Action: "error", At: n + 1}))
		if !errors.Is(err, fault.ErrInjected) || errors.Is(err, backup.ErrVoid) == (n < 2) {
			t.Errorf("%s: got %v", name, err)
		}
		until(t, "the end of all sessions after "+name, func() bool {
			return query(t, conn, `SELECT count(*)::text FROM pg_stat_activity WHERE application_name = 'cleancut' AND pid <> pg_backend_pid()`) == "0"
		})
	}
}

func TestALabelThatWouldBreakBackupLabelIsRefused(t *testing.T) {
	for _, text := range []string{"", "two\nlines", "ä", strings.Repeat("x", 513)} {
		if _, err := postgres.StartBackup(t.Context(), postgres.Target{}, postgres.BackupModeOptions{Label: text}); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("label %q: got %v, want ErrUsage", text, err)
		}
	}
}

func TestAPoolerIsRefusedForBackupMode(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{})
	l, err := net.Listen("unix", filepath.Join(s.Dir, ".s.PGSQL.6432"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go pool(t, l, filepath.Join(s.SocketDir, ".s.PGSQL.5432"))
	refused(t, postgres.Target{DSN: "host=" + s.Dir + " port=6432 user=postgres dbname=postgres"}, "a connection pooler lies between", "its socket, or its own port")
}

// pool passes sessions on and, like a pooler, gives the client a key of its own
// for cancelling (BackendKeyData, protocol.sgml).
func pool(t *testing.T, l net.Listener, server string) {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		up, err := (&net.Dialer{}).DialContext(t.Context(), "unix", server)
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(up, client); _ = up.Close() }()
		go func() {
			defer client.Close()
			head := make([]byte, 5)
			for {
				if _, err := io.ReadFull(up, head); err != nil {
					return
				}
				body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
				if _, err := io.ReadFull(up, body); err != nil {
					return
				}
				if head[0] == 'K' {
					binary.BigEndian.PutUint32(body, 1<<30)
				}
				if _, err := client.Write(append(append([]byte{}, head...), body...)); err != nil {
					return
				}
			}
		}()
	}
}

// replayed waits until the standby has replayed what the primary has written.
func replayed(t *testing.T, primary, standby *pgtest.Server) {
	t.Helper()
	lsn := query(t, primary.Connect(t, "postgres"), `SELECT pg_current_wal_insert_lsn()::text`)
	conn := standby.Connect(t, "postgres")
	until(t, "the standby", func() bool { return query(t, conn, `SELECT (pg_last_wal_replay_lsn() >= '`+lsn+`')::text`) == "true" })
}

func TestBackupModeOfAStandby(t *testing.T) {
	for _, i := range pgtest.Majors(t) {
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			t.Parallel()
			primary := pgtest.New(t, pgtest.Options{Major: i.Major, Small: true, Settings: map[string]string{"checkpoint_timeout": "1h", "autovacuum": "off"}})
			primary.Exec(t, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS x")
			standby := primary.Standby(t, nil)
			t.Run("tells that it is one", func(t *testing.T) { ofStandby(t, primary, standby) })
			t.Run("needs the primary's full_page_writes", func(t *testing.T) { fullPageWrites(t, primary, standby) })
			t.Run("is void when it was promoted", func(t *testing.T) { promoted(t, standby) })
			standby.Stop(t)
		})
	}
}

func ofStandby(t *testing.T, primary, standby *pgtest.Server) {
	b := startBackup(t, standby)
	primary.Exec(t, "INSERT INTO t SELECT generate_series(1, 1000)")
	replayed(t, primary, standby)
	if err := b.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	raw, control, err := postgres.ReadLiveControl(filepath.Join(standby.DataDirectory, "global", "pg_control"))
	if err != nil || control.State != postgres.ControlInArchiveRecovery || control.MinRecoveryLSN < uint64(b.Start().StartLSN) {
		t.Errorf("pg_control: %+v, %v", control, err)
	}
	if again, err := postgres.ParseControl(raw); err != nil || again != control {
		t.Errorf("the bytes of pg_control hold %+v, %v, want %+v", again, err, control)
	}
	stop, err := b.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !b.Start().Standby || !stop.Label.Standby || b.Start().Timeline != 1 || len(stop.MapFile) != 0 {
		t.Errorf("got %+v and %+v, want a backup of a standby on timeline 1", b.Start(), stop)
	}
	conn := standby.Connect(t, "postgres")
	flushed, err := postgres.FlushedRecordEnd(t.Context(), conn)
	if got := query(t, conn, `SELECT pg_last_wal_replay_lsn()::text`); err != nil || flushed.String() != got {
		t.Errorf("flushed up to %s, %v, want %s", flushed, err, got)
	}
}

func fullPageWrites(t *testing.T, primary, standby *pgtest.Server) {
	b := startBackup(t, standby)
	primary.Exec(t, "ALTER SYSTEM SET full_page_writes = off", "SELECT pg_reload_conf()")
	conn := primary.Connect(t, "postgres")
	until(t, "the setting", func() bool { return query(t, conn, "SHOW full_page_writes") == "off" })
	primary.Exec(t, "CHECKPOINT")
	replayed(t, primary, standby)
	stop, err := b.Stop(t.Context())
	if !errors.Is(err, backup.ErrVoid) || !strings.Contains(err.Error(), "full_page_writes=off") || !strings.Contains(backup.HintOf(err), "on the primary") {
		t.Errorf("stop: got %+v, %v (hint %q)", stop, err, backup.HintOf(err))
	}
	standby.Exec(t, "CHECKPOINT")
	refused(t, target(standby), "full_page_writes=off", "on the primary: full_page_writes = on and CHECKPOINT")
	primary.Exec(t, "ALTER SYSTEM RESET full_page_writes", "SELECT pg_reload_conf()")
	until(t, "the setting", func() bool { return query(t, conn, "SHOW full_page_writes") == "on" })
	primary.Exec(t, "CHECKPOINT") // as the hint says
	replayed(t, primary, standby)
	if err := startBackup(t, standby).Abort(t.Context()); err != nil {
		t.Error(err)
	}
}

func promoted(t *testing.T, standby *pgtest.Server) {
	b := startBackup(t, standby)
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	void(t, b, "the standby was promoted during the backup")
}
