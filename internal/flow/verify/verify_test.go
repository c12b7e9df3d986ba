package verify_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/flow/verify"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// TestAmcheckIsRunThroughSQLWhereItsProgramIsMissing plants a table that was
// damaged and an index that is older than its table. The installations other
// than 15 have no pg_amcheck, as a host without client programs.
func TestAmcheckIsRunThroughSQLWhereItsProgramIsMissing(t *testing.T) {
	for _, i := range pgtest.Majors(t) {
		if _, err := i.Tool(t.Context(), "pg_amcheck"); err == nil {
			continue // the damage is planted in tests of cmd/cleancut
		}
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			t.Parallel()
			s := pgtest.New(t, pgtest.Options{Major: i.Major, Small: true, Settings: map[string]string{"autovacuum": "off"}})
			// An old version in a schema of its own, as pg_upgrade leaves it.
			s.Exec(t, `CREATE SCHEMA "of amcheck"`, `CREATE EXTENSION amcheck SCHEMA "of amcheck" VERSION '1.0'`,
				"CREATE TABLE stale(x int PRIMARY KEY)", "CREATE TABLE torn AS SELECT generate_series(1, 10) AS x")
			server, index, heap := look(t, s)
			s.Stop(t)
			sound := checks(t, s, server, func(string) {})
			if sound["indexes (amcheck's functions)"].Result != backup.Passed {
				t.Errorf("sound: %+v", sound)
			}
			old, err := os.ReadFile(filepath.Join(s.DataDirectory, index))
			if err != nil {
				t.Fatal(err)
			}
			s.Start(t)
			s.Exec(t, "INSERT INTO stale SELECT generate_series(1, 100)")
			s.Stop(t)
			got := checks(t, s, server, func(data string) {
				if err := os.WriteFile(filepath.Join(data, index), old, 0o600); err != nil {
					t.Fatal(err)
				}
				if i.Major >= 14 {
					breakTuple(t, filepath.Join(data, heap))
				}
			})
			if c := got["indexes (amcheck's functions)"]; c.Result != backup.Failed || !strings.Contains(c.Detail, "stale_pkey") {
				t.Errorf("a stale index: %+v", c)
			}
			for when, c := range map[string]backup.Check{"sound": sound["heap (amcheck's functions)"], "damaged": got["heap (amcheck's functions)"]} {
				want, says := backup.Passed, "tables in 2 databases"
				switch {
				case i.Major < 14:
					want, says = backup.CouldNotRun, "PostgreSQL 13 has no verify_heapam"
				case when == "damaged":
					want, says = backup.Failed, "public.torn: "
				}
				if c.Result != want || !strings.Contains(c.Detail, says) {
					t.Errorf("heap, %s: got %+v, want %s, %q", when, c, want, says)
				}
			}
		})
	}
}

// look inspects the server and finds two files of it.
func look(t *testing.T, s *pgtest.Server) (server backup.Server, index, heap string) {
	t.Helper()
	conn := s.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	r, err := postgres.Inspect(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.QueryRow(t.Context(), "SELECT pg_relation_filepath('public.stale_pkey'), pg_relation_filepath('public.torn')").Scan(&index, &heap); err != nil {
		t.Fatal(err)
	}
	return r.Server, index, heap
}

// checks verifies a copy of the stopped server's files into which something is
// planted.
func checks(t *testing.T, s *pgtest.Server, server backup.Server, plant func(data string)) map[string]backup.Check {
	t.Helper()
	root := pgtest.Folder(t)
	data := filepath.Join(root, "data")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", s.DataDirectory, data).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	plant(data)
	plan := postgres.Plan{Root: root, Data: data, Server: server, Places: []backup.Place{{Kind: backup.PlaceData, Path: s.DataDirectory}},
		Map: func(string) (string, bool) { return "", false }}
	if err := postgres.Prepare(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	inst, err := postgres.Start(t.Context(), postgres.Copy{Root: root, Data: data, Server: server, Installation: s.Installation})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := postgres.Kill(context.WithoutCancel(t.Context()), root); err != nil {
			t.Error(err)
		}
	})
	v, err := verify.Run(t.Context(), verify.Options{Copy: backup.Copy{Root: root, DataDirectory: data}, Manifest: backup.Manifest{Server: server},
		Instance: inst, Installation: s.Installation, Level: backup.LevelFull})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]backup.Check{}
	for _, c := range v.Checks {
		out[c.Name] = c
	}
	return out
}

// breakTuple gives the first row of a table's first page a header longer than
// itself (bufpage.h, htup_details.h).
func breakTuple(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const pageHeader, hoff = 24, 22 // SizeOfPageHeaderData; t_hoff within a tuple
	b[binary.LittleEndian.Uint32(b[pageHeader:])&0x7FFF+hoff] = 200
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
