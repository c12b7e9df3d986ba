package wal_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

const mega = 1 << 20

func file(t testing.TB, name string) wal.File {
	t.Helper()
	f, err := wal.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestNamesThatArchiveCommandIsGiven(t *testing.T) {
	for name, want := range map[string]wal.File{
		"0000000100000A3B000000FF":                 {Kind: wal.Whole, Timeline: 1, High: 0xA3B, Low: 0xFF},
		"000000020000000000000003.partial":         {Kind: wal.Partial, Timeline: 2, Low: 3},
		"0000000A.history":                         {Kind: wal.Journal, Timeline: 10},
		"000000010000000000000002.00000028.backup": {Kind: wal.Label, Timeline: 1, Low: 2, Offset: 0x28},
	} {
		if got := file(t, name); got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
		if got := want.String(); got != name {
			t.Errorf("got %q, want %q", got, name)
		}
	}
	for _, name := range []string{"", "00000001000000000000000", "0000000100000000000000011", "00000001000000000000000g", "00000001000000000000000a",
		"000000000000000000000001", "00000000.history", "000000010000000000000001.gz", "../000000010000000000000001", "000000010000000000000001.backup", "000000010000000000000001\n"} {
		if f, err := wal.ParseFile(name); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: got %+v, %v", name, f, err)
		}
	}
}

func TestSegmentsAreWherePostgreSQLHasThem(t *testing.T) { // pg_walfile_name of these positions
	for _, c := range []struct {
		lsn  backup.LSN
		size wal.Size
		name string
	}{
		{0x1_000028, 16 * mega, "000000010000000000000001"},
		{0xFFFFFFFF, 16 * mega, "0000000100000000000000FF"},
		{0x1_00000000, 16 * mega, "000000010000000100000000"},
		{0x1_00000000, mega, "000000010000000100000000"},
		{0xFFF00000, mega, "000000010000000000000FFF"},
		{0x7_C0000000, 1 << 30, "000000010000000700000003"},
	} {
		g := wal.At(1, c.lsn, c.size)
		if got := g.File(c.size).String(); got != c.name {
			t.Errorf("%s with segments of %s: got %s, want %s", c.lsn, c.size, got, c.name)
		}
		back, err := file(t, c.name).Segment(c.size)
		if err != nil || back != g || c.lsn < g.Start(c.size) || c.lsn >= g.End(c.size) {
			t.Errorf("%s: got %+v from %s to %s, %v", c.name, back, g.Start(c.size), g.End(c.size), err)
		}
	}
	if g, err := file(t, "000000010000000000000100").Segment(16 * mega); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("there is no segment 100 of 16 MiB in 4 GiB: got %+v, %v", g, err)
	}
}

func header(magic uint16, t uint32, page, system uint64, size uint32) []byte {
	b := make([]byte, wal.HeaderSize)
	le := binary.LittleEndian
	le.PutUint16(b, magic)
	le.PutUint16(b[2:], 2)
	le.PutUint32(b[4:], t)
	le.PutUint64(b[8:], page)
	le.PutUint64(b[24:], system)
	le.PutUint32(b[32:], size)
	le.PutUint32(b[36:], 8192)
	return b
}

func TestAHeaderProvesWhatItsNameSays(t *testing.T) {
	ours := wal.System{Identifier: 77, SegmentSize: 16 * mega}
	const name = "000000020000000000000003"
	for _, c := range []struct {
		what string
		b    []byte
		want error
	}{
		{"the segment itself", header(0xD110, 2, 3*16*mega, 77, 16*mega), nil},
		{"of another version", header(0xD118, 2, 3*16*mega, 77, 16*mega), nil},
		{"it begins with WAL of the ancestor", header(0xD110, 1, 3*16*mega, 77, 16*mega), nil},
		{"of another cluster", header(0xD110, 2, 3*16*mega, 78, 16*mega), backup.ErrNotOurs},
		{"with segments of another size", header(0xD110, 2, 3*16*mega, 77, 32*mega), backup.ErrNotOurs},
		{"another segment: a recycled file", header(0xD110, 2, 1*16*mega, 77, 16*mega), backup.ErrDamage},
		{"of a later timeline", header(0xD110, 3, 3*16*mega, 77, 16*mega), backup.ErrDamage},
		{"zeros", make([]byte, wal.HeaderSize), backup.ErrDamage},
		{"no long header", append(header(0xD110, 2, 3*16*mega, 77, 16*mega)[:2], make([]byte, 38)...), backup.ErrDamage},
		{"segments of a size that there is not", header(0xD110, 2, 3*16*mega, 77, 16*mega+1), backup.ErrDamage},
		{"cut short", header(0xD110, 2, 3*16*mega, 77, 16*mega)[:39], backup.ErrDamage},
	} {
		h, err := wal.ParseHeader(c.b)
		if err == nil {
			err = h.Proves(file(t, name), ours)
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, err, c.want)
		}
	}
}

const history = "1\t0/3000000\tno recovery target specified\n\n# a comment\n2\t0/5800000\tbefore 2026-11-23 04:00:00+00\n"

func TestAHistorySaysWhichTimelineHoldsAPosition(t *testing.T) {
	h, err := wal.ParseHistory(3, []byte(history))
	if err != nil {
		t.Fatal(err)
	}
	for lsn, want := range map[backup.LSN]wal.Timeline{0: 1, 0x2FFFFFF: 1, 0x3000000: 2, 0x57FFFFF: 2, 0x5800000: 3, 0xFFFFFFFF: 3} {
		if got := h.Holder(lsn); got != want {
			t.Errorf("%s: got timeline %d, want %d", lsn, got, want)
		}
	}
	for tl, want := range map[wal.Timeline]backup.LSN{1: 0, 2: 0x3000000, 3: 0x5800000} {
		if got, ok := h.Begin(tl); !ok || got != want {
			t.Errorf("timeline %d begins at %s, %v, want %s", tl, got, ok, want)
		}
	}
	if _, ok := h.Begin(4); ok {
		t.Error("timeline 4 is no ancestor of 3")
	}
	// Segments of 16 MiB: timeline 2 begins with segment 3, timeline 3 inside segment 5.
	for n, want := range map[uint64]wal.Timeline{0: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3} {
		if got := h.Path(n, 16*mega); got != (wal.Segment{Timeline: want, Number: n}) {
			t.Errorf("segment %d: got %+v, want timeline %d", n, got, want)
		}
	}
	back, err := wal.ParseHistory(3, h.Format())
	if err != nil || !slices.Equal(back.Forks, h.Forks) {
		t.Errorf("written and read again: got %+v, %v, want %+v", back.Forks, err, h.Forks)
	}
	for name, bad := range map[string]string{
		"empty": "", "a line that is none": "1 0/3000000 x\nrubbish\n", "a timeline that is not older": "3\t0/3000000\n", "timeline 0": "0\t0/3000000\n",
		"falling": "1\t0/3000000\n2\t0/2000000\n", "twice": "1\t0/3000000\n1\t0/4000000\n", "no position": "1\t\n",
	} {
		h, err := wal.ParseHistory(3, []byte(bad))
		if !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%s: got %+v, %v", name, h, err)
		}
	}
}

func set(segments ...wal.Segment) wal.Set {
	out := wal.Set{}
	for _, g := range segments {
		out[g] = true
	}
	return out
}

func TestRangesGapsAndTheRowThatRecoveryReads(t *testing.T) {
	s := set(wal.Segment{Timeline: 1, Number: 1}, wal.Segment{Timeline: 1, Number: 2}, wal.Segment{Timeline: 1, Number: 3},
		wal.Segment{Timeline: 2, Number: 3}, wal.Segment{Timeline: 2, Number: 4}, wal.Segment{Timeline: 2, Number: 6})
	want := []wal.Range{{Timeline: 1, First: 1, Last: 3}, {Timeline: 2, First: 3, Last: 4}, {Timeline: 2, First: 6, Last: 6}}
	if got := s.Ranges(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	h := wal.History{Timeline: 2, Forks: []wal.Fork{{Timeline: 1, End: 3*16*mega + 5}}}
	if got, ok := s.Follow(h, 1, 16*mega); !ok || got != (wal.Segment{Timeline: 2, Number: 4}) {
		t.Errorf("from 1 along timeline 2: got %+v, %v", got, ok)
	}
	if got, ok := s.Follow(h, 5, 16*mega); ok {
		t.Errorf("segment 5 is missing: got %+v", got)
	}
	for _, c := range []struct {
		what string
		set  wal.Set
		kept uint64
		want uint64
	}{
		{"nothing is there", set(), 7, 7},
		{"all is there up to what the server keeps", s, 3, 5},
		{"the server keeps more than is missing", s, 1, 5},
		{"the server keeps from the middle of a gap", s, 5, 5},
		{"the server keeps only what is later: from the end of what is there", s, 9, 7},
		{"another timeline's do not count", set(wal.Segment{Timeline: 1, Number: 5}), 5, 5},
	} {
		if got := c.set.Resume(h, backup.LSN(c.kept*16*mega+40), 16*mega); got != c.want {
			t.Errorf("%s: got %d, want %d", c.what, got, c.want)
		}
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add("0000000100000A3B000000FF")
	f.Add("000000010000000000000002.00000028.backup")
	f.Fuzz(func(t *testing.T, name string) {
		got, err := wal.ParseFile(name)
		if err == nil && got.String() != name {
			t.Errorf("%q is written as %q", name, got)
		}
		if err == nil && got.Kind == wal.Whole {
			if g, err := got.Segment(16 * mega); err == nil && g.File(16*mega) != got {
				t.Errorf("%q is segment %+v, whose name is %s", name, g, g.File(16*mega))
			}
		}
	})
}

func FuzzParseHistory(f *testing.F) {
	f.Add(uint32(3), []byte(history))
	f.Fuzz(func(t *testing.T, timeline uint32, content []byte) {
		h, err := wal.ParseHistory(wal.Timeline(timeline), content)
		if err != nil {
			return
		}
		for _, fork := range h.Forks {
			if fork.End > 0 && h.Holder(fork.End-1) > fork.Timeline {
				t.Errorf("%s is before the end of timeline %d, but of %d", fork.End-1, fork.Timeline, h.Holder(fork.End-1))
			}
		}
	})
}

func FuzzParseHeader(f *testing.F) {
	f.Add(header(0xD110, 2, 3*16*mega, 77, 16*mega))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := wal.ParseHeader(b)
		if err != nil {
			return
		}
		g := wal.At(h.Timeline, h.Page, h.System.SegmentSize)
		if err := h.Proves(g.File(h.System.SegmentSize), h.System); (err == nil) != (g.Start(h.System.SegmentSize) == h.Page) {
			t.Errorf("%+v as %s: %v", h, g.File(h.System.SegmentSize), err)
		}
	})
}
