package report

import (
	"fmt"
	"math"
	"slices"
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
// how long commits stood still in each. Cells of one Ground stand under its name
// and should follow each other.
type Cell struct {
	Ground string
	Name   string
	Counts []int // by class
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
	Stalls         bool // there are some
	Ticks          []tick
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
	Stall               stallView
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

type stallView struct {
	Words  string
	Dots   []float64
	Median float64
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
	place := d.axis(v)
	for _, c := range d.Cells {
		if n := len(v.Grounds); n == 0 || v.Grounds[n-1].Name != c.Ground {
			v.Grounds = append(v.Grounds, groundView{Name: c.Ground})
		}
		g := &v.Grounds[len(v.Grounds)-1]
		g.Cells = append(g.Cells, d.cell(c, place))
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

func (d *Drill) cell(c Cell, place func(time.Duration) float64) cellView {
	keys := make([]string, len(d.Classes))
	for i, class := range d.Classes {
		keys[i] = class.Key
	}
	v := cellView{Name: c.Name, Said: c.Said, Counted: "no trial was judged", Stall: stallView{Words: "no trial"}}
	var words []string
	if v.Bars, words = stacked(c.Counts, keys); len(words) > 0 {
		v.Counted = strings.Join(words, ", ")
	}
	sorted := slices.Sorted(slices.Values(c.Stalls))
	for _, t := range sorted {
		v.Stall.Dots = append(v.Stall.Dots, place(t))
	}
	if n := len(sorted); n > 0 {
		median := (sorted[(n-1)/2] + sorted[n/2]) / 2
		v.Stall.Median = place(median)
		v.Stall.Words = fmt.Sprintf("median %s, longest %s, %d trials", seconds(median.Seconds()), seconds(sorted[n-1].Seconds()), n)
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

// axis is a logarithmic one that the stalls of all cells share, from a
// millisecond or more to what the longest needs.
func (d *Drill) axis(v *drillView) (place func(time.Duration) float64) {
	var all []time.Duration
	for _, c := range d.Cells {
		all = append(all, c.Stalls...)
	}
	if v.Stalls = len(all) > 0; !v.Stalls {
		return nil
	}
	decade := func(t time.Duration) float64 { return math.Log10(max(float64(t)/float64(time.Millisecond), 1)) }
	first := math.Floor(decade(slices.Min(all)))
	last := math.Max(math.Ceil(decade(slices.Max(all))+1e-9), first+1)
	x := func(t float64) float64 { return 2 + math.Round((t-first)/(last-first)*96e3)/1e3 }
	for e := first; e <= last; e++ {
		label := fmt.Sprintf("%.0f ms", math.Pow(10, e))
		if e >= 3 {
			label = fmt.Sprintf("%.0f s", math.Pow(10, e-3))
		}
		v.Ticks = append(v.Ticks, tick{x(e), label, "middle"})
	}
	v.Ticks[0].Anchor, v.Ticks[len(v.Ticks)-1].Anchor = "start", "end"
	return func(t time.Duration) float64 { return x(decade(t)) }
}
