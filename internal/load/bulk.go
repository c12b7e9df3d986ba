package load

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
)

// BulkOptions says how Bulk works. Zero values mean the defaults.
type BulkOptions struct {
	BatchRows     int64        // of one INSERT … SELECT; default 5,000
	MaxRows       int64        // pause, the transaction open, when so many are inserted; 0 is no limit
	MaxBytes      backup.Bytes // pause when the table with its index is so large; 0 is no limit. WAL comes on top, about as much again
	RowsPerSecond int64        // slow down to that; 0 is full speed
}

// Bulk is beater A: one transaction that inserts rows from another table for
// as long as it is wanted and never commits; when stopped it rolls back. Not
// one row of it may be visible in any copy. Its operations are the batches;
// Rows counts rows. Use each Bulk for one Start.
type Bulk struct {
	crew
	options BulkOptions
	rows    atomic.Int64
	paused  atomic.Bool
	source  int64 // rows of play.people
}

// NewBulk makes the beater; Start lets it work.
func NewBulk(o BulkOptions) *Bulk {
	if o.BatchRows <= 0 {
		o.BatchRows = 5_000
	}
	return &Bulk{crew: crew{name: "bulk"}, options: o}
}

// Rows is the number of rows inserted and not committed.
func (b *Bulk) Rows() int64 { return b.rows.Load() }

// Paused tells that a limit was reached: the transaction stays open and idle.
func (b *Bulk) Paused() bool { return b.paused.Load() }

const (
	// pingEvery is how often a paused transaction looks whether its server
	// still lives.
	pingEvery = time.Second

	insertBulk = `insert into play.bulk select $1 + id, id, family, note from play.people where id > $2 and id <= $3`
)

// Start empties play.bulk of what an earlier Bulk left (never visible, but on
// the disk), opens the transaction and sets it going; cancelling ctx ends it
// cleanly. The error is that of connecting, or of another Bulk at work.
func (b *Bulk) Start(ctx context.Context, connect Connect) error {
	return b.launch(ctx, connect, b.prepare, b.insert)
}

func (b *Bulk) prepare(ctx context.Context, conn *pgx.Conn) error {
	if err := conn.QueryRow(ctx, `select coalesce(max(id), 0) from play.people`).Scan(&b.source); err != nil {
		return fmt.Errorf("measure play.people: %w", err)
	}
	if b.source == 0 {
		return fmt.Errorf("play.people is empty: make the play database first")
	}
	// TRUNCATE would wait for an open transaction of another Bulk for ever.
	if _, err := conn.Exec(ctx, `set lock_timeout = '10s'`); err != nil {
		return fmt.Errorf("set lock_timeout: %w", err)
	}
	if _, err := conn.Exec(ctx, `truncate play.bulk`); err != nil {
		return fmt.Errorf("empty play.bulk: %w", err)
	}
	if _, err := conn.Exec(ctx, `set lock_timeout = 0`); err != nil {
		return fmt.Errorf("set lock_timeout: %w", err)
	}
	return nil
}

func (b *Bulk) insert(ctx context.Context, s *session) error {
	tx, err := s.conn.Begin(ctx)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	began := time.Now()
	var at int64 // the last person taken
	for !s.quitting() && ctx.Err() == nil {
		full, err := b.full(ctx, tx)
		if err != nil {
			return err
		}
		if full {
			s.pause(ctx, pingEvery)
			continue
		}
		if at >= b.source {
			at = 0
		}
		upTo := min(at+b.options.BatchRows, b.source)
		s.send()
		tag, err := tx.Exec(ctx, insertBulk, b.rows.Load()-at, at, upTo)
		if err != nil {
			return fmt.Errorf("insert after %d rows: %w", b.rows.Load(), err)
		}
		at = upTo
		b.rows.Add(tag.RowsAffected())
		s.ack(time.Now())
		if r := b.options.RowsPerSecond; r > 0 {
			due := began.Add(time.Duration(float64(b.rows.Load()) / float64(r) * float64(time.Second)))
			s.pause(ctx, time.Until(due))
		}
	}
	if ctx.Err() != nil {
		return nil // the connection is closed next, and the server rolls back
	}
	if err := tx.Rollback(ctx); err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	return nil
}

// full tells whether a limit is reached, and asks the server at least once a
// second when it is.
func (b *Bulk) full(ctx context.Context, tx pgx.Tx) (bool, error) {
	full := b.options.MaxRows > 0 && b.rows.Load() >= b.options.MaxRows
	if b.options.MaxBytes > 0 || full {
		var size backup.Bytes
		if err := tx.QueryRow(ctx, `select pg_total_relation_size('play.bulk')`).Scan(&size); err != nil {
			return false, fmt.Errorf("size of play.bulk: %w", err)
		}
		full = full || b.options.MaxBytes > 0 && size >= b.options.MaxBytes
	}
	b.paused.Store(full)
	return full, nil
}
