package wal

import (
	"encoding/binary"
	"fmt"

	"cleancut/internal/backup"
)

// HeaderSize is how many bytes of a segment ParseHeader needs
// (xlog_internal.h: SizeOfXLogLongPHD).
const HeaderSize = 40

// longHeader is XLP_LONG_HEADER: the first page of every segment has it.
const longHeader = 0x0002

// System is what all WAL of one cluster has in common.
type System struct {
	Identifier  backup.SystemIdentifier `json:"system_identifier"`
	SegmentSize Size                    `json:"segment_size"`
}

// Header is the long header of a segment's first page (xlog_internal.h:
// XLogLongPageHeaderData). Numbers are little-endian: PostgreSQL writes the
// machine's own order, and cleancut runs on no machine that has the other.
type Header struct {
	Magic     uint16
	Major     int      // of PostgreSQL, by the magic number
	Timeline  Timeline // of the page's first record: that of the segment or an ancestor
	Page      backup.LSN
	System    System
	BlockSize backup.Bytes
}

// major returns the major version that writes WAL with that XLOG_PAGE_MAGIC.
func major(magic uint16) int {
	switch magic {
	case 0xD106:
		return 13
	case 0xD10D:
		return 14
	case 0xD110:
		return 15
	case 0xD113:
		return 16
	case 0xD116:
		return 17
	case 0xD118:
		return 18
	}
	return 0
}

// ParseHeader reads the first HeaderSize bytes of a segment.
// backup.ErrDamage: they are no such header, or of a version that this
// cleancut does not know.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, fmt.Errorf("%w: a segment of %d bytes has no header", backup.ErrDamage, len(b))
	}
	le := binary.LittleEndian
	h := Header{Magic: le.Uint16(b), Timeline: Timeline(le.Uint32(b[4:])), Page: backup.LSN(le.Uint64(b[8:])),
		System: System{backup.SystemIdentifier(le.Uint64(b[24:])), Size(le.Uint32(b[32:]))}, BlockSize: backup.Bytes(le.Uint32(b[36:]))}
	h.Major = major(h.Magic)
	if h.Major == 0 || le.Uint16(b[2:])&longHeader == 0 {
		return h, fmt.Errorf("%w: it begins with magic number %04X and flags %04X, which is no segment of PostgreSQL 13 to 18", backup.ErrDamage, h.Magic, le.Uint16(b[2:]))
	}
	if err := CheckSize(h.System.SegmentSize); err != nil {
		return h, err
	}
	if h.Timeline == 0 || h.System.Identifier == 0 || h.BlockSize < 1<<10 || h.BlockSize > 1<<16 {
		return h, fmt.Errorf("%w: its header does not hold together", backup.ErrDamage)
	}
	return h, nil
}

// Proves tells whether the segment with this header is the one that f names,
// and of that system; a zero System stands for any. backup.ErrNotOurs: it is
// of another cluster. backup.ErrDamage: it is another segment.
//
// The header's timeline may be an older one: after a promotion the first
// segment of the new timeline begins with WAL of the old one.
func (h Header) Proves(f File, of System) error {
	if of != (System{}) && of.Identifier != h.System.Identifier {
		return backup.Hint(fmt.Errorf("%s is of system %d, not of %d: %w", f, h.System.Identifier, of.Identifier, backup.ErrNotOurs),
			"another cluster uses the same name in the catalog (--cluster): give each its own")
	}
	if of != (System{}) && of.SegmentSize != h.System.SegmentSize {
		return fmt.Errorf("%s is a segment of %s, not of %s: %w", f, h.System.SegmentSize, of.SegmentSize, backup.ErrNotOurs)
	}
	g, err := f.Segment(h.System.SegmentSize)
	if err != nil {
		return err
	}
	if want := g.Start(h.System.SegmentSize); h.Page != want {
		return fmt.Errorf("%w: %s begins with page %s, not %s", backup.ErrDamage, f, h.Page, want)
	}
	if h.Timeline > f.Timeline {
		return fmt.Errorf("%w: %s begins with timeline %d", backup.ErrDamage, f, h.Timeline)
	}
	return nil
}
