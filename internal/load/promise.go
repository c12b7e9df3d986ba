package load

import "time"

// Promise is what a server promised up to a moment: plain data, small, fit
// for JSON. What it does not name was not promised and must not be there: a
// promise without streams says that no word was ever sent.
type Promise struct {
	Before    time.Time `json:"before"` // of the cut; acknowledged then or earlier
	Facts     *Facts    `json:"facts,omitempty"`
	Words     []Stream  `json:"words,omitempty"`
	Transfers []Stream  `json:"transfers,omitempty"`
	Present   []int     `json:"markers_present,omitempty"`
	Absent    []int     `json:"markers_absent,omitempty"`
}

// Stream is one session's ids: 1 to Acked must be in a copy, up to Sent may
// be, no other can.
type Stream struct {
	Stream int64 `json:"stream"`
	Acked  int64 `json:"acked"`
	Sent   int64 `json:"sent"`
}

// Join adds to p the streams and markers of q, of another load on the same
// database. Before and Facts stay p's, unless p has none.
func (p Promise) Join(q Promise) Promise {
	if p.Before.IsZero() {
		p.Before = q.Before
	}
	if p.Facts == nil {
		p.Facts = q.Facts
	}
	p.Words = concat(p.Words, q.Words)
	p.Transfers = concat(p.Transfers, q.Transfers)
	p.Present = concat(p.Present, q.Present)
	p.Absent = concat(p.Absent, q.Absent)
	return p
}

func concat[T any](a, b []T) []T { return append(append([]T(nil), a...), b...) }
