package main_test

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
)

// slots lists the replication slots of production that stay.
func (p *production) slots(t testing.TB) string {
	t.Helper()
	conn := p.server.Connect(detached{t}, "postgres")
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	var out string
	if err := conn.QueryRow(detached{t}.Context(), "SELECT coalesce(string_agg(slot_name, ' '), '') FROM pg_replication_slots WHERE NOT temporary").Scan(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestStandbyFromItsSeedToItsRemoval(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newLab(t, "xfs", 8<<30).cluster(t, pgtest.Options{Settings: map[string]string{"wal_keep_size": "200MB"}})
	stop := p.writer(t)
	id := p.backup(t)
	root := filepath.Join(p.dir, "copy", "s")
	read := func(o outcome) (s flow.StandbyStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(o.out), &s); err != nil {
			t.Fatalf("%v\n%s%s", err, o.out, o.err)
		}
		return s
	}
	made := read(p.must(t, "standby", string(id), "--to", root, "--json"))
	if made.Root != root || made.SocketDir == "" || made.Port != 5432 || made.Slot == "" || !made.Streaming || made.LagBytes == nil || made.Slot != p.slots(t) {
		t.Errorf("made: %+v, slots %s", made, p.slots(t))
	}
	if o := p.must(t, "sweep"); strings.Contains(o.out, "remove copy") {
		t.Errorf("sweep: %s", o.out)
	}
	acked := stop()
	eventually(t, "nothing is missing", func() bool { return *read(p.must(t, "standby", "status", root, "--json")).LagBytes == 0 })
	if o := p.must(t, "standby", "list"); !strings.Contains(o.out, string(id)) || !strings.Contains(o.out, "streaming") {
		t.Errorf("list: %s", o.out)
	}
	for _, words := range []string{"streaming, timeline 1", "behind the primary", "for which the primary keeps", made.Slot} {
		if o := p.must(t, "standby", "status", root); !strings.Contains(o.out, words) {
			t.Errorf("status lacks %q: %s", words, o.out)
		}
	}
	p.run(t, "standby", string(id), "--to", root).refused(t, 2, "is not empty")
	p.server.Stop(t)
	if o := p.run(t, "standby", "status", root, "--json"); o.code != 1 || read(o).State != flow.Broken {
		t.Errorf("with production down: exit %d, %s%s", o.code, o.out, o.err)
	}
	if o := p.must(t, "standby", "promote", root); !strings.Contains(o.out, "timeline 2") || !strings.Contains(o.out, "slot "+made.Slot+" is left") {
		t.Errorf("promote: %s", o.out)
	}
	conn, err := pgx.Connect(t.Context(), "host="+made.SocketDir+" user=postgres dbname=postgres")
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM mirror").Scan(&n); err != nil || n < acked {
		t.Errorf("%d rows, %v, %d were acknowledged", n, err, acked)
	}
	_ = conn.Close(t.Context())
	p.run(t, "standby", "remove", root).refused(t, 5, made.Slot, "--leave-slot")
	p.server.Start(t)
	if o := p.run(t, "restore", "--undo", root); o.code != 0 {
		t.Errorf("restore --undo: exit %d\n%s", o.code, o.err)
	}
	p.clean(t)
	if s := p.slots(t); s != "" {
		t.Errorf("left: slots %s", s)
	}
	p.run(t, "standby", "status", root).refused(t, 1, "no standby at", "standby list")
}

// pushed pushes what production's pg_wal has of whole segments.
func (p *production) pushed(t *testing.T) {
	t.Helper()
	conn := p.server.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	var names []string
	if err := conn.QueryRow(t.Context(), "SELECT array_agg(name ORDER BY name) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' AND name < pg_walfile_name(pg_current_wal_lsn())").Scan(&names); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		p.must(t, "wal", "push", filepath.Join(p.server.DataDirectory, "pg_wal", name))
	}
}

func TestAStandbyStoppedAnywhereLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newLab(t, "xfs", 8<<30).cluster(t, pgtest.Options{Small: true, Settings: map[string]string{"wal_keep_size": "200MB", "max_wal_size": "4MB", "min_wal_size": "2MB"}})
	id := p.backup(t)
	root := filepath.Join(p.dir, "copy", "s")
	none := func(t *testing.T, _ outcome) {
		t.Helper()
		if s := p.slots(t); s != "" {
			t.Errorf("left: slots %s", s)
		}
		if left, err := filepath.Glob(filepath.Join(p.state, "wal-for-*")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	undo := func(t *testing.T, o outcome) {
		t.Helper()
		if o.code == 0 {
			p.must(t, "standby", "remove", root)
		}
		none(t, o)
	}
	made := func(*testing.T) []string { return []string{"standby", string(id), "--to", root} }
	t.Run("slot", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{within: "replication.", removes: undo, always: true, args: made})
	})
	t.Run("server", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{within: "postgres.start", removes: undo, always: true, args: made})
	})
	t.Run("all of it", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: undo, always: true, args: made})
	})
	t.Run("removal", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: none, always: true, args: func(t *testing.T) []string {
			p.must(t, made(t)...)
			return []string{"standby", "remove", root}
		}})
	})
	p.server.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 4000000))", "SELECT pg_switch_wal()", "SELECT pg_logical_emit_message(true, 'x', 'x')")
	p.server.Exec(t, "ALTER SYSTEM SET wal_keep_size = 0", "SELECT pg_reload_conf()")
	for range 2 {
		p.pushed(t)
		p.server.Exec(t, "CHECKPOINT", "SELECT pg_switch_wal()", "SELECT pg_logical_emit_message(true, 'x', 'x')")
	}
	t.Run("served by the catalog", func(t *testing.T) {
		served := func(t *testing.T, o outcome) {
			t.Helper()
			if o.code == 0 && !slices.Contains(o.points, "archive.rename") {
				t.Errorf("the catalog served nothing: %q", o.points)
			}
			undo(t, o)
		}
		p.underFaults(t, flowUnderFault{within: "archive.", killsOnce: true, removes: served, always: true, args: func(t *testing.T) []string {
			p.pushed(t)
			return made(t)
		}})
	})
	p.clean(t)
}
