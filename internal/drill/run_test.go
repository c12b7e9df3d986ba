package drill_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
	"cleancut/internal/lab/labtest"
)

// small is a drill that this machine does in a minute, as root.
func small(t *testing.T) drill.Options {
	t.Helper()
	out := filepath.Join(labtest.Folder(t), "out")
	return drill.Options{Program: labtest.Binary(t), Version: "test", Trials: 1, Seed: 3, Out: out, Keep: drill.KeepNone, Report: filepath.Join(out, "report.html"), Rows: 1000, VolumeSize: 320 << 20,
		Grid: drill.Grid{Modes: []backup.Mode{"freeze", "none"}, Skews: []time.Duration{0, 200 * time.Millisecond}, Orders: []string{"forward"}, Volumes: []int{3}, Layouts: []string{"separate"}, Chunks: []backup.Bytes{64 << 10},
			Filesystems: []string{"xfs"}, Loads: []string{"light"}, Checkpoints: []string{"none"}, Recoveries: []string{"crash", "archive"}},
		Progress: io.Discard, Log: slog.New(slog.DiscardHandler)}
}

// lines reads the trials as another program would.
func lines(t *testing.T, o drill.Options) (out []drill.Trial) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(o.Out, "trials.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		var trial drill.Trial
		if err := json.Unmarshal(s.Bytes(), &trial); err != nil {
			t.Fatal(err)
		}
		out = append(out, trial)
	}
	return out
}

// cancelAt cancels when somebody is told of a word.
type cancelAt struct {
	t      *testing.T
	word   string
	cancel func()
}

func (c *cancelAt) Write(p []byte) (int, error) {
	c.t.Logf("%s", bytes.TrimSpace(p))
	if strings.Contains(string(p), c.word) {
		c.cancel()
	}
	return len(p), nil
}

func TestADrillThatIsStoppedGoesOnWhereItWas(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	o := small(t)
	o.Keep, o.Grid.Skews, o.Grid.Orders = drill.KeepAll, []time.Duration{200 * time.Millisecond}, []string{drill.Forward, drill.Backward}
	const want = 2 * 2 * 2 // freeze and none in two orders, each recovered in two ways
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o.Progress = &cancelAt{t, "sound  ", cancel}
	s, err := drill.Run(ctx, o)
	if !errors.Is(err, context.Canceled) || !s.Interrupted {
		t.Fatalf("got %+v and %v, want an interrupted drill", s, err)
	}
	first := lines(t, o)
	if len(first) == 0 || len(first) >= want || len(first)%2 != 0 {
		t.Fatalf("%d trials before the end, want some of %d", len(first), want)
	}
	o.Progress = &cancelAt{t, "never", func() {}}
	if s, err = drill.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	all := lines(t, o)
	if len(all) != want {
		t.Fatalf("%d trials, want %d: each of the cells once", len(all), want)
	}
	for _, c := range s.Cells {
		if c.Trials != 1 || c.Protected() && c.Sound != 1 {
			t.Errorf("%s: %+v", c.Conditions(), c)
		}
	}
	for _, trial := range all {
		isKept(t, o, trial)
		if trial.StallMS <= 0 || len(trial.Members) != 3 || len(trial.Checks) < 8 || trial.Found == nil || trial.Found.Words.Acked == 0 {
			t.Errorf("a trial that says little: %+v", trial)
		}
		if (trial.Target != "") != (trial.Recovery == drill.Archive) {
			t.Errorf("%s: recovered to %q", trial.Conditions(), trial.Target)
		}
		skew := trial.Members[2].Requested.Sub(trial.Members[0].Requested)
		if trial.Order == drill.Backward {
			skew = -skew
		}
		if skew < 2*trial.Skew() {
			t.Errorf("%s: the last member was cut %v after the first", trial.Conditions(), skew)
		}
	}
	for i := 0; i < len(all); i += 2 {
		crash, archive := all[i], all[i+1]
		if crash.Backup != archive.Backup || archive.Recovery != drill.Archive || archive.Found.Words.Acked < crash.Found.Words.Acked+50 {
			t.Errorf("%d words promised after crash recovery and %d after archive recovery, want at least 50 of after the cut", crash.Found.Words.Acked, archive.Found.Words.Acked)
		}
	}
	judgedAgain(t, o, all[:2])
	reported(t, o, want)
	began := time.Now()
	if _, err := drill.Run(t.Context(), o); err != nil || len(lines(t, o)) != want || time.Since(began) > 5*time.Second {
		t.Errorf("all was done: got %v and %d trials in %v", err, len(lines(t, o)), time.Since(began))
	}
}

// isKept demands the whole image set with its manifest.
func isKept(t *testing.T, o drill.Options, trial drill.Trial) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(o.Out, trial.Kept, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := backup.DecodeManifest(b)
	if err != nil || m.ID != trial.Backup {
		t.Errorf("manifest %s: %v", m.ID, err)
	}
	images, err := filepath.Glob(filepath.Join(o.Out, trial.Kept, "member-*.img"))
	if err != nil || len(images) != 3 {
		t.Errorf("images %q (%v), want 3", images, err)
	}
}

func TestVolumesOfTheEC2TestServerAreCutAndKeptToo(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	o := small(t)
	o.Keep, o.Grid.Provider, o.Grid.Modes = drill.KeepAll, drill.EC2, []backup.Mode{"freeze", "bracketed"}
	o.Grid.Skews = o.Grid.Skews[1:]
	s, err := drill.Run(t.Context(), o)
	if err != nil || len(s.Cells) != 2*2 {
		t.Fatalf("got %+v and %v, want two cuts, each recovered in two ways", s.Cells, err)
	}
	for _, trial := range lines(t, o) {
		isKept(t, o, trial)
		skew := trial.Members[2].Requested.Sub(trial.Members[0].Requested)
		if trial.Mode == backup.ModeBracketed { // the WAL, member 1, comes last
			skew = 2 * trial.Members[2].Requested.Sub(trial.Members[0].Requested)
		}
		if trial.Protected() && trial.Class != drill.Sound || trial.Provider != drill.EC2 || skew < 2*trial.Skew() {
			t.Errorf("%s: %s, the last member was cut %v after the first", trial.Conditions(), trial.Class, skew)
		}
	}
}

// judgedAgain demands the same of a kept image set, which is not touched.
// trials are all of that image.
func judgedAgain(t *testing.T, o drill.Options, trials []drill.Trial) {
	t.Helper()
	dir := filepath.Join(o.Out, trials[0].Kept)
	o.Out = "" // what is not needed
	before := listing(t, dir)
	j, err := drill.JudgeKept(t.Context(), o, dir)
	if err != nil || len(j.Judgements) != len(trials) || len(trials) != 2 {
		t.Fatalf("judged again: %+v (%v), want both ways: %+v", j, err, trials)
	}
	for i, trial := range trials {
		one := j.Judgements[i]
		if j.Backup != trial.Backup || one.Recovery != trial.Recovery || one.Class != trial.Class || len(one.Checks) != len(trial.Checks) || one.Found == nil || one.Found.Words.Found != trial.Found.Words.Found {
			t.Errorf("judged again: %+v, want it as it was: %+v", one, trial)
		}
	}
	if after := listing(t, dir); !maps.Equal(before, after) {
		t.Errorf("the kept files were %v and are %v", before, after)
	}
}

// listing is every file of a folder with its size and when it was changed.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = fmt.Sprint(info.Size(), info.ModTime())
	}
	return out
}

func TestAFolderWithoutKeptImagesIsNotJudged(t *testing.T) {
	_, err := drill.JudgeKept(t.Context(), drill.Options{Progress: io.Discard}, t.TempDir())
	if !errors.Is(err, backup.ErrUsage) || backup.HintOf(err) == "" {
		t.Errorf("got %v, want a usage error that says which folder to name", err)
	}
}

func reported(t *testing.T, o drill.Options, want int) {
	t.Helper()
	page, err := os.ReadFile(o.Report)
	if err != nil || !strings.Contains(string(page), "Every protected cut was sound") || !strings.Contains(string(page), "commits/s") {
		t.Errorf("the report says nothing (%v)", err)
	}
	b, err := os.ReadFile(strings.TrimSuffix(o.Report, ".html") + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var data struct {
		Cells  []drill.CellSummary
		Trials []drill.Trial
		Runs   []drill.ProductionRun
	}
	if err := json.Unmarshal(b, &data); err != nil || len(data.Cells) != want || len(data.Trials) != want || len(data.Runs) == 0 || len(data.Runs[0].Throughput) == 0 {
		t.Errorf("the data beside the report: %d cells, %d trials, %d runs (%v)", len(data.Cells), len(data.Trials), len(data.Runs), err)
	}
}

func TestAGridWithACellThatCannotBeDoneIsNotBegun(t *testing.T) {
	o := drill.Options{Trials: 1, Out: filepath.Join(t.TempDir(), "out"), Keep: drill.KeepNone, Rows: 1, VolumeSize: 1 << 30, Grid: grid(), Progress: io.Discard}
	o.Grid.Modes = append(o.Grid.Modes, "group")
	_, err := drill.Run(t.Context(), o)
	if !errors.Is(err, backup.ErrUsage) || !strings.Contains(err.Error(), "group, all at once, raid0 of 4 × 64 KiB") || backup.HintOf(err) == "" {
		t.Errorf("got %v, want the cell named, with what to do", err)
	}
	if _, err := os.Stat(o.Out); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the output folder was made: %v", err)
	}
}

func TestALineThatACrashCutShortIsNoTrial(t *testing.T) {
	o := drill.Options{Out: t.TempDir(), Keep: drill.KeepNone, Rows: 1, VolumeSize: 1 << 30, Grid: grid(), Progress: io.Discard}
	o.Report, o.Grid.Layouts = filepath.Join(o.Out, "r.html"), nil
	name := filepath.Join(o.Out, "trials.jsonl")
	whole := `{"where":"native","layout":"raid0","volumes":4,"fs":"xfs","load":"heavy","checkpoint":"none","mode":"none","skew_ms":0,"seed":1,"n":1,"class":"silent"}` + "\n"
	if err := os.WriteFile(name, []byte(whole+whole[:50]), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := drill.Run(t.Context(), o)
	if err != nil || len(s.Cells) != 1 || s.Cells[0].Silent != 1 {
		t.Errorf("got %+v and %v, want the one whole line", s.Cells, err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != whole {
		t.Errorf("got %q (%v)", b, err)
	}
	if err := os.WriteFile(name, []byte("nonsense\n"+whole), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := drill.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("got %v, want the line named", err)
	}
}
