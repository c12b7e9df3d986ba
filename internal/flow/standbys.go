package flow

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/restore"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

// The states of a standby.
const (
	Streaming  = "streaming"   // it receives, and is at most a segment behind
	CatchingUp = "catching up" // it receives or replays, and is further behind
	Broken     = "broken"      // it does not follow; Why says why
	Promoted   = "promoted"    // it is a primary of its own
)

// StandbyStatus is what there is to know of a standby. What could not be asked
// is nil.
type StandbyStatus struct {
	ID            backup.ID     `json:"id"` // of the copy
	Backup        backup.ID     `json:"backup"`
	Root          string        `json:"root"`
	DataDirectory string        `json:"data_directory"`
	SocketDir     string        `json:"socket_dir"`
	Port          int           `json:"port"`
	Superuser     string        `json:"superuser"`
	Listen        string        `json:"listen,omitempty"`
	Major         int           `json:"major"`
	Primary       string        `json:"primary"` // connection string, without a password
	Slot          string        `json:"slot"`    // "": it is dropped
	Name          string        `json:"name"`    // application_name
	State         string        `json:"state"`
	Why           string        `json:"why,omitempty"`
	Streaming     bool          `json:"streaming"`
	Timeline      uint32        `json:"timeline"`     // 0: its server does not answer
	Replayed      backup.LSN    `json:"replayed_lsn"` // what lies before it can be seen on the standby
	Received      backup.LSN    `json:"received_lsn"` // by the receiver that runs now
	PrimaryLSN    *backup.LSN   `json:"primary_lsn"`  // the end of the primary's WAL
	LagBytes      *backup.Bytes `json:"lag_bytes"`    // from Replayed to PrimaryLSN
	LagSeconds    *float64      `json:"lag_seconds"`  // since the last commit that was replayed; 0 if nothing is missing
	SlotStatus    string        `json:"slot_status"`  // wal_status of the primary, or missing, or unknown
	HeldBack      *backup.Bytes `json:"held_bytes"`   // WAL that the primary keeps for it
	Sync          string        `json:"sync_state"`   // as the primary sees it: it must be async
}

// Standbys returns the status of every standby of this host.
func (f *Flow) Standbys(ctx context.Context) ([]StandbyStatus, error) {
	copies, err := f.State.Copies()
	out := []StandbyStatus{}
	for _, c := range copies {
		if c.Standby != nil && c.Cluster == f.Cluster {
			out = append(out, f.status(ctx, c))
		}
	}
	return out, err
}

// StandbyStatus returns the status of the standby at root.
func (f *Flow) StandbyStatus(ctx context.Context, root string) (StandbyStatus, error) {
	c, err := f.standbyAt(root)
	if err != nil {
		return StandbyStatus{}, err
	}
	return f.status(ctx, c), ctx.Err()
}

// standbyAt finds a standby and does not lock it.
func (f *Flow) standbyAt(root string) (backup.Copy, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return backup.Copy{}, err
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real
	}
	copies, err := f.State.Copies()
	for _, c := range copies {
		if c.Root == abs && c.Standby != nil {
			return c, nil
		}
	}
	return backup.Copy{}, errors.Join(backup.Hint(fmt.Errorf("no standby at %s: %w", abs, backup.ErrNotFound), "`cleancut standby list` shows those of this host"), err)
}

// status asks the standby and its primary. That one of them does not answer is
// part of the answer.
func (f *Flow) status(ctx context.Context, c backup.Copy) StandbyStatus {
	s := StandbyStatus{ID: c.ID, Backup: c.Backup, Root: c.Root, DataDirectory: c.DataDirectory, SocketDir: c.SocketDir, Port: c.Port, Superuser: c.Superuser, Listen: c.Standby.Listen,
		Major: c.Major, Primary: c.Standby.Primary, Slot: c.Standby.Slot, Name: c.Standby.Name, SlotStatus: "unknown"}
	slot, asked := f.askPrimary(ctx, c)
	switch {
	case asked == nil:
		s.SlotStatus = slot.Status
	case errors.Is(asked, backup.ErrNotFound):
		s.SlotStatus = "missing"
	}
	if slot.End != 0 {
		s.PrimaryLSN, s.Sync = &slot.End, slot.Sync
	}
	if slot.Kept != 0 {
		s.HeldBack = &slot.Behind
	}
	standby, err := f.askStandby(ctx, c)
	s.Timeline, s.Replayed, s.Received, s.Streaming = standby.Timeline, standby.Replayed, standby.Received, standby.Streaming
	if s.PrimaryLSN == nil && standby.Ahead != 0 {
		s.PrimaryLSN = &standby.Ahead
	}
	if err == nil && !standby.InRecovery {
		s.State = Promoted
		return s
	}
	if s.PrimaryLSN != nil && s.Replayed != 0 {
		lag, seconds := backup.Bytes(max(*s.PrimaryLSN, s.Replayed)-s.Replayed), 0.0
		if lag > 0 && !standby.LastCommit.IsZero() {
			seconds = time.Since(standby.LastCommit).Seconds()
		}
		s.LagBytes, s.LagSeconds = &lag, &seconds
	}
	s.State, s.Why = judge(s, standby, err, asked)
	if tail := postgres.LogTail(c.Root); s.State == Broken && !s.Streaming && tail != "" {
		s.Why += "; its log says: " + tail
	}
	return s
}

// judge says in which state a standby in recovery is. down is why its server
// does not answer, asked what the primary answered.
func judge(s StandbyStatus, x postgres.Following, down, asked error) (state, why string) {
	switch {
	case down != nil:
		return Broken, down.Error()
	case asked != nil && !errors.Is(asked, backup.ErrNotFound) && !x.Streaming:
		return Broken, "the primary does not answer: " + asked.Error()
	case s.SlotStatus == "lost":
		return Broken, "its slot was invalidated (max_slot_wal_keep_size): `cleancut standby start` makes it anew, if the catalog has what is missing"
	case x.Paused:
		return Broken, "replay is paused: a setting of the primary has grown (`cleancut standby start` takes it over), or somebody paused it"
	case s.Slot != "" && s.SlotStatus == "missing":
		return Broken, "its slot is gone from the primary: `cleancut standby start` makes it anew, if what is missing is to be had"
	case !x.Streaming:
		return Broken, "it receives nothing"
	case s.Sync == "sync" || s.Sync == "quorum" || s.Sync == "potential":
		return Broken, "the primary counts it among its synchronous standbys: take it out of synchronous_standby_names"
	case s.LagBytes != nil && *s.LagBytes > 16<<20:
		return CatchingUp, ""
	}
	return Streaming, ""
}

func (f *Flow) askPrimary(ctx context.Context, c backup.Copy) (replication.Slot, error) {
	ctx, cancel := context.WithTimeout(ctx, primaryPatience)
	defer cancel()
	s, err := replication.LookAtSlot(ctx, postgres.Target{DSN: c.Standby.Primary}, c.Standby.Slot, c.Standby.Name)
	if (err == nil || errors.Is(err, backup.ErrNotFound)) && s.System != c.Standby.System {
		return replication.Slot{}, fmt.Errorf("the server is of system %d, not of %d: %w", s.System, c.Standby.System, backup.ErrNotOurs)
	}
	return s, err
}

func (f *Flow) askStandby(ctx context.Context, c backup.Copy) (postgres.Following, error) {
	ctx, cancel := context.WithTimeout(ctx, standbyPatience)
	defer cancel()
	i, err := postgres.Open(ctx, c.Root)
	if err != nil {
		return postgres.Following{}, err
	}
	return i.Following(ctx)
}

// Promotion is a standby that has become a primary of its own.
type Promotion struct {
	Root     string     `json:"root"`
	Timeline uint32     `json:"timeline"`
	From     backup.LSN `json:"replayed_lsn"` // the end of what came from the primary
	Slot     string     `json:"slot_left"`    // that could not be dropped; "": none
	Why      string     `json:"why,omitempty"`
}

// PromoteStandby promotes the standby at root and returns when it is out of
// recovery. Its slot on the primary is dropped; where that does not answer the
// promotion is good all the same, and says which slot is left. Called again it
// says the same.
func (f *Flow) PromoteStandby(ctx context.Context, root string) (p Promotion, err error) {
	c, i, release, err := f.openStandby(ctx, root)
	if err != nil {
		return p, err
	}
	defer release()
	f.tell("promote", c.Root)
	if err := i.Promote(ctx); err != nil {
		return p, err
	}
	x, err := i.Following(ctx)
	if err != nil {
		return p, err
	}
	p = Promotion{Root: c.Root, Timeline: x.Timeline, From: x.Replayed}
	if c.Standby.Slot == "" {
		return p, nil
	}
	if err := f.releaseSlot(ctx, c); err != nil {
		p.Slot, p.Why = c.Standby.Slot, err.Error()
	}
	return p, nil
}

func (f *Flow) openStandby(ctx context.Context, root string) (c backup.Copy, i *postgres.Instance, release func(), err error) {
	if c, release, err = f.standingStandby(root); err != nil {
		return c, nil, nil, err
	}
	if i, err = postgres.Open(ctx, c.Root); err != nil {
		release()
		return c, nil, nil, backup.Hint(err, "start its server: cleancut standby start "+c.Root)
	}
	return c, i, release, nil
}

// standingStandby finds and locks a standby that is handed over.
func (f *Flow) standingStandby(root string) (backup.Copy, func(), error) {
	if _, err := f.standbyAt(root); err != nil {
		return backup.Copy{}, nil, err
	}
	c, release, err := f.standing(root)
	if err != nil {
		return c, nil, err
	}
	if !c.Ready {
		release()
		return c, nil, fmt.Errorf("standby %s at %s is half made or half removed: %w", c.ID, c.Root, backup.ErrIncomplete)
	}
	return c, release, nil
}

// StartStandby starts the server of the standby at root, if it does not run,
// or anew where it does and follows nothing. The WAL that the primary has no
// longer comes from the catalog, as far as that has it. One that follows, and
// one that was promoted and runs, is left alone. On an error the standby stays.
func (f *Flow) StartStandby(ctx context.Context, root string) (s StandbyStatus, err error) {
	c, release, err := f.standingStandby(root)
	if err != nil {
		return s, err
	}
	defer release()
	if s = f.status(ctx, c); s.State == Promoted || s.Streaming && s.State != Broken {
		return s, nil
	}
	entry, err := f.Catalog.Backup(ctx, c.Backup)
	if err != nil {
		return s, err
	}
	inst, err := postgres.FindInstallation(ctx, c.Major, f.BinDirs)
	if err != nil {
		return s, err
	}
	o := restore.Options{Manifest: entry.Manifest, Installation: inst, Progress: f.tell, Standby: &restore.Standby{Command: f.askWhoServes}}
	if s.PrimaryLSN != nil {
		o.Standby.Was = *s.PrimaryLSN
	}
	system, err := f.Catalog.WAL().System(ctx)
	if err == nil && system == (wal.System{Identifier: c.Standby.System, SegmentSize: entry.Manifest.Server.WALSegmentSize}) {
		o.Standby.Serve = f.serveWAL(system, c.ID, nil)
	}
	if err := postgres.Kill(ctx, c.Root); err != nil {
		return s, err
	}
	if s.SlotStatus == "lost" || s.SlotStatus == "missing" && s.Slot != "" {
		if err := f.renewSlot(ctx, entry.Manifest, c); err != nil {
			return s, fmt.Errorf("the standby at %s stays, and cannot follow: %w", c.Root, err)
		}
	}
	if _, err := restore.Follow(ctx, o, c); err != nil {
		return s, fmt.Errorf("the standby at %s stays, and does not follow: %w", c.Root, err)
	}
	return f.status(ctx, c), nil
}

// renewSlot makes the slot of a standby whose server is down anew, if the
// primary and the catalog have the WAL that it lacks.
func (f *Flow) renewSlot(ctx context.Context, m backup.Manifest, c backup.Copy) error {
	control, err := postgres.ReadControl(filepath.Join(c.DataDirectory, "global", "pg_control"))
	if err != nil {
		return err
	}
	m.Cut.FlushLSN, m.Server.Timeline = backup.LSN(control.MinRecoveryLSN), control.MinRecoveryTLI
	s := &seed{options: StandbyOptions{Primary: postgres.Target{DSN: c.Standby.Primary}}, slot: c.Standby.Slot, name: c.Standby.Name}
	if s.primary, err = replication.Look(ctx, s.options.Primary); err != nil {
		return err
	}
	if err := s.agrees(m); err != nil {
		return err
	}
	if err := f.bridge(ctx, m, s); err != nil {
		return err
	}
	if err := replication.Release(ctx, s.options.Primary, s.slot, c.Standby.System); err != nil {
		return err
	}
	return replication.Hold(ctx, s.options.Primary, s.slot, s.hold, s.primary.System.SegmentSize)
}

// RemoveStandby takes down the standby at root. leave gives up on its slot on
// the primary, which stays there if it is there.
func (f *Flow) RemoveStandby(ctx context.Context, root string, leave bool) (backup.Copy, error) {
	if _, err := f.standbyAt(root); err != nil {
		return backup.Copy{}, err
	}
	c, release, err := f.standing(root)
	if err != nil {
		return c, err
	}
	defer release()
	if leave {
		c.Standby.Slot = ""
		if err := f.State.PutCopy(c); err != nil {
			return c, err
		}
	}
	return c, f.undoCopy(ctx, c)
}
