package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) restoreCommand() *cobra.Command {
	var to, undo, target string
	c := &cobra.Command{
		Use: "restore ID --to DIR", GroupID: "main", Args: cobra.ArbitraryArgs, // looked at below
		Short: "Make a running, isolated copy of a backup that stays",
		Long: `Make a copy of a backup: new volumes from its snapshots, assembled under a new
identity, mounted below DIR, recovered by PostgreSQL, isolated from production
(no TCP, no archiving, no subscriptions, its own socket directory). It needs
only the catalog and the provider, nothing of the host that was backed up.

The copy stays until "cleancut restore --undo DIR".`,
		Example: "  cleancut restore 20261122T211704Z-5f3a9c --to /srv/copy\n  cleancut restore --undo /srv/copy",
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case undo != "" && (len(args) > 0 || to != ""):
				return fmt.Errorf("%w: --undo DIR stands alone", backup.ErrUsage)
			case undo == "" && (len(args) != 1 || to == ""):
				return backup.Hint(fmt.Errorf("%w: restore wants the id of a backup and --to DIR", backup.ErrUsage), "see `cleancut list`")
			case target != "end":
				return fmt.Errorf("recovery target %q: %w", target, backup.ErrNotThere)
			}
			var id backup.ID
			var err error
			if undo == "" {
				if id, err = backup.ParseID(args[0]); err != nil {
					return err
				}
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			if undo != "" {
				removed, err := f.RemoveCopy(c.Context(), undo)
				if err != nil {
					return err
				}
				return a.print(removed, func() { a.line("copy %s at %s is removed", removed.ID, removed.Root) })
			}
			r, release, err := f.Restore(c.Context(), flow.RestoreOptions{ID: id, Root: to, Purpose: backup.ForRestore})
			if err != nil {
				return err
			}
			defer release()
			return a.print(r.Copy, func() { a.copyText(r.Copy) })
		},
	}
	c.Flags().StringVar(&to, "to", "", "folder of the copy, new or empty")
	c.Flags().StringVar(&undo, "undo", "", "remove the copy that stands in this folder")
	c.Flags().StringVar(&target, "target", "end", "recovery target: end (of the WAL in the cut)")
	return c
}

func (a *app) copyText(c backup.Copy) {
	a.line("copy %s of backup %s runs in %s", c.ID, c.Backup, c.DataDirectory)
	a.line("  recovered to %s, first query %.1f s after the start", c.EndOfRecovery, c.FirstQuery)
	a.line("  connect:  psql -h %s -p %d -U %s", c.SocketDir, c.Port, c.Superuser)
	a.line("  remove:   cleancut restore --undo %s", c.Root)
}
