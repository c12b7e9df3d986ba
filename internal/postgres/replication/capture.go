package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/wal"
)

// Capture receives the WAL of a while into a folder. Its methods may be called
// at the same time.
type Capture struct {
	server Server
	dir    string
	stop   context.CancelFunc
	ended  chan struct{}

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	position Position
	segments []wal.Segment // the whole ones
	padded   wal.Segment   // the one that Until filled up
	err      error         // why it ended
}

// Captured is a segment that lies whole and durable in the folder.
type Captured struct {
	File wal.File
	Path string
}

// StartCapture begins to receive WAL into dir, which must be there, and
// returns once the server sends. A temporary slot keeps what is not received
// yet. On a primary it begins with the segment of the current flush position:
// a backup that starts later needs nothing older, as its start makes a
// checkpoint. On a standby it begins where the last restartpoint's redo
// position lies, because a backup on a standby may begin there. ctx bounds the
// start and the capture itself. The caller calls Stop.
func StartCapture(ctx context.Context, t postgres.Target, dir string) (*Capture, error) {
	running, stop := context.WithCancel(ctx)
	c := &Capture{dir: dir, stop: stop, ended: make(chan struct{}), changed: make(chan struct{})}
	r, err := Connect(ctx, Options{Target: t, Dir: dir, Done: c.done, Progress: c.progress})
	if err != nil {
		stop()
		return nil, fmt.Errorf("capture WAL: %w", err)
	}
	c.server = r.Server()
	begin := c.server.Flushed
	if c.server.Standby {
		begin = min(begin, c.server.Kept)
	}
	go func() {
		defer close(c.ended)
		defer r.Close()
		err := r.Receive(running, c.server.History.Path(wal.At(0, begin, c.server.System.SegmentSize).Number, c.server.System.SegmentSize))
		c.change(func() { c.err = err })
	}()
	if err := c.await(ctx, func() bool { return c.position.Timeline != 0 }); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Capture) change(do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	do()
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *Capture) done(_ context.Context, f wal.File) error {
	g, err := f.Segment(c.server.System.SegmentSize)
	if err == nil { // no history file
		c.change(func() { c.segments = append(c.segments, g) })
	}
	return nil
}

func (c *Capture) progress(p Position) {
	c.change(func() { c.position = p })
}

// await waits for what ok says, which is asked with c.mu held.
func (c *Capture) await(ctx context.Context, ok func() bool) error {
	for {
		c.mu.Lock()
		good, err, changed := ok(), c.err, c.changed
		c.mu.Unlock()
		if good {
			return nil
		}
		if err != nil {
			return fmt.Errorf("capture WAL: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("capture WAL: %w", ctx.Err())
		case <-changed:
		}
	}
}

// Until waits until everything before lsn is durable in the folder, each
// segment under its own name: the last one, if it is not whole yet, is filled
// up with zeros to its full size, as the server keeps it. The server must have
// flushed up to lsn or do so by itself. It may be called several times, with
// rising positions.
func (c *Capture) Until(ctx context.Context, lsn backup.LSN) error {
	if err := c.await(ctx, func() bool { return c.position.Durable >= lsn }); err != nil {
		return err
	}
	if err := fault.Point(ctx, "replication.until"); err != nil {
		return err
	}
	size := c.server.System.SegmentSize
	c.mu.Lock()
	defer c.mu.Unlock()
	g := wal.At(c.position.Timeline, lsn-1, size)
	if slices.Contains(c.segments, g) {
		return nil
	}
	path := filepath.Join(c.dir, g.File(size).String())
	if err := pad(path, int64(size), int64(lsn-g.Start(size))); err != nil {
		return fmt.Errorf("capture WAL: %w", err)
	}
	c.padded = g
	return nil
}

// pad copies the first n bytes of path.partial to path and fills up to size.
func pad(path string, size, n int64) error {
	partial := path + ".partial"
	from, err := os.Open(partial)
	if errors.Is(err, os.ErrNotExist) { // it has just become whole
		_, err = os.Stat(path)
		return err
	}
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }() // it was read
	if err := writeWhole(path, size, io.NewSectionReader(from, 0, n)); err != nil {
		return err
	}
	// If it became whole meanwhile, the whole one may have got its name before
	// ours did, and is gone: but from is that very file.
	if _, err = os.Lstat(partial); errors.Is(err, os.ErrNotExist) {
		return writeWhole(path, size, io.NewSectionReader(from, 0, size))
	}
	return err
}

// Segments returns the segments in the folder, in the order of their
// completion, the one that Until filled up among them.
func (c *Capture) Segments() []Captured {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.Clone(c.segments)
	if c.padded.Timeline != 0 && !slices.Contains(all, c.padded) {
		all = append(all, c.padded)
	}
	var out []Captured
	for _, g := range all {
		f := g.File(c.server.System.SegmentSize)
		out = append(out, Captured{File: f, Path: filepath.Join(c.dir, f.String())})
	}
	return out
}

// Stop ends the connection, and with it the temporary slot. The files stay;
// the partial of the last segment is removed. Called again: nil.
func (c *Capture) Stop() error {
	c.stop()
	<-c.ended
	left, err := filepath.Glob(filepath.Join(c.dir, "*.partial"))
	for _, path := range left {
		if e := os.Remove(path); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
