package dump

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
)

// CheckOptions is which dump to load, and where.
type CheckOptions struct {
	Manifest   backup.DumpManifest
	Open       func(ctx context.Context, part string) (io.ReadCloser, error)
	Instance   *postgres.Instance    // an empty server made for it
	Tools      postgres.Installation // has psql and pg_restore
	Identities []age.Identity
	Jobs       int               // databases, or tables of one, at once
	Progress   func(what string) // called before each step; may be nil
}

// errNotRun marks a check that could not run.
var errNotRun = errors.New("could not run")

type checker struct {
	CheckOptions
	mu  sync.Mutex
	out backup.DumpCheck
}

// Check loads the dump into the server and compares what is there then with
// the manifest. The result is in Checks, with the tables and rows that were
// compared; the error is for ctx only.
func Check(ctx context.Context, o CheckOptions) (backup.DumpCheck, error) {
	o.Jobs = max(1, o.Jobs)
	c := &checker{CheckOptions: o}
	c.out.Server = o.Instance.Installation.Major
	for _, d := range o.Manifest.Failed() {
		c.add(backup.Check{Name: "database " + d.Name, Result: backup.Failed, Detail: "the dump does not hold it: " + d.Error})
	}
	if !c.check(ctx, "what it needs", c.needs) {
		return c.out, ctx.Err()
	}
	if o.Manifest.Format == backup.DumpSQL {
		if c.check(ctx, "loads (psql)", func(ctx context.Context) (string, error) { return c.psql(ctx, o.Manifest.Parts[0]) }) {
			c.compare(ctx)
		}
		return c.out, ctx.Err()
	}
	if c.globals(ctx) {
		c.restore(ctx)
	}
	return c.out, ctx.Err()
}

func (c *checker) add(k backup.Check) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.Checks = append(c.out.Checks, k)
}

// check runs one and reports whether it passed.
func (c *checker) check(ctx context.Context, name string, f func(context.Context) (string, error)) bool {
	if c.Progress != nil {
		c.Progress(name)
	}
	start := time.Now()
	err := fault.Point(ctx, "dump.check")
	detail := ""
	if err == nil {
		detail, err = f(ctx)
	}
	k := backup.Check{Name: name, Result: backup.Passed, Detail: detail, Seconds: time.Since(start).Seconds()}
	if err != nil {
		k.Result, k.Detail = backup.Failed, strings.TrimSpace(err.Error()+" "+detail)
	}
	if errors.Is(err, errNotRun) || errors.Is(err, errSealed) || errors.Is(err, fault.ErrInjected) || ctx.Err() != nil {
		k.Result = backup.CouldNotRun
	}
	c.add(k)
	return k.Result == backup.Passed
}

// needs looks for the extensions, without which the dump cannot be loaded
// here, whatever it is worth.
func (c *checker) needs(ctx context.Context) (string, error) {
	for _, tool := range []string{"psql", "pg_restore"} {
		if _, err := c.Tools.Tool(ctx, tool); err != nil {
			return "", fmt.Errorf("%w: %w", errNotRun, err)
		}
	}
	conn, err := look(ctx, c.Instance, "template1")
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	rows, err := conn.Query(ctx, "SELECT name FROM pg_available_extensions")
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	have, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	var missing []string
	for _, d := range c.Manifest.Databases {
		for _, e := range d.Extensions {
			if !slices.Contains(have, e.Name) && !slices.Contains(missing, e.Name) {
				missing = append(missing, e.Name)
			}
		}
	}
	if len(missing) > 0 {
		return "", fmt.Errorf("%w: this host has no extension %s for PostgreSQL %d", errNotRun, strings.Join(missing, ", "), c.Instance.Installation.Major)
	}
	return fmt.Sprintf("PostgreSQL %d, loaded with the programs of %d", c.Instance.Installation.Major, c.Tools.Major), nil
}

// feed unpacks a part into the input of a program and waits for its end.
func (c *checker) feed(ctx context.Context, p backup.DumpPart, cmd *exec.Cmd, through func(io.Writer) io.Writer) error {
	r, err := c.Open(ctx, p.Name)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer func() { _ = r.Close() }()
	said := &tail{}
	cmd.Stderr, cmd.Stdout = said, nil
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	to := &failing{w: in}
	unpacked := unpack(r, p, c.Identities, through(to))
	closed := in.Close()
	if unpacked != nil && to.err == nil && cmd.Cancel != nil {
		_ = cmd.Cancel() // what it has read must not look whole to it
	}
	ran := cmd.Wait()
	name := filepath.Base(cmd.Path)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case ran != nil && (unpacked == nil || to.err != nil): // it stopped reading
		return fmt.Errorf("%s: %w: %s", name, ran, said)
	case unpacked != nil:
		return unpacked
	case closed != nil && !errors.Is(closed, os.ErrClosed):
		return fmt.Errorf("%s: %w", name, closed)
	}
	return nil
}

func plainly(w io.Writer) io.Writer { return w }

// command is a program of Tools that talks to the server.
func (c *checker) command(ctx context.Context, tool, database string, args ...string) *exec.Cmd {
	i := *c.Instance
	i.Installation = c.Tools
	cmd := i.Command(ctx, tool, args...)
	cmd.Env = append(cmd.Env, "PGDATABASE="+database)
	return cmd
}

// psql runs a part of SQL. The role that initdb made is there already, so the
// statement that makes it is left out; tablespaces get folders below the
// server's own.
func (c *checker) psql(ctx context.Context, p backup.DumpPart) (string, error) {
	spaces := filepath.Join(c.Instance.Root, "tablespaces")
	if err := c.mkdir(spaces); err != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, err)
	}
	var failed error
	n := 0
	through := func(w io.Writer) io.Writer {
		return &relocate{w: w, omit: createRole(c.Manifest.Server.Superuser), original: func(string) string {
			n++
			path := filepath.Join(spaces, fmt.Sprint(n))
			failed = errors.Join(failed, c.mkdir(path))
			return path
		}}
	}
	err := c.feed(ctx, p, c.command(ctx, "psql", "postgres", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null"), through)
	if failed != nil {
		return "", fmt.Errorf("%w: %w", errNotRun, failed)
	}
	return fmt.Sprintf("%s of SQL", p.PlainSize), err
}

// mkdir makes a folder of the server's owner.
func (c *checker) mkdir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, int(c.Instance.UID), int(c.Instance.GID))
}

// createRole is the statement of pg_dumpall that makes a role, in both ways to
// write its name.
func createRole(name string) []string {
	return []string{"CREATE ROLE " + name + ";\n", "CREATE ROLE " + exactly(name) + ";\n"}
}

// globals loads roles and tablespaces.
func (c *checker) globals(ctx context.Context) bool {
	i := slices.IndexFunc(c.Manifest.Parts, func(p backup.DumpPart) bool { return p.Database == "" })
	return c.check(ctx, "globals load (psql)", func(ctx context.Context) (string, error) {
		if i < 0 {
			return "", fmt.Errorf("%w: the dump has no globals", backup.ErrDamage)
		}
		return c.psql(ctx, c.Manifest.Parts[i])
	})
}

// restore loads and compares the databases, some at once. postgres and
// template1, which initdb made, are made anew, each from the other; they come
// first, because nobody may be connected to them then.
func (c *checker) restore(ctx context.Context) {
	var first, rest []backup.DumpPart
	for _, p := range c.Manifest.Parts {
		switch p.Database {
		case "":
		case "postgres", "template1":
			first = append(first, p)
		default:
			rest = append(rest, p)
		}
	}
	one := func(p backup.DumpPart) {
		name := p.Database
		if c.check(ctx, "database "+name+" loads (pg_restore)", func(ctx context.Context) (string, error) {
			return fmt.Sprintf("%s of %s", p.PlainSize, c.Manifest.Archive), c.load(ctx, p)
		}) {
			c.compareOne(ctx, c.find(name))
		}
	}
	for _, p := range first {
		one(p)
	}
	workers := c.Jobs
	if c.Manifest.Archive == backup.ArchiveDirectory {
		workers = 1
	}
	work := make(chan backup.DumpPart)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for p := range work {
				one(p)
			}
		})
	}
	for _, p := range rest {
		work <- p
	}
	close(work)
	group.Wait()
}

func (c *checker) find(name string) backup.DumpedDatabase {
	i := slices.IndexFunc(c.Manifest.Databases, func(d backup.DumpedDatabase) bool { return d.Name == name })
	return c.Manifest.Databases[i] // Validate has seen to it
}

// load restores one database.
func (c *checker) load(ctx context.Context, p backup.DumpPart) error {
	from := "postgres"
	if p.Database == "postgres" {
		from = "template1"
	}
	if p.Database == "postgres" || p.Database == "template1" {
		if err := c.dropDatabase(ctx, p.Database, from); err != nil {
			return err
		}
	}
	args := []string{"--exit-on-error", "--create", "--dbname=" + from}
	if c.Manifest.Archive == backup.ArchiveCustom {
		return c.feed(ctx, p, c.command(ctx, "pg_restore", from, append(args, "--format=custom")...), plainly)
	}
	folder := filepath.Join(c.Instance.Root, "unpacked")
	if err := c.untar(ctx, p, folder); err != nil {
		return err
	}
	said := &tail{}
	cmd := c.command(ctx, "pg_restore", from, append(args, "--format=directory", fmt.Sprintf("--jobs=%d", c.Jobs), folder)...)
	cmd.Stderr = said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_restore: %w: %s", err, said)
	}
	return os.RemoveAll(folder)
}

// dropDatabase drops one of those that initdb makes.
func (c *checker) dropDatabase(ctx context.Context, name, from string) error {
	conn, err := look(ctx, c.Instance, from)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	for _, q := range []string{"ALTER DATABASE " + name + " IS_TEMPLATE false", "DROP DATABASE " + name + " WITH (FORCE)"} {
		if _, err := conn.Exec(ctx, q); err != nil {
			return fmt.Errorf("%w: %w", errNotRun, err)
		}
	}
	return nil
}

// untar unpacks an archive of -Fd: plain files without folders.
func (c *checker) untar(ctx context.Context, p backup.DumpPart, folder string) (err error) {
	if err := errors.Join(os.RemoveAll(folder), c.mkdir(folder)); err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	r, err := c.Open(ctx, p.Name)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer func() { _ = r.Close() }()
	root, err := os.OpenRoot(folder)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRun, err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	pr, pw := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := unpack(r, p, c.Identities, pw)
		_ = pw.CloseWithError(err)
		unpacked <- err
	}()
	err = c.files(ctx, root, tar.NewReader(pr))
	if err == nil {
		_, err = io.Copy(io.Discard, pr)
	}
	_ = pr.CloseWithError(err)
	if e := <-unpacked; err == nil || errors.Is(e, backup.ErrDamage) {
		err = e
	}
	return err
}

func (c *checker) files(ctx context.Context, root *os.Root, archive *tar.Reader) error {
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%w: %q in the archive is no file", backup.ErrDamage, h.Name)
		}
		f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("%w: %w", errNotRun, err)
		}
		_, err = io.Copy(f, archive)
		if os.Geteuid() == 0 {
			err = errors.Join(err, f.Chown(int(c.Instance.UID), int(c.Instance.GID)))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("%w: %w", errNotRun, err)
		}
	}
}

// compare looks at every database of the dump.
func (c *checker) compare(ctx context.Context) {
	for _, d := range c.Manifest.Databases {
		if d.Error == "" {
			c.compareOne(ctx, d)
		}
	}
}

func (c *checker) compareOne(ctx context.Context, want backup.DumpedDatabase) {
	conn, err := look(ctx, c.Instance, want.Name)
	if err != nil {
		c.check(ctx, "database "+want.Name, func(context.Context) (string, error) { return "", err })
		return
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	c.check(ctx, "rows of database "+want.Name, func(ctx context.Context) (string, error) { return c.rows(ctx, conn, want) })
	c.check(ctx, "the rest of database "+want.Name, func(ctx context.Context) (string, error) { return c.rest(ctx, conn, want) })
}

// rows counts and hashes every row of every table.
func (c *checker) rows(ctx context.Context, conn *pgx.Conn, want backup.DumpedDatabase) (string, error) {
	if !want.Counted {
		return "", fmt.Errorf("%w: the dump was made without counts", errNotRun)
	}
	var wrong []string
	var rows int64
	for _, t := range want.Tables {
		s, err := c.table(ctx, conn, t)
		switch {
		case ctx.Err() != nil:
			return "", ctx.Err()
		case err != nil:
			wrong = append(wrong, fmt.Sprintf("%s.%s: %v", t.Schema, t.Name, err))
		case s.rows != t.Rows:
			wrong = append(wrong, fmt.Sprintf("%s.%s has %d rows, the dump had %d", t.Schema, t.Name, s.rows, t.Rows))
		case s.hash() != t.Hash:
			wrong = append(wrong, fmt.Sprintf("%s.%s has as many rows as the dump, %d, but other ones", t.Schema, t.Name, t.Rows))
		}
		if s != nil {
			rows += s.rows
		}
	}
	c.mu.Lock()
	c.out.Tables, c.out.Rows = c.out.Tables+len(want.Tables), c.out.Rows+rows
	c.mu.Unlock()
	return fmt.Sprintf("%d tables, %d rows, each with its hash", len(want.Tables), rows), list(wrong)
}

// table reads a table in the order of columns that the dump has.
func (c *checker) table(ctx context.Context, conn *pgx.Conn, t backup.DumpedTable) (*rowSum, error) {
	var statement []byte
	err := conn.QueryRow(ctx, `SELECT convert_to('COPY ' || quote_ident($1) || '.' || quote_ident($2) || coalesce(
		(SELECT ' (' || string_agg(quote_ident(name), ', ' ORDER BY n) || ')' FROM unnest($3::text[]) WITH ORDINALITY AS u(name, n)), ''), getdatabaseencoding())`,
		t.Schema, t.Name, t.Columns).Scan(&statement)
	if err != nil {
		return nil, err
	}
	return readRows(ctx, conn, statement)
}

// rest compares what is no row of a table.
func (c *checker) rest(ctx context.Context, conn *pgx.Conn, want backup.DumpedDatabase) (string, error) {
	var schemas []string
	if len(c.Manifest.ChosenSchemas) > 0 {
		for _, t := range want.Tables {
			schemas = append(schemas, t.Schema)
		}
		for _, s := range want.Sequences {
			schemas = append(schemas, s.Schema)
		}
		schemas = append(schemas, "") // never nil, which is all
	}
	got, err := state(ctx, conn, backup.DumpedDatabase{}, schemas)
	if err != nil {
		return "", err
	}
	var wrong, noted []string
	for _, s := range want.Sequences {
		i := slices.IndexFunc(got.Sequences, func(g backup.DumpedSequence) bool { return g.Schema == s.Schema && g.Name == s.Name })
		if i < 0 {
			wrong = append(wrong, fmt.Sprintf("sequence %s.%s is missing", s.Schema, s.Name))
		} else if g := got.Sequences[i].Last; (g == nil) != (s.Last == nil) || g != nil && *g != *s.Last {
			wrong = append(wrong, fmt.Sprintf("sequence %s.%s is at %s, in the dump at %s", s.Schema, s.Name, at(g), at(s.Last)))
		}
	}
	for _, e := range want.Extensions {
		i := slices.IndexFunc(got.Extensions, func(g backup.DumpedExtension) bool { return g.Name == e.Name })
		if i < 0 {
			wrong = append(wrong, "extension "+e.Name+" is missing")
		} else if v := got.Extensions[i].Version; v != e.Version {
			noted = append(noted, fmt.Sprintf("extension %s is of version %s, was %s", e.Name, v, e.Version))
		}
	}
	for _, v := range want.MaterializedViews {
		if len(schemas) == 0 && !slices.Contains(got.MaterializedViews, v) {
			wrong = append(wrong, "materialized view "+v+" is missing or not populated")
		}
	}
	if got.LargeObjects != want.LargeObjects {
		wrong = append(wrong, fmt.Sprintf("%d large objects, the dump had %d", got.LargeObjects, want.LargeObjects))
	}
	said := fmt.Sprintf("%d sequences, %d extensions, %d materialized views, %d large objects", len(want.Sequences), len(want.Extensions), len(want.MaterializedViews), want.LargeObjects)
	return strings.Join(append([]string{said}, noted...), "; "), list(wrong)
}

func at(v *int64) string {
	if v == nil {
		return "its start"
	}
	return fmt.Sprint(*v)
}

// list makes one error of what is wrong, of many the first few.
func list(wrong []string) error {
	if len(wrong) == 0 {
		return nil
	}
	more := ""
	if n := len(wrong) - 10; n > 0 {
		wrong, more = wrong[:10], fmt.Sprintf("; and %d more", n)
	}
	return errors.New(strings.Join(wrong, "; ") + more)
}
