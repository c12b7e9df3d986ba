package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

const mega = 1 << 20

// walLab is a server, a catalog that its user may write, and the program where
// that user may run it.
type walLab struct {
	lab
	folder  string
	program string
	server  *pgtest.Server
}

func newWALLab(t *testing.T, settings map[string]string) *walLab {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real server: run `make test`")
	}
	w := &walLab{folder: pgtest.Folder(t)}
	w.dir = w.folder
	w.catalog, w.state, w.host = filepath.Join(w.folder, "catalog"), filepath.Join(t.TempDir(), "state"), "prod"
	pgtest.Mkdir(t, w.catalog)
	w.program = filepath.Join(w.folder, "cleancut")
	b, err := os.ReadFile(binary(t))
	if err == nil {
		err = os.WriteFile(w.program, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"autovacuum": "off", "wal_keep_size": "200MB", "archive_timeout": "0", "max_wal_size": "500MB"}
	for k, v := range settings {
		all[k] = strings.ReplaceAll(v, "CLEANCUT", w.call())
	}
	w.server = pgtest.New(t, pgtest.Options{Dir: pgtest.Mkdir(t, filepath.Join(w.folder, "p")), Small: true, NoStart: true, Settings: all})
	w.server.Start(t)
	w.dsn = w.server.DSN("postgres")
	return w
}

// call is how the server calls the program.
func (w *walLab) call() string {
	return fmt.Sprintf("CLEANCUT_CONFIG= CLEANCUT_CATALOG=file://%s %s", w.catalog, w.program)
}

// write makes about that many megabytes of WAL and a row that tells of it.
func (w *walLab) write(t *testing.T, megabytes int) {
	t.Helper()
	w.server.Exec(t, "CREATE TABLE IF NOT EXISTS t(n serial)")
	for range megabytes {
		w.server.Exec(t, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))", "INSERT INTO t DEFAULT VALUES")
	}
}

func (w *walLab) one(t testing.TB, s *pgtest.Server, sql string) string {
	t.Helper()
	conn := s.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }() // there are 30, and some poll
	var out string
	if err := conn.QueryRow(t.Context(), sql).Scan(&out); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return out
}

// until polls until a query gives a value.
func (w *walLab) until(t testing.TB, s *pgtest.Server, sql, want string) {
	t.Helper()
	conn := s.Connect(t, "postgres")
	eventually(t, sql+" gives "+want, func() bool {
		var got string
		if err := conn.QueryRow(t.Context(), sql).Scan(&got); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		return got == want
	})
}

func (w *walLab) wal(t testing.TB) catalog.WAL {
	t.Helper()
	store, err := catalog.Open("file://" + w.catalog)
	if err != nil {
		t.Fatal(err)
	}
	return catalog.New(store, "main").WAL()
}

// contiguous compares every segment of the catalog with the server's own file,
// and wants all of timeline t from first on up to the segment before end.
func (w *walLab) contiguous(t testing.TB, s *pgtest.Server, tl wal.Timeline, first, end backup.LSN) {
	t.Helper()
	for n := uint64(first) / mega; n < uint64(end)/mega; n++ {
		f := wal.Segment{Timeline: tl, Number: n}.File(mega)
		var got bytes.Buffer
		if err := w.wal(t).Get(t.Context(), f, wal.System{}, &got); err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		want, err := os.ReadFile(filepath.Join(s.DataDirectory, "pg_wal", f.String()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s is not what the server wrote", f)
		}
	}
}

func (w *walLab) lsn(t testing.TB, s *pgtest.Server, sql string) backup.LSN {
	t.Helper()
	lsn, err := backup.ParseLSN(w.one(t, s, sql))
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

// base copies the cluster by pg_basebackup, without WAL.
func (w *walLab) base(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(w.folder, "base")
	if out, err := w.server.Command(t.Context(), "pg_basebackup", "-D", dir, "-c", "fast", "-X", "none", "--no-sync", "--no-manifest").CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	return dir
}

// recovering prepares a server that recovers from the catalog; it is not
// started.
func (w *walLab) recovering(t *testing.T, base, name, command string) *pgtest.Server {
	t.Helper()
	s := &pgtest.Server{Dir: pgtest.Mkdir(t, filepath.Join(w.folder, name)), Port: w.server.Port, Installation: w.server.Installation, UID: w.server.UID, GID: w.server.GID}
	s.DataDirectory, s.SocketDir = filepath.Join(s.Dir, "data"), pgtest.Mkdir(t, filepath.Join(s.Dir, "s"))
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", base, s.DataDirectory).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	pgtest.Append(t, filepath.Join(s.DataDirectory, "postgresql.conf"), fmt.Sprintf("unix_socket_directories = '%s'\narchive_mode = off\nrestore_command = '%s'\n", s.SocketDir, command))
	pgtest.Append(t, filepath.Join(s.DataDirectory, "recovery.signal"), "")
	t.Cleanup(func() { s.Stop(detached{t}) })
	return s
}

// refusesToStart runs a server that must end by itself, and returns its log.
func refusesToStart(t *testing.T, s *pgtest.Server) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := s.Command(ctx, "postgres", "-D", s.DataDirectory)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	out, err := cmd.CombinedOutput()
	if err == nil || ctx.Err() != nil {
		t.Errorf("the server started, or went on for ever: %v\n%s", err, out)
	}
	return string(out)
}

// flipped is a stored file with one bit of its middle changed.
func flipped(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 4
	return b
}

// ofAnotherSystem is a stored segment as a clone of the cluster would have
// written it: whole, but for its system identifier.
func ofAnotherSystem(t *testing.T, stored []byte) []byte {
	t.Helper()
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	b, err := dec.DecodeAll(stored, nil)
	if err != nil {
		t.Fatal(err)
	}
	b[24]++
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return enc.EncodeAll(b, nil)
}

func TestArchiveCommandAndRestoreCommand(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, map[string]string{"archive_mode": "on", "archive_command": "CLEANCUT wal push %p"})
	begin := w.lsn(t, w.server, "SELECT pg_current_wal_flush_lsn()")
	base := w.base(t)
	w.write(t, 12)
	w.server.Exec(t, "SELECT pg_switch_wal()")
	end := w.lsn(t, w.server, "SELECT pg_current_wal_insert_lsn()") / mega * mega
	last := wal.At(1, end-1, mega).File(mega)
	w.until(t, w.server, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver", last.String())
	w.contiguous(t, w.server, 1, begin, end)
	rows := w.one(t, w.server, "SELECT count(*)::text FROM public.t")
	own := filepath.Join(w.server.DataDirectory, "pg_wal", last.String())

	t.Run("pushed again: the same is fine, other content is refused", func(t *testing.T) {
		w.must(t, "wal", "push", own)
		b, err := os.ReadFile(own)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		push := func(name string, content []byte) outcome {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			return w.run(t, "wal", "push", path)
		}
		other := bytes.Clone(b)
		other[len(other)-1]++
		push(last.String(), other).refused(t, 1, "exists already with other content", "what to do")
		other = bytes.Clone(b)
		other[24]++ // the system identifier
		push(last.String(), other).refused(t, 1, "not ours", "--cluster")
		push(last.String(), b[:mega/2]).refused(t, 4, "damage")
		push("000000010000000000000FFF", b).refused(t, 4, "begins with page")
		push("00000002.history", []byte("rubbish")).refused(t, 4, "history of timeline 2")
		push("README", nil).refused(t, 2, "no name of a WAL file")
		if o := push("00000009.history", []byte("1\t0/3000000\tx\n")); o.code != 0 {
			t.Errorf("a history file: exit %d\n%s", o.code, o.err)
		}
		if err := w.wal(t).Delete(t.Context(), wal.HistoryOf(9)); err != nil {
			t.Fatal(err)
		}
	})
	fetch := w.call() + " wal fetch %f %p"
	t.Run("recovery reads it to its end and leaves nothing in the spool", func(t *testing.T) {
		s := w.recovering(t, base, "good", fetch)
		s.Start(t)
		w.until(t, s, "SELECT pg_is_in_recovery()::text", "false")
		if got := w.one(t, s, "SELECT count(*)::text FROM public.t"); got != rows {
			t.Errorf("got %s rows, want %s", got, rows)
		}
		s.Stop(t)
		eventually(t, "nothing is left in pg_wal", func() bool { // the last prefetch removes the folder
			left, _ := filepath.Glob(filepath.Join(s.DataDirectory, "pg_wal", "*cleancut*"))
			return left == nil
		})
		log, _ := os.ReadFile(s.Log())
		if !bytes.Contains(log, []byte("restored log file \""+last.String())) {
			t.Errorf("not from the catalog:\n%s", log)
		}
	})
	middle := wal.At(1, begin+5*mega, mega).File(mega)
	stored := filepath.Join(w.catalog, "clusters", "main", "wal", "00000001", middle.String()+".zst")
	whole, err := os.ReadFile(stored)
	if err != nil {
		t.Fatal(err)
	}
	halve := func() error { return os.WriteFile(stored, whole[:len(whole)/2], 0o600) }
	for name, c := range map[string]struct {
		harm  func() error
		words string
	}{
		"a segment that is cut short":  {halve, "damage found"},
		"a segment with a flipped bit": {func() error { return os.WriteFile(stored, flipped(whole), 0o600) }, "damage found"},
		"a segment of another system":  {func() error { return os.WriteFile(stored, ofAnotherSystem(t, whole), 0o600) }, "not ours"},
		"another segment by its name": {func() error {
			b, err := os.ReadFile(strings.Replace(stored, middle.String(), last.String(), 1))
			return errors.Join(err, os.WriteFile(stored, b, 0o600))
		}, "begins with page"},
		"a gap":                       {func() error { return os.Remove(stored) }, "this is a gap and not the end of the WAL"},
		"a catalog that is not there": {func() error { return os.Rename(w.catalog, w.catalog+".away") }, "is the catalog mounted"},
	} {
		t.Run("the server stops before "+name, func(t *testing.T) {
			s := w.recovering(t, base, strings.ReplaceAll(name, " ", ""), fetch)
			if err := c.harm(); err != nil {
				t.Fatal(err)
			}
			log := refusesToStart(t, s)
			_ = os.Rename(w.catalog+".away", w.catalog)
			if err := os.WriteFile(stored, whole, 0o644); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(log, c.words) || !strings.Contains(log, "exit code 200") || strings.Contains(log, "selected new timeline") {
				t.Errorf("want %q, exit code 200 and no new timeline in:\n%s", c.words, log)
			}
		})
	}
	t.Run("up to a gap, by a target before it or with --standby", func(t *testing.T) {
		if err := os.Remove(stored); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(stored, whole, 0o644); err != nil {
				t.Error(err)
			}
		}()
		for name, command := range map[string]string{"target": fetch + "'\nrecovery_target_action = 'promote'\nrecovery_target_lsn = '" + (begin + 3*mega).String(), "standby": strings.Replace(fetch, "fetch", "fetch --standby", 1)} {
			s := w.recovering(t, base, "upto"+name, command)
			s.Start(t)
			w.until(t, s, "SELECT pg_is_in_recovery()::text", "false")
			s.Stop(t)
		}
	})
	t.Run("of another cluster: by the server's own pg_control", func(t *testing.T) {
		other := pgtest.New(t, pgtest.Options{Small: true, NoStart: true})
		cmd := exec.CommandContext(t.Context(), w.program, "wal", "fetch", last.String(), "pg_wal/RECOVERYXLOG")
		cmd.Dir, cmd.Env = other.DataDirectory, w.environment()
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 200 || !strings.Contains(string(out), "not ours") {
			t.Errorf("got %v\n%s", err, out)
		}
	})
	t.Run("by hand", func(t *testing.T) {
		to := filepath.Join(t.TempDir(), "x")
		w.must(t, "wal", "fetch", "--prefetch=false", last.String(), to)
		got, err1 := os.ReadFile(to)
		want, err2 := os.ReadFile(own)
		if err1 != nil || err2 != nil || !bytes.Equal(got, want) {
			t.Errorf("got %d bytes, %v, %v", len(got), err1, err2)
		}
		w.run(t, "wal", "fetch", "000000010000000000000FFF", to).refused(t, 1, "not found")
		w.run(t, "wal", "fetch", "00000007.history", to).refused(t, 1, "not found")
		w.run(t, "wal", "fetch", "rubbish", to).refused(t, 200, "no name of a WAL file")
		w.run(t, "wal", "fetch", "--frobnicate", last.String(), to).refused(t, 200, "unknown flag")
		w.run(t, "wal", "fetch", "--cluster", "other", last.String(), to).refused(t, 200, "no WAL of this cluster", "is the catalog mounted")
		if err := halve(); err != nil {
			t.Fatal(err)
		}
		w.run(t, "wal", "fetch", "--standby", middle.String(), to).refused(t, 200, "damage found")
		w.run(t, "wal", "fetch").refused(t, 200, "usage: cleancut wal fetch NAME PATH")
		w.run(t, "wal", "fetch", "--standby", "--catalog", "s3://bucket/x?endpoint=http://127.0.0.1:1&region=x", last.String(), to).refused(t, 1, "")
	})
}

// TestPushAndFetchThatAreKilledAreRepeated kills them at each outside call. The
// segment is the one that initdb makes.
func TestPushAndFetchThatAreKilledAreRepeated(t *testing.T) {
	t.Parallel()
	cluster := pgtest.New(t, pgtest.Options{Small: true, NoStart: true})
	all, err := filepath.Glob(filepath.Join(cluster.DataDirectory, "pg_wal", "0*"))
	if err != nil || len(all) == 0 {
		t.Fatalf("initdb left no segment: %v", err)
	}
	own, name := all[0], filepath.Base(all[0])
	want, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	w := &walLab{lab: lab{dir: t.TempDir(), host: "prod"}}
	w.catalog, w.state = filepath.Join(w.dir, "catalog"), filepath.Join(w.dir, "state")
	to := filepath.Join(w.dir, "RECOVERYXLOG")
	w.must(t, "wal", "push", own)
	for what, args := range map[string][]string{"push": {"wal", "push", own}, "fetch": {"wal", "fetch", "--prefetch=false", name, to}} {
		fresh := func() {
			if what == "push" {
				_ = os.RemoveAll(w.catalog)
			}
			_ = os.Remove(to)
		}
		fresh()
		points := w.must(t, args...).points
		for n, p := range points {
			fresh()
			if o := w.runWith(t, []string{fmt.Sprintf("CLEANCUT_FAULT=kill@%d", n+1)}, args...); o.code != -1 {
				t.Errorf("%s, kill@%d %s: exit %d", what, n+1, p, o.code)
			}
			if got, err := os.ReadFile(to); err == nil && !bytes.Equal(got, want) {
				t.Errorf("%s, kill@%d %s: half a file has the name that PostgreSQL waits for", what, n+1, p)
			}
			w.must(t, args...)
			w.must(t, "wal", "fetch", "--prefetch=false", name, to)
			if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s again after kill@%d %s: got %d bytes, %v", what, n+1, p, len(got), err)
			}
		}
		if len(points) < 4 {
			t.Errorf("%s: only %d points", what, len(points))
		}
	}
	if left, _ := filepath.Glob(filepath.Join(w.dir, "*.cleancut")); left != nil {
		t.Errorf("left: %v", left)
	}
}

func TestTheSystemdUnitIsFit(t *testing.T) {
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("NOTE no systemd-analyze here: the unit is not looked at")
		return
	}
	unit, err := os.ReadFile("../../dist/systemd/cleancut-wal.service")
	if err != nil {
		t.Fatal(err)
	}
	const program = "/usr/local/bin/cleancut"
	if !bytes.Contains(unit, []byte("ExecStart="+program+" wal stream\n")) {
		t.Errorf("the unit does not run %s wal stream", program)
	}
	path := filepath.Join(t.TempDir(), "cleancut-wal.service") // with a program that is there
	if err := os.WriteFile(path, bytes.ReplaceAll(unit, []byte(program), []byte("/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), verify, "verify", "--recursive-errors=no", path).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}
