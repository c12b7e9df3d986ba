package load

import (
	"encoding/binary"
	"iter"
	"sort"
	"sync"
	"time"
)

// chunkAcks acknowledgements share one starting time; a look-up decodes at
// most one chunk.
const chunkAcks = 4096

// journal is the memory of one stream, outside of the database: how many ids
// were sent, and when each was acknowledged, at about two bytes an id. One
// goroutine writes it, any number read.
type journal struct {
	stream int64
	base   time.Time // with a monotonic reading; times below are microseconds since

	mu     sync.Mutex
	sent   int64
	acked  int64
	last   int64
	chunks []chunk
}

// chunk holds the time of its first acknowledgement and, for each one in it,
// the distance from the one before as an unsigned varint.
type chunk struct {
	first  int64
	deltas []byte
}

// send takes the next id, 1 for the first.
func (j *journal) send() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.sent++
	return j.sent
}

// ack notes that the oldest id not yet acknowledged was, now. Times are
// rounded up, so that none seems earlier than it was.
func (j *journal) ack(now time.Time) {
	us := int64((now.Sub(j.base) + time.Microsecond - 1) / time.Microsecond)
	j.mu.Lock()
	defer j.mu.Unlock()
	us = max(us, j.last)
	if j.acked%chunkAcks == 0 {
		j.chunks = append(j.chunks, chunk{first: us, deltas: make([]byte, 0, 2*chunkAcks)})
		j.last = us
	}
	c := &j.chunks[len(j.chunks)-1]
	c.deltas = binary.AppendUvarint(c.deltas, uint64(us-j.last))
	j.last = us
	j.acked++
}

func (j *journal) counts() (sent, acked int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.sent, j.acked
}

// view returns what was written so far. The bytes below the lengths never
// change again, so they are shared.
func (j *journal) view() []chunk {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]chunk(nil), j.chunks...)
}

// ackedBefore counts the ids acknowledged at t or before.
func (j *journal) ackedBefore(t time.Time) int64 {
	us := int64(t.Sub(j.base) / time.Microsecond)
	if t.Before(j.base) {
		return 0
	}
	chunks := j.view()
	i := sort.Search(len(chunks), func(i int) bool { return chunks[i].first > us })
	if i == 0 {
		return 0
	}
	n := int64(i-1) * chunkAcks
	for at := range chunks[i-1].times() {
		if at > us {
			break
		}
		n++
	}
	return n
}

// times yields the microseconds of each acknowledgement.
func (c chunk) times() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		at, rest := c.first, c.deltas
		for len(rest) > 0 {
			d, n := binary.Uvarint(rest)
			rest = rest[n:]
			at += int64(d)
			if !yield(at) {
				return
			}
		}
	}
}

// acks yields the time of each acknowledgement, of id 1, 2, and so on.
func (j *journal) acks() iter.Seq[time.Time] {
	return func(yield func(time.Time) bool) {
		for _, c := range j.view() {
			for us := range c.times() {
				if !yield(j.base.Add(time.Duration(us) * time.Microsecond)) {
					return
				}
			}
		}
	}
}
