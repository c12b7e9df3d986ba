package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) verifyCommand() *cobra.Command {
	var level string
	var recovery func() (flow.Recovery, error)
	c := &cobra.Command{
		Use: "verify ID", GroupID: "main", Args: exactly(1, "the id of a backup"),
		Short: "Prove a backup: restore it, check it, record the verdict, remove the copy",
		Long: `Restore a backup into a throwaway copy and check it:

  start  it recovers, reaches the WAL that was flushed before the cut, and stops cleanly
  rows   and every row of every database is read (pg_dumpall to nowhere)
  full   and pg_amcheck, VACUUM of every page, pg_checksums, and the filesystem check

Exit status 4 when damage was found. A check that could not run is named as such.
` + recoveryHelp,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			l := backup.Level(level)
			if l != backup.LevelStart && l != backup.LevelRows && l != backup.LevelFull {
				return fmt.Errorf("%w: level %q: start, rows or full", backup.ErrUsage, level)
			}
			to, err := recovery()
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			v, err := f.Verify(c.Context(), flow.VerifyOptions{ID: id, Level: l, Recovery: to})
			if len(v.Checks) == 0 {
				return err
			}
			if perr := a.print(v, func() { a.verdictText(v) }); perr != nil {
				return perr
			}
			return err
		},
	}
	recovery = recoveryFlags(c)
	c.Flags().StringVar(&level, "level", "full", "start, rows or full")
	return c
}

func (a *app) verdictText(v backup.Verdict) {
	to := ""
	if v.Target != "" {
		to = ", recovered to " + v.Target
	}
	a.line("\nverdict on %s: %s (level %s%s, %.0f s)", v.Backup, strings.ToUpper(v.Word()), v.Level, to, v.Seconds)
	a.checksText(v.Checks)
}

func (a *app) checksText(checks []backup.Check) {
	rows := [][]string{}
	for _, c := range checks {
		rows = append(rows, []string{"  " + c.Name, string(c.Result), fmt.Sprintf("%.1f s", c.Seconds), c.Detail})
	}
	a.table(rows)
}
