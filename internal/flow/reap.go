package flow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"cleancut/internal/backup"
)

// ReapAction is one line of a reap's plan: a clone whose lease has ended.
type ReapAction struct {
	Name    string    `json:"name"`
	ID      backup.ID `json:"id"` // of the copy
	Owner   string    `json:"owner"`
	Expired time.Time `json:"expired"`
	Destroy bool      `json:"destroy"` // else it is kept
	Why     string    `json:"why"`
}

// PlanReap decides which clones have had their time: those whose lease has
// ended, the one that ended first first, at most so many. One with sessions is
// kept, as is one whose server runs and could not be asked, unless force is
// given. It is pure.
func PlanReap(now time.Time, clones []CloneStatus, most int, force bool) []ReapAction {
	out := []ReapAction{}
	for _, s := range clones {
		if s.State != CloneExpired || now.Before(s.Expires) {
			continue
		}
		a := ReapAction{Name: s.Name, ID: s.ID, Owner: s.Owner, Expired: s.Expires, Destroy: true, Why: "expired " + now.Sub(s.Expires).Round(time.Second).String() + " ago"}
		switch {
		case force:
		case s.Sessions == nil:
			a.Destroy, a.Why = false, a.Why+"; "+s.Down
		case s.Sessions.Count > 0:
			a.Destroy, a.Why = false, a.Why+"; "+sessionsText(*s.Sessions)
		}
		out = append(out, a)
	}
	slices.SortStableFunc(out, func(a, b ReapAction) int { return a.Expired.Compare(b.Expired) })
	n := 0
	for i := range out {
		if !out[i].Destroy {
			continue
		}
		if n++; n > most {
			out[i].Destroy, out[i].Why = false, out[i].Why+fmt.Sprintf("; %d a run", most)
		}
	}
	return out
}

// Reaped is what became of one clone of a plan.
type Reaped struct {
	ReapAction
	Done bool `json:"done"`
	// Kept says why it was not destroyed after all, though nothing failed.
	Kept  string `json:"kept,omitempty"`
	Error string `json:"error,omitempty"`
}

// PlanReap looks at the clones and plans.
func (f *Flow) PlanReap(ctx context.Context, most int, force bool) ([]ReapAction, error) {
	clones, err := f.Clones(ctx)
	return PlanReap(f.now(), clones, most, force), err
}

// Reap destroys the clones of a plan one after the other. One that was extended
// or has gone since, or that somebody uses by now, is passed over. One that
// fails does not keep the others; all failures are in the error. When ctx ends
// the removal under way is brought to its end and the rest stays.
func (f *Flow) Reap(ctx context.Context, plan []ReapAction, force bool) ([]Reaped, error) {
	out := []Reaped{}
	var errs []error
	for _, a := range plan {
		r := Reaped{ReapAction: a}
		if a.Destroy && ctx.Err() == nil {
			f.tell("destroy", a.Name)
			var err error
			r.Kept, err = f.reapOne(ctx, a, force)
			r.Done = err == nil && r.Kept == ""
			if err != nil {
				r.Error = err.Error()
				errs = append(errs, fmt.Errorf("clone %s: %w", a.Name, err))
			}
		} else if a.Destroy {
			r.Error = "not begun: " + ctx.Err().Error()
		}
		out = append(out, r)
	}
	if ctx.Err() != nil {
		errs = append(errs, ctx.Err())
	}
	if len(errs) > 0 {
		return out, fmt.Errorf("reap: %w", errors.Join(errs...))
	}
	return out, nil
}

func (f *Flow) reapOne(ctx context.Context, a ReapAction, force bool) (kept string, err error) {
	c, release, err := f.lockedClone(a.Name)
	switch {
	case errors.Is(err, backup.ErrNotFound):
		return "gone since the plan was made", nil
	case errors.Is(err, backup.ErrInUse):
		return "somebody works on it", nil
	case err != nil:
		return "", err
	}
	defer release()
	if c.ID != a.ID || !c.Clone.Expired(f.now()) {
		return "another one, or extended, since the plan was made", nil
	}
	if used := f.usedBy(ctx, c); used != "" && !force {
		return used, nil
	}
	return "", f.undoCopy(ctx, c)
}
