package flow_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
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
	return p.value("SELECT coalesce(string_agg(slot_name, ' ' ORDER BY slot_name), '') FROM pg_replication_slots")
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
func contents(t *testing.T, conn *pgx.Conn) (out []string) {
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
	return contents(p.t, conn)
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
				p.until("the standby has caught up", func() bool {
					s := p.status(s.Root)
					return s.State == flow.Streaming && *s.LagBytes == 0 && *s.LagSeconds == 0
				})
				promotion, err := p.flow.PromoteStandby(t.Context(), s.Root)
				if err != nil || promotion.Timeline != 2 || promotion.Slot != "" {
					t.Errorf("promoted: %+v, %v", promotion, err)
				}
				conn := p.of(s)
				if got := contents(t, conn); !slices.Equal(got, want) {
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
