package wal

import (
	"cmp"
	"slices"

	"cleancut/internal/backup"
)

// Set holds segments.
type Set map[Segment]bool

// NewSet returns the segments of kind Whole among files. Names that no segment
// of that size has are left out.
func NewSet(files []File, s Size) Set {
	out := Set{}
	for _, f := range files {
		if g, err := f.Segment(s); err == nil && f.Kind == Whole {
			out[g] = true
		}
	}
	return out
}

// Range is an unbroken row of segments of one timeline.
type Range struct {
	Timeline Timeline
	First    uint64
	Last     uint64
}

// Ranges returns the rows that the segments form, by timeline and position.
// Between two of the same timeline is a gap.
func (s Set) Ranges() []Range {
	all := make([]Segment, 0, len(s))
	for g := range s {
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b Segment) int {
		return cmp.Or(cmp.Compare(a.Timeline, b.Timeline), cmp.Compare(a.Number, b.Number))
	})
	var out []Range
	for _, g := range all {
		if n := len(out); n > 0 && out[n-1].Timeline == g.Timeline && out[n-1].Last+1 == g.Number {
			out[n-1].Last = g.Number
			continue
		}
		out = append(out, Range{g.Timeline, g.Number, g.Number})
	}
	return out
}

// Follow returns the last segment of the unbroken row along h that begins with
// segment number from. Not even that is there: false.
func (s Set) Follow(h History, from uint64, size Size) (last Segment, ok bool) {
	for n := from; ; n++ {
		g := h.Path(n, size)
		if !s[g] {
			return last, ok
		}
		last, ok = g, true
	}
}

// Resume returns the first segment along h that a receiver has to fetch, where
// the server keeps everything from position kept on: the first one at or after
// kept that is missing; but if all that is there ends before kept, the one
// after that end, so that no gap comes to be if the server still has it.
func (s Set) Resume(h History, kept backup.LSN, size Size) uint64 {
	from := At(h.Timeline, kept, size).Number
	newest, any := uint64(0), false
	for g := range s {
		if h.Path(g.Number, size) == g && g.Number < from && (!any || g.Number > newest) {
			newest, any = g.Number, true
		}
	}
	if any && !s[h.Path(from, size)] {
		return newest + 1
	}
	if last, ok := s.Follow(h, from, size); ok {
		return last.Number + 1
	}
	return from
}
