package main

import (
	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

const recoveryHelp = `
--target says where recovery ends: "end" (the default) at the moment of the cut,
or at the end of backup mode; "latest" at the end of the WAL in the catalog;
"time=2026-11-23T05:00:00Z", "lsn=0/16B3748", "name=RESTORE_POINT" or "xid=1234"
there. What cannot be reached is refused before anything is made, with what can.`

// recoveryFlags are those of all commands that recover a copy. read turns them
// into the recovery.
func recoveryFlags(c *cobra.Command) (read func() (flow.Recovery, error)) {
	var target string
	var timeline uint32
	c.Flags().StringVar(&target, "target", "end", "where recovery ends: end, latest, immediate, time=…, lsn=…, name=… or xid=…")
	c.Flags().Uint32Var(&timeline, "timeline", 0, "recover along this timeline (default: the newest that leads on from the backup)")
	return func() (flow.Recovery, error) {
		t, err := backup.ParseTarget(target)
		return flow.Recovery{Target: t, Timeline: timeline}, err
	}
}
