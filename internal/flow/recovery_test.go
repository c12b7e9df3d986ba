package flow_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// shipping streams production's WAL into the catalog until the test ends.
func (p *production) shipping() {
	p.t.Helper()
	ctx, stop := context.WithCancel(p.t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- p.flow.StreamWAL(ctx, flow.StreamWALOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Slot: "cleancut"})
	}()
	p.t.Cleanup(func() {
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			p.t.Errorf("wal stream: %v", err)
		}
	})
	p.until("the slot is there", func() bool {
		return p.value("SELECT count(*) FROM pg_replication_slots WHERE active") == "1"
	})
}

// until waits for something that will come.
func (p *production) until(what string, ok func() bool) {
	p.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-p.t.Context().Done():
			p.t.Fatalf("%s: %v", what, context.Cause(p.t.Context()))
		case <-tick.C:
		}
	}
}

func (p *production) value(sql string) (out string) {
	p.t.Helper()
	conn, err := p.connect(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(p.t.Context())
	if err := conn.QueryRow(p.t.Context(), "SELECT ("+sql+")::text").Scan(&out); err != nil {
		p.t.Fatal(err)
	}
	return out
}

// shipped ends the segment and waits until the catalog has it. It returns the
// end of what was written.
func (p *production) shipped() backup.LSN {
	p.t.Helper()
	lsn, err := backup.ParseLSN(p.value("SELECT pg_current_wal_lsn()"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.value("SELECT pg_switch_wal()")
	p.until("the WAL is shipped", func() bool {
		list, err := p.flow.ListWAL(p.t.Context())
		if err != nil {
			p.t.Fatal(err)
		}
		for _, t := range list.Timelines {
			for _, r := range t.Ranges {
				if r.Start <= lsn && lsn <= r.End {
					return true
				}
			}
		}
		return false
	})
	return lsn
}

// rowsAt restores to a target and returns the rows of the table said.
func (p *production) rowsAt(id backup.ID, target string, timeline uint32) (rows []string, err error) {
	p.t.Helper()
	t, err := backup.ParseTarget(target)
	if err != nil {
		p.t.Fatal(err)
	}
	r, release, err := p.other.Restore(p.t.Context(), flow.RestoreOptions{ID: id, Root: filepath.Join(labtest.Folder(p.t), "c"), Purpose: backup.ForRestore,
		Recovery: flow.Recovery{Target: t, Timeline: timeline}})
	if err != nil {
		if errors.Is(err, backup.ErrLeft) {
			p.t.Fatal(err)
		}
		return nil, err
	}
	conn, err := r.Instance.Connect(p.t.Context(), "postgres")
	if err != nil {
		p.t.Fatal(err)
	}
	if err := conn.QueryRow(p.t.Context(), "SELECT array_agg(word ORDER BY word) FROM said").Scan(&rows); err != nil {
		p.t.Error(err)
	}
	_ = conn.Close(p.t.Context())
	release()
	if _, err := p.other.RemoveCopy(p.t.Context(), r.Copy.Root); err != nil {
		p.t.Fatal(err)
	}
	return rows, nil
}

func TestRecoveryStopsWhereItIsTold(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	dir := labtest.Folder(t)
	data, wal := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1}), storage(t, pool, dir, flow.StorageOptions{Name: "wal", Volumes: 1})
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(data, "pg"), WALDir: filepath.Join(wal, "pg"), Small: true})
	p.flow.Program, p.other.Program = labtest.Binary(t), labtest.Binary(t)
	p.server.Exec(t, "CREATE TABLE said (word text); INSERT INTO said VALUES ('before')")
	take := func(mode backup.Mode) backup.Manifest {
		t.Helper()
		m, err := p.flow.Backup(t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: mode, FastCheckpoint: true,
			Deadline: time.Minute, Quick: time.Minute, Rounds: 10})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	early := take(backup.ModeFreeze)
	if _, err := p.rowsAt(early.ID, "latest", 0); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "wal stream") {
		t.Errorf("without any WAL: got %v (%s)", err, backup.HintOf(err))
	}
	p.shipping()
	atomic, bracketed := take(backup.ModeFreeze), take(backup.ModeBracketed)
	p.server.Exec(t, "INSERT INTO said VALUES ('first')")
	first := p.value("SELECT pg_current_wal_lsn()")
	between := p.value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')") + "Z"
	p.server.Exec(t, "SELECT pg_create_restore_point('here')")
	p.server.Exec(t, "INSERT INTO said VALUES ('second')")
	end := p.shipped()
	all := map[string]string{"end": "before", "time=" + between: "before first", "lsn=" + first: "before first", "name=here": "before first", "latest": "before first second"}
	for _, m := range []backup.Manifest{atomic, bracketed} {
		for target, want := range all {
			rows, err := p.rowsAt(m.ID, target, 0)
			if err != nil || strings.Join(rows, " ") != want {
				t.Errorf("%s to %s: got %q, %v, want %q", m.Cut.Achieved, target, rows, err, want)
			}
		}
		for _, target := range []string{"time=2020-01-01T00:00:00Z", "time=" + time.Now().Add(time.Hour).Format(time.RFC3339), fmt.Sprintf("lsn=%s", end+1<<30), "lsn=0/100"} {
			rows, err := p.rowsAt(m.ID, target, 0)
			if !errors.Is(err, backup.ErrNotFound) || backup.HintOf(err) == "" {
				t.Errorf("%s to %s: got %q, %v (%s), want it refused", m.Cut.Achieved, target, rows, err, backup.HintOf(err))
			}
		}
		delete(all, "lsn="+first)
		delete(all, "latest")
		if rows, err := p.rowsAt(m.ID, "latest", 7); !errors.Is(err, backup.ErrNotFound) {
			t.Errorf("along timeline 7: got %q, %v", rows, err)
		}
	}
	if rows, err := p.rowsAt(atomic.ID, "name=nowhere", 0); !errors.Is(err, backup.ErrNotFound) || errors.Is(err, backup.ErrDamage) {
		t.Errorf("to a name that is not there: got %q, %v", rows, err)
	}
	moment, err := backup.ParseTarget("time=" + between)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := p.other.Nearest(t.Context(), moment.Time); err != nil || id != bracketed.ID {
		t.Errorf("nearest: got %s, %v, want %s", id, err, bracketed.ID)
	}
	if _, cut := early.Span(); true {
		if id, err := p.other.Nearest(t.Context(), cut.Add(-time.Minute)); !errors.Is(err, backup.ErrNotFound) {
			t.Errorf("before the first: got %s, %v", id, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(p.other.State.Path(), "wal*"))
	if err != nil || len(slices.DeleteFunc(left, func(s string) bool { return filepath.Base(s) == "wal" })) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
