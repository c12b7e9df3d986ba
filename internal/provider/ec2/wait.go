package ec2

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// effect runs a call that changes something in EC2, with fault points around
// it. A dead context prevents it.
func effect(ctx context.Context, action string, do func() error) error {
	point := "ec2." + action
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	if err := fault.Point(ctx, point); err != nil {
		return err
	}
	if err := do(); err != nil {
		return border(ctx, action, err)
	}
	return fault.Point(ctx, point+".done")
}

// pause waits, or returns ctx's error.
func pause(ctx context.Context, d time.Duration) error {
	if err := ctx.Err(); err != nil || d <= 0 {
		return err
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// until looks again and again, with growing pauses of at most longest, until
// there is something to see, an error, or limit is over: then errPending. A
// limit of 0: as long as ctx lasts.
func (p *Provider) until(ctx context.Context, limit, longest time.Duration, look func() (done bool, err error)) error {
	start, wait := time.Now(), p.o.pace.poll
	for {
		done, err := look()
		if done || err != nil {
			return err
		}
		if limit > 0 && time.Since(start) >= limit {
			return fmt.Errorf("%w of %s", errPending, limit)
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
		wait = min(wait*3/2, max(longest, p.o.pace.poll))
	}
}

// memory knows for a while what this process has made, or may have made by a
// call whose answer was lost: EC2's descriptions are eventually consistent, and
// a call may still be on its way when its caller gives up.
type memory struct {
	mu   sync.Mutex
	byID map[string]fresh
}

type fresh struct {
	since time.Time
	tags  backup.Tags
}

func (m *memory) add(id string, tags backup.Tags) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.byID == nil {
		m.byID = map[string]fresh{}
	}
	m.byID[id] = fresh{time.Now(), tags}
}

func (m *memory) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.byID, id)
}

// lostKey stands for the snapshot of a volume in a cut, whose id nobody knows.
func lostKey(cut, volume string) string { return cut + " " + volume }

// young reports whether id was made within the last d.
func (m *memory) young(id string, d time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, ok := m.byID[id]
	return ok && time.Since(f.since) < d
}

// expected returns the young ids, and keys of what was lost, whose tags match.
// It forgets the old ones.
func (m *memory) expected(match backup.Tags, d time.Duration) (ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, f := range m.byID {
		if time.Since(f.since) >= d {
			delete(m.byID, id)
		} else if len(match) == 0 || f.tags.Match(match) {
			ids = append(ids, id)
		}
	}
	return ids
}

// settled repeats do while EC2 does not know an id that this process has just
// made.
func (p *Provider) settled(ctx context.Context, id string, do func() error) error {
	var last error
	err := p.until(ctx, p.o.pace.settle, p.o.pace.pollMax, func() (bool, error) {
		last = do()
		if errors.Is(last, backup.ErrNotFound) && p.made.young(id, p.o.pace.settle) {
			return false, nil
		}
		return true, last
	})
	if errors.Is(err, errPending) {
		return last
	}
	return err
}

// turns lets calls for one volume act one after the other.
type turns struct {
	mu   sync.Mutex
	byID map[backup.VolumeID]chan struct{}
}

func (t *turns) take(ctx context.Context, id backup.VolumeID) (release func(), err error) {
	t.mu.Lock()
	if t.byID == nil {
		t.byID = map[backup.VolumeID]chan struct{}{}
	}
	turn := t.byID[id]
	if turn == nil {
		turn = make(chan struct{}, 1)
		t.byID[id] = turn
	}
	t.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
