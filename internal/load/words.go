package load

import (
	"context"
	"crypto/md5"
	"encoding/binary"
	"fmt"
	"iter"
	"math/rand/v2"
	"strconv"
	"time"
)

// WordsOptions says how Words works. Zero values mean the defaults.
type WordsOptions struct {
	Sessions int   // default 1, at most 64
	Seed     int64 // of the words; default 1
}

// Words is beater B: single-row inserts of random words in autocommit. Each
// session numbers its rows 1, 2, 3 and so on in a stream of its own, and each
// row carries a checksum. Use each Words for one Start.
type Words struct {
	crew
	options WordsOptions
}

// NewWords makes the beater; Start lets it work.
func NewWords(o WordsOptions) *Words {
	if o.Sessions <= 0 {
		o.Sessions = 1
	}
	if o.Seed == 0 {
		o.Seed = 1
	}
	return &Words{crew: crew{name: wordsName}, options: o}
}

// The two expressions of a row's checksum, in SQL and in rowSum, must agree.
const (
	insertWord = `insert into play.words_said (stream, id, word, sum) values ($1, $2, $3, $4)`
	wordIntact = `sum = md5(stream || '/' || id || '/' || word)::uuid`
)

func rowSum(stream, id int64, word string) [md5.Size]byte {
	b := make([]byte, 0, 96)
	b = append(strconv.AppendInt(b, stream, 10), '/')
	b = append(strconv.AppendInt(b, id, 10), '/')
	return md5.Sum(append(b, word...))
}

// Start connects the sessions and sets them going; cancelling ctx ends them
// cleanly. The error is that of connecting.
func (w *Words) Start(ctx context.Context, connect Connect) error {
	works := make([]work, w.options.Sessions)
	for i := range works {
		works[i] = w.say
	}
	return w.launch(ctx, connect, nil, works...)
}

func (w *Words) say(ctx context.Context, s *session) error {
	pc := s.conn.PgConn()
	if _, err := pc.Prepare(ctx, "say", insertWord, nil); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	defer s.onCancel(ctx)()
	random := rand.New(rand.NewPCG(uint64(w.options.Seed), uint64(s.n)))
	words := vocabulary()
	stream, number := make([]byte, 8), make([]byte, 8)
	binary.BigEndian.PutUint64(stream, uint64(s.stream))
	formats := []int16{1, 1, 0, 1} // binary but for the word
	for !s.quitting() && ctx.Err() == nil {
		word := words[random.IntN(len(words))] + " " + words[random.IntN(len(words))] + " " + strconv.Itoa(random.IntN(1e9))
		id := s.send()
		binary.BigEndian.PutUint64(number, uint64(id))
		sum := rowSum(s.stream, id, word)
		_, err := pc.ExecPrepared(context.Background(), "say", [][]byte{stream, number, []byte(word), sum[:]}, formats, nil).Close()
		if err != nil {
			return fmt.Errorf("insert word %d: %w", id, err)
		}
		s.ack(time.Now())
	}
	return nil
}

// Promise is what the server promised by acknowledging at before or earlier.
// Every id sent until now may be in the copy as well: call it after the cut.
func (w *Words) Promise(before time.Time) Promise {
	return Promise{Before: before, Words: w.streams(before, time.Time{})}
}

// PromiseUntil is Promise with a tighter upper bound, for a copy that holds
// nothing later than until.
func (w *Words) PromiseUntil(before, until time.Time) Promise {
	return Promise{Before: before, Words: w.streams(before, until)}
}

// ID names a row of Words or Transfers.
type ID struct {
	Stream int64 `json:"stream"`
	N      int64 `json:"n"`
}

func (id ID) String() string { return fmt.Sprintf("%d/%d", id.Stream, id.N) }

// Acks yields every id acknowledged so far with its time, stream by stream.
func (c *crew) Acks() iter.Seq2[ID, time.Time] {
	return func(yield func(ID, time.Time) bool) {
		for _, j := range c.list() {
			var n int64
			for at := range j.acks() {
				n++
				if !yield(ID{j.stream, n}, at) {
					return
				}
			}
		}
	}
}

// streams gives what each session can count on. A session sends an id only
// after the one before was acknowledged, so until any moment it sent at most
// one more than were acknowledged until then.
func (c *crew) streams(before, until time.Time) []Stream {
	var out []Stream
	for _, j := range c.list() {
		acked := j.ackedBefore(before)
		sent, _ := j.counts()
		if !until.IsZero() {
			sent = min(sent, j.ackedBefore(until)+1)
		}
		out = append(out, Stream{Stream: j.stream, Acked: acked, Sent: max(sent, acked)})
	}
	return out
}
