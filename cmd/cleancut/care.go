package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/host"
)

func (a *app) deleteCommand() *cobra.Command {
	var yes, last bool
	c := &cobra.Command{
		Use: "delete ID", GroupID: "care", Args: exactly(1, "the id of a backup"),
		Short: "Delete one backup for good: its snapshots as a whole set, its records, its dumps",
		Long: `Delete one backup for good: its snapshots as a whole set, its records, its dumps.
A backup that is held is refused (see "cleancut hold"), and so is the last one
with a good verdict unless --force-last is given (exit status 2). Its golden
image (see "cleancut golden") goes with it; a golden image that is held refuses
both. Copies that stand stay.`,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			golden, err := f.GoldenOf(c.Context(), id)
			if err != nil {
				return err
			}
			with := ""
			for _, g := range golden {
				with += " and its golden image " + string(g)
			}
			if !yes && isTerminal(os.Stdin) && isTerminal(a.err) {
				fmt.Fprintf(a.err, "delete backup %s%s of cluster %s for good? [y/N] ", id, with, f.Cluster)
				answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
				if strings.ToLower(strings.TrimSpace(answer)) != "y" {
					return fmt.Errorf("%w: not deleted", backup.ErrUsage)
				}
			}
			remove := f.Delete
			if last {
				remove = f.DeleteLast
			}
			if err := remove(c.Context(), id); err != nil {
				return err
			}
			return a.print(map[string]any{"deleted": id, "golden_deleted": golden}, func() { a.line("backup %s is deleted%s", id, strings.ReplaceAll(with, " and ", ", and so is ")) })
		},
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask on a terminal")
	c.Flags().BoolVar(&last, "force-last", false, "also the last backup with a good verdict")
	return c
}

func (a *app) sweepCommand() *cobra.Command {
	var dry bool
	c := &cobra.Command{
		Use: "sweep", GroupID: "care", Args: exactly(0, ""),
		Short: "Remove what a crash left behind, and list what is left alone and why",
		Long: `Remove what interrupted backups, deletions, verifications and dumps of this
host left behind. What a running cleancut works on, what belongs to another
host, and snapshots this catalog knows nothing of are listed, never removed.`,
		RunE: func(c *cobra.Command, _ []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			facts, err := f.SweepFacts(c.Context())
			if err != nil {
				return err
			}
			plan := flow.PlanSweep(facts)
			if plan == nil {
				plan = []flow.Action{}
			}
			if !dry {
				if err := f.Sweep(c.Context(), plan); err != nil {
					return err
				}
			}
			return a.print(map[string]any{"dry_run": dry, "actions": plan}, func() { a.sweepText(plan, dry) })
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "only show the plan")
	return c
}

func (a *app) sweepText(plan []flow.Action, dry bool) {
	if len(plan) == 0 {
		a.line("nothing was left behind")
		return
	}
	rows := [][]string{}
	for _, p := range plan {
		did := string(p.Kind)
		if !dry && p.Kind != flow.OnlyList {
			did += ": done"
		}
		rows = append(rows, []string{did, p.Name, p.Why})
	}
	a.table(rows)
}

func (a *app) thawCommand() *cobra.Command {
	return &cobra.Command{
		Use: "thaw [MOUNTPOINT...]", GroupID: "care",
		Short: "Emergency: thaw all that cleancut ever froze on this host, and say what was found",
		RunE: func(c *cobra.Command, args []string) error {
			f, err := a.bareFlow()
			if err != nil {
				return err
			}
			found, err := f.Thaw(c.Context(), args)
			perr := a.print(map[string]any{"found": found}, func() {
				if len(found) == 0 {
					a.line("cleancut never froze anything on this host (by its state folder); name mount points to thaw them")
				}
				for _, t := range found {
					switch {
					case t.Error != "":
						a.line("%s: %s", t.Mountpoint, t.Error)
					case t.WasFrozen:
						a.line("%s: WAS FROZEN, thawed now", t.Mountpoint)
					default:
						a.line("%s: not frozen", t.Mountpoint)
					}
				}
			})
			if err == nil {
				err = perr
			}
			return err
		},
	}
}

func (a *app) watchdogCommand() *cobra.Command {
	return &cobra.Command{
		Use: "watchdog DEADLINE MOUNTPOINT...", Hidden: true, Args: cobra.MinimumNArgs(2),
		Short: "Thaw at the deadline (started by backup; see docs/decisions/0002)",
		RunE: func(_ *cobra.Command, args []string) error {
			deadline, err := time.ParseDuration(args[0])
			if err != nil {
				return fmt.Errorf("%w: deadline %q", backup.ErrUsage, args[0])
			}
			return host.Watch(os.Stdin, os.Stdout, deadline, args[1:])
		},
	}
}
