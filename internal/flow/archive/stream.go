package archive

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

const (
	firstPause = 100 * time.Millisecond // after a failure; doubled each time
	lastPause  = 5 * time.Second
	maxPending = backup.Bytes(256 << 20) // what may wait in the folder for the catalog
	// claimedFile tells that the catalog has had our record.
	claimedFile = "claimed"
)

// errBehind ends a session: too much waits for the catalog. The server keeps
// the rest.
var errBehind = errors.New("the catalog does not keep up")

// StreamOptions says what to receive, and where to put it.
type StreamOptions struct {
	Target   postgres.Target
	WAL      catalog.WAL
	Dir      string // for the partial segment and what waits for the catalog; kept over restarts
	Slot     string // "": a temporary one, with which a lost connection may cost WAL
	SkipLost bool   // go on after WAL that the server has no longer, and leave a gap
	Log      *slog.Logger
}

// stream is one Stream. Its session receives, its uploader stores; both share
// what mu guards.
type stream struct {
	o    StreamOptions
	size wal.Size
	wake chan struct{} // something is pending

	mu      sync.Mutex
	pending []wal.File // whole and durable in the folder, oldest first
	have    wal.Set    // received and stored; nil until the catalog was listed
	next    backup.LSN // beginning of the segment that is received now
	skip    bool       // begin where the server can
	fatal   error      // of the uploader
	status  Status
	written time.Time

	receiving, storing trouble
}

// Stream receives WAL for ever. Whatever may pass by itself (the server is
// away, the disk or the catalog full) it waits for, trying again and again; the
// server keeps what is not in the catalog by the slot. It returns at the end of
// ctx, and with an error that somebody must decide about:
// replication.ErrLost, backup.ErrNotOurs, backup.ErrExists, backup.ErrDamage,
// backup.ErrUnsupported (another branch of timelines), backup.ErrUsage.
// It must be the only one with that folder.
func Stream(ctx context.Context, o StreamOptions) error {
	s := &stream{o: o, wake: make(chan struct{}, 1), status: Status{PID: os.Getpid(), State: "connecting", Slot: o.Slot}}
	if err := s.findPending(); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	uploading := make(chan struct{})
	go func() {
		defer close(uploading)
		defer stop()
		s.upload(ctx)
	}()
	err := s.receive(ctx)
	stop()
	<-uploading
	if s.fatal != nil {
		err = s.fatal
	}
	s.tell(func() {
		s.status.State, s.status.Error = "stopped", ""
		if !errors.Is(err, context.Canceled) { // who was told to stop has no error
			s.status.Error = err.Error()
		}
	}, true)
	return err
}

// receive holds one session after the other.
func (s *stream) receive(ctx context.Context) error {
	pause := firstPause
	for {
		began := time.Now()
		err := s.session(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if final(err) && !s.skips(ctx, err) {
			return err
		}
		s.fails(&s.receiving, err)
		if time.Since(began) > lastPause {
			pause = firstPause
		}
		if !wait(ctx, pause) {
			return ctx.Err()
		}
		for s.behind(2) {
			if !wait(ctx, firstPause) {
				return ctx.Err()
			}
		}
		pause = min(2*pause, lastPause)
	}
}

// final reports errors that no waiting mends.
func final(err error) bool {
	for _, e := range []error{replication.ErrLost, backup.ErrNotOurs, backup.ErrExists, backup.ErrDamage, backup.ErrUnsupported, backup.ErrUsage} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// skips goes over a loss if it is allowed to, once.
func (s *stream) skips(ctx context.Context, err error) bool {
	lost := errors.Is(err, replication.ErrLost)
	if !s.o.SkipLost || s.skip || !lost && !errors.Is(err, backup.ErrUnsupported) {
		return false
	}
	var invalid *invalidSlot
	if errors.As(err, &invalid) {
		if err := replication.DropSlot(ctx, s.o.Target, s.o.Slot); err != nil {
			return false
		}
	}
	s.o.Log.Warn("going on after WAL that is lost; no backup before the gap can be recovered beyond it", "reason", err)
	s.skip = true
	return true
}

// invalidSlot marks ErrLost where the slot itself is no use any more.
type invalidSlot struct{ error }

func (e *invalidSlot) Unwrap() error { return e.error }

// session is one connection.
func (s *stream) session(ctx context.Context) error {
	r, err := replication.Connect(ctx, replication.Options{Target: s.o.Target, Dir: s.o.Dir, Slot: s.o.Slot, Done: s.done, Safe: s.safe, Progress: s.progress})
	if errors.Is(err, replication.ErrLost) {
		return &invalidSlot{err}
	}
	if err != nil {
		return err
	}
	defer r.Close()
	server := r.Server()
	if err := s.claim(ctx, server.System); err != nil {
		return err
	}
	from, err := s.resume(ctx, server)
	if err != nil {
		return err
	}
	s.o.Log.Info("receiving WAL", "segment", from.File(server.System.SegmentSize), "slot", s.o.Slot)
	return r.Receive(ctx, from)
}

// claim is Claim of a stream that has been here before: then the catalog's
// record must be there. A catalog that is not mounted would else be begun anew
// below its mount point, and the server be told to forget.
func (s *stream) claim(ctx context.Context, system wal.System) error {
	marker := filepath.Join(s.o.Dir, claimedFile)
	have, err := s.o.WAL.System(ctx)
	if errors.Is(err, backup.ErrNotFound) {
		if _, known := os.Stat(marker); known == nil {
			return backup.Hint(fmt.Errorf("the catalog has lost its record of whose WAL it keeps: %w", err),
				"is it mounted? If it is meant to be a new one, remove "+marker)
		}
		err = s.o.WAL.Claim(ctx, system)
		have = system
	}
	if err != nil {
		return err
	}
	if have != system {
		return s.o.WAL.Claim(ctx, system) // which refuses
	}
	return os.WriteFile(marker, nil, 0o600)
}

// resume finds the segment to begin with.
func (s *stream) resume(ctx context.Context, server replication.Server) (wal.Segment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = server.System.SegmentSize
	if s.have == nil {
		stored, err := s.o.WAL.List(ctx)
		if err != nil {
			return wal.Segment{}, err
		}
		files := slices.Clone(s.pending)
		for _, f := range stored {
			files = append(files, f.File)
		}
		s.have = wal.NewSet(files, s.size)
	}
	if err := s.related(server.History); err != nil && !s.skip {
		return wal.Segment{}, err
	}
	n := wal.At(0, server.Kept, s.size).Number
	if !s.skip {
		n = s.have.Resume(server.History, server.Kept, s.size)
	}
	s.next = wal.Segment{Number: n}.Start(s.size)
	return server.History.Path(n, s.size), nil
}

// related refuses a server that is on an older timeline than what is there:
// the old primary after a failover, mostly.
func (s *stream) related(h wal.History) error {
	for g := range s.have {
		if g.Timeline > h.Timeline {
			return backup.Hint(fmt.Errorf("the catalog has WAL of timeline %d, the server is on timeline %d: %w", g.Timeline, h.Timeline, backup.ErrUnsupported),
				"is this the old primary after a failover? Connect to the right server, or run `cleancut wal stream --skip-lost` to follow this one from now on")
		}
	}
	return nil
}

// findPending takes up what an earlier process left in the folder.
func (s *stream) findPending() error {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return fmt.Errorf("stream WAL: %w", err)
	}
	for _, e := range entries {
		f, err := wal.ParseFile(e.Name())
		if err == nil && f.Kind == wal.Whole || f.Kind == wal.Journal {
			s.pending = append(s.pending, f)
		}
	}
	// History files first, then in the order of their names.
	slices.SortStableFunc(s.pending, func(a, b wal.File) int {
		return map[wal.Kind]int{wal.Whole: 1}[a.Kind] - map[wal.Kind]int{wal.Whole: 1}[b.Kind]
	})
	return nil
}

// done is called when a file is whole and durable in the folder.
func (s *stream) done(_ context.Context, f wal.File) error {
	s.mu.Lock()
	s.pending = append(slices.DeleteFunc(s.pending, func(p wal.File) bool { return p == f }), f)
	if g, err := f.Segment(s.size); err == nil {
		s.have[g] = true
		s.next = g.End(s.size)
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
	if s.behind(1) {
		return errBehind
	}
	return nil
}

// behind reports whether more than the part-th part of what may be pending is.
func (s *stream) behind(part int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size > 0 && len(s.pending)*part > max(int(maxPending/s.size), 2)
}

// safe is the end of what is in the catalog: there the server may forget.
func (s *stream) safe() backup.LSN {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored()
}

func (s *stream) stored() backup.LSN {
	out := s.next
	for _, f := range s.pending {
		if g, err := f.Segment(s.size); err == nil && s.size > 0 {
			out = min(out, g.Start(s.size))
		}
	}
	return out
}

// upload stores what is pending, for ever.
func (s *stream) upload(ctx context.Context) {
	pause := firstPause
	for {
		s.mu.Lock()
		var f wal.File
		if len(s.pending) > 0 {
			f = s.pending[0]
		}
		s.mu.Unlock()
		if f == (wal.File{}) {
			select {
			case <-ctx.Done():
				return
			case <-s.wake:
			}
			continue
		}
		err := s.store(ctx, f)
		if err == nil {
			pause = firstPause
			continue
		}
		if ctx.Err() != nil {
			return
		}
		if final(err) {
			s.fatal = err
			return
		}
		s.fails(&s.storing, err)
		if !wait(ctx, pause) {
			return
		}
		pause = min(2*pause, lastPause)
	}
}

// store puts one file into the catalog and only then removes it here.
func (s *stream) store(ctx context.Context, f wal.File) error {
	path := filepath.Join(s.o.Dir, f.String())
	if err := push(ctx, s.o.WAL, path, wal.System{}, s.claim); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("stream WAL: %w", err)
	}
	s.mu.Lock()
	s.pending = slices.DeleteFunc(s.pending, func(p wal.File) bool { return p == f })
	s.mu.Unlock()
	s.stores()
	return nil
}

// wait waits and reports whether ctx still runs.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
