package flow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

// PrunePlan is what prune is going to do.
type PrunePlan struct {
	Keep   []backup.Choice
	Remove []backup.Choice
	WAL    *wal.Plan // of what then stays; nil: the catalog has no WAL
}

// PlanPrune plans by the rules which backups stay, with those that the promised
// window of WAL needs, and which WAL goes. What cannot be told of the backups is
// an error; what cannot be told of the WAL keeps WAL, and the plan says why.
func (f *Flow) PlanPrune(ctx context.Context, rules backup.Retention, window backup.Span) (p PrunePlan, err error) {
	facts, golden, any, err := f.walFacts(ctx, window)
	if err != nil {
		return p, err
	}
	now := time.Now()
	if any {
		anchors := wal.Anchors(facts, now)
		for i, b := range facts.Backups {
			facts.Backups[i].Needed = anchors[b.ID]
		}
	}
	if p.Keep, p.Remove, err = backup.PlanRetention(candidates(facts.Backups), rules, now); err != nil {
		return p, err
	}
	// Those that go come after the backups: where one stays after all, they do.
	keep, remove := backup.PlanGolden(golden, func(id backup.ID) bool {
		return slices.ContainsFunc(p.Keep, func(c backup.Choice) bool { return c.ID == id })
	})
	p.Keep, p.Remove = append(p.Keep, keep...), append(slices.Clip(p.Remove), remove...)
	if !any {
		return p, nil
	}
	facts.Backups = slices.DeleteFunc(facts.Backups, func(b wal.Backup) bool {
		return slices.ContainsFunc(p.Remove, func(c backup.Choice) bool { return c.ID == b.ID })
	})
	plan := wal.PlanRetention(facts, now)
	p.WAL = &plan
	return p, nil
}

// PruneResult is what became of every backup and of the WAL.
type PruneResult struct {
	Keep   []backup.Choice `json:"keep"`
	Remove []Pruned        `json:"remove"`
	WAL    *PrunedWAL      `json:"wal"` // null: the catalog has no WAL
}

// PruneByRules plans, and unless it is a dry run deletes: the backups as Prune
// does, then the WAL as PruneWAL does, also where a backup could not be deleted.
// Without a plan Keep is nil and nothing was deleted.
func (f *Flow) PruneByRules(ctx context.Context, rules backup.Retention, window backup.Span, dry bool) (res PruneResult, err error) {
	plan, err := f.PlanPrune(ctx, rules, window)
	if err != nil {
		return res, err
	}
	res.Keep, res.Remove = append([]backup.Choice{}, plan.Keep...), []Pruned{}
	if dry {
		for _, r := range plan.Remove {
			res.Remove = append(res.Remove, Pruned{Choice: r})
		}
		if plan.WAL != nil {
			res.WAL = &PrunedWAL{Plan: *plan.WAL}
		}
		return res, nil
	}
	res.Remove, err = f.Prune(ctx, plan.Remove)
	if ctx.Err() == nil {
		var failed error
		res.WAL, failed = f.PruneWAL(ctx, window)
		err = errors.Join(err, failed)
	}
	return res, err
}

// walFacts gathers what the retention of WAL is decided by. The WAL is listed
// before the backups: one that is made meanwhile is among them. Golden images are
// none of them: the WAL behind them is not production's.
func (f *Flow) walFacts(ctx context.Context, window backup.Span) (facts wal.Facts, golden []backup.GoldenCandidate, any bool, err error) {
	facts.Window = window
	if facts.Files, err = f.Catalog.WAL().List(ctx); err != nil {
		return facts, nil, false, err
	}
	facts.System, err = f.Catalog.WAL().System(ctx)
	switch {
	case errors.Is(err, backup.ErrNotFound), errors.Is(err, backup.ErrDamage):
		facts.Doubt = "nobody knows whose WAL this is: " + err.Error()
	case err != nil:
		return facts, nil, false, err
	}
	known, unread := f.histories(ctx, facts.Files)
	for _, err := range unread {
		if !errors.Is(err, backup.ErrNotFound) && !errors.Is(err, backup.ErrDamage) {
			return facts, nil, false, err
		}
	}
	facts.Histories = known
	facts.Backups, golden, err = f.backupFacts(ctx)
	return facts, golden, len(facts.Files) > 0, err
}

// PrunedWAL is what became of the WAL that was to be removed.
type PrunedWAL struct {
	wal.Plan
	Deleted int    `json:"deleted"` // files
	Done    bool   `json:"done"`
	Error   string `json:"error,omitempty"`
}

// pageOfWAL is how many files are deleted before it is looked again which
// backups are in use.
const pageOfWAL = 256

// PruneWAL plans again by the backups that are there now and deletes the WAL
// that none of them needs, the oldest first; nil: the catalog has no WAL. What a
// restore that begins meanwhile needs stays: after each page of files it looks
// for one, and then plans again. It may be stopped at any point, run again, and
// run twice at the same time: what is left is unbroken. The first error ends it.
func (f *Flow) PruneWAL(ctx context.Context, window backup.Span) (*PrunedWAL, error) {
	facts, _, any, err := f.walFacts(ctx, window)
	if err != nil || !any {
		return nil, err
	}
	out := &PrunedWAL{Plan: wal.PlanRetention(facts, time.Now())}
	err = f.deleteWAL(ctx, out, facts.Backups)
	if out.Done = err == nil; err != nil {
		err = fmt.Errorf("prune WAL: %w", err)
		out.Error = err.Error()
	}
	return out, err
}

func (f *Flow) deleteWAL(ctx context.Context, out *PrunedWAL, planned []wal.Backup) error {
	used := map[backup.ID]bool{}
	for _, b := range planned {
		used[b.ID] = b.InUse != ""
	}
	files := out.Removed()
	stays := map[wal.File]bool{} // since it was planned
	for page := range slices.Chunk(files, pageOfWAL) {
		now, err := f.inUse(ctx)
		if err != nil {
			return err
		}
		for id := range now {
			if used[id] {
				continue
			}
			facts, _, _, err := f.walFacts(ctx, out.Window)
			if err != nil {
				return err
			}
			for _, b := range facts.Backups {
				used[b.ID] = used[b.ID] || b.InUse != ""
			}
			used[id] = true // also one of which the catalog has nothing
			still := map[wal.File]bool{}
			for _, s := range wal.PlanRetention(facts, time.Now()).Removed() {
				still[s.File] = true
			}
			for _, s := range files {
				stays[s.File] = stays[s.File] || !still[s.File]
			}
		}
		page = slices.DeleteFunc(slices.Clone(page), func(s wal.Stored) bool { return stays[s.File] })
		for _, s := range page {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f.Catalog.WAL().Delete(ctx, s.File); err != nil {
				return err
			}
			out.Deleted++
		}
		f.tell("wal", fmt.Sprintf("%d of %d files deleted", out.Deleted, len(files)))
	}
	return nil
}
