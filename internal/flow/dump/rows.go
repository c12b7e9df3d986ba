package dump

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/cespare/xxhash/v2"
)

// rowSum counts the rows of COPY's text format and sums up the XXH64 of each,
// modulo 2^64: the sum does not depend on their order. A line of \. ends the
// rows; what follows is not looked at.
type rowSum struct {
	rows  int64
	sum   uint64
	ended bool

	part    *xxhash.Digest // of a row whose end is still to come
	partial int            // its bytes so far
	head    [2]byte        // the first of them
}

// Write implements io.Writer; it never fails.
func (s *rowSum) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 && !s.ended {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			s.begin(p)
			break
		}
		line := p[:i]
		p = p[i+1:]
		switch {
		case s.partial > 0:
			s.begin(line)
			if s.partial == 2 && s.head == [2]byte{'\\', '.'} {
				s.ended = true
			} else {
				s.rows, s.sum = s.rows+1, s.sum+s.part.Sum64()
			}
			s.part.Reset()
			s.partial = 0
		case len(line) == 2 && line[0] == '\\' && line[1] == '.':
			s.ended = true
		default:
			s.rows, s.sum = s.rows+1, s.sum+xxhash.Sum64(line)
		}
	}
	return n, nil
}

// begin adds to the row that is not whole yet.
func (s *rowSum) begin(p []byte) {
	if s.part == nil {
		s.part = xxhash.New()
	}
	if s.partial < 2 {
		copy(s.head[s.partial:], p)
	}
	_, _ = s.part.Write(p) // never fails
	s.partial += len(p)
}

// hash is the sum as the manifest has it.
func (s *rowSum) hash() string { return fmt.Sprintf("%016x", s.sum) }

// tally takes down what was seen of the tables.
type tally struct {
	databases []*database // in the order of the dump
	done      func()      // called after each table
}

// maxStatement is above any COPY statement with 1,600 columns.
const maxStatement = 1 << 20

// sql reads the output of pg_dumpall: at each database's heading it goes on to
// the next database, and below the heading of a table's data it takes the COPY
// statement for what it is, if it is that of a table that is known and was not
// seen yet. So what looks like one in a function's body counts for nothing, or
// makes a later check fail, but never pass.
func (t *tally) sql(r io.Reader) error {
	br := bufio.NewReaderSize(r, pipeSize)
	var db *database
	next, heading := 0, false
	var statement []byte // a COPY statement that is not whole yet: a name holds a newline
	for {
		line, err := br.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) { // longer than any line that matters
			statement = nil
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = br.ReadSlice('\n')
			}
			line = nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case statement != nil || heading && bytes.HasPrefix(line, []byte("COPY ")):
			statement = append(statement, line...)
			if !bytes.HasSuffix(line, []byte(" FROM stdin;\n")) {
				if len(statement) > maxStatement {
					statement, heading = nil, false
				}
				continue
			}
			table := db.statements[string(bytes.TrimSuffix(statement, []byte(" FROM stdin;\n")))]
			statement, heading = nil, false
			if err := t.block(br, table); err != nil {
				return err
			}
		case bytes.HasPrefix(line, []byte("-- Data for Name: ")):
			heading = db != nil
		case next < len(t.databases) && bytes.Equal(line, t.databases[next].heading()):
			db, next, heading = t.databases[next], next+1, false
		}
	}
}

// block reads the rows that follow a COPY statement.
func (t *tally) block(br *bufio.Reader, table *table) error {
	var s rowSum
	for !s.ended {
		line, err := br.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("the rows of a table do not end: %w", err)
		}
		_, _ = s.Write(line)
	}
	t.take(table, &s)
	return nil
}

// take notes what was read of a table. One that comes twice is not believed.
func (t *tally) take(table *table, s *rowSum) {
	if table == nil {
		return
	}
	table.seen++
	table.rows, table.hash = s.rows, s.hash()
	if t.done != nil {
		t.done()
	}
}
