package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
)

const (
	// The headers of a page of WAL (xlog_internal.h: SizeOfXLogShortPHD, and
	// SizeOfXLogLongPHD on the first page of a segment).
	shortHeader = 24
	longHeader  = 40

	flushTries = 40
	flushPause = 5 * time.Millisecond
)

// FlushedRecordEnd returns an LSN that is the end of a WAL record and flushed:
// crash recovery of any later image must reach it, or acknowledged commits are
// lost.
//
// pg_current_wal_flush_lsn() alone will not do. What the server has flushed
// ends at the end of a record or at the end of a page of WAL, because
// XLogBackgroundFlush rounds down to pages, WaitXLogInsertionsToFinish answers
// with the start of a page that an insertion waits to fill (GetXLogBuffer) and
// XLogWrite stops at pages (src/backend/access/transam/xlog.c, 13 to 18). At
// the end of a page a record may continue, and then recovery rightly ends
// before it. So: a position inside a page is the end of a record; a page's end
// is one if the insert position lies exactly behind the next page's header, and
// not 8 bytes later, where the tail of a record fits. Else the server is asked
// again, for a fifth of a second.
//
// Only if it stays there (a transaction that wrote much and pauses, wal_level
// minimal) one empty message is written to the WAL in a transaction of its own
// (pg_logical_emit_message, about 100 bytes and one flush): its end is returned
// after the commit. Besides the records of backup mode that is all
// this package ever writes on production.
//
// Of a standby it is the end of the last record that was replayed. That one is
// durable in pg_wal: replay reads no further than the walreceiver has flushed
// (WaitForWALToBecomeAvailable), or a file of the archive that was durably
// renamed into place (KeepFileRestoredFromArchive). What was received but not
// replayed may end inside a record.
func FlushedRecordEnd(ctx context.Context, conn *pgx.Conn) (backup.LSN, error) {
	var standby bool
	var replayed string
	// Nothing is replayed yet by a standby that was shut down cleanly.
	err := conn.QueryRow(ctx, `SELECT pg_is_in_recovery(), coalesce(pg_last_wal_replay_lsn(), redo_lsn)::text FROM pg_control_checkpoint()`).Scan(&standby, &replayed)
	if err != nil {
		return 0, fmt.Errorf("read the replayed position of the WAL: %w", err)
	}
	if standby {
		return backup.ParseLSN(replayed)
	}
	var page, segment backup.LSN
	err = conn.QueryRow(ctx, `SELECT current_setting('wal_block_size')::bigint, setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'`).
		Scan((*uint64)(&page), (*uint64)(&segment))
	if err != nil {
		return 0, fmt.Errorf("read the sizes of the WAL: %w", err)
	}
	tick := time.NewTicker(flushPause)
	defer tick.Stop()
	for range flushTries {
		// The flush position is read first: the insert position can only grow
		// in between, which errs to the safe side.
		var flush, insert backup.LSN
		if err := queryLSNs(ctx, conn, &flush, &insert); err != nil {
			return 0, err
		}
		header := backup.LSN(shortHeader)
		if flush%segment == 0 {
			header = longHeader
		}
		if flush%page != 0 || insert == flush+header {
			return flush, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for the end of a WAL record: %w", context.Cause(ctx))
		}
	}
	return emitRecord(ctx, conn)
}

func queryLSNs(ctx context.Context, conn *pgx.Conn, flush, insert *backup.LSN) error {
	var f, i string
	if err := conn.QueryRow(ctx, `SELECT pg_current_wal_flush_lsn()::text`).Scan(&f); err != nil {
		return fmt.Errorf("read the flushed position of the WAL: %w", err)
	}
	if err := conn.QueryRow(ctx, `SELECT pg_current_wal_insert_lsn()::text`).Scan(&i); err != nil {
		return fmt.Errorf("read the insert position of the WAL: %w", err)
	}
	var err error
	if *flush, err = backup.ParseLSN(f); err != nil {
		return err
	}
	*insert, err = backup.ParseLSN(i)
	return err
}

// emitRecord returns the end of a record that its own commit flushed. The
// commit waits for this server's disk only, not for a standby.
func emitRecord(ctx context.Context, conn *pgx.Conn) (backup.LSN, error) {
	var end string
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL synchronous_commit = local`); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT pg_logical_emit_message(true, 'cleancut', '')::text`).Scan(&end)
	})
	if err != nil {
		return 0, fmt.Errorf("write a WAL record to flush up to: %w", err)
	}
	return backup.ParseLSN(end)
}
