package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

// ec2Deadline is the watchdog's deadline where the freeze lasts as long as the
// slowest of several calls to EC2.
const ec2Deadline = 30 * time.Second

func (a *app) backupCommand() *cobra.Command {
	var options func() (flow.BackupOptions, error)
	c := &cobra.Command{
		Use: "backup", GroupID: "main", Args: exactly(0, ""),
		Short: "Take one backup",
		Long: `Take one backup of all volumes, and record what was achieved: at one instant,
for which no checkpoint is forced and no backup mode is needed, or bracketed.

Mode group lets the provider cut all volumes in one call: nothing is frozen and
production is not touched (EC2, all volumes on one instance). Mode freeze
freezes every filesystem of the cluster, snapshots all volumes at once and
thaws; before that, dirty data is written out until little is left, so that
the stop is short. Mode auto takes the group where there is one, else the
freeze. A mode that cannot be had is refused, never replaced in silence.

Mode bracketed cuts one filesystem after the other, each at an instant of its
own, in PostgreSQL's backup mode, and keeps the WAL from its start to its end
with the backup. It is for clusters whose filesystems cannot all be held at
once, and for standbys. It begins with a checkpoint, spread over minutes so
that production does not feel it; --checkpoint fast does it at once.

A watchdog in a process of its own thaws everything at the deadline, whatever
happens to this command; then the backup is void (exit 3) and its snapshots
are deleted.`,
		Example: "  cleancut backup\n  cleancut backup --json --deadline 5s",
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := options()
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			m, err := f.Backup(c.Context(), o)
			if err != nil {
				return err
			}
			return a.print(m, func() {
				a.line("backup %s: %s cut of %d volumes (%s)", m.ID, m.Cut.Achieved, len(m.Snapshots), m.Cut.How)
				switch m.Cut.How {
				case backup.ModeGroup:
					a.line("  nothing frozen, one call cut all volumes, flushed WAL %s", m.Cut.FlushLSN)
				case backup.ModeBracketed:
					a.line("  %s in %.1f s, frozen for %.1f ms at most, WAL %s to %s (%s) kept with it", plural(len(m.Topology.Units()), "cut"),
						m.Cut.SpreadMS/1000, m.Cut.FreezeMS, m.Bracket.StartLSN, m.Bracket.End, plural(len(m.Bracket.WAL), "segment"))
				default:
					a.line("  frozen for %.1f ms, snapshot requests within %.1f ms, flushed WAL %s", m.Cut.FreezeMS, m.Cut.SpreadMS, m.Cut.FlushLSN)
				}
				a.notes(append(m.Server.Notes, m.Cut.Notes...))
				a.line("  not proven yet: run `cleancut verify %s`", m.ID)
			})
		},
	}
	options = a.backupFlags(c)
	return c
}

// backupFlags are those of all commands that take a backup. read checks them
// and adds what the configuration says.
func (a *app) backupFlags(c *cobra.Command) (read func() (flow.BackupOptions, error)) {
	var o flow.BackupOptions
	var mode, checkpoint string
	cutFlags(c, &o, &mode)
	c.Flags().StringVar(&checkpoint, "checkpoint", "spread", "with --mode bracketed: spread or fast")
	return func() (_ flow.BackupOptions, err error) {
		if o.Mode, err = backupMode(mode); err != nil {
			return o, err
		}
		switch {
		case checkpoint != "spread" && checkpoint != "fast":
			return o, fmt.Errorf("%w: --checkpoint %q: spread or fast", backup.ErrUsage, checkpoint)
		case c.Flags().Changed("checkpoint") && o.Mode != backup.ModeBracketed:
			return o, fmt.Errorf("%w: --checkpoint goes with --mode bracketed: the other modes have none", backup.ErrUsage)
		}
		o.FastCheckpoint = checkpoint == "fast"
		if o.Deadline <= 0 || o.Quick <= 0 || o.Rounds < 1 {
			return o, fmt.Errorf("%w: --deadline, --max-sync and --sync-rounds must be above zero", backup.ErrUsage)
		}
		s, err := a.settings()
		if err != nil {
			return o, err
		}
		if s.cluster.Provider == "local" && o.Mode == backup.ModeGroup {
			return o, backup.Hint(fmt.Errorf("%w: mode group: the local provider cannot cut several volumes at one instant by itself", backup.ErrUsage), "use --mode freeze")
		}
		if s.cluster.Provider == "ec2" && !c.Flags().Changed("deadline") {
			o.Deadline = ec2Deadline
		}
		o.Target, o.KeepAway = s.target(), s.keepAway()
		return o, nil
	}
}

func cutFlags(c *cobra.Command, o *flow.BackupOptions, mode *string) {
	c.Flags().StringVar(mode, "mode", "auto", "auto, group, freeze or bracketed")
	c.Flags().DurationVar(&o.Deadline, "deadline", 10*time.Second, "the watchdog thaws this long after the freeze began (ec2: 30s)")
	c.Flags().DurationVar(&o.Quick, "max-sync", 100*time.Millisecond, "freeze only after a syncfs as quick as this")
	c.Flags().IntVar(&o.Rounds, "sync-rounds", 50, "give up after so many syncfs rounds")
	c.Flags().BoolVar(&o.AllowForeign, "allow-foreign", false, "freeze other data on the cluster's filesystems along with it")
	c.Flags().BoolVar(&o.AllowNoFPW, "allow-no-full-page-writes", false, "the volumes never tear an 8 KiB write: accept full_page_writes=off")
}

// backupMode turns the mode asked for into the one to use. A mode that cannot
// be had is refused, never replaced in silence.
func backupMode(mode string) (backup.Mode, error) {
	switch backup.Mode(mode) {
	case backup.ModeAuto, backup.ModeGroup, backup.ModeFreeze, backup.ModeBracketed:
		return backup.Mode(mode), nil
	}
	return "", fmt.Errorf("%w: mode %q: auto, group, freeze or bracketed", backup.ErrUsage, mode)
}

func (a *app) notes(notes []string) {
	for _, n := range notes {
		a.line("  note: %s", n)
	}
}
