package flow_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// sessions are those of the program that are in backup mode, and its receivers.
const sessions = `FROM pg_stat_activity WHERE application_name = 'cleancut' AND (backend_type = 'walsender' OR query ~ 'pg_(backend_pid|backup_st|control_checkpoint)') AND pid <> pg_backend_pid()`

// TestBadLuckInsideTheBracket: whatever happens to server, session or receiver
// between the start and the stop of backup mode makes the backup void, and
// nothing of it is left.
func TestBadLuckInsideTheBracket(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	dir := labtest.Folder(t)
	data, wal := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1}), storage(t, pool, dir, flow.StorageOptions{Name: "wal", Volumes: 1})
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(data, "pg"), WALDir: filepath.Join(wal, "pg"), Small: true})
	p.server.Exec(t, "CREATE ROLE keeper LOGIN SUPERUSER")
	take := func(user string, fast bool, during func(ctx context.Context) error) (backup.Manifest, error) {
		dsn := strings.Replace(p.server.DSN("postgres"), "user=postgres", "user="+user, 1)
		return p.flow.Backup(t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: dsn}, Mode: backup.ModeBracketed, FastCheckpoint: fast,
			Deadline: time.Minute, Quick: time.Minute, Rounds: 10, BeforeFreeze: during})
	}
	for _, c := range []struct {
		name, user string
		void       bool
		during     func()
		why        string
	}{
		{"its session is ended between the cuts", "postgres", true, func() {
			p.value("SELECT bool_or(pg_terminate_backend(pid)) " + sessions + " AND backend_type <> 'walsender'")
		}, "session was ended"},
		{"the server is restarted", "postgres", true, func() { p.server.Stop(t); p.server.Start(t) }, "restarted during the backup"},
		{"the server crashes and comes back", "postgres", true, func() { p.server.Crash(t); p.server.Start(t) }, "restarted during the backup"},
		{"the server crashes and is away", "postgres", true, func() { p.server.Crash(t) }, "cannot be asked why"},
		{"its receiver is ended", "postgres", false, func() {
			p.value("SELECT bool_or(pg_terminate_backend(pid)) " + sessions + " AND backend_type = 'walsender'")
		}, "capture WAL"},
		{"the stop fails", "keeper", true, func() { p.server.Exec(t, "ALTER ROLE keeper NOSUPERUSER") }, "permission denied for function pg_backup_stop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			reached := false
			_, err := take(c.user, true, func(context.Context) error { reached = true; c.during(); return nil })
			if err == nil || !reached || errors.Is(err, backup.ErrVoid) != c.void || errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), c.why) {
				t.Errorf("got %v (reached: %v), want void: %v, %q", err, reached, c.void, c.why)
			}
			if p.server.PID() == 0 {
				p.server.Start(t)
			}
			p.nothingOfABackup(t)
		})
	}
	t.Run("the WAL of a slow start is recycled meanwhile", func(t *testing.T) { p.recycled(t, take) })
}

// nothingOfABackup demands that no backup was ever taken, as far as one sees.
func (p *production) nothingOfABackup(t *testing.T) {
	t.Helper()
	p.until("the sessions and the temporary slot end", func() bool {
		return p.value("SELECT (SELECT count(*) "+sessions+") + (SELECT count(*) FROM pg_replication_slots)") == "0"
	})
	inv, err := p.flow.Provider.List(t.Context(), nil)
	if err != nil || len(inv.Snapshots) > 0 {
		t.Errorf("snapshots left: %v, %v", inv.Snapshots, err)
	}
	for _, pattern := range []string{filepath.Join(p.flow.State.Path(), "capture-*"), filepath.Join(filepath.Dir(p.flow.State.Path()), "catalog", "clusters", "lab", "backups", "*", "*"),
		filepath.Join(filepath.Dir(p.flow.State.Path()), "catalog", "clusters", "lab", "intents", "*")} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	thawed, err := p.flow.Thaw(t.Context(), nil)
	for _, m := range thawed {
		if m.WasFrozen {
			t.Errorf("%s was frozen still", m.Mountpoint)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// recycled lets the server write and recycle many times max_wal_size while the
// start of backup mode waits for its spread checkpoint. The WAL that the
// backup needs is there all the same, and not in the server any more.
func (p *production) recycled(t *testing.T, take func(user string, fast bool, during func(context.Context) error) (backup.Manifest, error)) {
	t.Helper()
	p.server.Exec(t, "ALTER SYSTEM SET max_wal_size = '2MB'", "ALTER SYSTEM SET min_wal_size = '2MB'", "ALTER SYSTEM SET wal_keep_size = 0", "ALTER SYSTEM SET checkpoint_timeout = '1h'", "SELECT pg_reload_conf()",
		"CREATE TABLE said (word text)", "CREATE TABLE pages AS SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
	var m backup.Manifest
	failed := make(chan error, 1)
	go func() {
		var err error
		m, err = take("postgres", false, func(context.Context) error {
			p.server.Exec(t, "INSERT INTO said VALUES ('in the bracket')")
			write(t, p, 6)
			return nil
		})
		failed <- err
	}()
	p.until("the start waits for its checkpoint", func() bool {
		return p.value("SELECT count(*) FROM pg_stat_activity WHERE query ~ 'pg_backup_start' AND wait_event ~ '^Checkpoint'") == "1"
	})
	write(t, p, 10)
	p.server.Exec(t, "CHECKPOINT") // hurries that one on
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	write(t, p, 4)
	p.server.Exec(t, "CHECKPOINT", "CHECKPOINT")
	first := m.Bracket.WAL[0]
	p.until("the server has recycled "+first, func() bool {
		_, err := os.Stat(filepath.Join(p.server.DataDirectory, "pg_wal", first))
		return errors.Is(err, os.ErrNotExist)
	})
	if len(m.Bracket.WAL) < 10 {
		t.Errorf("the bracket's WAL is %v, want some that was written meanwhile", m.Bracket.WAL)
	}
	if rows, err := p.rowsAt(m.ID, "end", 0); err != nil || strings.Join(rows, " ") != "in the bracket" {
		t.Errorf("got %q, %v", rows, err)
	}
}

// write makes so many megabytes of WAL.
func write(t *testing.T, p *production, megabytes int) {
	t.Helper()
	for range megabytes {
		p.server.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
	}
}

// TestWhatStopsRecoveryIsNotTheImagesFault: neither a restore_command that is
// killed nor settings that production has raised since make a verdict of damage.
func TestWhatStopsRecoveryIsNotTheImagesFault(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	dir := labtest.Folder(t)
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1}), "pg"), Small: true,
		Settings: map[string]string{"max_prepared_transactions": "4"}})
	p.shipping()
	p.server.Exec(t, "CREATE TABLE said (word text)")
	m, err := p.flow.Backup(t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		t.Fatal(err)
	}
	p.server.Exec(t, "ALTER SYSTEM SET max_connections = 200")
	p.server.Stop(t)
	p.server.Start(t)
	p.server.Exec(t, "INSERT INTO said VALUES ('with more connections')")
	p.shipped()
	latest := backup.Target{Kind: backup.TargetLatest}
	killed := filepath.Join(dir, "killed")
	if err := os.WriteFile(killed, []byte("#!/bin/sh\nkill -9 $$\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.other.Program = killed
	v, err := p.other.Verify(t.Context(), flow.VerifyOptions{ID: m.ID, Level: backup.LevelStart, Recovery: flow.Recovery{Target: latest}})
	if err == nil || errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrLeft) || len(v.Checks) > 0 || !strings.Contains(err.Error(), "restore_command failed") {
		t.Errorf("with a restore_command that is killed: got %+v, %v, want no verdict", v, err)
	}
	p.other.Program = labtest.Binary(t)
	if rows, err := p.rowsAt(m.ID, "latest", 0); err != nil || fmt.Sprint(rows) != "[with more connections]" {
		t.Errorf("behind a larger max_connections: got %q, %v", rows, err)
	}
}
