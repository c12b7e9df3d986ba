package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/provider"
)

// cut is a prepared cut. Each member has a goroutine on a thread of its own
// that waits at a gate and owns the member's descriptors.
type cut struct {
	members  []*member
	gates    []*gate // one for all, or with skew one for each
	skew     time.Duration
	estimate time.Duration

	used   atomic.Bool
	closed sync.Once
}

type member struct {
	volume backup.Volume
	tags   backup.Tags
	id     backup.SnapshotID
	source *os.File
	target *os.File

	done                 chan struct{}
	requested, responded time.Time // valid after done, as is err
	err                  error
}

// gate holds threads back in the kernel until it is opened, once. It is the
// read end of a pipe: closing the other end wakes all of them with one system
// call, where the runtime would wake one after the other.
type gate struct {
	read, write int
	opened      sync.Once
	take        atomic.Pointer[func(*member)] // what the threads do then; nil: nothing
}

func newGate() (*gate, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	return &gate{read: p[0], write: p[1]}, nil
}

func (g *gate) open(take func(m *member)) {
	g.opened.Do(func() {
		if take != nil {
			g.take.Store(&take)
		}
		_ = unix.Close(g.write)
	})
}

// wait blocks a thread; a signal of the runtime wakes it too early.
func (g *gate) wait() {
	for {
		if _, err := unix.Read(g.read, make([]byte, 1)); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (m *member) closeFiles() {
	if m.source != nil {
		_ = m.source.Close()
	}
	if m.target != nil {
		_ = m.target.Close()
	}
}

// standBy makes the gates and starts a goroutine for each member.
func (c *cut) standBy() error {
	gates := 1
	if c.skew > 0 {
		gates = len(c.members)
	}
	for range gates {
		g, err := newGate()
		if err != nil {
			for _, g := range c.gates {
				g.open(nil)
				_ = unix.Close(g.read)
			}
			return err
		}
		c.gates = append(c.gates, g)
	}
	// Go lends each thread in a system call one of GOMAXPROCS tickets and takes
	// it back after up to 10 ms (runtime/proc.go, retake): on two processors the
	// third FICLONE began 12 ms after the first. Only ever raised, as another
	// cut may be waiting.
	if need := len(c.members) + 2; runtime.GOMAXPROCS(0) < need {
		runtime.GOMAXPROCS(need)
	}
	for i, g := range c.gates {
		behind := c.members
		if c.skew > 0 {
			behind = c.members[i : i+1]
		}
		g.hold(behind)
	}
	return nil
}

// hold starts a goroutine for each member and returns when all are about to
// wait.
func (g *gate) hold(members []*member) {
	var ready, passed sync.WaitGroup
	ready.Add(len(members))
	for _, m := range members {
		m.done = make(chan struct{})
		passed.Go(func() {
			// Never unlocked: the thread ends with the goroutine and takes its
			// priority along. Best effort: without CAP_SYS_NICE the spread is
			// only larger on a busy host.
			runtime.LockOSThread()
			_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
			defer close(m.done)
			defer m.closeFiles()
			ready.Done()
			g.wait()
			if take := g.take.Load(); take != nil {
				(*take)(m)
			} else {
				m.err = errors.New("the cut was closed")
			}
		})
	}
	go func() {
		passed.Wait()
		_ = unix.Close(g.read)
	}()
	ready.Wait()
}

// clone is what a member's thread does: nothing but what has to be done while
// production stands still.
func (m *member) clone(ctx context.Context) {
	if m.err = ctx.Err(); m.err != nil {
		return
	}
	if m.err = fault.Point(ctx, "local.clone"); m.err != nil {
		return
	}
	m.requested = time.Now()
	m.err = clone(m.target, m.source)
	m.responded = time.Now()
	if m.err == nil {
		m.err = fault.Point(ctx, "local.clone.done")
	}
}

func (c *cut) Estimate() time.Duration { return c.estimate }

// Take clones all files. When ctx ends it returns at once; a FICLONE that is
// running cannot be stopped and ends by itself, harmless: nobody reads its
// target.
func (c *cut) Take(ctx context.Context) (provider.Taken, error) {
	if c.used.Swap(true) {
		return provider.Taken{}, errors.New("take cut: taken or closed already")
	}
	if err := ctx.Err(); err != nil {
		return provider.Taken{}, fmt.Errorf("take cut: %w", err)
	}
	for i, g := range c.gates {
		if i > 0 {
			if err := c.pause(ctx, c.members[i-1]); err != nil {
				return provider.Taken{}, fmt.Errorf("take cut: %w", err)
			}
		}
		g.open(func(m *member) { m.clone(ctx) })
	}
	taken := provider.Taken{}
	var errs []error
	for _, m := range c.members {
		select {
		case <-m.done:
		case <-ctx.Done():
			return provider.Taken{}, fmt.Errorf("take cut: %w", ctx.Err())
		}
		if m.err != nil {
			errs = append(errs, fmt.Errorf("snapshot of %s: %w", m.volume.ID, m.err))
			continue
		}
		taken.Members = append(taken.Members, provider.TakenMember{Snapshot: m.id, Volume: m.volume, Requested: m.requested, Responded: m.responded})
	}
	if err := errors.Join(errs...); err != nil {
		return provider.Taken{}, fmt.Errorf("take cut: %w", err)
	}
	return taken, nil
}

// pause waits for the member before and then as long as the set's skew.
func (c *cut) pause(ctx context.Context, before *member) error {
	select {
	case <-before.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if before.err != nil {
		return fmt.Errorf("snapshot of %s: %w", before.volume.ID, before.err)
	}
	return sleep(ctx, c.skew)
}

// Close lets the threads go that still wait. One that is in a FICLONE closes
// its descriptors when that returns.
func (c *cut) Close() error {
	c.used.Store(true)
	c.closed.Do(func() {
		for _, g := range c.gates {
			g.open(nil)
		}
	})
	return nil
}
