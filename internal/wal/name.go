// Package wal knows WAL by its names: segments, timelines and their histories,
// and what proves that a file is what its name says.
//
//	name → File → Segment → Range, gap; history file → History → which timeline holds an LSN
//
// Everything here is pure. Terms are PostgreSQL's (documentation, "WAL
// Internals", "Timelines"): a segment is a file of 1 MiB to 1 GiB of WAL, the
// same in a whole cluster; a timeline begins where a server was promoted.
package wal

import (
	"fmt"
	"regexp"
	"strconv"

	"cleancut/internal/backup"
)

// Timeline is the number of a timeline, from 1.
type Timeline uint32

// String returns the eight hexadecimal digits that file names have.
func (t Timeline) String() string { return fmt.Sprintf("%08X", uint32(t)) }

// Kind is what a file of WAL is.
type Kind string

// The kinds of files that PostgreSQL hands to archive_command.
const (
	Whole   Kind = "segment" // a segment
	Partial Kind = "partial" // the last segment of a timeline that ended in its middle
	Journal Kind = "history" // where a timeline and its ancestors begin
	Label   Kind = "backup"  // when a base backup was taken
)

// File is the name of a file of WAL, taken apart. It is comparable.
type File struct {
	Kind     Kind
	Timeline Timeline
	High     uint32 // of a segment: LSN >> 32
	Low      uint32 // of a segment: which of those with the same High
	Offset   uint32 // of a Label: where in the segment the backup began
}

var fileName = regexp.MustCompile(`^([0-9A-F]{8})(?:\.(history)|([0-9A-F]{8})([0-9A-F]{8})(?:\.(partial)|\.([0-9A-F]{8})\.backup)?)$`)

// ParseFile reads the name of a segment, ".partial", ".history" or ".backup"
// file (xlog_internal.h: IsXLogFileName and its kin). The error wraps
// backup.ErrUsage.
func ParseFile(name string) (File, error) {
	m := fileName.FindStringSubmatch(name)
	if m == nil {
		return File{}, fmt.Errorf("%w: %q is no name of a WAL file", backup.ErrUsage, name)
	}
	f := File{Kind: Whole, Timeline: Timeline(hex(m[1])), High: hex(m[3]), Low: hex(m[4]), Offset: hex(m[6])}
	switch {
	case m[2] != "":
		f.Kind = Journal
	case m[5] != "":
		f.Kind = Partial
	case m[6] != "":
		f.Kind = Label
	}
	if f.Timeline == 0 {
		return File{}, fmt.Errorf("%w: %q: there is no timeline 0", backup.ErrUsage, name)
	}
	return f, nil
}

// hex reads what fileName has found to be eight digits, or nothing.
func hex(s string) uint32 {
	v, _ := strconv.ParseUint(s, 16, 32)
	return uint32(v)
}

// String returns the name.
func (f File) String() string {
	segment := fmt.Sprintf("%s%08X%08X", f.Timeline, f.High, f.Low)
	switch f.Kind {
	case Journal:
		return f.Timeline.String() + ".history"
	case Partial:
		return segment + ".partial"
	case Label:
		return fmt.Sprintf("%s.%08X.backup", segment, f.Offset)
	}
	return segment
}

// MarshalText makes JSON hold the name.
func (f File) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads the name.
func (f *File) UnmarshalText(b []byte) (err error) {
	*f, err = ParseFile(string(b))
	return err
}

// HistoryOf names the history file of a timeline.
func HistoryOf(t Timeline) File { return File{Kind: Journal, Timeline: t} }

// Size is the size of a cluster's segments.
type Size = backup.Bytes

// CheckSize refuses what initdb --wal-segsize does: sizes that are no power of
// two from 1 MiB to 1 GiB. The error wraps backup.ErrDamage.
func CheckSize(s Size) error {
	if s < 1<<20 || s > 1<<30 || s&(s-1) != 0 {
		return fmt.Errorf("%w: segments of %d bytes", backup.ErrDamage, int64(s))
	}
	return nil
}

// Segment is a segment in order: Number counts from the WAL's beginning.
type Segment struct {
	Timeline Timeline
	Number   uint64
}

// At returns the segment that holds the byte at lsn, on timeline t.
func At(t Timeline, lsn backup.LSN, s Size) Segment {
	return Segment{Timeline: t, Number: uint64(lsn) / uint64(s)}
}

// Segment returns which segment a File of kind Whole, Partial or Label names,
// where segments have size s. backup.ErrUsage: none does in a cluster with
// segments of that size.
func (f File) Segment(s Size) (Segment, error) {
	each := uint64(1<<32) / uint64(s)
	if f.Kind == Journal || uint64(f.Low) >= each {
		return Segment{}, fmt.Errorf("%w: %s names no segment of %s", backup.ErrUsage, f, s)
	}
	return Segment{Timeline: f.Timeline, Number: uint64(f.High)*each + uint64(f.Low)}, nil
}

// File returns the segment's name.
func (g Segment) File(s Size) File {
	each := uint64(1<<32) / uint64(s)
	return File{Kind: Whole, Timeline: g.Timeline, High: uint32(g.Number / each), Low: uint32(g.Number % each)}
}

// Start returns the position of the segment's first byte.
func (g Segment) Start(s Size) backup.LSN { return backup.LSN(g.Number * uint64(s)) }

// End returns the position after its last byte.
func (g Segment) End(s Size) backup.LSN { return g.Start(s) + backup.LSN(s) }

// Next returns the segment that follows on the same timeline.
func (g Segment) Next() Segment { return Segment{g.Timeline, g.Number + 1} }
