package replication

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/wal"
)

// ErrLost: the server does not have the WAL any more that is asked for, or its
// slot was invalidated.
var ErrLost = errors.New("WAL is lost on the server")

// Options of a receiver. Target and Dir are needed.
type Options struct {
	Target postgres.Target
	Dir    string     // where the files go; it must be there
	Slot   string     // name of a physical slot, made if it is missing; "": a temporary one
	System wal.System // the server must be of it; zero: any

	// Done is told of each file that is whole and durable in Dir: segments and
	// history files. Its error ends Receive. May be nil.
	Done func(ctx context.Context, f wal.File) error
	// Safe returns the position up to which the server may forget its WAL. It
	// is asked often. nil: what is durable in Dir.
	Safe func() backup.LSN
	// Progress is told after each sync and each sign of life. May be nil.
	Progress func(Position)
}

// Position is how far a receiver has come.
type Position struct {
	Timeline wal.Timeline
	Durable  backup.LSN // everything before it is durable in Dir
	Server   backup.LSN // end of the server's WAL, as it said last
}

// Server is what a server says of itself when a receiver connects.
type Server struct {
	System  wal.System
	History wal.History // of the timeline that it is on
	Flushed backup.LSN
	Kept    backup.LSN // the slot keeps everything from here on
	Standby bool
}

// Receiver is a connection that receives WAL. It is not safe for concurrent
// use.
type Receiver struct {
	o      Options
	conn   *pgconn.PgConn
	server Server
	slot   string
	heard  time.Time // when the server said anything last

	writer
}

var slotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

// CheckSlot refuses what is no name of a slot: 1 to 63 of a-z, 0-9 and _.
func CheckSlot(name string) error {
	if slotName.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%w: %q is no name of a replication slot: 1 to 63 of a-z, 0-9 and _", backup.ErrUsage, name)
}

// Connect connects, gets hold of the slot and asks the server who it is.
// backup.ErrNotOurs: it is not of Options.System. ErrLost: the slot was
// invalidated. backup.ErrInUse: another one receives through it.
func Connect(ctx context.Context, o Options) (*Receiver, error) {
	if o.Slot != "" {
		if err := CheckSlot(o.Slot); err != nil {
			return nil, err
		}
	}
	if err := fault.Point(ctx, "replication.connect"); err != nil {
		return nil, err
	}
	conn, err := postgres.ConnectReplication(ctx, o.Target)
	if err != nil {
		return nil, err
	}
	r := &Receiver{o: o, conn: conn, slot: o.Slot}
	if err := errors.Join(r.begin(ctx), fault.Point(ctx, "replication.connect done")); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Close ends the connection. A temporary slot goes with it; what is in the
// folder stays.
func (r *Receiver) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	r.close()
	_ = r.conn.Close(ctx) // there is nothing left to lose
}

// Server returns what the server said when Connect asked.
func (r *Receiver) Server() Server { return r.server }

func (r *Receiver) begin(ctx context.Context) error {
	sql, err := postgres.Connect(ctx, r.o.Target)
	if err != nil {
		return err
	}
	defer func() { _ = sql.Close(context.WithoutCancel(ctx)) }()
	err = sql.QueryRow(ctx, `SELECT setting::bigint, pg_is_in_recovery() FROM pg_settings WHERE name = 'wal_segment_size'`).Scan(&r.server.System.SegmentSize, &r.server.Standby)
	if err != nil {
		return fmt.Errorf("ask for the size of segments: %w", err)
	}
	if err := r.identify(ctx); err != nil {
		return err
	}
	if s := r.o.System; s != (wal.System{}) && s != r.server.System {
		return backup.Hint(fmt.Errorf("the server is of system %d with segments of %s, not of %d with %s: %w",
			r.server.System.Identifier, r.server.System.SegmentSize, s.Identifier, s.SegmentSize, backup.ErrNotOurs),
			"the connection leads to another cluster: see dsn, or give this cluster a name of its own (--cluster)")
	}
	r.writer = writer{dir: r.o.Dir, system: r.server.System}
	return r.holdSlot(ctx, sql)
}

// identify asks for system, timeline and its history. It is called before the
// slot is made and may be called again.
func (r *Receiver) identify(ctx context.Context) error {
	id, err := pglogrepl.IdentifySystem(ctx, r.conn)
	if err != nil {
		return fmt.Errorf("identify the system: %w", err)
	}
	n, err := strconv.ParseUint(id.SystemID, 10, 64)
	if err != nil {
		return fmt.Errorf("identify the system: %w", err)
	}
	r.server.System.Identifier, r.server.Flushed = backup.SystemIdentifier(n), backup.LSN(id.XLogPos)
	r.server.History, _, err = r.history(ctx, wal.Timeline(id.Timeline))
	return err
}

// history asks for the history of a timeline; the first has none.
func (r *Receiver) history(ctx context.Context, t wal.Timeline) (wal.History, []byte, error) {
	if t == 1 {
		return wal.History{Timeline: 1}, nil, nil
	}
	got, err := pglogrepl.TimelineHistory(ctx, r.conn, int32(t))
	if err != nil {
		return wal.History{}, nil, fmt.Errorf("ask for the history of timeline %d: %w", t, err)
	}
	h, err := wal.ParseHistory(t, got.Content)
	return h, got.Content, err
}

// holdSlot makes the slot if it is missing and finds out what it keeps.
func (r *Receiver) holdSlot(ctx context.Context, sql *pgx.Conn) error {
	kind := "PHYSICAL RESERVE_WAL"
	if r.slot == "" {
		r.slot, kind = temporarySlot(), "TEMPORARY "+kind
	}
	for range 2 {
		var physical, active bool
		var status string
		var kept *uint64
		err := sql.QueryRow(ctx, `SELECT slot_type = 'physical', active, coalesce(wal_status, ''), (restart_lsn - '0/0'::pg_lsn)::bigint FROM pg_replication_slots WHERE slot_name = $1`, r.slot).
			Scan(&physical, &active, &status, &kept)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			if _, err := r.conn.Exec(ctx, "CREATE_REPLICATION_SLOT "+r.slot+" "+kind).ReadAll(); err != nil {
				return backup.Hint(fmt.Errorf("make replication slot %s: %w", r.slot, err), "see max_replication_slots and the role's REPLICATION attribute")
			}
			continue
		case err != nil:
			return fmt.Errorf("look at replication slot %s: %w", r.slot, err)
		case !physical:
			return fmt.Errorf("%w: replication slot %s is not physical", backup.ErrUsage, r.slot)
		case active && r.o.Slot != "":
			return fmt.Errorf("replication slot %s: another receiver has it: %w", r.slot, backup.ErrInUse)
		case kept == nil && status != "lost": // made by others, and it keeps nothing yet
			r.server.Kept = r.server.Flushed
			return nil
		case status == "lost":
			return backup.Hint(fmt.Errorf("replication slot %s was invalidated (max_slot_wal_keep_size): %w", r.slot, ErrLost),
				"some WAL was never received: take a new backup, and run `cleancut wal stream --skip-lost`, which drops the slot and leaves the gap")
		}
		r.server.Kept = backup.LSN(*kept)
		return nil
	}
	return fmt.Errorf("replication slot %s is gone as soon as it was made: %w", r.slot, backup.ErrNotFound)
}

func temporarySlot() string { return "cleancut_" + strings.ToLower(rand.Text()) }

// DropSlot drops a slot that nobody uses; it is not there: nil.
func DropSlot(ctx context.Context, t postgres.Target, name string) error {
	conn, err := postgres.Connect(ctx, t)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if _, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1 AND slot_type = 'physical'`, name); err != nil {
		return fmt.Errorf("drop replication slot %s: %w", name, err)
	}
	return nil
}
