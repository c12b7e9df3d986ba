package bench_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/postgres/pgtest"
)

// archived is a server, and a catalog for its WAL.
type archived struct {
	production
	catalog string
}

func newArchived(b *testing.B) *archived {
	b.Helper()
	a := &archived{production: production{dir: pgtest.Folder(b), binary: build(b)}}
	a.catalog = pgtest.Mkdir(b, filepath.Join(a.dir, "catalog"))
	program := filepath.Join(a.dir, "cleancut") // where the server's user may run it
	text, err := os.ReadFile(a.binary)
	if err == nil {
		err = os.WriteFile(program, text, 0o755)
	}
	if err != nil {
		b.Fatal(err)
	}
	a.binary = program
	a.server = pgtest.New(b, pgtest.Options{Dir: pgtest.Mkdir(b, filepath.Join(a.dir, "p")), Sync: true, Settings: map[string]string{"shared_buffers": "128MB", "wal_keep_size": "4GB", "max_wal_size": "4GB"}})
	return a
}

// wal prepares a run of `cleancut wal`.
func (a *archived) wal(b *testing.B, args ...string) *exec.Cmd {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), a.binary, append([]string{"wal"}, args...)...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "CLEANCUT_CONFIG=", "CLEANCUT_CATALOG=file://" + a.catalog, "CLEANCUT_STATE=" + filepath.Join(a.dir, "state"), "CLEANCUT_DSN=" + a.server.DSN("postgres")}
	return cmd
}

func (a *archived) initialize(b *testing.B) {
	b.Helper()
	if out, err := a.server.Command(b.Context(), "pgbench", "-i", "-q", "-s", "10", "postgres").CombinedOutput(); err != nil {
		b.Fatalf("pgbench: %v\n%s", err, out)
	}
}

// BenchmarkWAL measures the stream, push, fetch and recovery by them.
func BenchmarkWAL(b *testing.B) {
	b.Run("stream", func(b *testing.B) {
		a := newArchived(b)
		a.initialize(b)
		for b.Loop() {
			a.measureStream(b)
		}
	})
	b.Run("replay", func(b *testing.B) {
		a := newArchived(b)
		for b.Loop() {
			a.measureReplay(b)
		}
	})
}

// streamTime is how long pgbench runs.
const streamTime = 15 * time.Second

// measureStream asks, while pgbench runs at full speed, every few milliseconds
// what is flushed and what the stream has durable (write_lsn), and takes the
// time between the two for each position.
func (a *archived) measureStream(b *testing.B) {
	b.Helper()
	cmd := a.wal(b, "stream")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			b.Errorf("wal stream: %v\n%s", err, errs.String())
		}
	}()
	conn := a.server.Connect(b, "postgres")
	type sample struct {
		at  time.Time
		lsn int64
	}
	var waiting []sample
	var lag figures
	var first, last, kept int64
	load := a.pgbench(b)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	memory := 0.0
	for began := time.Now(); time.Since(began) < streamTime || len(lag) == 0; <-tick.C {
		if time.Since(began) > 4*streamTime {
			b.Fatalf("nothing was received\n%s", errs.String())
		}
		at := time.Now()
		var flushed int64
		var durable *int64
		err := conn.QueryRow(b.Context(), `SELECT (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint, (SELECT (write_lsn - '0/0'::pg_lsn)::bigint FROM pg_stat_replication WHERE application_name = 'cleancut')`).Scan(&flushed, &durable)
		if err != nil {
			b.Fatal(err)
		}
		if durable == nil {
			continue
		}
		if first == 0 {
			first = flushed
		}
		waiting, last, kept = append(waiting, sample{at, flushed}), flushed, *durable
		for len(waiting) > 0 && waiting[0].lsn <= kept {
			lag = append(lag, ms(time.Since(waiting[0].at)))
			waiting = waiting[1:]
		}
		memory = max(memory, highWater(cmd.Process.Pid))
	}
	_, rate := load.stop(b)
	b.ReportMetric(lag.p50(), "lag-p50-ms")
	b.ReportMetric(lag.at(0.99), "lag-p99-ms")
	b.ReportMetric(memory, "tool-MiB")
	b.Logf("%.0f transactions/s, %s of WAL, at the end %s behind", rate, backup.Bytes(last-first), backup.Bytes(last-kept))
}

// segments is how many are pushed, fetched and replayed.
const segments = 24

var elapsed = regexp.MustCompile(`redo done at .* elapsed: ([0-9.]+) s`)

// backRest prepares runs of pgBackRest as the server's user on a stanza of the
// server's; nil where it is not installed.
func (a *archived) backRest(b *testing.B) func(args ...string) *exec.Cmd {
	b.Helper()
	program, err := exec.LookPath("pgbackrest")
	if err != nil {
		b.Log("pgBackRest is not installed: `scripts/install-deps --peers`")
		return nil
	}
	dir := pgtest.Mkdir(b, filepath.Join(a.dir, "pgbackrest"))
	conf := filepath.Join(dir, "pgbackrest.conf")
	text := fmt.Sprintf("[global]\nrepo1-path=%[1]s/repo\nlog-path=%[1]s\nlock-path=%[1]s/lock\nspool-path=%[1]s/spool\nlog-level-console=error\nlog-level-file=off\ncompress-type=zst\n"+
		"[main]\npg1-path=%[2]s\npg1-socket-path=%[3]s\npg1-port=%[4]d\npg1-user=postgres\n", dir, a.server.DataDirectory, a.server.SocketDir, a.server.Port)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	run := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(b.Context(), program, append([]string{"--config=" + conf, "--stanza=main"}, args...)...)
		cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/bin:/bin"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: a.server.UID, Gid: a.server.GID}}
		return cmd
	}
	if out, err := run("stanza-create").CombinedOutput(); err != nil {
		b.Fatalf("pgbackrest stanza-create: %v\n%s", err, out)
	}
	return run
}

// measureReplay makes WAL of many small changes, pushes and fetches it one by
// one, in turn with cp and pgBackRest, and recovers a base backup by wal fetch
// and by cp.
func (a *archived) measureReplay(b *testing.B) {
	b.Helper()
	base := filepath.Join(a.dir, "base")
	if out, err := a.server.Command(b.Context(), "pg_basebackup", "-D", base, "-c", "fast", "-X", "none", "--no-sync", "--no-manifest").CombinedOutput(); err != nil {
		b.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	a.server.Exec(b, "CREATE TABLE w(n int PRIMARY KEY, t text)", fmt.Sprintf("INSERT INTO w SELECT n, md5(n::text) FROM generate_series(1, %d) n", segments*85_000), "SELECT pg_switch_wal()")
	all, err := filepath.Glob(filepath.Join(a.server.DataDirectory, "pg_wal", "0*[0-9A-F]"))
	if err != nil {
		b.Fatal(err)
	}
	var current string
	if err := a.server.Connect(b, "postgres").QueryRow(b.Context(), "SELECT pg_walfile_name(pg_current_wal_insert_lsn())").Scan(&current); err != nil {
		b.Fatal(err)
	}
	plain := pgtest.Mkdir(b, filepath.Join(a.dir, "plain"))
	timed := func(cmd *exec.Cmd) float64 {
		began := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
		}
		return ms(time.Since(began))
	}
	cp := func(from, to string) *exec.Cmd { return exec.CommandContext(b.Context(), "cp", from, to) }
	var push, fetch, copied, theirPush, theirFetch figures
	theirs := a.backRest(b)
	for _, path := range all {
		name := filepath.Base(path)
		if name >= current { // not written yet
			continue
		}
		push = append(push, timed(a.wal(b, "push", path)))
		copied = append(copied, timed(cp(path, filepath.Join(plain, name))))
		fetch = append(fetch, timed(a.wal(b, "fetch", "--prefetch=false", name, filepath.Join(a.dir, "fetched"))))
		if theirs != nil {
			theirPush = append(theirPush, timed(theirs("archive-push", path)))
			theirFetch = append(theirFetch, timed(theirs("archive-get", name, filepath.Join(a.dir, "pgbackrest", "fetched"))))
		}
	}
	for _, dir := range []string{a.catalog, plain} {
		if out, err := exec.CommandContext(b.Context(), "chown", "-R", fmt.Sprintf("%d:%d", a.server.UID, a.server.GID), dir).CombinedOutput(); err != nil {
			b.Fatalf("chown: %v\n%s", err, out)
		}
	}
	byFetch := a.replay(b, base, "fetch", fmt.Sprintf("CLEANCUT_CONFIG= CLEANCUT_CATALOG=file://%s %s wal fetch %%f %%p", a.catalog, a.binary))
	byCopy := a.replay(b, base, "cp", "cp "+plain+"/%f %p")
	b.ReportMetric(push.p50(), "push-p50-ms")
	b.ReportMetric(fetch.p50(), "fetch-p50-ms")
	b.ReportMetric(copied.p50(), "cp-p50-ms")
	if theirs != nil {
		b.ReportMetric(theirPush.p50(), "pgbackrest-push-p50-ms")
		b.ReportMetric(theirFetch.p50(), "pgbackrest-get-p50-ms")
	}
	b.ReportMetric(byCopy/byFetch, "replay-speed-to-cp")
	b.Logf("%d segments; replay by wal fetch %.2f s, by cp %.2f s", len(push), byFetch, byCopy)
	for _, left := range []string{base, plain} {
		_ = os.RemoveAll(left)
	}
}

// replay recovers a copy of base and returns the seconds that redo took.
func (a *archived) replay(b *testing.B, base, name, command string) float64 {
	b.Helper()
	dir := pgtest.Mkdir(b, filepath.Join(a.dir, name))
	s := &pgtest.Server{Dir: dir, DataDirectory: filepath.Join(dir, "data"), SocketDir: pgtest.Mkdir(b, filepath.Join(dir, "s")), Port: a.server.Port, Installation: a.server.Installation, UID: a.server.UID, GID: a.server.GID}
	if out, err := exec.CommandContext(b.Context(), "cp", "-a", base, s.DataDirectory).CombinedOutput(); err != nil {
		b.Fatalf("cp: %v\n%s", err, out)
	}
	pgtest.Append(b, filepath.Join(s.DataDirectory, "postgresql.conf"), fmt.Sprintf("unix_socket_directories = '%s'\nrestore_command = '%s'\nrecovery_target_action = promote\n", s.SocketDir, command))
	pgtest.Append(b, filepath.Join(s.DataDirectory, "recovery.signal"), "")
	s.Start(b)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		log, _ := os.ReadFile(s.Log())
		if m := elapsed.FindSubmatch(log); m != nil {
			s.Stop(b)
			_ = os.RemoveAll(dir)
			took, _ := strconv.ParseFloat(string(m[1]), 64)
			return took
		}
		if b.Context().Err() != nil || bytes.Contains(log, []byte("FATAL")) {
			b.Fatalf("recovery by %s:\n%s", name, log)
		}
	}
	return 0
}
