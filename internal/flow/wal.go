package flow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/archive"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

// systemHere returns the system of the cluster whose data directory is the
// working directory, as it is for archive_command and restore_command; zero
// where path is absolute or the working directory is none.
func systemHere(path string) (wal.System, error) {
	if filepath.IsAbs(path) {
		return wal.System{}, nil
	}
	c, err := postgres.ReadControl(filepath.Join("global", "pg_control"))
	if errors.Is(err, os.ErrNotExist) {
		return wal.System{}, nil
	}
	return wal.System{Identifier: backup.SystemIdentifier(c.SystemIdentifier), SegmentSize: wal.Size(c.WALSegmentSize)}, err
}

// PushWAL stores a file for archive_command: its %p. Errors are those of
// archive.Push.
func (f *Flow) PushWAL(ctx context.Context, path string) error {
	system, err := systemHere(path)
	if err != nil {
		return err
	}
	return archive.Push(ctx, f.Catalog.WAL(), path, system)
}

// FetchWAL puts the file with that name at to, for restore_command: its %f and
// %p. A missing segment before others is an error, but not for a standby, which
// may get it from elsewhere. ahead, which may be nil, starts PrefetchWAL with the same two in another
// process. Errors are those of archive.Fetch: only backup.ErrNotFound means
// that the catalog does not have it.
func (f *Flow) FetchWAL(ctx context.Context, name, to string, standby bool, ahead func(ctx context.Context) error) error {
	o, err := f.fetchOptions(name, to)
	if err != nil {
		return err
	}
	o.Ahead, o.Unbroken = ahead, !standby
	return archive.Fetch(ctx, o)
}

// AskWAL is FetchWAL for the server of a copy: it asks whoever restores the
// copy, on that socket.
func AskWAL(ctx context.Context, socket, name, to string) error {
	file, err := wal.ParseFile(name)
	if err != nil {
		return err
	}
	return archive.Ask(ctx, socket, file, to)
}

// PrefetchWAL fetches what will be asked for after that file.
func (f *Flow) PrefetchWAL(ctx context.Context, name, to string) error {
	o, err := f.fetchOptions(name, to)
	if err != nil {
		return err
	}
	return archive.Prefetch(ctx, o)
}

func (f *Flow) fetchOptions(name, to string) (archive.FetchOptions, error) {
	file, err := wal.ParseFile(name)
	if err != nil {
		return archive.FetchOptions{}, err
	}
	system, err := systemHere(to)
	return archive.FetchOptions{WAL: f.Catalog.WAL(), System: system, File: file, To: to}, err
}

// StreamWALOptions says what to receive.
type StreamWALOptions struct {
	Target   postgres.Target
	Slot     string // "": a temporary one
	SkipLost bool
}

// StreamWAL receives WAL into the catalog until ctx ends or something must be
// decided; see archive.Stream. backup.ErrInUse: another one does so on this
// host.
func (f *Flow) StreamWAL(ctx context.Context, o StreamWALOptions) error {
	if o.Slot != "" {
		if err := replication.CheckSlot(o.Slot); err != nil {
			return err
		}
	}
	release, err := f.State.Lock("wal-" + f.Cluster)
	if err != nil {
		return backup.Hint(fmt.Errorf("another `wal stream` of cluster %s is running on this host: %w", f.Cluster, err), "one is enough; see its status with `cleancut wal list`")
	}
	defer release()
	if err := os.MkdirAll(f.walFolder(), 0o700); err != nil {
		return fmt.Errorf("stream WAL: %w", err)
	}
	return archive.Stream(ctx, archive.StreamOptions{Target: o.Target, WAL: f.Catalog.WAL(), Dir: f.walFolder(), Slot: o.Slot, SkipLost: o.SkipLost, Log: f.Log})
}

// walFolder is where the stream of this cluster keeps what is on its way.
func (f *Flow) walFolder() string { return filepath.Join(f.State.Path(), "wal", f.Cluster) }

// WALList is what the catalog has of the WAL of a cluster.
type WALList struct {
	System    *wal.System     `json:"system"` // null: none was ever kept
	Timelines []WALTimeline   `json:"timelines"`
	Backups   []WALReach      `json:"backups"`
	Stream    *archive.Status `json:"stream"` // of this host; null: none ever ran
	Damaged   []string        `json:"damaged,omitempty"`
	// Since is the moment from which on every moment can be recovered, up to the
	// end of the WAL; null: no WAL leads on from the newest backup.
	Since     *time.Time    `json:"recoverable_since"`
	Size      backup.Bytes  `json:"stored_bytes"`
	histories []wal.History // of the timelines that are known
	set       wal.Set       //
	stored    map[wal.Segment]time.Time
}

// WALTimeline is what there is of one timeline.
type WALTimeline struct {
	Timeline wal.Timeline `json:"timeline"`
	Parent   wal.Timeline `json:"parent,omitempty"`
	Begin    backup.LSN   `json:"begin"` // where it left its parent
	Ranges   []WALRange   `json:"ranges"`
}

// WALRange is an unbroken row of segments. What is missing between two ranges
// of a timeline is a gap.
type WALRange struct {
	First    wal.File   `json:"first"`
	Last     wal.File   `json:"last"`
	Start    backup.LSN `json:"start_lsn"`
	End      backup.LSN `json:"end_lsn"`
	Segments uint64     `json:"segments"`
	Missing  uint64     `json:"missing_before"` // segments of the gap before it
	// When the first and the last were stored, by the catalog's clock. What is
	// in a segment was committed before that.
	FirstStored time.Time `json:"first_stored"`
	LastStored  time.Time `json:"last_stored"`
}

// WALReach says how far a backup can be recovered by the WAL in the catalog:
// from its cut on, to any position up to the ends of Ways.
type WALReach struct {
	ID       backup.ID    `json:"id"`
	Timeline wal.Timeline `json:"timeline"`
	From     backup.LSN   `json:"from_lsn"` // recovery cannot stop before it
	Ways     []WALWay     `json:"ways"`     // none: only to the moment of its cut
}

// WALWay is one timeline to recover along.
type WALWay struct {
	Timeline wal.Timeline `json:"timeline"`
	To       backup.LSN   `json:"to_lsn"`
	Stored   time.Time    `json:"stored"` // of the last segment: commits in it are older
}

// ListWAL shows the timelines, ranges and gaps of the WAL in the catalog, and
// which backups can reach which positions. It reads names, not contents: that
// a segment is sound, fetching it proves.
func (f *Flow) ListWAL(ctx context.Context) (out WALList, err error) {
	out.Timelines, out.Backups = []WALTimeline{}, []WALReach{}
	if f.State != nil {
		if s, err := archive.ReadStatus(f.walFolder()); err == nil {
			out.Stream = &s
		}
	}
	files, err := f.Catalog.WAL().List(ctx)
	if err != nil {
		return out, err
	}
	system, err := f.Catalog.WAL().System(ctx)
	if errors.Is(err, backup.ErrNotFound) && len(files) == 0 {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	out.System = &system
	known := f.readWAL(ctx, &out, files)
	entries, err := f.Catalog.Backups(ctx)
	if err != nil {
		return out, err
	}
	facts := wal.Facts{System: system, Files: files, Histories: known}
	for _, e := range entries {
		if e.Err == nil && e.Manifest.Cut.Achieved != backup.Torn && e.Manifest.Golden == nil && e.Manifest.Server.SystemIdentifier == system.Identifier {
			out.Backups = append(out.Backups, out.reach(e.Manifest))
			facts.Backups = append(facts.Backups, backupFact(e, "", time.Now()))
		}
	}
	out.Since = wal.Since(facts, time.Now())
	return out, nil
}

// histories reads where the timelines of these files come from, and says of
// which it cannot.
func (f *Flow) histories(ctx context.Context, files []wal.Stored) (known map[wal.Timeline]wal.History, unread map[wal.Timeline]error) {
	known, unread = map[wal.Timeline]wal.History{}, map[wal.Timeline]error{}
	for _, file := range files {
		t := file.File.Timeline
		if _, seen := known[t]; seen || unread[t] != nil {
			continue
		}
		if h, err := f.Catalog.WAL().History(ctx, t); err != nil {
			unread[t] = err
		} else {
			known[t] = h
		}
	}
	return known, unread
}

// readWAL fills in what the names say, and the histories, which it returns.
func (f *Flow) readWAL(ctx context.Context, out *WALList, files []wal.Stored) map[wal.Timeline]wal.History {
	size := out.System.SegmentSize
	out.set, out.stored = wal.Set{}, map[wal.Segment]time.Time{}
	timelines := map[wal.Timeline]bool{}
	for _, file := range files {
		out.Size += file.Size
		timelines[file.File.Timeline] = true
		if g, err := file.File.Segment(size); err == nil && file.File.Kind == wal.Whole {
			out.set[g], out.stored[g] = true, file.Stored
		}
	}
	ranges := out.set.Ranges()
	known, unread := f.histories(ctx, files)
	for _, t := range slices.Sorted(maps.Keys(timelines)) {
		line := WALTimeline{Timeline: t, Ranges: []WALRange{}}
		h, ok := known[t]
		if !ok { // its own segments count all the same
			h = wal.History{Timeline: t}
			if err := unread[t]; !errors.Is(err, backup.ErrNotFound) {
				out.Damaged = append(out.Damaged, err.Error())
			}
		}
		if n := len(h.Forks); n > 0 {
			line.Parent, line.Begin = h.Forks[n-1].Timeline, h.Forks[n-1].End
		}
		out.histories = append(out.histories, h)
		for _, r := range ranges {
			if r.Timeline == t {
				line.Ranges = append(line.Ranges, out.describe(r, line.Ranges))
			}
		}
		out.Timelines = append(out.Timelines, line)
	}
	return known
}

// describe turns a range into what is shown; before are those of its timeline
// that come earlier.
func (l *WALList) describe(r wal.Range, before []WALRange) WALRange {
	size := l.System.SegmentSize
	first, last := wal.Segment{Timeline: r.Timeline, Number: r.First}, wal.Segment{Timeline: r.Timeline, Number: r.Last}
	out := WALRange{First: first.File(size), Last: last.File(size), Start: first.Start(size), End: last.End(size), Segments: r.Last - r.First + 1,
		FirstStored: l.stored[first], LastStored: l.stored[last]}
	if n := len(before); n > 0 {
		out.Missing = uint64(out.Start-before[n-1].End) / uint64(size)
	}
	return out
}

// listed reports of a file whether it is a segment from that position on that
// was there.
func (l *WALList) listed(from backup.LSN) func(wal.File) bool {
	return func(f wal.File) bool {
		g, err := f.Segment(l.System.SegmentSize)
		return f.Kind == wal.Whole && err == nil && g.End(l.System.SegmentSize) > from && l.set[g]
	}
}

// reach follows the WAL from a backup's cut along every timeline that descends
// from its own. Recovery begins inside the image and asks the catalog first
// for the segment that the image's WAL ends in, which is not before the one of
// FlushLSN.
func (l *WALList) reach(m backup.Manifest) WALReach {
	out := WALReach{ID: m.ID, Timeline: wal.Timeline(m.Server.Timeline), From: m.Cut.FlushLSN, Ways: []WALWay{}}
	size := l.System.SegmentSize
	for _, way := range l.set.Ways(l.histories, out.Timeline, out.From, size) {
		last := wal.Segment{Timeline: way.Timeline, Number: wal.At(0, way.To-1, size).Number}
		out.Ways = append(out.Ways, WALWay{Timeline: way.Timeline, To: way.To, Stored: l.stored[last]})
	}
	return out
}
