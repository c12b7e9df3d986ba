package dump

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
)

// table is one whose rows a dump holds.
type table struct {
	backup.DumpedTable
	oid  uint32
	copy []byte // COPY and the table, in the encoding of the database
	seen int    // how often its rows came by
	rows int64
	hash string
}

// database is what the copy says of one of its databases.
type database struct {
	backup.DumpedDatabase
	size       backup.Bytes
	tables     []*table
	statements map[string]*table
	oids       map[uint32]*table
	schemas    []string // chosen; nil: all
	notHeld    []string
}

// heading is what pg_dumpall writes above a database.
func (d *database) heading() []byte {
	name := strings.NewReplacer("\n", " ", "\r", " ").Replace(d.Name)
	return []byte("-- Database \"" + name + "\" dump\n")
}

// record returns what the manifest has of the database.
func (d *database) record() backup.DumpedDatabase {
	out := d.DumpedDatabase
	out.Tables = []backup.DumpedTable{}
	for _, t := range d.tables {
		t.Rows, t.Hash = t.rows, t.hash
		out.Tables = append(out.Tables, t.DumpedTable)
	}
	return out
}

// look connects to a database for reading, with settings by which names and
// values come as pg_dump writes them.
func look(ctx context.Context, i *postgres.Instance, name string) (*pgx.Conn, error) {
	conn, err := i.Connect(ctx, name)
	if err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, `SET search_path = ''; SET quote_all_identifiers = off; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres';
		SET extra_float_digits = 3; SET bytea_output = 'hex'; SET synchronize_seqscans = off; SET row_security = off; SET statement_timeout = 0;
		SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET xmloption = 'content'; SET default_transaction_read_only = off`)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", name, err), conn.Close(ctx))
	}
	return conn, nil
}

// server asks what an empty server must be like.
func server(ctx context.Context, conn *pgx.Conn) (s backup.DumpServer, err error) {
	err = conn.QueryRow(ctx, `SELECT current_setting('server_version'), current_setting('server_version_num')::int, current_setting('shared_preload_libraries'),
		(SELECT rolname FROM pg_roles WHERE oid = 10)`).Scan(&s.Version, &s.VersionNum, &s.Preload, &s.Superuser)
	if err != nil {
		return s, err
	}
	query := `SELECT pg_encoding_to_char(encoding), 'libc', datcollate, datctype, '' FROM pg_database WHERE datname = 'template0'`
	if s.Major() >= 15 {
		name := "daticulocale"
		if s.Major() >= 17 {
			name = "datlocale"
		}
		query = `SELECT pg_encoding_to_char(encoding), CASE datlocprovider WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END, datcollate, datctype, coalesce(` + name + `, '')
			FROM pg_database WHERE datname = 'template0'`
	}
	l := &s.Locale
	return s, conn.QueryRow(ctx, query).Scan(&l.Encoding, &l.Provider, &l.Collate, &l.Ctype, &l.Name)
}

// choose lists the databases to dump in pg_dumpall's order, and what is not
// among them. An unknown one is backup.ErrUsage.
func choose(ctx context.Context, conn *pgx.Conn, major int, wanted []string) (out []*database, notHeld []string, err error) {
	version := "''"
	if major >= 15 {
		version = "coalesce(datcollversion, '')"
	}
	rows, err := conn.Query(ctx, `SELECT datname, datallowconn AND datconnlimit <> -2, pg_encoding_to_char(encoding), `+version+`, pg_database_size(oid)
		FROM pg_database WHERE datname <> 'template0' ORDER BY (datname <> 'template1'), datname`)
	if err != nil {
		return nil, nil, err
	}
	var names []string
	found := map[string]bool{}
	var d database
	var open bool
	_, err = pgx.ForEachRow(rows, []any{&d.Name, &open, &d.Encoding, &d.CollationVersion, &d.size}, func() error {
		names = append(names, d.Name)
		chosen := len(wanted) == 0
		for _, w := range wanted {
			if match(w, d.Name) {
				chosen, found[w] = true, true
			}
		}
		switch {
		case chosen && !open:
			notHeld = append(notHeld, fmt.Sprintf("database %s: it allows no connections, so pg_dump cannot read it", d.Name))
		case chosen:
			one := d
			out = append(out, &one)
		}
		return nil
	})
	for _, w := range wanted {
		if err == nil && !found[w] {
			err = backup.Hint(fmt.Errorf("%w: no database %q in this backup", backup.ErrUsage, w), "it has "+strings.Join(names, ", "))
		}
	}
	if err == nil && len(out) == 0 {
		err = fmt.Errorf("%w: no database can be dumped", backup.ErrUsage)
	}
	return out, notHeld, err
}

// match compares a name with what was asked for: the name itself, or a glob.
func match(pattern, name string) bool {
	ok, err := path.Match(pattern, name)
	return pattern == name || ok && err == nil
}

// inspect fills in what the copy says of a database. wanted are schemas; of
// those that are there d.schemas are chosen.
func (d *database) inspect(ctx context.Context, i *postgres.Instance, wanted []string) error {
	conn, err := look(ctx, i, d.Name)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if len(wanted) > 0 {
		rows, err := conn.Query(ctx, `SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1`)
		if err != nil {
			return err
		}
		all, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		d.schemas = slices.DeleteFunc(all, func(s string) bool { return !slices.ContainsFunc(wanted, func(w string) bool { return match(w, s) }) })
		if len(d.schemas) == 0 {
			return nil
		}
	}
	if err := d.listTables(ctx, conn); err != nil {
		return fmt.Errorf("database %s: %w", d.Name, err)
	}
	if d.DumpedDatabase, err = state(ctx, conn, d.DumpedDatabase, d.schemas); err != nil {
		return fmt.Errorf("database %s: %w", d.Name, err)
	}
	for _, t := range d.ForeignTables {
		d.notHeld = append(d.notHeld, fmt.Sprintf("rows of foreign table %s in database %s: they lie on another server", t, d.Name))
	}
	if len(d.schemas) > 0 {
		d.notHeld = append(d.notHeld, fmt.Sprintf("of database %s all but the schemas %s: no other schema, no extension, no large object", d.Name, strings.Join(d.schemas, ", ")))
	}
	return nil
}

// listTables lists the tables whose rows pg_dump writes, with the COPY statement
// that it makes for each (dumpTableData_copy, fmtCopyColumnList of pg_dump.c):
// plain tables, also those that are partitions; none of an extension, of which
// pg_dump writes only what the extension names.
func (d *database) listTables(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `SELECT c.oid, n.nspname, c.relname, c.relpersistence = 'u', coalesce(a.names, '{}'),
			convert_to('COPY ' || quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ' ' || coalesce(a.list, ''), getdatabaseencoding())
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN LATERAL (SELECT array_agg(attname::text ORDER BY attnum) AS names, '(' || string_agg(quote_ident(attname), ', ' ORDER BY attnum) || ')' AS list
			FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '') a ON true
		WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND ($1::text[] IS NULL OR n.nspname = ANY($1))
			AND NOT EXISTS (SELECT FROM pg_depend WHERE deptype = 'e' AND classid = 'pg_class'::regclass AND objid = c.oid)
			AND NOT EXISTS (SELECT FROM pg_depend WHERE deptype = 'e' AND classid = 'pg_namespace'::regclass AND objid = n.oid)
		ORDER BY 2, 3`, d.schemas)
	if err != nil {
		return err
	}
	d.statements, d.oids = map[string]*table{}, map[uint32]*table{}
	var t table
	_, err = pgx.ForEachRow(rows, []any{&t.oid, &t.Schema, &t.Name, &t.Unlogged, &t.Columns, &t.copy}, func() error {
		one := t
		one.Columns, one.copy = slices.Clone(t.Columns), slices.Clone(t.copy)
		d.tables = append(d.tables, &one)
		d.statements[string(one.copy)], d.oids[one.oid] = &one, &one
		return nil
	})
	return err
}

// state asks for all but the tables, of the copy and of a restored server
// alike.
func state(ctx context.Context, conn *pgx.Conn, d backup.DumpedDatabase, schemas []string) (backup.DumpedDatabase, error) {
	rows, err := conn.Query(ctx, `SELECT schemaname, sequencename, last_value FROM pg_sequences s
		WHERE schemaname !~ '^pg_' AND ($1::text[] IS NULL OR schemaname = ANY($1))
			AND NOT EXISTS (SELECT FROM pg_depend WHERE deptype = 'e' AND classid = 'pg_class'::regclass AND objid = (quote_ident(schemaname) || '.' || quote_ident(sequencename))::regclass)
		ORDER BY 1, 2`, schemas)
	if err != nil {
		return d, err
	}
	if d.Sequences, err = pgx.CollectRows(rows, pgx.RowToStructByPos[backup.DumpedSequence]); err != nil {
		return d, err
	}
	if rows, err = conn.Query(ctx, `SELECT extname, extversion FROM pg_extension WHERE $1::text[] IS NULL ORDER BY 1`, schemas); err != nil {
		return d, err
	}
	if d.Extensions, err = pgx.CollectRows(rows, pgx.RowToStructByPos[backup.DumpedExtension]); err != nil {
		return d, err
	}
	for kind, into := range map[string]*[]string{"m": &d.MaterializedViews, "f": &d.ForeignTables} {
		rows, err := conn.Query(ctx, `SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE c.relkind::text = $1 AND c.relispopulated AND ($2::text[] IS NULL OR n.nspname = ANY($2))
				AND NOT EXISTS (SELECT FROM pg_depend WHERE deptype = 'e' AND classid = 'pg_class'::regclass AND objid = c.oid) ORDER BY 1`, kind, schemas)
		if err != nil {
			return d, err
		}
		if *into, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return d, err
		}
	}
	return d, conn.QueryRow(ctx, `SELECT count(*) FROM pg_largeobject_metadata WHERE $1::text[] IS NULL`, schemas).Scan(&d.LargeObjects)
}

// readRows reads a table's rows through the server, as pg_dump does.
func readRows(ctx context.Context, conn *pgx.Conn, copy []byte) (*rowSum, error) {
	// From here on the session speaks the database's own encoding, as pg_dump
	// does: the statement is in it already, and the rows are not converted.
	if _, err := conn.Exec(ctx, "SELECT set_config('client_encoding', current_setting('server_encoding'), false)"); err != nil {
		return nil, err
	}
	var s rowSum
	_, err := conn.PgConn().CopyTo(ctx, &s, string(copy)+" TO STDOUT")
	_, back := conn.Exec(ctx, "SET client_encoding = 'UTF8'")
	return &s, errors.Join(err, back)
}

// countRest reads the tables whose rows were not seen in the dump, or twice.
func (d *database) countRest(ctx context.Context, i *postgres.Instance, done func()) error {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx))
		}
	}()
	for _, t := range d.tables {
		if t.seen == 1 {
			continue
		}
		if conn == nil {
			var err error
			if conn, err = look(ctx, i, d.Name); err != nil {
				return err
			}
		}
		s, err := readRows(ctx, conn, t.copy)
		if err != nil {
			return fmt.Errorf("count the rows of %s.%s in database %s: %w", t.Schema, t.Name, d.Name, err)
		}
		t.rows, t.hash, t.seen = s.rows, s.hash(), 1
		done()
	}
	d.Counted = true
	return nil
}
