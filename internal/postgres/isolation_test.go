package postgres_test

import (
	"context"
	"path/filepath"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func TestEverySettingOfTheIsolationHoldsWhateverTheFilesSay(t *testing.T) {
	t.Parallel()
	archive := pgtest.Folder(t)
	c := newCluster(t, map[string]string{
		"archive_mode": "on", "archive_command": "cp %p " + archive + "/%f", "archive_cleanup_command": "false", "recovery_end_command": "false",
		"primary_conninfo": "host=/nonexistent", "primary_slot_name": "standby1", "synchronous_standby_names": "",
		"max_logical_replication_workers": "4", "logging_collector": "on", "log_directory": archive,
		"cluster_name": "production", "external_pid_file": "", "max_connections": "77", "max_prepared_transactions": "7", "max_wal_senders": "12",
		"max_worker_processes": "11", "max_locks_per_transaction": "99", "shared_preload_libraries": "pg_stat_statements,pg_prewarm",
		"DateStyle": "German", "log_destination": "stderr",
	})
	c.Exec(t, "ALTER SYSTEM SET listen_addresses = '127.0.0.1'", "ALTER SYSTEM SET synchronous_standby_names = '*'", "ALTER SYSTEM SET max_connections = 200")
	c.Exec(t, "SELECT pg_sleep(2.1)", "CHECKPOINT", "SELECT pg_switch_wal()") // the tablespace is no longer fresh; something to archive
	c.Crash(t)
	p := c.copyFiles(t)
	before := snapshotOf(t, archive)
	// Unconfined: the settings alone have to hold.
	inst := start(t, p, func(c *postgres.Copy) { c.Unconfined = true })
	conn, err := inst.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	got := isolated(t, conn, p)
	for name, want := range map[string]string{
		"max_connections": "77", "max_prepared_transactions": "7", "max_wal_senders": "12", "max_worker_processes": "11", "max_locks_per_transaction": "99",
		"shared_preload_libraries": `"pg_stat_statements"`, "DateStyle": "German, DMY", "fsync": "on", "hba_file": filepath.Join(p.Root, ".cleancut", "pg_hba.conf"),
	} {
		if got[name] != want {
			t.Errorf("%s = %q, want %q", name, got[name], want)
		}
	}
	// ALTER SYSTEM on the copy cannot undo it either.
	for _, q := range []string{"ALTER SYSTEM SET archive_command = 'cp %p " + archive + "/%f'", "ALTER SYSTEM SET primary_conninfo = 'host=production'", "SELECT pg_reload_conf()", "SELECT pg_switch_wal()", "CHECKPOINT"} {
		if _, err := conn.Exec(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if got := query(t, conn, `SELECT current_setting('archive_command') || current_setting('primary_conninfo')`); got != "(disabled)" && got != "" {
		t.Errorf("after ALTER SYSTEM: %q", got)
	}
	if after := snapshotOf(t, archive); after != before {
		t.Errorf("the copy archived or logged where production does:\n%s", after)
	}
}

// isolated demands that every setting of the table holds on the running copy,
// and returns all its settings.
func isolated(t *testing.T, conn *pgx.Conn, p postgres.Plan) map[string]string {
	t.Helper()
	control, err := postgres.ReadControl(filepath.Join(p.Data, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	rows, err := conn.Query(t.Context(), `SELECT name, current_setting(name) FROM pg_settings`)
	if err != nil {
		t.Fatal(err)
	}
	var name, value string
	if _, err := pgx.ForEachRow(rows, []any{&name, &value}, func() error { got[name] = value; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, s := range postgres.Isolation(startable(t, p), control) {
		g, known := got[s.Name]
		if s.Name == "archive_command" && g == "(disabled)" { // how it shows while archive_mode is off
			continue
		}
		if !known || g != s.Value {
			t.Errorf("%s = %q, want %q against: %s", s.Name, g, s.Value, s.Danger)
		}
		if s.Danger == "" || s.Source == "" {
			t.Errorf("%s has no reason in the table", s.Name)
		}
	}
	return got
}

func TestLibrariesThatActByThemselvesAreNotPreloaded(t *testing.T) {
	keep, dropped := postgres.PreloadLibraries(`pg_stat_statements, "pg_cron", $libdir/timescaledb ,/usr/lib/x/pg_net.so,,citus`)
	if want := []string{"pg_stat_statements", "$libdir/timescaledb", "citus"}; !slices.Equal(keep, want) {
		t.Errorf("got %q, want %q", keep, want)
	}
	if want := []string{"pg_cron", "/usr/lib/x/pg_net.so"}; !slices.Equal(dropped, want) {
		t.Errorf("dropped %q, want %q", dropped, want)
	}
}

func TestTheIsolationKnowsWhichVersionHasWhichSetting(t *testing.T) {
	names := func(major int) []string {
		var out []string
		for _, s := range postgres.Isolation(postgres.Copy{Root: "/x", Server: backup.Server{VersionNum: major * 10000}}, postgres.Control{}) {
			out = append(out, s.Name)
		}
		return out
	}
	for _, k := range []struct {
		major int
		name  string
		want  bool
	}{
		{13, "recovery_init_sync_method", false}, {14, "recovery_init_sync_method", true},
		{14, "archive_library", false}, {15, "archive_library", true},
		{15, "promote_trigger_file", true}, {16, "promote_trigger_file", false},
		{16, "event_triggers", false}, {17, "event_triggers", true}, {18, "sync_replication_slots", true},
		{13, "archive_mode", true}, {18, "archive_mode", true},
	} {
		if got := slices.Contains(names(k.major), k.name); got != k.want {
			t.Errorf("%s in version %d: got %v, want %v", k.name, k.major, got, k.want)
		}
	}
}
