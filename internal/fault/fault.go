// Package fault lets the fault sweep stop the program at any outside call.
//
//	context with an Injector → Point(ctx, "host.mount") → error, cancel or kill
//
// Without an injector in the context Point does nothing and costs one lookup.
// Only a binary built with the tag "fault" ever puts one there.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// ErrInjected is what an injected failure wraps.
var ErrInjected = errors.New("injected fault")

type key struct{}

// Injector counts the points that are passed and acts at one of them. The
// zero value only counts.
type Injector struct {
	Action string            // "error", "cancel" (SIGINT to ourselves), "kill" (SIGKILL to ourselves)
	At     int               // at which point, counted from 1
	Log    func(name string) // told of every point; may be nil

	mu     sync.Mutex
	passed []string
}

// Parse reads "error@7"; the empty string gives an injector that only counts.
func Parse(s string) (*Injector, error) {
	if s == "" {
		return &Injector{}, nil
	}
	action, at, _ := strings.Cut(s, "@")
	n, err := strconv.Atoi(at)
	if err != nil || n < 1 || (action != "error" && action != "cancel" && action != "kill") {
		return nil, fmt.Errorf("fault %q: want error@N, cancel@N or kill@N", s)
	}
	return &Injector{Action: action, At: n}, nil
}

// With returns a context in which i acts.
func With(ctx context.Context, i *Injector) context.Context {
	return context.WithValue(ctx, key{}, i)
}

// Passed returns the names of the points passed so far, in order.
func (i *Injector) Passed() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.passed...)
}

// Point marks a place just before or just after an outside call. It returns
// an error that wraps ErrInjected where a failure was asked for.
func Point(ctx context.Context, name string) error {
	i, ok := ctx.Value(key{}).(*Injector)
	if !ok {
		return nil
	}
	i.mu.Lock()
	i.passed = append(i.passed, name)
	hit := i.At == len(i.passed)
	if i.Log != nil {
		i.Log(name)
	}
	i.mu.Unlock()
	if !hit {
		return nil
	}
	switch i.Action {
	case "kill":
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		select {} // the signal ends the process
	case "cancel":
		return syscall.Kill(syscall.Getpid(), syscall.SIGINT)
	}
	return fmt.Errorf("%s: %w", name, ErrInjected)
}
