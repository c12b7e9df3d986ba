package flow_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/faulty"
)

// What TestATargetFindsExactlyTheRowsItPromises takes from its environment: the
// first seed, and how many histories it draws, of one seed each.
const (
	seedVariable      = "CLEANCUT_SEED"
	historiesVariable = "CLEANCUT_HISTORIES"
)

const (
	actions     = 60 // of a history
	restores    = 16 // of its backups
	refusals    = 40 // that are looked at
	atOnce      = 3  // restores
	everyTarget = 400
)

func fromEnvironment(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestATargetFindsExactlyTheRowsItPromises draws histories of a real server,
// backups of it and recovery targets, and compares the rows of each copy with
// what the target promises. What cannot be promised must be refused before
// anything is made.
func TestATargetFindsExactlyTheRowsItPromises(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	seed := fromEnvironment(t, seedVariable, 1)
	pool, program := localPool(t), labtest.Binary(t)
	for n := range fromEnvironment(t, historiesVariable, 1) {
		seed := seed + n
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			dir := labtest.Folder(t)
			watched := faulty.Wrap(pool)
			p := serve(t, pool, watched, dir, historyOptions(storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1})))
			p.flow.Program, p.other.Program = program, program
			h := newHistory(t, p, rand.New(rand.NewPCG(seed, 0)))
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("again: %s=%d go test ./internal/flow -run %s\n%s", seedVariable, seed, "TestATargetFindsExactlyTheRowsItPromises", strings.Join(h.log, "\n"))
				}
			})
			begun := time.Now()
			h.run(actions)
			drawn := time.Now()
			h.judge(watched)
			t.Logf("NOTE the history took %.1f s, its targets %.1f s", drawn.Sub(begun).Seconds(), time.Since(drawn).Seconds())
		})
	}
}

// question is a target to recover a backup to.
type question struct {
	b      taken
	target backup.Target
	along  uint32
	promise
}

func (q question) String() string {
	return fmt.Sprintf("backup %s (%s, from %s, %s) to %s on timeline %d", q.b.ID, q.b.Cut.Achieved, q.b.from(), q.b.moment().Format("15:04:05.000000"), q.target, q.along)
}

// judge draws targets and asks for them.
func (h *history) judge(watched *faulty.Provider) {
	h.t.Helper()
	var ask []question
	asked := map[string]bool{}
	refused := 0
	for range everyTarget {
		q := h.question()
		if asked[q.String()] {
			continue
		}
		asked[q.String()] = true
		switch {
		case q.refused != "" && refused < refusals:
			refused++
			h.isRefused(q, watched)
		case q.refused == "" && len(ask) < restores:
			ask = append(ask, q)
		}
	}
	if refused < 10 || len(ask) < restores {
		h.t.Errorf("%d refusals and %d restores of %d targets: it does not try enough", refused, len(ask), everyTarget)
	}
	looked := time.Now()
	var all sync.WaitGroup
	work := make(chan question)
	for range atOnce {
		all.Go(func() {
			for q := range work {
				h.isFound(q)
			}
		})
	}
	for _, q := range ask {
		work <- q
	}
	close(work)
	all.Wait()
	kinds := map[backup.TargetKind]int{}
	for _, q := range ask {
		kinds[q.target.Kind]++
	}
	h.t.Logf("NOTE %d transactions, %d backups, %d timelines; %d targets refused, %d recovered to in %.1f s: %v", len(h.now.ends), len(h.backups), len(h.lines), refused, len(ask), time.Since(looked).Seconds(), kinds)
}

// question draws one.
func (h *history) question() question {
	q := question{b: pick(h.r, h.backups)}
	if h.r.IntN(4) == 0 {
		q.along = uint32(1 + h.r.IntN(len(h.lines)+1))
	}
	along := max(1, min(q.along, uint32(len(h.lines))))
	if q.along == 0 {
		along = uint32(1 + h.r.IntN(len(h.lines)))
	}
	l := h.lines[along]
	var ends []record // behind the backup, mostly
	for _, r := range l.records {
		if r.ends() && (r.start >= q.b.from() || h.r.IntN(8) == 0) {
			ends = append(ends, r)
		}
	}
	if len(ends) == 0 {
		ends = l.records
	}
	r := pick(h.r, ends)
	switch kind := h.r.IntN(12); {
	case kind == 0:
		q.target.Kind = pick(h.r, []backup.TargetKind{backup.TargetEnd, backup.TargetImmediate})
	case kind == 1:
		q.target.Kind = backup.TargetLatest
	case kind < 5:
		at := pick(h.r, []time.Time{r.time, r.time, r.time, q.b.moment().Truncate(time.Microsecond), q.b.moment().Truncate(time.Microsecond).Add(time.Microsecond)})
		q.target = backup.Target{Kind: backup.TargetTime, Time: at.Add(pick(h.r, []time.Duration{0, 0, time.Microsecond, -time.Microsecond, 3 * time.Millisecond, -3 * time.Millisecond}))}
	case kind < 8:
		last := l.records[len(l.records)-1]
		at := pick(h.r, []backup.LSN{r.start, r.start, r.end, r.end, r.end, q.b.from(), l.reach, last.start, l.fork})
		q.target = backup.Target{Kind: backup.TargetLSN, LSN: max(at, 2) + pick(h.r, []backup.LSN{0, 0, 1}) - pick(h.r, []backup.LSN{0, 0, 1})}
	case kind < 10:
		q.target = backup.Target{Kind: backup.TargetName, Name: "nowhere"}
		if len(h.names) > 0 && h.r.IntN(8) > 0 {
			q.target.Name = pick(h.r, h.names)
		}
	default:
		q.target = backup.Target{Kind: backup.TargetXID, XID: r.xid}
		if r.xid < 3 || h.r.IntN(10) == 0 {
			q.target.XID = 3 + h.r.Uint32N(2000)
		}
	}
	if h.r.IntN(2) == 0 && q.target.Kind == backup.TargetTime {
		h.nearest(&q)
	}
	q.promise = h.promised(q.b, q.target, q.along)
	return q
}

// nearest takes the backup that is chosen where only a time is given.
func (h *history) nearest(q *question) {
	h.t.Helper()
	var want taken
	for _, b := range h.backups {
		if !b.moment().After(q.target.Time) && b.moment().After(want.moment()) {
			want = b
		}
	}
	got, err := h.p.other.Nearest(h.t.Context(), q.target.Time)
	if got != want.ID || (err == nil) != (want.ID != "") || err != nil && !errors.Is(err, backup.ErrNotFound) {
		h.t.Errorf("nearest to %s: got %s, %v, want %s", q.target, got, err, want.ID)
	}
	if want.ID != "" {
		q.b = want
	}
}

func (h *history) restore(q question) (flow.Restored, func(), error) {
	return h.p.other.Restore(h.t.Context(), flow.RestoreOptions{ID: q.b.ID, Purpose: backup.ForVerify, Recovery: flow.Recovery{Target: q.target, Timeline: q.along}})
}

// isRefused demands that nothing was made, not even for a while.
func (h *history) isRefused(q question, watched *faulty.Provider) {
	h.t.Helper()
	calls := func() int { // of the provider, and of the state: each copy has a lock, whose file stays
		locks, err := filepath.Glob(filepath.Join(h.p.other.State.Path(), "locks", "*"))
		if err != nil {
			h.t.Fatal(err)
		}
		return len(locks) + watched.Calls("CreateVolume") + watched.Calls("Snapshots") + watched.Calls("Attach") + watched.Calls("List")
	}
	before := calls()
	r, release, err := h.restore(q)
	if err == nil {
		release()
		_, err = h.p.other.RemoveCopy(h.t.Context(), r.Copy.Root)
		h.t.Errorf("%s: restored, want it refused: %s (removed: %v)", q, q.refused, err)
		return
	}
	usage := errors.Is(err, backup.ErrUsage) && !q.target.Archived()
	if !usage && (!errors.Is(err, backup.ErrNotFound) || backup.HintOf(err) == "") || errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrLeft) {
		h.t.Errorf("%s: got %v (%s), want it refused: %s", q, err, backup.HintOf(err), q.refused)
	}
	if after := calls(); after != before {
		h.t.Errorf("%s: refused with %v after %d calls of provider and state, want it refused before: %s", q, err, after-before, q.refused)
	}
}

// isFound restores and compares.
func (h *history) isFound(q question) {
	h.t.Helper()
	r, release, err := h.restore(q)
	if q.perhaps && errors.Is(err, backup.ErrNotFound) && !errors.Is(err, backup.ErrLeft) {
		return
	}
	if q.instead != 0 && errors.Is(err, backup.ErrUnsupported) && strings.Contains(backup.HintOf(err), "--timeline") && !errors.Is(err, backup.ErrLeft) {
		q.along = q.instead // as the hint says
		q.promise = h.promised(q.b, q.target, q.along)
		h.t.Logf("NOTE PostgreSQL cannot; %s: refused as %q", q, q.refused)
		if q.refused == "" {
			h.isFound(q)
		}
		return
	}
	if err != nil {
		h.t.Errorf("%s: %v", q, err)
		return
	}
	got, err := contents(h.t.Context(), r)
	release()
	if _, undo := h.p.other.RemoveCopy(h.t.Context(), r.Copy.Root); err != nil || undo != nil {
		h.t.Errorf("%s: %v, removed: %v", q, err, undo)
		return
	}
	for n := q.from; n <= q.to; n++ {
		if slices.Equal(got, q.text(n)) {
			return
		}
	}
	if slices.ContainsFunc(q.also, func(n int) bool { return slices.Equal(got, q.text(n)) }) {
		return
	}
	lack, more := difference(q.text(q.from), got)
	h.t.Errorf("%s, recovered to %s: lacks %q, has %q that is not promised (behind record %d to %d)", q, r.Copy.EndOfRecovery, lack, more, q.from, q.to)
}

func difference(want, got []string) (lack, more []string) {
	for _, w := range want {
		if !slices.Contains(got, w) {
			lack = append(lack, w)
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			more = append(more, g)
		}
	}
	return lack, more
}

// contents reads all rows of a copy, and what is in doubt.
func contents(ctx context.Context, r flow.Restored) (out []string, err error) {
	conn, err := r.Instance.Connect(ctx, "postgres")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	read := func(sql string) ([]string, error) {
		all, err := conn.Query(ctx, sql)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(all, pgx.RowTo[string])
	}
	tables, err := read("SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'")
	if err != nil {
		return nil, err
	}
	for _, table := range tables {
		here, err := read(fmt.Sprintf("SELECT '%s ' || id || ' ' || v || '/' || length(pad) FROM public.%s", table, table))
		if err != nil {
			return nil, err
		}
		out = append(append(out, table), here...)
	}
	slices.Sort(out)
	doubt, err := read("SELECT 'in doubt ' || gid FROM pg_prepared_xacts ORDER BY gid")
	return append(out, doubt...), err
}
