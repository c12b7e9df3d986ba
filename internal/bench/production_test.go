package bench_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// The filesystems of production, each on a volume of its own.
const (
	onData   = "data"
	onWAL    = "wal"
	onTables = "tables"
	onIndex  = "indexes"
)

// deadline is the default for storage that answers at once; aged volumes need
// more, or a cut is refused.
const deadline = time.Minute

// production is a cluster on four volumes of a pool, and the flow over it.
type production struct {
	dir, pool string
	binary    string
	flow      *flow.Flow
	server    *pgtest.Server
	mounts    map[string]string
	images    map[string]string // the files behind the volumes
}

// newProduction makes the storage and starts a server with PostgreSQL's own
// defaults, but for settings.
func newProduction(b *testing.B, settings map[string]string) *production {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("needs root: loop devices, mounts and freezes of this kernel")
	}
	p := &production{dir: labtest.Folder(b), binary: build(b), mounts: map[string]string{}, images: map[string]string{}}
	p.pool = labtest.Pool(b, "xfs", 48<<30)
	if err := local.Init(b.Context(), p.pool); err != nil {
		b.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	volumes, err := local.Open(b.Context(), p.pool, log)
	if err != nil {
		b.Fatal(err)
	}
	st, err := state.Open(filepath.Join(p.dir, "state"))
	if err != nil {
		b.Fatal(err)
	}
	p.flow = &flow.Flow{Provider: volumes, Catalog: catalog.New(catalog.NewDir(filepath.Join(p.dir, "catalog")), "main"), State: st, Cluster: "main", Host: "bench",
		Tool: "bench", Watchdog: []string{p.binary, "watchdog"}, Log: log}
	for _, name := range []string{onData, onWAL, onTables, onIndex} {
		p.storage(b, name)
	}
	all := map[string]string{"shared_buffers": "128MB", "max_connections": "100"}
	maps.Copy(all, settings)
	run := pgtest.Mkdir(b, filepath.Join(p.dir, "run"))
	p.server = pgtest.New(b, pgtest.Options{Dir: run, Data: filepath.Join(p.mounts[onData], "pg"), WALDir: filepath.Join(p.mounts[onWAL], "pg"), Settings: all, Sync: true})
	for _, name := range []string{onTables, onIndex} {
		p.server.Exec(b, fmt.Sprintf("CREATE TABLESPACE %s LOCATION '%s'", name, pgtest.Mkdir(b, filepath.Join(p.mounts[name], "space"))))
	}
	return p
}

func (p *production) storage(b *testing.B, name string) {
	b.Helper()
	o := flow.StorageOptions{Name: name, Host: "bench", Volumes: 1, Size: 8 << 30, Filesystem: "xfs", Mountpoint: filepath.Join(p.dir, name), MountOptions: []string{"noatime"},
		Fstab: filepath.Join(p.dir, "fstab"), MdadmConf: filepath.Join(p.dir, "mdadm.conf")}
	made, err := flow.CreateStorage(b.Context(), p.flow.Provider, o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := flow.DestroyStorage(labtest.Context(b), p.flow.Provider, o); err != nil {
			b.Error(err)
		}
	})
	p.mounts[name] = o.Mountpoint
	p.images[name] = filepath.Join(p.pool, "volumes", string(made.Volumes[0])+".img")
}

// build makes the program as `make build` does: without fault points.
func build(b *testing.B) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "cleancut")
	cmd := exec.CommandContext(b.Context(), "go", "build", "-trimpath", "-o", path, "cleancut/cmd/cleancut")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("build cleancut: %v\n%s", err, out)
	}
	return path
}

// tool runs one of PostgreSQL's programs to its end.
func (p *production) tool(b *testing.B, name string, args ...string) {
	b.Helper()
	if out, err := p.server.Command(b.Context(), name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// fill makes pgbench's tables: the rows of accounts on one tablespace, all
// indexes on the other, the small tables beside the catalogs.
func (p *production) fill(b *testing.B, scale int) {
	b.Helper()
	p.tool(b, "pgbench", "-i", "-q", "-s", strconv.Itoa(scale), "--tablespace="+onTables, "--index-tablespace="+onIndex, "postgres")
	for _, table := range []string{"history", "tellers", "branches"} {
		p.server.Exec(b, "ALTER TABLE pgbench_"+table+" SET TABLESPACE pg_default")
	}
	p.server.Exec(b, "CHECKPOINT")
}

func (p *production) backupOptions() flow.BackupOptions {
	return flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: deadline, Quick: 100 * time.Millisecond, Rounds: 50}
}

// backup makes one backup.
func (p *production) backup(b *testing.B) backup.Manifest {
	b.Helper()
	m, err := p.flow.Backup(b.Context(), p.backupOptions())
	if err != nil {
		b.Fatal(err)
	}
	return m
}

// command prepares a run of the real program on this production.
func (p *production) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.binary, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root", "LANG=C.UTF-8", "CLEANCUT_CONFIG=", "CLEANCUT_POOL=" + p.pool, "CLEANCUT_CATALOG=file://" + filepath.Join(p.dir, "catalog"),
		"CLEANCUT_STATE=" + p.flow.State.Path(), "CLEANCUT_HOST_NAME=bench", "CLEANCUT_DSN=" + p.server.DSN("postgres"), "CLEANCUT_BIN_DIRS="}
	return cmd
}

// once runs f as the one operation of a benchmark; its figures are those that
// f reports.
func once(b *testing.B, f func()) {
	b.Helper()
	for done := false; b.Loop(); {
		if !done { // a short f is not repeated to fill -benchtime
			f()
			done = true
		}
	}
	b.ReportMetric(0, "ns/op") // not shown
}

// pause waits; it is part of what is measured, or keeps cuts apart.
func pause(b *testing.B, d time.Duration) {
	b.Helper()
	select {
	case <-time.After(d):
	case <-b.Context().Done():
		b.Fatal(b.Context().Err())
	}
}

// removeCopy takes a copy down, whatever happened to the benchmark.
func (p *production) removeCopy(b *testing.B, root string) {
	b.Helper()
	if _, err := p.flow.RemoveCopy(labtest.Context(b), root); err != nil && !errors.Is(err, backup.ErrNotFound) {
		b.Error(err)
	}
}
