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
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/catalog/s3test"
	"cleancut/internal/fault"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

const mega = 1 << 20

// archive puts segments from first to last of a timeline into the catalog, by
// name: retention looks at nothing else.
func (k *keeping) archive(t *testing.T, tl wal.Timeline, first, last uint64) {
	t.Helper()
	system := wal.System{Identifier: 7, SegmentSize: mega}
	if err := k.Catalog.WAL().Claim(t.Context(), system); err != nil {
		t.Fatal(err)
	}
	for n := first; n <= last; n++ {
		g := wal.Segment{Timeline: tl, Number: n}
		if err := k.Catalog.WAL().Put(t.Context(), g.File(mega), strings.NewReader("x"), 1); err != nil {
			t.Fatal(err)
		}
	}
}

// at puts a backup that was cut so many days ago within a segment.
func (k *keeping) at(t *testing.T, id backup.ID, days int, tl wal.Timeline, n uint64) {
	t.Helper()
	k.putAs(t, id, func(m *backup.Manifest) {
		cut := time.Now().Add(-time.Duration(days) * 24 * time.Hour)
		m.Server.SystemIdentifier, m.Server.Timeline, m.Server.WALSegmentSize = 7, uint32(tl), mega
		m.Cut.FlushLSN, m.Cut.Frozen = backup.LSN(n*mega+100), []backup.Frozen{{Called: cut, Held: cut, Thawed: cut}}
	})
}

// segments lists what of the WAL is there: "1:5-8 2:8".
func (k *keeping) segments(t *testing.T) string {
	t.Helper()
	files, err := k.Catalog.WAL().List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []wal.File
	for _, f := range files {
		all = append(all, f.File)
	}
	var out []string
	for _, r := range wal.NewSet(all, mega).Ranges() {
		out = append(out, fmt.Sprintf("%d:%d-%d", r.Timeline, r.First, r.Last))
	}
	return strings.Join(out, " ")
}

const week = backup.Span(7 * 24 * time.Hour)

// shipped is three backups and their WAL on two timelines; a week's window
// begins with the second.
func shipped(t *testing.T, k *keeping) *keeping {
	t.Helper()
	k.at(t, first, 20, 1, 3)
	k.at(t, second, 9, 1, 6)
	k.at(t, third, 1, 2, 9)
	k.judge(t, third, backup.Passed)
	k.archive(t, 1, 1, 8)
	k.archive(t, 2, 8, 11)
	history := []byte("1\t0/880000\tpromoted\n")
	if err := k.Catalog.WAL().Put(t.Context(), wal.HistoryOf(2), bytes.NewReader(history), int64(len(history))); err != nil {
		t.Fatal(err)
	}
	return k
}

// prune plans with a window and does it, as the command does.
func (k *keeping) prune(t *testing.T, window backup.Span) *flow.PrunedWAL {
	t.Helper()
	plan, err := k.PlanPrune(t.Context(), backup.Retention{Last: 1}, window)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Prune(t.Context(), plan.Remove); err != nil {
		t.Fatal(err)
	}
	done, err := k.PruneWAL(t.Context(), window)
	if err != nil || !done.Done {
		t.Fatalf("got %+v, %v", done, err)
	}
	if planned := fmt.Sprint(plan.WAL.Keep, plan.WAL.Remove, plan.WAL.Bytes, plan.WAL.Anchor); planned != fmt.Sprint(done.Keep, done.Remove, done.Bytes, done.Anchor) {
		t.Errorf("planned %s, done %+v", planned, done)
	}
	return done
}

// inS3 puts the catalog into gofakes3.
func inS3(t *testing.T, k *keeping) *keeping {
	t.Helper()
	h, err := s3test.Fake()
	if err != nil {
		t.Fatal(err)
	}
	endpoint, stop, err := s3test.Serve(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	for name, value := range s3test.Environment() {
		t.Setenv(name, value)
	}
	store, err := catalog.Open(s3test.Location(endpoint, "x"))
	if err != nil {
		t.Fatal(err)
	}
	k.Catalog = catalog.New(store, "main")
	return k
}

func TestPruneKeepsTheWindowAndWhatKeptBackupsNeed(t *testing.T) {
	for where, k := range map[string]*keeping{"a directory": newKeeping(t), "S3": inS3(t, newKeeping(t))} {
		t.Run(where, func(t *testing.T) {
			shipped(t, k)
			k.hold(t, first)
			if done := k.prune(t, 0); done.Deleted != 2 || k.segments(t) != "1:3-8 2:8-11" || done.Anchor != first {
				t.Errorf("without a window: left %s, %+v", k.segments(t), done)
			}
			if got, err := k.Catalog.Backups(t.Context()); err != nil || len(got) != 2 {
				t.Errorf("%d backups, %v, want the held one and the newest", len(got), err)
			}
			k.at(t, second, 9, 1, 6)
			done := k.prune(t, week)
			if got := k.segments(t); got != "1:6-8 2:8-11" || done.Anchor != second || done.Since == nil || time.Since(*done.Since).Round(24*time.Hour) != 9*24*time.Hour {
				t.Errorf("with a week: left %s, anchor %s since %v", got, done.Anchor, done.Since)
			}
			if got, err := k.Catalog.Backups(t.Context()); err != nil || len(got) != 3 {
				t.Errorf("%d backups, %v, want also the window's", len(got), err)
			}
			if r := done.Backups[0]; r.ID != first || len(r.Before) != 2 || len(r.After) != 0 {
				t.Errorf("the held one: %+v", r)
			}
			if again := k.prune(t, week); again.Deleted != 0 {
				t.Errorf("again it deletes %d", again.Deleted)
			}
			if s, err := k.Catalog.WAL().System(t.Context()); err != nil || s.Identifier != 7 {
				t.Errorf("the record of whose WAL it is: %+v, %v", s, err)
			}
			if h, err := k.Catalog.WAL().History(t.Context(), 2); err != nil || len(h.Forks) != 1 {
				t.Errorf("the history: %+v, %v", h, err)
			}
			k.archive(t, 1, 2, 2) // archive_command tries an old one again
			k.prune(t, week)
			if got := k.segments(t); got != "1:6-8 2:8-11" {
				t.Errorf("after an old one was pushed again: left %s", got)
			}
		})
	}
}

func TestWithoutWALPruneIsAsBefore(t *testing.T) {
	k := three(t)
	plan, err := k.PlanPrune(t.Context(), backup.Retention{Last: 1}, week)
	if err != nil || plan.WAL != nil || len(plan.Remove) != 2 {
		t.Errorf("got %+v, %v", plan, err)
	}
	if done, err := k.PruneWAL(t.Context(), week); err != nil || done != nil {
		t.Errorf("got %+v, %v", done, err)
	}
}

func TestWhatCannotBeToldKeepsWAL(t *testing.T) {
	const other backup.ID = "20260104T000000Z-000004"
	for name, c := range map[string]struct {
		harm  func(t *testing.T, k *keeping)
		words string
	}{
		"whose WAL it is": {func(t *testing.T, k *keeping) {
			replace(t, k.dir+"/catalog/clusters/main/wal/system.json", "{")
		}, "nobody knows whose WAL this is"},
		"where a timeline comes from": {func(t *testing.T, k *keeping) {
			k.archive(t, 3, 11, 12)
		}, "history of timeline 3"},
		"what a backup is": {func(t *testing.T, k *keeping) {
			k.at(t, other, 0, 2, 10)
			replace(t, k.dir+"/catalog/clusters/main/backups/"+string(other)+"/manifest.json", "{")
		}, string(other) + ": its records cannot be read"},
		"where a backup lies": {func(t *testing.T, k *keeping) { k.put(t, other) }, "does not tell its position"},
		"whether a backup that was begun long ago goes on": {func(t *testing.T, k *keeping) {
			if err := k.Catalog.PutIntent(t.Context(), backup.Intent{ID: other, Cluster: "main", Host: "far"}); err != nil {
				t.Fatal(err)
			}
		}, "being made on host far"},
		"that the backups are of another system": {func(t *testing.T, k *keeping) {
			k.putAs(t, other, func(m *backup.Manifest) {
				m.Server.SystemIdentifier, m.Server.Timeline, m.Cut.FlushLSN = 8, 1, 100
			})
		}, "the WAL is of system 7"},
	} {
		t.Run(name, func(t *testing.T) {
			k := shipped(t, newKeeping(t))
			c.harm(t, k)
			before := k.segments(t)
			done, err := k.PruneWAL(t.Context(), week)
			if err != nil || !strings.Contains(done.Doubt, c.words) || done.Deleted > 0 || len(done.Remove) > 0 || k.segments(t) != before {
				t.Errorf("got %+v, %v, left %s", done, err, k.segments(t))
			}
		})
	}
}

// TestWALOfARestoreThatBeginsMeanwhileStays has more files than one page, and a
// restore of an old backup that begins after the first.
func TestWALOfARestoreThatBeginsMeanwhileStays(t *testing.T) {
	k := newKeeping(t)
	k.at(t, first, 20, 1, 300)
	k.at(t, second, 9, 1, 310)
	k.archive(t, 1, 1, 312)
	k.Progress = func(string, string) {
		k.Progress = nil
		if err := k.State.PutCopy(backup.Copy{ID: "20260104T000000Z-000004", Backup: first, Cluster: "main", Host: "prod", Purpose: backup.ForRestore, Root: "/srv/x"}); err != nil {
			t.Error(err)
		}
	}
	done, err := k.PruneWAL(t.Context(), week)
	if err != nil || done.Deleted != 299 || k.segments(t) != "1:300-312" {
		t.Errorf("deleted %d, %v, left %s", done.Deleted, err, k.segments(t))
	}
	ctx, cancel := context.WithCancel(t.Context())
	k.archive(t, 1, 1, 299)
	k.Progress = func(string, string) { cancel() }
	if done, err = k.PruneWAL(ctx, week); !errors.Is(err, context.Canceled) || done.Done || done.Deleted != 256 || k.segments(t) != "1:257-312" {
		t.Errorf("stopped after a page: %d deleted, %v, left %s", done.Deleted, err, k.segments(t))
	}
}

func TestTwoPrunesAtOnceLeaveWhatOneLeaves(t *testing.T) {
	k := shipped(t, newKeeping(t))
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if done, err := k.PruneWAL(t.Context(), week); err != nil || !done.Done {
				t.Errorf("got %+v, %v", done, err)
			}
		})
	}
	both.Wait()
	if got := k.segments(t); got != "1:6-8 2:8-11" {
		t.Errorf("left %s", got)
	}
}

// TestPruneOfWALStoppedAnywhereLeavesAnUnbrokenRow fails it at each of its
// points and goes on afterwards.
func TestPruneOfWALStoppedAnywhereLeavesAnUnbrokenRow(t *testing.T) {
	lefts := map[string]bool{}
	for n := 1; ; n++ {
		k := shipped(t, newKeeping(t))
		i := &fault.Injector{Action: "error", At: n}
		done, err := k.PruneWAL(fault.With(t.Context(), i), week)
		if len(i.Passed()) < n {
			if n < 15 || err != nil {
				t.Fatalf("only %d points, %v", n-1, err)
			}
			break
		}
		point := i.Passed()[n-1]
		left := k.segments(t)
		if err == nil && done.Doubt == "" && left != "1:6-8 2:8-11" { // a backup whose record cannot be read keeps all
			t.Errorf("%s failed, and nobody is told: left %s", point, left)
		}
		lefts[left] = true
		if rows := strings.Fields(left); len(rows) != 2 || !strings.HasSuffix(rows[0], "-8") || rows[1] != "2:8-11" {
			t.Errorf("%s: left %s", point, left)
		}
		if done, err := k.PruneWAL(t.Context(), week); err != nil || !done.Done || k.segments(t) != "1:6-8 2:8-11" {
			t.Errorf("%s, and again: left %s, %v", point, k.segments(t), err)
		}
	}
	if !slices.Equal([]bool{lefts["1:1-8 2:8-11"], lefts["1:3-8 2:8-11"], lefts["1:5-8 2:8-11"]}, []bool{true, true, true}) {
		t.Errorf("stopped only at %v", lefts)
	}
}

func replace(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestARecoveryWhoseWALIsDeletedMeanwhileFails deletes a segment that the
// recovery was planned by before the copy's server asks for it: the copy must
// not end earlier and look good.
func TestARecoveryWhoseWALIsDeletedMeanwhileFails(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	dir := labtest.Folder(t)
	data := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1})
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(data, "pg"), Small: true})
	p.flow.Program, p.other.Program = labtest.Binary(t), labtest.Binary(t)
	p.server.Exec(t, "CREATE TABLE said (word text); INSERT INTO said VALUES ('before')")
	p.shipping()
	m, err := p.flow.Backup(t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		p.server.Exec(t, "INSERT INTO said VALUES ('after')")
		p.shipped()
	}
	files, err := p.other.Catalog.WAL().List(t.Context())
	if err != nil || len(files) < 3 {
		t.Fatalf("got %v, %v", files, err)
	}
	gone := files[len(files)-2].File
	p.other.Progress = func(string, string) {
		p.other.Progress = nil
		if err := p.other.Catalog.WAL().Delete(t.Context(), gone); err != nil {
			t.Error(err)
		}
	}
	rows, err := p.rowsAt(m.ID, "latest", 0)
	if err == nil || !strings.Contains(err.Error(), gone.String()+" is gone: it was there when the recovery was planned") {
		t.Errorf("got %q, %v", rows, err)
	}
	if rows, err = p.rowsAt(m.ID, "latest", 0); err != nil || strings.Join(rows, " ") != "after before" { // planned up to the gap, and that is what it says
		t.Errorf("planned again: got %q, %v", rows, err)
	}
}
