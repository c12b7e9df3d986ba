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
// how long commits stood still in each.
type Cell struct {
	Name   string
	Counts []int // by class
	Said   string
	Stalls []time.Duration
}

// CheckRow is how one check did.
type CheckRow struct {
	Name                                     string
	Caught, Missed, CouldNotRun, SoundPassed int
}

type drillView struct {
	Legend []legend
	Cells  []cellView
	Stalls []stallView
	Ticks  []tick
	Checks []CheckRow
}

type legend struct {
	N          int
	Key, Words string
}

type cellView struct {
	Name, Counted, Said string
	Bars                []stack
}

type stack struct {
	N        int // class
	X, Width float64
	Label    string
}

type stallView struct {
	Name, Words string
	Dots        []float64
	Median      float64
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
	v := &drillView{Checks: d.Checks}
	for i, c := range d.Classes {
		v.Legend = append(v.Legend, legend{i, c.Key, c.Words})
	}
	for _, c := range d.Cells {
		v.Cells = append(v.Cells, d.cell(c))
	}
	d.stalls(v)
	return v
}

// cell stacks the outcomes of one cell, the good one first.
func (d *Drill) cell(c Cell) cellView {
	v := cellView{Name: c.Name, Said: c.Said}
	all := 0
	for _, n := range c.Counts {
		all += n
	}
	var words []string
	at := 0
	for i, n := range c.Counts {
		if n == 0 {
			continue
		}
		v.Bars = append(v.Bars, stack{i, percentOf(at, all), percentOf(n, all), fmt.Sprint(n)})
		words = append(words, fmt.Sprintf("%d %s", n, d.Classes[i].Key))
		at += n
	}
	v.Counted = strings.Join(words, ", ")
	if all == 0 {
		v.Counted = "no trial was judged"
	}
	return v
}

func percentOf(n, all int) float64 { return math.Round(float64(n)/float64(max(all, 1))*1e5) / 1e3 }

// stalls puts every trial of a cell on a logarithmic axis that all cells share,
// from a millisecond or more to what the longest needs.
func (d *Drill) stalls(v *drillView) {
	var all []time.Duration
	for _, c := range d.Cells {
		all = append(all, c.Stalls...)
	}
	if len(all) == 0 {
		return
	}
	decade := func(t time.Duration) float64 { return math.Log10(max(float64(t)/float64(time.Millisecond), 1)) }
	first := math.Floor(decade(slices.Min(all)))
	last := math.Max(math.Ceil(decade(slices.Max(all))+1e-9), first+1)
	x := func(t float64) float64 { return 2 + math.Round((t-first)/(last-first)*96e3)/1e3 }
	for e := first; e <= last; e++ {
		v.Ticks = append(v.Ticks, tick{x(e), seconds(math.Pow(10, e-3)), "middle"})
	}
	v.Ticks[0].Anchor, v.Ticks[len(v.Ticks)-1].Anchor = "start", "end"
	for _, c := range d.Cells {
		s := stallView{Name: c.Name, Words: "no trial"}
		sorted := slices.Sorted(slices.Values(c.Stalls))
		for _, t := range sorted {
			s.Dots = append(s.Dots, x(decade(t)))
		}
		if n := len(sorted); n > 0 {
			median := (sorted[(n-1)/2] + sorted[n/2]) / 2
			s.Median = x(decade(median))
			s.Words = fmt.Sprintf("%d trials: median %s, longest %s", n, seconds(median.Seconds()), seconds(sorted[n-1].Seconds()))
		}
		v.Stalls = append(v.Stalls, s)
	}
}
