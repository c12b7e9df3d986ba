package lab

import (
	"context"
	"errors"
	"time"
)

// undoTime ends the taking away of what was made.
const undoTime = 10 * time.Minute

// Undo remembers how to take away what was made. The zero value is empty.
type Undo struct {
	steps []func(ctx context.Context) error
}

// Later adds a step.
func (u *Undo) Later(step func(ctx context.Context) error) { u.steps = append(u.steps, step) }

// End runs all steps, the last first, whatever fails and though ctx has ended,
// and returns their errors. Called again it runs what was added since.
func (u *Undo) End(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	var errs []error
	for len(u.steps) > 0 {
		last := len(u.steps) - 1
		errs = append(errs, u.steps[last](ctx))
		u.steps = u.steps[:last]
	}
	return errors.Join(errs...)
}
