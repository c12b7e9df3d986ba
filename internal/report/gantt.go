package report

import (
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// Phase is what is done to a volume or its filesystem during a bar of the cut.
type Phase int

// The phases of a cut, in their order.
const (
	Other    Phase = iota
	Sync           // syncfs: dirty pages are written, nothing is held
	Freezing       // FIFREEZE was called and has not returned
	Held           // frozen: writes wait
	Request        // from the request for a snapshot to its answer
	Thawed         // FITHAW returned: writes go on
)

func (p Phase) words() string {
	return []string{"", "syncfs: what is dirty is written, production goes on", "freezing: FIFREEZE was called", "held: frozen, commits wait",
		"snapshot: from its request to the answer", "thawed: commits go on"}[p]
}

// Snapshot is the image of one volume within a cut.
type Snapshot struct {
	Name                 string // of the volume
	Requested, Responded time.Time
}

// CutBars draws a cut: the rounds of syncfs, each filesystem from FIFREEZE to
// its thaw, and each snapshot. Of a round only its length is known; the last
// one ended when the first freeze began. Filesystems bear the last part of
// their mount point's name.
func CutBars(cut backup.Cut, snapshots []Snapshot) []Bar {
	var out []Bar
	if len(cut.Frozen) > 0 {
		end := slices.MinFunc(cut.Frozen, func(a, b backup.Frozen) int { return a.Called.Compare(b.Called) }).Called
		for i, ms := range slices.Backward(cut.SyncRounds) {
			begin := end.Add(-time.Duration(ms * float64(time.Millisecond)))
			out = append(out, Bar{Lane: "syncfs", Name: "round " + strconv.Itoa(i+1), Phase: Sync, From: begin, To: end})
			end = begin
		}
		slices.Reverse(out)
	}
	for _, f := range cut.Frozen {
		lane := "freeze " + path.Base(f.Mountpoint)
		out = append(out, Bar{Lane: lane, Name: "freezing", Phase: Freezing, From: f.Called, To: f.Held},
			Bar{Lane: lane, Name: "held", Phase: Held, From: f.Held, To: f.Thawed}, Bar{Lane: lane, Name: "thawed", Phase: Thawed, From: f.Thawed})
	}
	for _, s := range snapshots {
		out = append(out, Bar{Lane: s.Name, Name: "snapshot", Phase: Request, From: s.Requested, To: s.Responded})
	}
	return out
}

// chart is a Gantt chart whose positions are per cent of its width.
type chart struct {
	Caption string
	Legend  []legend
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
	Phase      Phase
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
	whole := gantt(bars, from, to)
	whole.Caption = "Time after the first bar."
	out := []chart{whole}
	rest := slices.DeleteFunc(slices.Clone(bars), func(b Bar) bool { return b.Lane == bars[0].Lane })
	first, last := extent(rest)
	if near := last.Sub(first); near > 0 && near < to.Sub(from)/4 {
		closer := gantt(rest, first, last)
		closer.Caption = "A closer look, without the lane " + strconv.Quote(bars[0].Lane) + ". Time after the first bar shown here."
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

func gantt(bars []Bar, from, to time.Time) chart {
	c := chart{Ticks: ticks(to.Sub(from))}
	for p := Sync; p <= Thawed; p++ {
		if slices.ContainsFunc(bars, func(b Bar) bool { return b.Phase == p }) {
			key, words, _ := strings.Cut(p.words(), ": ")
			c.Legend = append(c.Legend, legend{int(p), key, words})
		}
	}
	for _, b := range bars {
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
	v := barView{Name: b.Name, Phase: b.Phase, When: "not measured"}
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
		return []tick{{0, "0 ms", "start"}}
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
		out = append(out, tick{x, grouped(strconv.FormatFloat(float64(i)*step, 'f', -1, 64)) + " ms", anchor})
	}
	return out
}
