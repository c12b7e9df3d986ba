package postgres_test

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// calm keeps data pages and checkpoints out of the way: then the WAL of an
// image can be cut off anywhere and recovery still has all that it needs.
var calm = map[string]string{
	"checkpoint_timeout": "1h", "max_wal_size": "4GB", "shared_buffers": "64MB", "bgwriter_lru_maxpages": "0",
	"autovacuum": "off", "wal_writer_delay": "1ms", "wal_writer_flush_after": "0", "wal_buffers": "64kB",
}

// writers are loads that end pages of WAL inside of records in different ways.
var writers = []string{
	// long records that nobody commits: only the WAL writer flushes, by pages
	`SELECT pg_logical_emit_message(false, 'load', repeat('x', (random() * 60000)::int))`,
	`SELECT pg_logical_emit_message(false, 'load', repeat('x', (random() * 300)::int))`,
	// commits
	`SELECT pg_logical_emit_message(true, 'load', repeat('x', (random() * 9000)::int))`,
	`INSERT INTO public.load SELECT repeat(md5(random()::text), (random() * 60)::int) FROM generate_series(1, 5)`,
	// commits that nobody waits for
	`SET synchronous_commit = off; INSERT INTO public.load SELECT repeat('y', (random() * 6000)::int)`,
}

// underLoad runs do while writers write, and returns when they have ended,
// also because the server was crashed under them.
func underLoad(t *testing.T, s *pgtest.Server, do func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, q := range writers {
		conn := s.Connect(t, "postgres")
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := conn.Exec(ctx, q, pgx.QueryExecModeSimpleProtocol); err != nil {
					return
				}
			}
		})
	}
	do()
	cancel()
	wg.Wait()
}

// recordStarts lists where the records of the WAL start, as pg_waldump reads
// them from the LSN on.
func recordStarts(t *testing.T, s *pgtest.Server, from string) map[backup.LSN]bool {
	t.Helper()
	out := dumpWAL(t, s, filepath.Join(s.DataDirectory, "pg_wal"), from)
	starts := map[backup.LSN]bool{}
	pattern := regexp.MustCompile(`lsn: ([0-9A-F]+/[0-9A-F]+), prev`)
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m := pattern.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		lsn, err := backup.ParseLSN(m[1])
		if err != nil {
			t.Fatal(err)
		}
		starts[lsn] = true
	}
	return starts
}

// dumpWAL ends with the error that the WAL has an end, which is none here.
func dumpWAL(t *testing.T, s *pgtest.Server, dir, from string) []byte {
	t.Helper()
	cmd := s.Command(t.Context(), "pg_waldump", "-p", dir, "-s", from)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && !strings.Contains(errs.String(), "invalid record length") {
		t.Logf("pg_waldump: %v %s", err, errs.String())
	}
	return out.Bytes()
}

// endsRecord reports whether lsn is where one record ends and the next starts:
// there, or behind the header of the page or segment that begins there.
func endsRecord(starts map[backup.LSN]bool, lsn backup.LSN) bool {
	switch {
	case lsn%segment == 0:
		return starts[lsn+40]
	case lsn%8192 == 0:
		return starts[lsn+24]
	}
	return starts[lsn]
}

const segment = 16 << 20 // bytes in a file of WAL

func query(t *testing.T, conn *pgx.Conn, q string) string {
	t.Helper()
	var s string
	if err := conn.QueryRow(t.Context(), q).Scan(&s); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
	return s
}

func TestTheFlushedRecordEndIsAlwaysTheEndOfARecord(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Settings: calm})
	s.Exec(t, "CREATE TABLE load(t text)")
	conn := s.Connect(t, "postgres")
	from := query(t, conn, `SELECT pg_current_wal_insert_lsn()::text`)
	const samples = 100
	var promised, naive []backup.LSN
	underLoad(t, s, func() {
		for range samples {
			lsn, err := postgres.FlushedRecordEnd(t.Context(), conn)
			if err != nil {
				t.Fatal(err)
			}
			promised = append(promised, lsn)
			plain, err := backup.ParseLSN(query(t, conn, `SELECT pg_current_wal_flush_lsn()::text`))
			if err != nil {
				t.Fatal(err)
			}
			naive = append(naive, plain)
		}
	})
	s.Exec(t, `SELECT pg_logical_emit_message(true, 'end', '')`)
	starts := recordStarts(t, s, from)
	wrong := 0
	for _, lsn := range promised {
		if !endsRecord(starts, lsn) {
			t.Errorf("%s lies inside a record", lsn)
		}
	}
	for _, lsn := range naive {
		if !endsRecord(starts, lsn) {
			wrong++
		}
	}
	t.Logf("%d records; pg_current_wal_flush_lsn() lay inside a record %d of %d times", len(starts), wrong, samples)
	if wrong == 0 {
		t.Errorf("the load never flushed up to the inside of a record, so this test shows nothing")
	}
}

func TestRecoveryReachesTheFlushedRecordEndThoughAllWALBehindItIsLost(t *testing.T) {
	t.Parallel()
	dir := pgtest.Folder(t)
	s := pgtest.New(t, pgtest.Options{Dir: dir, WALDir: filepath.Join(dir, "wal"), Settings: calm})
	s.Exec(t, "CREATE TABLE load(t text)")
	pgtest.Mkdir(t, filepath.Join(dir, "space"))
	took := time.Duration(0)
	for range 4 {
		c := &cluster{Server: s, running: inspect(t, s)}
		conn := s.Connect(t, "postgres")
		var promised backup.LSN
		underLoad(t, s, func() {
			for range 50 {
				var err error
				if promised, err = postgres.FlushedRecordEnd(t.Context(), conn); err != nil {
					t.Fatal(err)
				}
			}
			s.Crash(t)
		})
		p := c.copyFiles(t)
		loseWAL(t, filepath.Join(p.Root, "wal"), promised)
		inst := start(t, p)
		if inst.EndOfRecovery != promised {
			t.Errorf("recovery ended at %s, want %s, where the WAL was cut off", inst.EndOfRecovery, promised)
		}
		took += inst.RecoveryTook
		if err := postgres.Kill(t.Context(), p.Root); err != nil {
			t.Fatal(err)
		}
		s.Start(t)
	}
	if took == 0 {
		t.Errorf("no recovery told how long it took")
	}
}

// The checkpoint at the end of recovery begins behind the lost record here, so
// its position would promise too much.
func TestTheEndOfRecoveryDoesNotCountARecordThatLacksItsTail(t *testing.T) {
	t.Parallel()
	dir := pgtest.Folder(t)
	s := pgtest.New(t, pgtest.Options{Dir: dir, WALDir: filepath.Join(dir, "wal"), Settings: calm})
	pgtest.Mkdir(t, filepath.Join(dir, "space"))
	c := &cluster{Server: s, running: inspect(t, s)}
	conn := s.Connect(t, "postgres")
	query(t, conn, `SELECT pg_logical_emit_message(true, 'whole', '')::text`)
	before, err := postgres.FlushedRecordEnd(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	end, err := backup.ParseLSN(query(t, conn, `SELECT pg_logical_emit_message(true, 'torn', repeat('x', 50000))::text`))
	if err != nil {
		t.Fatal(err)
	}
	s.Crash(t)
	p := c.copyFiles(t)
	cut := end - end%8192 // the last page boundary inside of the record
	loseWAL(t, filepath.Join(p.Root, "wal"), cut)
	inst := start(t, p)
	if inst.EndOfRecovery < before || inst.EndOfRecovery >= cut {
		t.Errorf("recovery ended at %s, want it between %s and %s", inst.EndOfRecovery, before, cut)
	}
	control, err := postgres.ReadControl(filepath.Join(p.Data, "global", "pg_control"))
	if err != nil || backup.LSN(control.RedoLSN) <= cut {
		t.Errorf("the checkpoint is at %s (%v), want it behind %s, else EndOfRecovery could come from it", backup.LSN(control.RedoLSN), err, cut)
	}
}

// loseWAL overwrites all WAL from lsn on with zeros, as a power cut leaves it
// at worst: all that was flushed is there, and nothing else.
func loseWAL(t *testing.T, dir string, lsn backup.LSN) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if len(e.Name()) != 24 {
			continue
		}
		hi, err1 := backup.ParseLSN("0/" + e.Name()[8:16])
		lo, err2 := backup.ParseLSN("0/" + e.Name()[16:])
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		first := hi<<32 | lo*segment
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if lsn < first+segment {
			clear(b[max(lsn, first)-first:])
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestATransactionThatPausesInsideAPageOfWALDoesNotMisleadTheFlushedRecordEnd(t *testing.T) {
	t.Parallel()
	settings := map[string]string{"wal_level": "minimal", "max_wal_senders": "0", "autovacuum": "off", "wal_writer_delay": "1ms"}
	s := pgtest.New(t, pgtest.Options{Settings: settings})
	writer, conn := s.Connect(t, "postgres"), s.Connect(t, "postgres")
	from := query(t, conn, `SELECT pg_current_wal_insert_lsn()::text`)
	position := func(q string) backup.LSN {
		lsn, err := backup.ParseLSN(query(t, conn, q))
		if err != nil {
			t.Fatal(err)
		}
		return lsn
	}
	// A record over several pages, of which the WAL writer flushes the full
	// ones. The transaction must stay open: its end would ask for the rest.
	tx, err := writer.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	end, err := backup.ParseLSN(query(t, writer, `SELECT pg_logical_emit_message(false, 'pause', repeat('x', 50000))::text`))
	if err != nil {
		t.Fatal(err)
	}
	for position(`SELECT pg_current_wal_flush_lsn()::text`)%8192 != 0 {
		if t.Context().Err() != nil {
			t.Fatal("the WAL writer does not flush")
		}
	}
	lsn, err := postgres.FlushedRecordEnd(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if flushed := position(`SELECT pg_current_wal_flush_lsn()::text`); lsn <= end || lsn > flushed {
		t.Errorf("got %s, want a flushed record behind the one that ends at %s; flushed is %s", lsn, end, flushed)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !endsRecord(recordStarts(t, s, from), lsn) {
		t.Errorf("%s lies inside a record", lsn)
	}
}

func TestAQuietServerIsNotWrittenToForItsFlushedRecordEnd(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Settings: map[string]string{"autovacuum": "off"}})
	s.Exec(t, "CHECKPOINT")
	conn := s.Connect(t, "postgres")
	before := query(t, conn, `SELECT pg_current_wal_insert_lsn()::text`)
	lsn, err := postgres.FlushedRecordEnd(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if after := query(t, conn, `SELECT pg_current_wal_insert_lsn()::text`); after != before || lsn.String() != before {
		t.Errorf("got %s and the WAL went from %s to %s, want no change", lsn, before, after)
	}
}
