package dump_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"cleancut/internal/backup"
	"cleancut/internal/flow/dump"
	"cleancut/internal/postgres/pgtest"
)

// small fills a server with two databases.
func small(t testing.TB, settings map[string]string) *pgtest.Server {
	t.Helper()
	s := pgtest.New(t, pgtest.Options{Settings: settings})
	s.Exec(t, "CREATE DATABASE app", "CREATE DATABASE broken", "CREATE TABLE t (a int, b text)", "INSERT INTO t SELECT g, repeat('x', g) FROM generate_series(1, 100) g", "CREATE SEQUENCE s", "SELECT nextval('s')", "CREATE SCHEMA other", "CREATE TABLE other.u AS SELECT 1 AS a")
	exec(t, s, "app", "CREATE TABLE public.t (a int)", "INSERT INTO public.t VALUES (1), (2), (3)", "CREATE SCHEMA app_a", "CREATE TABLE app_a.x AS SELECT 1 AS a", "CREATE SCHEMA app_b", "CREATE TABLE app_b.x AS SELECT 2 AS a")
	return s
}

func exec(t testing.TB, s *pgtest.Server, database string, statements ...string) {
	t.Helper()
	conn, err := instance(s).Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	for _, q := range statements {
		if _, err := conn.Exec(t.Context(), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
}

func formats() []dump.Options {
	return []dump.Options{
		{Format: backup.DumpSQL},
		{Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom, Jobs: 2},
		{Format: backup.DumpPerDatabase, Archive: backup.ArchiveDirectory, Jobs: 2},
	}
}

// TestRowsAreCountedInTheDumpItself: no table is read a second time, but one
// that seems to come twice.
func TestRowsAreCountedInTheDumpItself(t *testing.T) {
	s := small(t, map[string]string{"log_statement": "all"})
	exec(t, s, "app", "CREATE FUNCTION public.trap() RETURNS text LANGUAGE sql AS $$ SELECT '\n-- Data for Name: t; Type: TABLE DATA\nCOPY public.t (a) FROM stdin;\n7\n\\.\n' $$")
	read := 0
	for i, o := range formats() {
		m, _ := dumped(t, s, o)
		if _, rows := m.Rows(); rows != 106 {
			t.Errorf("%s %s: %d rows, want 106", o.Format, o.Archive, rows)
		}
		log, err := os.ReadFile(s.Log())
		if err != nil {
			t.Fatal(err)
		}
		now := bytes.Count(log, []byte(" TO STDOUT"))
		if want := []int{1, 0, 0}[i]; now-read != want {
			t.Errorf("%s %s: %d tables were read again, want %d", o.Format, o.Archive, now-read, want)
		}
		read = now
	}
}

func TestADumpThatIsNotWhatWasStoredIsFound(t *testing.T) {
	s := small(t, nil)
	for _, o := range formats() {
		m, p := dumped(t, s, o)
		inst := pgtest.Installation(t, 15)
		for _, c := range []struct {
			name  string
			plant func(m *backup.DumpManifest)
			words string
		}{
			{"rows lost", func(m *backup.DumpManifest) { table(m, "app", "t").Rows = 4 }, "public.t has 3 rows, the dump had 4"},
			{"a row changed", func(m *backup.DumpManifest) { table(m, "postgres", "t").Hash = "0123456789abcdef" }, "as many rows as the dump, 100, but other ones"},
			{"a table lost", func(m *backup.DumpManifest) { table(m, "app", "t").Name = "gone" }, `"public.gone" does not exist`},
			{"a sequence behind", func(m *backup.DumpManifest) { n := int64(9); database(m, "postgres").Sequences[0].Last = &n }, "sequence public.s is at 1, in the dump at 9"},
			{"a large object lost", func(m *backup.DumpManifest) { database(m, "app").LargeObjects = 1 }, "0 large objects, the dump had 1"},
			{"an extension that is not here", func(m *backup.DumpManifest) {
				database(m, "app").Extensions = append(database(m, "app").Extensions, backup.DumpedExtension{Name: "timescaledb", Version: "1"})
			}, "this host has no extension timescaledb"},
			{"a view not filled", func(m *backup.DumpManifest) { database(m, "app").MaterializedViews = []string{"public.v"} }, "public.v is missing or not populated"},
		} {
			if o.Archive == backup.ArchiveDirectory && c.name != "a row changed" {
				continue // what is compared does not depend on the archive
			}
			t.Run(fmt.Sprint(o.Format, " ", o.Archive, " ", c.name), func(t *testing.T) {
				b, err := backup.EncodeDumpManifest(m)
				if err != nil {
					t.Fatal(err)
				}
				other, err := backup.DecodeDumpManifest(b)
				if err != nil {
					t.Fatal(err)
				}
				c.plant(&other)
				k := checked(t, other, p, inst, 2)
				want := backup.Failed
				if strings.Contains(c.name, "not here") {
					want = backup.CouldNotRun
				}
				if k.Result() != want || !strings.Contains(said(k), c.words) {
					t.Errorf("%s, want %s with %q\n%s", k.Result(), want, c.words, said(k))
				}
			})
		}
	}
}

func database(m *backup.DumpManifest, name string) *backup.DumpedDatabase {
	i := slices.IndexFunc(m.Databases, func(d backup.DumpedDatabase) bool { return d.Name == name })
	return &m.Databases[i]
}

func table(m *backup.DumpManifest, db, name string) *backup.DumpedTable {
	d := database(m, db)
	i := slices.IndexFunc(d.Tables, func(t backup.DumpedTable) bool { return t.Name == name })
	return &d.Tables[i]
}

func TestADatabaseThatCannotBeDumpedDoesNotKeepTheOthers(t *testing.T) {
	s := small(t, nil)
	exec(t, s, "broken", "CREATE SCHEMA lost", "CREATE TABLE lost.t (a int)", "DELETE FROM pg_namespace WHERE nspname = 'lost'")
	for _, o := range formats() {
		if o.Format == backup.DumpSQL {
			o.Instance, o.Put, o.Level = instance(s), (&parts{}).put, 1
			if _, err := dump.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "pg_dumpall") {
				t.Errorf("sql: %v", err)
			}
			continue
		}
		m, p := dumped(t, s, o)
		failed := m.Failed()
		if len(failed) != 1 || failed[0].Name != "broken" || !strings.Contains(failed[0].Error, "does not exist") || m.Held() != "3 of 4 databases" {
			t.Errorf("%+v", failed)
		}
		for name := range p.all {
			if strings.HasPrefix(name, "broken") {
				t.Errorf("part %s is stored", name)
			}
		}
		k := checked(t, m, p, pgtest.Installation(t, 15), 2)
		if k.Result() != backup.Failed || !strings.Contains(said(k), "database broken failed: the dump does not hold it") || strings.Count(said(k), "\n") > 0 {
			t.Errorf("%s\n%s", k.Result(), said(k))
		}
	}
}

func TestChosenDatabasesAndSchemas(t *testing.T) {
	s := small(t, nil)
	names := func(m backup.DumpManifest) (out []string) {
		for _, d := range m.Databases {
			for _, t := range d.Tables {
				out = append(out, d.Name+"."+t.Schema+"."+t.Name)
			}
		}
		return out
	}
	m, p := dumped(t, s, dump.Options{Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom, Databases: []string{"a*"}, Schemas: []string{"app_?", "other"}})
	if got := names(m); !slices.Equal(got, []string{"app.app_a.x", "app.app_b.x"}) || !strings.Contains(strings.Join(m.NotHeld, "\n"), "all but the schemas app_a, app_b") {
		t.Errorf("%q, not held %q", got, m.NotHeld)
	}
	if k := checked(t, m, p, pgtest.Installation(t, 15), 1); k.Result() != backup.Passed || k.Tables != 2 {
		t.Errorf("%s, %d tables\n%s", k.Result(), k.Tables, said(k))
	}
	for _, o := range []dump.Options{{Databases: []string{"app", "nobody"}}, {Schemas: []string{"nowhere"}}} {
		o.Format, o.Archive, o.Instance, o.Level = backup.DumpPerDatabase, backup.ArchiveCustom, instance(s), 1
		o.Put = func(context.Context, string, io.Reader) error { t.Error("something was stored"); return nil }
		_, err := dump.Run(t.Context(), o)
		if !errors.Is(err, backup.ErrUsage) || len(o.Databases) > 0 && backup.HintOf(err) != "it has template1, app, broken, postgres" {
			t.Errorf("%v (%s)", err, backup.HintOf(err))
		}
	}
}

func TestAnEncryptedDumpOpensWithItsIdentityOnly(t *testing.T) {
	s := small(t, nil)
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "recipients")
	if err := os.WriteFile(file, []byte("# two\n"+key.Recipient().String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	recipients, text, err := dump.ParseRecipients(nil, []string{file})
	if err != nil || !slices.Equal(text, []string{key.Recipient().String()}) {
		t.Fatal(text, err)
	}
	m, p := dumped(t, s, dump.Options{Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom, Recipients: recipients})
	for _, part := range m.Parts {
		if !strings.HasSuffix(part.Name, ".zst.age") || !bytes.HasPrefix(p.all[part.Name], []byte("age-encryption.org/v1\n")) {
			t.Errorf("part %s is not encrypted", part.Name)
		}
		if err := dump.Unpack(bytes.NewReader(p.all[part.Name]), part, []age.Identity{key}, io.Discard); err != nil {
			t.Error(err)
		}
		for n := 0; n < len(p.all[part.Name]); n += 1 + len(p.all[part.Name])/40 {
			b := bytes.Clone(p.all[part.Name])
			b[n] ^= 1
			if err := dump.Unpack(bytes.NewReader(b), part, []age.Identity{key}, io.Discard); err == nil {
				t.Errorf("part %s: byte %d was changed, and nobody notices", part.Name, n)
			}
		}
	}
	if k := checked(t, m, p, pgtest.Installation(t, 15), 1, key); k.Result() != backup.Passed {
		t.Errorf("%s\n%s", k.Result(), said(k))
	}
	if k := checked(t, m, p, pgtest.Installation(t, 15), 1, other); k.Result() != backup.CouldNotRun || !strings.Contains(said(k), "no identity opens it") {
		t.Errorf("%s\n%s", k.Result(), said(k))
	}
}

func TestChangedBytesAreDamageAndALostStoreIsNot(t *testing.T) {
	s := small(t, nil)
	m, p := dumped(t, s, dump.Options{Format: backup.DumpSQL})
	part := m.Parts[0]
	b := p.all[part.Name]
	for name, b := range map[string][]byte{"cut short": b[:len(b)-1], "longer": append(bytes.Clone(b), 0), "a frame more": append(bytes.Clone(b), b...), "empty": nil} {
		stored := &parts{all: map[string][]byte{part.Name: b}}
		if err := dump.CheckStored(t.Context(), part, stored.open); !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%s: %v", name, err)
		}
		if err := dump.Unpack(bytes.NewReader(b), part, nil, io.Discard); !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%s: unpack: %v", name, err)
		}
	}
	away := errors.New("the store is away")
	if err := dump.Unpack(io.MultiReader(bytes.NewReader(b[:len(b)/2]), failing{away}), part, nil, io.Discard); !errors.Is(err, away) || errors.Is(err, backup.ErrDamage) {
		t.Errorf("a store that fails: %v", err)
	}
	if err := dump.CheckStored(t.Context(), part, (&parts{}).open); !errors.Is(err, backup.ErrDamage) {
		t.Errorf("a part that is missing: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
