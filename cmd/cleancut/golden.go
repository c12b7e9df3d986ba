package main

import (
	"github.com/spf13/cobra"

	"cleancut/internal/backup"
)

func (a *app) goldenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "golden ID", GroupID: "main", Args: exactly(1, "the id of a backup"),
		Short: "Recover and check a backup once, and snapshot it again: copies of that start without recovery",
		Long: `Make the golden image of a backup, or find the one that there is, and print its
id: the backup is recovered in a throwaway copy, checked, shut down cleanly and
snapshotted again while nothing is mounted. A copy of the image, by "cleancut
restore" or a clone, starts without recovery, however large the cluster is.

A backup without a good verdict of level full is verified first ("cleancut
verify"), on a copy of its own. Where damage is found no image is made (exit
status 4). Another cleancut that makes the same image is waited for.

A golden image stands in "cleancut list" beside its backup and goes with it, by
delete or prune, unless it is held or in use. It counts for no retention rule,
is recovered to its own end only, and becomes no production and no standby.`,
		Example: "  cleancut golden 20261122T211704Z-5f3a9c",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			golden, err := f.Golden(c.Context(), id)
			if err != nil {
				return err
			}
			return a.print(map[string]any{"golden": golden, "of": id}, func() { a.line("%s", golden) })
		},
	}
}
