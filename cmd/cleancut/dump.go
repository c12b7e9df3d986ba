package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/state"
)

func (a *app) dumpCommand() *cobra.Command {
	var o flow.DumpOptions
	var format, archive string
	var recovery func() (flow.Recovery, error)
	c := &cobra.Command{
		Use: "dump ID [--to PATH]", GroupID: "main", Args: exactly(1, "the id of a backup"),
		Short: "Write the portable SQL dump of a backup, from a throwaway copy",
		Long: `Restore a backup into a throwaway copy, dump it through zstd into the catalog, a
file or a folder, and remove the copy. Production is not read at all.

Format sql is pg_dumpall in one stream. Format per-database is the globals and an
archive of pg_dump for each database, several at once with --jobs: custom, which
is streamed, or directory, which dumps several tables of a database at once and
needs room (--spool). With --database or --schema, by name or glob, it is
per-database. --recipient and --recipients-file encrypt with age.

Beside the dump lies its manifest: versions, checksums, every table with its
number of rows and a hash of them, what the dump does not hold. "cleancut dump
check" proves a dump by it. A database that cannot be dumped does not keep the
others: the rest is stored, and the exit status is 1.
` + recoveryHelp,
		Example: "  cleancut dump 20261122T211704Z-5f3a9c\n  cleancut dump 20261122T211704Z-5f3a9c --to /backup/db.sql.zst\n" +
			"  cleancut dump 20261122T211704Z-5f3a9c --format per-database --jobs 2 --recipient age1…",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			if o.Format, o.Archive, err = dumpKind(format, archive, c.Flags().Changed("archive")); err != nil {
				return err
			}
			if o.Level < 1 || o.Level > 22 {
				return fmt.Errorf("%w: zstd level %d: 1 to 22", backup.ErrUsage, o.Level)
			}
			if o.Jobs < 1 || o.Jobs > 64 {
				return fmt.Errorf("%w: --jobs %d: 1 to 64", backup.ErrUsage, o.Jobs)
			}
			if o.Recovery, err = recovery(); err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			o.ID = id
			bar, stop := a.bar()
			o.Progress = bar
			res, err := f.Dump(c.Context(), o)
			stop()
			if err != nil && !errors.Is(err, flow.ErrPartialDump) {
				return err
			}
			if perr := a.print(dumpJSON(res), func() { a.dumped(res) }); err == nil {
				err = perr
			}
			return err
		},
	}
	recovery = recoveryFlags(c)
	f := c.Flags()
	f.StringVar(&o.To, "to", "", "file (format sql) or folder to write; it must not exist (default: into the catalog)")
	f.StringVar(&format, "format", "", "sql or per-database (default sql)")
	f.StringVar(&archive, "archive", string(backup.ArchiveCustom), "per-database: custom or directory")
	f.StringArrayVar(&o.Databases, "database", nil, "dump this database only, by name or glob; repeatable")
	f.StringArrayVar(&o.Schemas, "schema", nil, "dump this schema only, by name or glob; repeatable")
	f.IntVar(&o.Jobs, "jobs", 1, "per-database: databases at once, or tables of a directory archive")
	f.IntVar(&o.Level, "level", 1, "zstd level, 1 to 22")
	f.StringArrayVar(&o.Recipients, "recipient", nil, "encrypt to this age recipient (age1…); repeatable")
	f.StringArrayVar(&o.RecipientFiles, "recipients-file", nil, "encrypt to the age recipients in this file; repeatable")
	f.BoolVar(&o.NoCounts, "no-counts", false, "do not count rows: dump check has nothing to compare then")
	f.StringVar(&o.Spool, "spool", "", "folder for directory archives while they are made (default: in the state folder)")
	c.AddCommand(a.dumpCheckCommand())
	return c
}

// dumpKind reads --format and --archive.
func dumpKind(format, archive string, given bool) (f backup.DumpFormat, k backup.DumpArchive, err error) {
	switch f = backup.DumpFormat(format); f {
	case "", backup.DumpSQL, backup.DumpPerDatabase:
	default:
		return f, k, fmt.Errorf("%w: --format %q: sql or per-database", backup.ErrUsage, format)
	}
	if !given {
		return f, k, nil
	}
	switch k = backup.DumpArchive(archive); k {
	case backup.ArchiveCustom, backup.ArchiveDirectory:
	default:
		return f, k, fmt.Errorf("%w: --archive %q: custom or directory", backup.ErrUsage, archive)
	}
	if f == "" {
		f = backup.DumpPerDatabase
	}
	return f, k, nil
}

// dumpJSON is what dump prints with --json.
func dumpJSON(res flow.DumpResult) map[string]any {
	m := res.Manifest
	plain, stored := m.Sizes()
	to := res.To
	if to == "" {
		to = "catalog: " + m.Name
	}
	return map[string]any{"backup": m.Backup, "name": m.Name, "to": to, "manifest": m,
		"result": map[string]any{"sql_bytes": plain, "compressed_bytes": stored, "seconds": m.Seconds}}
}

func (a *app) dumped(res flow.DumpResult) {
	m := res.Manifest
	plain, stored := m.Sizes()
	tables, rows := m.Rows()
	where := res.To
	if where == "" {
		where = "catalog: " + m.Name
	}
	a.line("dump of %s: %s, %s of SQL, %s compressed, in %.1f s → %s", m.Backup, m.Held(), plain, stored, m.Seconds, where)
	a.line("  %s with %s", plural(tables, "table"), plural(int(rows), "row"))
	for _, d := range m.Databases {
		if n := unlogged(d); n > 0 {
			a.line("  database %s: %s empty, as in every backup", d.Name, plural(n, "unlogged table"))
		}
	}
	for _, n := range m.NotHeld {
		a.line("  not in it: %s", n)
	}
	for _, d := range m.Failed() {
		a.line("  database %s FAILED: %s", d.Name, d.Error)
	}
}

func unlogged(d backup.DumpedDatabase) (n int) {
	for _, t := range d.Tables {
		if t.Unlogged {
			n++
		}
	}
	return n
}

func (a *app) dumpCheckCommand() *cobra.Command {
	var o flow.CheckDumpOptions
	c := &cobra.Command{
		Use: "check ID [NAME]", Args: betweenArgs(0, 2),
		Short: "Load a dump into an empty server and compare every row with its manifest",
		Long: `Prove a dump of a backup, the newest whole one if none is named: every stored byte
by its checksum, then all of it by loading it into an empty server of the same or
a newer major version, which is made for that, isolated like a copy, and removed.
There every row of every table is counted and hashed again; sequences,
extensions, large objects and materialized views are compared. The result is
kept in the catalog beside the dump. Exit status 4: something differs; 1: the
check could not run to its end, for example because this host lacks an extension.`,
		Example: "  cleancut dump check 20261122T211704Z-5f3a9c\n  cleancut dump check --file /backup/db.sql.zst --identity key.txt",
		RunE: func(c *cobra.Command, args []string) error {
			if (o.File == "") == (len(args) == 0) {
				return backup.Hint(fmt.Errorf("%w: cleancut dump check wants the id of a backup, or --file", backup.ErrUsage), "usage: "+c.UseLine())
			}
			if len(args) > 0 {
				id, err := backup.ParseID(args[0])
				if err != nil {
					return err
				}
				o.ID = id
			}
			if len(args) > 1 {
				o.Name = args[1]
			}
			f, err := a.checkFlow()
			if err != nil {
				return err
			}
			k, err := f.CheckDump(c.Context(), o)
			if k.Backup == "" { // nothing was checked
				return err
			}
			if perr := a.print(k, func() { a.checkText(k) }); err == nil {
				err = perr
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.File, "file", "", "check this file or folder, as dump --to writes it, instead of a dump in the catalog")
	f.StringArrayVar(&o.Identities, "identity", nil, "file with an age identity that opens the dump; repeatable")
	f.StringVar(&o.ServerBin, "server-bin", "", "folder with PostgreSQL's programs for the empty server (default: of the dump's major version, else of the next newer one)")
	f.IntVar(&o.Jobs, "jobs", 1, "databases at once, or tables of a directory archive")
	f.StringVar(&o.Folder, "folder", "", "folder for the empty server while it is there (default: in the state folder)")
	return c
}

// checkFlow has no provider: a check needs none.
func (a *app) checkFlow() (*flow.Flow, error) {
	cat, s, err := a.catalog()
	if err != nil {
		return nil, err
	}
	st, err := state.Open(s.State)
	return &flow.Flow{Catalog: cat, State: st, Cluster: s.name, Host: s.Host, Tool: version, BinDirs: s.BinDirs, Log: a.log, Progress: a.progress}, err
}

// betweenArgs demands from least to most arguments.
func betweenArgs(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) >= least && len(args) <= most {
			return nil
		}
		return backup.Hint(fmt.Errorf("%w: %s takes %d to %d arguments", backup.ErrUsage, c.CommandPath(), least, most), "usage: "+c.UseLine())
	}
}

func (a *app) checkText(k backup.DumpCheck) {
	word := map[backup.CheckResult]string{backup.Passed: "GOOD", backup.Failed: "DAMAGED", backup.CouldNotRun: "COULD NOT RUN"}[k.Result()]
	on := ""
	if k.Server > 0 {
		on = fmt.Sprintf(" in PostgreSQL %d", k.Server)
	}
	a.line("check of dump %s of %s%s at %s, %.1f s: %s, %s and %s compared", k.Dump, k.Backup, on, k.Time.Format(time.RFC3339), k.Seconds, word, plural(k.Tables, "table"), plural(int(k.Rows), "row"))
	rows := [][]string{}
	for _, c := range k.Checks {
		rows = append(rows, []string{"  " + c.Name, string(c.Result), fmt.Sprintf("%.1f s", c.Seconds), c.Detail})
	}
	a.table(rows)
}

// shownDump is a dump in the JSON of show.
type shownDump struct {
	Name     string               `json:"name"`
	Size     backup.Bytes         `json:"size"`
	Modified time.Time            `json:"modified"`
	Complete bool                 `json:"complete"`
	Manifest *backup.DumpManifest `json:"manifest,omitempty"` // of a complete one; not of a single file
	Checks   []backup.DumpCheck   `json:"checks,omitempty"`
	Error    string               `json:"error,omitempty"` // its manifest or a check is unreadable
}

func (a *app) shownDumps(ctx context.Context, cat *catalog.Catalog, e catalog.Entry) ([]shownDump, error) {
	out := []shownDump{}
	for _, d := range e.Dumps {
		s := shownDump{Name: d.Name, Size: d.Size, Modified: d.Modified, Complete: d.Complete}
		if d.Complete && !d.File {
			m, err := cat.DumpManifest(ctx, e.ID, d.Name)
			if err == nil {
				s.Manifest = &m
				s.Checks, err = cat.DumpChecks(ctx, e.ID, d.Name)
			}
			if err != nil {
				s.Error = err.Error()
			}
		}
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		out = append(out, s)
	}
	return out, nil
}

// countDumps counts the whole dumps of a backup and tells what the newest holds.
func countDumps(ctx context.Context, cat *catalog.Catalog, e catalog.Entry) (n int, newest string, err error) {
	for _, d := range e.Dumps {
		if !d.Complete {
			continue
		}
		n, newest = n+1, ""
		if d.File {
			continue
		}
		m, err := cat.DumpManifest(ctx, e.ID, d.Name)
		switch {
		case ctx.Err() != nil:
			return n, "", ctx.Err()
		case err != nil:
			newest = "unreadable"
		default:
			newest = m.Held()
		}
	}
	return n, newest, nil
}

func (a *app) dumpText(d shownDump) {
	switch {
	case d.Error != "":
		a.line("dump %s, %s: %s", d.Name, d.Size, d.Error)
	case !d.Complete:
		a.line("dump %s, %s: it is being made, or that was interrupted (`cleancut sweep` removes it then)", d.Name, d.Size)
	case d.Manifest == nil:
		a.line("dump %s, %s", d.Name, d.Size)
	default:
		about := []string{string(d.Manifest.Format), d.Manifest.Held()}
		if len(d.Manifest.Recipients) > 0 {
			about = append(about, "encrypted")
		}
		a.line("dump %s, %s, %s", d.Name, d.Size, strings.Join(about, ", "))
		for _, k := range d.Checks {
			a.line("  check of %s by cleancut %s: %s", k.Time.Format(time.RFC3339), k.Tool, k.Result())
		}
	}
}

// bar shows the bytes and tables of a dump on a terminal.
func (a *app) bar() (progress func(flow.DumpProgress), stop func()) {
	if a.json || !isTerminal(a.err) {
		return nil, func() {}
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithRefreshRate(200*time.Millisecond))
	tables := make(chan string, 1)
	tables <- ""
	b := p.New(0, mpb.SpinnerStyle(), mpb.PrependDecorators(decor.Name("dump "), decor.Any(func(decor.Statistics) string {
		s := <-tables
		tables <- s
		return s
	})), mpb.AppendDecorators(decor.CurrentKibiByte("% .1f of SQL"), decor.AverageSpeed(decor.SizeB1024(0), "  % .1f")))
	return func(at flow.DumpProgress) {
		<-tables
		tables <- fmt.Sprintf("%d of %d tables ", at.Tables, at.Of)
		b.SetCurrent(int64(at.Plain))
	}, func() { b.SetTotal(-1, true); p.Wait() }
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && f.Name() != os.DevNull
}
