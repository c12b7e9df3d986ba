package report

import (
	"math"
	"slices"
	"strconv"
	"time"
)

// chart is a Gantt chart whose positions are per cent of its width.
type chart struct {
	Caption string
	Ticks   []tick
	Lanes   []lane
}

type tick struct {
	X      float64
	Label  string
	Anchor string // of the label's text
}

type lane struct {
	Name string
	Bars []barView
}

type barView struct {
	Name, When string
	Known      bool
	X, Width   float64
}

// charts draws the cut, and once more without its first lane where that one
// dwarfs the rest: flushing may last seconds before a freeze of milliseconds.
func charts(bars []Bar) []chart {
	if len(bars) == 0 {
		return nil
	}
	from, to := extent(bars)
	whole := gantt(bars, bars, from, to)
	whole.Caption = "Milliseconds after the first bar."
	out := []chart{whole}
	rest := slices.DeleteFunc(slices.Clone(bars), func(b Bar) bool { return b.Lane == bars[0].Lane })
	first, last := extent(rest)
	if near := last.Sub(first); near > 0 && near < to.Sub(from)/4 {
		closer := gantt(rest, rest, first, last)
		closer.Caption = "A closer look, without the lane " + strconv.Quote(bars[0].Lane) + ". Milliseconds after the first bar shown here."
		out = append(out, closer)
	}
	return out
}

// extent is the time from the first to the last bar with a time.
func extent(bars []Bar) (from, to time.Time) {
	for _, b := range bars {
		if b.From.IsZero() {
			continue
		}
		if from.IsZero() || b.From.Before(from) {
			from = b.From
		}
		for _, t := range []time.Time{b.From, b.To} {
			if t.After(to) {
				to = t
			}
		}
	}
	return from, to
}

func gantt(bars []Bar, order []Bar, from, to time.Time) chart {
	c := chart{Ticks: ticks(to.Sub(from))}
	for _, b := range order {
		if !slices.ContainsFunc(c.Lanes, func(l lane) bool { return l.Name == b.Lane }) {
			c.Lanes = append(c.Lanes, lane{Name: b.Lane})
		}
	}
	for i := range c.Lanes {
		for _, b := range bars {
			if b.Lane == c.Lanes[i].Name {
				c.Lanes[i].Bars = append(c.Lanes[i].Bars, place(b, from, to.Sub(from)))
			}
		}
	}
	return c
}

func place(b Bar, from time.Time, whole time.Duration) barView {
	v := barView{Name: b.Name, When: "not measured"}
	if b.Name == b.Lane {
		v.Name = ""
	}
	if b.From.IsZero() {
		return v
	}
	v.Known = true
	begin := b.From.Sub(from)
	v.X = share(begin, whole)
	v.When = "at " + millis(begin) + " ms"
	if b.To.After(b.From) {
		v.Width = share(b.To.Sub(b.From), whole)
		v.When = millis(begin) + "–" + millis(b.To.Sub(from)) + " ms: " + millis(b.To.Sub(b.From)) + " ms"
	}
	return v
}

// share is d in per cent of whole.
func share(d, whole time.Duration) float64 {
	if whole <= 0 {
		return 0
	}
	return math.Round(float64(d)/float64(whole)*1e5) / 1e3
}

// ticks are at most six round numbers of milliseconds from 0 to whole.
func ticks(whole time.Duration) []tick {
	ms := float64(whole) / float64(time.Millisecond)
	if ms <= 0 {
		return []tick{{0, "0", "start"}}
	}
	step := math.Pow(10, math.Floor(math.Log10(ms/5)))
	for _, f := range []float64{1, 2, 5, 10} {
		if ms/(step*f) <= 5 {
			step *= f
			break
		}
	}
	var out []tick
	for i := 0; float64(i)*step <= ms*1.0001; i++ {
		x := math.Round(float64(i)*step/ms*1e5) / 1e3
		anchor := "middle"
		if i == 0 {
			anchor = "start"
		} else if x > 95 {
			anchor = "end"
		}
		out = append(out, tick{x, strconv.FormatFloat(float64(i)*step, 'g', 6, 64), anchor})
	}
	return out
}
