package report_test

import (
	"strings"
	"testing"
	"time"

	"cleancut/internal/report"
)

// drill is a page of an experiment: two cells of ten trials each.
func drill() report.Page {
	p := demo()
	p.Steps, p.OK = nil, false
	held := true
	d := &report.Drill{Word: "Every protected cut was sound", Text: "0 of 10 protected cuts damaged.", Held: &held}
	for _, k := range []string{"sound", "silent", "phantom", "lost", "fsdamage", "nostart", "nomount"} {
		d.Classes = append(d.Classes, report.Class{Key: k, Words: "in words: " + k})
	}
	ms := func(of ...int) []time.Duration {
		var out []time.Duration
		for _, n := range of {
			out = append(out, time.Duration(n)*time.Millisecond)
		}
		return out
	}
	d.Cells = []report.Cell{
		{Ground: "raid0 of 4", Name: "freeze, 5s apart", Counts: []int{10, 0, 0, 0, 0, 0, 0}, Said: "0 of 10 frozen cuts", Stalls: ms(15000, 15100, 15050, 15020, 15040, 15010, 15080, 15060, 15030, 15070)},
		{Ground: "raid0 of 4", Name: "none, 5s apart", Counts: []int{2, 3, 1, 1, 1, 1, 1}, Said: "8 of 10 cuts", Stalls: ms(4, 9, 12, 20, 31, 44, 58, 90, 130, 400)},
	}
	d.Checks = []report.CheckRow{{Name: "pg_amcheck", Caught: 6, Missed: 1, SoundPassed: 12}}
	p.Drill = d
	return p
}

func TestADrillTellsItsOutcomesInWordsToo(t *testing.T) {
	text := written(t, drill())
	for _, want := range []string{"Every protected cut was sound", "0 of 10 protected cuts damaged.", "10 sound<", "2 sound, 3 silent, 1 phantom, 1 lost, 1 fsdamage, 1 nostart, 1 nomount",
		"median 37.5 ms, longest 400 ms, of 10", "pg_amcheck", "Of 8 damaged images", `data-label="Not run">1<`, "<h3>raid0 of 4</h3>", "in words: nomount"} {
		if !strings.Contains(text, want) {
			t.Errorf("nothing says %q", want)
		}
	}
	if strings.Contains(text, `id="steps"`) {
		t.Error("a drill has no steps")
	}
}

func TestADrillsVerdictIsItsOwn(t *testing.T) {
	p := drill()
	*p.Drill.Held = false
	if text := written(t, p); !strings.Contains(text, `class="verdict bad"`) {
		t.Error("a protected cut was damaged, and the page does not say so")
	}
	p.Drill.Held = nil
	if text := written(t, p); !strings.Contains(text, `class="verdict none"`) {
		t.Error("nothing was claimed, and the page says it held")
	}
	p.Drill = &report.Drill{Word: "Measured"}
	for _, want := range []string{"no image was judged", "no stall was measured", "no check ran"} {
		if text := written(t, p); !strings.Contains(text, want) {
			t.Errorf("an empty drill does not say %q", want)
		}
	}
}
