package demo_test

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/demo"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
)

func options(t *testing.T) demo.Options {
	t.Helper()
	return demo.Options{Program: labtest.Binary(t), Version: "test", Provider: "local", Mode: backup.ModeFreeze, Rows: 10000, VolumeSize: 1 << 30,
		Report: filepath.Join(t.TempDir(), "report.html"), Out: os.Stdout, Log: slog.New(slog.DiscardHandler)}
}

func TestTheStoryHoldsStepByStep(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	holds(t, options(t))
}

func TestTheStoryHoldsInBackupMode(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	o := options(t)
	o.Mode, o.Rows = backup.ModeBracketed, 3000
	if res := holds(t, o); res.Mode != "bracketed" {
		t.Errorf("mode %s", res.Mode)
	}
}

func TestTheStoryHoldsThroughEC2WithAGroup(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	o := options(t)
	o.Provider, o.Mode, o.Rows, o.Latency = "ec2", backup.ModeAuto, 3000, 10*time.Millisecond // auto prefers the group
	res := holds(t, o)
	if res.Provider != "ec2" || res.Mode != "group" || res.Calls["CreateSnapshots"] != 1 || res.Calls["CreateSnapshot"] != 0 {
		t.Errorf("provider %s, mode %s, calls %v: want one CreateSnapshots", res.Provider, res.Mode, res.Calls)
	}
}

func TestTheStoryHoldsThroughEC2WithAFreeze(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	o := options(t)
	o.Provider, o.Mode, o.Rows, o.Skew = "ec2", backup.ModeFreeze, 3000, time.Second
	res := holds(t, o)
	if res.Provider != "ec2" || res.Mode != "freeze" || res.Calls["CreateSnapshots"] != 0 || res.Calls["CreateSnapshot"] != 4 {
		t.Errorf("provider %s, mode %s, calls %v: want four CreateSnapshot", res.Provider, res.Mode, res.Calls)
	}
}

// holds tells the story and fails the test unless every step of it holds.
func holds(t *testing.T, o demo.Options) demo.Result {
	t.Helper()
	res, err := demo.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	want := 1
	for _, s := range res.Steps {
		if s.N != want {
			t.Errorf("step %d where %d was expected", s.N, want)
		}
		want++
		switch {
		case !s.OK:
			t.Errorf("step %d (%s): %s", s.N, s.Name, s.Error)
		case len(s.Facts) == 0:
			t.Errorf("step %d has no facts", s.N)
		}
	}
	if want != 23 || !res.OK {
		t.Errorf("the story ended before step %d with ok = %v", want, res.OK)
	}
	page, err := os.ReadFile(o.Report)
	if err != nil || !strings.Contains(string(page), "beater B") {
		t.Errorf("report of %d bytes: %v", len(page), err)
	}
	var data struct {
		demo.Result
		Manifest   backup.Manifest
		Verdict    backup.Verdict
		Throughput map[string][]load.Point
	}
	b, err := os.ReadFile(res.Data)
	if err := errors.Join(err, json.Unmarshal(b, &data)); err != nil || !data.OK || len(data.Steps) != 22 || len(data.Manifest.Snapshots) != 4 || !data.Verdict.Good() || len(data.Throughput["words"]) == 0 || len(data.Throughput["transfers"]) == 0 {
		t.Errorf("the data beside the report does not hold the run: %v, %d bytes", err, len(b))
	}
	for _, want := range []string{"the cut</strong> at", "held, ", "round 1, ", "volume 3", "thawed, at", "seed of the play database"} {
		if res.Mode == "freeze" && !strings.Contains(string(page), want) {
			t.Errorf("the report does not say %q", want)
		}
	}
	return res
}

func TestWhatNoGroundCanGiveIsRefusedBeforeAnythingIsMade(t *testing.T) {
	for _, o := range []demo.Options{
		{Provider: "tape", Mode: backup.ModeAuto}, {Provider: "ec2", Mode: backup.ModeNone}, {Provider: "local", Mode: backup.ModeGroup},
		{Provider: "local", Mode: backup.ModeFreeze, Skew: time.Second}, {Provider: "ec2", Mode: backup.ModeGroup, Latency: -time.Second},
	} {
		if _, err := demo.Run(t.Context(), o); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("provider %s, mode %s, skew %v, latency %v: got %v, want a usage error", o.Provider, o.Mode, o.Skew, o.Latency, err)
		}
	}
}

func TestAFailedStepStopsTheStoryAndCleansUp(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	o := options(t)
	o.Program = "/bin/false" // the watchdog cannot be armed, so step 11 must fail
	res, err := demo.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	last := res.Steps[len(res.Steps)-1]
	if res.OK || last.OK || last.N > 11 || !strings.Contains(last.Error, "watchdog") {
		t.Errorf("ended with ok = %v at step %d: %q", res.OK, last.N, last.Error)
	}
	if strings.Contains(last.Error, "clean-up") {
		t.Errorf("the clean-up failed: %s", last.Error)
	}
	left, err := filepath.Glob("/tmp/ccd-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}
