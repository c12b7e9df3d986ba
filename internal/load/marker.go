package load

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

func markerView(n int) string { return fmt.Sprintf("play.marker_%d", n) }
func markerNote(n int) string { return fmt.Sprintf("this is marker %d", n) }

// Mark commits, in one transaction, a known row n of play.markers and a view
// play.marker_n that shows it. Marking the same n twice is an error.
func Mark(ctx context.Context, conn *pgx.Conn, n int) error {
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `set local synchronous_commit = on`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `insert into play.markers (n, note) values ($1, $2)`, n, markerNote(n)); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, fmt.Sprintf(`create view %s as select * from play.markers where n = %d`, markerView(n), n))
		return err
	})
	if err != nil {
		return fmt.Errorf("set marker %d: %w", n, err)
	}
	return nil
}

// Marker tells whether the row of marker n is there as it was written, and
// whether its view is there. The view counts only if it can be read.
func Marker(ctx context.Context, conn *pgx.Conn, n int) (row, view bool, err error) {
	row, view, err = marker(ctx, conn, n)
	if err != nil {
		err = fmt.Errorf("look for marker %d: %w", n, err)
	}
	return row, view, err
}

// querier is a connection or a transaction.
type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func marker(ctx context.Context, q querier, n int) (row, view bool, err error) {
	err = q.QueryRow(ctx, `select exists (select from play.markers where n = $1 and note = $2), to_regclass($3) is not null`,
		n, markerNote(n), markerView(n)).Scan(&row, &view)
	if err != nil || !view {
		return row, false, err
	}
	var rows int64
	if err := q.QueryRow(ctx, `select count(*) from `+markerView(n)).Scan(&rows); err != nil {
		return row, false, err
	}
	return row, view, nil
}
