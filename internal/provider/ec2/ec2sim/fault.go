package ec2sim

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Kind is what a fault does.
type Kind string

// The kinds. Value says what a Fault's fields Code, N or Delay mean; those
// that are not named are not used.
const (
	Throttle      Kind = "throttle"       // RequestLimitExceeded (503), no effect
	Refuse        Kind = "error"          // Code, no effect
	FailAfter     Kind = "fail-after"     // Code, after the effect
	LoseAnswer    Kind = "lose-answer"    // the effect, then the connection is closed without an answer
	Stale         Kind = "stale"          // the next N describes do not show the effect: what was made is missing, what was changed is as before
	DelayBefore   Kind = "delay"          // Delay before the effect
	DelayAfter    Kind = "delay-answer"   // Delay between effect and answer
	EndInError    Kind = "end-in-error"   // snapshots of this call stay pending for Delay and end in error
	NeverComplete Kind = "never-complete" // snapshots of this call stay pending
	NeverAttach   Kind = "never-attach"   // AttachVolume stays attaching
	Skew          Kind = "skew"           // CreateSnapshot: the k-th of calls at the same time waits (k-1) × Delay before its clone
	ExtraMember   Kind = "extra-member"   // CreateSnapshots: somebody attaches another volume a moment before
	MissingMember Kind = "missing-member" // CreateSnapshots: one of the wanted volumes is neither taken nor answered
	SwapAnswer    Kind = "swap"           // CreateSnapshots: the answer exchanges the volume ids of the first two
	SwapBytes     Kind = "swap-bytes"     // CreateSnapshots: the first two snapshots hold each other's bytes, and nothing says so
	Hook          Kind = "hook"           // Do before the effect; not from a flag
	HookAfter     Kind = "hook-after"     // Do after the effect, before the answer; not from a flag
)

// Fault is one line of the fault table. Calls of Action are counted from
// Inject on.
type Fault struct {
	Action string // as the keys of Calls: a dry run is another action, "CreateSnapshot(DryRun)"
	Kind   Kind
	Nth    int // the first call that is hit, from 1; 0: the first, and without Times every one
	Times  int // how many are hit; 0: one, but every one where Nth is 0

	Code  string
	N     int
	Delay time.Duration
	Do    func(ctx context.Context) // must not call Close
}

// armed is a fault and what became of it.
type armed struct {
	Fault
	seen, hit int
	flying    int       // hit calls on their way
	row       int       // of Skew: how many since nothing flew
	landed    time.Time // the last one
}

// strike is a fault that hit a call.
type strike struct {
	*armed
	place int // of Skew: how many are before this one
}

// errLost makes the server close the connection without an answer.
var errLost = errors.New("the answer is lost")

// Inject adds lines to the fault table. All lines that hit a call act on it,
// in the order in which they were added.
func (s *Server) Inject(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range faults {
		s.faults = append(s.faults, &armed{Fault: f})
	}
}

// ClearFaults empties the fault table and returns the lines that never hit a
// call: a test that injected one in vain has proved nothing.
func (s *Server) ClearFaults() (unused []Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.hit == 0 {
			unused = append(unused, f.Fault)
		}
	}
	s.faults = nil
	return unused
}

func (f *armed) hits() bool {
	times := f.Times
	if times == 0 && f.Nth > 0 {
		times = 1
	}
	first := max(f.Nth, 1)
	return f.seen >= first && (times == 0 || f.seen < first+times)
}

func (s *Server) strike(action string) (out []strike) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.Action != action {
			continue
		}
		if f.seen++; !f.hits() {
			continue
		}
		f.hit++
		// The first may have landed before the last comes, which was sent at
		// the same time.
		if f.flying == 0 && time.Since(f.landed) > f.Delay {
			f.row = 0
		}
		out = append(out, strike{f, f.row})
		f.flying++
		f.row++
	}
	return out
}

func (s *Server) endStrike(c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range c.struck {
		f.flying--
		f.landed = time.Now()
	}
}

// before does what faults do before the effect.
func before(ctx context.Context, struck []strike) error {
	for _, f := range struck {
		switch f.Kind {
		case Throttle:
			return refuse("RequestLimitExceeded", "Request limit exceeded.")
		case Refuse:
			return injected(f.Code)
		case DelayBefore:
			if err := pause(ctx, f.Delay); err != nil {
				return err
			}
		case Hook:
			f.Do(ctx)
		}
	}
	return nil
}

// after does what faults do between effect and answer.
func after(ctx context.Context, struck []strike) error {
	for _, f := range struck {
		switch f.Kind {
		case FailAfter:
			return injected(f.Code)
		case LoseAnswer:
			return errLost
		case DelayAfter:
			if err := pause(ctx, f.Delay); err != nil {
				return err
			}
		case HookAfter:
			f.Do(ctx)
		}
	}
	return nil
}

func injected(code string) error {
	return refuse(code, "This error was injected.")
}

// hitBy returns the first fault of a kind that hit the call.
func (c *call) hitBy(k Kind) (strike, bool) {
	i := slices.IndexFunc(c.struck, func(f strike) bool { return f.Kind == k })
	if i < 0 {
		return strike{}, false
	}
	return c.struck[i], true
}
