// Package cut takes the snapshots of all volumes of a topology at one instant.
//
//	freeze: Prepare → Arm → syncfs until quick → flush LSN → Freeze → Take → Thaw → check the set
//	group:  Prepare → flush LSN → Take → check the set
//	still: Prepare → Take → check the set; whoever calls has seen to it that nobody can write
//	bracketed: the one or the other for one filesystem after the other; whoever calls has the server in backup mode meanwhile
//
// What always holds when Run returns, also with an error or when ctx ends:
// nothing is frozen. Snapshots of a failed cut are left to the caller, who
// finds them by their tags. While anything is frozen this package writes
// nothing, logs nothing and starts no process.
package cut

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/provider"
)

// Options says what to cut and how.
type Options struct {
	ID       backup.ID
	Cluster  string
	Topology backup.Topology
	Mode     backup.Mode // auto, group, freeze or bracketed; still for golden images, none only for the drill
	// Skew is for the drill: the time between two members, in mode bracketed
	// between two filesystems. Backward begins with the last of them.
	Skew     time.Duration
	Backward bool
	Deadline time.Duration // of the watchdog, from the first FIFREEZE
	Quick    time.Duration // a syncfs round this short ends the rounds
	Rounds   int           // at most so many
	Watchdog []string      // command that runs host.Watch
	// FlushedLSN returns the end of a WAL record that is flushed now.
	FlushedLSN func(ctx context.Context) (backup.LSN, error)
	// BeforeFreeze runs when all is prepared and armed, before the first syncfs
	// or, where nothing is frozen, before the snapshots; it may be nil.
	BeforeFreeze func(ctx context.Context) error

	why error // auto chose the freeze
}

// Provider is the part of provider.Provider that a cut needs.
type Provider interface {
	Prepare(ctx context.Context, set provider.Set) (provider.Cut, error)
}

// Result is what was achieved.
type Result struct {
	Cut       backup.Cut
	Snapshots []backup.Snapshot
}

// Run takes the cut. Errors that mean "taken, but not at one instant" wrap
// backup.ErrVoid.
//
// Mode auto is the provider's group where it has one for these volumes, which
// does not touch production, else the freeze. Only ErrUnsupported says that
// there is no group; a permission that is missing, or a limit, must not turn
// into a freeze that nobody asked for.
func Run(ctx context.Context, p Provider, o Options) (res Result, err error) {
	members := o.Topology.Members()
	if o.Mode == backup.ModeBracketed {
		res, err = bracketed(ctx, p, o)
	} else {
		res, err = auto(ctx, p, o, unit{filesystems: o.Topology.FreezeOrder(), members: members})
	}
	if err != nil {
		return res, err
	}
	slices.SortFunc(res.Snapshots, func(a, b backup.Snapshot) int { return a.Member - b.Member })
	return res, backup.CheckSet(members, res.Snapshots)
}

// unit is what is cut at one instant.
type unit struct {
	filesystems []int // in the order in which they are frozen
	members     []backup.Member
}

// bracketed cuts filesystem after filesystem, each at an instant of its own.
// Those that share a volume are one.
func bracketed(ctx context.Context, p Provider, o Options) (res Result, err error) {
	skew := o.Skew
	o.Mode, o.Skew = backup.ModeAuto, 0
	all := backup.Cut{Achieved: backup.Bracketed, How: backup.ModeBracketed, Deadline: o.Deadline}
	units := o.Topology.Units()
	if o.Backward {
		slices.Reverse(units)
	}
	for i, filesystems := range units {
		if i > 0 && skew > 0 {
			if err := wait(ctx, skew); err != nil {
				return res, err
			}
		}
		one, err := auto(ctx, p, o, unit{filesystems, o.Topology.MembersOf(filesystems)})
		if err != nil {
			return res, err
		}
		res.Snapshots = append(res.Snapshots, one.Snapshots...)
		all.SyncRounds, all.Frozen = append(all.SyncRounds, one.Cut.SyncRounds...), append(all.Frozen, one.Cut.Frozen...)
		all.FreezeMS = max(all.FreezeMS, one.Cut.FreezeMS)
		for _, n := range one.Cut.Notes {
			if !slices.Contains(all.Notes, n) {
				all.Notes = append(all.Notes, n)
			}
		}
		o.BeforeFreeze = nil
	}
	first, lastRequest := res.Snapshots[0].Requested, res.Snapshots[0].Requested
	for _, s := range res.Snapshots {
		first, lastRequest = earlier(first, s.Requested), later(lastRequest, s.Requested)
	}
	all.SpreadMS = ms(lastRequest.Sub(first))
	res.Cut = all
	return res, nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// auto takes the group where that is asked for or chosen, else freezes.
func auto(ctx context.Context, p Provider, o Options, u unit) (Result, error) {
	if o.Mode != backup.ModeAuto {
		return run(ctx, p, o, u)
	}
	if before := o.BeforeFreeze; before != nil {
		once := sync.OnceValue(func() error { return before(ctx) })
		o.BeforeFreeze = func(context.Context) error { return once() }
	}
	o.Mode = backup.ModeGroup
	res, err := run(ctx, p, o, u)
	if errors.Is(err, backup.ErrUnsupported) { // said before anything was taken
		o.Mode, o.why = backup.ModeFreeze, err
		return run(ctx, p, o, u)
	}
	return res, err
}

func run(ctx context.Context, p Provider, o Options, u unit) (res Result, err error) {
	if o.Backward {
		u.members = slices.Clone(u.members)
		slices.Reverse(u.members)
	}
	set := provider.Set{Skew: o.Skew, Group: o.Mode == backup.ModeGroup}
	total := len(o.Topology.Members())
	for _, m := range u.members {
		set.Members = append(set.Members, provider.Member{Volume: m.Volume.ID, Tags: backup.SnapshotTags(o.ID, o.Cluster, m, total)})
	}
	prepared, err := p.Prepare(ctx, set)
	if err != nil {
		return res, fmt.Errorf("prepare the snapshots: %w", err)
	}
	defer func() { err = errors.Join(err, prepared.Close()) }()
	if est := prepared.Estimate(); o.Mode == backup.ModeFreeze && est > o.Deadline/2 {
		return res, backup.Hint(fmt.Errorf("the snapshots are expected to take %s inside the freeze, more than half of the deadline of %s: %w",
			est.Round(time.Millisecond), o.Deadline, backup.ErrUnsupported),
			"the volumes are badly fragmented (`cleancut doctor` shows how): move the cluster to fresh volumes, or allow a longer stop with --deadline")
	}
	taken, res, err := take(ctx, prepared, o, u)
	if err != nil {
		return res, err
	}
	for i, t := range taken.Members {
		res.Snapshots = append(res.Snapshots, backup.Snapshot{ID: t.Snapshot, Volume: t.Volume, Member: u.members[min(i, len(u.members)-1)].Index,
			Requested: t.Requested, Responded: t.Responded})
	}
	if len(taken.Members) != len(u.members) {
		return res, fmt.Errorf("%d snapshots of %d members: %w", len(taken.Members), len(u.members), backup.ErrVoid)
	}
	return res, judge(&res, o)
}

func take(ctx context.Context, prepared provider.Cut, o Options, u unit) (provider.Taken, Result, error) {
	switch o.Mode {
	case backup.ModeGroup:
		return takeGroup(ctx, prepared, o)
	case backup.ModeFreeze:
		return takeFrozen(ctx, prepared, o, u)
	case backup.ModeStill:
		return takeBare(ctx, prepared, o, backup.Atomic)
	case backup.ModeNone:
		return takeBare(ctx, prepared, o, backup.Torn)
	}
	return provider.Taken{}, Result{}, fmt.Errorf("mode %s: %w", o.Mode, backup.ErrNotThere)
}

// takeBare cuts without any protection. Of volumes that nobody writes to that is
// one instant; else it is the drill's way to show what that does.
func takeBare(ctx context.Context, prepared provider.Cut, o Options, achieved backup.Consistency) (provider.Taken, Result, error) {
	res := Result{Cut: backup.Cut{Achieved: achieved, How: o.Mode}}
	if o.BeforeFreeze != nil {
		if err := o.BeforeFreeze(ctx); err != nil {
			return provider.Taken{}, res, err
		}
	}
	lsn, err := o.FlushedLSN(ctx)
	if err != nil {
		return provider.Taken{}, res, err
	}
	res.Cut.FlushLSN = lsn
	taken, err := prepared.Take(ctx)
	return taken, res, err
}

// takeGroup lets the provider cut all members at one instant. Nothing is
// frozen, synced or asked of the kernel: to production it is as if the power
// had failed once, on the copy.
func takeGroup(ctx context.Context, prepared provider.Cut, o Options) (taken provider.Taken, res Result, err error) {
	res.Cut = backup.Cut{Achieved: backup.Torn, How: backup.ModeGroup}
	if o.BeforeFreeze != nil {
		if err := o.BeforeFreeze(ctx); err != nil {
			return taken, res, err
		}
	}
	if res.Cut.FlushLSN, err = o.FlushedLSN(ctx); err != nil {
		return taken, res, fmt.Errorf("note the flushed LSN: %w", err)
	}
	if taken, err = prepared.Take(ctx); err != nil {
		return taken, res, err
	}
	if !taken.Atomic {
		return taken, res, fmt.Errorf("the provider does not vouch for one instant over all members: %w", backup.ErrVoid)
	}
	res.Cut.Achieved = backup.Atomic
	return taken, res, nil
}

func takeFrozen(ctx context.Context, prepared provider.Cut, o Options, u unit) (taken provider.Taken, res Result, err error) {
	res.Cut = backup.Cut{Achieved: backup.Torn, How: backup.ModeFreeze, Deadline: o.Deadline}
	if o.why != nil && !local(o.Topology) { // that the local provider has no group is no news
		res.Cut.Notes = append(res.Cut.Notes, fmt.Sprintf("frozen, because there is no group: %v", o.why))
	}
	var mounts []string
	for _, i := range u.filesystems {
		mounts = append(mounts, o.Topology.Filesystems[i].Mountpoint)
	}
	freezer, err := host.Arm(ctx, o.Watchdog, mounts, o.Deadline)
	if err != nil {
		return taken, res, err
	}
	defer func() { err = errors.Join(err, freezer.Close()) }()
	if note := freezer.Note(); note != "" {
		res.Cut.Notes = append(res.Cut.Notes, note)
	}
	if o.BeforeFreeze != nil {
		if err := o.BeforeFreeze(ctx); err != nil {
			return taken, res, err
		}
	}
	if res.Cut.SyncRounds, err = syncUntilQuick(ctx, freezer, o); err != nil {
		return taken, res, err
	}
	if res.Cut.FlushLSN, err = o.FlushedLSN(ctx); err != nil {
		return taken, res, fmt.Errorf("note the flushed LSN: %w", err)
	}
	if err := freezer.Freeze(ctx); err != nil {
		return taken, res, err
	}
	taken, err = prepared.Take(ctx)
	records, thawErr := freezer.Thaw() // at once, whatever Take said
	if err := errors.Join(err, thawErr); err != nil {
		return taken, res, err
	}
	res.Cut.Frozen = records
	res.Cut.Achieved = backup.Atomic
	return taken, res, nil
}

// syncUntilQuick writes out what is dirty before the freeze, which would
// otherwise do it with every writer stopped. Each round leaves less: what was
// dirtied while the round before ran.
func syncUntilQuick(ctx context.Context, f *host.Freezer, o Options) ([]float64, error) {
	var rounds []float64
	for range o.Rounds {
		took, err := f.Sync(ctx)
		if err != nil {
			return rounds, err
		}
		rounds = append(rounds, ms(took))
		if took <= o.Quick {
			return rounds, nil
		}
	}
	return rounds, backup.Hint(fmt.Errorf("the dirty data did not get small: %d rounds of syncfs, the last of %.0f ms, none within %s", len(rounds), rounds[len(rounds)-1], o.Quick),
		"production writes faster than its volumes take it: choose a quieter moment, or accept a longer stop with --max-sync")
}

// judge checks the order of times: every snapshot must lie inside the interval
// in which every filesystem was held.
func judge(res *Result, o Options) error {
	first, last := res.Snapshots[0].Requested, res.Snapshots[0].Responded
	lastRequest := first
	for _, s := range res.Snapshots {
		first, lastRequest, last = earlier(first, s.Requested), later(lastRequest, s.Requested), later(last, s.Responded)
	}
	res.Cut.SpreadMS = ms(lastRequest.Sub(first))
	if o.Mode != backup.ModeFreeze {
		return nil
	}
	called, thawed := res.Cut.Frozen[0].Called, res.Cut.Frozen[0].Thawed
	for _, f := range res.Cut.Frozen {
		if f.Held.After(first) || f.Thawed.Before(last) {
			res.Cut.Achieved = backup.Torn
			return fmt.Errorf("a snapshot lies outside the freeze of %s: %w", f.Mountpoint, backup.ErrVoid)
		}
		called, thawed = earlier(called, f.Called), later(thawed, f.Thawed)
	}
	res.Cut.FreezeMS = ms(thawed.Sub(called))
	return nil
}

func local(t backup.Topology) bool {
	members := t.Members()
	return len(members) > 0 && members[0].Volume.Provider == "local"
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
