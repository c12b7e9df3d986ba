package bench_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/flow/dump"
	"cleancut/internal/postgres"
)

const zstdLevel = 1

// runningCopy restores the backup for a benchmark of dumps.
func (p *production) runningCopy(b *testing.B, m backup.Manifest) *postgres.Instance {
	b.Helper()
	if _, err := exec.LookPath("zstd"); err != nil {
		b.Skip("zstd is missing (make deps)")
	}
	r, release, err := p.flow.Restore(b.Context(), flow.RestoreOptions{ID: m.ID, Root: filepath.Join(p.dir, "dumped"), Purpose: backup.ForRestore})
	if err != nil {
		b.Fatal(err)
	}
	release()
	b.Cleanup(func() { p.removeCopy(b, r.Copy.Root) })
	return r.Instance
}

// nowhere is a place for parts.
func nowhere(_ context.Context, _ string, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// dumpOnce runs the step and returns its seconds and what it wrote.
func dumpOnce(b *testing.B, o dump.Options) (float64, backup.DumpManifest) {
	b.Helper()
	o.Level, o.Put = zstdLevel, nowhere
	m, err := dump.Run(b.Context(), o)
	if err != nil || len(m.Failed()) > 0 {
		b.Fatal(err, m.Failed())
	}
	return m.Seconds, m
}

// measureDump dumps one running copy in turn with cleancut's step, with and
// without counting, and with pg_dumpall | zstd of the same level and two
// threads; all to nowhere.
func (p *production) measureDump(b *testing.B, m backup.Manifest) {
	b.Helper()
	i := p.runningCopy(b, m)
	var ours, uncounted, theirs, bare, speed figures
	var got backup.DumpManifest
	var compressed int64
	for range pairs + 1 {
		var took, without float64
		took, got = dumpOnce(b, dump.Options{Instance: i, Format: backup.DumpSQL})
		hand, n := dumpByHand(b, i, "zstd", "-q", "-c", fmt.Sprintf("-%d", zstdLevel), "-T2")
		without, _ = dumpOnce(b, dump.Options{Instance: i, Format: backup.DumpSQL, NoCounts: true})
		alone, _ := dumpByHand(b, i, "cat")
		compressed = n
		ours, uncounted, theirs, bare = append(ours, took), append(uncounted, without), append(theirs, hand.Seconds()), append(bare, alone.Seconds())
		speed = append(speed, hand.Seconds()/took)
	}
	ours, uncounted, theirs, bare, speed = ours[1:], uncounted[1:], theirs[1:], bare[1:], speed[1:] // the first pair warms up
	b.ReportMetric(ours.p50(), "cleancut-s")
	b.ReportMetric(theirs.p50(), "pg_dumpall|zstd-s")
	b.ReportMetric(speed.p50(), "speed-ratio")
	plain, stored := got.Sizes()
	tables, rows := got.Rows()
	b.Log(strings.Join([]string{
		fmt.Sprintf("%s of SQL, %d tables with %d rows, zstd level %d, zstd with two threads; cleancut %s, zstd %s compressed", plain, tables, rows, zstdLevel, stored, backup.Bytes(compressed)),
		fmt.Sprintf("cleancut:               %.2f s", []float64(ours)),
		fmt.Sprintf("cleancut, no counts:    %.2f s", []float64(uncounted)),
		fmt.Sprintf("pg_dumpall | zstd:      %.2f s", []float64(theirs)),
		fmt.Sprintf("pg_dumpall | cat:       %.2f s", []float64(bare)),
		fmt.Sprintf("speed of cleancut against zstd: %.2f", []float64(speed))}, "\n"))
}

// measurePerDatabase dumps two databases of the same content with two jobs,
// and in turn with cleancut's own pg_dumpall and with pg_dumpall | zstd.
func (p *production) measurePerDatabase(b *testing.B, m backup.Manifest) {
	b.Helper()
	i := p.runningCopy(b, m)
	conn, err := i.Connect(b.Context(), "template1")
	if err != nil {
		b.Fatal(err)
	}
	_, err = conn.Exec(b.Context(), "CREATE DATABASE twin TEMPLATE postgres")
	if err := errors.Join(err, conn.Close(b.Context())); err != nil {
		b.Fatal(err)
	}
	spool := filepath.Join(p.dir, "spool")
	if err := errors.Join(os.Mkdir(spool, 0o700), os.Chown(spool, int(i.UID), int(i.GID))); err != nil {
		b.Fatal(err)
	}
	var one, custom, directory, theirs, ratio, overAll figures
	for range pairs + 1 {
		whole, _ := dumpOnce(b, dump.Options{Instance: i, Format: backup.DumpSQL})
		two, _ := dumpOnce(b, dump.Options{Instance: i, Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom, Jobs: 2})
		folder, _ := dumpOnce(b, dump.Options{Instance: i, Format: backup.DumpPerDatabase, Archive: backup.ArchiveDirectory, Jobs: 2, Spool: spool})
		var hand time.Duration
		hand, _ = dumpByHand(b, i, "zstd", "-q", "-c", fmt.Sprintf("-%d", zstdLevel), "-T2")
		one, custom, directory, theirs = append(one, whole), append(custom, two), append(directory, folder), append(theirs, hand.Seconds())
		ratio, overAll = append(ratio, whole/two), append(overAll, hand.Seconds()/two)
	}
	one, custom, directory, theirs, ratio, overAll = one[1:], custom[1:], directory[1:], theirs[1:], ratio[1:], overAll[1:]
	b.ReportMetric(custom.p50(), "two-jobs-s")
	b.ReportMetric(ratio.p50(), "ratio-to-sql")
	b.ReportMetric(overAll.p50(), "ratio-to-pg_dumpall|zstd")
	b.Log(strings.Join([]string{
		fmt.Sprintf("per-database, custom, two jobs:    %.2f s", []float64(custom)),
		fmt.Sprintf("per-database, directory, two jobs: %.2f s", []float64(directory)),
		fmt.Sprintf("sql:                               %.2f s", []float64(one)),
		fmt.Sprintf("pg_dumpall | zstd:                 %.2f s", []float64(theirs)),
		fmt.Sprintf("sql over two jobs: %.2f; pg_dumpall | zstd over two jobs: %.2f", []float64(ratio), []float64(overAll))}, "\n"))
}

// dumpByHand pipes pg_dumpall into a program and counts what that writes.
func dumpByHand(b *testing.B, i *postgres.Instance, filter string, args ...string) (time.Duration, int64) {
	b.Helper()
	began := time.Now()
	source := i.Command(b.Context(), "pg_dumpall")
	sink := exec.CommandContext(b.Context(), filter, args...)
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	var said strings.Builder
	source.Stdout, source.Stderr, sink.Stdin = w, &said, r
	out, err := sink.StdoutPipe()
	err = errors.Join(err, sink.Start(), source.Start(), r.Close(), w.Close())
	if err != nil {
		b.Fatal(err)
	}
	n, err := io.Copy(io.Discard, out)
	if err := errors.Join(err, source.Wait(), sink.Wait()); err != nil {
		b.Fatalf("pg_dumpall | %s: %v\n%s", filter, err, said.String())
	}
	return time.Since(began), n
}
