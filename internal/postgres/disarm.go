package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Prepared is a transaction in doubt: prepared for a two-phase commit, neither
// committed nor rolled back (pg_prepared_xacts). It keeps its locks.
type Prepared struct {
	GID      string
	Database string
	Owner    string
	At       time.Time
}

// ListPrepared lists the prepared transactions of the copy, the oldest first.
func (i *Instance) ListPrepared(ctx context.Context) ([]Prepared, error) {
	conn, err := i.connectAnywhere(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	rows, err := conn.Query(ctx, `SELECT gid, database::text, owner::text, prepared FROM pg_catalog.pg_prepared_xacts ORDER BY prepared, gid`)
	if err != nil {
		return nil, fmt.Errorf("list the prepared transactions of the copy in %s: %w", i.Root, err)
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Prepared])
}

// RollbackPrepared rolls the prepared transactions of the copy back and returns
// a line for each. Their coordinator settles those of production, never these.
// One that cannot be is in the error; the others are rolled back all the same.
// Called again it finds none.
func (i *Instance) RollbackPrepared(ctx context.Context) (rolled []string, err error) {
	all, err := i.ListPrepared(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, p := range all {
		// standard_conforming_strings is production's: E'' means the same in both.
		gid := strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(p.GID)
		if err := i.run(ctx, p.Database, "ROLLBACK PREPARED E'"+gid+"'"); err != nil {
			errs = append(errs, fmt.Errorf("prepared transaction %q of database %s: %w", p.GID, p.Database, err))
			continue
		}
		rolled = append(rolled, fmt.Sprintf("prepared transaction %q of database %s is rolled back", p.GID, p.Database))
	}
	return rolled, errors.Join(errs...)
}

// Disarm takes from the copy what would act if its isolation were lifted:
// prepared transactions are rolled back, and subscriptions disabled, parted
// from their slots and dropped, in every database. It returns a line for each
// deed, and one for what it left: the subscriptions of a database that takes no
// connections, whose workers cannot connect to it either.
//
// The publisher is never spoken to: a subscription's connection is replaced
// first, because dropping one whose tables are still being copied would drop
// slots on the publisher that bear production's name (DropSubscription,
// ReplicationSlotNameForTablesync).
//
// What fails is in the error, and does not keep the rest. It may be called
// again.
func (i *Instance) Disarm(ctx context.Context) (done []string, err error) {
	done, err = i.RollbackPrepared(ctx)
	conn, err2 := i.connectAnywhere(ctx)
	if err2 != nil {
		return done, errors.Join(err, err2)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	rows, err2 := conn.Query(ctx, `SELECT datname::text, subname::text, datallowconn AND datconnlimit <> -2
		FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid ORDER BY 1, 2`) // both are shared catalogs
	if err2 != nil {
		return done, errors.Join(err, err2)
	}
	type subscription struct {
		Database, Name string
		Open           bool
	}
	all, err2 := pgx.CollectRows(rows, pgx.RowToStructByPos[subscription])
	errs := []error{err, err2}
	for _, s := range all {
		what := fmt.Sprintf("subscription %q of database %s", s.Name, s.Database)
		if !s.Open {
			done = append(done, what+" is left: the database takes no connections, and so none of its workers'")
			continue
		}
		alter := "ALTER SUBSCRIPTION " + pgx.Identifier{s.Name}.Sanitize()
		if err := i.run(ctx, s.Database, alter+" DISABLE", alter+" CONNECTION 'host=/nonexistent password=none'", alter+" SET (slot_name = NONE)",
			"DROP SUBSCRIPTION "+pgx.Identifier{s.Name}.Sanitize()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
			continue
		}
		done = append(done, what+" is dropped")
	}
	return done, errors.Join(errs...)
}

// run executes statements one by one in a session of its own, in which no
// setting of the database or role and no trigger misleads them.
func (i *Instance) run(ctx context.Context, database string, statements ...string) error {
	conn, err := i.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if err := guard(ctx, conn); err != nil {
		return err
	}
	for _, s := range append([]string{"SET session_replication_role = replica", "SET default_transaction_read_only = off"}, statements...) {
		if _, err := conn.Exec(ctx, s); err != nil {
			return err
		}
	}
	return nil
}
