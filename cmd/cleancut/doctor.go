package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/state"
)

// errUnwell is doctor's exit status 1.
var errUnwell = errors.New("not everything is well")

func (a *app) doctorCommand() *cobra.Command {
	var o flow.DoctorOptions
	var scope, mode string
	c := &cobra.Command{
		Use: "doctor", GroupID: "look", Args: exactly(0, ""),
		Short: "Check everything a backup, a restore and a dump need, and say how to mend each",
		Long: `Check everything a backup, a restore and a dump need on this host: privileges,
kernel, tools, provider, catalog, state, server, topology, PostgreSQL's
programs, left-overs. Nothing is frozen: one object is written to the catalog
and deleted, one watchdog is started and ended. Only the state folder is made
if it is missing.

Exit status 0 when nothing is bad, else 1. "warn" is a loss you should know,
"could not run" is no approval.`,
		Example: "  cleancut doctor\n  cleancut doctor --for restore --json",
		RunE: func(c *cobra.Command, _ []string) error {
			switch o.For = flow.Scope(scope); o.For {
			case flow.ForBackup, flow.ForRestore, flow.ForAll:
			default:
				return fmt.Errorf("%w: --for %q: backup, restore or all", backup.ErrUsage, scope)
			}
			f, err := a.patient(c.Context(), &o)
			if err != nil {
				return err
			}
			seen, err := f.Examine(c.Context(), o)
			if err != nil {
				return err
			}
			findings := flow.Diagnose(seen)
			bad := 0
			for _, f := range findings {
				if f.Result == flow.Bad {
					bad++
				}
			}
			err = a.print(map[string]any{"ok": bad == 0, "for": o.For, "checks": findings}, func() { a.doctorText(findings) })
			if err == nil && bad > 0 {
				err = fmt.Errorf("%w: %s bad", errUnwell, plural(bad, "finding"))
			}
			return err
		},
	}
	c.Flags().StringVar(&scope, "for", string(flow.ForAll), "backup, restore (also verify and dump) or all")
	cutFlags(c, &o.Backup, &mode)
	for _, name := range []string{"mode", "max-sync", "sync-rounds"} {
		_ = c.Flags().MarkHidden(name) // they change nothing here
	}
	return c
}

// patient opens what can be opened; what cannot is doctor's to tell.
func (a *app) patient(ctx context.Context, o *flow.DoctorOptions) (*flow.Flow, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("own program: %w", err)
	}
	f := &flow.Flow{Cluster: s.name, Host: s.Host, Tool: version, Watchdog: []string{exe, "watchdog"}, BinDirs: s.BinDirs, Log: a.log}
	if o.Store, o.CatalogErr = catalog.Open(s.Catalog); o.CatalogErr == nil {
		f.Catalog = catalog.New(o.Store, s.name)
	}
	if f.State, o.StateErr = state.Open(s.State); o.StateErr != nil {
		f.State = nil
	}
	p, err := a.provider(ctx, s)
	if o.ProviderErr = err; err == nil {
		f.Provider = p
	}
	o.Local = s.cluster.Provider == "local"
	o.Backup.Target, o.Backup.KeepAway = s.target(), s.keepAway()
	return f, nil
}

// doctorText prints the findings and, behind them, what to do, numbered.
func (a *app) doctorText(findings []flow.Finding) {
	name := 0
	for _, f := range findings {
		name = max(name, len(f.Name))
	}
	var mends []string
	for _, f := range findings {
		number := ""
		if f.Mend != "" && f.Result != flow.Healthy {
			mend := f.Name + ": " + f.Mend
			if !slices.Contains(mends, mend) {
				mends = append(mends, mend)
			}
			number = fmt.Sprintf(" [%d]", slices.Index(mends, mend)+1)
		}
		a.line("%-13s  %-*s  %s%s", f.Result, name, f.Name, f.Detail, number)
	}
	if len(mends) == 0 {
		return
	}
	a.line("\nwhat to do:")
	for i, m := range mends {
		a.line("  [%d] %s", i+1, strings.ReplaceAll(m, "\n", " "))
	}
}
