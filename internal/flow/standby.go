package flow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/restore"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

// StandbyOptions says what to make a standby of and whom it follows.
type StandbyOptions struct {
	ID      backup.ID
	Root    string // folder of the copy
	Primary postgres.Target
	Slot    string // "": one named by the copy
	Listen  string // ADDRESS:PORT for clients with passwords; "": only the socket
}

// seed is a standby that can be made.
type seed struct {
	options  StandbyOptions
	conninfo string
	password string
	slot     string
	name     string
	primary  replication.Primary
	hold     wal.Segment // the slot is to keep everything from here on
	archive  *wal.System // the catalog has what lies before; nil: it is not needed
	forks    backup.LSN  // where the primary left the backup's timeline; 0: it has not
}

// How long a server may take where what is to be done goes on without it: a
// primary to answer and to give up a slot, the standby's own to answer.
const (
	primaryPatience = 5 * time.Second
	slotPatience    = 40 * time.Second
	standbyPatience = 30 * time.Second
)

// Standby seeds a warm standby from a backup:
//
//	primary looked at → slot → Restore, with standby.signal → it streams
//
// The WAL that it needs after the backup's own comes from the primary or, where
// that has it no longer, from the catalog, which this call serves until the
// standby streams. What can give it neither is refused before anything is made.
// On an error nothing is left, or the error wraps backup.ErrLeft.
func (f *Flow) Standby(ctx context.Context, o StandbyOptions) (s StandbyStatus, release func(), err error) {
	r, release, err := f.Restore(ctx, RestoreOptions{ID: o.ID, Root: o.Root, Purpose: backup.ForStandby, standby: &o})
	if err != nil {
		return s, nil, err
	}
	return f.status(ctx, r.Copy), release, nil
}

// planStandby looks at the primary and refuses what could not follow it. It
// makes nothing.
func (f *Flow) planStandby(ctx context.Context, m backup.Manifest, o *StandbyOptions, id backup.ID) (*seed, error) {
	if o == nil {
		return nil, nil
	}
	s := &seed{options: *o, slot: o.Slot, name: "cleancut_standby_" + strings.ToLower(strings.ReplaceAll(string(id), "-", "_"))}
	if s.slot == "" {
		s.slot = s.name
	}
	if err := errors.Join(replication.CheckSlot(s.slot), postgres.Standby{Listen: o.Listen}.Check()); err != nil {
		return nil, err
	}
	var err error
	if s.conninfo, s.password, err = postgres.Conninfo(o.Primary, s.name); err != nil {
		return nil, err
	}
	f.tell("primary", "looking")
	if s.primary, err = replication.Look(ctx, o.Primary); err != nil {
		return nil, err
	}
	if _, err := replication.LookAtSlot(ctx, o.Primary, s.slot, s.name); err == nil {
		return nil, backup.Hint(fmt.Errorf("replication slot %s is there already: %w", s.slot, backup.ErrExists), "choose another name with --slot")
	} else if !errors.Is(err, backup.ErrNotFound) {
		return nil, err
	}
	if err := s.agrees(m); err != nil {
		return nil, err
	}
	return s, f.bridge(ctx, m, s)
}

// agrees compares the primary with the backup: what is in the image must be
// WAL that the primary has written.
func (s *seed) agrees(m backup.Manifest) error {
	p, at, timeline := s.primary, m.Cut.FlushLSN, wal.Timeline(m.Server.Timeline)
	refuse := func(hint, format string, a ...any) error {
		return backup.Hint(fmt.Errorf("standby of backup %s: "+format, append([]any{m.ID}, a...)...), hint)
	}
	newer := "take a backup of the primary as it is now"
	begin, known := p.History.Begin(timeline)
	end, ended := p.History.End(timeline)
	switch {
	case p.System.Identifier != m.Server.SystemIdentifier:
		return refuse("see --primary", "the primary is of system %d, the backup of %d: %w", p.System.Identifier, m.Server.SystemIdentifier, backup.ErrNotOurs)
	case p.Version/10000 != m.Server.Major():
		return refuse(newer, "the primary is PostgreSQL %d, the backup of %d: %w", p.Version/10000, m.Server.Major(), backup.ErrUnsupported)
	case p.Standby:
		return refuse("name its primary with --primary", "the server is a standby itself: %w", backup.ErrUnsupported)
	case !known || at < begin || ended && end < at:
		return refuse(newer, "it is at %s on timeline %d, and the history of the primary, which is on timeline %d, does not pass there: %w",
			at, timeline, p.History.Timeline, backup.ErrUnsupported)
	case p.Flushed < at:
		return refuse(newer, "it is at %s, and the primary only at %s: it was set back since, or is another server: %w", at, p.Flushed, backup.ErrUnsupported)
	case postgres.Synchronous(p.Sync, s.name):
		return refuse("name the synchronous standbys in synchronous_standby_names instead of *; a copy must not acknowledge production's commits",
			"synchronous_standby_names = '%s' of the primary counts every standby in: %w", p.Sync, backup.ErrUnsupported)
	}
	if ended {
		s.forks = end
	}
	return nil
}

// bridge finds where the WAL comes from. The standby asks for the segment that
// the image's own WAL ends in, which is not before the one of the cut's
// flushed position.
func (f *Flow) bridge(ctx context.Context, m backup.Manifest, s *seed) error {
	h, size := s.primary.History, s.primary.System.SegmentSize
	s.hold = h.Path(wal.At(0, m.Cut.FlushLSN, size).Number, size)
	lost := replication.Has(ctx, s.options.Primary, s.hold, size)
	if !errors.Is(lost, replication.ErrLost) {
		return lost
	}
	refuse := func(why string) error {
		return backup.Hint(fmt.Errorf("standby of backup %s: the primary has the WAL from %s on no longer, and %s: %w: %w", m.ID, m.Cut.FlushLSN, why, backup.ErrNotFound, lost),
			"take a newer backup; a slot of a running `cleancut wal stream`, or wal_keep_size, lets older ones be used")
	}
	list, err := f.ListWAL(ctx)
	switch {
	case err != nil:
		return err
	case list.System == nil:
		return refuse("the catalog has no WAL of cluster " + f.Cluster)
	case *list.System != s.primary.System:
		return refuse("the catalog has WAL of another system")
	}
	for _, t := range list.Timelines {
		if t.Timeline > h.Timeline {
			return refuse(fmt.Sprintf("the catalog has WAL of timeline %d, the primary is on %d: is it the old primary after a failover?", t.Timeline, h.Timeline))
		}
	}
	last, ok := list.set.Follow(h, s.hold.Number, size)
	if !ok {
		return refuse("the catalog does not have it either")
	}
	kept := wal.At(0, s.primary.Kept, size).Number
	s.hold = h.Path(min(last.Number+1, max(kept, s.hold.Number)), size)
	if err := replication.Has(ctx, s.options.Primary, s.hold, size); errors.Is(err, replication.ErrLost) {
		return refuse(fmt.Sprintf("that of the catalog ends at %s, before what the primary has", last.End(size)))
	} else if err != nil {
		return err
	}
	s.archive = list.System
	f.tell("wal", fmt.Sprintf("from the catalog up to %s, then from the primary", s.hold.Start(size)))
	return nil
}

// record is what the ledger holds of the standby before anything is made.
func (s *seed) record(c backup.Copy) *backup.Standby {
	if s == nil {
		return nil
	}
	if s.password != "" {
		s.conninfo += " " + postgres.PassfileKeyword(c.Root)
	}
	return &backup.Standby{Primary: s.conninfo, System: s.primary.System.Identifier, Slot: s.slot, Name: s.name, Listen: s.options.Listen}
}

// standby is what the restore does differently.
func (f *Flow) standby(s *seed, c backup.Copy) *restore.Standby {
	if s == nil {
		return nil
	}
	out := &restore.Standby{Password: s.password, Least: s.primary.Settings, Forks: s.forks, Was: s.primary.Flushed, Command: f.askWhoServes}
	out.Hold = func(ctx context.Context) error {
		err := replication.Hold(ctx, s.options.Primary, s.slot, s.hold, s.primary.System.SegmentSize)
		if errors.Is(err, backup.ErrExists) {
			c.Standby.Slot = "" // it is not ours to drop
		}
		return err
	}
	if s.archive != nil {
		out.Serve = f.serveWAL(*s.archive, c.ID, nil)
	}
	return out
}

// askWhoServes is a standby's restore_command. It stays for good: while nobody
// serves WAL there is no socket, and it says "not there", which is what a
// standby without an archive hears.
func (f *Flow) askWhoServes(socket string) string {
	return strings.Join([]string{"if test -S", shellWord(socket), "; then exec", shellWord(f.Program), "wal fetch --standby --from", shellWord(socket), "%f", `"%p"; else exit 1; fi`}, " ")
}

// takeDown removes a copy, and a standby's slot on its primary. Where that
// does not answer the rest is removed all the same; the ledger stays, so that
// it can be tried again, and the error wraps backup.ErrLeft and names the slot.
func (f *Flow) takeDown(ctx context.Context, c backup.Copy) error {
	var left error
	if c.Standby != nil && c.Standby.Slot != "" {
		if err := postgres.Kill(ctx, c.Root); err != nil { // else it goes on receiving through the slot
			return fmt.Errorf("%w: %w", backup.ErrLeft, err)
		}
		left = f.releaseSlot(ctx, c)
	}
	if err := restore.Undo(ctx, f.Provider, c); err != nil {
		return errors.Join(err, left)
	}
	if err := os.RemoveAll(f.spool(c.ID)); err != nil { // of a process that was killed
		return errors.Join(fmt.Errorf("served WAL: %w: %w", backup.ErrLeft, err), left)
	}
	if left != nil {
		return left
	}
	return f.State.RemoveCopy(c.ID)
}

// releaseSlot drops the slot and notes that.
func (f *Flow) releaseSlot(ctx context.Context, c backup.Copy) error {
	s := c.Standby
	waiting, cancel := context.WithTimeout(ctx, slotPatience)
	defer cancel()
	if err := replication.Release(waiting, postgres.Target{DSN: s.Primary}, s.Slot, s.System); err != nil {
		return backup.Hint(fmt.Errorf("replication slot %s on the primary (%s): %w: %w", s.Slot, s.Primary, backup.ErrLeft, err),
			"it lets the primary keep WAL for ever: run this again when the primary answers, or drop it there (SELECT pg_drop_replication_slot('"+s.Slot+"')) and then give up on it here with `cleancut standby remove --leave-slot "+c.Root+"`")
	}
	s.Slot = ""
	return f.State.PutCopy(c)
}
