package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
)

// app is what every sub-command shares: the streams, the configuration and
// the machines made from it.
type app struct {
	out, err io.Writer
	json     bool
	printed  bool // the one JSON object is out
	verbose  bool
	file     string // --config
	name     string // --cluster
	over     overrides
	log      *slog.Logger
}

// The exit codes of docs/operations.md.
const (
	exitDone = iota
	exitFailed
	exitUsage
	exitVoid
	exitDamage
	exitLeft
)

func exitCode(err error) int {
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, backup.ErrLeft):
		return exitLeft
	case errors.Is(err, backup.ErrVoid):
		return exitVoid
	case errors.Is(err, backup.ErrDamage):
		return exitDamage
	case errors.Is(err, backup.ErrUsage):
		return exitUsage
	}
	return exitFailed
}

func execute(ctx context.Context, args []string, out, errs io.Writer) int {
	a := &app{out: out, err: errs}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errs)
	c, err := root.ExecuteContextC(ctx)
	code := codeOf(c, err)
	if err != nil {
		a.printError(err, code)
	}
	return code
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cleancut",
		Short: "One clean cut through every volume a PostgreSQL cluster lives on, and the proof that it restores",
		Long: `cleancut backs up a running PostgreSQL cluster by snapshotting, at one instant,
all the block volumes it lives on. Another host makes volumes from the
snapshots, lets PostgreSQL recover, proves the result and writes the portable
SQL dump.

Exit status: 0 done; 1 failed, nothing left behind; 2 usage or configuration;
3 the cut was void; 4 verification found damage; 5 something was left behind
and is listed (run "cleancut sweep").`,
		Args:          known("see `cleancut --help`"),
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			level := slog.LevelWarn
			if a.verbose {
				level = slog.LevelDebug
			}
			a.log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return backup.Hint(errors.Join(backup.ErrUsage, err), "see `"+c.CommandPath()+" --help`")
	})
	p := root.PersistentFlags()
	p.StringVar(&a.file, "config", "", "configuration file (default /etc/cleancut.toml if it exists)")
	p.StringVar(&a.name, "cluster", "", "name of the cluster in the configuration (default: the only one, or main)")
	p.BoolVar(&a.json, "json", false, "one JSON object on standard output")
	p.BoolVarP(&a.verbose, "verbose", "v", false, "log every step to standard error")
	a.over.register(p)
	root.AddGroup(&cobra.Group{ID: "look", Title: "Look:"}, &cobra.Group{ID: "main", Title: "Back up and restore:"}, &cobra.Group{ID: "care", Title: "Clean up:"})
	root.AddCommand(a.topologyCommand(), a.doctorCommand(), a.listCommand(), a.showCommand(),
		a.storageCommand(), a.backupCommand(), a.restoreCommand(), a.verifyCommand(), a.dumpCommand(), a.goldenCommand(), a.standbyCommand(), a.cloneCommand(), a.walCommand(), a.nightlyCommand(),
		a.deleteCommand(), a.holdCommand(), a.pruneCommand(), a.sweepCommand(), a.catalogCommand(), a.thawCommand(), a.demoCommand(), a.demoHostCommand(), a.drillCommand(), a.ec2simCommand(), a.watchdogCommand(), a.gateCommand(), a.manCommand())
	return root
}

// known refuses what is none of a command's sub-commands.
func known(hint string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		return backup.Hint(fmt.Errorf("%w: unknown command %q for %q", backup.ErrUsage, args[0], c.CommandPath()), hint)
	}
}

// exactly demands n arguments and says so as a usage error.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		want := "takes no arguments"
		if n > 0 {
			want = "wants " + what
		}
		return backup.Hint(errors.Join(backup.ErrUsage, errors.New(c.CommandPath()+" "+want)), "usage: "+c.UseLine())
	}
}
