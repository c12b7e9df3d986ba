package postgres_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// TestEveryMajorIsInspectedCopiedAndStarted takes a cluster of each major
// version from the first look to the clean stop of its copy.
func TestEveryMajorIsInspectedCopiedAndStarted(t *testing.T) {
	for _, i := range pgtest.Majors(t) {
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			t.Parallel()
			archive := pgtest.Folder(t)
			production := map[string]string{
				"archive_mode": "on", "archive_command": "cp %p " + archive + "/%f", "synchronous_commit": "local", "wal_level": "logical",
				"max_replication_slots": "24", "max_prepared_transactions": "3", "shared_preload_libraries": "pg_stat_statements",
			}
			if i.Major >= 18 { // where origins got a limit of their own
				production["max_active_replication_origins"] = "24"
			}
			c := newClusterOf(t, i.Major, production)
			inspected(t, c)
			controlAgrees(t, c)
			var origins []string // more than a server takes by default
			for n := range 15 {
				origins = append(origins, fmt.Sprintf("SELECT pg_replication_origin_create('o%d')", n), fmt.Sprintf("SELECT pg_replication_origin_advance('o%d', '0/1')", n))
			}
			c.Exec(t, append(origins, "CHECKPOINT", "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
				"BEGIN", "INSERT INTO far_away VALUES (0)", "PREPARE TRANSACTION 'in doubt'", "INSERT INTO far_away SELECT generate_series(1, 1000)")...)
			flushed, err := postgres.FlushedRecordEnd(t.Context(), c.Connect(t, "postgres"))
			if err != nil {
				t.Fatal(err)
			}
			c.Crash(t)
			p := c.copyFiles(t)
			before := snapshotOf(t, archive)
			inst := start(t, p)
			conn, err := inst.Connect(t.Context(), "postgres")
			if err != nil {
				t.Fatal(err)
			}
			settings := isolated(t, conn, p)
			if got := settings["max_prepared_transactions"]; got != "3" {
				t.Errorf("max_prepared_transactions of the copy: %s", got)
			}
			if got := ask[string](t, inst, "SELECT (SELECT count(*) FROM far_away) || ' ' || (SELECT count(*) FROM pg_prepared_xacts) || ' ' || (SELECT count(*) FROM pg_replication_slots)"); got != "2000 1 0" {
				t.Errorf("rows, prepared transactions, slots: got %s, want 2000 1 0", got)
			}
			if inst.EndOfRecovery < flushed {
				t.Errorf("recovery ended at %s, %s was flushed", inst.EndOfRecovery, flushed)
			}
			if err := conn.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if err := inst.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			if after := snapshotOf(t, archive); after != before {
				t.Errorf("the copy archived:\n%s", after)
			}
		})
	}
}

// inspected demands the facts that do not depend on the version.
func inspected(t *testing.T, c *cluster) {
	t.Helper()
	r := c.running
	if r.Server.Major() != c.Installation.Major || r.Server.Timeline != 1 || r.InRecovery || !r.Superuser || r.BackupLabel || r.Postmaster != c.PID() {
		t.Errorf("inspected: %+v", r)
	}
	// Since 18 initdb turns checksums on by itself.
	if r.Server.DataChecksums != (r.Server.Major() >= 18) {
		t.Errorf("data checksums: %v", r.Server.DataChecksums)
	}
	if r.WALDirectory != filepath.Join(c.Dir, "wal") || len(r.Tablespaces) != 1 || r.Tablespaces[0].Path != filepath.Join(c.Dir, "space") {
		t.Errorf("places: %s %+v", r.WALDirectory, r.Tablespaces)
	}
	if len(r.Server.Unlogged) != 1 || r.Server.Settings["synchronous_commit"] != "local" {
		t.Errorf("unlogged %v, settings %v", r.Server.Unlogged, r.Server.Settings)
	}
	// Test servers run with fsync off, which is what there is to refuse.
	if got := texts(postgres.Preflight(r, postgres.Allow{}), true); !strings.Contains(got, "fsync is off") || strings.Count(got, "\n") > 1 {
		t.Errorf("refused: %q", got)
	}
}

// controlAgrees compares the live pg_control with what the server says of it.
func controlAgrees(t *testing.T, c *cluster) {
	t.Helper()
	control, err := postgres.ReadControl(filepath.Join(c.DataDirectory, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	conn := c.Connect(t, "postgres")
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	got := fmt.Sprint(control.SystemIdentifier, control.ControlVersion, control.CatalogVersion, backup.LSN(control.CheckpointLSN), backup.LSN(control.RedoLSN),
		control.TimeLine, control.WALSegmentSize, control.DataChecksumVersion, control.State)
	want := query(t, conn, `SELECT concat_ws(' ', system_identifier, pg_control_version, catalog_version_no, checkpoint_lsn, redo_lsn, timeline_id, bytes_per_wal_segment, data_page_checksum_version, 'in production')
		FROM pg_control_system(), pg_control_checkpoint(), pg_control_init()`)
	if got != want {
		t.Errorf("pg_control: got %s, want %s", got, want)
	}
}
