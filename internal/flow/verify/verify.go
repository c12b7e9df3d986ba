// Package verify proves a copy, or finds what is wrong with it.
//
//	running copy → LSN reached → amcheck → vacuum → every row read → clean stop → page checksums → unmount → filesystem check = Verdict
//
// What always holds: a check that could not run is recorded as such, never as
// passed; each check runs even if one before it failed, where that makes
// sense; nothing is repaired.
package verify

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// Options is what to verify.
type Options struct {
	Copy         backup.Copy
	Manifest     backup.Manifest
	Instance     *postgres.Instance
	Installation postgres.Installation
	Level        backup.Level
	// Image leaves out of level full what writes into the image (pg_amcheck
	// installs an extension, VACUUM writes) and leaves the filesystems mounted:
	// a golden image is cut from the copy. Filesystems does the rest.
	Image    bool
	Progress func(check string) // called before each check; may be nil
}

// Run checks the copy and returns the verdict. It stops the server and, at
// level full, unmounts the filesystems. The error is only for what kept the
// verification itself from running (ctx); damage is in the verdict.
func Run(ctx context.Context, o Options) (backup.Verdict, error) {
	r := &runner{Options: o, v: backup.Verdict{Backup: o.Manifest.ID, Level: o.Level, Time: time.Now().UTC(),
		EndLSN: o.Copy.EndOfRecovery, FirstSec: o.Copy.FirstQuery}}
	start := time.Now()
	r.check(ctx, backup.CheckRecovered, r.recovered)
	r.check(ctx, backup.CheckFlushed, r.reachedLSN)
	if o.Level == backup.LevelFull && !o.Image {
		r.amcheck(ctx)
		r.check(ctx, "vacuum of every page", r.vacuum)
	}
	if o.Level != backup.LevelStart {
		r.check(ctx, "every row read (pg_dumpall)", r.dumpAll)
	}
	r.check(ctx, "clean stop", func(ctx context.Context) (string, error) {
		r.awaitIdle(ctx)
		return "", o.Instance.Stop(ctx)
	})
	r.check(ctx, "server log", r.serverLog)
	if o.Level == backup.LevelFull {
		r.check(ctx, backup.CheckChecksums, r.checksums)
	}
	if o.Level == backup.LevelFull && !o.Image {
		r.filesystems(ctx)
	}
	r.v.Seconds = time.Since(start).Seconds()
	return r.v, ctx.Err()
}

// Filesystems is what is left to check of a copy whose server does not start, or
// of one that was checked as an Image: it unmounts every filesystem and has each
// examined.
func Filesystems(ctx context.Context, c backup.Copy, progress func(check string)) []backup.Check {
	r := &runner{Options: Options{Copy: c, Progress: progress}}
	r.filesystems(ctx)
	return r.v.Checks
}

// idlePatience is how long awaitIdle waits; the stop itself waits far longer.
const idlePatience = 30 * time.Second

// errNotRun marks a check that could not run.
var errNotRun = errors.New("could not run")

type runner struct {
	Options
	v backup.Verdict
}

func (r *runner) check(ctx context.Context, name string, f func(context.Context) (string, error)) {
	if r.Progress != nil {
		r.Progress(name)
	}
	start := time.Now()
	detail, err := f(ctx)
	c := backup.Check{Name: name, Result: backup.Passed, Detail: detail, Seconds: time.Since(start).Seconds()}
	if err != nil {
		c.Result = backup.Failed
		c.Detail = strings.TrimSpace(err.Error() + " " + detail)
	}
	if errors.Is(err, errNotRun) || ctx.Err() != nil {
		c.Result = backup.CouldNotRun
	}
	r.v.Checks = append(r.v.Checks, c)
}

func (r *runner) recovered(ctx context.Context) (string, error) {
	conn, err := r.Instance.Connect(ctx, "postgres")
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var in bool
	if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&in); err != nil {
		return "", err
	}
	if in {
		return "", errors.New("the server is still in recovery")
	}
	return fmt.Sprintf("first query after %.1f s", r.Copy.FirstQuery), nil
}

// awaitIdle waits until the sessions of the checks before are gone. A backend
// that has just lost its client and is then told to end may hang for ever:
// die() (PostgreSQL 15, postgres.c) ends it inside the signal's handler, where
// exit() waits for a lock that the interrupted code holds.
func (r *runner) awaitIdle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, idlePatience)
	defer cancel()
	conn, err := r.Instance.Connect(ctx, "postgres")
	if err != nil {
		return // the stop will tell
	}
	defer conn.Close(context.WithoutCancel(ctx))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for n := 1; err == nil && n > 0; {
		err = conn.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()").Scan(&n)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// reachedLSN: a hole in the WAL ends crash recovery without an error, so the
// end is compared with what was flushed before the freeze began.
func (r *runner) reachedLSN(context.Context) (string, error) {
	want, got := r.Manifest.Cut.FlushLSN, r.Copy.EndOfRecovery
	said := fmt.Sprintf("recovery ended at %s, flushed before the cut was %s", got, want)
	if got < want {
		return "", errors.New(said + ": acknowledged commits are lost")
	}
	return said, nil
}

func (r *runner) dumpAll(ctx context.Context) (string, error) {
	reader, err := r.Installation.Reader(ctx)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	instance := *r.Instance
	instance.Installation = reader
	cmd := instance.Command(ctx, "pg_dumpall")
	var bytesRead counter
	cmd.Stdout = &bytesRead // not -f /dev/null, which pg_dumpall cannot fsync
	said, err := run(cmd)
	with := ""
	if reader.Major != r.Installation.Major {
		with = fmt.Sprintf(", read with pg_dumpall of PostgreSQL %d", reader.Major)
	}
	return strings.TrimSpace(fmt.Sprintf("%s of SQL%s %s", backup.Bytes(bytesRead), with, said)), err
}

// tool runs a client tool of the server's version; what it prints is the
// detail of a failure.
func (r *runner) tool(ctx context.Context, name string, args ...string) (string, error) {
	if _, err := r.Installation.Tool(ctx, name); err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	cmd := r.Instance.Command(ctx, name, args...)
	var out tail
	cmd.Stdout = &out
	said, err := run(cmd)
	if err == nil {
		return "", nil
	}
	return strings.TrimSpace(out.String() + " " + said), err
}

func run(cmd *exec.Cmd) (said string, err error) {
	var errs tail
	cmd.Stderr = &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		err = fmt.Errorf("%w: %w", errNotRun, err)
	}
	return errs.String(), err
}

// vacuum visits every page of every table in every database: it finds what
// the visibility map would have let it skip.
func (r *runner) vacuum(ctx context.Context) (string, error) {
	names, err := r.databases(ctx)
	if err != nil {
		return "", err
	}
	for _, db := range names {
		conn, err := r.Instance.Connect(ctx, db)
		if err != nil {
			return "", fmt.Errorf("database %s: %w", db, err)
		}
		_, err = conn.Exec(ctx, "VACUUM (VERBOSE, DISABLE_PAGE_SKIPPING, INDEX_CLEANUP ON)")
		err = errors.Join(err, conn.Close(ctx))
		if err != nil {
			return "", fmt.Errorf("database %s: %w", db, err)
		}
	}
	return fmt.Sprintf("%d databases", len(names)), nil
}

func (r *runner) databases(ctx context.Context) ([]string, error) {
	conn, err := r.Instance.Connect(ctx, "postgres")
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1")
	if err != nil {
		return nil, err
	}
	var names []string
	var name string
	for rows.Next() {
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, rows.Err()
}

// serverLog looks for what the server itself said was wrong.
func (r *runner) serverLog(context.Context) (string, error) {
	f, err := os.Open(filepath.Join(r.Copy.PrivateDir(), "postgres.log"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer f.Close()
	var bad []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		for _, sign := range []string{"PANIC:", "invalid page in block", "unexpected data beyond EOF", "could not read block", "invalid memory alloc"} {
			if strings.Contains(lines.Text(), sign) && len(bad) < 5 {
				bad = append(bad, lines.Text())
			}
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	if len(bad) > 0 {
		return "", errors.New(strings.Join(bad, "; "))
	}
	return "", nil
}

func (r *runner) checksums(ctx context.Context) (string, error) {
	if !r.Manifest.Server.DataChecksums {
		return "", fmt.Errorf("%w: data_checksums is off, torn or rotten pages cannot be seen this way", errNotRun)
	}
	return r.tool(ctx, "pg_checksums", "--check", "--pgdata", r.Copy.DataDirectory)
}

// filesystems unmounts every filesystem, the nested ones first, and has each
// examined. They were mounted since the cut, so their logs are replayed.
func (r *runner) filesystems(ctx context.Context) {
	all := slices.Clone(r.Copy.Filesystems)
	sort.Slice(all, func(a, b int) bool { return len(all[a].Mountpoint) > len(all[b].Mountpoint) })
	unmounted := true
	for _, fs := range all {
		if err := host.Unmount(ctx, fs.Mountpoint); err != nil {
			unmounted = false
			r.check(ctx, "unmount "+fs.Mountpoint, func(context.Context) (string, error) { return "", fmt.Errorf("%w: %w", errNotRun, err) })
		}
	}
	for _, fs := range r.Copy.Filesystems {
		r.check(ctx, backup.FilesystemCheck(fs.Type, fs.Device), func(ctx context.Context) (string, error) {
			if !unmounted {
				return "", fmt.Errorf("%w: not everything could be unmounted", errNotRun)
			}
			said, err := host.CheckFilesystem(ctx, fs.Type, fs.Device)
			if err != nil && !errors.Is(err, backup.ErrDamage) {
				err = fmt.Errorf("%w: %w", errNotRun, err)
			}
			if err == nil {
				said = ""
			}
			return said, err
		})
	}
}

// counter counts what is written to it.
type counter backup.Bytes

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// tail keeps the last 2 KiB of what is written to it.
type tail struct{ b bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	t.b.Write(p)
	if over := t.b.Len() - 2048; over > 0 {
		t.b.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.Join(strings.Fields(t.b.String()), " ") }

var _ io.Writer = (*tail)(nil)
