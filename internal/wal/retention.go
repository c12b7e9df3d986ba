package wal

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"cleancut/internal/backup"
)

// Stored is a file of WAL that is kept somewhere.
type Stored struct {
	File   File
	Size   backup.Bytes // as stored
	Stored time.Time    // by the store's clock
}

// Backup is what the retention of WAL knows of a backup.
type Backup struct {
	backup.Candidate
	Placed   bool // its manifest was read, and tells the rest
	System   backup.SystemIdentifier
	Timeline Timeline
	From     backup.LSN // recovery cannot stop before it, and needs the WAL from it on
	Cut      time.Time  // the end of the moment of its cut
}

// Facts is what the retention of WAL is decided by.
type Facts struct {
	System    System
	Files     []Stored
	Histories map[Timeline]History // those that were read
	Backups   []Backup
	Window    backup.Span // every moment of it shall be recoverable; 0: none is promised
	Doubt     string      // why nothing can be told; "": there is no reason
}

// Plan is what goes and what stays, and what that means for each backup.
type Plan struct {
	Window backup.Span `json:"window"` // "0s": none is promised
	// Anchor is the backup that the window begins with; without a window the
	// oldest that is kept.
	Anchor backup.ID `json:"anchor,omitempty"`
	// Since is the moment from which on every moment can be recovered, up to the
	// end of the WAL; nil: there is no WAL that leads on from the newest backup.
	Since   *time.Time   `json:"recoverable_since"`
	Doubt   string       `json:"doubt,omitempty"` // why nothing is removed
	Keep    []Part       `json:"keep"`
	Remove  []Part       `json:"remove"`
	Bytes   backup.Bytes `json:"bytes"` // of what is removed, as stored
	Backups []Reach      `json:"backups"`

	files []Stored
}

// Part is a row of files, of one timeline and with one reason.
type Part struct {
	First File         `json:"first"`
	Last  File         `json:"last"`
	Files int          `json:"files"`
	Bytes backup.Bytes `json:"bytes"`
	Why   string       `json:"why"`
}

// Reach says how far a kept backup can be recovered by the WAL before and after
// the plan.
type Reach struct {
	ID     backup.ID  `json:"id"`
	From   backup.LSN `json:"from_lsn"`
	Before []Way      `json:"before"`
	After  []Way      `json:"after"` // none: only to its own end
}

// Way is a timeline to recover along, and its end.
type Way struct {
	Timeline Timeline   `json:"timeline"`
	To       backup.LSN `json:"to_lsn"`
}

// Removed returns the files to remove in the order in which they are to go:
// the oldest first, so that whatever is left at any time is unbroken at its
// beginning.
func (p Plan) Removed() []Stored { return p.files }

// need is WAL that must stay: from a backup on, along one timeline or along all
// that descend from it.
type need struct {
	of   Backup
	only Timeline // 0: all
	why  string
}

// needs returns what must stay.
func (p *planner) needs() []need {
	var out []need
	began := p.cuts[p.base.ID].at
	for _, b := range p.placed {
		at := p.cuts[b.ID].at
		switch {
		case !p.promises():
			out = append(out, need{of: b, why: fmt.Sprintf("backup %s needs it, as no window is promised", b.ID)})
		case b.ID == p.base.ID:
			out = append(out, need{of: b, why: fmt.Sprintf("the window of %s begins with backup %s", p.Window, b.ID)})
		case b.InUse != "":
			out = append(out, need{of: b, why: fmt.Sprintf("backup %s is in use: %s", b.ID, b.InUse)})
		case !at.Before(began) || b.Cut.IsZero():
			out = append(out, need{of: b, why: fmt.Sprintf("backup %s lies within the window of %s", b.ID, p.Window)})
		}
	}
	if p.promises() {
		lives := p.lives()
		for _, h := range p.lines {
			if b := lives[h.Timeline]; b.ID != "" {
				out = append(out, need{of: b, only: h.Timeline, why: fmt.Sprintf("the window of %s on timeline %d begins with backup %s", p.Window, h.Timeline, b.ID)})
			}
		}
	}
	return out
}

// doubts says why nothing may be removed, or "".
func (p *planner) doubts() string {
	if p.Doubt != "" {
		return p.Doubt
	}
	if p.base.ID == "" {
		return "no backup is kept"
	}
	for _, b := range p.Backups {
		switch {
		case b.Unreadable != "":
			return fmt.Sprintf("backup %s: %s, so nobody knows which WAL it needs", b.ID, b.Unreadable)
		case !b.Placed && b.Begun != "" && b.ID.Time().Before(p.base.Cut):
			return fmt.Sprintf("backup %s: %s; it was begun before the oldest WAL that is needed", b.ID, b.Begun)
		case !b.Placed || b.Torn:
		case b.Timeline == 0 || b.From == 0:
			return fmt.Sprintf("the manifest of backup %s does not tell its position in the WAL", b.ID)
		case b.System != p.System.Identifier:
			return fmt.Sprintf("the WAL is of system %d, backup %s of %d", p.System.Identifier, b.ID, b.System)
		}
	}
	if !p.promises() {
		return ""
	}
	for _, t := range slices.Sorted(maps.Keys(p.lives())) {
		if !p.known(t) && t != p.base.Timeline {
			return fmt.Sprintf("the history of timeline %d cannot be read, so nobody knows which WAL leads to it: `cleancut wal push` %s from the server's pg_wal", t, HistoryOf(t))
		}
	}
	return ""
}

func (p *planner) known(t Timeline) bool {
	_, ok := p.Histories[t]
	return ok || t == 1
}

// PlanRetention decides which WAL goes. It is pure; the same facts give the
// same plan, and applying a plan, also a part of it from its beginning, and
// planning again removes nothing else. f.Backups are those that stay.
//
// Without a window all WAL stays that any of the backups can be recovered by.
// With one: what the window's anchor, the backups since and those in use can be
// recovered by; those before stand alone. The anchor is the latest sound backup
// that was cut before the window, else the oldest. A timeline that the anchor
// does not lead to and that may have been written since has an anchor of its
// own. WAL that no backup reaches goes only if it lies before one on the
// latter's own way, or on a timeline that was given up before the anchor.
// History files stay, and so does all in doubt.
func PlanRetention(f Facts, now time.Time) Plan {
	p := newPlanner(f, now)
	out := Plan{Window: f.Window, Anchor: p.base.ID, Doubt: p.doubts(), Keep: []Part{}, Remove: []Part{}, Backups: []Reach{}}
	judge := func(Stored) (bool, string) { return true, out.Doubt }
	if out.Doubt == "" {
		judge = p.judge(p.needs())
	}
	files := slices.Clone(f.Files)
	slices.SortFunc(files, func(a, b Stored) int {
		return cmp.Or(cmp.Compare(a.File.Timeline, b.File.Timeline), p.compare(a.File, b.File))
	})
	left := Set{}
	for _, s := range files {
		keep, why := judge(s)
		if !keep {
			out.Remove = p.grow(out.Remove, s, why)
			out.Bytes += s.Size
			out.files = append(out.files, s)
			continue
		}
		out.Keep = p.grow(out.Keep, s, why)
		if g, err := s.File.Segment(p.size); err == nil && s.File.Kind == Whole {
			left[g] = true
		}
	}
	slices.SortStableFunc(out.files, func(a, b Stored) int { return p.compare(a.File, b.File) })
	for _, b := range p.placed {
		out.Backups = append(out.Backups, Reach{ID: b.ID, From: b.From, Before: p.set.Ways(p.lines, b.Timeline, b.From, p.size), After: left.Ways(p.lines, b.Timeline, b.From, p.size)})
	}
	out.Since = p.since(left)
	return out
}

// compare orders files by position.
func (p *planner) compare(a, b File) int {
	position := func(f File) (g Segment) { // a history file counts as the first
		if f.Kind != Journal {
			g, _ = f.Segment(p.size)
		}
		return g
	}
	x, y := position(a), position(b)
	return cmp.Or(cmp.Compare(x.Number, y.Number), cmp.Compare(a.Timeline, b.Timeline), cmp.Compare(a.Offset, b.Offset), cmp.Compare(b.Kind, a.Kind))
}

// grow adds a file to the last part if it follows on it, or begins a new one.
func (p *planner) grow(parts []Part, s Stored, why string) []Part {
	if n := len(parts); n > 0 && parts[n-1].Why == why && parts[n-1].Last.Timeline == s.File.Timeline {
		last := &parts[n-1]
		a, err := last.Last.Segment(p.size)
		b, err2 := s.File.Segment(p.size)
		if err == nil && err2 == nil && b.Number-a.Number <= 1 {
			last.Last, last.Files, last.Bytes = s.File, last.Files+1, last.Bytes+s.Size
			return parts
		}
	}
	return append(parts, Part{First: s.File, Last: s.File, Files: 1, Bytes: s.Size, Why: why})
}

// judge returns the rule that decides about a file.
func (p *planner) judge(needs []need) func(Stored) (keep bool, why string) {
	from := map[Timeline]need{}   // along each line, the backup that needs the most
	before := map[Timeline]need{} // of each timeline, the oldest backup on it
	for _, n := range needs {
		for _, h := range p.lines {
			if (n.only == 0 || n.only == h.Timeline) && h.Leads(n.of.Timeline, n.of.From) {
				if have, ok := from[h.Timeline]; !ok || n.of.From < have.of.From {
					from[h.Timeline] = n
				}
			}
		}
		if have, ok := before[n.of.Timeline]; !ok || n.of.From > have.of.From {
			before[n.of.Timeline] = n
		}
	}
	newest, lowest := p.newest(), p.last.Timeline
	for _, n := range needs {
		lowest = min(lowest, n.of.Timeline)
	}
	return func(s Stored) (bool, string) {
		if s.File.Kind == Journal {
			return true, "history files stay"
		}
		g, err := s.File.Segment(p.size)
		if err != nil {
			return true, fmt.Sprintf("no segment of %s has this name", p.size)
		}
		for _, h := range p.lines {
			if n, ok := from[h.Timeline]; ok && g.Number >= p.first(n.of) && h.Path(g.Number, p.size) == g {
				return true, n.why
			}
		}
		if g == newest {
			return true, "the newest: a stream goes on behind it"
		}
		if !p.known(g.Timeline) && lowest < g.Timeline {
			return true, fmt.Sprintf("the history of timeline %d cannot be read", g.Timeline)
		}
		for _, h := range p.lines {
			if n, ok := before[h.Timeline]; ok && g.Number < p.first(n.of) && h.Path(g.Number, p.size) == g {
				return false, "the backups that need WAL were cut later"
			}
		}
		switch why := p.live(g.Timeline, g.Number); {
		case why != "":
			return true, "no backup reaches it, but " + why
		case !p.known(g.Timeline):
			return true, fmt.Sprintf("the history of timeline %d cannot be read", g.Timeline)
		case p.line(g.Timeline).Leads(p.base.Timeline, p.base.From):
			return true, "no backup reaches it, and it is not older than the oldest that needs WAL"
		}
		return false, fmt.Sprintf("no backup reaches it, and timeline %d was given up before backup %s", g.Timeline, p.base.ID)
	}
}

// newest returns the last segment of the newest timeline that has any.
func (p *planner) newest() (out Segment) {
	for g := range p.set {
		if g.Timeline > out.Timeline || g.Timeline == out.Timeline && g.Number > out.Number {
			out = g
		}
	}
	return out
}

// Ways returns how far the unbroken rows of segments lead from a position of a
// timeline, along each of the lines that pass it and have WAL of their own
// behind it.
func (s Set) Ways(lines []History, t Timeline, from backup.LSN, size Size) []Way {
	out := []Way{}
	for _, h := range lines {
		if !h.Leads(t, from) {
			continue
		}
		last, ok := s.Follow(h, At(t, from, size).Number, size)
		if ok && last.Timeline == h.Timeline { // else it ends on an ancestor, whose own way says so
			out = append(out, Way{h.Timeline, last.End(size)})
		}
	}
	return out
}

// Since is Plan.Since for WAL as it is.
func Since(f Facts, now time.Time) *time.Time {
	p := newPlanner(f, now)
	return p.since(p.set)
}

func (p *planner) since(left Set) *time.Time {
	if !slices.ContainsFunc(p.sound, func(b Backup) bool { return b.ID == p.last.ID }) {
		return nil
	}
	ways := left.Ways(p.lines, p.last.Timeline, p.last.From, p.size)
	if len(ways) == 0 {
		return nil
	}
	newest := ways[len(ways)-1]
	var out *time.Time
	for _, b := range p.sound {
		at := p.cuts[b.ID].at
		if slices.Contains(left.Ways(p.lines, b.Timeline, b.From, p.size), newest) && (out == nil || at.Before(*out)) {
			out = &at
		}
	}
	return out
}
