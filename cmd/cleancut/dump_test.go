package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
)

// dumpLab is a small cluster with a second database, and a backup of it.
func dumpLab(t *testing.T) (*production, string) {
	t.Helper()
	p := newLab(t, "xfs", 8<<30).cluster(t, pgtest.Options{Small: true})
	p.server.Exec(t, "CREATE DATABASE app TABLESPACE aside", "CREATE UNLOGGED TABLE forgotten AS SELECT generate_series(1, 9) AS a")
	conn := p.server.Connect(t, "app")
	if _, err := conn.Exec(t.Context(), "CREATE TABLE public.t AS SELECT generate_series(1, 500) AS a"); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p, string(p.backup(t))
}

// dumpDone is what dump prints with --json.
type dumpDone struct {
	Name     string              `json:"name"`
	To       string              `json:"to"`
	Manifest backup.DumpManifest `json:"manifest"`
}

func dumpOf(t *testing.T, o outcome) (d dumpDone) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.out), &d); err != nil {
		t.Fatalf("dump --json: %v\n%s", err, o.out)
	}
	return d
}

func checkOf(t *testing.T, o outcome) (k backup.DumpCheck) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.out), &k); err != nil {
		t.Fatalf("dump check --json: %v\n%s", err, o.out)
	}
	return k
}

func TestADumpIsStoredShownAndChecked(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p, id := dumpLab(t)
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	identity := filepath.Join(p.dir, "key.txt")
	if err := os.WriteFile(identity, []byte(key.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(p.catalog, "clusters", "main", "backups", id, "dumps")
	t.Run("per-database, encrypted, in the catalog", func(t *testing.T) {
		d := dumpOf(t, p.must(t, "dump", id, "--json", "--format", "per-database", "--jobs", "2", "--recipient", key.Recipient().String()))
		if d.Manifest.Held() != "3 of 3 databases" || d.Manifest.Backup != backup.ID(id) {
			t.Errorf("%+v", d.Manifest)
		}
		p.clean(t)
		k := checkOf(t, p.must(t, "dump", "check", id, "--json", "--identity", identity, "--jobs", "2"))
		if k.Dump != d.Name || k.Result() != backup.Passed || k.Server != 15 || k.Tables != 4 || k.Rows != 2500 {
			t.Errorf("%+v", k)
		}
		p.clean(t)
		p.run(t, "dump", "check", id).refused(t, 1, "could not run", "no identity opens it")
		o := p.must(t, "show", id)
		for _, words := range []string{"dump " + d.Name, "per-database, 3 of 3 databases, encrypted", "passed", "could not run"} {
			if !strings.Contains(o.out, words) {
				t.Errorf("show does not say %q:\n%s", words, o.out)
			}
		}
		if o := p.must(t, "list"); !strings.Contains(o.out, "1 3 of 3 databases") {
			t.Errorf("list:\n%s", o.out)
		}
		part := filepath.Join(folder, d.Name, "app.custom.zst.age")
		b, err := os.ReadFile(part)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(part, b, 0o600); err != nil {
			t.Fatal(err)
		}
		p.run(t, "dump", "check", id, d.Name, "--identity", identity).refused(t, 4, "damage", "cleancut: ")
		if o := p.run(t, "dump", "check", id, "--json"); o.code != 4 || !strings.Contains(checkOf(t, o).Checks[0].Detail, "part app.custom.zst.age") {
			t.Errorf("exit %d\n%s", o.code, o.out)
		}
		if err := os.RemoveAll(filepath.Join(folder, d.Name)); err != nil {
			t.Fatal(err)
		}
		p.clean(t)
	})
	t.Run("files and folders", func(t *testing.T) {
		file, dir, room := filepath.Join(p.dir, "all.zst"), filepath.Join(p.dir, "each"), labtest.Folder(t)
		p.must(t, "dump", id, "--to", file)
		p.must(t, "dump", id, "--to", dir, "--archive", "directory", "--jobs", "2", "--spool", room)
		for _, path := range []string{file, dir} {
			k := checkOf(t, p.must(t, "dump", "check", "--json", "--file", path, "--folder", room, "--jobs", "2"))
			if k.Result() != backup.Passed || k.Rows != 2500 {
				t.Errorf("%s: %+v", path, k)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(room, "*")); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		p.run(t, "dump", id, "--to", dir).refused(t, 2, dir, "exists already")
		p.clean(t)
	})
	t.Run("into a newer major", func(t *testing.T) {
		p.must(t, "dump", id)
		k := checkOf(t, p.must(t, "dump", "check", "--json", id, "--server-bin", pgtest.Installation(t, 18).Bin))
		if k.Result() != backup.Passed || k.Server != 18 || k.Rows != 2500 {
			t.Errorf("%+v", k)
		}
		p.run(t, "dump", "check", id, "--server-bin", pgtest.Installation(t, 14).Bin).refused(t, 1, "no PostgreSQL 15 or newer")
	})
	t.Run("wrong requests make nothing", func(t *testing.T) {
		p.run(t, "dump", id, "--database", "nobody").refused(t, 2, `no database "nobody"`, "it has template1, app, postgres")
		p.run(t, "dump", id, "--schema", "nowhere").refused(t, 2, "no schema nowhere")
		p.run(t, "dump", "check", id, "20200101T000000Z").refused(t, 1, "not found", "cleancut show")
		p.run(t, "dump", "check", "--file", filepath.Join(p.dir, "none")).refused(t, 2, "none")
		p.clean(t)
	})
}

// TestADumpThatLacksADatabaseSaysSo breaks a database on production.
func TestADumpThatLacksADatabaseSaysSo(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p, _ := dumpLab(t)
	conn := p.server.Connect(t, "app")
	for _, q := range []string{"CREATE SCHEMA lost", "CREATE TABLE lost.t (a int)", "DELETE FROM pg_namespace WHERE nspname = 'lost'"} {
		if _, err := conn.Exec(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	id := string(p.backup(t))
	o := p.run(t, "dump", id, "--format", "per-database")
	o.refused(t, 1, "2 of 3 databases", "app", "does not exist")
	if !strings.Contains(o.out, "database app FAILED") {
		t.Errorf("%s", o.out)
	}
	if o := p.must(t, "list"); !strings.Contains(o.out, "2 of 3 databases") {
		t.Errorf("list:\n%s", o.out)
	}
	if o := p.run(t, "dump", "check", id); o.code != 4 || !strings.Contains(o.out, "the dump does not hold it") {
		t.Errorf("exit %d\n%s%s", o.code, o.out, o.err)
	}
	p.clean(t)
}

func TestADumpAndItsCheckStoppedAnywhereLeaveNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p, id := dumpLab(t)
	dumps := filepath.Join(p.catalog, "clusters", "main", "backups", id, "dumps")
	forget := func(t *testing.T, _ outcome) {
		t.Helper()
		if err := os.RemoveAll(dumps); err != nil {
			t.Fatal(err)
		}
	}
	of := []string{"dump.part", "catalog.put dump", "catalog.get dump"}
	t.Run("dump", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{of: of, always: true, removes: forget, args: func(*testing.T) []string { return []string{"dump", id, "--format", "per-database"} }})
	})
	t.Run("directory", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{of: []string{"dump.part"}, killsOnce: true, always: true, removes: forget, args: func(*testing.T) []string { return []string{"dump", id, "--archive", "directory", "--jobs", "2"} }})
	})
	d := dumpOf(t, p.must(t, "dump", id, "--json"))
	t.Run("check", func(t *testing.T) {
		none := func(*testing.T, outcome) {}
		p.underFaults(t, flowUnderFault{of: append(of, "postgres.initdb", "postgres.start", "dump.check"), always: true, removes: none, args: func(*testing.T) []string { return []string{"dump", "check", id} }})
	})
	if k := checkOf(t, p.must(t, "dump", "check", "--json", id)); k.Dump != d.Name || k.Result() != backup.Passed {
		t.Errorf("%+v", k)
	}
	p.clean(t)
}
