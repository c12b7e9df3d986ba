package flow_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/wal"
)

// emptySegment is the content of a segment in which nothing was written.
func emptySegment(g wal.Segment, system wal.System, size wal.Size) []byte {
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint16(b, 0xD110)
	le.PutUint16(b[2:], 2)
	le.PutUint32(b[4:], uint32(g.Timeline))
	le.PutUint64(b[8:], uint64(g.Start(size)))
	le.PutUint64(b[24:], uint64(system.Identifier))
	le.PutUint32(b[32:], uint32(size))
	le.PutUint32(b[36:], 8192)
	return b
}

// TestTheListSaysHowFarEachBackupRecovers lays out two timelines with a gap
// and backups at positions before, in and behind it.
func TestTheListSaysHowFarEachBackupRecovers(t *testing.T) {
	const size = 1 << 20
	ctx := t.Context()
	c := catalog.New(catalog.NewDir(t.TempDir()), "main")
	golden, err := os.ReadFile("../backup/testdata/manifest-v5-raid0.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := backup.DecodeManifest(golden)
	if err != nil {
		t.Fatal(err)
	}
	system := wal.System{Identifier: m.Server.SystemIdentifier, SegmentSize: size}
	if err := c.WAL().Claim(ctx, system); err != nil {
		t.Fatal(err)
	}
	for _, g := range []wal.Segment{{Timeline: 1, Number: 3}, {Timeline: 1, Number: 4}, {Timeline: 1, Number: 5}, {Timeline: 1, Number: 8}, {Timeline: 1, Number: 9}, {Timeline: 2, Number: 5}, {Timeline: 2, Number: 6}} {
		b := emptySegment(g, system, size)
		if err := c.WAL().Put(ctx, g.File(size), bytes.NewReader(b), size); err != nil {
			t.Fatal(err)
		}
	}
	history := []byte("1\t0/580000\tno recovery target specified\n") // in the middle of segment 5
	if err := c.WAL().Put(ctx, wal.HistoryOf(2), bytes.NewReader(history), int64(len(history))); err != nil {
		t.Fatal(err)
	}
	want := map[backup.ID]map[wal.Timeline]backup.LSN{}
	for i, b := range []struct {
		flush backup.LSN
		ways  map[wal.Timeline]backup.LSN
	}{
		{0x210000, nil}, // segment 2 is missing
		{0x310000, map[wal.Timeline]backup.LSN{1: 0x600000, 2: 0x700000}},
		{0x590000, map[wal.Timeline]backup.LSN{1: 0x600000}}, // behind the fork
		{0x710000, nil}, // in the gap
		{0x810000, map[wal.Timeline]backup.LSN{1: 0xA00000}},
	} {
		m.ID, m.SideFiles = backup.NewID(time.Date(2026, 11, 22, i, 0, 0, 0, time.UTC)), nil
		m.Server.Timeline, m.Server.WALSegmentSize, m.Cut.FlushLSN = 1, size, b.flush
		want[m.ID] = b.ways
		digest, err := c.PutManifest(ctx, m)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.PutComplete(ctx, backup.Complete{ID: m.ID, Digest: digest, Completed: m.Created}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := (&flow.Flow{Catalog: c, Cluster: "main"}).ListWAL(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Timelines) != 2 || len(l.Timelines[0].Ranges) != 2 || l.Timelines[0].Ranges[1].Missing != 2 || l.Timelines[1].Parent != 1 || l.Timelines[1].Begin != 0x580000 {
		t.Errorf("timelines: got %+v", l.Timelines)
	}
	if len(l.Backups) != len(want) {
		t.Fatalf("got %d backups, want %d", len(l.Backups), len(want))
	}
	for _, b := range l.Backups {
		if len(b.Ways) != len(want[b.ID]) {
			t.Errorf("from %s: got %+v, want %v", b.From, b.Ways, want[b.ID])
		}
		for _, way := range b.Ways {
			if way.To != want[b.ID][way.Timeline] || way.Stored.IsZero() {
				t.Errorf("from %s: got %+v, want %v", b.From, way, want[b.ID])
			}
		}
	}
}
