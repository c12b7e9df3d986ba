package flow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/flow/restore"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/wal"
)

// followed is production with data and WAL on volumes of their own, of which
// standbys are made on the same host.
func followed(t *testing.T, pool provider.Provider, o pgtest.Options, settings map[string]string) *production {
	t.Helper()
	dir := labtest.Folder(t)
	data, wal := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1}), storage(t, pool, dir, flow.StorageOptions{Name: "wal", Volumes: 1})
	o.Data, o.WALDir, o.Small, o.NoStart = filepath.Join(data, "pg"), filepath.Join(wal, "pg"), true, true
	p := serve(t, pool, pool, dir, o)
	for k, v := range settings {
		pgtest.Append(t, filepath.Join(p.server.DataDirectory, "postgresql.conf"), fmt.Sprintf("%s = '%s'\n", k, v))
	}
	p.server.Start(t)
	p.flow.Program, p.flow.BinDirs = labtest.Binary(t), []string{p.server.Installation.Bin}
	return p
}

// soon is until, and gives up: a standby that does not follow must not keep the
// tests of everybody waiting.
func (p *production) soon(what string, ok func() bool) {
	p.t.Helper()
	end := time.Now().Add(time.Minute)
	p.until(what, func() bool {
		if time.Now().After(end) {
			p.t.Fatalf("never: %s", what)
		}
		return ok()
	})
}

func (p *production) target() postgres.Target {
	return postgres.Target{DSN: p.server.DSN("postgres"), DataDirectory: p.server.DataDirectory}
}

// words puts acknowledged inserts and transfers on production.
func (p *production) words() (stop func()) {
	p.t.Helper()
	conn, err := p.connect(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(p.t.Context())
	if _, err := load.Create(p.t.Context(), conn, load.Options{Rows: 2000}); err != nil {
		p.t.Fatal(err)
	}
	if p.load, err = load.Start(p.t.Context(), p.connect, load.Which{Words: &load.WordsOptions{}, Transfers: &load.TransfersOptions{}}); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _, _ = p.load.Stop() })
	if err := p.load.Words.Await(p.t.Context(), 100); err != nil {
		p.t.Fatal(err)
	}
	return func() {
		if _, err := p.load.Stop(); err != nil {
			p.t.Error(err)
		}
	}
}

func (p *production) take(mode backup.Mode) backup.Manifest {
	p.t.Helper()
	m, err := p.flow.Backup(p.t.Context(), flow.BackupOptions{Target: p.target(), Mode: mode, FastCheckpoint: mode == backup.ModeBracketed, Deadline: time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

// seeded makes a standby and removes it in the end, if it is there still.
func (p *production) seeded(id backup.ID, change func(*flow.StandbyOptions)) flow.StandbyStatus {
	p.t.Helper()
	o := flow.StandbyOptions{ID: id, Root: filepath.Join(labtest.Folder(p.t), "s"), Primary: p.target()}
	if change != nil {
		change(&o)
	}
	s, release, err := p.flow.Standby(p.t.Context(), o)
	if err != nil {
		p.t.Fatalf("%v (%s)", err, backup.HintOf(err))
	}
	release()
	p.t.Cleanup(func() {
		if _, err := p.flow.StandbyStatus(context.WithoutCancel(p.t.Context()), s.Root); err == nil {
			if _, err := p.flow.RemoveStandby(labtest.Context(p.t), s.Root, true); err != nil {
				p.t.Error(err)
			}
		}
	})
	return s
}

func (p *production) status(root string) flow.StandbyStatus {
	p.t.Helper()
	s, err := p.flow.StandbyStatus(p.t.Context(), root)
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// slots lists production's slots.
func (p *production) slots() string {
	p.t.Helper()
	return p.value("SELECT coalesce(string_agg(slot_name, ' ' ORDER BY slot_name), '') FROM pg_replication_slots WHERE NOT temporary")
}

// nothingLeft demands that no copy, volume of a copy or slot is there.
func (p *production) nothingLeft() {
	p.t.Helper()
	if copies, err := p.flow.State.Copies(); err != nil || len(copies) > 0 {
		p.t.Errorf("left: copies %v, %v", copies, err)
	}
	inv, err := p.flow.Provider.List(p.t.Context(), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, v := range inv.Volumes {
		if v.Tags[backup.TagStorage] == "" {
			p.t.Errorf("left: volume %s %v", v.ID, v.Tags)
		}
	}
	if s := p.slots(); strings.Contains(s, "standby") {
		p.t.Errorf("left: slots %s", s)
	}
}

// contents sums up every table.
func sums(t *testing.T, conn *pgx.Conn) (out []string) {
	t.Helper()
	rows, err := conn.Query(t.Context(), `SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		var n, sum int64
		if err := conn.QueryRow(t.Context(), "SELECT count(*), coalesce(sum(hashtext(x::text)::bigint), 0) FROM "+table+" x").Scan(&n, &sum); err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%s: %d rows, %d", table, n, sum))
	}
	return out
}

func (p *production) contents() []string {
	p.t.Helper()
	conn, err := p.connect(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(p.t.Context())
	return sums(p.t, conn)
}

// of opens a session on a standby.
func (p *production) of(s flow.StandbyStatus) *pgx.Conn {
	p.t.Helper()
	conn, err := pgx.Connect(p.t.Context(), fmt.Sprintf("host=%s port=%d user=%s dbname=postgres", s.SocketDir, s.Port, s.Superuser))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(p.t.Context())) })
	return conn
}

func TestAStandbyFollowsUnderLoadAndItsPromotedContentsAgree(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	for _, i := range pgtest.Majors(t) {
		if i.Major != 13 && i.Major != 15 && i.Major != 18 {
			continue
		}
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			p := followed(t, pool, pgtest.Options{Major: i.Major}, map[string]string{"wal_keep_size": "500MB"})
			stop := p.words()
			atomic, bracketed := p.take(backup.ModeFreeze), p.take(backup.ModeBracketed)
			var standbys []flow.StandbyStatus
			for _, m := range []backup.Manifest{atomic, bracketed} {
				s := p.seeded(m.ID, nil)
				if !s.Streaming || s.LagBytes == nil || s.HeldBack == nil || s.SlotStatus == "" || s.Slot == "" || s.Timeline != 1 || s.Sync != "async" {
					t.Errorf("%s: got %+v", m.Cut.Achieved, s)
				}
				standbys = append(standbys, s)
			}
			if err := p.load.Words.Await(t.Context(), 200); err != nil {
				t.Fatal(err)
			}
			stop()
			want := p.contents()
			for _, s := range standbys {
				p.soon("the standby has caught up", func() bool {
					s := p.status(s.Root)
					return s.State == flow.Streaming && *s.LagBytes == 0 && *s.LagSeconds == 0
				})
				promotion, err := p.flow.PromoteStandby(t.Context(), s.Root)
				if err != nil || promotion.Timeline != 2 || promotion.Slot != "" {
					t.Errorf("promoted: %+v, %v", promotion, err)
				}
				conn := p.of(s)
				if got := sums(t, conn); !slices.Equal(got, want) {
					t.Errorf("the promoted standby has %v, production %v", got, want)
				}
				if _, err := conn.Exec(t.Context(), "CREATE TABLE own (x int)"); err != nil {
					t.Error(err)
				}
				if now := p.status(s.Root); now.State != flow.Promoted || now.Timeline != 2 || now.Slot != "" {
					t.Errorf("after its promotion: %+v", now)
				}
				if again, err := p.flow.PromoteStandby(t.Context(), s.Root); err != nil || again.Timeline != 2 {
					t.Errorf("promoted again: %+v, %v", again, err)
				}
				if _, err := p.flow.RemoveCopy(t.Context(), s.Root); err != nil {
					t.Error(err)
				}
			}
			if got := p.contents(); !slices.Equal(got, want) {
				t.Errorf("production has %v, it had %v", got, want)
			}
			p.nothingLeft()
		})
	}
}

// recycles writes until production has the segment of that position no longer.
func (p *production) recycles(lsn backup.LSN) {
	p.t.Helper()
	const size = 1 << 20
	at := wal.At(1, lsn, size).File(size).String()
	p.soon("production recycles its WAL", func() bool {
		p.server.Exec(p.t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 3000000))", "SELECT pg_switch_wal()", "CHECKPOINT")
		return p.value("SELECT count(*) FROM pg_ls_waldir() WHERE name = '"+at+"'") == "0"
	})
}

// killed ends the server of a standby as a power cut would.
func killed(t *testing.T, s flow.StandbyStatus) {
	t.Helper()
	if err := postgres.Kill(t.Context(), s.Root); err != nil {
		t.Fatal(err)
	}
}

// sees waits until the standby shows what production has.
func (p *production) sees(s flow.StandbyStatus) {
	p.t.Helper()
	p.soon("the standby has caught up", func() bool {
		now := p.status(s.Root)
		return now.State == flow.Streaming && now.LagBytes != nil && *now.LagBytes == 0
	})
	if got, want := sums(p.t, p.of(s)), p.contents(); !slices.Equal(got, want) {
		p.t.Errorf("the standby has %v, production %v", got, want)
	}
}

// refused fails the test unless no standby can be made of it, for that reason,
// and nothing was made.
func (p *production) refused(id backup.ID, is error, change func(*flow.StandbyOptions), words ...string) {
	p.t.Helper()
	o := flow.StandbyOptions{ID: id, Root: filepath.Join(labtest.Folder(p.t), "s"), Primary: p.target()}
	if change != nil {
		change(&o)
	}
	before := p.slots()
	_, release, err := p.flow.Standby(p.t.Context(), o)
	if err == nil {
		release()
		p.t.Fatalf("made, want it refused: %v", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error()+backup.HintOf(err), w) {
			p.t.Errorf("got %v (%s), want %q in it", err, backup.HintOf(err), w)
		}
	}
	if !errors.Is(err, is) || errors.Is(err, backup.ErrLeft) || backup.HintOf(err) == "" {
		p.t.Errorf("got %v (%s), want %v and a hint", err, backup.HintOf(err), is)
	}
	if after := p.slots(); after != before {
		p.t.Errorf("slots: %s, before %s", after, before)
	}
	if _, err := os.Stat(o.Root); !errors.Is(err, os.ErrNotExist) {
		p.t.Errorf("left: %s: %v", o.Root, err)
	}
	p.nothingLeft()
}

func TestTheCatalogBridgesWhatThePrimaryHasRecycled(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	for _, i := range pgtest.Majors(t) {
		if i.Major != 13 && i.Major != 15 && i.Major != 18 {
			continue
		}
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			old := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "archive"))
			p := followed(t, pool, pgtest.Options{Major: i.Major}, map[string]string{"max_wal_size": "4MB", "min_wal_size": "2MB",
				"archive_mode": "on", "archive_command": "test ! -f " + old + "/%f && cp %p " + old + "/%f"})
			p.shipping()
			p.server.Exec(t, "CREATE TABLE said AS SELECT generate_series(1, 100) AS n")
			m := p.take(backup.ModeFreeze)
			p.server.Exec(t, "INSERT INTO said VALUES (1000)")
			p.recycles(m.Cut.FlushLSN)
			p.server.Exec(t, "INSERT INTO said VALUES (1001)")
			p.shipped()
			s := p.seeded(m.ID, nil)
			p.sees(s)

			killed(t, s)
			if now := p.status(s.Root); now.State != flow.Broken || now.Why == "" || now.LagBytes != nil || now.SlotStatus == "" {
				t.Errorf("with its server killed: %+v", now)
			}
			p.server.Exec(t, "SELECT pg_drop_replication_slot('"+s.Slot+"')", "INSERT INTO said VALUES (1002)")
			lsn := p.shipped()
			p.recycles(lsn)
			if now := p.status(s.Root); now.State != flow.Broken || now.SlotStatus != "missing" {
				t.Errorf("with its slot dropped: %+v", now)
			}
			p.shipped()
			if now, err := p.flow.StartStandby(t.Context(), s.Root); err != nil || !now.Streaming {
				t.Fatalf("started: %+v, %v (%s)", now, err, backup.HintOf(err))
			}
			p.sees(s)
			if now, err := p.flow.StartStandby(t.Context(), s.Root); err != nil || !now.Streaming {
				t.Errorf("started again: %+v, %v", now, err)
			}

			p.server.Exec(t, "ALTER SYSTEM SET max_slot_wal_keep_size = '30MB'", "SELECT pg_reload_conf()")
			killed(t, s)
			p.soon("the slot is invalidated", func() bool {
				p.server.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 3000000))", "SELECT pg_switch_wal()", "CHECKPOINT")
				return p.value("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '"+s.Slot+"'") == "lost"
			})
			if now := p.status(s.Root); now.State != flow.Broken || now.SlotStatus != "lost" {
				t.Errorf("with its slot invalidated: %+v", now)
			}
			p.server.Exec(t, "ALTER SYSTEM RESET max_slot_wal_keep_size", "SELECT pg_reload_conf()", "INSERT INTO said VALUES (1003)")
			p.shipped()
			if now, err := p.flow.StartStandby(t.Context(), s.Root); err != nil || !now.Streaming {
				t.Fatalf("started: %+v, %v (%s)", now, err, backup.HintOf(err))
			}
			p.sees(s)
			if _, err := p.flow.PromoteStandby(t.Context(), s.Root); err != nil {
				t.Fatal(err)
			}
			p.oldWay(old, p.of(s))
			killed(t, s)
			if now, err := p.flow.StartStandby(t.Context(), s.Root); err != nil || now.State != flow.Promoted {
				t.Errorf("a promoted one, started: %+v, %v", now, err)
			}
			if _, err := p.flow.RemoveCopy(t.Context(), s.Root); err != nil {
				t.Error(err)
			}
			p.nothingLeft()

			// Neither of both has it.
			gone := filepath.Join(filepath.Dir(p.flow.State.Path()), "catalog", "clusters", "lab", "wal", "00000001", wal.At(1, m.Cut.FlushLSN, 1<<20).Next().File(1<<20).String()+".zst")
			if err := os.Remove(gone); err != nil {
				t.Fatal(err)
			}
			p.refused(m.ID, backup.ErrNotFound, nil, "no longer", "before what the primary has", "take a newer backup")
		})
	}
}

// oldWay demands that archive_command has brought every segment to its folder,
// that each is the one that the catalog has, and that nobody else wrote there.
func (p *production) oldWay(dir string, promoted *pgx.Conn) {
	p.t.Helper()
	const size = 1 << 20
	if _, err := promoted.Exec(p.t.Context(), "SELECT pg_switch_wal()"); err != nil {
		p.t.Error(err)
	}
	p.server.Exec(p.t, "SELECT pg_logical_emit_message(true, 'x', 'a segment with nothing in it is not switched')")
	last := p.value("SELECT pg_walfile_name(pg_switch_wal())")
	p.soon("the last segment is archived", func() bool { return p.value("SELECT last_archived_wal >= '"+last+"' FROM pg_stat_archiver") == "true" })
	if failed := p.value("SELECT failed_count FROM pg_stat_archiver"); failed != "0" {
		p.t.Errorf("archive_command failed %s times", failed)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		p.t.Fatal(err)
	}
	have := wal.Set{}
	system, err := p.flow.Catalog.WAL().System(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	compared := 0
	for _, e := range entries {
		f, err := wal.ParseFile(e.Name())
		if err != nil || f.Timeline != 1 {
			p.t.Errorf("%s in the old archive: %v", e.Name(), err)
			continue
		}
		g, err := f.Segment(size)
		if err != nil || f.Kind != wal.Whole {
			continue
		}
		have[g] = true
		var ours bytes.Buffer
		if err := p.flow.Catalog.WAL().Get(p.t.Context(), f, system, &ours); errors.Is(err, backup.ErrNotFound) { // before our slot, or on its way
			continue
		} else if err != nil {
			p.t.Fatal(err)
		}
		theirs, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil || !bytes.Equal(theirs, ours.Bytes()) {
			p.t.Errorf("%s: the old archive and the catalog differ: %v", e.Name(), err)
		}
		compared++
	}
	if r := have.Ranges(); len(r) != 1 || compared < 10 {
		p.t.Errorf("%d segments compared, ranges of the old archive: %v", compared, r)
	}
}

func TestAPrimaryThatCannotBeFollowedIsRefused(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := followed(t, localPool(t), pgtest.Options{}, map[string]string{"wal_keep_size": "500MB"})
	p.server.Exec(t, "CREATE TABLE said AS SELECT generate_series(1, 100) AS n")
	early := p.take(backup.ModeFreeze)
	second := p.server.Standby(t, nil)
	at := func(s *pgtest.Server) func(*flow.StandbyOptions) {
		return func(o *flow.StandbyOptions) { o.Primary = postgres.Target{DSN: s.DSN("postgres")} }
	}
	p.refused(early.ID, backup.ErrUnsupported, at(second), "is a standby itself", "--primary")
	p.refused(early.ID, backup.ErrNotOurs, at(pgtest.New(t, pgtest.Options{})), "the primary is of system", "--primary")
	p.server.Exec(t, "SELECT pg_create_physical_replication_slot('taken')")
	p.refused(early.ID, backup.ErrExists, func(o *flow.StandbyOptions) { o.Slot = "taken" }, "taken", "--slot")
	p.server.Exec(t, "ALTER SYSTEM SET synchronous_commit = local", "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (\"*\")'", "SELECT pg_reload_conf()")
	p.soon("the setting", func() bool { return p.value("SELECT current_setting('synchronous_standby_names')") != "" })
	p.refused(early.ID, backup.ErrUnsupported, nil, "counts every standby in", "synchronous_standby_names")
	p.server.Exec(t, "ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")

	// The standby is promoted, and production goes on beside it.
	p.server.Exec(t, "INSERT INTO said VALUES (1000)")
	p.soon("it is replayed", func() bool {
		return p.value("SELECT bool_and(replay_lsn = pg_current_wal_lsn()) FROM pg_stat_replication") == "true"
	})
	if err := second.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	second.Exec(t, "INSERT INTO said VALUES (2000)")
	p.server.Exec(t, "INSERT INTO said VALUES (1001)")
	late := p.take(backup.ModeFreeze)
	p.refused(late.ID, backup.ErrUnsupported, at(second), "the history of the primary, which is on timeline 2, does not pass there", "take a backup")

	// What was cut before the fork follows it over to the new timeline.
	s := p.seeded(early.ID, at(second))
	p.soon("it has come to the new timeline", func() bool {
		now := p.status(s.Root)
		return now.State == flow.Streaming && now.Timeline == 2 && *now.LagBytes == 0
	})
	if got := sums(t, p.of(s)); !slices.Equal(got, sums(t, second.Connect(t, "postgres"))) {
		t.Errorf("got %v", got)
	}
	// An image that held WAL beyond the fork would have been given up.
	copies, err := p.flow.State.Copies()
	if err != nil || len(copies) != 1 {
		t.Fatalf("%v, %v", copies, err)
	}
	killed(t, s)
	o := restore.Options{Manifest: early, Installation: p.server.Installation, Progress: func(string, string) {},
		Standby: &restore.Standby{Command: func(string) string { return "false" }, Forks: 1}}
	if _, err := restore.Follow(t.Context(), o, copies[0]); !errors.Is(err, backup.ErrUnsupported) || !strings.Contains(err.Error(), "left that timeline") {
		t.Errorf("got %v", err)
	}
	if now := p.status(s.Root); now.State != flow.Broken {
		t.Errorf("its server runs: %+v", now)
	}
}

func TestAPrimaryThatIsDownLeavesItsSlotsToTheNextTry(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := followed(t, localPool(t), pgtest.Options{}, map[string]string{"wal_keep_size": "500MB"})
	p.server.Exec(t, "CREATE TABLE said AS SELECT generate_series(1, 100) AS n")
	m := p.take(backup.ModeFreeze)
	a, b := p.seeded(m.ID, func(o *flow.StandbyOptions) { o.Slot = "its_own_name" }), p.seeded(m.ID, nil)
	if list, err := p.flow.Standbys(t.Context()); err != nil || len(list) != 2 || a.Slot != "its_own_name" || a.Name == b.Name {
		t.Errorf("list: %+v, %v", list, err)
	}
	facts, err := p.flow.SweepFacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range flow.PlanSweep(facts) {
		if x.Kind != flow.OnlyList {
			t.Errorf("sweep would touch what stands: %+v", x)
		}
	}
	p.sees(a)
	want := p.contents()
	p.server.Stop(t)
	if now := p.status(a.Root); now.State != flow.Broken || !strings.Contains(now.Why, "the primary does not answer") || now.SlotStatus != "unknown" {
		t.Errorf("with the primary down: %+v", now)
	}
	promotion, err := p.flow.PromoteStandby(t.Context(), a.Root)
	if err != nil || promotion.Timeline != 2 || promotion.Slot != a.Slot || promotion.Why == "" {
		t.Errorf("promoted: %+v, %v", promotion, err)
	}
	if got := sums(t, p.of(a)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, err := p.flow.RemoveStandby(t.Context(), b.Root, false); !errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), b.Slot) || backup.HintOf(err) == "" {
		t.Errorf("removed: %v (%s)", err, backup.HintOf(err))
	}
	if _, err := os.Stat(b.Root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the rest is there: %v", err)
	}
	if _, err := p.flow.RemoveCopy(t.Context(), b.Root); !errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), b.Slot) {
		t.Errorf("removed again: %v", err)
	}
	p.server.Start(t)
	if facts, err = p.flow.SweepFacts(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.flow.Sweep(t.Context(), flow.PlanSweep(facts)); err != nil {
		t.Errorf("sweep: %v", err)
	}
	if s := p.slots(); s != a.Slot {
		t.Errorf("slots: %q, want that of the promoted one, which stands", s)
	}
	if _, err := p.flow.RemoveStandby(t.Context(), a.Root, false); err != nil {
		t.Error(err)
	}
	p.nothingLeft()
}

// TestAPasswordIsShownToThePrimaryOnly follows a primary that wants one, over
// TCP, and lets clients in over TCP.
func TestAPasswordIsShownToThePrimaryOnly(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	const secret = `se:cr\et word`
	address := fmt.Sprintf("127.%d.%d.9", 64+os.Getpid()%128, os.Getpid()/128%256)
	p := followed(t, localPool(t), pgtest.Options{HBA: "local all all trust\nlocal replication all trust\nhost all all all scram-sha-256\nhost replication all all scram-sha-256\n"},
		map[string]string{"wal_keep_size": "500MB", "listen_addresses": address, "password_encryption": "scram-sha-256"})
	p.server.Exec(t, "CREATE TABLE said AS SELECT 1 AS n", "CREATE ROLE rep REPLICATION LOGIN PASSWORD '"+secret+"'")
	m := p.take(backup.ModeFreeze)
	words := func(s string) string { return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'" }
	listen := address + ":5433"
	s := p.seeded(m.ID, func(o *flow.StandbyOptions) {
		o.Primary = postgres.Target{DSN: fmt.Sprintf("host=%s port=%d user=rep sslmode=disable password=%s", address, p.server.Port, words(secret))}
		o.Listen = listen
	})
	p.soon("it has caught up", func() bool { now := p.status(s.Root); return now.State == flow.Streaming && *now.LagBytes == 0 })
	info, err := os.Stat(filepath.Join(s.Root, postgres.Passfile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("passfile: %v, %v", info, err)
	}
	found := 0
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		line, _ := os.ReadFile(e)
		if bytes.Contains(line, []byte(s.Slot)) {
			found++
		}
		if bytes.Contains(line, []byte("cr\\et")) {
			t.Errorf("%s holds the password: %q", e, line)
		}
	}
	if found == 0 {
		t.Error("no server was looked at")
	}
	for _, dir := range []string{filepath.Join(s.Root, postgres.Private), p.flow.State.Path()} {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || path == filepath.Join(s.Root, postgres.Passfile) {
				return nil
			}
			b, err := os.ReadFile(path)
			if bytes.Contains(b, []byte("se:cr")) || bytes.Contains(b, []byte(`cr\\et`)) {
				t.Errorf("%s holds the password", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=5433 user=rep dbname=postgres sslmode=disable password=%s", address, words(secret)))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close(t.Context())
	if _, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=5433 user=rep dbname=postgres sslmode=disable password=wrong", address)); err == nil {
		t.Error("let in with a wrong password")
	}
	// A tablespace that is made now lies in production's folder, which the
	// standby must not touch.
	space := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "space"))
	p.server.Exec(t, "CREATE TABLESPACE late LOCATION '"+space+"'", "CREATE TABLE there TABLESPACE late AS SELECT 1 AS n")
	p.soon("the standby stops", func() bool { return p.status(s.Root).State == flow.Broken })
	if now := p.status(s.Root); !strings.Contains(now.Why, space) {
		t.Errorf("got %+v", now)
	}
	p.server.Exec(t, "CHECKPOINT", "SELECT n FROM there")
	if _, err := p.flow.RemoveStandby(t.Context(), s.Root, false); err != nil {
		t.Error(err)
	}
	p.nothingLeft()
	p.server.Exec(t, "DROP TABLE there", "DROP TABLESPACE late")
}
