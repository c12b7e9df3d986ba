package drill_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
)

func grid() drill.Grid {
	return drill.Grid{Modes: []backup.Mode{"freeze", "none"}, Skews: []time.Duration{0, 5 * time.Second}, Orders: []string{"forward"}, Volumes: []int{4}, Chunks: []backup.Bytes{64 << 10, 1 << 20},
		Layouts: []string{"raid0", "separate"}, Filesystems: []string{"xfs"}, Loads: []string{"heavy"}, Checkpoints: []string{"none"}, Recoveries: []string{"crash"}}
}

func everywhere([]string) (where, why string) { return "native", "" }

func TestAGridIsEachValueWithEachOther(t *testing.T) {
	cells, refused := grid().Cells(everywhere)
	// Two chunk sizes are two of raid0 and one of separate, which has none.
	if len(cells) != 2*2*(2+1) || len(refused) != 0 {
		t.Errorf("%d cells, %v refused: want 12 and none", len(cells), refused)
	}
	for i, c := range cells {
		if slices.Index(cells, c) != i {
			t.Errorf("%s comes twice", c.Conditions())
		}
	}
}

func TestCellsThatCannotBeDoneAreNamed(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(g *drill.Grid)
		says   string
	}{
		{"a group of the local provider", func(g *drill.Grid) { g.Modes = append(g.Modes, "group") }, "has no group; the EC2 test server has: --provider ec2"},
		{"a mode that is none", func(g *drill.Grid) { g.Modes = append(g.Modes, "thaw") }, `mode "thaw"`},
		{"a layout", func(g *drill.Grid) { g.Layouts = append(g.Layouts, "raid5") }, "raid0, linear, lvm, lvm-striped"},
		{"one volume", func(g *drill.Grid) { g.Volumes = append(g.Volumes, 1) }, "1 volumes: want 2"},
		{"a chunk that is none", func(g *drill.Grid) { g.Chunks = append(g.Chunks, 65000) }, "power of two"},
		{"a filesystem", func(g *drill.Grid) { g.Filesystems = append(g.Filesystems, "btrfs") }, "xfs or ext4"},
		{"a load", func(g *drill.Grid) { g.Loads = append(g.Loads, "idle") }, `load "idle"`},
		{"an order", func(g *drill.Grid) { g.Orders = append(g.Orders, "random") }, `order "random"`},
		{"a skew", func(g *drill.Grid) { g.Skews = append(g.Skews, -1e9) }, "a skew of -1s"},
		{"a checkpoint", func(g *drill.Grid) { g.Checkpoints = append(g.Checkpoints, "after") }, `checkpoint "after"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := grid()
			before, _ := g.Cells(everywhere)
			c.change(&g)
			cells, refused := g.Cells(everywhere)
			if len(refused) == 0 || len(cells) != len(before) {
				t.Fatalf("%d cells, %d refused", len(cells), len(refused))
			}
			if !slices.ContainsFunc(refused, func(r drill.Refusal) bool { return strings.Contains(r.Why, c.says) && r.Cell != "" }) {
				t.Errorf("got %v, want %q", refused, c.says)
			}
		})
	}
	cells, refused := grid().Cells(func(needs []string) (string, string) {
		if len(needs) > 0 {
			return "", "no " + strings.Join(needs, ", ")
		}
		return "native", ""
	})
	if len(cells) != 4 || len(refused) != 8 || refused[0].Why != "no md arrays" {
		t.Errorf("%d cells, refused %v: want the 4 of separate, and the 8 of raid0 named", len(cells), refused)
	}
	g := grid()
	g.Provider = "gce"
	if cells, refused := g.Cells(everywhere); len(cells) != 0 || !strings.Contains(refused[0].Why, "local or ec2") {
		t.Errorf("%d cells, refused %v: want no cell of provider gce", len(cells), refused)
	}
}

func TestAGroupIsOneCallSoItHasNoSkew(t *testing.T) {
	g := grid()
	g.Provider, g.Layouts, g.Modes = drill.EC2, []string{"separate", "lvm"}, []backup.Mode{"freeze", "group", "none"}
	asked := map[string]bool{}
	cells, refused := g.Cells(func(needs []string) (string, string) {
		asked[strings.Join(needs, ", ")] = true
		return "uml", ""
	})
	if len(refused) > 0 || len(cells) != 2*(2+1+2) {
		t.Errorf("%d cells, refused %v: want freeze and none with two skews each, and group once, of two layouts", len(cells), refused)
	}
	for _, c := range cells {
		if c.Mode == "group" && (c.SkewMS != 0 || !c.Protected()) || c.Provider != drill.EC2 || !strings.Contains(c.Conditions(), "ec2") {
			t.Errorf("got %+v, %s", c, c.Conditions())
		}
	}
	// All cells of a ground are of one production run, so of one kernel.
	if len(asked) != 1 || !asked["device mapper"] {
		t.Errorf("needs %v, want the device mapper for each cell of a grid with groups", asked)
	}
}

func TestAnOrderIsOneOnlyWithASkew(t *testing.T) {
	g := grid()
	g.Layouts, g.Orders = []string{"separate"}, []string{drill.Forward, drill.Backward}
	cells, refused := g.Cells(everywhere)
	if len(cells) != 2*(1+2) || len(refused) > 0 {
		t.Errorf("%d cells, refused %v: want freeze and none, each without skew once and with it in both orders", len(cells), refused)
	}
}

func TestLinesOfEarlierDrillsAreOfTheLocalProvider(t *testing.T) {
	g := grid()
	g.Provider, g.Layouts, g.Modes, g.Skews = drill.Local, []string{"separate"}, []backup.Mode{"none"}, []time.Duration{0}
	cells, _ := g.Cells(everywhere)
	const line = `{"where":"native","layout":"separate","volumes":4,"chunk_bytes":0,"fs":"xfs","load":"heavy","checkpoint":"none","mode":"none","skew_ms":0}`
	var c drill.Cell
	cells[0].Recovery = "" // what they do not tell
	if err := json.Unmarshal([]byte(line), &c); err != nil || len(cells) != 1 || c != cells[0] {
		t.Errorf("got %+v (%v), want %+v", c, err, cells)
	}
	if b, err := json.Marshal(c); err != nil || string(b) != line {
		t.Errorf("got %s (%v), want it as it was", b, err)
	}
}

func TestTheSameSeedMakesTheSameConditionsAgain(t *testing.T) {
	cells, _ := grid().Cells(everywhere)
	none := func(drill.Cell, int) bool { return false }
	one, again := drill.Schedule(cells, 7, 3, none), drill.Schedule(cells, 7, 3, none)
	if !slices.Equal(one, again) || len(one) != 3*len(cells) {
		t.Fatalf("%d cuts, then %d others", len(one), len(again))
	}
	slices.Reverse(cells)
	if other := drill.Schedule(cells, 7, 3, none); !sameSet(one, other) {
		t.Error("the order of the flags changes a trial's conditions")
	}
	if other := drill.Schedule(cells, 8, 3, none); slices.Equal(one, other) {
		t.Error("another seed has the same conditions")
	}
	more := drill.Schedule(cells, 7, 5, none)
	for _, s := range one {
		if !slices.Contains(more, s) {
			t.Errorf("with more trials, %+v is another", s)
		}
	}
	// What is done is left out, and the rest is as it was.
	left := drill.Schedule(cells, 7, 3, func(c drill.Cell, n int) bool { return c.Mode == "none" || n == 2 })
	for _, s := range left {
		if !slices.Contains(one, s) || s.N == 2 || s.Cell.Mode == "none" {
			t.Errorf("%+v is left to do", s)
		}
	}
	if len(left) != len(one)/3 {
		t.Errorf("%d left, want %d", len(left), len(one)/3)
	}
	for _, s := range one {
		if s.Pause < 500*time.Millisecond || s.Pause > 5*time.Second {
			t.Errorf("a pause of %v", s.Pause)
		}
	}
}

func sameSet(a, b []drill.Cut) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(c drill.Cut) bool { return !slices.Contains(b, c) })
}

func TestTrialsAreCountedByCellAndOnce(t *testing.T) {
	cell := drill.Cell{Where: "native", Layout: "separate", Volumes: 4, Filesystem: "xfs", Load: "heavy", Checkpoint: "none", Mode: "none", SkewMS: 5000}
	frozen := cell
	frozen.Mode = "freeze"
	got := drill.Summarize([]drill.Trial{
		{Cell: cell, Seed: 1, N: 1, Class: drill.Silent}, {Cell: cell, Seed: 1, N: 2}, {Cell: cell, Seed: 1, N: 2}, // not judged, twice
		{Cell: cell, Seed: 1, N: 3}, {Cell: cell, Seed: 1, N: 3, Class: drill.Lost}, // judged when repeated
		{Cell: cell, Seed: 2, N: 1, Class: drill.Sound}, {Cell: frozen, Seed: 1, N: 1, Class: drill.Sound},
	})
	if len(got) != 2 || got[0].Mode != "freeze" || got[0].Trials != 1 || got[0].Sound != 1 || got[0].Upper != 1 {
		t.Fatalf("got %+v", got)
	}
	if c := got[1]; c.Trials != 3 || c.Sound != 1 || c.Silent != 1 || c.Lost != 1 || c.Unjudged != 1 || c.Damaged != 2 {
		t.Errorf("got %+v, want 3 trials, 2 damaged, 1 not judged", c)
	}
	if err := (drill.Summary{Cells: got}).Alarm(); err != nil {
		t.Errorf("%v, though no cut that was held is damaged", err)
	}
	got[0].Damaged = 1
	if err := (drill.Summary{Cells: got}).Alarm(); !errors.Is(err, backup.ErrDamage) || !strings.Contains(err.Error(), "freeze, 5s apart") {
		t.Errorf("got %v, want the frozen cell as damage", err)
	}
	b, err := json.Marshal(got[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"mode":"none"`, `"skew_ms":5000`, `"trials":3`, `"sound":1`, `"lost":1`, `"phantom":0`, `"silent":1`, `"nostart":0`, `"nomount":0`, `"fsdamage":0`, `"upper95":`} {
		if !strings.Contains(string(b), key) {
			t.Errorf("no %s in %s", key, b)
		}
	}
}

func TestWhatChecksCaughtAndMissedIsCounted(t *testing.T) {
	device := func(name string, r backup.CheckResult) backup.Check {
		return backup.Check{Name: backup.FilesystemCheck("xfs", name), Result: r}
	}
	got := drill.CountChecks([]drill.Trial{
		{Class: drill.Silent, Checks: []backup.Check{{Name: "a", Result: backup.Failed}, {Name: "b", Result: backup.Passed}, device("/dev/loop1", backup.Passed), device("/dev/loop2", backup.Passed)}},
		{Class: drill.FSDamage, Checks: []backup.Check{{Name: "a", Result: backup.CouldNotRun}, device("/dev/loop1", backup.Failed), device("/dev/loop2", backup.Passed)}},
		{Class: drill.Sound, Checks: []backup.Check{{Name: "a", Result: backup.Passed}}},
		{Checks: []backup.Check{{Name: "a", Result: backup.Failed}}},
	})
	want := []drill.CheckCount{{Check: "a", Caught: 1, CouldNotRun: 1, OnSound: 1}, {Check: "b", Missed: 1}, {Check: "xfs check of the filesystem", Caught: 1, Missed: 1}, {Check: "rows beside the promise", CouldNotRun: 2}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}
