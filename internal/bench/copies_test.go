package bench_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/bench"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
)

const (
	pairs = 3
	rows  = 600_000 // people and words of the play database, some 300 MB
)

// BenchmarkCopy measures what is done with copies of one backup: recovery
// against PostgreSQL alone, the dump against pg_dumpall | zstd, and the memory
// of the program at its work.
func BenchmarkCopy(b *testing.B) {
	p := newProduction(b, map[string]string{"max_wal_size": "4GB", "checkpoint_timeout": "30min"})
	p.fill(b, 10)
	conn, err := pgx.Connect(b.Context(), p.server.DSN("postgres"))
	if err != nil {
		b.Fatal(err)
	}
	_, err = load.Create(b.Context(), conn, load.Options{Rows: rows})
	if err := errors.Join(err, conn.Close(b.Context())); err != nil {
		b.Fatal(err)
	}
	p.server.Exec(b, "CHECKPOINT")
	c := p.pgbench(b)
	p.server.Exec(b, "UPDATE pgbench_accounts SET abalance = abalance + 1") // some WAL to recover
	m := p.backup(b)
	c.stop(b)
	b.Run("recover", func(b *testing.B) { once(b, func() { p.measureRecovery(b, m) }) })
	b.Run("dump", func(b *testing.B) { once(b, func() { p.measureDump(b, m) }) })
	b.Run("per-database", func(b *testing.B) { once(b, func() { p.measurePerDatabase(b, m) }) })
	b.Run("memory", func(b *testing.B) { once(b, func() { p.measureMemory(b) }) })
}

// measureRecovery restores a backup with cleancut and by hand in turn.
func (p *production) measureRecovery(b *testing.B, m backup.Manifest) {
	b.Helper()
	var ready, start, byHand, own, ownByHand, over, around figures
	for n := range pairs {
		began := time.Time{}
		p.flow.Progress = func(phase, _ string) {
			if phase == "snapshots" { // restore.Run begins
				began = time.Now()
			}
		}
		r, release, err := p.flow.Restore(b.Context(), flow.RestoreOptions{ID: m.ID, Root: filepath.Join(p.dir, fmt.Sprint("copy", n)), Purpose: backup.ForRestore})
		took := time.Since(began)
		p.flow.Progress = nil
		if err != nil {
			b.Fatal(err)
		}
		release()
		p.removeCopy(b, r.Copy.Root)
		hand, redo := p.recoverByHand(b, m, n)
		ready, start, own = append(ready, took.Seconds()), append(start, r.Instance.FirstQuery.Seconds()), append(own, r.Instance.RecoveryTook.Seconds())
		byHand, ownByHand = append(byHand, hand.Seconds()), append(ownByHand, redo.Seconds())
		over, around = append(over, (took-hand).Seconds()), append(around, (took-r.Instance.RecoveryTook).Seconds())
	}
	b.ReportMetric(ready.p50(), "ready-s")
	b.ReportMetric(byHand.p50(), "postgres-alone-s")
	b.ReportMetric(over.p50(), "over-s")
	b.ReportMetric(around.p50(), "around-redo-s")
	b.ReportMetric(ready.p50()/byHand.p50(), "ratio")
	b.Log(strings.Join([]string{
		fmt.Sprintf("with cleancut: %.2f s from the manifest to the first query, of which the server %.2f s (its log: redo %.2f s)", []float64(ready), []float64(start), []float64(own)),
		fmt.Sprintf("by hand, storage mounted already: %.2f s from the server's start to the first query (its log: redo %.2f s)", []float64(byHand), []float64(ownByHand)),
		fmt.Sprintf("difference: %.2f s; all that cleancut and its server do beside redo: %.2f s", []float64(over), []float64(around))}, "\n"))
}

var (
	redoDone  = regexp.MustCompile(`redo done at .* elapsed: ([0-9.]+) s`)
	tableLink = regexp.MustCompile(`^[0-9]+$`)
)

// recoverByHand does what an administrator would without cleancut: clones,
// loop devices, mounts, links, start. Only what comes after the mounts counts.
func (p *production) recoverByHand(b *testing.B, m backup.Manifest, n int) (first, redo time.Duration) {
	b.Helper()
	ctx := labtest.Context(b)
	root := filepath.Join(p.dir, fmt.Sprint("hand", n))
	place := func(original string) string { return filepath.Join(root, filepath.Base(original)) }
	undo := func() error { return nil }
	defer func() {
		if err := undo(); err != nil {
			b.Error(err)
		}
	}()
	for i, fs := range m.Topology.Filesystems {
		u, err := p.mountByHand(ctx, b, m, fs, filepath.Join(p.pool, fmt.Sprintf("hand-%d-%d.img", n, i)), place(fs.Mountpoint))
		before := undo
		undo = func() error { return errors.Join(u(), before()) }
		if err != nil {
			b.Fatal(err)
		}
	}
	data := filepath.Join(place(p.mounts[onData]), "pg")
	relink(b, filepath.Join(data, "pg_wal"), filepath.Join(place(p.mounts[onWAL]), "pg"))
	links, err := os.ReadDir(filepath.Join(data, "pg_tblspc"))
	if err != nil {
		b.Fatal(err)
	}
	for _, l := range links {
		link := filepath.Join(data, "pg_tblspc", l.Name())
		to, err := os.Readlink(link)
		if err != nil || !tableLink.MatchString(l.Name()) {
			b.Fatalf("%s: %v", link, err)
		}
		relink(b, link, filepath.Join(place(filepath.Dir(to)), filepath.Base(to)))
	}
	return p.startByHand(ctx, b, root, data)
}

// mountByHand mounts a clone of the snapshot behind a filesystem.
func (p *production) mountByHand(ctx context.Context, b *testing.B, m backup.Manifest, fs backup.Filesystem, image, to string) (undo func() error, err error) {
	b.Helper()
	for _, s := range m.Snapshots {
		if s.Volume.ID == fs.Device.Volume.ID {
			if err := bench.Clone(filepath.Join(p.pool, "snapshots", string(s.ID)+".img"), image); err != nil {
				b.Fatal(err)
			}
		}
	}
	undo = func() error { return os.Remove(image) }
	out, err := host.Run(ctx, "losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", image)
	if err != nil {
		return undo, err
	}
	device, remove := strings.TrimSpace(string(out)), undo
	undo = func() error {
		_, err := host.Run(ctx, "losetup", "--detach", device)
		return errors.Join(err, remove())
	}
	detach := undo
	if err := host.MountDevice(ctx, device, to, fs.Type, append([]string{"nouuid"}, fs.Options...)); err != nil {
		return undo, err
	}
	return func() error { return errors.Join(host.Unmount(ctx, to), detach()) }, nil
}

func relink(b *testing.B, link, to string) {
	b.Helper()
	if err := errors.Join(os.Remove(link), os.Symlink(to, link)); err != nil {
		b.Fatal(err)
	}
}

// startByHand starts the server as it is configured, but for its socket, and
// asks until it answers.
func (p *production) startByHand(ctx context.Context, b *testing.B, root, data string) (first, redo time.Duration) {
	b.Helper()
	log, err := os.OpenFile(filepath.Join(p.server.Dir, filepath.Base(root)+".log"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	if err := os.Remove(filepath.Join(data, "postmaster.pid")); err != nil {
		b.Fatal(err)
	}
	const port = "5433"
	cmd := p.server.Command(ctx, "postgres", "-D", data, "-p", port)
	cmd.Stdout, cmd.Stderr = log, log
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		<-ended
	}()
	tick := time.NewTicker(20 * time.Millisecond) // as cleancut asks
	defer tick.Stop()
	for first == 0 {
		<-tick.C
		conn, err := pgx.Connect(ctx, fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres", p.server.SocketDir, port))
		if err != nil {
			if time.Since(began) > 5*time.Minute {
				b.Fatal(err)
			}
			continue
		}
		_, err = conn.Exec(ctx, "SELECT 1")
		first = time.Since(began)
		if err := errors.Join(err, conn.Close(ctx)); err != nil {
			b.Fatal(err)
		}
	}
	text, err := os.ReadFile(log.Name())
	if err != nil {
		b.Fatal(err)
	}
	if found := redoDone.FindSubmatch(text); found != nil {
		seconds, _ := strconv.ParseFloat(string(found[1]), 64)
		redo = time.Duration(seconds * float64(time.Second))
	}
	return first, redo
}
