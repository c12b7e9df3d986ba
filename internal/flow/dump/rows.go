package dump

import (
	"bytes"
	"fmt"

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
	s.feed(p)
	return len(p), nil
}

// feed reads up to the line that ends the rows and returns how many bytes of p
// it took.
func (s *rowSum) feed(p []byte) (taken int) {
	for taken < len(p) && !s.ended {
		i := bytes.IndexByte(p[taken:], '\n')
		if i < 0 {
			s.begin(p[taken:])
			return len(p)
		}
		line := p[taken : taken+i]
		taken += i + 1
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
	return taken
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
	done func() // called after each table
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

// sqlScan reads the output of pg_dumpall as it passes by: at each database's
// heading it goes on to the next database, and below the heading of a table's
// data it takes the COPY statement for what it is. So what looks like one in a
// function's body either is of no known table and counts for nothing, or makes
// that table come twice; it never makes a check pass that should not.
type sqlScan struct {
	tally
	databases []*database // in the order of the dump
	next      int         // of them
	now       *database   // whose statements come
	heading   bool        // the heading of a table's data was the last
	statement []byte      // a COPY statement that is not whole yet: a name may hold a newline
	line      []byte      // that is not whole yet
	long      bool        // it is longer than any that matters
	rows      *rowSum     // of the table whose rows come; nil: none
	of        *table
}

// maxStatement is above any COPY statement with 1,600 columns.
const maxStatement = 1 << 20

// Write implements io.Writer; it never fails.
func (s *sqlScan) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if s.rows != nil {
			p = p[s.rows.feed(p):]
			if s.rows.ended {
				s.take(s.of, s.rows)
				s.rows = nil
			}
			continue
		}
		i := bytes.IndexByte(p, '\n') + 1
		if i == 0 {
			if s.long = s.long || len(s.line)+len(p) > maxStatement; !s.long {
				s.line = append(s.line, p...)
			}
			break
		}
		line := p[:i]
		if len(s.line) > 0 {
			line = append(s.line, line...)
		}
		if !s.long {
			s.see(line)
		}
		s.line, s.long, p = s.line[:0], false, p[i:]
	}
	return n, nil
}

// see looks at a line that is no row.
func (s *sqlScan) see(line []byte) {
	switch {
	case s.statement != nil || s.heading && bytes.HasPrefix(line, []byte("COPY ")):
		s.statement = append(s.statement, line...)
		if target, ok := bytes.CutSuffix(s.statement, []byte(" FROM stdin;\n")); ok {
			s.rows, s.of = &rowSum{}, s.now.statements[string(target)]
		}
		if s.rows != nil || len(s.statement) > maxStatement {
			s.statement, s.heading = nil, false
		}
	case bytes.HasPrefix(line, []byte("-- Data for Name: ")):
		s.heading = s.now != nil
	case s.next < len(s.databases) && bytes.Equal(line, s.databases[s.next].heading()):
		s.now, s.heading = s.databases[s.next], false
		s.next++
	}
}
