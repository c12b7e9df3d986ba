package wal

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"cleancut/internal/backup"
)

// cut is when a backup was cut: not before those that its own WAL comes after,
// whatever the clock said.
type cut struct {
	at      time.Time
	witness Backup // by whose clock
}

// planner has the facts in the form in which they are asked for.
type planner struct {
	Facts
	size  Size
	set   Set
	lines []History // of every timeline that has WAL or a backup; one that cannot be read stands alone
	limit time.Time // where the window begins
	// placed are the backups that WAL can belong to, sound those of them that can
	// be relied on.
	placed, sound []Backup
	cuts          map[backup.ID]cut
	base          Backup              // the anchor; without an ID there is none
	last          Backup              // the newest
	late          map[Timeline]uint64 // of each timeline the last segment that was stored after the base was cut
}

func newPlanner(f Facts, now time.Time) *planner {
	p := &planner{Facts: f, size: f.System.SegmentSize, set: Set{}, cuts: map[backup.ID]cut{}, late: map[Timeline]uint64{}, limit: now.Add(-time.Duration(f.Window))}
	if err := CheckSize(p.size); err != nil { // its record is missing
		p.size, p.Doubt = 16<<20, cmp.Or(p.Doubt, err.Error())
	}
	known := map[Timeline]bool{}
	for _, s := range f.Files {
		known[s.File.Timeline] = true
		if g, err := s.File.Segment(p.size); err == nil && s.File.Kind == Whole {
			p.set[g] = true
		}
	}
	for _, b := range f.Backups {
		known[b.Timeline] = b.Timeline > 0 || known[b.Timeline]
	}
	for t := range known {
		h, ok := f.Histories[t]
		if !ok {
			h = History{Timeline: t}
		}
		p.lines = append(p.lines, h)
	}
	slices.SortFunc(p.lines, func(a, b History) int { return cmp.Compare(a.Timeline, b.Timeline) })
	p.judgeBackups(now)
	p.chooseBase()
	for _, s := range f.Files {
		if g, err := s.File.Segment(p.size); err == nil && s.Stored.After(p.base.Cut) {
			p.late[g.Timeline] = max(g.Number, p.late[g.Timeline])
		}
	}
	return p
}

// Leads reports whether recovery along h passes position from of timeline t.
func (h History) Leads(t Timeline, from backup.LSN) bool {
	begin, ok := h.Begin(t)
	end, ended := h.End(t)
	return t == h.Timeline || ok && from >= begin && (!ended || from <= end)
}

func (p *planner) line(t Timeline) History {
	i := slices.IndexFunc(p.lines, func(h History) bool { return h.Timeline == t })
	return p.lines[i]
}

func (p *planner) first(b Backup) uint64 { return At(b.Timeline, b.From, p.size).Number }

// judgeBackups finds out which backups count, and when they were cut.
func (p *planner) judgeBackups(now time.Time) {
	for _, b := range p.Backups {
		if !b.Placed || b.Torn || b.Timeline == 0 || b.From == 0 {
			continue
		}
		p.placed = append(p.placed, b)
		if b.Sound(now) && !b.Cut.IsZero() {
			p.sound = append(p.sound, b)
		}
	}
	for _, b := range p.placed {
		own, c := p.line(b.Timeline), cut{b.Cut, b}
		for _, d := range p.placed {
			if d.From <= b.From && own.Leads(d.Timeline, d.From) && d.Cut.After(c.at) {
				c = cut{d.Cut, d}
			}
		}
		p.cuts[b.ID] = c
	}
}

// anchor chooses the latest of these that was cut before the window; if there
// is none, the oldest.
func (p *planner) anchor(of []Backup) (best Backup, ok bool) {
	for _, b := range of {
		if !ok {
			best, ok = b, true
			continue
		}
		at, have := p.cuts[b.ID].at, p.cuts[best.ID].at
		before, after := !at.After(p.limit), !have.After(p.limit)
		switch {
		case before != after:
			if before {
				best = b
			}
		case at.Equal(have):
			if b.From < best.From || b.From == best.From && b.ID < best.ID {
				best = b
			}
		case at.After(have) == before:
			best = b
		}
	}
	return best, ok
}

func (p *planner) chooseBase() {
	of := p.sound
	if !p.promises() {
		p.limit, of = time.Time{}, p.placed // the oldest of all
	}
	p.base, _ = p.anchor(of)
	for _, b := range of {
		at, latest := p.cuts[b.ID].at, p.cuts[p.last.ID].at
		if p.last.ID == "" || at.After(latest) || at.Equal(latest) && b.From > p.last.From {
			p.last = b
		}
	}
}

// promises: there is a window, and a backup that it can begin with.
func (p *planner) promises() bool { return p.Window > 0 && len(p.sound) > 0 }

// live says why WAL of timeline t, from a segment on, may have been written
// since the base, though the base does not lead to it; "": it was given up
// before. That rests on PostgreSQL's own numbers, which grow; the stored times
// only keep more.
func (p *planner) live(t Timeline, from uint64) string {
	switch {
	case p.line(t).Leads(p.base.Timeline, p.base.From):
		return ""
	case t > p.base.Timeline:
		return fmt.Sprintf("timeline %d is newer than that of backup %s", t, p.base.ID)
	case t == p.last.Timeline:
		return fmt.Sprintf("the newest backup is on timeline %d", t)
	}
	if late, ok := p.late[t]; ok && late >= from {
		return fmt.Sprintf("some of timeline %d was stored after backup %s was cut", t, p.base.ID)
	}
	return ""
}

// lives returns the live timelines that have WAL, and the anchor of the window
// on each; the zero Backup where no WAL leads from a sound one to it.
func (p *planner) lives() map[Timeline]Backup {
	out, has := map[Timeline]Backup{}, map[Timeline]bool{}
	for _, s := range p.Files {
		has[s.File.Timeline] = has[s.File.Timeline] || s.File.Kind != Journal
	}
	for _, h := range p.lines {
		t := h.Timeline
		if !has[t] {
			continue
		}
		b, ok := p.along(h)
		if ok && !p.set[h.Path(p.first(b), p.size)] { // no WAL leads on from it
			b, _ = p.behind(h, b)
		}
		if p.live(t, p.first(b)) != "" {
			out[t] = b
		}
	}
	return out
}

// along returns the anchor of the window on one line.
func (p *planner) along(h History) (Backup, bool) {
	return p.anchor(p.on(h))
}

// on returns the sound backups on a line.
func (p *planner) on(h History) []Backup {
	return slices.DeleteFunc(slices.Clone(p.sound), func(b Backup) bool { return !h.Leads(b.Timeline, b.From) })
}

// behind returns the first backup on a line from which WAL leads on behind the
// gap that ends the row from b.
func (p *planner) behind(h History, b Backup) (next Backup, ok bool) {
	gap := p.first(b)
	if last, ok := p.set.Follow(h, gap, p.size); ok {
		gap = last.Number + 1
	}
	for _, c := range p.on(h) {
		if n := p.first(c); n > gap && p.set[h.Path(n, p.size)] && (!ok || c.From < next.From || c.From == next.From && c.ID < next.ID) {
			next, ok = c, true
		}
	}
	return next, ok
}

// Anchors says of each backup that the promised window needs why it does; none
// without a window. They must stay whatever the rules of retention say.
func Anchors(f Facts, now time.Time) map[backup.ID]string {
	p := newPlanner(f, now)
	out := map[backup.ID]string{}
	if !p.promises() {
		return out
	}
	because := func(b Backup, format string, a ...any) {
		if out[b.ID] == "" {
			out[b.ID] = fmt.Sprintf(format, a...)
		}
	}
	because(p.base, "the promised window of %s begins with it", p.Window)
	lives := p.lives()
	for _, h := range p.lines {
		b, ok := lives[h.Timeline]
		if h.Leads(p.base.Timeline, p.base.From) {
			b, ok = p.along(h)
		}
		if !ok || b.ID == "" {
			continue
		}
		because(b, "the promised window of %s begins with it on timeline %d", p.Window, h.Timeline)
		for b, ok = p.behind(h, b); ok; b, ok = p.behind(h, b) {
			because(b, "WAL of the promised window is missing before it")
		}
	}
	for _, b := range p.sound {
		if c := p.cuts[b.ID]; !b.Cut.After(p.limit) && c.at.After(p.limit) {
			because(c.witness, "it shows that backup %s is not as old as it says: check the clocks", b.ID)
		}
	}
	return out
}
