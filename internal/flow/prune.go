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
	"cleancut/internal/wal"
)

// Delete takes one backup away for good, and then its golden images. A held one
// is refused, as is one of which a golden image is held, and the last one with a
// good verdict: see DeleteLast.
func (f *Flow) Delete(ctx context.Context, id backup.ID) error {
	last, err := f.lastGood(ctx, id)
	if err != nil {
		return err
	}
	if last {
		return backup.Hint(fmt.Errorf("%w: backup %s is the last one with a good verdict", backup.ErrUsage, id),
			"verify another one first (`cleancut list`, `cleancut verify ID`); to delete it all the same: `cleancut delete --force-last "+string(id)+"`")
	}
	return f.DeleteLast(ctx, id)
}

// DeleteLast is Delete for a backup that may be the last proven one.
func (f *Flow) DeleteLast(ctx context.Context, id backup.ID) error {
	golden, err := f.goldenOf(ctx, id)
	if err != nil {
		return err
	}
	for _, g := range golden {
		if err := heldError(g.ID, g.Held(time.Now())); err != nil {
			return err
		}
	}
	if err := f.deleteBackup(ctx, id); err != nil {
		return err
	}
	for _, g := range golden {
		if err := f.deleteBackup(ctx, g.ID); err != nil {
			return backup.Hint(fmt.Errorf("backup %s is deleted, its golden image %s is not: %w", id, g.ID, err), "`cleancut delete "+string(g.ID)+"`, or the next prune")
		}
	}
	return nil
}

// GoldenOf returns the golden images of a backup.
func (f *Flow) GoldenOf(ctx context.Context, id backup.ID) ([]backup.ID, error) {
	entries, err := f.goldenOf(ctx, id)
	ids := []backup.ID{}
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids, err
}

func (f *Flow) goldenOf(ctx context.Context, id backup.ID) ([]catalog.Entry, error) {
	entries, err := f.Catalog.Backups(ctx)
	if errors.Is(err, backup.ErrNotFound) { // then nothing is
		return nil, nil
	}
	return slices.DeleteFunc(entries, func(e catalog.Entry) bool { return e.Manifest.Golden == nil || e.Manifest.Golden.Of != id }), err
}

// lastGood reports whether of all backups only that one has a good verdict.
func (f *Flow) lastGood(ctx context.Context, id backup.ID) (bool, error) {
	entries, err := f.Catalog.Backups(ctx)
	if errors.Is(err, backup.ErrNotFound) { // then deleteBackup says so
		return false, nil
	}
	if err != nil {
		return false, err
	}
	mine, others := false, false
	for _, e := range entries {
		if good := proven(e); e.ID == id {
			mine = good
		} else {
			others = others || good
		}
	}
	return mine && !others, nil
}

// proven: a backup that can be restored, and whose newest verdict is good.
func proven(e catalog.Entry) bool {
	return stateOf(e) == Complete && e.Manifest.Cut.Achieved != backup.Torn && e.Manifest.Golden == nil && verdictOf(e) == backup.Good
}

// verdictOf is the newest verdict; with some that cannot be read nobody knows
// which that is.
func verdictOf(e catalog.Entry) backup.Word {
	if len(e.Verdicts) == 0 || e.VerdictErr != nil {
		return backup.Unproven
	}
	return backup.Word(e.Verdicts[len(e.Verdicts)-1].Word())
}

// deleteBackup removes a backup unless it is held. The intent comes before the
// second look at the holds, and Hold looks for intents after its own mark:
// whichever comes second sees the other.
func (f *Flow) deleteBackup(ctx context.Context, id backup.ID) error {
	release, err := f.State.Lock(lockBackup(f.Cluster))
	if err != nil {
		return backup.Hint(fmt.Errorf("a backup of cluster %s is running: %w", f.Cluster, err), "snapshots are not deleted around a cut; wait for it")
	}
	defer release()
	e, err := f.Catalog.Backup(ctx, id)
	if err != nil && !thereAnyway(err) {
		return err
	}
	if err := heldError(id, e.Held(time.Now())); err != nil {
		return err
	}
	intent := backup.Intent{ID: id, Cluster: f.Cluster, Host: f.Host, Deletes: true, Tags: backup.Tags{backup.TagBackup: string(id), backup.TagCluster: f.Cluster}}
	if g := e.Manifest.Golden; g != nil {
		intent.Golden = g.Of
	}
	err = f.Catalog.PutIntent(ctx, intent)
	if again := errors.Is(err, backup.ErrExists); !again {
		if err == nil {
			err = f.notHeldSince(ctx, id)
		}
		if err != nil { // nothing is deleted yet
			undo, cancel := undoing(ctx)
			defer cancel()
			return errors.Join(err, f.Catalog.EndIntent(undo, id))
		}
	}
	err = f.removeBackup(ctx, intent)
	if err != nil { // half a backup is of no use: once more, also after ^C
		if again := f.undoBackup(ctx, intent); again != nil {
			return fmt.Errorf("delete: %w", errors.Join(err, again))
		}
	}
	return nil
}

// thereAnyway: the backup cannot be restored, but is there and can be deleted.
func thereAnyway(err error) bool {
	return errors.Is(err, backup.ErrIncomplete) || errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrUnsupported)
}

func (f *Flow) notHeldSince(ctx context.Context, id backup.ID) error {
	holds, err := f.Catalog.Holds(ctx, id)
	if err != nil && !errors.Is(err, backup.ErrDamage) {
		return err
	}
	return heldError(id, catalog.Held(holds, err, time.Now()))
}

func heldError(id backup.ID, why string) error {
	if why == "" {
		return nil
	}
	return backup.Hint(fmt.Errorf("%w: backup %s is %w %s", backup.ErrUsage, id, backup.ErrHeld, strings.TrimPrefix(why, "held ")),
		"ask them; then `cleancut hold --release "+string(id)+"`")
}

// Hold keeps a backup whatever retention says. When it returns nil no delete
// or prune that begins later removes the backup, and none was under way.
func (f *Flow) Hold(ctx context.Context, h backup.Hold) error {
	if err := f.holdable(ctx, h.Backup); err != nil {
		return err
	}
	err := f.Catalog.PutHold(ctx, h)
	if err == nil {
		err = f.holdable(ctx, h.Backup)
	}
	if err != nil {
		undo, cancel := undoing(ctx)
		defer cancel()
		return errors.Join(err, f.Catalog.WithdrawHold(undo, h))
	}
	return nil
}

// holdable refuses a backup that is not whole or is being deleted.
func (f *Flow) holdable(ctx context.Context, id backup.ID) error {
	if _, err := f.Catalog.Backup(ctx, id); err != nil && (errors.Is(err, backup.ErrIncomplete) || !thereAnyway(err)) {
		return err
	}
	intents, err := f.Catalog.Intents(ctx)
	if err != nil {
		return err
	}
	for _, i := range intents {
		if i.ID == id && i.Deletes {
			return backup.Hint(fmt.Errorf("backup %s is being deleted on host %s, or that was interrupted: %w", id, i.Host, backup.ErrInUse),
				"if no cleancut is at work there, run `cleancut sweep` there: it deletes the rest, or ends the deletion if nothing is gone yet and a hold is there")
		}
	}
	return nil
}

// Release ends every hold of a backup and returns what they were.
func (f *Flow) Release(ctx context.Context, id backup.ID) ([]backup.Hold, error) {
	if _, err := f.Catalog.Backup(ctx, id); err != nil && !thereAnyway(err) {
		return nil, err
	}
	return f.Catalog.ReleaseHolds(ctx, id)
}

// backupFacts gathers what retention knows of the backups and of their golden
// images, also by intents of which the catalog has nothing else yet. What of it
// cannot be told is an error: nothing is removed on half the facts.
func (f *Flow) backupFacts(ctx context.Context) (out []wal.Backup, golden []backup.GoldenCandidate, err error) {
	entries, err := f.Catalog.Backups(ctx)
	if err != nil {
		return nil, nil, err
	}
	intents, err := f.Catalog.Intents(ctx)
	if err != nil {
		return nil, nil, err
	}
	used, err := f.inUse(ctx)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	begins := map[backup.ID]string{}
	for _, i := range intents {
		begins[i.ID] = begun(i)
		known := slices.ContainsFunc(entries, func(e catalog.Entry) bool { return e.ID == i.ID })
		switch {
		case i.Golden != "": // also without a manifest it is no backup
			entries = slices.DeleteFunc(entries, func(e catalog.Entry) bool { return e.ID == i.ID })
			golden = append(golden, backup.GoldenCandidate{ID: i.ID, Of: i.Golden, Begun: begun(i)})
		case !known:
			out = append(out, wal.Backup{Candidate: backup.Candidate{ID: i.ID, Incomplete: true, Begun: begun(i)}})
		}
	}
	for _, e := range entries {
		if g := e.Manifest.Golden; g != nil {
			golden = append(golden, backup.GoldenCandidate{ID: e.ID, Of: g.Of, Begun: begins[e.ID], Held: e.Held(now), InUse: used[e.ID]})
			continue
		}
		b := backupFact(e, used[e.ID], now)
		b.Begun = begins[e.ID]
		out = append(out, b)
	}
	return out, golden, nil
}

func backupFact(e catalog.Entry, used string, now time.Time) wal.Backup {
	is, m := stateOf(e), e.Manifest
	b := wal.Backup{Candidate: backup.Candidate{ID: e.ID, Created: m.Created, Incomplete: is != Complete && is != Doubtful, Torn: m.Cut.Achieved == backup.Torn,
		Verdict: verdictOf(e), Held: e.Held(now), InUse: used}}
	if is == Doubtful {
		b.Unreadable = "its records cannot be read: " + e.Err.Error()
	}
	if e.Digest != "" {
		_, b.Cut = m.Span()
		b.Placed, b.System, b.Timeline, b.From = true, m.Server.SystemIdentifier, wal.Timeline(m.Server.Timeline), m.Cut.FlushLSN
	}
	return b
}

func candidates(of []wal.Backup) []backup.Candidate {
	var out []backup.Candidate
	for _, b := range of {
		out = append(out, b.Candidate)
	}
	return out
}

func begun(i backup.Intent) string {
	if i.Deletes {
		return "it is being deleted on host " + i.Host + ", or that was interrupted (`cleancut sweep` there)"
	}
	return "it is being made on host " + i.Host + ", or that was interrupted (`cleancut sweep` there)"
}

// inUse tells of which backups copies stand or are being made: on this host by
// their ledgers, which are older than their volumes, on every host by the tags
// of their volumes.
func (f *Flow) inUse(ctx context.Context) (map[backup.ID]string, error) {
	copies, err := f.State.Copies()
	if err != nil {
		return nil, err
	}
	inv, err := f.Provider.List(ctx, nil)
	if err != nil {
		return nil, err
	}
	out := map[backup.ID]string{}
	for _, v := range inv.Volumes {
		if v.Tags[backup.TagStorage] != "" && v.Tags[backup.TagHost] == f.Host {
			continue // production's place: the ledger says how far it is, and in service it stands by itself
		}
		if v.Tags[backup.TagCopy] != "" && v.Tags[backup.TagCluster] == f.Cluster {
			out[backup.ID(v.Tags[backup.TagBackup])] = "copy " + v.Tags[backup.TagCopy] + " on host " + v.Tags[backup.TagHost]
		}
	}
	for _, c := range copies {
		if c.Cluster == f.Cluster && !c.InService() {
			out[c.Backup] = "copy " + string(c.ID) + " for " + string(c.Purpose) + " at " + c.Root
		}
	}
	return out, nil
}

// Pruned is what became of one backup that was to be removed.
type Pruned struct {
	backup.Choice
	Done bool `json:"done"`
	// Kept says why it was not removed after all, though nothing failed.
	Kept  string `json:"kept,omitempty"`
	Error string `json:"error,omitempty"`
}

// Prune deletes the backups of a plan one after the other in its order, each
// by the way of Delete: whole, and only what the provider confirms to be of
// that backup. What is held, used or gone since the plan was made is passed
// over. One that fails does not keep the others; all failures are in the
// error, which wraps backup.ErrLeft where half a backup is left. When ctx ends
// the deletion under way is brought to its end and the rest stays. The result
// has every backup of the plan.
func (f *Flow) Prune(ctx context.Context, remove []backup.Choice) ([]Pruned, error) {
	var errs []error
	out := []Pruned{}
	for _, choice := range remove {
		p := Pruned{Choice: choice}
		if ctx.Err() != nil {
			p.Error = "not begun: " + ctx.Err().Error()
			out = append(out, p)
			continue
		}
		f.tell("delete", string(choice.ID))
		var err error
		if p.Kept, err = f.pruneOne(ctx, choice.ID); err != nil {
			p.Error = err.Error()
			errs = append(errs, fmt.Errorf("backup %s: %w", choice.ID, err))
		}
		p.Done = p.Kept == "" && err == nil
		out = append(out, p)
	}
	if ctx.Err() != nil {
		errs = append(errs, ctx.Err())
	}
	if len(errs) > 0 {
		return out, fmt.Errorf("prune: %w", errors.Join(errs...))
	}
	return out, nil
}

func (f *Flow) pruneOne(ctx context.Context, id backup.ID) (kept string, err error) {
	used, err := f.inUse(ctx)
	if err != nil {
		return "", err
	}
	if used[id] != "" {
		return "in use since the plan was made: " + used[id], nil
	}
	e, err := f.Catalog.Backup(ctx, id)
	if g := e.Manifest.Golden; err == nil && g != nil && !f.gone(ctx, g.Of) {
		return "backup " + string(g.Of) + " is there, whose golden image it is", nil
	}
	switch err := f.deleteBackup(ctx, id); {
	case errors.Is(err, backup.ErrHeld) && !errors.Is(err, backup.ErrLeft):
		return "held since the plan was made", nil
	case errors.Is(err, backup.ErrNotFound) && !errors.Is(err, backup.ErrLeft) && f.gone(ctx, id):
		return "gone since the plan was made", nil
	default:
		return "", err
	}
}

// gone: the catalog is there and has nothing of the backup.
func (f *Flow) gone(ctx context.Context, id backup.ID) bool {
	entries, err := f.Catalog.Backups(ctx)
	return err == nil && !slices.ContainsFunc(entries, func(e catalog.Entry) bool { return e.ID == id })
}
