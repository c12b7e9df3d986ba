package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// stallsView are dots on a logarithmic axis that all lanes share.
type stallsView struct {
	Said    string
	Ticks   []tick
	Grounds []stallGround
}

type stallGround struct {
	Name  string
	Lanes []stallLane
}

type stallLane struct {
	Name, Words string
	Dots        []float64
	Median      float64
}

// stalls returns nil where none was measured. A drill's are those of its cells.
func (p Page) stalls() *stallsView {
	v, in := &stallsView{Said: p.StallsSaid}, p.Stalls
	if p.Drill != nil {
		in = nil
		v.Said = "The longest time without a commit, from a second before each cut to a second after it. A dot is a trial."
		for _, c := range p.Drill.Cells {
			if len(c.Stalls) > 0 {
				in = append(in, Stalls{c.Ground, cmp.Or(c.Cut, c.Name), c.Stalls})
			}
		}
	}
	var all []time.Duration
	for _, s := range in {
		all = append(all, s.Lengths...)
	}
	if len(all) == 0 {
		return nil
	}
	place := v.axis(slices.Min(all), slices.Max(all))
	for _, s := range in {
		if n := len(v.Grounds); n == 0 || v.Grounds[n-1].Name != s.Ground {
			v.Grounds = append(v.Grounds, stallGround{Name: s.Ground})
		}
		g := &v.Grounds[len(v.Grounds)-1]
		g.Lanes = append(g.Lanes, s.lane(place))
	}
	return v
}

func (s Stalls) lane(place func(time.Duration) float64) stallLane {
	l := stallLane{Name: s.Name, Words: "none was measured"}
	sorted := slices.Sorted(slices.Values(s.Lengths))
	for _, t := range sorted {
		l.Dots = append(l.Dots, place(t))
	}
	if n := len(sorted); n > 0 {
		median := (sorted[(n-1)/2] + sorted[n/2]) / 2
		l.Median = place(median)
		l.Words = fmt.Sprintf("median %s, longest %s, of %d", seconds(median.Seconds()), seconds(sorted[n-1].Seconds()), n)
	}
	return l
}

// axis reaches from a millisecond or more to what the longest needs.
func (v *stallsView) axis(shortest, longest time.Duration) (place func(time.Duration) float64) {
	decade := func(t time.Duration) float64 { return math.Log10(max(float64(t)/float64(time.Millisecond), 1)) }
	first := math.Floor(decade(shortest))
	last := math.Max(math.Ceil(decade(longest)+1e-9), first+1)
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
