package load

import (
	"iter"
	"time"
)

// Point is the number of operations acknowledged in the second that begins at
// At.
type Point struct {
	At    time.Time `json:"at"`
	Count int64     `json:"count"`
}

// Stall is a time without any acknowledgement.
type Stall struct {
	From   time.Time     `json:"from"`
	Length time.Duration `json:"length_ns"`
}

// Series is the throughput of every second since Start, those without an
// acknowledgement too. The last point may be of less than a second.
func (c *crew) Series() []Point {
	from, to := c.span()
	return series(from, to, c.list())
}

// Stall is the longest time between from and to in which no session got an
// acknowledgement; the zero times stand for the start and the end (or now).
func (c *crew) Stall(from, to time.Time) Stall {
	first, last := c.span()
	if first.IsZero() {
		return Stall{}
	}
	if from.Before(first) {
		from = first
	}
	if to.IsZero() || to.After(last) {
		to = last
	}
	worst := Stall{From: from}
	before := from
	note := func(at time.Time) {
		if gap := at.Sub(before); gap > worst.Length {
			worst = Stall{From: before, Length: gap}
		}
		before = at
	}
	for at := range merged(c.list()) {
		if at.After(to) {
			break
		}
		if at.After(from) {
			note(at)
		}
	}
	note(to)
	return worst
}

// series counts the acknowledgements of all journals by the second.
func series(from, to time.Time, journals []*journal) []Point {
	if from.IsZero() {
		return nil
	}
	points := make([]Point, int(max(to.Sub(from), 0)/time.Second)+1)
	for i := range points {
		points[i].At = from.Add(time.Duration(i) * time.Second)
	}
	for _, j := range journals {
		for at := range j.acks() {
			// Another beater may have begun a moment before.
			i := max(int(at.Sub(from)/time.Second), 0)
			if i < len(points) {
				points[i].Count++
			}
		}
	}
	return points
}

// merged yields the acknowledgements of all journals in order of time.
func merged(journals []*journal) iter.Seq[time.Time] {
	return func(yield func(time.Time) bool) {
		type head struct {
			at   time.Time
			next func() (time.Time, bool)
		}
		var heads []head
		for _, j := range journals {
			next, stop := iter.Pull(j.acks())
			defer stop()
			if at, ok := next(); ok {
				heads = append(heads, head{at, next})
			}
		}
		for len(heads) > 0 {
			least := 0
			for i := range heads {
				if heads[i].at.Before(heads[least].at) {
					least = i
				}
			}
			if !yield(heads[least].at) {
				return
			}
			at, ok := heads[least].next()
			heads[least].at = at
			if !ok {
				heads = append(heads[:least], heads[least+1:]...)
			}
		}
	}
}
