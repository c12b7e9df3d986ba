package report

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Drill is what an experiment adds to a page. A page with one has no steps, and
// its verdict is the experiment's own.
type Drill struct {
	Word, Text string  // the verdict
	Held       *bool   // nil: nothing was claimed that could fail
	Explained  string  // what was tried, for who sees it for the first time
	Classes    []Class // in the order in which counts are given
	Cells      []Cell
	Checks     []CheckRow
}

// Class is a kind of outcome. The first class of a Drill is the good one.
type Class struct {
	Key   string // short, for counts
	Words string
}

// Cell is one combination of conditions: how many trials had which outcome, and
// how long commits stood still in each cut. Cells of one Ground stand under its name
// and should follow each other; of those with the same cuts one has the Stalls.
type Cell struct {
	Ground string
	Name   string
	Cut    string // what Stalls are of; "": Name
	Counts []int  // by class
	Said   string
	Stalls []time.Duration
}

// CheckRow is how one check did: damaged images that it failed and passed, and
// sound ones that it passed. The other damaged images it did not see.
type CheckRow struct {
	Name                        string
	Caught, Missed, SoundPassed int
}

type drillView struct {
	Explained      string
	Legend         []legend
	Grounds        []groundView
	Checks         []checkView
	Sound, Damaged int // images
}

type groundView struct {
	Name  string
	Cells []cellView
}

type legend struct {
	N          int
	Key, Words string
}

type cellView struct {
	Name, Counted, Said string
	Bars                []stack
}

type checkView struct {
	CheckRow
	NotRun int
	Bars   []stack
}

type stack struct {
	N        int // class
	X, Width float64
	Label    string
}

func (d *Drill) verdict() verdict {
	switch {
	case d.Held == nil:
		return verdict{"none", "?", d.Word, d.Text}
	case *d.Held:
		return verdict{"ok", "✓", d.Word, d.Text}
	}
	return verdict{"bad", "✗", d.Word, d.Text}
}

func (d *Drill) view() *drillView {
	if d == nil {
		return nil
	}
	v := &drillView{Explained: d.Explained}
	for i, c := range d.Classes {
		v.Legend = append(v.Legend, legend{i, c.Key, c.Words})
	}
	for _, c := range d.Cells {
		if n := len(v.Grounds); n == 0 || v.Grounds[n-1].Name != c.Ground {
			v.Grounds = append(v.Grounds, groundView{Name: c.Ground})
		}
		g := &v.Grounds[len(v.Grounds)-1]
		g.Cells = append(g.Cells, d.cell(c))
		for i, n := range c.Counts {
			if i == 0 {
				v.Sound += n
			} else {
				v.Damaged += n
			}
		}
	}
	for _, c := range d.Checks {
		row := checkView{CheckRow: c, NotRun: max(0, v.Damaged-c.Caught-c.Missed)}
		row.Bars, _ = stacked([]int{c.Caught, c.Missed, row.NotRun}, []string{"caught", "missed", "not run"})
		v.Checks = append(v.Checks, row)
	}
	return v
}

func (d *Drill) cell(c Cell) cellView {
	keys := make([]string, len(d.Classes))
	for i, class := range d.Classes {
		keys[i] = class.Key
	}
	v := cellView{Name: c.Name, Said: c.Said, Counted: "no trial was judged"}
	var words []string
	if v.Bars, words = stacked(c.Counts, keys); len(words) > 0 {
		v.Counted = strings.Join(words, ", ")
	}
	return v
}

// stacked are bars of all that was counted, in its order, and the same in words.
func stacked(counts []int, keys []string) (bars []stack, words []string) {
	all, at := 0, 0
	for _, n := range counts {
		all += n
	}
	for i, n := range counts {
		if n > 0 {
			label := fmt.Sprintf("%d %s", n, keys[i])
			bars = append(bars, stack{i, percentOf(at, all), percentOf(n, all), label})
			words = append(words, label)
			at += n
		}
	}
	return bars, words
}

func percentOf(n, all int) float64 { return math.Round(float64(n)/float64(max(all, 1))*1e5) / 1e3 }
