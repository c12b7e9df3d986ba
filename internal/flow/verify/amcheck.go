package verify

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// mostFindings is how many of them a check's detail repeats.
const mostFindings = 5

// amcheck examines the structure of heaps and B-trees: with pg_amcheck, or,
// where this host has none of the copy's major version, with the functions of
// the same extension. 13 has neither the program nor verify_heapam.
func (r *runner) amcheck(ctx context.Context) {
	if _, err := r.Installation.Tool(ctx, "pg_amcheck"); err == nil {
		r.check(ctx, "indexes and heap (pg_amcheck)", func(ctx context.Context) (string, error) {
			return r.tool(ctx, "pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--rootdescend", "--jobs=2")
		})
		return
	}
	r.check(ctx, "indexes (amcheck's functions)", func(ctx context.Context) (string, error) {
		return r.relations(ctx, "indexes", indexes, func(ctx context.Context, conn *pgx.Conn, oid uint32) ([]string, error) {
			_, err := conn.Exec(ctx, `SELECT bt_index_parent_check($1::oid::regclass, true, true)`, oid)
			return nil, err
		})
	})
	r.check(ctx, "heap (amcheck's functions)", func(ctx context.Context) (string, error) {
		if r.Installation.Major < 14 {
			return "", fmt.Errorf("%w: PostgreSQL %d has no verify_heapam", errNotRun, r.Installation.Major)
		}
		return r.relations(ctx, "tables", heaps, func(ctx context.Context, conn *pgx.Conn, oid uint32) ([]string, error) {
			rows, err := conn.Query(ctx, `SELECT format('block %s, offset %s: %s', blkno, offnum, msg) FROM verify_heapam($1::oid::regclass, check_toast => true)`, oid)
			if err != nil {
				return nil, err
			}
			return pgx.CollectRows(rows, pgx.RowTo[string])
		})
	})
}

// What pg_amcheck looks at by default, without temporary relations.
const (
	indexes = `SELECT c.oid, c.oid::regclass::text FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid JOIN pg_am a ON a.oid = c.relam
		WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence <> 't' AND i.indisready AND i.indisvalid AND i.indislive ORDER BY 1`
	heaps = `SELECT c.oid, c.oid::regclass::text FROM pg_class c JOIN pg_am a ON a.oid = c.relam
		WHERE a.amname = 'heap' AND c.relkind IN ('r', 'm', 't') AND c.relpersistence <> 't' ORDER BY 1`
)

// relation is a row of the two queries above.
type relation struct {
	OID  uint32
	Name string
}

// relations has every relation of every database examined, also after damage
// was found in one.
func (r *runner) relations(ctx context.Context, what, query string, examine func(context.Context, *pgx.Conn, uint32) ([]string, error)) (string, error) {
	names, err := r.databases(ctx)
	if err != nil {
		return "", err
	}
	seen, found := 0, []string{}
	for _, db := range names {
		conn, err := r.amcheckIn(ctx, db)
		if err != nil {
			return "", fmt.Errorf("database %s: %w", db, err)
		}
		rows, err := conn.Query(ctx, query)
		var all []relation
		if err == nil {
			all, err = pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
		}
		for _, rel := range all {
			said, err := examine(ctx, conn, rel.OID)
			if err != nil {
				said = append(said, err.Error())
			}
			for _, s := range said {
				found = append(found, fmt.Sprintf("database %s, %s: %s", db, rel.Name, s))
			}
			seen++
		}
		if err = errors.Join(err, conn.Close(ctx)); err != nil {
			return "", fmt.Errorf("database %s: %w", db, err)
		}
	}
	if len(found) > 0 {
		return "", fmt.Errorf("found %d: %s", len(found), strings.Join(found[:min(len(found), mostFindings)], "; "))
	}
	return fmt.Sprintf("%d %s in %d databases", seen, what, len(names)), nil
}

// amcheckIn opens a session that sees amcheck's functions, in their newest
// form, beside pg_catalog.
func (r *runner) amcheckIn(ctx context.Context, db string) (_ *pgx.Conn, err error) {
	conn, err := r.Instance.Connect(ctx, db)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, conn.Close(ctx))
		}
	}()
	var available bool
	if err := conn.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_available_extensions WHERE name = 'amcheck'`).Scan(&available); err != nil {
		return nil, err
	}
	if !available {
		return nil, fmt.Errorf("%w: this host has neither pg_amcheck nor the extension amcheck of PostgreSQL %d", errNotRun, r.Installation.Major)
	}
	var schema string
	for _, q := range []string{`CREATE EXTENSION IF NOT EXISTS amcheck SCHEMA pg_catalog`, `ALTER EXTENSION amcheck UPDATE`} {
		if _, err := conn.Exec(ctx, q); err != nil {
			return nil, err
		}
	}
	if err := conn.QueryRow(ctx, `SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'amcheck'`).Scan(&schema); err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, `SET search_path = pg_catalog, `+schema)
	return conn, err
}
