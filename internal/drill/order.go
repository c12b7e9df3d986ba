package drill

import (
	"context"
	"slices"

	"cleancut/internal/provider"
)

// backward is a provider that snapshots the last member first. It changes
// nothing but when each is asked for, so it shows only with a skew.
type backward struct{ provider.Provider }

// Prepare prepares the members in the opposite order.
func (b backward) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	set.Members = slices.Clone(set.Members)
	slices.Reverse(set.Members)
	c, err := b.Provider.Prepare(ctx, set)
	if err != nil {
		return nil, err
	}
	return backwardCut{c}, nil
}

type backwardCut struct{ provider.Cut }

// Take returns what was taken in the order of the set.
func (c backwardCut) Take(ctx context.Context) (provider.Taken, error) {
	taken, err := c.Cut.Take(ctx)
	slices.Reverse(taken.Members)
	return taken, err
}
