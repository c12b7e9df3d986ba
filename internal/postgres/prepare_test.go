package postgres_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// snapshotOf lists all below dir with mode, owner, size and target, to see
// whether anything changed.
func snapshotOf(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "find", dir, "-printf", `%P %M %U:%G %s %T@ %l\n`).CombinedOutput()
	if err != nil {
		t.Fatalf("find: %v\n%s", err, out)
	}
	return string(out)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestPrepareRemovesWhatACopyMustNotInherit(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Exec(t, "ALTER SYSTEM SET primary_conninfo = 'host=production'", "SELECT pg_create_physical_replication_slot('kept', true)", "CHECKPOINT")
	c.Crash(t)
	p := c.copyFiles(t)
	segments, err := filepath.Glob(filepath.Join(p.Root, "wal", "0*"))
	if err != nil || len(segments) == 0 {
		t.Fatal(segments, err)
	}
	gone := []string{
		"postmaster.pid", "postmaster.opts", "standby.signal", "recovery.signal", "tablespace_map", "backup_manifest",
		"postgresql.auto.conf.tmp", "current_logfiles", "pg_replslot/kept", "pg_notify/0000", "pg_subtrans/0000", "pg_stat_tmp/global.stat",
		"pg_dynshmem/mmap.1", "pg_serial/0000", "pg_snapshots/1-1",
		"global/pg_internal.init", "base/1/pg_internal.init.123", "base/pgsql_tmp/pgsql_tmp1.0",
		filepath.Join("pg_tblspc", filepath.Base(c.running.Tablespaces[0].Link), "pgsql_tmp"),
		"pg_wal/archive_status/000000010000000000000001.ready",
	}
	for _, name := range gone {
		path := filepath.Join(p.Root, "data", name)
		if strings.HasPrefix(name, "pg_wal/") {
			path = filepath.Join(p.Root, "wal", strings.TrimPrefix(name, "pg_wal/"))
		}
		if strings.HasPrefix(name, "pg_tblspc/") {
			path = filepath.Join(p.Root, "space", "pgsql_tmp")
		}
		if !exists(path) {
			pgtest.Mkdir(t, filepath.Dir(path))
			pgtest.Append(t, path, "planted\n")
		}
	}
	if err := postgres.Prepare(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	for _, name := range gone {
		if exists(filepath.Join(p.Data, name)) {
			t.Errorf("%s is still there", name)
		}
	}
	for _, path := range segments {
		if !exists(path) {
			t.Errorf("%s is gone, which recovery needs", path)
		}
	}
	kept, err := os.ReadFile(filepath.Join(p.Data, "postgresql.auto.conf.production"))
	if err != nil || !strings.Contains(string(kept), "host=production") {
		t.Errorf("production's postgresql.auto.conf: %q, %v", kept, err)
	}
	auto, err := os.ReadFile(filepath.Join(p.Data, "postgresql.auto.conf"))
	if err != nil || strings.Contains(string(auto), "=") {
		t.Errorf("the copy's postgresql.auto.conf: %q, %v, want no setting", auto, err)
	}
	info, err := os.Stat(filepath.Join(p.Root, postgres.Private))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s has mode %v (%v), want 0700: trust authentication relies on it", postgres.Private, info.Mode(), err)
	}
	if got := snapshotOf(t, p.Root); strings.Contains(got, " 0:0 ") && c.UID != 0 {
		for line := range strings.Lines(got) {
			if strings.Contains(line, " 0:0 ") && !strings.HasPrefix(line, " ") {
				t.Errorf("belongs to root: %s", line)
			}
		}
	}
}

func TestPrepareMayBeCalledAgainAndAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Exec(t, "ALTER SYSTEM SET work_mem = '77MB'")
	c.Crash(t)
	p := c.copyFiles(t)
	for range 3 {
		if err := postgres.Prepare(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(filepath.Join(p.Data, "postgresql.auto.conf.production"))
	if err != nil || !strings.Contains(string(kept), "77MB") {
		t.Errorf("production's postgresql.auto.conf after three runs: %q, %v", kept, err)
	}
	inst := start(t, p)
	if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
		t.Errorf("got %d rows, want 1000", got)
	}
	if err := postgres.Prepare(t.Context(), p); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("beside the running server: got %v, want ErrInUse", err)
	}
}

func TestPrepareFinishesWhatAFailedRunBegan(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	count := &fault.Injector{}
	if err := postgres.Prepare(fault.With(t.Context(), count), c.copyFiles(t)); err != nil {
		t.Fatal(err)
	}
	for at := range len(count.Passed()) {
		p := c.copyFiles(t)
		broken := fault.With(t.Context(), &fault.Injector{Action: "error", At: at + 1})
		if err := postgres.Prepare(broken, p); !errors.Is(err, fault.ErrInjected) {
			t.Fatalf("at %s: got %v", count.Passed()[at], err)
		}
		if err := postgres.Prepare(t.Context(), p); err != nil {
			t.Fatalf("after a failure at %s: %v", count.Passed()[at], err)
		}
		inst := start(t, p)
		if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
			t.Errorf("after a failure at %s: got %d rows, want 1000", count.Passed()[at], got)
		}
		if err := postgres.Kill(t.Context(), p.Root); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPrepareRefusesAnImageThatIsNotTheManifests(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	cases := []struct {
		name   string
		change func(*testing.T, *postgres.Plan)
		is     error
	}{
		{"another cluster", func(_ *testing.T, p *postgres.Plan) { p.Server.SystemIdentifier++ }, backup.ErrVoid},
		{"another major version", func(_ *testing.T, p *postgres.Plan) { p.Server.VersionNum = 160002 }, backup.ErrVoid},
		{"a backup_label", func(t *testing.T, p *postgres.Plan) {
			pgtest.Append(t, filepath.Join(p.Data, "backup_label"), "START WAL LOCATION\n")
		}, backup.ErrUnsupported},
		{"a data directory that is not below the root", func(_ *testing.T, p *postgres.Plan) { p.Root = filepath.Join(p.Root, "wal") }, backup.ErrUsage},
		{"the data directory as the root", func(_ *testing.T, p *postgres.Plan) { p.Root = p.Data }, backup.ErrUsage},
		{"a WAL folder that no filesystem of the backup holds", func(_ *testing.T, p *postgres.Plan) {
			p.Map = func(string) (string, bool) { return "", false }
		}, backup.ErrVoid},
		{"a map that leads to production", func(_ *testing.T, p *postgres.Plan) {
			p.Map = func(path string) (string, bool) { return path, true }
		}, backup.ErrUnsupported},
		{"a map that leads to the root itself", func(_ *testing.T, p *postgres.Plan) {
			p.Map = func(string) (string, bool) { return p.Root, true }
		}, backup.ErrUnsupported},
	}
	for _, k := range cases {
		t.Run(k.name, func(t *testing.T) {
			p := c.copyFiles(t)
			k.change(t, &p)
			before := snapshotOf(t, c.Dir)
			if err := postgres.Prepare(t.Context(), p); !errors.Is(err, k.is) {
				t.Errorf("got %v, want %v", err, k.is)
			}
			if after := snapshotOf(t, c.Dir); after != before {
				t.Errorf("the original was changed")
			}
		})
	}
}

// A hostile image plants links where Prepare writes or removes.
func TestLinksOfAHostileImageReachNothingOutside(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	link := func(t *testing.T, target, path string) {
		t.Helper()
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	cases := []struct {
		name    string
		link    string // below the copy's root
		fails   bool   // Prepare has to refuse
		removed bool   // or to take the link away
	}{
		{name: "a directory that is emptied", link: "data/pg_replslot"},
		{name: "another directory that is emptied", link: "data/pg_stat_tmp"},
		{name: "a file that is removed", link: "data/postmaster.opts", removed: true},
		{name: "a file that is written", link: "data/postgresql.auto.conf"},
		{name: "its temporary name", link: "data/postgresql.auto.conf.tmp", removed: true},
		{name: "the file that is kept", link: "data/postgresql.auto.conf.production"},
		{name: "the private folder", link: ".cleancut", fails: true},
		{name: "the log directory", link: "data/log", removed: true},
		{name: "a certificate", link: "data/server.crt", removed: true},
		{name: "the control directory", link: "data/global", fails: true},
		{name: "the base directory", link: "data/base", fails: true},
		{name: "one database", link: "data/base/1", fails: true},
		{name: "commit status", link: "data/pg_xact", fails: true},
		{name: "a tablespace that nobody knows", link: "data/pg_tblspc/99999", fails: true},
		{name: "all tablespaces", link: "data/pg_tblspc", fails: true},
		{name: "the archive status", link: "wal/archive_status", fails: true},
		{name: "a segment of WAL", link: "wal/000000010000000000000009", fails: true},
		{name: "a temporary directory in a tablespace", link: "space/pgsql_tmp", removed: true},
	}
	for _, k := range cases {
		t.Run(k.name, func(t *testing.T) {
			p := c.copyFiles(t)
			victim := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "victim"))
			pgtest.Append(t, filepath.Join(victim, "pg_internal.init"), "precious\n")
			pgtest.Append(t, filepath.Join(victim, "000000010000000000000001.ready"), "precious\n")
			link(t, victim, filepath.Join(p.Root, k.link))
			before := snapshotOf(t, victim)
			err := postgres.Prepare(t.Context(), p)
			if (err != nil) != k.fails {
				t.Errorf("got %v, want a refusal: %v", err, k.fails)
			}
			if after := snapshotOf(t, victim); after != before {
				t.Errorf("what the link leads to was changed from\n%sto\n%s", before, after)
			}
			if k.removed && exists(filepath.Join(p.Root, k.link)) {
				t.Errorf("the link is still there")
			}
			if k.fails {
				return
			}
			err = filepath.WalkDir(p.Root, func(path string, e fs.DirEntry, err error) error {
				if err == nil && e.Type()&fs.ModeSymlink != 0 {
					real, err := filepath.EvalSymlinks(path)
					if err != nil || !strings.HasPrefix(real, p.Root+"/") {
						return fmt.Errorf("%s leads to %s (%w)", path, real, err)
					}
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
