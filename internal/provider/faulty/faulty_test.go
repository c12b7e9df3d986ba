package faulty_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/faulty"
)

var errBroken = errors.New("broken")

// counter counts the effects; methods that no test uses are not there.
type counter struct {
	provider.Provider
	attached, prepared, taken, closed int
}

func (c *counter) Attach(ctx context.Context, _ backup.VolumeID) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	c.attached++
	return "/dev/loop3", nil
}

func (c *counter) Prepare(context.Context, provider.Set) (provider.Cut, error) {
	c.prepared++
	return &counterCut{c}, nil
}

type counterCut struct{ c *counter }

func (*counterCut) Estimate() time.Duration { return time.Second }

func (c *counterCut) Take(context.Context) (provider.Taken, error) {
	c.c.taken++
	return provider.Taken{Atomic: true}, nil
}

func (c *counterCut) Close() error {
	c.c.closed++
	return nil
}

func TestOnlyTheNthCallFails(t *testing.T) {
	c := &counter{}
	p := faulty.Wrap(c, faulty.Rule{Method: "Attach", Nth: 2, Err: errBroken})
	for n := 1; n <= 3; n++ {
		device, err := p.Attach(t.Context(), "vol-1")
		if failed := errors.Is(err, errBroken); failed != (n == 2) || (device == "") != failed {
			t.Errorf("call %d: got %q, %v", n, device, err)
		}
	}
	if c.attached != 2 || p.Calls("Attach") != 3 || len(p.Unhit()) > 0 {
		t.Errorf("%d effects of %d calls, not hit %v", c.attached, p.Calls("Attach"), p.Unhit())
	}
}

func TestALostAnswerHasItsEffect(t *testing.T) {
	c := &counter{}
	p := faulty.Wrap(c, faulty.Rule{Method: "Attach", Err: errBroken, AfterEffect: true})
	device, err := p.Attach(t.Context(), "vol-1")
	if device != "" || !errors.Is(err, errBroken) || c.attached != 1 {
		t.Errorf("got %q, %v, %d effects", device, err, c.attached)
	}
}

func TestTheCutHasTheRules(t *testing.T) {
	c := &counter{}
	p := faulty.Wrap(c, faulty.Rule{Method: "Take", Nth: 1, Err: errBroken, AfterEffect: true}, faulty.Rule{Method: "Close", Nth: 1, Err: errBroken})
	cut, err := p.Prepare(t.Context(), provider.Set{})
	if err != nil {
		t.Fatal(err)
	}
	if got := cut.Estimate(); got != time.Second {
		t.Errorf("got %v", got)
	}
	if taken, err := cut.Take(t.Context()); !errors.Is(err, errBroken) || taken.Atomic || c.taken != 1 {
		t.Errorf("got %v, %v, %d effects", taken, err, c.taken)
	}
	if err := cut.Close(); !errors.Is(err, errBroken) || c.closed != 0 {
		t.Errorf("got %v, closed %d times", err, c.closed)
	}
	if err := cut.Close(); err != nil || c.closed != 1 {
		t.Errorf("got %v, closed %d times", err, c.closed)
	}
}

func TestALostPreparationIsClosed(t *testing.T) {
	c := &counter{}
	p := faulty.Wrap(c, faulty.Rule{Method: "Prepare", Err: errBroken, AfterEffect: true})
	if cut, err := p.Prepare(t.Context(), provider.Set{}); cut != nil || !errors.Is(err, errBroken) || c.prepared != 1 || c.closed != 1 {
		t.Errorf("got %v, %v; prepared %d, closed %d", cut, err, c.prepared, c.closed)
	}
}

func TestADelayEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{}
		p := faulty.Wrap(c, faulty.Rule{Method: "Attach", Delay: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, err := p.Attach(ctx, "vol-1"); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Minute || c.attached != 0 {
			t.Errorf("got %v after %v, %d effects", err, time.Since(began), c.attached)
		}
		if _, err := p.Attach(t.Context(), "vol-1"); err != nil || time.Since(began) != time.Hour+time.Minute || c.attached != 1 {
			t.Errorf("got %v after %v, %d effects", err, time.Since(began), c.attached)
		}
	})
}

func TestCancelComesBeforeTheEffect(t *testing.T) {
	c := &counter{}
	ctx, cancel := context.WithCancel(t.Context())
	p := faulty.Wrap(c, faulty.Rule{Method: "Attach", Nth: 1, Cancel: cancel})
	if _, err := p.Attach(ctx, "vol-1"); !errors.Is(err, context.Canceled) || c.attached != 0 {
		t.Errorf("got %v, %d effects", err, c.attached)
	}
}

func TestRulesThatNoCallMetAreTold(t *testing.T) {
	p := faulty.Wrap(&counter{}, faulty.Rule{Method: "Attach", Nth: 2, Err: errBroken}, faulty.Rule{Method: "Attach", Nth: 1, Err: errBroken})
	_, _ = p.Attach(t.Context(), "vol-1")
	if got := p.Unhit(); len(got) != 1 || got[0].Nth != 2 {
		t.Errorf("got %v", got)
	}
}
