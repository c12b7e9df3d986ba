package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	wordsTable     = "play.words_said"
	transfersTable = "play.transfers"
	bulkTable      = "play.bulk"
)

// Judge reads the whole play database behind conn, in one read-only snapshot,
// and compares it with want. It writes nothing, so a copy in recovery will do
// (hot standby). What the server cannot read for damage is part of the finding;
// the error is for everything else, such as a lost connection.
func Judge(ctx context.Context, conn *pgx.Conn, want Promise) (Finding, error) {
	var f Finding
	err := pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		// The heap is judged, not an index over it; a time limit of the
		// copy's configuration must not end a long read.
		_, err := tx.Exec(ctx, `set local enable_indexscan = off; set local enable_indexonlyscan = off;
			set local enable_bitmapscan = off; set local statement_timeout = 0`)
		if err != nil {
			return fmt.Errorf("set up: %w", err)
		}
		j := judge{tx: tx, found: &f}
		return j.all(ctx, want)
	})
	if err != nil {
		return Finding{}, fmt.Errorf("judge: %w", err)
	}
	return f, nil
}

type judge struct {
	tx    pgx.Tx
	found *Finding
}

func (j judge) all(ctx context.Context, want Promise) error {
	if err := j.ids(ctx, wordsTable, `stream, id, `+wordIntact, want.Words, &j.found.Words); err != nil {
		return err
	}
	if err := j.ids(ctx, transfersTable, `stream, id, true`, want.Transfers, &j.found.Transfers); err != nil {
		return err
	}
	if err := j.count(ctx, bulkTable, &j.found.BulkVisible); err != nil {
		return err
	}
	if err := j.sums(ctx); err != nil {
		return err
	}
	if want.Facts != nil {
		for _, table := range slices.Sorted(maps.Keys(want.Facts.Tables)) {
			t := TableCount{Table: table, Want: want.Facts.Tables[table]}
			if err := j.count(ctx, table, &t.Found); err != nil {
				return err
			}
			j.found.Tables = append(j.found.Tables, t)
		}
	}
	return j.markers(ctx, want)
}

// read runs one look at the copy in a savepoint, so that damage found by it
// does not stop the rest.
func (j judge) read(ctx context.Context, what string, look func(tx pgx.Tx) error) error {
	err := pgx.BeginFunc(ctx, j.tx, look)
	var pg *pgconn.PgError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &pg) && isDamage(pg.Code):
		j.found.Unreadable = append(j.found.Unreadable, Unreadable{What: what, Message: pg.Message})
		return nil
	}
	return fmt.Errorf("read %s: %w", what, err)
}

// isDamage tells an error of the data from one of the circumstances. The
// codes are those of PostgreSQL's manual, appendix A.
func isDamage(code string) bool {
	switch code {
	case "3F000", "42P01", "42703", "42883": // no such schema, table, column, function (catalogs damaged)
		return true
	case "":
		return false
	}
	switch code[:2] {
	case "22", "58", "XX": // data exception, system error such as a missing file, internal error and corruption
		return true
	}
	return false
}

func (j judge) count(ctx context.Context, table string, into *int64) error {
	return j.read(ctx, table, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `select count(*) from `+table).Scan(into)
	})
}

// ids streams the ids out and ticks them off in one bit each: a million rows
// cost 125 kB here and no sort there.
func (j judge) ids(ctx context.Context, table, columns string, streams []Stream, into *Tally) error {
	r := roll{tally: into, streams: map[int64]*ticked{}}
	for _, s := range streams {
		if r.streams[s.Stream] != nil {
			return fmt.Errorf("the promise names stream %d twice", s.Stream)
		}
		r.streams[s.Stream] = &ticked{Stream: s, bits: make([]uint64, s.Sent/64+1)}
		into.Acked += s.Acked
		into.Sent += s.Sent
	}
	err := j.read(ctx, table, func(tx pgx.Tx) error {
		_, err := tx.Conn().PgConn().CopyTo(ctx, &r, `copy (select `+columns+` from `+table+`) to stdout`)
		return err
	})
	for _, s := range streams {
		r.streams[s.Stream].missing(into)
	}
	return err
}

// roll reads COPY's text format, lines of stream, id and t or f.
type roll struct {
	tally   *Tally
	streams map[int64]*ticked
	rest    []byte
	last    *ticked // most lines are of the same stream as the line before
}

// ticked is which ids of a stream were found.
type ticked struct {
	Stream
	bits []uint64
}

func (r *roll) Write(p []byte) (int, error) {
	n := len(p)
	for {
		line, more, whole := bytes.Cut(p, []byte{'\n'})
		if !whole {
			r.rest = append(r.rest, line...)
			return n, nil
		}
		if len(r.rest) > 0 {
			line = append(r.rest, line...)
			r.rest = r.rest[:0]
		}
		if err := r.line(line); err != nil {
			return 0, err
		}
		p = more
	}
}

func (r *roll) line(line []byte) error {
	stream, rest, _ := bytes.Cut(line, []byte{'\t'})
	number, intact, _ := bytes.Cut(rest, []byte{'\t'})
	s, err1 := strconv.ParseInt(string(stream), 10, 64)
	n, err2 := strconv.ParseInt(string(number), 10, 64)
	if err := errors.Join(err1, err2); err != nil || len(intact) == 0 {
		return fmt.Errorf("line %q of COPY: %w", line, err)
	}
	t := r.tally
	t.Found++
	id := ID{s, n}
	if intact[0] != 't' {
		tick(&t.Torn, &t.TornSample, id)
	}
	if r.last == nil || r.last.Stream.Stream != s {
		r.last = r.streams[s]
	}
	if r.last == nil || n < 1 || n > r.last.Sent {
		tick(&t.Phantom, &t.PhantomSample, id)
		return nil
	}
	word, bit := &r.last.bits[n/64], uint64(1)<<(n%64)
	if *word&bit != 0 {
		tick(&t.Twice, &t.TwiceSample, id)
	}
	*word |= bit
	return nil
}

func tick(count *int64, sample *[]ID, id ID) {
	*count++
	if len(*sample) < sampleSize {
		*sample = append(*sample, id)
	}
}

func (s *ticked) missing(t *Tally) {
	for n := int64(1); n <= s.Acked; n++ {
		if s.bits[n/64]&(1<<(n%64)) == 0 {
			tick(&t.Missing, &t.MissingSample, ID{s.Stream.Stream, n})
		}
	}
}

// bankTable is one of the four places where a branch's sum is kept.
type bankTable struct {
	table, column string
	total         func(*Sums) *int64
}

func bank() []bankTable {
	return []bankTable{
		{"play.branches", "balance", func(s *Sums) *int64 { return &s.Branches }},
		{"play.tellers", "balance", func(s *Sums) *int64 { return &s.Tellers }},
		{"play.accounts", "balance", func(s *Sums) *int64 { return &s.Accounts }},
		{transfersTable, "delta", func(s *Sums) *int64 { return &s.Transfers }},
	}
}

// sums compares the bank branch by branch.
func (j judge) sums(ctx context.Context) error {
	var of [4]map[int]int64
	branches := map[int]bool{}
	for i, b := range bank() {
		of[i] = map[int]int64{}
		err := j.read(ctx, b.table, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, fmt.Sprintf(`select bid, sum(%s)::bigint from %s group by bid`, b.column, b.table))
			if err != nil {
				return err
			}
			var bid int
			var sum int64
			_, err = pgx.ForEachRow(rows, []any{&bid, &sum}, func() error {
				of[i][bid] = sum
				branches[bid] = true
				*b.total(&j.found.Sums) += sum
				return nil
			})
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, bid := range slices.Sorted(maps.Keys(branches)) {
		if a := of[0][bid]; of[1][bid] != a || of[2][bid] != a || of[3][bid] != a {
			j.found.Sums.Off = append(j.found.Sums.Off, bid)
		}
	}
	return nil
}

func (j judge) markers(ctx context.Context, want Promise) error {
	look := func(n int, wanted bool) error {
		seen := MarkerSeen{N: n, Want: wanted}
		err := j.read(ctx, fmt.Sprintf("marker %d", n), func(tx pgx.Tx) (err error) {
			seen.Row, seen.View, err = marker(ctx, tx, n)
			return err
		})
		j.found.Markers = append(j.found.Markers, seen)
		return err
	}
	for _, n := range want.Present {
		if err := look(n, true); err != nil {
			return err
		}
	}
	for _, n := range want.Absent {
		if err := look(n, false); err != nil {
			return err
		}
	}
	return nil
}
