package wal_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

const size = 16 * mega

// day is a moment of the tables' calendar.
func day(n float64) time.Time {
	return time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(n * 24 * float64(time.Hour)))
}

// taken is a sound backup of timeline t, cut at that day inside segment n.
func taken(when float64, t wal.Timeline, n uint64) wal.Backup {
	at := day(when)
	return wal.Backup{Candidate: backup.Candidate{ID: backup.ID(at.Format("20060102T150405Z") + "-00000a"), Created: at, Verdict: backup.Good}, Placed: true, System: 7,
		Timeline: t, From: backup.LSN(n*size + size/2), Cut: at}
}

// row is the segments of a timeline, stored at that day.
func row(t wal.Timeline, first, last uint64, when float64) (out []wal.Stored) {
	for n := first; n <= last; n++ {
		out = append(out, wal.Stored{File: wal.Segment{Timeline: t, Number: n}.File(size), Size: 1000, Stored: day(when)})
	}
	return out
}

// fork is the history of timeline t, which left its parent inside segment n.
func fork(t, parent wal.Timeline, n uint64, before ...wal.Fork) wal.History {
	return wal.History{Timeline: t, Forks: append(before, wal.Fork{Timeline: parent, End: backup.LSN(n*size + size/4)})}
}

func facts(window string, histories []wal.History, backups []wal.Backup, rows ...[]wal.Stored) wal.Facts {
	w, err := backup.ParseSpan(window)
	if err != nil {
		panic(err)
	}
	f := wal.Facts{System: wal.System{Identifier: 7, SegmentSize: size}, Files: slices.Concat(rows...), Histories: map[wal.Timeline]wal.History{}, Backups: backups, Window: w}
	for _, h := range histories {
		f.Histories[h.Timeline] = h
		f.Files = append(f.Files, wal.Stored{File: wal.HistoryOf(h.Timeline), Size: 100})
	}
	return f
}

// names shortens segments to "1:5-7 2:8".
func names(parts []wal.Part) string {
	var out []string
	for _, p := range parts {
		if p.First.Kind == wal.Journal {
			continue
		}
		a, b := fmt.Sprintf("%d:%d", p.First.Timeline, p.First.Low), fmt.Sprintf("-%d", p.Last.Low)
		if p.Files == 1 {
			b = ""
		}
		out = append(out, a+b)
	}
	return strings.Join(out, " ")
}

// TestWALGoesWhenNobodyNeedsIt has "now" at day 20.
func TestWALGoesWhenNobodyNeedsIt(t *testing.T) {
	edit := func(b wal.Backup, f func(*wal.Backup)) wal.Backup { f(&b); return b }
	two := []wal.History{fork(2, 1, 10)}
	for _, c := range []struct {
		name    string
		f       wal.Facts
		remove  string
		anchors string // days of the backups that the window needs
		why     string // in some reason, or the doubt
	}{
		{"without a window all since the oldest backup stays", facts("0", nil, []wal.Backup{taken(3, 1, 5), taken(15, 1, 9)}, row(1, 1, 12, 1)), "1:1-4", "", "no window is promised"},
		{"with one, all since the latest backup before it", facts("7d", nil, []wal.Backup{taken(3, 1, 5), taken(12, 1, 7), taken(15, 1, 9)}, row(1, 1, 12, 1)), "1:1-6", "12", "the window of 7d begins"},
		{"a cut right at the window's begin is before it", facts("7d", nil, []wal.Backup{taken(13, 1, 5), taken(15, 1, 9)}, row(1, 1, 12, 1)), "1:1-4", "13", ""},
		{"no backup is that old: all since the oldest", facts("30d", nil, []wal.Backup{taken(12, 1, 7), taken(15, 1, 9)}, row(1, 1, 12, 1)), "1:1-6", "12", ""},
		{"a damaged one is no anchor", facts("7d", nil, []wal.Backup{taken(3, 1, 5), edit(taken(12, 1, 7), func(b *wal.Backup) { b.Verdict = backup.Damaged })}, row(1, 1, 12, 1)), "1:1-4", "3", ""},
		{"nor a torn one", facts("7d", nil, []wal.Backup{taken(3, 1, 5), edit(taken(12, 1, 7), func(b *wal.Backup) { b.Torn = true })}, row(1, 1, 12, 1)), "1:1-4", "3", ""},
		{"an old one that is in use keeps its WAL", facts("7d", nil, []wal.Backup{edit(taken(3, 1, 5), func(b *wal.Backup) { b.InUse = "copy x" }), taken(12, 1, 7)}, row(1, 1, 12, 1)), "1:1-4", "12", "in use: copy x"},
		{"a held old one stands alone", facts("7d", nil, []wal.Backup{edit(taken(3, 1, 5), func(b *wal.Backup) { b.Held = "held" }), taken(12, 1, 7)}, row(1, 1, 12, 1)), "1:1-6", "12", ""},
		{"a promotion: the new timeline stays, and the old one's way to it", facts("7d", two, []wal.Backup{taken(3, 1, 5), taken(12, 1, 8), taken(16, 2, 12)}, row(1, 1, 10, 1), row(2, 10, 14, 14)), "1:1-7", "12", ""},
		{"behind the promotion the old timeline goes as a whole", facts("7d", two, []wal.Backup{taken(12, 2, 12)}, row(1, 1, 13, 1), row(2, 10, 14, 14)), "1:1-9 1:10-13 2:10-11", "12", "timeline 1 was given up"},
		{"but not what was stored since: somebody may be writing it", facts("7d", two, []wal.Backup{taken(12, 2, 12)}, row(1, 1, 10, 1), row(1, 11, 13, 18), row(2, 10, 14, 14)), "1:1-9 2:10-11", "12", "some of timeline 1 was stored after"},
		{"a branch that went on is recovered from its own anchor", facts("7d", two, []wal.Backup{taken(3, 1, 5), taken(5, 1, 8), taken(12, 1, 14)}, row(1, 1, 16, 1), row(2, 10, 14, 14)), "1:1-7 1:10-13", "5 12", "on timeline 2 begins"},
		{"back on the old timeline after a promotion", facts("7d", two, []wal.Backup{taken(3, 1, 5), taken(12, 2, 12), taken(18, 1, 15)}, row(1, 1, 16, 1), row(2, 10, 14, 1)), "1:1-4 2:10-11", "3 12", "on timeline 1 begins"},
		{"the newest segment stays for the stream", facts("7d", nil, []wal.Backup{taken(12, 1, 14)}, row(1, 1, 10, 1)), "1:1-9", "12", "a stream goes on behind it"},
		{"behind a gap in the window the first backup stays", facts("7d", nil, []wal.Backup{taken(12, 1, 7), taken(15, 1, 9), taken(17, 1, 12), taken(18, 1, 13)}, row(1, 1, 10, 1), row(1, 12, 15, 1)), "1:1-6", "12 17", ""},
		{"a gap before the window changes nothing", facts("7d", nil, []wal.Backup{taken(3, 1, 3), taken(12, 1, 8)}, row(1, 1, 4, 1), row(1, 6, 12, 1)), "1:1-4 1:6-7", "12", ""},
		{"no backup", facts("7d", nil, nil, row(1, 1, 4, 1)), "", "", "no backup is kept"},
		{"one that cannot be read", facts("7d", nil, []wal.Backup{taken(12, 1, 8), {Candidate: backup.Candidate{ID: "20261102T000000Z-00000a", Unreadable: "cut short"}}}, row(1, 1, 10, 1)), "", "12", "cut short"},
		{"one that does not tell its position", facts("7d", nil, []wal.Backup{taken(12, 1, 8), edit(taken(14, 1, 9), func(b *wal.Backup) { b.From = 0 })}, row(1, 1, 10, 1)), "", "12", "does not tell its position"},
		{"of another system", facts("7d", nil, []wal.Backup{taken(12, 1, 8), edit(taken(14, 1, 9), func(b *wal.Backup) { b.System = 8 })}, row(1, 1, 10, 1)), "", "12", "the WAL is of system 7"},
		{"one under way since before the anchor", facts("7d", nil, []wal.Backup{taken(12, 1, 8), {Candidate: backup.Candidate{ID: "20261102T000000Z-00000a", Incomplete: true, Begun: "it is being made"}}}, row(1, 1, 10, 1)), "", "12", "it is being made"},
		{"one under way now needs only what comes", facts("7d", nil, []wal.Backup{taken(12, 1, 8), {Candidate: backup.Candidate{ID: "20261120T230000Z-00000a", Incomplete: true, Begun: "it is being made"}}}, row(1, 1, 10, 1)), "1:1-7", "12", ""},
		{"the history of a newer timeline is missing", facts("7d", nil, []wal.Backup{taken(12, 1, 8)}, row(1, 1, 10, 1), row(2, 10, 12, 1)), "", "12", "history of timeline 2"},
		{"that of the anchor's own is not needed", facts("7d", nil, []wal.Backup{taken(12, 2, 8)}, row(2, 1, 10, 1)), "2:1-7", "12", ""},
		{"that of an old one keeps that one", facts("7d", []wal.History{fork(3, 1, 5)}, []wal.Backup{taken(12, 3, 8)}, row(1, 1, 5, 1), row(2, 3, 6, 1), row(3, 5, 10, 1)), "1:1-4 1:5 3:5-7", "12", "the history of timeline 2"},
		{"without a window a missing history keeps only its timeline", facts("0", nil, []wal.Backup{taken(12, 1, 8)}, row(1, 1, 10, 1), row(2, 10, 12, 1)), "1:1-7", "", "history of timeline 2"},
		{"the catalog's record cannot be read", func() wal.Facts {
			f := facts("7d", nil, []wal.Backup{taken(12, 1, 8)}, row(1, 1, 10, 1))
			f.Doubt = "system.json is damaged"
			return f
		}(), "", "12", "system.json is damaged"},
		{"the clock stepped back: a backup cannot be older than what its WAL follows", facts("7d", nil, []wal.Backup{taken(4, 1, 4), taken(16, 1, 8), edit(taken(18, 1, 9), func(b *wal.Backup) { b.Cut = day(5) })}, row(1, 1, 12, 1)), "1:1-3", "4 16", ""},
		{"the clock stepped back: of two that look equally old the earlier position counts", facts("7d", nil, []wal.Backup{taken(4, 1, 4), edit(taken(18, 1, 9), func(b *wal.Backup) { b.Cut = day(3) })}, row(1, 1, 12, 1)), "1:1-3", "4", ""},
		{"the clock stepped forth: a backup from the future begins no window", facts("7d", nil, []wal.Backup{taken(4, 1, 4), taken(40, 1, 8)}, row(1, 1, 12, 1)), "1:1-3", "4", ""},
		{"the catalog's clock: what was stored in the future or long ago is judged the same", facts("7d", nil, []wal.Backup{taken(3, 1, 5), taken(12, 1, 7), taken(15, 1, 9)}, row(1, 1, 6, 400), row(1, 7, 12, -400)), "1:1-6", "12", ""},
		{"what else PostgreSQL archives goes with its segment", facts("7d", nil, []wal.Backup{taken(12, 1, 7)}, row(1, 4, 8, 1), []wal.Stored{{File: wal.File{Kind: wal.Label, Timeline: 1, Low: 5, Offset: 40}}, {File: wal.File{Kind: wal.Partial, Timeline: 1, Low: 9}}}), "1:4-6", "12", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var days []string
			anchors := wal.Anchors(c.f, day(20))
			for _, id := range slices.Sorted(maps.Keys(anchors)) {
				days = append(days, fmt.Sprint(int(id.Time().Sub(day(0)).Hours()/24)))
			}
			if got := strings.Join(days, " "); got != c.anchors {
				t.Errorf("anchors: got %q, want %q: %v", got, c.anchors, anchors)
			}
			p := wal.PlanRetention(c.f, day(20))
			if got := names(p.Remove); got != c.remove {
				t.Errorf("removes %q, want %q; keeps %+v", got, c.remove, p.Keep)
			}
			if said := fmt.Sprint(p.Doubt, p.Keep, p.Remove); !strings.Contains(said, c.why) {
				t.Errorf("no word of %q in %s", c.why, said)
			}
			sum := backup.Bytes(0)
			for _, s := range p.Removed() {
				sum += s.Size
			}
			if sum != p.Bytes {
				t.Errorf("%d bytes, want %d", p.Bytes, sum)
			}
		})
	}
}

func TestThePlanTellsWhatItMeansForEachBackup(t *testing.T) {
	p := wal.PlanRetention(facts("7d", []wal.History{fork(2, 1, 10)}, []wal.Backup{taken(3, 1, 5), taken(12, 1, 8), taken(16, 2, 12)}, row(1, 1, 10, 1), row(2, 10, 14, 14)), day(20))
	if p.Anchor != taken(12, 1, 8).ID || p.Since == nil || !p.Since.Equal(day(12)) {
		t.Errorf("anchor %s, since %v", p.Anchor, p.Since)
	}
	both := []wal.Way{{Timeline: 1, To: 11 * size}, {Timeline: 2, To: 15 * size}}
	for i, want := range []struct{ before, after []wal.Way }{{both, nil}, {both, both}, {both[1:], both[1:]}} {
		if got := p.Backups[i]; !slices.Equal(got.Before, want.before) || !slices.Equal(got.After, want.after) {
			t.Errorf("backup %d: got %+v, want %+v", i, got, want)
		}
	}
	gap := facts("7d", nil, []wal.Backup{taken(3, 1, 2), taken(16, 1, 12)}, row(1, 1, 10, 1), row(1, 12, 14, 14))
	if got := wal.Since(gap, day(20)); got == nil || !got.Equal(day(16)) {
		t.Errorf("behind a gap: since %v, want day 16", got)
	}
	if got := wal.Since(facts("7d", nil, []wal.Backup{taken(16, 1, 12)}, row(1, 1, 10, 1)), day(20)); got != nil {
		t.Errorf("without WAL behind the newest backup: since %v", got)
	}
}

// world is a history of a cluster as it really was: which WAL was written when
// and on which timeline, and what is left of it.
type world struct {
	facts   wal.Facts
	truth   []wal.History // of all timelines, also where the catalog has no file
	written []written     // in the order of time
	now     time.Time     //
	exact   bool          // the stored times are right
	lost    bool          // some history is missing in the catalog
	rules   backup.Retention
}

type written struct {
	segment wal.Segment
	at      time.Time
}

// newWorld lives through promotions, recoveries to earlier positions, returns
// to older timelines, backups and gaps. Stored times are mostly rubbish.
func newWorld(r *rand.Rand) *world {
	w := &world{exact: r.IntN(3) == 0, rules: backup.Retention{Last: 1 + r.IntN(3), Daily: r.IntN(3)}}
	w.facts = wal.Facts{System: wal.System{Identifier: 7, SegmentSize: size}, Histories: map[wal.Timeline]wal.History{}, Window: backup.Span(time.Duration(r.IntN(12)) * 24 * time.Hour)}
	here, next := wal.History{Timeline: 1}, wal.Timeline(2)
	w.truth = []wal.History{here}
	ends := map[wal.Timeline]uint64{1: 1}
	n, at := uint64(1), 0.0
	for range 10 + r.IntN(60) {
		at += r.Float64()
		switch k := r.IntN(20); {
		case k < 11: // WAL
			for range 1 + r.IntN(3) {
				w.written = append(w.written, written{wal.Segment{Timeline: here.Timeline, Number: n}, day(at)})
				n++
			}
			ends[here.Timeline] = n
		case k < 16:
			b := taken(at, here.Timeline, n)
			b.ID = backup.ID(string(b.ID[:len(b.ID)-6]) + fmt.Sprintf("%06x", r.IntN(1<<24)))
			b.Verdict = []backup.Word{backup.Good, backup.Good, backup.Unproven, backup.Damaged}[r.IntN(4)]
			if r.IntN(10) == 0 {
				b.InUse = "copy x"
			}
			if r.IntN(10) == 0 {
				b.Held = "held"
			}
			w.facts.Backups = append(w.facts.Backups, b)
			// What comes after the cut in its segment is written.
			w.written = append(w.written, written{wal.Segment{Timeline: here.Timeline, Number: n}, day(at)})
			n++
			ends[here.Timeline] = n
		case k < 18: // a promotion, here or at an earlier position
			from := w.truth[len(w.truth)-1-r.IntN(min(2, len(w.truth)))]
			if r.IntN(2) == 0 {
				from = here
			}
			end := n
			if from.Timeline != here.Timeline || r.IntN(3) == 0 {
				begin, _ := from.Begin(from.Timeline)
				low := uint64(begin)/size + 1
				if ends[from.Timeline] < low {
					continue
				}
				end = low + r.Uint64N(ends[from.Timeline]-low+1)
			}
			here = wal.History{Timeline: next, Forks: append(slices.Clone(from.Forks), wal.Fork{Timeline: from.Timeline, End: backup.LSN(end*size + size/4)})}
			next, n = next+1, end
			w.truth = append(w.truth, here)
			ends[here.Timeline] = n
		case w.exact && k == 19: // back on an older timeline: only right clocks can tell
			here = w.truth[r.IntN(len(w.truth))]
			n = ends[here.Timeline]
		}
	}
	w.now = day(at)
	w.store(r)
	return w
}

// store keeps what was written, with gaps.
func (w *world) store(r *rand.Rand) {
	gaps := r.IntN(3) * 4
	for _, x := range w.written {
		if r.IntN(100) < gaps {
			continue
		}
		at := x.at
		if !w.exact {
			at = day(float64(r.IntN(100) - 60))
		}
		f := x.segment.File(size)
		if !slices.ContainsFunc(w.facts.Files, func(s wal.Stored) bool { return s.File == f }) {
			w.facts.Files = append(w.facts.Files, wal.Stored{File: f, Size: 1000, Stored: at})
		}
	}
	lose := r.IntN(4) == 0
	for _, h := range w.truth[1:] {
		if lose && r.IntN(3) == 0 {
			w.lost = true
			continue
		}
		w.facts.Histories[h.Timeline] = h
		w.facts.Files = append(w.facts.Files, wal.Stored{File: wal.HistoryOf(h.Timeline)})
	}
}

// reaches is the model: whether b can be recovered to the end of that segment
// along the true history of its timeline, by what is there.
func (w *world) reaches(b wal.Backup, to wal.Segment, there map[wal.Segment]bool) bool {
	h := w.truth[to.Timeline-1]
	on := h.Timeline == b.Timeline
	for i, f := range h.Forks {
		begin := backup.LSN(0)
		if i > 0 {
			begin = h.Forks[i-1].End
		}
		on = on || f.Timeline == b.Timeline && b.From >= begin && b.From <= f.End
	}
	if !on || uint64(b.From)/size > to.Number {
		return false
	}
	for n := uint64(b.From) / size; n <= to.Number; n++ {
		holder := h.Timeline // of the last byte of segment n
		for i := len(h.Forks) - 1; i >= 0; i-- {
			if backup.LSN((n+1)*size) <= h.Forks[i].End {
				holder = h.Forks[i].Timeline
			}
		}
		if !there[wal.Segment{Timeline: holder, Number: n}] {
			return false
		}
	}
	return true
}

func there(files []wal.Stored) map[wal.Segment]bool {
	out := map[wal.Segment]bool{}
	for _, s := range files {
		if g, err := s.File.Segment(size); err == nil && s.File.Kind == wal.Whole {
			out[g] = true
		}
	}
	return out
}

// prune is what prune does: backups by the rules and the window's needs, then WAL.
func (w *world) prune() (keep []wal.Backup, p wal.Plan) {
	var all []backup.Candidate
	anchors := wal.Anchors(w.facts, w.now)
	for _, b := range w.facts.Backups {
		c := b.Candidate
		c.Needed = anchors[b.ID]
		all = append(all, c)
	}
	_, remove, err := backup.PlanRetention(all, w.rules, w.now)
	if err != nil {
		panic(err)
	}
	for _, b := range w.facts.Backups {
		if !slices.ContainsFunc(remove, func(c backup.Choice) bool { return c.ID == b.ID }) {
			keep = append(keep, b)
		}
	}
	f := w.facts
	f.Backups = keep
	return keep, wal.PlanRetention(f, w.now)
}

// wrong plans, and says what was promised and does not hold.
func (w *world) wrong() string {
	before := there(w.facts.Files)
	keep, p := w.prune()
	gone := p.Removed()
	left := slices.DeleteFunc(slices.Clone(w.facts.Files), func(s wal.Stored) bool { return slices.Contains(gone, s) })
	after := there(left)
	sound := func(b wal.Backup) bool { return b.Sound(w.now) }
	start := w.now.Add(-time.Duration(w.facts.Window))
	alone := func(b wal.Backup) bool { // it is older than all that the window can begin with
		return w.facts.Window > 0 && b.InUse == "" && (!b.Cut.After(start) || !slices.ContainsFunc(w.facts.Backups, func(s wal.Backup) bool { return sound(s) && !s.Cut.After(b.Cut) }))
	}
	any := slices.ContainsFunc(w.facts.Backups, sound)
	for _, x := range w.written {
		for _, b := range keep {
			if (!any || !alone(b)) && w.reaches(b, x.segment, before) && !w.reaches(b, x.segment, after) {
				return fmt.Sprintf("kept backup %s of timeline %d from %s cannot reach %v any more", b.ID, b.Timeline, b.From, x.segment)
			}
		}
		could := func(of []wal.Backup, by map[wal.Segment]bool) bool {
			return slices.ContainsFunc(of, func(b wal.Backup) bool { return sound(b) && !b.Cut.After(x.at) && w.reaches(b, x.segment, by) })
		}
		if w.facts.Window > 0 && !w.lost && x.at.After(start) && could(w.facts.Backups, before) && !could(keep, after) {
			return fmt.Sprintf("%v was written on %s, which is within the window, and cannot be reached any more", x.segment, x.at)
		}
	}
	for i := range gone { // a prune that is killed leaves each row unbroken at its beginning
		if i > 0 && gone[i].File.Kind == wal.Whole && gone[i-1].File.Kind == wal.Whole {
			a, _ := gone[i-1].File.Segment(size)
			b, _ := gone[i].File.Segment(size)
			if b.Number < a.Number {
				return fmt.Sprintf("%v goes before %v", a, b)
			}
		}
	}
	for _, n := range []int{0, len(gone) / 2} { // stopped before the n-th, and then gone on
		next := *w
		next.facts.Backups = keep
		next.facts.Files = slices.DeleteFunc(slices.Clone(w.facts.Files), func(s wal.Stored) bool { return slices.Contains(gone[:n], s) })
		if n == 0 {
			next.facts.Files = left
		}
		stay, again := next.prune()
		more := slices.DeleteFunc(again.Removed(), func(s wal.Stored) bool { return slices.Contains(gone, s) })
		if len(more) > 0 || n > 0 && len(again.Removed()) != len(gone)-n || len(stay) != len(keep) {
			return fmt.Sprintf("planned again after %d of %d: %d more, %d in all, %d of %d backups", n, len(gone), len(more), len(again.Removed()), len(stay), len(keep))
		}
	}
	return ""
}

func TestNothingThatWasPromisedBecomesUnreachable(t *testing.T) {
	seen := map[string]int{}
	worlds := 5_000
	if testing.Short() {
		worlds = 500
	}
	for seed := range uint64(worlds) {
		w := newWorld(rand.New(rand.NewPCG(seed, 7)))
		if complaint := w.wrong(); complaint != "" {
			_, p := w.prune()
			var all []string
			for _, b := range w.facts.Backups {
				all = append(all, fmt.Sprintf("%s timeline %d from segment %d verdict %q held %q", b.ID, b.Timeline, uint64(b.From)/size, b.Verdict, b.Held+b.InUse))
			}
			t.Fatalf("seed %d: %s\nwindow %s, now %s, rules %+v\nhistories %v\nbackups\n%s\nplan: anchor %s, doubt %q\nkeep %+v\nremove %+v", seed, complaint, w.facts.Window, w.now, w.rules, w.truth, strings.Join(all, "\n"), p.Anchor, p.Doubt, p.Keep, p.Remove)
		}
		_, p := w.prune()
		seen[fmt.Sprintf("window %v, removes %v, doubt %v", w.facts.Window > 0, len(p.Remove) > 0, p.Doubt != "")]++
		seen[fmt.Sprintf("%d timelines", min(len(w.truth), 4))]++
	}
	t.Log(seen)
	for _, kind := range []string{"window true, removes true, doubt false", "window false, removes true, doubt false", "window true, removes false, doubt true", "4 timelines"} {
		if seen[kind] < worlds/100 {
			t.Errorf("only %d worlds: %s", seen[kind], kind)
		}
	}
}

func FuzzRetention(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		if complaint := newWorld(rand.New(rand.NewPCG(a, b))).wrong(); complaint != "" {
			t.Fatal(complaint)
		}
	})
}
