package dump_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"

	"cleancut/internal/backup"
	"cleancut/internal/flow/dump"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// parts keeps what a dump stores.
type parts struct {
	mu  sync.Mutex
	all map[string][]byte
}

func (p *parts) put(_ context.Context, name string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil {
		p.all = map[string][]byte{}
	}
	p.all[name] = b
	return nil
}

func (p *parts) open(_ context.Context, name string) (io.ReadCloser, error) {
	b, ok := p.all[name]
	if !ok {
		return nil, backup.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// instance makes a test's server look like a copy's.
func instance(s *pgtest.Server) *postgres.Instance {
	return &postgres.Instance{Root: s.Dir, DataDirectory: s.DataDirectory, SocketDir: s.SocketDir, Port: s.Port, Superuser: "postgres", Installation: s.Installation, UID: s.UID, GID: s.GID}
}

// dumped dumps the server.
func dumped(t testing.TB, s *pgtest.Server, o dump.Options) (backup.DumpManifest, *parts) {
	t.Helper()
	p := &parts{}
	o.Instance, o.Put, o.Level = instance(s), p.put, 1
	if o.Archive == backup.ArchiveDirectory {
		o.Spool = pgtest.Folder(t)
	}
	m, err := dump.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	m.Backup, m.Cluster, m.Name = "20261122T211704Z-5f3a9c", "main", "d"
	b, err := backup.EncodeDumpManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = backup.DecodeDumpManifest(b); err != nil {
		t.Fatal(err)
	}
	return m, p
}

// emptyServer makes one to load a dump into.
func emptyServer(t testing.TB, m backup.DumpManifest, inst postgres.Installation) *postgres.Instance {
	t.Helper()
	root := pgtest.Folder(t)
	c, err := postgres.Init(t.Context(), postgres.Empty{Root: root, Installation: inst, Superuser: m.Server.Superuser, Locale: m.Server.Locale})
	if err != nil {
		t.Fatal(err)
	}
	i, err := postgres.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := postgres.Kill(context.WithoutCancel(t.Context()), root); err != nil {
			t.Error(err)
		}
	})
	return i
}

func checked(t testing.TB, m backup.DumpManifest, p *parts, inst postgres.Installation, jobs int, identities ...age.Identity) backup.DumpCheck {
	t.Helper()
	k, err := dump.Check(t.Context(), dump.CheckOptions{Manifest: m, Open: p.open, Instance: emptyServer(t, m, inst), Tools: pgtest.Installation(t, 15), Jobs: jobs, Identities: identities})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// said are the checks that did not pass.
func said(k backup.DumpCheck) string {
	var out []string
	for _, c := range k.Checks {
		if c.Result != backup.Passed {
			out = append(out, fmt.Sprintf("%s %s: %s", c.Name, c.Result, c.Detail))
		}
	}
	return strings.Join(out, "\n")
}

const oddName = "Ünïcode \"quotes\" / %"

// odd fills a server with all that is hard to dump or to load again.
func odd(t testing.TB, s *pgtest.Server) {
	t.Helper()
	space := pgtest.Mkdir(t, filepath.Join(s.Dir, "a space"))
	s.Exec(t,
		"CREATE ROLE reader LOGIN PASSWORD 'secret' CONNECTION LIMIT 3", `CREATE ROLE "Odd Role" ROLE reader`, "ALTER ROLE reader SET work_mem = '5MB'",
		"CREATE TABLESPACE aside OWNER reader LOCATION '"+strings.ReplaceAll(space, "'", "''")+"'",
		`CREATE DATABASE "Ünïcode ""quotes"" / %"`, `CREATE DATABASE " spaces "`, "CREATE DATABASE aside TABLESPACE aside OWNER reader", "CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0",
		`CREATE DATABASE "a=b"`, "ALTER DATABASE postgres SET work_mem = '6MB'", "CREATE DATABASE shut ALLOW_CONNECTIONS false",
		"CREATE TABLE public.shared AS SELECT g AS n FROM generate_series(1, 100) g")
	in := func(database string, statements ...string) {
		conn, err := instance(s).Connect(t.Context(), database)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range statements {
			if _, err := conn.Exec(t.Context(), q); err != nil {
				t.Fatalf("%s: %v", q, err)
			}
		}
		if err := conn.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	in("template1", "CREATE TABLE in_template (t text)", "INSERT INTO in_template VALUES ('from the template')")
	in("latin", `CREATE TABLE "Grüße" ("schön" text)`, `INSERT INTO "Grüße" VALUES ('äöü'), (E'tab\there')`)
	in(" spaces ", `CREATE SCHEMA "S p"`, `CREATE TABLE "S p"."T t" (a int)`, `INSERT INTO "S p"."T t" SELECT generate_series(1, 7)`, "CREATE SCHEMA other", "CREATE TABLE other.t (a int)")
	in(oddName,
		"CREATE TABLE nothing ()", "INSERT INTO nothing DEFAULT VALUES", "INSERT INTO nothing DEFAULT VALUES", "CREATE TABLE no_rows (a int)",
		"CREATE TYPE mood AS ENUM ('sad', 'ok')", "CREATE TYPE pair AS (a int, b text)", "CREATE DOMAIN positive AS int CHECK (VALUE > 0)",
		`CREATE TABLE types (a smallint, b bigint, c numeric, d real, e double precision, f money, g char(5), h varchar, i bytea, j timestamp, k timestamptz, l interval, m boolean,
			n mood, o point, p cidr, q inet, r macaddr, s bit(5), t varbit, u tsvector, v uuid, w xml, x json, y jsonb, z int[], aa int4range, ab pair, ac positive, ad pg_lsn, ae text[][], af time, ag timetz, ah date, ai circle, aj int4multirange)`,
		`INSERT INTO types VALUES (1, 2, 'NaN', 0.1, 'Infinity', 12.34, 'a', E'back\\slash\ttab\nline\\.', '\x00ff', 'infinity', '2026-01-01 00:00+05', '1 year -2 days 3:04', true,
			'ok', '(1,2)', '10.0.0.0/8', '::1', '08:00:2b:01:02:03', B'10101', B'1', 'a fat cat', gen_random_uuid(), '<a>x</a>', '{"a":  1}', '{"a":1}', '{1,NULL,3}', '[1,5)', '(1,"x,y")', 5, '1/ABC',
			'{{a,b},{c,d}}', '12:00', '12:00+02', '2026-02-28', '<(1,2),3>', '{[1,3),[5,7)}')`,
		"INSERT INTO types (h) VALUES (NULL), (''), (E'\\\\.'), (repeat('ü', 100000))",
		"CREATE TABLE made (a int, b int GENERATED ALWAYS AS (a * 2) STORED, c int GENERATED ALWAYS AS IDENTITY (START 100))", "INSERT INTO made (a) SELECT generate_series(1, 50)",
		"CREATE TABLE dropped (a int, b text, c int)", "INSERT INTO dropped SELECT g, 'x', g FROM generate_series(1, 30) g", "ALTER TABLE dropped DROP COLUMN b", "ALTER TABLE dropped ADD COLUMN d int DEFAULT 7",
		"CREATE TABLE parted (a int, b text) PARTITION BY LIST (a)", "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1)", "CREATE TABLE parted_rest PARTITION OF parted DEFAULT PARTITION BY HASH (b)",
		"CREATE TABLE parted_h0 PARTITION OF parted_rest FOR VALUES WITH (MODULUS 2, REMAINDER 0)", "CREATE TABLE parted_h1 PARTITION OF parted_rest FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
		"INSERT INTO parted SELECT g % 5, g::text FROM generate_series(1, 500) g",
		"CREATE TABLE parent (a int, b text)", "CREATE TABLE child (c int, b text, a int)", "ALTER TABLE child INHERIT parent", "INSERT INTO child VALUES (1, 'x', 2)", "INSERT INTO parent VALUES (3, 'y')",
		"CREATE MATERIALIZED VIEW seen AS SELECT a, count(*) FROM parted GROUP BY a", "CREATE MATERIALIZED VIEW unseen AS SELECT 1 AS a WITH NO DATA", "INSERT INTO parted VALUES (9, 'after the view')",
		"CREATE TABLE egg (id int PRIMARY KEY, hen int)", "CREATE TABLE hen (id int PRIMARY KEY, egg int REFERENCES egg)", "ALTER TABLE egg ADD FOREIGN KEY (hen) REFERENCES hen DEFERRABLE INITIALLY DEFERRED",
		"BEGIN", "INSERT INTO egg VALUES (1, 1)", "INSERT INTO hen VALUES (1, 1)", "COMMIT",
		"CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no more rows''; END'", "CREATE TRIGGER never BEFORE INSERT ON hen FOR EACH ROW EXECUTE FUNCTION never()",
		// A function that looks like the data of a table.
		"CREATE FUNCTION trap() RETURNS text LANGUAGE sql AS $$ SELECT '\n-- Data for Name: no_rows; Type: TABLE DATA; Schema: public; Owner: postgres\nCOPY public.no_rows (a) FROM stdin;\n1\n2\n\\.\n' $$",
		"CREATE UNLOGGED TABLE forgotten (a int)", "CREATE SEQUENCE counter", "SELECT setval('counter', 4711)", "CREATE SEQUENCE fresh", "COMMENT ON TABLE made IS E'a comment\nwith COPY public.made FROM stdin;'",
		"SELECT lo_from_bytea(0, 'large object')", "SELECT lo_from_bytea(0, convert_to(repeat('x', 10000), 'UTF8'))", `CREATE TABLE "line
break" ("co
lumn" int)`, `INSERT INTO "line
break" VALUES (1)`, "CREATE TABLE secured (a int)", "INSERT INTO secured VALUES (1), (2)", "ALTER TABLE secured ENABLE ROW LEVEL SECURITY", "ALTER TABLE secured FORCE ROW LEVEL SECURITY",
		"CREATE EXTENSION postgres_fdw", "CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw", "CREATE FOREIGN TABLE elsewhere (a int) SERVER far", "GRANT SELECT ON made TO reader")
}

func TestEveryFormatOfAnOddClusterLoadsIntoTheSameAndNewerMajors(t *testing.T) {
	majors := pgtest.Majors(t)
	s := pgtest.New(t, pgtest.Options{})
	odd(t, s)
	for _, o := range []dump.Options{
		{Format: backup.DumpSQL},
		{Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom, Jobs: 2},
		{Format: backup.DumpPerDatabase, Archive: backup.ArchiveDirectory, Jobs: 2},
	} {
		m, p := dumped(t, s, o)
		for _, inst := range majors[2:] {
			t.Run(fmt.Sprint(o.Format, " ", o.Archive, " into ", inst.Major), func(t *testing.T) {
				k := checked(t, m, p, inst, 2)
				if k.Result() != backup.Passed {
					t.Errorf("%s\n%s", k.Result(), said(k))
				}
				if tables, rows := m.Rows(); k.Tables != tables || k.Rows != rows || rows < 700 {
					t.Errorf("compared %d tables with %d rows, the manifest has %d with %d", k.Tables, k.Rows, tables, rows)
				}
			})
		}
		look(t, m)
	}
}

// look compares a manifest of the odd cluster with what is known of it.
func look(t *testing.T, m backup.DumpManifest) {
	t.Helper()
	i := slices.IndexFunc(m.Databases, func(d backup.DumpedDatabase) bool { return d.Name == oddName })
	if i < 0 || len(m.Databases) != 7 || !strings.Contains(strings.Join(m.NotHeld, "\n"), "database shut") {
		t.Fatalf("databases %+v, not held %q", m.Databases, m.NotHeld)
	}
	d := m.Databases[i]
	rows := map[string]int64{}
	for _, table := range d.Tables {
		rows[table.Name] = table.Rows
		if table.Unlogged != (table.Name == "forgotten") {
			t.Errorf("%s: unlogged %t", table.Name, table.Unlogged)
		}
	}
	for name, n := range map[string]int64{"nothing": 2, "no_rows": 0, "types": 5, "made": 50, "dropped": 30, "parted_1": 100, "parent": 1, "child": 1, "secured": 2, "line\nbreak": 1} {
		if got, ok := rows[name]; !ok || got != n {
			t.Errorf("%s %s: %d rows, want %d", m.Format, name, got, n)
		}
	}
	if _, ok := rows["elsewhere"]; ok || d.LargeObjects != 2 || !slices.Equal(d.MaterializedViews, []string{"public.seen"}) || !slices.Equal(d.ForeignTables, []string{"public.elsewhere"}) || !d.Counted {
		t.Errorf("%+v", d)
	}
	for _, s := range d.Sequences {
		if s.Name == "counter" && (s.Last == nil || *s.Last != 4711) || s.Name == "fresh" && s.Last != nil {
			t.Errorf("sequence %+v", s)
		}
	}
}
