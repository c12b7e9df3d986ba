package drill_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// between does something before the second filesystem of a bracketed backup is
// cut.
type between struct {
	provider.Provider
	cuts int
	do   func() error
}

func (b *between) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	if !set.Group { // which is tried first, and which the local provider does not have
		b.cuts++
		if b.cuts == 2 {
			if err := b.do(); err != nil {
				return nil, err
			}
		}
	}
	return b.Provider.Prepare(ctx, set)
}

// bracketed cuts the WAL first and the data last, both under load, and has
// words acknowledged and statements run in between. It returns what each
// recovery must give.
func (s *subject) bracketed(t *testing.T, statements ...string) (m backup.Manifest, crash, archive drill.Way) {
	t.Helper()
	ctx := t.Context()
	l, err := load.Start(ctx, s.connect, load.Which{Words: &load.WordsOptions{}, Transfers: &load.TransfersOptions{}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Stop()
	if err := errors.Join(l.Words.Await(ctx, 200), l.Transfers.Await(ctx, 50)); err != nil {
		t.Fatal(err)
	}
	hook := &between{Provider: s.a.Provider, do: func() error {
		conn, err := s.connect(ctx)
		if err != nil {
			return err
		}
		defer conn.Close(ctx)
		err = l.Words.Await(ctx, l.Words.Count()+200)
		for _, sql := range statements {
			_, failed := conn.Exec(ctx, sql)
			err = errors.Join(err, failed)
		}
		return err
	}}
	f := *s.a
	f.Provider = hook
	m, err = f.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: s.server.DSN("postgres")}, Mode: backup.ModeBracketed, Backward: true, FastCheckpoint: true,
		Deadline: time.Minute, Quick: 5 * time.Second, Rounds: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.a.DeleteLast(labtest.Context(t), m.ID); err != nil {
			t.Error(err)
		}
	})
	if hook.cuts != 2 || !m.Snapshots[0].Requested.After(m.Snapshots[1].Responded) {
		t.Fatalf("%d cuts, want the WAL's and then the data's: %+v", hook.cuts, m.Snapshots)
	}
	if _, err := l.Stop(); err != nil {
		t.Fatal(err)
	}
	way := func(recovery string, from, to time.Time) drill.Way {
		p := l.PromiseUntil(from, to).Join(s.kept)
		p.Facts = &s.facts
		return drill.Way{Recovery: recovery, Promise: &p}
	}
	from, to := m.Span()
	alone := m
	alone.Bracket = nil
	first, last := alone.Span()
	crash, archive = way(drill.Crash, first, last), way(drill.Archive, from, to)
	s.kept = s.kept.Join(l.Promise(time.Now()))
	return m, crash, archive
}

// TestFilesystemsCutOneAfterTheOtherNeedTheirLabelAndWAL has each filesystem
// cut at one instant. What happens in between is written to one and not to the
// other, so the images alone are no state that the cluster ever was in.
func TestFilesystemsCutOneAfterTheOtherNeedTheirLabelAndWAL(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := newSubject(t, 2, true)
	s.server.Exec(t, "CREATE TABLE play.plain AS SELECT * FROM generate_series(1, 1000)") // without an index, which would tell
	s.facts.Tables["play.plain"] = 1000
	for _, c := range []struct {
		name, between string
		want          drill.Class
		says          string
	}{
		// pg_control speaks of a checkpoint that the WAL does not have yet.
		{"a checkpoint", "CHECKPOINT", drill.NoStart, "could not locate a valid checkpoint record"},
		// The WAL does not know of the new file of the table, and the old one is empty by now.
		{"a table is rewritten", "VACUUM FULL play.plain", drill.Lost, "1000 of 1000 rows of play.plain are missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, crash, archive := s.bracketed(t, c.between)
			if len(crash.Promise.Words) == 0 || archive.Promise.Words[0].Acked < crash.Promise.Words[0].Acked+200 {
				t.Fatalf("promised are %+v, and with the WAL %+v: want at least the 200 words between the cuts more", crash.Promise.Words, archive.Promise.Words)
			}
			for _, w := range []drill.Way{crash, archive} {
				v, found, err := drill.JudgeImage(t.Context(), s.b, m.ID, w)
				if err != nil {
					t.Fatalf("%s: not judged: %v", w.Recovery, err)
				}
				class, reason := drill.Judge(v, found)
				t.Logf("%s: %s: %s", w.Recovery, class, reason)
				want, says := c.want, c.says
				if w.Recovery == drill.Archive {
					want, says = drill.Sound, ""
				}
				if class != want || !strings.Contains(reason, says) {
					t.Errorf("%s: got %q (%s), want %q (%s)", w.Recovery, class, reason, want, says)
				}
			}
		})
	}
}

func TestAnImageIsCutOnceAndJudgedInEachWay(t *testing.T) {
	g := grid()
	g.Modes = append(g.Modes, backup.ModeBracketed)
	g.Orders = []string{drill.Forward, drill.Backward}
	none := func(drill.Cell, int) bool { return false }
	crash, _ := g.Cells(everywhere)
	g.Recoveries = []string{drill.Crash, drill.Archive}
	both, refused := g.Cells(everywhere)
	if len(both) != 2*len(crash) || len(refused) > 0 {
		t.Fatalf("%d cells of both ways and %d of one, refused %v", len(both), len(crash), refused)
	}
	alone, together := drill.Schedule(crash, 7, 2, none), drill.Schedule(both, 7, 2, none)
	if len(alone) != len(together) {
		t.Fatalf("%d cuts for both ways and %d for one", len(together), len(alone))
	}
	for i, c := range together {
		if c.Recoveries != "crash,archive" || c.Cell.Recovery != "" {
			t.Errorf("%+v: want it judged in both ways", c)
		}
		c.Recoveries = drill.Crash
		if c != alone[i] {
			t.Errorf("the conditions of a cut change with the ways to judge it: %+v and %+v", c, alone[i])
		}
	}
	// Where one way is done the other is what is left.
	left := drill.Schedule(both, 7, 2, func(c drill.Cell, _ int) bool { return c.Recovery == drill.Crash })
	for i, c := range left {
		if c.Recoveries != drill.Archive || c.Cell != alone[i].Cell {
			t.Errorf("%+v is left to do", c)
		}
	}
	g.Recoveries = []string{"repair"}
	if cells, refused := g.Cells(everywhere); len(cells) > 0 || !strings.Contains(refused[0].Why, `recovery "repair": crash or archive`) {
		t.Errorf("got %v, refused %v", cells, refused)
	}
}

func TestWhatCleancutVouchesFor(t *testing.T) {
	for _, c := range []struct {
		mode             backup.Mode
		layout, recovery string
		want             bool
	}{
		{backup.ModeFreeze, "separate", drill.Crash, true}, {backup.ModeFreeze, "separate", drill.Archive, true},
		{backup.ModeNone, "separate", drill.Crash, false}, {backup.ModeNone, "separate", drill.Archive, false},
		{backup.ModeBracketed, "separate", drill.Crash, false}, {backup.ModeBracketed, "separate", drill.Archive, true},
		{backup.ModeBracketed, "raid0", drill.Crash, true}, // one filesystem, so one instant
	} {
		cell := drill.Cell{Layout: c.layout, Mode: c.mode, Recovery: c.recovery}
		if cell.Protected() != c.want {
			t.Errorf("%s: protected is %v", cell.Conditions(), cell.Protected())
		}
	}
}

func TestLinesOfEarlierDrillsTellTheirOnlyWay(t *testing.T) {
	const freeze, bracketed = `{"where":"native","layout":"separate","mode":"freeze","class":"sound","n":1}`, `{"where":"native","layout":"separate","mode":"bracketed","class":"sound","n":1}`
	o := drill.Options{Out: t.TempDir(), Keep: drill.KeepNone, Rows: 1, VolumeSize: 1 << 30, Progress: os.Stderr}
	o.Report = filepath.Join(o.Out, "r.html")
	if err := os.WriteFile(filepath.Join(o.Out, "trials.jsonl"), []byte(freeze+"\n"+bracketed+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := drill.Run(t.Context(), o)
	if err != nil || len(s.Cells) != 2 {
		t.Fatalf("got %+v and %v", s.Cells, err)
	}
	for _, c := range s.Cells {
		want := map[backup.Mode]string{"freeze": drill.Crash, "bracketed": drill.Archive}[c.Mode]
		b, err := json.Marshal(c)
		if err != nil || !strings.Contains(string(b), `"recovery":"`+want+`"`) {
			t.Errorf("got %s (%v), want recovery %q", b, err, want)
		}
	}
}
