package flow_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/state"
)

// TestEveryMajorIsBackedUpRestoredAndVerified runs a server of each major
// version on a volume of its own, cuts it while it is frozen, restores the cut
// and verifies the copy. What needs a client program that is not here must say
// that it could not run.
func TestEveryMajorIsBackedUpRestoredAndVerified(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	majors, p, watchdog := pgtest.Majors(t), localPool(t), labtest.Watchdog(t)
	for _, i := range majors {
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			t.Parallel()
			v := backedUpAndVerified(t, p, i, watchdog)
			var notRun []string
			for _, c := range v.Checks {
				switch c.Result {
				case backup.Failed:
					t.Errorf("%s: %s", c.Name, c.Detail)
				case backup.CouldNotRun:
					notRun = append(notRun, c.Name)
				}
			}
			if want := cannotRun(t, i); !slices.Equal(notRun, want) {
				t.Errorf("could not run: %q, want %q", notRun, want)
			}
			t.Logf("NOTE PostgreSQL %d: %d checks, %d could not run: %s", i.Major, len(v.Checks), len(notRun), strings.Join(notRun, ", "))
		})
	}
}

// cannotRun lists the checks of level full that this host cannot do.
func cannotRun(t *testing.T, i postgres.Installation) []string {
	t.Helper()
	var out []string
	if i.Major < 14 {
		out = append(out, "heap (amcheck's functions)")
	}
	if _, err := i.Reader(t.Context()); err != nil {
		out = append(out, "every row read (pg_dumpall)")
	}
	if _, err := i.Tool(t.Context(), "pg_checksums"); err != nil {
		out = append(out, "page checksums (pg_checksums)")
	}
	return out
}

func backedUpAndVerified(t *testing.T, p provider.Provider, i postgres.Installation, watchdog []string) backup.Verdict {
	t.Helper()
	ctx, dir, name := t.Context(), labtest.Folder(t), fmt.Sprint("pg", i.Major)
	o := flow.StorageOptions{Name: name, Host: "lab", Volumes: 1, Size: 512 << 20, Level: "raid0", Chunk: 64 << 10, Filesystem: "xfs",
		Mountpoint: filepath.Join(dir, "pg"), MountOptions: []string{"noatime"}, Fstab: filepath.Join(dir, "fstab"), MdadmConf: filepath.Join(dir, "mdadm.conf")}
	if _, err := flow.CreateStorage(ctx, p, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := flow.DestroyStorage(labtest.Context(t), p, o); err != nil {
			t.Error(err)
		}
	})
	server := pgtest.New(t, pgtest.Options{Major: i.Major, Data: filepath.Join(o.Mountpoint, "data"), Sync: true, Checksums: true, Small: true})
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	f := &flow.Flow{Provider: p, Catalog: catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), name), State: st, Cluster: name, Host: "lab", Tool: "test",
		Watchdog: watchdog, BinDirs: []string{i.Bin}, Log: slog.New(slog.DiscardHandler)}
	server.Exec(t, "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS x", "CREATE INDEX ON kept(x)")
	m, err := f.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: 5 * time.Minute, Quick: time.Minute, Rounds: 5})
	if err != nil {
		t.Fatal(err)
	}
	server.Exec(t, "DELETE FROM kept") // after the cut
	if m.Server.Major() != i.Major || m.Cut.Achieved != backup.Atomic || len(m.Cut.Frozen) != 1 {
		t.Errorf("server %s, cut %+v", m.Server.Version, m.Cut)
	}
	v, err := f.Verify(ctx, flow.VerifyOptions{ID: m.ID, Level: backup.LevelFull, Look: func(ctx context.Context, r flow.Restored) error {
		conn, err := r.Instance.Connect(ctx, "postgres")
		if err != nil {
			return err
		}
		var n int
		err = errors.Join(conn.QueryRow(ctx, "SELECT count(*) FROM public.kept").Scan(&n), conn.Close(ctx))
		if err == nil && (n != 1000 || r.Installation != i) {
			err = fmt.Errorf("%d rows in the copy that %s runs, want 1000", n, r.Installation.Bin)
		}
		return err
	}})
	if err != nil {
		t.Errorf("verify: %v", err)
	}
	return v
}
