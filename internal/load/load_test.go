package load_test

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/load"
)

func small() load.Options { return load.Options{Rows: 3_000, Branches: 3, Accounts: 200} }

func everything() load.Which {
	return load.Which{
		Bulk:      &load.BulkOptions{BatchRows: 500},
		Words:     &load.WordsOptions{Sessions: 2},
		Transfers: &load.TransfersOptions{Sessions: 2},
		Churn:     &load.ChurnOptions{Rows: 50, Keep: 2, SwitchEvery: 200 * time.Millisecond, CheckpointEvery: 300 * time.Millisecond},
	}
}

func create(t testing.TB, conn *pgx.Conn, o load.Options) load.Facts {
	t.Helper()
	facts, err := load.Create(t.Context(), conn, o)
	if err != nil {
		t.Fatal(err)
	}
	return facts
}

func mark(t testing.TB, conn *pgx.Conn, n int) {
	t.Helper()
	if err := load.Mark(t.Context(), conn, n); err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition of the real world.
func until(t testing.TB, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-t.Context().Done():
			t.Fatal("ended before the condition held")
		case <-tick.C:
		}
	}
}

// await lets all beaters of l do some work.
func await(t testing.TB, l *load.Load, n int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := errors.Join(l.Words.Await(ctx, n), l.Transfers.Await(ctx, n), l.Churn.Await(ctx, 5), l.Bulk.Await(ctx, 5))
	if err != nil {
		t.Fatal(err)
	}
}

func judge(t testing.TB, conn *pgx.Conn, want load.Promise) load.Finding {
	t.Helper()
	f, err := load.Judge(t.Context(), conn, want)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func noProblem(t testing.TB, f load.Finding) {
	t.Helper()
	for _, p := range f.Problems() {
		t.Errorf("problem: %s", p)
	}
}

// throughJSON is a promise as another process reads it.
func throughJSON(t testing.TB, p load.Promise) load.Promise {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 4096 {
		t.Errorf("promise takes %d bytes, want a few", len(b))
	}
	var out load.Promise
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAServerKeepsItsPromisesUnderLoad(t *testing.T) {
	s := startServer(t)
	conn := s.conn(t, "postgres")
	facts := create(t, conn, small())
	if _, err := load.Create(t.Context(), conn, small()); !errors.Is(err, backup.ErrExists) {
		t.Errorf("second Create: got %v, want ErrExists", err)
	}
	l, err := load.Start(t.Context(), s.connect("postgres"), everything())
	if err != nil {
		t.Fatal(err)
	}
	mark(t, conn, 1)
	await(t, l, 300)
	if err := l.Words.Await(t.Context(), 12_000); err != nil { // several chunks of the journal
		t.Fatal(err)
	}
	cut := time.Now()

	promise := l.Promise(cut)
	promise.Facts, promise.Present, promise.Absent = &facts, []int{1}, []int{2}
	f := judge(t, conn, throughJSON(t, promiseNow(l, promise)))
	noProblem(t, f)
	if f.Words.Acked < 300 || f.Words.Found < f.Words.Acked || f.BulkVisible != 0 {
		t.Errorf("judged while running: %+v", f)
	}

	sum, err := l.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.Stop(); err != nil || again.Words != sum.Words {
		t.Errorf("second Stop: got %+v, %v", again, err)
	}
	t.Logf("%+v", sum)
	if sum.BulkRows < 2_500 || sum.Words < 300 || sum.Transfers < 300 || sum.ChurnTables < 5 || sum.LongestStall.Length <= 0 {
		t.Errorf("summary: %+v", sum)
	}
	promise = l.Promise(time.Now())
	promise.Facts, promise.Present, promise.Absent = &facts, []int{1}, []int{2}
	f = judge(t, conn, throughJSON(t, promise))
	noProblem(t, f)
	if f.Words.Acked != f.Words.Found || f.Words.Found != f.Words.Sent || f.Transfers.Acked != f.Transfers.Found {
		t.Errorf("after a clean stop sent, acknowledged and found should be the same: %+v", f)
	}
	if f.Sums.Branches != f.Sums.Transfers || f.Sums.Accounts != f.Sums.Tellers {
		t.Errorf("sums: %+v", f.Sums)
	}
	checkJournals(t, l, cut)
	var left int
	if err := conn.QueryRow(t.Context(), `select count(*) from pg_tables where tablename ~ 'churn'`).Scan(&left); err != nil || left != 0 {
		t.Errorf("churn left %d tables, %v", left, err)
	}
}

// promiseNow is p with what was sent until now, for a judgement of the live
// server; the snapshot is taken a moment later, so there is slack.
func promiseNow(l *load.Load, p load.Promise) load.Promise {
	const slack = 1_000_000
	for i := range p.Words {
		p.Words[i].Sent += slack
	}
	for i := range p.Transfers {
		p.Transfers[i].Sent += slack
	}
	return p
}

// checkJournals compares the quick answers with a count by hand.
func checkJournals(t *testing.T, l *load.Load, cut time.Time) {
	t.Helper()
	var before, all int64
	for _, at := range l.Words.Acks() {
		all++
		if !at.After(cut) {
			before++
		}
	}
	if got := l.Words.AckedBefore(cut); got != before {
		t.Errorf("AckedBefore: got %d, want %d", got, before)
	}
	if got := l.Words.Count(); got != all {
		t.Errorf("Count: got %d, want %d", got, all)
	}
	if got := l.Words.AckedBefore(cut.Add(-time.Hour)); got != 0 {
		t.Errorf("AckedBefore an hour ago: got %d, want 0", got)
	}
	var points int64
	for _, p := range l.Series() {
		points += p.Count
	}
	if want := l.Words.Count() + l.Transfers.Count(); points != want {
		t.Errorf("Series adds up to %d, want %d", points, want)
	}
	whole := l.Words.Stall(time.Time{}, time.Time{})
	if part := l.Words.Stall(cut, cut.Add(time.Millisecond)); part.Length > whole.Length || part.Length > time.Millisecond {
		t.Errorf("Stall of a millisecond: got %v, of the whole run %v", part.Length, whole.Length)
	}
	tight := l.Words.PromiseUntil(cut, cut)
	for _, s := range tight.Words {
		if s.Sent < s.Acked || s.Sent > s.Acked+1 {
			t.Errorf("PromiseUntil: %+v, want at most one sent and not acknowledged", s)
		}
	}
}

func TestACrashLosesNothingAcknowledged(t *testing.T) {
	s := startServer(t, load.HeavySettings()...)
	facts := create(t, s.conn(t, "postgres"), small())
	mark(t, s.conn(t, "postgres"), 1)
	l, err := load.Start(t.Context(), s.connect("postgres"), everything())
	if err != nil {
		t.Fatal(err)
	}
	await(t, l, 500)
	s.crash(t)
	<-l.Words.Done()
	if l.Words.Err() == nil {
		t.Error("the server is gone and Words has no error")
	}
	if _, err := l.Stop(); err == nil {
		t.Error("the server is gone and Stop has no error")
	}
	s.start(t)

	promise := l.Promise(time.Now())
	promise.Facts, promise.Present = &facts, []int{1}
	f := judge(t, s.conn(t, "postgres"), promise)
	noProblem(t, f)
	if f.Words.Acked < 500 {
		t.Errorf("got %d acknowledged, want 500 at least", f.Words.Acked)
	}

	// A second load on the same database is told apart from the first.
	second, err := load.Start(t.Context(), s.connect("postgres"), everything())
	if err != nil {
		t.Fatal(err)
	}
	await(t, second, 50)
	if _, err := second.Stop(); err != nil {
		t.Fatal(err)
	}
	noProblem(t, judge(t, s.conn(t, "postgres"), promise.Join(second.Promise(time.Now()))))
	if f := judge(t, s.conn(t, "postgres"), promise); f.Words.Phantom == 0 {
		t.Error("the second load's rows were not promised and not found out")
	}
}

func TestPlantedDamageIsFound(t *testing.T) {
	s := startServer(t)
	conn := s.conn(t, "postgres")
	facts := create(t, conn, small())
	mark(t, conn, 1)
	which := everything()
	l, err := load.Start(t.Context(), s.connect("postgres"), which)
	if err != nil {
		t.Fatal(err)
	}
	await(t, l, 50)
	if _, err := l.Stop(); err != nil {
		t.Fatal(err)
	}
	promise := l.Promise(time.Now())
	promise.Facts, promise.Present = &facts, []int{1}
	noProblem(t, judge(t, conn, promise))
	stream := promise.Words[1].Stream

	cases := []struct {
		name, sql, want string
		got             func(load.Finding) any
		number          any
	}{
		{"a deleted word is missing", `delete from play.words_said where stream = STREAM and id = 7`, "1 words acknowledged before the cut are missing",
			func(f load.Finding) any { return f.Words.MissingSample }, []load.ID{{Stream: stream, N: 7}}},
		{"a word nobody sent is a phantom", `insert into play.words_said select STREAM, 1000000007, word, sum from play.words_said limit 1`, "1 words are there that were never sent",
			func(f load.Finding) any { return f.Words.PhantomSample }, []load.ID{{Stream: stream, N: 1000000007}}},
		{"a stream nobody sent is a phantom", `update play.words_said set stream = 7 where stream = STREAM and id = 1`, "words are there that were never sent",
			func(f load.Finding) any { return f.Words.Missing }, int64(1)},
		{"a changed word is torn", `update play.words_said set word = word || '!' where stream = STREAM and id = 3`, "1 words are torn",
			func(f load.Finding) any { return f.Words.TornSample }, []load.ID{{Stream: stream, N: 3}}},
		{"a word that is there twice is told", `alter table play.words_said drop constraint words_said_pkey; insert into play.words_said select * from play.words_said where stream = STREAM and id = 2`, "1 words are there more than once",
			func(f load.Finding) any { return f.Words.TwiceSample }, []load.ID{{Stream: stream, N: 2}}},
		{"a changed balance breaks the sums", `update play.accounts set balance = balance + 1 where aid = 201`, "sums differ in 1 branches (the first is 2)",
			func(f load.Finding) any { return f.Sums.Off }, []int{2}},
		{"money moved between branches breaks the sums", `update play.accounts set balance = balance + case aid when 1 then 1 else -1 end where aid in (1, 201)`, "sums differ in 2 branches",
			func(f load.Finding) any { return f.Sums.Off }, []int{1, 2}},
		{"a lost transfer is missing", `delete from play.transfers where id = 5`, "2 transfers acknowledged before the cut are missing",
			func(f load.Finding) any { return f.Transfers.Missing }, int64(2)},
		{"a row of the open transaction is visible", `insert into play.bulk values (1, 1, 'x', 'y')`, "1 rows of the transaction that never committed are visible",
			func(f load.Finding) any { return f.BulkVisible }, int64(1)},
		{"a dropped view is a missing marker", `drop view play.marker_1`, "marker 1: its view is missing",
			func(f load.Finding) any { return f.Markers }, []load.MarkerSeen{{N: 1, Want: true, Row: true}}},
		{"a deleted marker row is missing", `delete from play.markers`, "marker 1: its row is missing",
			func(f load.Finding) any { return f.Markers }, []load.MarkerSeen{{N: 1, Want: true, View: true}}},
		{"a row missing from the play database is counted", `delete from play.people where id = 10`, "play.people has 2999 rows, recorded were 3000",
			func(f load.Finding) any { return len(f.Problems()) }, 1},
		{"a dropped table cannot be read", `drop table play.documents`, `play.documents cannot be read: relation "play.documents" does not exist`,
			func(f load.Finding) any { return len(f.Problems()) }, 1},
		{"a dropped table of words cannot be read", `drop table play.words_said`, `play.words_said cannot be read`,
			func(f load.Finding) any { return len(f.Problems()) }, 1},
	}
	if err := conn.Close(t.Context()); err != nil { // a template must have no visitors
		t.Fatal(err)
	}
	admin := s.conn(t, "template1")
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			run(t, admin, `drop database if exists damaged`)
			run(t, admin, `create database damaged template postgres`)
			damaged := s.conn(t, "damaged")
			defer func() { _ = damaged.Close(context.Background()) }()
			run(t, damaged, strings.ReplaceAll(c.sql, "STREAM", strconv.FormatInt(stream, 10)))
			f := judge(t, damaged, promise)
			if got := c.got(f); !reflect.DeepEqual(got, c.number) {
				t.Errorf("got %v, want %v", got, c.number)
			}
			if got := strings.Join(f.Problems(), "\n"); !strings.Contains(got, c.want) {
				t.Errorf("problems: got %q, want %q", got, c.want)
			}
		})
	}
}

// stopBackends halts every client backend with SIGSTOP, as a frozen
// filesystem would, and returns what lets them go on.
func stopBackends(t *testing.T, conn *pgx.Conn) (release func()) {
	t.Helper()
	rows, err := conn.Query(t.Context(), `select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()`)
	if err != nil {
		t.Fatal(err)
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT) // those that ended meanwhile need none
		}
	})
	t.Cleanup(release)
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	return release
}

func TestBeatersOutliveABlockedServer(t *testing.T) {
	s := startServer(t)
	conn := s.conn(t, "postgres")
	facts := create(t, conn, small())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l, err := load.Start(ctx, s.connect("postgres"), everything())
	if err != nil {
		t.Fatal(err)
	}
	await(t, l, 50)
	stopped := time.Now()
	release := stopBackends(t, conn)
	const long = 700 * time.Millisecond
	until(t, func() bool { return l.Words.Stall(stopped, time.Time{}).Length >= long })
	release()
	before := l.Words.Count()
	await(t, l, before+50)
	if got := l.Words.Stall(stopped, time.Time{}); got.Length < long || l.Err() != nil {
		t.Errorf("got stall %v, error %v; want %v at least, none", got.Length, l.Err(), long)
	}

	// Blocked again, and cancelled: a clean and quick end.
	release = stopBackends(t, conn)
	began := time.Now()
	cancel()
	if _, err := l.Stop(); err != nil {
		t.Errorf("cancelled: got %v, want a clean end", err)
	}
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("cancelled while blocked: the end took %v", took)
	}
	promise := l.Promise(time.Now())
	promise.Facts = &facts
	release()
	noProblem(t, judge(t, conn, promise))
}

func TestOnAQuietServer(t *testing.T) {
	s := startServer(t)
	t.Run("start reports what is missing", func(t *testing.T) { startReportsWhatIsMissing(t, s) })
	t.Run("the same seed makes the same rows", func(t *testing.T) { createIsDeterministic(t, s) })
	t.Run("bulk stays open at its limit", func(t *testing.T) { bulkStaysOpenAtItsLimit(t, s) })
}

func bulkStaysOpenAtItsLimit(t *testing.T, s *server) {
	conn := s.conn(t, "postgres")
	create(t, conn, small())
	b := load.NewBulk(load.BulkOptions{BatchRows: 400, MaxRows: 7_000})
	if err := b.Start(t.Context(), s.connect("postgres")); err != nil {
		t.Fatal(err)
	}
	if err := b.Await(t.Context(), 18); err != nil {
		t.Fatal(err)
	}
	until(t, b.Paused)
	var open, visible int
	err := conn.QueryRow(t.Context(), `select (select count(*) from pg_stat_activity where state = 'idle in transaction'), (select count(*) from play.bulk)`).Scan(&open, &visible)
	if err != nil || visible != 0 {
		t.Errorf("got %d visible rows, %v", visible, err)
	}
	if open > 1 {
		t.Errorf("got %d transactions open, want one", open)
	}
	if got := b.Rows(); got < 7_000 || got > 7_400 {
		t.Errorf("got %d rows, want 7,000 and at most a batch more", got)
	}
	if err := b.Stop(); err != nil {
		t.Error(err)
	}
}

func startReportsWhatIsMissing(t *testing.T, s *server) {
	l, err := load.Start(t.Context(), s.connect("postgres"), load.All())
	if err == nil || l != nil {
		t.Errorf("without a play database: got %v, %v", l, err)
	}
	if _, err := load.Start(t.Context(), s.connect("nowhere"), load.All()); err == nil {
		t.Error("without a database: no error")
	}
}

func createIsDeterministic(t *testing.T, s *server) {
	admin := s.conn(t, "postgres")
	digest := func(name string, seed int64) (out string) {
		run(t, admin, `create database `+name)
		conn := s.conn(t, name)
		o := small()
		o.Seed = seed
		create(t, conn, o)
		err := conn.QueryRow(t.Context(), `select md5(string_agg(d, '')) from (select md5(p::text) d from play.people p order by id) a`).Scan(&out)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	a, b, c := digest("a", 5), digest("b", 5), digest("c", 6)
	if a != b || a == c {
		t.Errorf("got %s and %s for one seed, %s for another", a, b, c)
	}
}
