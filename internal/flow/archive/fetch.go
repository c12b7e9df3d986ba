package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
	"cleancut/internal/wal"
)

const (
	// Prefetched segments lie beside the file that PostgreSQL waits for: on
	// its filesystem, owned by its user, gone with the copy.
	spoolName = "cleancut.spool"
	maxAhead  = 8
	maxSpool  = backup.Bytes(256 << 20)
	atOnce    = 4 // segments that Prefetch fetches at the same time
)

// FetchOptions says what to fetch. System is that of the server that asks,
// zero if it is not known.
type FetchOptions struct {
	WAL    catalog.WAL
	System wal.System
	File   wal.File
	To     string
	// Unbroken makes a segment that is missing, while the catalog has later ones
	// of its timeline, an error: it is not the end of the WAL. One that lies
	// beside To is left to PostgreSQL.
	Unbroken bool
	// Ahead starts something that calls Prefetch with the same options and
	// does not wait for it. nil: nothing is fetched ahead.
	Ahead func(ctx context.Context) error
}

// Fetch puts a file of WAL at o.To, whole and durable or not at all. What is
// there is replaced. backup.ErrNotFound: the catalog keeps WAL of this cluster,
// and this file is not among it. Every other error says nothing about that:
// recovery must not take it for the end of the WAL.
func Fetch(ctx context.Context, o FetchOptions) error {
	if o.take(ctx) {
		o.refill(ctx)
		return nil
	}
	recorded, err := o.WAL.System(ctx)
	if errors.Is(err, backup.ErrNotFound) {
		// Not %w: a catalog that is not mounted must not look like the end.
		return backup.Hint(fmt.Errorf("fetch %s: the catalog has no WAL of this cluster: %v", o.File, err),
			"is the catalog mounted, and is it the right one (--catalog, --cluster)?")
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %w", o.File, err)
	}
	if o.System != (wal.System{}) && o.System != recorded {
		return backup.Hint(fmt.Errorf("fetch %s: the catalog keeps WAL of system %d with segments of %s, the server is of %d with %s: %w", o.File,
			recorded.Identifier, recorded.SegmentSize, o.System.Identifier, o.System.SegmentSize, backup.ErrNotOurs), "see --cluster and --catalog in restore_command")
	}
	o.System = recorded
	if o.File.Kind == wal.Journal { // a file that cannot be read would make PostgreSQL stop later
		if _, err := o.WAL.History(ctx, o.File.Timeline); err != nil {
			return fmt.Errorf("fetch %s: %w", o.File, err)
		}
	}
	err = fetchTo(ctx, o.WAL, o.File, o.System, o.To)
	if err == nil {
		o.refill(ctx)
	} else if errors.Is(err, backup.ErrNotFound) && o.spools() { // the end, or another timeline: nothing of the spool will be asked for
		_ = os.RemoveAll(o.spool())
	}
	if errors.Is(err, backup.ErrNotFound) && o.Unbroken && o.File.Kind == wal.Whole {
		return o.gap(ctx, err)
	}
	return err
}

// gap is the error of a missing segment: missing, where that is the end.
func (o FetchOptions) gap(ctx context.Context, missing error) error {
	if _, err := os.Stat(filepath.Join(filepath.Dir(o.To), o.File.String())); err == nil {
		return missing
	}
	later, err := o.WAL.Behind(ctx, o.File)
	if errors.Is(err, backup.ErrNotFound) {
		return missing
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %w", o.File, err)
	}
	return backup.Hint(fmt.Errorf("fetch %s: %w: the catalog does not have it, but %s: this is a gap and not the end of the WAL", o.File, backup.ErrDamage, later),
		"see `cleancut wal list`; begin with a backup behind the gap, or give PostgreSQL a recovery target before it; with --standby a gap counts as the end")
}

// spools reports whether the spool is used.
func (o FetchOptions) spools() bool { return o.Ahead != nil && o.File.Kind == wal.Whole }

// refill has the spool filled if it holds less than half of what it may.
// Without it recovery is slower, not wrong.
func (o FetchOptions) refill(ctx context.Context) {
	if !o.spools() {
		return
	}
	if _, err := os.Stat(filepath.Join(o.spool(), o.following(max(o.ahead()/2, 1)).String())); err == nil {
		return
	}
	if err := os.Mkdir(o.spool(), 0o700); err == nil || errors.Is(err, os.ErrExist) {
		_ = o.Ahead(ctx)
	}
}

func (o FetchOptions) spool() string { return filepath.Join(filepath.Dir(o.To), spoolName) }

// ahead is how many segments the spool holds at most.
func (o FetchOptions) ahead() int {
	return min(max(int(maxSpool/o.System.SegmentSize), 1), maxAhead)
}

// following returns the segment that comes n after the wanted one.
func (o FetchOptions) following(n int) wal.File {
	g, err := o.File.Segment(o.System.SegmentSize)
	if err != nil { // it was fetched: its header has proved it
		return o.File
	}
	g.Number += uint64(n)
	return g.File(o.System.SegmentSize)
}

// take moves a prefetched segment into place. It was proved when it was
// stored; its header is looked at again, so that a spool that came along with
// a copied data directory does no harm.
func (o FetchOptions) take(ctx context.Context) bool {
	if !o.spools() || o.System == (wal.System{}) {
		return false
	}
	path := filepath.Join(o.spool(), o.File.String())
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }() // it is only read
	info, err := f.Stat()
	if err == nil {
		_, err = examine(o.File, f, info.Size(), o.System)
	}
	if err != nil {
		_ = os.Remove(path)
		return false
	}
	return fault.Point(ctx, "archive.take") == nil && os.Rename(path, o.To) == nil
}

// fetchTo fetches into a temporary file beside to, and gives it its name. The
// temporary name is always the same: what a killed fetch left is used again.
func fetchTo(ctx context.Context, from catalog.WAL, name wal.File, system wal.System, to string) (err error) {
	f, err := os.OpenFile(to+".cleancut", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", name, err)
	}
	err = from.Get(ctx, name, system, f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = fault.Point(ctx, "archive.rename")
	}
	if err == nil {
		err = os.Rename(f.Name(), to)
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %w", name, errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

// Prefetch fills the spool with the segments that follow o.File, proved and
// durable each before it gets its name, and removes what else lies there. It
// ends at the first that the catalog does not have; an empty spool goes. While another one is at
// work, or when there is no spool (any more), it does nothing.
func Prefetch(ctx context.Context, o FetchOptions) error {
	recorded, err := o.WAL.System(ctx)
	if err != nil {
		return err
	}
	o.System = recorded
	lock, err := os.Open(o.spool())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("prefetch WAL: %w", err)
	}
	defer func() { _ = lock.Close() }() // which releases it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil
	}
	defer func() { _ = os.Remove(o.spool()) }() // if nothing is in it
	wanted := map[string]wal.File{}
	var order []string
	for n := 1; n <= o.ahead(); n++ {
		f := o.following(n)
		wanted[f.String()] = f
		order = append(order, f.String())
	}
	have, err := os.ReadDir(o.spool())
	if err != nil {
		return fmt.Errorf("prefetch WAL: %w", err)
	}
	for _, e := range have {
		if _, ok := wanted[e.Name()]; !ok {
			_ = os.Remove(filepath.Join(o.spool(), e.Name())) // another fetch may be taking it
		}
		delete(wanted, e.Name())
	}
	return o.fill(ctx, order, wanted)
}

// fill fetches the wanted ones in their order, some at a time.
func (o FetchOptions) fill(ctx context.Context, order []string, wanted map[string]wal.File) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var all sync.WaitGroup
	var mu sync.Mutex
	var first error
	slots := make(chan struct{}, atOnce)
	for _, name := range order {
		f, ok := wanted[name]
		if !ok {
			continue
		}
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		all.Go(func() {
			defer func() { <-slots }()
			if err := fetchTo(ctx, o.WAL, f, o.System, filepath.Join(o.spool(), name)); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if first == nil {
					first = err
				}
				stop()
			}
		})
	}
	all.Wait()
	if errors.Is(first, backup.ErrNotFound) {
		return nil
	}
	return first
}
