package flow_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

// TestWhatANightStillDoesAfterAPartFailed goes through every outcome of the parts
// that come before each.
func TestWhatANightStillDoesAfterAPartFailed(t *testing.T) {
	failed := errors.New("failed")
	damage := fmt.Errorf("backup x: %w", backup.ErrDamage)
	left := fmt.Errorf("copy y: %w", backup.ErrLeft)
	for _, backedUp := range []error{nil, failed, left} {
		for _, dumped := range []error{nil, failed, damage, left} {
			for _, verified := range []error{nil, failed, damage, errors.Join(damage, left), context.Canceled} {
				steps := []flow.NightlyStep{nightStep(flow.NightlyBackup, backedUp), nightStep(flow.NightlyDump, dumped), nightStep(flow.NightlyVerify, verified)}
				name := fmt.Sprintf("backup %v, dump %v, verify %v", backedUp, dumped, verified)
				if got := flow.Obstacle(steps[:1], flow.NightlyDump); (got == "") != (backedUp == nil) {
					t.Errorf("%s: dump %q", name, got)
				}
				if got := flow.Obstacle(steps[:2], flow.NightlyVerify); (got == "") != (backedUp == nil) {
					t.Errorf("%s: verify %q", name, got)
				}
				got := flow.Obstacle(steps, flow.NightlyPrune)
				if want := backedUp == nil && verified == nil && !errors.Is(dumped, backup.ErrDamage); (got == "") != want {
					t.Errorf("%s: prune %q, want it to run: %v", name, got, want)
				}
				if errors.Is(verified, backup.ErrDamage) && !errors.Is(dumped, backup.ErrDamage) && !strings.Contains(got, "damage was found (verify)") {
					t.Errorf("%s: prune %q", name, got)
				}
			}
		}
	}
	asked := []flow.NightlyStep{{Part: flow.NightlyBackup, State: flow.StepSkipped}, {Part: flow.NightlyDump, State: flow.StepSkipped}, {Part: flow.NightlyVerify, State: flow.StepSkipped}}
	if got := flow.Obstacle(asked, flow.NightlyPrune); got != "" {
		t.Errorf("prune alone: %q", got)
	}
}

func nightStep(p flow.NightlyPart, err error) flow.NightlyStep {
	s := flow.NightlyStep{Part: p, State: flow.StepDone, Err: err}
	if err != nil {
		s.State = flow.StepFailed
	}
	return s
}
