package replication

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/wal"
)

const (
	// syncEvery is how long WAL may lie unsynced in the partial segment.
	syncEvery = 50 * time.Millisecond
	// statusEvery is well below wal_sender_timeout, by default 60 s.
	statusEvery = 5 * time.Second
	// After silence the server is asked for a sign of life; after dead without
	// one the connection counts as lost.
	silence   = 20 * time.Second
	dead      = 60 * time.Second
	closeTime = 5 * time.Second
	// pressed: a server that asks twice within this time for an answer, while
	// nothing is on its way, is shutting down.
	pressed = 200 * time.Millisecond
)

var (
	errStopping = errors.New("the server is shutting down")
	errSilent   = errors.New("the server is silent for a minute")
)

// Receive receives WAL from the beginning of segment from, which must be on
// the server's timeline or an ancestor, and goes on to the next timeline where
// one ends. It returns only with an error: of ctx, of the connection, of the
// folder or of Done. ErrLost: the server has that segment no longer.
// backup.ErrUnsupported: the server is not on a descendant of that timeline.
//
// The server keeps what Options.Safe has not passed. At its shutdown it waits
// until all is confirmed, for ever if it has to (walsender.c: WalSndDone). A
// receiver that confirms only what is in the catalog would hold it up, so it
// leaves when it is pressed.
func (r *Receiver) Receive(ctx context.Context, from wal.Segment) error {
	stop := context.AfterFunc(ctx, func() { _ = r.conn.Conn().SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := r.storeHistory(ctx, r.server.History.Timeline); err != nil {
		return err
	}
	for {
		if _, ok := r.server.History.Begin(from.Timeline); !ok {
			return backup.Hint(fmt.Errorf("WAL was received on timeline %d, which is no ancestor of the server's timeline %d: %w", from.Timeline, r.server.History.Timeline, backup.ErrUnsupported),
				"two servers were promoted apart from each other: connect to the right one, or run `cleancut wal stream --skip-lost` to follow this one from now on")
		}
		from = r.server.History.Path(from.Number, r.server.System.SegmentSize)
		r.start(from)
		next, err := r.timeline(ctx)
		if err != nil {
			return errors.Join(err, ctx.Err())
		}
		if err := r.identify(ctx); err != nil { // the server has a new timeline, at least
			return err
		}
		if err := r.storeHistory(ctx, next); err != nil {
			return err
		}
		from = wal.Segment{Timeline: next, Number: r.at.Number}
	}
}

// storeHistory writes the history file of a timeline into the folder.
func (r *Receiver) storeHistory(ctx context.Context, t wal.Timeline) error {
	_, content, err := r.history(ctx, t)
	if err != nil || content == nil {
		return err
	}
	f := wal.HistoryOf(t)
	if err := fault.Point(ctx, "replication.history"); err != nil {
		return err
	}
	if err := writeWhole(filepath.Join(r.dir, f.String()), int64(len(content)), bytes.NewReader(content)); err != nil {
		return fmt.Errorf("receive WAL: %w", err)
	}
	return r.done(ctx, f)
}

func (r *Receiver) done(ctx context.Context, f wal.File) error {
	if r.o.Done == nil {
		return nil
	}
	return r.o.Done(ctx, f)
}

// safe is what the server may forget. Never 0, which the protocol's library
// would replace by what was written.
func (r *Receiver) safe() backup.LSN {
	if r.o.Safe == nil {
		return r.durable
	}
	return r.o.Safe()
}

// timeline receives to the end of a timeline and returns the next one.
func (r *Receiver) timeline(ctx context.Context) (wal.Timeline, error) {
	if err := fault.Point(ctx, "replication.start"); err != nil {
		return 0, err
	}
	err := pglogrepl.StartReplication(ctx, r.conn, r.slot, pglogrepl.LSN(r.written), pglogrepl.StartReplicationOptions{Timeline: int32(r.at.Timeline), Mode: pglogrepl.PhysicalReplication})
	if next, _, ended := pglogrepl.IsErrEndTimeline(err); ended {
		return wal.Timeline(next), nil
	}
	if err != nil {
		return 0, fmt.Errorf("receive WAL from %s on timeline %d: %w", r.written, r.at.Timeline, ours(err))
	}
	if err := r.status(); err != nil { // takes hold of what the slot did not keep so far
		return 0, err
	}
	var synced, told, asked time.Time
	r.heard = time.Now()
	for {
		now := time.Now()
		if now.Sub(r.heard) > dead {
			return 0, errSilent
		}
		if r.durable != r.written && now.Sub(synced) >= syncEvery {
			if err := r.sync(ctx); err != nil {
				return 0, err
			}
			if err := r.status(); err != nil {
				return 0, err
			}
			synced, told = time.Now(), time.Now()
		} else if now.Sub(told) >= statusEvery {
			if err := r.status(); err != nil {
				return 0, err
			}
			told = now
		}
		until := told.Add(statusEvery)
		if r.durable != r.written {
			until = synced.Add(syncEvery)
		}
		data, ended, err := r.message(ctx, until)
		switch {
		case err != nil:
			return 0, err
		case ended:
			return r.endOfTimeline(ctx)
		case len(data) == 0: // nothing came
		case data[0] == pglogrepl.XLogDataByteID:
			err = r.data(ctx, data[1:])
		case data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
			var k pglogrepl.PrimaryKeepaliveMessage
			if k, err = pglogrepl.ParsePrimaryKeepaliveMessage(data[1:]); err != nil || !k.ReplyRequested {
				r.progress(backup.LSN(k.ServerWALEnd))
				break
			}
			if backup.LSN(k.ServerWALEnd) <= r.written && now.Sub(asked) < pressed {
				return 0, errStopping
			}
			asked = now
			if err = r.sync(ctx); err == nil {
				r.progress(backup.LSN(k.ServerWALEnd))
				err = r.status()
			}
		}
		if err != nil {
			return 0, err
		}
	}
}

// message waits for one message until a moment. Nothing came: no data and no
// error. ended: the timeline is at its end.
func (r *Receiver) message(ctx context.Context, until time.Time) (data []byte, ended bool, err error) {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	msg, err := r.conn.ReceiveMessage(waiting)
	if err != nil {
		if ctx.Err() == nil && waiting.Err() != nil && pgconn.Timeout(err) {
			return nil, false, nil
		}
		return nil, false, fmt.Errorf("receive WAL: %w", err)
	}
	r.heard = time.Now()
	switch msg := msg.(type) {
	case *pgproto3.CopyData:
		return msg.Data, false, nil
	case *pgproto3.CopyDone:
		return nil, true, nil
	case *pgproto3.ErrorResponse:
		return nil, false, fmt.Errorf("receive WAL from %s on timeline %d: %w", r.written, r.at.Timeline, ours(pgconn.ErrorResponseToPgError(msg)))
	case *pgproto3.CommandComplete: // the server shuts down
		return nil, false, errStopping
	}
	return nil, false, nil // notices, parameters
}

// data writes WAL into segments.
func (r *Receiver) data(ctx context.Context, message []byte) error {
	x, err := pglogrepl.ParseXLogData(message)
	if err != nil {
		return err
	}
	lsn, rest := backup.LSN(x.WALStart), x.WALData
	for len(rest) > 0 {
		segment := r.at
		var whole bool
		if rest, whole, err = r.write(ctx, lsn, rest); err != nil {
			return err
		}
		lsn = r.written
		if whole {
			if err := r.done(ctx, segment.File(r.system.SegmentSize)); err != nil {
				return err
			}
		}
	}
	r.progress(backup.LSN(x.ServerWALEnd))
	return nil
}

func (r *Receiver) progress(server backup.LSN) {
	if r.o.Progress != nil {
		r.o.Progress(Position{Timeline: r.at.Timeline, Durable: r.durable, Server: max(server, r.written)})
	}
}

// status tells the server how far we are.
func (r *Receiver) status() error {
	safe := pglogrepl.LSN(r.safe())
	err := pglogrepl.SendStandbyStatusUpdate(context.Background(), r.conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: pglogrepl.LSN(max(r.durable, r.safe())), WALFlushPosition: safe, WALApplyPosition: safe,
		ReplyRequested: time.Since(r.heard) > silence})
	if err != nil {
		return fmt.Errorf("confirm WAL: %w", err)
	}
	r.progress(0)
	return nil
}

// endOfTimeline ends the copy mode and returns what follows.
func (r *Receiver) endOfTimeline(ctx context.Context) (wal.Timeline, error) {
	if err := r.sync(ctx); err != nil {
		return 0, err
	}
	end, err := pglogrepl.SendStandbyCopyDone(ctx, r.conn)
	if err != nil {
		return 0, fmt.Errorf("end of timeline %d: %w", r.at.Timeline, err)
	}
	if end == nil {
		return 0, errStopping
	}
	r.close()
	// The new timeline's first segment is the one that the fork lies in.
	r.at.Number = wal.At(0, backup.LSN(end.LSN), r.system.SegmentSize).Number
	return wal.Timeline(end.Timeline), nil
}

// ours adds our word to an error of the server that somebody decides by.
func ours(err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	switch pg.Code {
	case "58P01": // undefined_file: "requested WAL segment has already been removed"
		return backup.Hint(fmt.Errorf("%w: %w", ErrLost, err),
			"some WAL was never received: take a new backup, and run `cleancut wal stream --skip-lost`, which leaves the gap")
	case "55006": // object_in_use
		return fmt.Errorf("another receiver has the slot: %w: %w", backup.ErrInUse, err)
	}
	return err
}
