package replication

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/wal"
)

const (
	slotPause    = 50 * time.Millisecond // between two looks at a slot
	slotPatience = 10 * time.Second      // for a walsender to see that its standby is gone
)

// Primary is a server that a standby is to follow, as it was when Look looked.
type Primary struct {
	Server                     // Kept is the redo position of its last checkpoint
	Version  int               // server_version_num
	Settings map[string]string // those that a standby must not have smaller
	Sync     string            // synchronous_standby_names
}

// Look asks a server what a standby of it must know. It needs both
// connections that a receiver needs, and makes nothing.
func Look(ctx context.Context, t postgres.Target) (p Primary, err error) {
	if err := fault.Point(ctx, "replication.look"); err != nil {
		return p, err
	}
	conn, err := postgres.ConnectReplication(ctx, t)
	if err != nil {
		return p, err
	}
	r := &Receiver{conn: conn}
	defer r.Close()
	if err := r.identify(ctx); err != nil {
		return p, err
	}
	p.Server = r.server
	sql, err := postgres.Connect(ctx, t)
	if err != nil {
		return p, err
	}
	defer func() { _ = sql.Close(context.WithoutCancel(ctx)) }()
	var redo uint64
	err = sql.QueryRow(ctx, `SELECT setting::bigint, pg_is_in_recovery(), current_setting('server_version_num')::int, current_setting('synchronous_standby_names'),
			(SELECT (redo_lsn - '0/0'::pg_lsn)::bigint FROM pg_control_checkpoint()),
			(SELECT json_object_agg(name, setting) FROM pg_settings WHERE name IN
				('max_connections', 'max_worker_processes', 'max_wal_senders', 'max_prepared_transactions', 'max_locks_per_transaction'))
		FROM pg_settings WHERE name = 'wal_segment_size'`).Scan(&p.System.SegmentSize, &p.Standby, &p.Version, &p.Sync, &redo, &p.Settings)
	if err != nil {
		return p, fmt.Errorf("look at the primary: %w", err)
	}
	p.Kept = backup.LSN(redo)
	return p, nil
}

// Slot is a physical slot as the server shows it.
type Slot struct {
	Active bool
	Status string       // wal_status: reserved, extended, unreserved, lost; "" keeps nothing
	Kept   backup.LSN   // from here on; 0: nothing
	Behind backup.Bytes // from Kept to the end of the server's WAL
	System backup.SystemIdentifier
	End    backup.LSN // of the server's WAL
	Sync   string     // sync_state of the standby with that name, "": it is not connected
}

// LookAtSlot looks at a slot and at the standby with that application_name.
// backup.ErrNotFound: there is no such physical slot; the other fields are
// filled in all the same.
func LookAtSlot(ctx context.Context, t postgres.Target, name, application string) (Slot, error) {
	conn, err := postgres.Connect(ctx, t)
	if err != nil {
		return Slot{}, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	return lookAtSlot(ctx, conn, name, application)
}

func lookAtSlot(ctx context.Context, conn *pgx.Conn, name, application string) (s Slot, err error) {
	var kept, end uint64
	var system int64
	var found bool
	err = conn.QueryRow(ctx, `WITH server AS (SELECT system_identifier,
				CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) ELSE pg_current_wal_flush_lsn() END AS ends FROM pg_control_system())
		SELECT system_identifier, (ends - '0/0'::pg_lsn)::bigint, slot_name IS NOT NULL, coalesce(active, false), coalesce(wal_status, ''),
			coalesce((restart_lsn - '0/0'::pg_lsn)::bigint, 0), coalesce((SELECT sync_state FROM pg_stat_replication WHERE application_name = $2 LIMIT 1), '')
		FROM server LEFT JOIN pg_replication_slots ON slot_name = $1 AND slot_type = 'physical'`, name, application).
		Scan(&system, &end, &found, &s.Active, &s.Status, &kept, &s.Sync)
	if err != nil {
		return s, fmt.Errorf("look at replication slot %s: %w", name, err)
	}
	s.System, s.End, s.Kept = backup.SystemIdentifier(system), backup.LSN(end), backup.LSN(kept)
	if kept != 0 && end > kept {
		s.Behind = backup.Bytes(end - kept)
	}
	if !found {
		return s, fmt.Errorf("replication slot %s: %w", name, backup.ErrNotFound)
	}
	return s, nil
}

// Hold makes a physical slot and lets it keep everything from the beginning of
// a segment on, which may lie before what a new slot keeps by itself: the
// position is confirmed like a standby's (walsender.c,
// PhysicalConfirmReceivedLocation), and then it is proved once more that the
// server has that segment. ErrLost: it has it no longer. backup.ErrExists:
// there is a slot of that name, which is left alone. On another error the slot
// may be there, and keep less.
//
// The server writes the position down at its next checkpoint: if it crashes
// before, the slot keeps what it kept when it was made.
func Hold(ctx context.Context, t postgres.Target, name string, from wal.Segment, size wal.Size) error {
	if err := CheckSlot(name); err != nil {
		return err
	}
	sql, err := postgres.Connect(ctx, t)
	if err != nil {
		return err
	}
	defer func() { _ = sql.Close(context.WithoutCancel(ctx)) }()
	if err := fault.Point(ctx, "replication.slot"); err != nil {
		return err
	}
	_, err = sql.Exec(ctx, `SELECT pg_create_physical_replication_slot($1, true)`, name)
	var pg *pgconn.PgError
	switch {
	case errors.As(err, &pg) && pg.Code == "42710": // duplicate_object
		return fmt.Errorf("replication slot %s: %w: %w", name, backup.ErrExists, err)
	case err != nil:
		return backup.Hint(fmt.Errorf("make replication slot %s: %w", name, err), "see max_replication_slots and the role's REPLICATION attribute")
	}
	if err := fault.Point(ctx, "replication.slot done"); err != nil {
		return err
	}
	var s Slot
	for _, confirms := range []*pgx.Conn{sql, nil} { // it was kept before anybody held it: is it there still?
		if err := read(ctx, t, name, from, size, confirms); err != nil {
			return err
		}
		// The next receiver, the standby at last, finds it free.
		free, err := poll(ctx, func() (bool, error) {
			s, err = lookAtSlot(ctx, sql, name, "")
			return !s.Active, err
		})
		if err == nil && !free {
			err = fmt.Errorf("replication slot %s: %w", name, backup.ErrInUse)
		}
		if err != nil {
			return err
		}
	}
	if s.Status == "lost" || s.Status == "unreserved" {
		return fmt.Errorf("replication slot %s: the server is about to remove what it keeps (max_slot_wal_keep_size): %w", name, ErrLost)
	}
	return nil
}

// Has reports whether the server has that segment: nil, or an error that wraps
// ErrLost. It leaves nothing.
func Has(ctx context.Context, t postgres.Target, from wal.Segment, size wal.Size) error {
	return read(ctx, t, "", from, size, nil)
}

// read begins to receive at a segment and returns when the first of it is
// here. A temporary slot serves where none is named. With a session it confirms
// the segment's beginning as the slot's position and waits until it is.
func read(ctx context.Context, t postgres.Target, slot string, from wal.Segment, size wal.Size, sql *pgx.Conn) error {
	if err := fault.Point(ctx, "replication.read"); err != nil {
		return err
	}
	conn, err := postgres.ConnectReplication(ctx, t)
	if err != nil {
		return err
	}
	r := &Receiver{conn: conn, slot: slot}
	defer r.Close()
	if slot == "" {
		r.slot = temporarySlot()
		if _, err := conn.Exec(ctx, "CREATE_REPLICATION_SLOT "+r.slot+" TEMPORARY PHYSICAL").ReadAll(); err != nil {
			return backup.Hint(fmt.Errorf("make a temporary replication slot: %w", err), "see max_replication_slots and the role's REPLICATION attribute")
		}
	}
	start := pglogrepl.LSN(from.Start(size))
	r.at, r.written = from, backup.LSN(start)
	err = pglogrepl.StartReplication(ctx, conn, r.slot, start, pglogrepl.StartReplicationOptions{Timeline: int32(from.Timeline), Mode: pglogrepl.PhysicalReplication})
	if _, _, ended := pglogrepl.IsErrEndTimeline(err); err != nil && !ended {
		return fmt.Errorf("read WAL from %s on timeline %d: %w", start, from.Timeline, ours(err))
	} else if ended {
		return fmt.Errorf("read WAL from %s: timeline %d ends there: %w", start, from.Timeline, ErrLost)
	}
	for arrived := false; !arrived; {
		data, ended, err := r.message(ctx, time.Now().Add(statusEvery))
		if err != nil {
			return err
		}
		arrived = ended || len(data) > 0 && data[0] == pglogrepl.XLogDataByteID
		if len(data) > 0 && data[0] == pglogrepl.PrimaryKeepaliveMessageByteID {
			k, err := pglogrepl.ParsePrimaryKeepaliveMessage(data[1:])
			arrived = err == nil && k.ServerWALEnd <= start // nothing is written there yet
		}
	}
	if sql == nil {
		return fault.Point(ctx, "replication.read done")
	}
	if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: start, WALFlushPosition: start, WALApplyPosition: start}); err != nil {
		return fmt.Errorf("hold WAL from %s: %w", start, err)
	}
	until := func() (bool, error) {
		s, err := lookAtSlot(ctx, sql, slot, "")
		return s.Kept == backup.LSN(start), err
	}
	if ok, err := poll(ctx, until); err != nil || !ok {
		return errors.Join(fmt.Errorf("hold WAL from %s: the server does not take the position", start), err)
	}
	return fault.Point(ctx, "replication.read done")
}

// poll asks until it is so, the patience for slots is over, or ctx ends.
func poll(ctx context.Context, ok func() (bool, error)) (bool, error) {
	tick := time.NewTicker(slotPause)
	defer tick.Stop()
	late := time.After(slotPatience)
	for {
		if is, err := ok(); is || err != nil {
			return is, err
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-late:
			return false, nil
		case <-tick.C:
		}
	}
}

// Release drops a slot of a standby that is gone; it is not there: nil. It
// waits a little until the server has seen that. backup.ErrNotOurs: the server
// is of another system. backup.ErrInUse: somebody receives through it.
func Release(ctx context.Context, t postgres.Target, name string, system backup.SystemIdentifier) error {
	if err := fault.Point(ctx, "replication.release"); err != nil {
		return err
	}
	conn, err := postgres.Connect(ctx, t)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	free, err := poll(ctx, func() (bool, error) {
		s, err := lookAtSlot(ctx, conn, name, "")
		if (err == nil || errors.Is(err, backup.ErrNotFound)) && s.System != system {
			err = fmt.Errorf("the server is of system %d, not of %d: %w", s.System, system, backup.ErrNotOurs)
		}
		return !s.Active, err
	})
	switch {
	case errors.Is(err, backup.ErrNotFound):
		return fault.Point(ctx, "replication.release done")
	case err != nil:
		return err
	case !free:
		return fmt.Errorf("replication slot %s: %w", name, backup.ErrInUse)
	}
	if _, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot($1)`, name); err != nil {
		return fmt.Errorf("drop replication slot %s: %w", name, err)
	}
	return fault.Point(ctx, "replication.release done")
}
