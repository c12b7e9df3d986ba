package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/state"
)

// PostgreSQL takes an exit status of restore_command from 1 to 125 for "not
// there", which ends recovery, and a greater one for a reason to stop
// (xlogarchive.c: RestoreArchivedFile; wait_error.c). 143 is what a shell makes
// of SIGTERM: a fast shutdown.
const (
	exitNotThere   = 1
	exitStop       = 200
	exitTerminated = 128 + int(syscall.SIGTERM)
)

// codeOf is exitCode, but for `wal fetch`.
func codeOf(c *cobra.Command, err error) int {
	if c == nil || c.Annotations["exit"] != "restore_command" {
		return exitCode(err)
	}
	standby, _ := c.Flags().GetBool("standby")
	sure := errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrNotOurs) || errors.Is(err, backup.ErrUsage)
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, context.Canceled):
		return exitTerminated
	case errors.Is(err, backup.ErrNotFound) && !sure:
		return exitNotThere
	case standby && !sure:
		return exitNotThere
	}
	return exitStop
}

func (a *app) walCommand() *cobra.Command {
	hint := "see `cleancut wal --help`"
	c := &cobra.Command{Use: "wal", GroupID: "main", Short: "Keep the WAL in the catalog, and give it back for recovery", Args: known(hint),
		RunE: func(*cobra.Command, []string) error {
			return backup.Hint(fmt.Errorf("%w: wal wants to know what to do", backup.ErrUsage), hint)
		}}
	c.AddCommand(a.walStreamCommand(), a.walPushCommand(), a.walFetchCommand(), a.walPrefetchCommand(), a.walListCommand())
	return c
}

// walFlow opens the catalog only; archive_command and restore_command run as
// the server's user, who may have no state folder.
func (a *app) walFlow() (*flow.Flow, settings, error) {
	s, err := a.settings()
	if err != nil {
		return nil, s, err
	}
	store, err := catalog.Open(s.Catalog)
	return &flow.Flow{Catalog: catalog.New(store, s.name), Cluster: s.name, Host: s.Host, Log: a.log, Progress: a.progress}, s, err
}

func (a *app) walStreamCommand() *cobra.Command {
	var o flow.StreamWALOptions
	var temporary bool
	c := &cobra.Command{
		Use: "stream", Args: exactly(0, ""),
		Short: "Receive WAL from the running server into the catalog, for ever",
		Long: `Receive WAL by the replication protocol and store each segment in the catalog,
for ever. The server, a primary or a standby, keeps by a replication slot what
is not in the catalog yet; the segment that is being written lies in
STATE/wal/NAME on this host. Timelines are followed. While the server, the
catalog or the disk is not to be had it waits and tries again; "cleancut wal
list" shows how far it is. It ends by a signal, and with an error where somebody
must decide: WAL is lost on the server, the server is another one.`,
		RunE: func(c *cobra.Command, _ []string) error {
			f, s, err := a.walFlow()
			if err != nil {
				return err
			}
			if f.State, err = state.Open(s.State); err != nil {
				return err
			}
			if !a.verbose {
				f.Log = slog.New(slog.NewTextHandler(a.err, nil))
			}
			o.Target = s.target()
			if temporary {
				o.Slot = ""
			}
			err = f.StreamWAL(c.Context(), o)
			if c.Context().Err() != nil && errors.Is(err, context.Canceled) { // told to stop: that is how it ends
				return nil
			}
			return err
		},
	}
	c.Flags().StringVar(&o.Slot, "slot", "cleancut", "physical replication slot; it is made if it is missing")
	c.Flags().BoolVar(&temporary, "temporary-slot", false, "use a slot that ends with the connection: WAL may be lost whenever that breaks")
	c.Flags().BoolVar(&o.SkipLost, "skip-lost", false, "go on after WAL that the server has no longer, or on another branch of timelines: leaves a gap")
	return c
}

func (a *app) walPushCommand() *cobra.Command {
	return &cobra.Command{
		Use: "push PATH", Args: exactly(1, "the path of a WAL file: %p"),
		Short: "Store one WAL file: archive_command = 'cleancut wal push %p'",
		Long: `Store one file of WAL in the catalog under its own name, for archive_command. It
is proved to be what its name says, compressed, and durable when this exits with
0. Pushed again it is compared: the same content is fine, other content is
refused and nothing is replaced. With any other exit status PostgreSQL keeps
the file and tries again.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.walFlow()
			if err != nil {
				return err
			}
			if err := f.PushWAL(c.Context(), args[0]); err != nil {
				return err
			}
			return a.print(map[string]any{"pushed": filepath.Base(args[0])}, func() {})
		},
	}
}

func (a *app) walFetchCommand() *cobra.Command {
	var prefetch, standby bool
	var from string
	c := &cobra.Command{
		Use: "fetch NAME PATH", Args: exactly(2, "a name and a path: %f %p"), Annotations: map[string]string{"exit": "restore_command"},
		Short: "Fetch one WAL file: restore_command = 'cleancut wal fetch %f %p'",
		Long: `Fetch one file of WAL from the catalog, for restore_command. The segments that
follow are fetched ahead into cleancut.spool beside PATH.

Exit status: 0 it is at PATH, whole and proved; 1 the catalog does not have it,
which PostgreSQL takes for the end of the WAL; 200 anything else, upon which
PostgreSQL stops instead of ending recovery too early: the file is damaged, of
another cluster, or missing while later ones of its timeline are there, the
catalog cannot be reached, the command line is wrong. With --standby a gap and
a catalog that cannot be reached are 1 too: a standby asks again.`,
		RunE: func(c *cobra.Command, args []string) error {
			// A crash of this program must not look like an exit status below
			// 126: SIGABRT makes PostgreSQL stop.
			debug.SetTraceback("crash")
			if from != "" {
				return errors.Join(c.Context().Err(), flow.AskWAL(c.Context(), from, args[0], args[1]))
			}
			f, _, err := a.walFlow()
			if err != nil {
				return err
			}
			var ahead func(context.Context) error
			if prefetch {
				ahead = func(context.Context) error { return startPrefetch(c, args) }
			}
			if err := f.FetchWAL(c.Context(), args[0], args[1], standby, ahead); err != nil {
				return errors.Join(c.Context().Err(), err)
			}
			return a.print(map[string]any{"fetched": args[0]}, func() {})
		},
	}
	c.Flags().StringVar(&from, "from", "", "ask whoever restores this copy, on this socket, instead of the catalog")
	_ = c.Flags().MarkHidden("from") // restore writes it into the copy's restore_command
	c.Flags().BoolVar(&prefetch, "prefetch", true, "fetch the next segments ahead")
	c.Flags().BoolVar(&standby, "standby", false, "for a standby: a gap, and a catalog that cannot be reached, count as \"not there\"")
	return c
}

// startPrefetch starts `wal prefetch` with the same flags and lets it go: not
// a child that PostgreSQL would wait for, and not in its data directory.
func startPrefetch(c *cobra.Command, args []string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	to, err := filepath.Abs(args[1])
	if err != nil {
		return err
	}
	line := []string{"wal", "prefetch", args[0], to}
	c.InheritedFlags().VisitAll(func(f *pflag.Flag) {
		v := f.Value.String()
		if !f.Changed {
			return
		}
		if f.Name == "config" {
			v, _ = filepath.Abs(v) // it was read from here
		}
		line = append(line, "--"+f.Name+"="+v)
	})
	cmd := exec.CommandContext(context.WithoutCancel(c.Context()), exe, line...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// prefetchTime is how long a prefetch may take before it is of no use.
const prefetchTime = 2 * time.Minute

func (a *app) walPrefetchCommand() *cobra.Command {
	return &cobra.Command{
		Use: "prefetch NAME PATH", Hidden: true, Args: exactly(2, "a name and a path"),
		Short: "Fetch what follows after a segment; started by wal fetch",
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.walFlow()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), prefetchTime)
			defer cancel()
			return f.PrefetchWAL(ctx, args[0], args[1])
		},
	}
}

func (a *app) walListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Args: exactly(0, ""), Aliases: []string{"ls"},
		Short: "List timelines, ranges and gaps of the WAL, and how far each backup can be recovered",
		Long: `List the WAL that the catalog has: timelines, unbroken ranges, gaps; how far each
backup can be recovered by it; and how far "wal stream" on this host is. Names
are looked at, not contents.`,
		RunE: func(c *cobra.Command, _ []string) error {
			f, s, err := a.walFlow()
			if err != nil {
				return err
			}
			if _, err := os.Stat(s.State); err == nil { // only to look at the stream's status
				f.State, _ = state.Open(s.State)
			}
			list, err := f.ListWAL(c.Context())
			if err != nil {
				return err
			}
			return a.print(list, func() { a.walText(s, list) })
		},
	}
}

func (a *app) walText(s settings, l flow.WALList) {
	if l.System == nil {
		a.line("no WAL of cluster %s in %s", s.name, s.Catalog)
	} else {
		a.line("WAL of system %d in segments of %s; %s in the catalog", l.System.Identifier, l.System.SegmentSize, l.Size)
		rows := [][]string{{"TIMELINE", "FIRST", "LAST", "FROM", "TO", "SEGMENTS", "LAST STORED"}}
		for _, t := range l.Timelines {
			for _, r := range t.Ranges {
				if r.Missing > 0 {
					rows = append(rows, []string{fmt.Sprint(t.Timeline), "GAP", "", "", "", fmt.Sprint(r.Missing), "missing"})
				}
				rows = append(rows, []string{fmt.Sprint(t.Timeline), r.First.String(), r.Last.String(), r.Start.String(), r.End.String(), fmt.Sprint(r.Segments), r.LastStored.UTC().Format(time.RFC3339)})
			}
			if len(t.Ranges) == 0 {
				rows = append(rows, []string{fmt.Sprint(t.Timeline), "-", "-", t.Begin.String(), "-", "0", ""})
			}
		}
		a.table(rows)
		for _, t := range l.Timelines {
			if t.Parent != 0 {
				a.line("timeline %d left timeline %d at %s", t.Timeline, t.Parent, t.Begin)
			}
		}
	}
	for _, d := range l.Damaged {
		a.line("damaged: %s", d)
	}
	if len(l.Backups) > 0 {
		rows := [][]string{{"\nBACKUP", "CUT AT", "RECOVERS TO", "ON TIMELINE", "COMMITS BEFORE"}}
		for _, b := range l.Backups {
			if len(b.Ways) == 0 {
				rows = append(rows, []string{string(b.ID), b.From.String(), "its cut only", fmt.Sprint(b.Timeline), "-"})
			}
			for _, w := range b.Ways {
				rows = append(rows, []string{string(b.ID), b.From.String(), w.To.String(), fmt.Sprint(w.Timeline), w.Stored.UTC().Format(time.RFC3339)})
			}
		}
		a.table(rows)
	}
	if l.System != nil && len(l.Backups) > 0 {
		a.line("%s", sinceText(l.Since))
	}
	if st := l.Stream; st != nil {
		a.line("\nstream on this host, %s ago: %s, timeline %d, %s behind the server, %s not in the catalog yet", time.Since(st.Updated).Round(time.Second), st.State, st.Timeline, st.Lag, st.Unstored)
		if st.Error != "" {
			a.line("  %s", strings.ReplaceAll(st.Error, "\n", "\n  "))
		}
	}
}
