// Package faulty wraps a provider so that chosen calls fail, hang, lose their
// answer or are cancelled, for tests.
//
//	Wrap(provider, rules…) → calls → rule hit? → delay, cancel, error
//
// What always holds: a call that no rule meets goes through unchanged.
package faulty

import (
	"context"
	"fmt"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// Rule says what happens to some call. In this order: Delay, Cancel, the
// effect unless Err comes instead of it, Err.
type Rule struct {
	Method string        // of provider.Provider or provider.Cut: "Attach", "Take", …
	Nth    int           // which call of it, counted from 1 over the whole wrapper; 0: every one
	Err    error         // returned instead of the effect; nil: the effect's own result
	Delay  time.Duration // waited before, until ctx ends
	Cancel func()        // called before the effect
	// AfterEffect lets the effect happen and then loses its answer: the results
	// are zero and Err is returned. An error of the effect itself stays.
	AfterEffect bool
}

// Provider is a provider with rules. Close of a Cut has no context: a Delay
// there is waited in full.
type Provider struct {
	inner provider.Provider

	mu    sync.Mutex
	rules []Rule
	hit   []bool
	calls map[string]int
}

var _ provider.Provider = (*Provider)(nil)

// Wrap puts rules around p. Where several meet one call, the first counts.
func Wrap(p provider.Provider, rules ...Rule) *Provider {
	return &Provider{inner: p, rules: rules, hit: make([]bool, len(rules)), calls: map[string]int{}}
}

// Unhit returns the rules that no call has met, in their order. A test that
// ends with some has not tested what it meant to.
func (p *Provider) Unhit() []Rule {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []Rule
	for i, r := range p.rules {
		if !p.hit[i] {
			out = append(out, r)
		}
	}
	return out
}

// Calls returns how often a method was called.
func (p *Provider) Calls(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[method]
}

func (p *Provider) meet(method string) Rule {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls[method]++
	for i, r := range p.rules {
		if r.Method == method && (r.Nth == 0 || r.Nth == p.calls[method]) {
			p.hit[i] = true
			return r
		}
	}
	return Rule{}
}

// call does what every method has in common.
func call[T any](ctx context.Context, p *Provider, method string, do func() (T, error)) (T, error) {
	var none T
	r := p.meet(method)
	if r.Delay > 0 {
		timer := time.NewTimer(r.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return none, fmt.Errorf("%s: %w", method, ctx.Err())
		}
	}
	if r.Cancel != nil {
		r.Cancel()
	}
	if r.Err != nil && !r.AfterEffect {
		return none, fmt.Errorf("%s: %w", method, r.Err)
	}
	got, err := do()
	if err == nil && r.Err != nil {
		return none, fmt.Errorf("%s: %w", method, r.Err)
	}
	return got, err
}

// only fits a call without a result to call.
func only(do func() error) func() (struct{}, error) {
	return func() (struct{}, error) { return struct{}{}, do() }
}

// Resolve is provider.Provider's.
func (p *Provider) Resolve(ctx context.Context, device string) (backup.Volume, error) {
	return call(ctx, p, "Resolve", func() (backup.Volume, error) { return p.inner.Resolve(ctx, device) })
}

// Prepare is provider.Provider's; the cut it returns has the rules, too. When
// the answer is lost the cut is closed.
func (p *Provider) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	var made provider.Cut
	got, err := call(ctx, p, "Prepare", func() (provider.Cut, error) {
		c, err := p.inner.Prepare(ctx, set)
		if err != nil {
			return nil, err
		}
		made = &cut{p, c}
		return made, nil
	})
	if err != nil && made != nil {
		_ = made.(*cut).inner.Close()
	}
	return got, err
}

// Complete is provider.Provider's.
func (p *Provider) Complete(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error {
	_, err := call(ctx, p, "Complete", only(func() error { return p.inner.Complete(ctx, ids, tags) }))
	return err
}

// Snapshots is provider.Provider's.
func (p *Provider) Snapshots(ctx context.Context, ids []backup.SnapshotID) ([]provider.Snapshot, error) {
	return call(ctx, p, "Snapshots", func() ([]provider.Snapshot, error) { return p.inner.Snapshots(ctx, ids) })
}

// CreateVolume is provider.Provider's.
func (p *Provider) CreateVolume(ctx context.Context, spec provider.VolumeSpec) (backup.Volume, error) {
	return call(ctx, p, "CreateVolume", func() (backup.Volume, error) { return p.inner.CreateVolume(ctx, spec) })
}

// Attach is provider.Provider's.
func (p *Provider) Attach(ctx context.Context, id backup.VolumeID) (string, error) {
	return call(ctx, p, "Attach", func() (string, error) { return p.inner.Attach(ctx, id) })
}

// Detach is provider.Provider's.
func (p *Provider) Detach(ctx context.Context, id backup.VolumeID) error {
	_, err := call(ctx, p, "Detach", only(func() error { return p.inner.Detach(ctx, id) }))
	return err
}

// DeleteVolume is provider.Provider's.
func (p *Provider) DeleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error {
	_, err := call(ctx, p, "DeleteVolume", only(func() error { return p.inner.DeleteVolume(ctx, id, owner) }))
	return err
}

// DeleteSnapshots is provider.Provider's.
func (p *Provider) DeleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error {
	_, err := call(ctx, p, "DeleteSnapshots", only(func() error { return p.inner.DeleteSnapshots(ctx, ids, owner) }))
	return err
}

// List is provider.Provider's.
func (p *Provider) List(ctx context.Context, match backup.Tags) (provider.Inventory, error) {
	return call(ctx, p, "List", func() (provider.Inventory, error) { return p.inner.List(ctx, match) })
}

// cut passes a cut on under the rules of its provider.
type cut struct {
	p     *Provider
	inner provider.Cut
}

func (c *cut) Estimate() time.Duration { return c.inner.Estimate() }

func (c *cut) Take(ctx context.Context) (provider.Taken, error) {
	return call(ctx, c.p, "Take", func() (provider.Taken, error) { return c.inner.Take(ctx) })
}

func (c *cut) Close() error {
	_, err := call(context.Background(), c.p, "Close", only(c.inner.Close))
	return err
}
