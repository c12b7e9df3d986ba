package postgres_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// cluster is a running server with everything that a copy has to move: a
// linked pg_wal and a tablespace.
type cluster struct {
	*pgtest.Server
	running postgres.Running
}

func newCluster(t *testing.T, settings map[string]string) *cluster {
	t.Helper()
	return newClusterOf(t, 15, settings)
}

func newClusterOf(t *testing.T, major int, settings map[string]string) *cluster {
	t.Helper()
	dir := pgtest.Folder(t)
	s := pgtest.New(t, pgtest.Options{Major: major, Dir: dir, WALDir: filepath.Join(dir, "wal"), Settings: settings, Small: true})
	space := pgtest.Mkdir(t, filepath.Join(dir, "space"))
	s.Exec(t, "CREATE TABLESPACE far LOCATION '"+space+"'",
		"CREATE TABLE far_away(x int) TABLESPACE far", "INSERT INTO far_away SELECT generate_series(1, 1000)",
		"CREATE UNLOGGED TABLE lost(x int)")
	if os.Geteuid() != 0 {
		// Only root can recover a fresh tablespace beside its original.
		s.Exec(t, "SELECT pg_sleep(2.1)", "CHECKPOINT")
	}
	return &cluster{Server: s, running: inspect(t, s)}
}

func inspect(t *testing.T, s *pgtest.Server) postgres.Running {
	t.Helper()
	r, err := postgres.Inspect(t.Context(), s.Connect(t, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// copyFiles copies the stopped or crashed cluster below a new root and returns
// the plan for it. cp keeps the links as they are: absolute, to production.
func (c *cluster) copyFiles(t *testing.T) postgres.Plan {
	t.Helper()
	root := filepath.Join(pgtest.Folder(t), "copy")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", c.DataDirectory, filepath.Join(c.Dir, "wal"), filepath.Join(c.Dir, "space"), root).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	places := []backup.Place{
		{Kind: backup.PlaceData, Path: c.running.DataDirectory},
		{Kind: backup.PlaceWAL, Path: c.running.WALDirectory, Link: "pg_wal"},
	}
	for _, s := range c.running.Tablespaces {
		places = append(places, backup.Place{Kind: backup.PlaceTablespace, OID: s.OID, Path: s.Path, Link: s.Link})
	}
	return postgres.Plan{
		Root: root, Data: filepath.Join(root, "data"), Server: c.running.Server, Places: places,
		Map: func(path string) (string, bool) {
			rel, ok := strings.CutPrefix(path, c.Dir+"/")
			return filepath.Join(root, rel), ok
		},
	}
}

func startable(t *testing.T, p postgres.Plan) postgres.Copy {
	t.Helper()
	return postgres.Copy{Root: p.Root, Data: p.Data, Server: p.Server, Installation: pgtest.Installation(t, p.Server.Major())}
}

// start prepares and starts, and kills what is left when the test ends.
func start(t *testing.T, p postgres.Plan, change ...func(*postgres.Copy)) *postgres.Instance {
	t.Helper()
	if err := postgres.Prepare(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	c := startable(t, p)
	for _, f := range change {
		f(&c)
	}
	inst, err := postgres.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := postgres.Kill(context.WithoutCancel(t.Context()), p.Root); err != nil {
			t.Error(err)
		}
	})
	return inst
}

func ask[T any](t *testing.T, i *postgres.Instance, query string, args ...any) T {
	t.Helper()
	conn, err := i.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	rows, err := conn.Query(t.Context(), query, args...)
	if err != nil {
		t.Fatal(err)
	}
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

func TestACopyOfACrashedClusterRecoversBesideItsOriginal(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	c.Start(t)
	inst := start(t, p)
	if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
		t.Errorf("got %d rows, want 1000", got)
	}
	if inst.EndOfRecovery == 0 || inst.FirstQuery == 0 {
		t.Errorf("got %+v, want the end of recovery and the time of the first query", inst)
	}
	for _, link := range []string{"pg_wal", c.running.Tablespaces[0].Link} {
		if got, err := os.Readlink(filepath.Join(p.Data, link)); err != nil || !strings.HasPrefix(got, p.Root+"/") {
			t.Errorf("%s leads to %s (%v), want it below %s", link, got, err, p.Root)
		}
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}
