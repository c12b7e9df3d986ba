package flow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/host"
	"cleancut/internal/provider"
)

// ActionKind says what sweep does about something it found.
type ActionKind string

// The kinds of action. Only lists something that is left alone, with the
// reason.
const (
	RemoveBackup ActionKind = "remove backup"
	FinishBackup ActionKind = "finish backup"
	EndIntent    ActionKind = "end intent"
	RemoveCopy   ActionKind = "remove copy"
	PutBack      ActionKind = "put ledger back"
	RemoveDump   ActionKind = "remove dump"
	OnlyList     ActionKind = "leave"
)

// Action is one line of a sweep's plan.
type Action struct {
	Kind   ActionKind    `json:"action"`
	Name   string        `json:"name"`
	Why    string        `json:"why"`
	Intent backup.Intent `json:"-"`
	Copy   backup.Copy   `json:"-"`

	Dump backup.DumpBegun `json:"-"`
}

// Facts is all that PlanSweep decides by.
type Facts struct {
	Host      string
	Cluster   string
	Intents   []backup.Intent
	Backups   map[backup.ID]BackupState // what the catalog holds of each
	Held      map[backup.ID]bool
	Copies    []backup.Copy          // ledgers of this host
	Lost      map[backup.ID]LostCopy // copies without a ledger, proved by what lies beside them
	Dumps     []backup.DumpBegun     // without a manifest
	Busy      map[string]bool        // locks that somebody holds
	Inventory provider.Inventory
}

// BackupState is what the catalog says of a backup.
type BackupState string

// The states. Taken is one whose cut was good and whose manifest is there, but
// whose snapshots were not yet seen to be complete. Doubtful is one whose records could not be read, or are damaged
// or newer than this program: it may be a good backup and is not swept.
const (
	Complete   BackupState = "complete"
	Taken      BackupState = "taken"
	Incomplete BackupState = "incomplete"
	Doubtful   BackupState = "doubtful"
)

// PlanSweep decides what is left over from a crash. It is pure. Nothing that a
// running process holds the lock of is touched, nothing of another host, and
// no snapshot merely because this catalog does not know it: the catalog given
// may be the wrong one.
func PlanSweep(x Facts) []Action {
	out := slices.Concat(planIntents(x), planCopies(x), planDumps(x))
	for id, n := range strangers(x) {
		out = append(out, Action{Kind: OnlyList, Name: "snapshots of backup " + string(id), Why: fmt.Sprintf("%d snapshots of cluster %s that this catalog does not know", n, x.Cluster)})
	}
	slices.SortStableFunc(out, func(a, b Action) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func planIntents(x Facts) []Action {
	var out []Action
	for _, i := range x.Intents {
		a := Action{Name: "backup " + string(i.ID), Intent: i}
		switch {
		case i.Host != x.Host:
			a.Kind, a.Why = OnlyList, "belongs to host "+i.Host+": run sweep there"
		case x.Busy[lockBackup(x.Cluster)]:
			a.Kind, a.Why = OnlyList, "a backup of this cluster is running"
		case i.Deletes && x.Held[i.ID] && x.Backups[i.ID] == Complete:
			a.Kind, a.Why = EndIntent, "it is held, and its deletion was interrupted before anything was gone"
		case i.Deletes:
			a.Kind, a.Why = RemoveBackup, "its deletion was interrupted"
		case x.Backups[i.ID] == Complete:
			a.Kind, a.Why = EndIntent, "it is complete, only its intent was left"
		case x.Backups[i.ID] == Taken:
			a.Kind, a.Why = FinishBackup, "its cut is good; it was interrupted while it waited for its snapshots"
		case x.Backups[i.ID] == Doubtful:
			a.Kind, a.Why = OnlyList, "its records cannot be read, so it may be a good backup: see `cleancut list`"
		default:
			a.Kind, a.Why = RemoveBackup, "it was interrupted before it was complete"
		}
		out = append(out, a)
	}
	return out
}

func planCopies(x Facts) []Action {
	var out []Action
	ledger := map[string]bool{}
	for _, c := range x.Copies {
		ledger[string(c.ID)] = true
		a := Action{Name: "copy " + string(c.ID), Copy: c}
		switch {
		case x.Busy[lockCopy(c.ID)]:
			a.Kind, a.Why = OnlyList, "in use by a running "+string(c.Purpose)
		case c.InService() && !hasVolume(c, x.Inventory):
			a.Kind, a.Why = OnlyList, "was production at "+c.DataDirectory+"; its volumes are gone"
		case c.InService():
			a.Kind, a.Why = OnlyList, "production at "+c.DataDirectory+", restored from backup "+string(c.Backup)+": never removed"
		case c.Stays() && c.Clone != nil:
			a.Kind, a.Why = OnlyList, "clone "+c.Clone.Name+" at "+c.Root+", meant to stay until "+c.Clone.Expires.UTC().Format(time.RFC3339)+" (then `cleancut clone reap` ends it; before, `cleancut clone destroy "+c.Clone.Name+"`)"
		case c.Stays():
			what := map[backup.Purpose]string{backup.ForRestore: "a restored copy", backup.ForStandby: "a standby"}[c.Purpose]
			a.Kind, a.Why = OnlyList, what+" at "+c.Root+", meant to stay (remove it with `cleancut restore --undo "+c.Root+"`)"
		default:
			a.Kind, a.Why = RemoveCopy, "its "+string(c.Purpose)+" or its removal was interrupted"
		}
		out = append(out, a)
	}
	for _, v := range x.Inventory.Volumes {
		id := v.Tags[backup.TagCopy]
		if id == "" || ledger[id] || v.Tags[backup.TagHost] != x.Host || v.Tags[backup.TagCluster] != x.Cluster {
			continue
		}
		ledger[id] = true
		c := backup.Copy{ID: backup.ID(id), Backup: backup.ID(v.Tags[backup.TagBackup]), Cluster: x.Cluster, Host: x.Host}
		a := Action{Kind: RemoveCopy, Name: "copy " + id, Copy: c, Why: "its volumes are here, and this host's state knows nothing of it"}
		if x.Busy[lockCopy(c.ID)] {
			a.Kind, a.Why = OnlyList, "it is being made or removed"
		} else if lost, ok := x.Lost[c.ID]; ok {
			a.Copy, a.Why = lost.Copy, "clone "+lost.Copy.Clone.Name+" at "+lost.Copy.Root+", whose ledger is lost"
			if lost.Used {
				a.Kind, a.Why = PutBack, a.Why+"; somebody uses it"
			}
		} else if name, ok := v.Tags[backup.TagStorage]; ok {
			a.Kind, a.Why = OnlyList, a.Why+"; but they were made to take production's place: if they are not that, `cleancut storage destroy "+name+"`"
		} else if v, ok := attachedOf(c, x.Inventory); ok {
			a.Kind, a.Why = OnlyList, a.Why+"; but volume "+string(v.ID)+" is attached as "+v.Attached+" (was the state folder lost? stop what uses it, detach it, sweep again)"
		}
		out = append(out, a)
	}
	return out
}

// attachedOf returns a volume of that copy that is in use somewhere.
func attachedOf(c backup.Copy, inv provider.Inventory) (provider.Volume, bool) {
	for _, v := range inv.Volumes {
		if v.Attached != "" && v.Tags[backup.TagCopy] == string(c.ID) {
			return v, true
		}
	}
	return provider.Volume{}, false
}

// hasVolume: a volume of that copy is there.
func hasVolume(c backup.Copy, inv provider.Inventory) bool {
	return slices.ContainsFunc(inv.Volumes, func(v provider.Volume) bool { return v.Tags[backup.TagCopy] == string(c.ID) })
}

func strangers(x Facts) map[backup.ID]int {
	intents := map[backup.ID]bool{}
	for _, i := range x.Intents {
		intents[i.ID] = true
	}
	out := map[backup.ID]int{}
	for _, s := range x.Inventory.Snapshots {
		id := backup.ID(s.Tags[backup.TagBackup])
		if s.Tags[backup.TagCluster] == x.Cluster && x.Backups[id] == "" && !intents[id] {
			out[id]++
		}
	}
	return out
}

// SweepFacts gathers what PlanSweep needs. The volumes are listed before the
// ledgers are read: a ledger is older than its volumes, so that none seems to
// lack one. Then come the locks: what is running is left alone, however far it
// gets meanwhile.
func (f *Flow) SweepFacts(ctx context.Context) (x Facts, err error) {
	x = Facts{Host: f.Host, Cluster: f.Cluster, Busy: map[string]bool{}, Backups: map[backup.ID]BackupState{}, Held: map[backup.ID]bool{}}
	if x.Inventory, err = f.Provider.List(ctx, nil); err != nil {
		return x, err
	}
	if x.Copies, err = f.State.Copies(); err != nil {
		return x, err
	}
	if x.Lost, err = f.lost(ctx, x.Inventory, x.Copies); err != nil {
		return x, err
	}
	locks := []string{lockBackup(f.Cluster)}
	for _, c := range x.Copies {
		locks = append(locks, lockCopy(c.ID))
	}
	for id := range x.Lost {
		locks = append(locks, lockCopy(id))
	}
	for _, name := range locks {
		release, err := f.State.Lock(name)
		if errors.Is(err, backup.ErrInUse) {
			x.Busy[name] = true
			continue
		}
		if err != nil {
			return x, err
		}
		release()
	}
	entries, err := f.Catalog.Backups(ctx)
	if errors.Is(err, backup.ErrNotFound) { // no catalog yet: nothing was ever backed up to it
		entries, err = nil, nil
	} else if err == nil {
		x.Intents, err = f.Catalog.Intents(ctx)
	}
	if err != nil {
		return x, err
	}
	if err := f.dumpFacts(ctx, &x, entries); err != nil {
		return x, err
	}
	for _, e := range entries {
		x.Backups[e.ID] = stateOf(e)
		x.Held[e.ID] = e.Held(time.Now()) != ""
	}
	return x, nil
}

func stateOf(e catalog.Entry) BackupState {
	switch {
	case e.Err == nil && e.Complete != nil:
		return Complete
	case errors.Is(e.Err, backup.ErrIncomplete) && e.Digest != "":
		return Taken
	case e.Err == nil || errors.Is(e.Err, backup.ErrIncomplete):
		return Incomplete
	}
	return Doubtful
}

// halfWritten is the age from which a temporary file in the catalog has no
// writer any more.
const halfWritten = 24 * time.Hour

// Sweep applies a plan. It takes the lock of what it removes, so that a plan
// that has grown old does no harm.
func (f *Flow) Sweep(ctx context.Context, plan []Action) error {
	var errs []error
	if _, err := f.Catalog.Tidy(ctx, halfWritten); err != nil {
		errs = append(errs, fmt.Errorf("half-written objects of the catalog: %w", err))
	}
	if err := f.sweepFolders(ctx); err != nil {
		errs = append(errs, err)
	}
	for _, a := range plan {
		if a.Kind != OnlyList {
			f.tell("sweep", string(a.Kind)+": "+a.Name)
		}
		if err := f.sweepOne(ctx, a); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a.Name, err))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %w", backup.ErrLeft, errors.Join(errs...))
	}
	return nil
}

func (f *Flow) sweepOne(ctx context.Context, a Action) error {
	name := lockBackup(f.Cluster)
	switch a.Kind {
	case RemoveCopy, PutBack:
		name = lockCopy(a.Copy.ID)
	case RemoveDump:
		name = lockDump(a.Dump)
	}
	if a.Kind == OnlyList {
		return nil
	}
	release, err := f.State.Lock(name)
	if err != nil {
		return err
	}
	defer release()
	switch a.Kind {
	case RemoveBackup:
		e, err := f.Catalog.Backup(ctx, a.Intent.ID)
		if !a.Intent.Deletes && err == nil && stateOf(e) == Complete {
			return fmt.Errorf("it has become complete since the plan was made: %w", backup.ErrInUse)
		}
		if err == nil {
			if err := heldError(a.Intent.ID, e.Held(time.Now())); err != nil {
				return err
			}
		}
		return f.removeBackup(ctx, a.Intent)
	case FinishBackup:
		return f.resumeBackup(ctx, a.Intent)
	case EndIntent:
		return f.Catalog.EndIntent(ctx, a.Intent.ID)
	case RemoveCopy:
		if err := f.notInService(a.Copy.ID); err != nil {
			return err
		}
		if a.Copy.Clone != nil { // its ledger may be the one that was lost
			a.Copy.Ready = false
			if err := f.State.PutCopy(a.Copy); err != nil {
				return err
			}
		}
		return f.takeDown(ctx, a.Copy)
	case PutBack:
		return f.save(a.Copy)
	case RemoveDump:
		return f.removeBegun(ctx, a.Dump)
	}
	return fmt.Errorf("unknown action %q", a.Kind)
}

// resumeBackup goes on where a backup was interrupted after its cut: it waits
// for the snapshots. If one of them is gone, so is the rest.
func (f *Flow) resumeBackup(ctx context.Context, i backup.Intent) error {
	e, err := f.Catalog.Backup(ctx, i.ID)
	if err == nil {
		return f.Catalog.EndIntent(ctx, i.ID)
	}
	if stateOf(e) != Taken {
		return err
	}
	err = f.completeBackup(ctx, e.Manifest, e.Digest)
	if errors.Is(err, backup.ErrNotFound) {
		return f.removeBackup(ctx, i)
	}
	return err
}

// Thawed is what Thaw found on one mount point.
type Thawed struct {
	Mountpoint string `json:"mountpoint"`
	WasFrozen  bool   `json:"was_frozen"`
	Error      string `json:"error,omitempty"`
}

// Thaw thaws everything that was ever frozen from this host's state, whoever
// froze it now, and says what it found.
func (f *Flow) Thaw(ctx context.Context, more []string) ([]Thawed, error) {
	mounts, err := f.State.Frozen()
	if err != nil {
		return nil, err
	}
	var out []Thawed
	var errs []error
	for _, mp := range append(mounts, more...) {
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		was, err := host.Thaw(mp)
		t := Thawed{Mountpoint: mp, WasFrozen: was}
		if err != nil {
			t.Error = err.Error()
			errs = append(errs, err)
		}
		out = append(out, t)
	}
	return out, errors.Join(errs...)
}
