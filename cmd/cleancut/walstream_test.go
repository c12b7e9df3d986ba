package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/flow/archive"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

// streaming is a running `wal stream`.
type streaming struct {
	cmd    *exec.Cmd
	result func() outcome
	ended  chan struct{}
}

func (w *walLab) stream(t *testing.T, env []string, args ...string) *streaming {
	t.Helper()
	s := &streaming{ended: make(chan struct{})}
	s.cmd, s.result = w.command(t, env, append([]string{"wal", "stream"}, args...)...)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = s.cmd.Wait()
		close(s.ended)
	}()
	t.Cleanup(func() {
		kill(s.cmd)
		<-s.ended
	})
	return s
}

// stop tells it to end.
func (s *streaming) stop(t testing.TB, sig syscall.Signal) outcome {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	<-s.ended
	return s.result()
}

func (w *walLab) status(t testing.TB) archive.Status {
	t.Helper()
	s, err := archive.ReadStatus(filepath.Join(w.state, "wal", "main"))
	if err != nil {
		return archive.Status{}
	}
	return s
}

// stored switches to a new segment, waits until all before it is in the
// catalog, and returns its beginning.
func (w *walLab) stored(t testing.TB, s *pgtest.Server, tl wal.Timeline) backup.LSN {
	t.Helper()
	s.Exec(t, "SELECT pg_logical_emit_message(true, 'x', 'x')", "SELECT pg_switch_wal()")
	end := w.lsn(t, s, "SELECT pg_current_wal_insert_lsn()") / mega * mega
	last := wal.At(tl, end-1, mega).File(mega)
	store := filepath.Join(w.catalog, "clusters", "main", "wal", tl.String(), last.String()+".zst")
	eventually(t, last.String()+" is in the catalog", func() bool { _, err := os.Stat(store); return err == nil })
	return end
}

func TestWALStreamSurvivesBadLuck(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, nil)
	s := w.server
	all := t // what is started again in a part of the test outlives it
	running := w.stream(t, nil)
	eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
	begin := w.lsn(t, s, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'cleancut'")
	check := func(t *testing.T) {
		t.Helper()
		w.contiguous(t, s, 1, begin, w.stored(t, s, 1))
	}
	t.Run("every segment gets there as the server wrote it", func(t *testing.T) {
		w.write(t, 4)
		check(t)
		eventually(t, "the server may forget what is stored, and the lag is nothing", func() bool {
			st := w.status(t)
			return st.Lag == 0 && st.Pending == 0 && st.Error == "" && w.one(t, s, "SELECT restart_lsn::text FROM pg_replication_slots") == st.Stored.String()
		})
	})
	t.Run("a second one on this host is refused", func(t *testing.T) {
		w.run(t, "wal", "stream").refused(t, 1, "another `wal stream` of cluster main")
	})
	t.Run("a second one with another folder waits for the slot", func(t *testing.T) {
		other := *w
		other.state = filepath.Join(t.TempDir(), "state")
		second := other.stream(t, nil)
		eventually(t, "it waits", func() bool { return strings.Contains(other.status(t).Error, "another receiver has it") })
		if o := second.stop(t, syscall.SIGTERM); o.code != 0 {
			t.Errorf("told to stop: exit %d\n%s", o.code, o.err)
		}
	})
	t.Run("the server is stopped, which it does not hold up, and comes back", func(t *testing.T) {
		w.write(t, 1)
		s.Stop(t)
		eventually(t, "it says that it waits", func() bool {
			st := w.status(t)
			return st.State == "waiting" && st.Error != "" && st.Failing != nil
		})
		s.Start(t)
		w.write(t, 2)
		check(t)
	})
	t.Run("the server crashes", func(t *testing.T) {
		s.Crash(t)
		s.Start(t)
		w.write(t, 2)
		check(t)
	})
	t.Run("its connection is cut", func(t *testing.T) {
		s.Exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
		w.write(t, 1)
		check(t)
	})
	t.Run("its slot is dropped: the server still has the WAL, so there is no gap", func(t *testing.T) {
		s.Exec(t, `DO $$ BEGIN
			FOR i IN 1..1000 LOOP
				PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots;
				BEGIN PERFORM pg_drop_replication_slot('cleancut'); EXIT;
				EXCEPTION WHEN object_in_use THEN NULL; END;
			END LOOP;
		END $$`)
		w.write(t, 1)
		check(t)
	})
	t.Run("it is killed, and the segment that was begun is completed", func(t *testing.T) {
		w.write(t, 1)
		running.stop(t, syscall.SIGKILL)
		w.write(t, 3)
		running = w.stream(all, nil)
		check(t)
	})
	t.Run("the catalog is gone for a while", func(t *testing.T) {
		if err := os.Rename(w.catalog, w.catalog+".away"); err != nil {
			t.Fatal(err)
		}
		w.write(t, 2)
		eventually(t, "it says so", func() bool { return strings.Contains(w.status(t).Error, "lost its record") })
		if _, err := os.Stat(filepath.Join(w.catalog, "clusters", "main", "wal")); err == nil {
			t.Error("a new catalog was begun in its place")
		}
		if err := os.Rename(w.catalog+".away", w.catalog); err != nil {
			t.Fatal(err)
		}
		check(t)
	})
	t.Run("a server that is another system is refused", func(t *testing.T) {
		other := *w
		other.state = filepath.Join(t.TempDir(), "state")
		clone := pgtest.New(t, pgtest.Options{Small: true})
		other.dsn = clone.DSN("postgres")
		other.run(t, "wal", "stream").refused(t, 1, "not ours", "give this one a name of its own")
	})
	t.Run("it ends by a signal with 0, and the list has no gap", func(t *testing.T) {
		if o := running.stop(t, syscall.SIGTERM); o.code != 0 {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
		var l listedWAL
		o := w.must(t, "wal", "list", "--json")
		if err := json.Unmarshal([]byte(o.out), &l); err != nil || len(l.Timelines) != 1 || len(l.Timelines[0].Ranges) != 1 || l.Stream.State != "stopped" {
			t.Errorf("%v\n%s", err, o.out)
		}
		golden(t, "json/wal-list.txt", shape(t, o.out))
	})
	t.Run("its slot is invalidated: an error that says what to do, and a gap only on request", func(t *testing.T) {
		s.Exec(t, "ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'", "ALTER SYSTEM SET wal_keep_size = 0", "ALTER SYSTEM SET min_wal_size = '2MB'", "ALTER SYSTEM SET max_wal_size = '2MB'", "SELECT pg_reload_conf()")
		for range 100 {
			w.write(t, 4)
			s.Exec(t, "CHECKPOINT")
			if w.one(t, s, "SELECT wal_status FROM pg_replication_slots") == "lost" {
				break
			}
		}
		w.run(t, "wal", "stream").refused(t, 1, "invalidated", "--skip-lost", "new backup")
		s.Exec(t, "ALTER SYSTEM SET max_slot_wal_keep_size = -1", "SELECT pg_reload_conf()")
		running = w.stream(t, nil, "--skip-lost")
		eventually(t, "it receives again", func() bool { return w.status(t).State == "receiving" })
		w.stored(t, s, 1)
		o := w.must(t, "wal", "list")
		if !strings.Contains(o.out, "GAP") || !strings.Contains(o.out, "missing") {
			t.Errorf("the gap is not shown:\n%s", o.out)
		}
	})
}

// listedWAL is what the tests look at of `wal list --json`.
type listedWAL struct {
	Timelines []struct {
		Timeline int
		Parent   int
		Ranges   []struct{ Missing uint64 }
	}
	Backups []struct {
		ID   string
		Ways []struct{ Timeline int }
	}
	Stream struct{ State string }
}

func TestWALStreamFollowsAPromotion(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, nil)
	standby := w.server.Standby(t, nil)
	w.dsn = standby.DSN("postgres")
	w.write(t, 1)
	running := w.stream(t, nil)
	eventually(t, "it receives from the standby", func() bool { return w.status(t).State == "receiving" })
	begin := w.lsn(t, standby, "SELECT restart_lsn FROM pg_replication_slots")
	w.write(t, 3)
	w.stored(t, w.server, 1)
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	standby.Exec(t, "CREATE TABLE here(n int)")
	standby.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))")
	end := w.stored(t, standby, 2)
	h, err := w.wal(t).History(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	fork := h.Forks[0].End
	w.contiguous(t, w.server, 1, begin, fork)
	w.contiguous(t, standby, 2, fork, end)
	running.stop(t, syscall.SIGTERM)
	t.Run("the old primary is refused afterwards", func(t *testing.T) {
		w.dsn = w.server.DSN("postgres")
		w.run(t, "wal", "stream").refused(t, 1, "timeline 2", "old primary")
	})
	t.Run("begun on the new timeline, the WAL since the slot's restart is fetched", func(t *testing.T) {
		other := *w
		other.dsn, other.catalog, other.state = standby.DSN("postgres"), filepath.Join(w.folder, "catalog2"), filepath.Join(t.TempDir(), "state")
		again := other.stream(t, nil, "--temporary-slot")
		end := other.stored(t, standby, 2)
		other.contiguous(t, standby, 2, end-mega, end)
		again.stop(t, syscall.SIGTERM)
	})
}

// tmpfs mounts a small filesystem.
func tmpfs(t *testing.T, dir, size string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("cleancut-test", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

func TestWALStreamSurvivesFullDisks(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	for name, dir := range map[string]func(*walLab) string{"the catalog": func(w *walLab) string { return w.catalog }, "the local folder": func(w *walLab) string { return w.state }} {
		t.Run(name, func(t *testing.T) {
			w := newWALLab(t, nil)
			tmpfs(t, dir(w), "2M")
			running := w.stream(t, nil)
			eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
			begin := w.lsn(t, w.server, "SELECT restart_lsn FROM pg_replication_slots")
			if name == "the local folder" { // leave room for less than a segment
				if err := os.WriteFile(filepath.Join(w.state, "ballast"), make([]byte, 3*mega/2), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for range 4 {
				w.server.Exec(t, "DO $$ BEGIN PERFORM pg_logical_emit_message(false, 'x', (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 30000))); END $$")
			}
			full := func() bool {
				if name == "the catalog" {
					return strings.Contains(w.status(t).Error, "no space left") && w.status(t).Unstored > 0
				}
				var st unix.Statfs_t
				return unix.Statfs(w.state, &st) == nil && st.Bavail == 0 // the status cannot be written either
			}
			eventually(t, "it is full", full)
			kept := w.lsn(t, w.server, "SELECT restart_lsn FROM pg_replication_slots")
			if err := w.wal(t).Get(context.Background(), wal.At(1, kept, mega).File(mega), wal.System{}, discard{}); err == nil {
				t.Logf("%s is stored already and still kept by the server, which is fine", kept)
			}
			w.contiguous(t, w.server, 1, begin, kept) // what the server may forget is stored
			if err := unix.Mount("cleancut-test", dir(w), "tmpfs", unix.MS_REMOUNT, "size=100M"); err != nil {
				t.Fatal(err)
			}
			w.contiguous(t, w.server, 1, begin, w.stored(t, w.server, 1))
			running.stop(t, syscall.SIGTERM)
		})
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// TestWALIsWholeWhereverTheStreamIsKilled kills the stream at each of its
// outside calls, starts it again, and compares all with the server's files.
func TestWALIsWholeWhereverTheStreamIsKilled(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, nil)
	s := w.server
	w.write(t, 1)
	running := w.stream(t, nil)
	eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
	begin := w.lsn(t, s, "SELECT restart_lsn FROM pg_replication_slots")
	w.write(t, 1)
	w.stored(t, s, 1)
	points := running.stop(t, syscall.SIGTERM).points
	seen := map[string]int{}
	for i, p := range points {
		if seen[p]++; seen[p] > 1 {
			continue
		}
		t.Run(fmt.Sprintf("kill@%d %s", i+1, p), func(t *testing.T) {
			killed := w.stream(t, []string{fmt.Sprintf("CLEANCUT_FAULT=kill@%d", i+1)})
			tick := 0
			eventually(t, "it is killed", func() bool { // points move: WAL comes until it is hit
				select {
				case <-killed.ended:
					return true
				default:
				}
				if tick++; tick%40 == 1 {
					s.Exec(t, "SELECT pg_logical_emit_message(true, 'x', repeat('x', 300000))")
				}
				return false
			})
			if o := killed.result(); o.code != -1 {
				t.Errorf("exit %d, want it killed\n%s", o.code, o.err)
			}
		})
	}
	if len(seen) < 15 {
		t.Errorf("only %d points: %v", len(seen), seen)
	}
	running = w.stream(t, nil)
	w.contiguous(t, s, 1, begin, w.stored(t, s, 1))
	running.stop(t, syscall.SIGTERM)
	left, _ := filepath.Glob(filepath.Join(w.state, "wal", "main", "0*"))
	for _, l := range left {
		if !strings.HasSuffix(l, ".partial") {
			t.Errorf("left in the folder: %s", l)
		}
	}
}
