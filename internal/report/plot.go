package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// plot is one series, ready to be drawn and told.
type plot struct {
	Name string       `json:"name"`
	Unit string       `json:"unit"`
	Step float64      `json:"step"` // how long a point holds, in seconds
	T    []float64    `json:"t"`
	V    []float64    `json:"v"`
	Gaps [][2]float64 `json:"gaps"` // from, to

	Count                   int    `json:"-"`
	Lowest, Median, Highest string `json:"-"`
	Zeros                   int    `json:"-"`
	Missing                 string `json:"-"` // the gaps in words
}

// Heading names the series with its unit.
func (q plot) Heading() string {
	if q.Unit == "" {
		return q.Name
	}
	return q.Name + ", " + q.Unit
}

// Words says what the plot shows to those who do not see it.
func (q plot) Words() string {
	return fmt.Sprintf("Plot of %s over time: %d values, lowest %s, median %s, highest %s, %d of them zero; without data: %s.",
		q.Heading(), q.Count, q.Lowest, q.Median, q.Highest, q.Zeros, q.Missing)
}

type markView struct {
	N     int     `json:"n"`
	Name  string  `json:"name"`
	From  float64 `json:"from"`
	To    float64 `json:"to"`
	Known bool    `json:"-"`
	When  string  `json:"-"`
	Hue   int     `json:"hue"`
}

// span is the time from the first to the last thing that a plot shows, or
// zero times.
func span(series []Series, marks []Mark) (from, to time.Time) {
	add := func(t time.Time) {
		if t.IsZero() {
			return
		}
		if from.IsZero() || t.Before(from) {
			from = t
		}
		if t.After(to) {
			to = t
		}
	}
	for _, s := range series {
		for _, p := range usable(s.Points) {
			add(p.T)
		}
	}
	for _, m := range marks {
		add(m.From)
		if !m.From.IsZero() {
			add(m.To)
		}
	}
	return from, to
}

// usable returns the points that measure something, in order of time.
func usable(points []Point) []Point {
	out := slices.DeleteFunc(slices.Clone(points), func(p Point) bool {
		return p.T.IsZero() || math.IsNaN(p.V) || math.IsInf(p.V, 0)
	})
	slices.SortStableFunc(out, func(a, b Point) int { return a.T.Compare(b.T) })
	return out
}

func plots(series []Series, origin time.Time) []plot {
	var out []plot
	for _, s := range series {
		q := plot{Name: s.Name, Unit: s.Unit, Step: 1, T: []float64{}, V: []float64{}, Gaps: [][2]float64{}}
		for _, p := range usable(s.Points) {
			q.T = append(q.T, round(p.T.Sub(origin).Seconds()))
			q.V = append(q.V, p.V)
		}
		q.measure()
		out = append(out, q)
	}
	return out
}

// measure finds the usual distance of the points, the gaps, and the figures
// that stand beside the plot.
func (q *plot) measure() {
	q.Count = len(q.T)
	if q.Count == 0 {
		return
	}
	var apart []float64
	for i := 1; i < q.Count; i++ {
		if d := q.T[i] - q.T[i-1]; d > 0 {
			apart = append(apart, d)
		}
	}
	if len(apart) > 0 {
		slices.Sort(apart)
		q.Step = max(round(apart[len(apart)/2]), 1e-4)
	}
	var missing []string
	for i := 1; i < q.Count; i++ {
		if q.T[i]-q.T[i-1] > 1.5*q.Step {
			gap := [2]float64{round(q.T[i-1] + q.Step), q.T[i]}
			q.Gaps = append(q.Gaps, gap)
			missing = append(missing, clock(gap[0])+" to "+clock(gap[1]))
		}
	}
	if len(missing) == 0 {
		missing = []string{"none"}
	}
	q.Missing = strings.Join(missing, ", ")
	sorted := slices.Sorted(slices.Values(q.V))
	q.Lowest, q.Median, q.Highest = number(sorted[0]), number(sorted[len(sorted)/2]), number(sorted[len(sorted)-1])
	for _, v := range q.V {
		if v == 0 {
			q.Zeros++
		}
	}
}

// marks numbers the marks in order of time; those without a time come last.
func marks(in []Mark, origin time.Time) []markView {
	in = slices.Clone(in)
	slices.SortStableFunc(in, func(a, b Mark) int {
		if a.From.IsZero() != b.From.IsZero() {
			return -a.From.Compare(b.From)
		}
		return a.From.Compare(b.From)
	})
	var out []markView
	for i, m := range in {
		v := markView{N: i + 1, Name: m.Name, Hue: i % 4, Known: !m.From.IsZero(), When: "not measured"}
		if v.Known {
			v.From = round(m.From.Sub(origin).Seconds())
			v.To = v.From
			v.When = "at " + clock(v.From)
		}
		if v.Known && m.To.After(m.From) {
			v.To = v.From + m.To.Sub(m.From).Seconds()
			v.When += ", for " + seconds(m.To.Sub(m.From).Seconds())
		}
		out = append(out, v)
	}
	return out
}

// round cuts to what a reader and a screen can tell apart: a tenth of a
// millisecond.
func round(v float64) float64 { return math.Round(v*1e4) / 1e4 }
