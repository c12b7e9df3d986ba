package replication_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

const mega = 1 << 20

// query asks for one LSN.
func query(t testing.TB, s *pgtest.Server, sql string) backup.LSN {
	t.Helper()
	var text string
	if err := s.Connect(t, "postgres").QueryRow(t.Context(), sql).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	lsn, err := backup.ParseLSN(text)
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

func target(s *pgtest.Server) postgres.Target {
	return postgres.Target{DSN: s.DSN("postgres"), DataDirectory: s.DataDirectory}
}

// write makes about that many megabytes of WAL.
func write(t testing.TB, s *pgtest.Server, megabytes int) {
	t.Helper()
	for range megabytes {
		s.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
	}
}

// same compares what was captured with what the server has itself: every byte
// up to end, and zeros behind it.
func same(t testing.TB, s *pgtest.Server, captured []replication.Captured, from, end backup.LSN) {
	t.Helper()
	have := wal.Set{}
	for _, c := range captured {
		g, err := c.File.Segment(mega)
		if err != nil {
			t.Fatal(err)
		}
		have[g] = true
		got, err := os.ReadFile(c.Path)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join(s.DataDirectory, "pg_wal", c.File.String()))
		if err != nil {
			t.Fatal(err)
		}
		n := min(mega, int(end-g.Start(mega)))
		if len(got) != mega || !bytes.Equal(got[:n], want[:n]) || bytes.Count(got[n:], []byte{0}) != mega-n {
			t.Errorf("%s, %d bytes, differs from the server's in its first %d, or goes on behind them", c.File, len(got), n)
		}
	}
	h := wal.History{Timeline: captured[0].File.Timeline}
	if last, ok := have.Follow(h, wal.At(1, from, mega).Number, mega); !ok || last.End(mega) < end {
		t.Errorf("captured to %s, want all from %s to %s: %v", last.End(mega), from, end, have.Ranges())
	}
}

func capture(t testing.TB, s *pgtest.Server) (*replication.Capture, string) {
	t.Helper()
	dir := t.TempDir()
	c, err := replication.StartCapture(t.Context(), target(s), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Stop() })
	return c, dir
}

func until(t testing.TB, c *replication.Capture, lsn backup.LSN) {
	t.Helper()
	if err := c.Until(t.Context(), lsn); err != nil {
		t.Fatal(err)
	}
}

func TestACaptureHoldsAllWALOfItsTime(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"wal_keep_size": "200MB", "autovacuum": "off"}})
	standby := primary.Standby(t, nil)
	write(t, primary, 2)

	t.Run("of a primary", func(t *testing.T) {
		before := query(t, primary, "SELECT pg_current_wal_flush_lsn()")
		c, dir := capture(t, primary)
		write(t, primary, 3)
		end := query(t, primary, "SELECT pg_current_wal_flush_lsn()")
		until(t, c, end)
		same(t, primary, c.Segments(), before, end)
		primary.Exec(t, "SELECT pg_logical_emit_message(true, 'x', 'a little more in the same segment')")
		end = query(t, primary, "SELECT pg_current_wal_flush_lsn()")
		until(t, c, end)
		same(t, primary, c.Segments(), before, end)
		primary.Exec(t, "SELECT pg_switch_wal()", "SELECT pg_logical_emit_message(true, 'x', 'the segment that was padded becomes whole')")
		end = query(t, primary, "SELECT pg_current_wal_flush_lsn()")
		until(t, c, end)
		same(t, primary, c.Segments(), before, end)
		dump := exec.CommandContext(t.Context(), filepath.Join(primary.Installation.Bin, "pg_waldump"), "-q", "-p", dir, "-s", before.String(), "-e", end.String())
		if out, err := dump.CombinedOutput(); err != nil {
			t.Errorf("pg_waldump: %v\n%s", err, out)
		}
		if err := errors.Join(c.Stop(), c.Stop()); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*.partial")); left != nil {
			t.Errorf("left: %v", left)
		}
		if err := c.Until(t.Context(), end+16*mega); err == nil {
			t.Error("it is stopped, and yet has WAL that there is not")
		}
	})
	t.Run("of a standby, from its last restartpoint on, and over its promotion", func(t *testing.T) {
		redo := query(t, standby, "SELECT redo_lsn FROM pg_control_checkpoint()")
		c, dir := capture(t, standby)
		write(t, primary, 2)
		end := query(t, primary, "SELECT pg_current_wal_flush_lsn()")
		until(t, c, end)
		same(t, standby, c.Segments(), redo, end)
		if err := standby.Promote(t.Context()); err != nil {
			t.Fatal(err)
		}
		write(t, standby, 2)
		until(t, c, query(t, standby, "SELECT pg_current_wal_flush_lsn()"))
		second := []replication.Captured{}
		for _, s := range c.Segments() {
			if s.File.Timeline == 2 {
				second = append(second, s)
			}
		}
		b, err := os.ReadFile(filepath.Join(dir, "00000002.history"))
		if err != nil {
			t.Fatal(err)
		}
		h, err := wal.ParseHistory(2, b)
		if err != nil || len(second) == 0 {
			t.Fatalf("segments of timeline 2: %v, its history: %q, %v", second, b, err)
		}
		same(t, standby, second, h.Forks[0].End, query(t, standby, "SELECT pg_current_wal_flush_lsn()")/mega*mega)
	})
	t.Run("and leaves no slot", func(t *testing.T) {
		for _, s := range []*pgtest.Server{primary, standby} {
			s.Exec(t, `DO $$ BEGIN
				FOR i IN 1..500 LOOP
					EXIT WHEN NOT EXISTS (SELECT FROM pg_replication_slots);
					PERFORM pg_sleep(0.01), pg_stat_clear_snapshot();
				END LOOP;
				ASSERT NOT EXISTS (SELECT FROM pg_replication_slots), 'a slot is left';
			END $$`)
		}
	})
}
