// Package dump writes the portable SQL of a recovered copy, and proves it by
// loading it into an empty server.
//
//	pg_dumpall | pg_dump → rows counted and hashed → zstd → age → a part
//	parts → an empty server → rows counted and hashed → compared
//
// What always holds: a dump is read from the copy, never from production; a
// part is only ever complete: if the program fails or stops short, what Put
// reads ends with an error. Rows are counted in the very bytes that are
// written, so nothing is read twice for it.
package dump

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
)

// Options is what to dump and how.
type Options struct {
	Instance *postgres.Instance
	// Original gives the path that a tablespace of the copy has on production.
	Original   func(inCopy string) string
	Format     backup.DumpFormat
	Archive    backup.DumpArchive // of DumpPerDatabase
	Databases  []string           // names or globs; empty: all. Only DumpPerDatabase
	Schemas    []string           // names or globs; empty: all. Only DumpPerDatabase
	Jobs       int                // databases at once, with ArchiveDirectory tables at once; less than 1 is 1
	Level      int                // zstd level 1 to 22
	Recipients []age.Recipient
	NoCounts   bool   // rows are neither counted nor hashed
	Spool      string // folder that the copy's uid may write to, for ArchiveDirectory
	// Put stores a part. It reads r to its end; where r fails, it must store
	// nothing and return an error.
	Put      func(ctx context.Context, part string, r io.Reader) error
	Progress func(Progress) // called as bytes pass, by one goroutine at a time; may be nil
}

// Progress is how far a dump is.
type Progress struct {
	Plain, Stored  backup.Bytes
	Tables, Of     int // tables seen, and there are
	Databases, All int // databases done, and there are
}

// errStore marks a failure of what is behind the program: never one database's.
var errStore = errors.New("write the dump")

// The last line that pg_dumpall writes (pg_dumpall.c, main), so that a dump
// cut short is not taken for a whole one.
const lastLine = "-- PostgreSQL database cluster dump complete"

type runner struct {
	Options
	m   *backup.DumpManifest
	all []*database

	mu   sync.Mutex // guards what follows
	at   Progress
	next sync.Mutex // one Progress call at a time
}

// Run dumps the copy and fills in what it found: server, databases, parts,
// what is not held. A database that pg_dump cannot read is in the manifest with
// its error, and the others go on; that is no error of Run. In DumpSQL any
// failure is one of the whole.
func Run(ctx context.Context, o Options) (m backup.DumpManifest, err error) {
	start := time.Now()
	o.Jobs = max(1, o.Jobs)
	r := &runner{Options: o, m: &m}
	m = backup.DumpManifest{Version: backup.DumpVersion, Format: o.Format, Archive: o.Archive, Level: o.Level, ChosenDatabases: o.Databases, ChosenSchemas: o.Schemas}
	if err := r.look(ctx); err != nil {
		return m, err
	}
	if o.Format == backup.DumpSQL {
		err = r.whole(ctx)
	} else {
		err = r.perDatabase(ctx)
	}
	if err != nil {
		return m, err
	}
	for _, d := range r.all {
		m.Databases = append(m.Databases, d.record())
		m.NotHeld = append(m.NotHeld, d.notHeld...)
	}
	m.Seconds = time.Since(start).Seconds()
	return m, nil
}

// look asks the copy for all that the manifest says of it, and refuses what it
// does not have.
func (r *runner) look(ctx context.Context) error {
	for _, tool := range []string{"pg_dumpall", "pg_dump"} {
		if _, err := r.Instance.Installation.Tool(ctx, tool); err != nil {
			return err
		}
	}
	said, err := r.Instance.Command(ctx, "pg_dump", "--version").Output()
	if err != nil {
		return fmt.Errorf("pg_dump --version: %w", err)
	}
	r.m.PgDump = strings.TrimSpace(string(said))
	conn, err := look(ctx, r.Instance, "template1")
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if r.m.Server, err = server(ctx, conn); err != nil {
		return err
	}
	if r.all, r.m.NotHeld, err = choose(ctx, conn, r.m.Server.Major(), r.Databases); err != nil {
		return err
	}
	schemas := 0
	for _, d := range r.all {
		if err := d.inspect(ctx, r.Instance, r.Schemas); err != nil {
			if ctx.Err() != nil || r.Format == backup.DumpSQL {
				return err
			}
			d.Error = err.Error()
		}
		schemas += len(d.schemas)
		r.at.Of += len(d.tables)
	}
	if len(r.Schemas) > 0 {
		r.all = slices.DeleteFunc(r.all, func(d *database) bool { return d.Error == "" && len(d.schemas) == 0 })
		if schemas == 0 {
			return backup.Hint(fmt.Errorf("%w: no schema %s in the databases chosen", backup.ErrUsage, strings.Join(r.Schemas, ", ")), "schemas are given by name or glob: --schema 'app_*'")
		}
	}
	r.at.All = len(r.all)
	return nil
}

// threads is how many goroutines compress a part. On two processors pg_dump and
// its server use both: handing blocks from one goroutine to another only costs.
func (r *runner) threads() int {
	if r.Archive == backup.ArchiveCustom && r.Jobs > 1 || runtime.GOMAXPROCS(0) <= 2 {
		return 1
	}
	return 2
}

// tell adds to the progress.
func (r *runner) tell(change func(p *Progress)) {
	r.mu.Lock()
	change(&r.at)
	r.mu.Unlock()
	if r.Progress == nil {
		return
	}
	r.next.Lock()
	defer r.next.Unlock()
	r.mu.Lock()
	at := r.at
	r.mu.Unlock()
	r.Progress(at)
}

func (r *runner) tableDone() { r.tell(func(p *Progress) { p.Tables++ }) }

// part makes one part. The error wraps errStore unless produce itself failed.
func (r *runner) part(ctx context.Context, name, db string, threads int, produce func(w io.Writer) error) error {
	if err := fault.Point(ctx, "dump.part"); err != nil {
		return err
	}
	pr, pw := io.Pipe()
	var part backup.DumpPart
	var made error
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		part, err = pack(pw, r.Options, threads, func(plain, stored int) {
			r.tell(func(p *Progress) { p.Plain, p.Stored = p.Plain+backup.Bytes(plain), p.Stored+backup.Bytes(stored) })
		}, produce)
		made = err
		_ = pw.CloseWithError(err) // nil is EOF; a PipeWriter's Close never fails
	}()
	err := r.Put(ctx, name, pr)
	_ = pr.CloseWithError(errStore)
	<-done
	switch {
	case made != nil && !errors.Is(made, errStore):
		return made
	case err != nil:
		return fmt.Errorf("%w: %w", errStore, err)
	case made != nil:
		return made
	}
	part.Name, part.Database = name, db
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m.Parts = append(r.m.Parts, part)
	return fault.Point(ctx, "dump.part.done")
}

// whole is DumpSQL: one part with everything.
func (r *runner) whole(ctx context.Context) error {
	err := r.part(ctx, "all.sql"+ext(r.Options), "", r.threads(), func(w io.Writer) error {
		if !r.NoCounts {
			w = io.MultiWriter(w, &sqlScan{databases: r.all, tally: tally{done: r.tableDone}})
		}
		return r.dumpall(ctx, w)
	})
	if err != nil {
		return err
	}
	for _, d := range r.all {
		if err := r.count(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) dumpall(ctx context.Context, w io.Writer, args ...string) error {
	end := &tail{}
	if err := stream(ctx, r.Instance.Command(ctx, "pg_dumpall", args...), &relocate{w: io.MultiWriter(w, end), original: r.Original}); err != nil {
		return err
	}
	if !bytes.Contains(end.b, []byte(lastLine)) {
		return errors.New("pg_dumpall ended without its last line: the dump is not whole")
	}
	return nil
}

// watched lets a scan read along with what is produced. Its trouble is none of
// the dump: what it did not see is counted otherwise.
func (r *runner) watched(w io.Writer, produce func(io.Writer) error, scan func(io.Reader) error) error {
	if r.NoCounts {
		return produce(w)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = scan(pr)
		_, _ = io.Copy(io.Discard, pr)
	}()
	err := produce(io.MultiWriter(w, pw))
	_ = pw.Close()
	<-done
	return err
}

// perDatabase dumps the globals, and then the databases, the largest first.
func (r *runner) perDatabase(ctx context.Context) error {
	if err := r.part(ctx, "globals.sql"+ext(r.Options), "", 1, func(w io.Writer) error { return r.dumpall(ctx, w, "--globals-only") }); err != nil {
		return err
	}
	order := slices.DeleteFunc(slices.Clone(r.all), func(d *database) bool { return d.Error != "" })
	slices.SortStableFunc(order, func(a, b *database) int { return cmp.Compare(b.size, a.size) })
	workers := r.Jobs
	if r.Archive == backup.ArchiveDirectory { // which has the jobs inside
		workers = 1
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	work := make(chan *database)
	var group sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for range workers {
		group.Go(func() {
			for d := range work {
				if err := r.database(ctx, d); err != nil {
					mu.Lock()
					failed = errors.Join(failed, err)
					mu.Unlock()
					cancel()
				}
			}
		})
	}
	for _, d := range order {
		select {
		case work <- d:
		case <-ctx.Done():
		}
	}
	close(work)
	group.Wait()
	if failed == nil {
		failed = ctx.Err()
	}
	slices.SortFunc(r.m.Parts, func(a, b backup.DumpPart) int { return cmp.Compare(a.Name, b.Name) })
	return failed
}

// database dumps one. What pg_dump cannot read is its own trouble; the error
// is for what would be everybody's.
func (r *runner) database(ctx context.Context, d *database) error {
	start := time.Now()
	var err error
	if r.Archive == backup.ArchiveDirectory {
		err = r.directory(ctx, d)
	} else {
		err = r.part(ctx, backup.PartName(d.Name)+".custom"+ext(r.Options), d.Name, r.threads(), func(w io.Writer) error {
			return r.watched(w, func(w io.Writer) error {
				return stream(ctx, r.pgDump(ctx, d, "--format=custom"), w)
			}, func(in io.Reader) error { return (&tally{done: r.tableDone}).custom(in, d) })
		})
	}
	if err == nil {
		err = r.count(ctx, d)
	}
	d.Seconds = time.Since(start).Seconds()
	r.tell(func(p *Progress) { p.Databases++ })
	if err != nil && (ctx.Err() != nil || errors.Is(err, errStore) || errors.Is(err, fault.ErrInjected)) {
		return err
	}
	if err != nil {
		d.Error = err.Error()
	}
	return nil
}

// count reads what was not seen in the dump itself. Where that fails the dump
// is none the worse: it says that its rows were not counted.
func (r *runner) count(ctx context.Context, d *database) error {
	if r.NoCounts {
		return nil
	}
	if err := d.countRest(ctx, r.Instance, r.tableDone); err != nil {
		d.notHeld = append(d.notHeld, err.Error())
	}
	return ctx.Err()
}

// pgDump prepares pg_dump. The database's name goes by the environment: as an
// argument it may be taken for a connection string. Its own compression is
// off, so that ours is the only one.
func (r *runner) pgDump(ctx context.Context, d *database, args ...string) *exec.Cmd {
	args = append(args, "--compress=0")
	for _, s := range d.schemas {
		args = append(args, "--schema="+exactly(s))
	}
	cmd := r.Instance.Command(ctx, "pg_dump", args...)
	cmd.Env = append(cmd.Env, "PGDATABASE="+d.Name)
	return cmd
}

// exactly is the pattern of pg_dump that only this name fits (processSQLNamePattern).
func exactly(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// directory is pg_dump -Fd: several tables at once into a folder, which is then
// packed as one part.
func (r *runner) directory(ctx context.Context, d *database) (err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(r.Spool, &fs); err != nil {
		return fmt.Errorf("%w: %s: %w", errStore, r.Spool, err)
	}
	if free := backup.Bytes(fs.Bavail) * backup.Bytes(fs.Bsize); free < d.size {
		return backup.Hint(fmt.Errorf("%w: %s has %s free, database %s is %s large", errStore, r.Spool, free, d.Name, d.size), "choose a roomier folder with --spool, or --archive custom, which needs none")
	}
	folder := filepath.Join(r.Spool, "dump")
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	cmd := r.pgDump(ctx, d, "--format=directory", fmt.Sprintf("--jobs=%d", r.Jobs), "--file="+folder)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_dump: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return r.part(ctx, backup.PartName(d.Name)+".dir.tar"+ext(r.Options), d.Name, r.threads(), func(w io.Writer) error { return r.tar(ctx, w, folder, d) })
}

// tar packs the folder, and counts the rows in its files.
func (r *runner) tar(ctx context.Context, w io.Writer, folder string, d *database) error {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	files := map[string]uint32{}
	if !r.NoCounts {
		files = readTOC(root)
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	t := &tally{done: r.tableDone}
	archive := tar.NewWriter(w)
	buffer := make([]byte, pipeSize)
	for _, e := range entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		f, err := root.Open(e.Name())
		if err != nil {
			return err
		}
		info, err := f.Stat()
		if err == nil {
			err = archive.WriteHeader(&tar.Header{Name: e.Name(), Size: info.Size(), Mode: 0o600, Format: tar.FormatPAX})
		}
		if err == nil {
			var s rowSum
			into := io.Writer(archive)
			oid, isTable := files[e.Name()]
			if isTable {
				into = io.MultiWriter(archive, &s)
			}
			_, err = io.CopyBuffer(struct{ io.Writer }{into}, struct{ io.Reader }{f}, buffer)
			if isTable && err == nil {
				t.take(d.oids[oid], &s)
			}
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return archive.Close()
}

// stream runs the command and copies what it prints to w. It returns when both
// have ended: the first error of the two, with what the command said.
func stream(ctx context.Context, cmd *exec.Cmd, w io.Writer) error {
	name := filepath.Base(cmd.Path)
	pr, pw, err := newPipe(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	said := &tail{}
	cmd.Stdout, cmd.Stderr = pw, said
	err = cmd.Start()
	_ = pw.Close() // the child has its own
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", name, err), pr.Close())
	}
	_, copied := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{pr}, make([]byte, pipeSize))
	_ = pr.Close() // pg_dumpall's own children outlive its end: without a reader they end too
	ran := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", name, ctx.Err())
	case copied != nil:
		return fmt.Errorf("%w: %w", errStore, copied)
	case ran != nil:
		return fmt.Errorf("%s: %w: %s", name, ran, said)
	}
	return nil
}

// tail keeps the last bytes that are written to it.
type tail struct{ b []byte }

const tailSize = 2048

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[max(0, len(p)-tailSize):]...)
	if over := len(t.b) - tailSize; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.Join(strings.Fields(string(t.b)), " ") }
