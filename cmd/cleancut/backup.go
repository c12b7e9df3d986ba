package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) backupCommand() *cobra.Command {
	var o flow.BackupOptions
	var mode string
	c := &cobra.Command{
		Use: "backup", GroupID: "main", Args: exactly(0, ""),
		Short: "Take one backup",
		Long: `Take one backup: freeze every filesystem of the cluster, snapshot all volumes at
once, thaw, and record what was achieved. Before the freeze, dirty data is
written out until little is left, so that the stop is short; no checkpoint is
forced and no backup mode is needed.

A watchdog in a process of its own thaws everything at the deadline, whatever
happens to this command; then the backup is void (exit 3) and its snapshots
are deleted.`,
		Example: "  cleancut backup\n  cleancut backup --json --deadline 5s",
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			if o.Mode, err = backupMode(mode); err != nil {
				return err
			}
			if o.Deadline <= 0 || o.Quick <= 0 || o.Rounds < 1 {
				return fmt.Errorf("%w: --deadline, --max-sync and --sync-rounds must be above zero", backup.ErrUsage)
			}
			f, s, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			o.Target, o.KeepAway = s.target(), s.keepAway()
			m, err := f.Backup(c.Context(), o)
			if err != nil {
				return err
			}
			return a.print(m, func() {
				a.line("backup %s: %s cut of %d volumes (%s)", m.ID, m.Cut.Achieved, len(m.Snapshots), m.Cut.How)
				a.line("  frozen for %.1f ms, snapshot requests within %.1f ms, flushed WAL %s", m.Cut.FreezeMS, m.Cut.SpreadMS, m.Cut.FlushLSN)
				a.notes(append(m.Server.Notes, m.Cut.Notes...))
				a.line("  not proven yet: run `cleancut verify %s`", m.ID)
			})
		},
	}
	cutFlags(c, &o, &mode)
	return c
}

func cutFlags(c *cobra.Command, o *flow.BackupOptions, mode *string) {
	c.Flags().StringVar(mode, "mode", "auto", "auto, group, freeze or bracketed")
	c.Flags().DurationVar(&o.Deadline, "deadline", 10*time.Second, "the watchdog thaws this long after the freeze began")
	c.Flags().DurationVar(&o.Quick, "max-sync", 100*time.Millisecond, "freeze only after a syncfs as quick as this")
	c.Flags().IntVar(&o.Rounds, "sync-rounds", 50, "give up after so many syncfs rounds")
	c.Flags().BoolVar(&o.AllowForeign, "allow-foreign", false, "freeze other data on the cluster's filesystems along with it")
	c.Flags().BoolVar(&o.AllowNoFPW, "allow-no-full-page-writes", false, "the volumes never tear an 8 KiB write: accept full_page_writes=off")
}

// backupMode turns the mode asked for into the one to use. A mode that cannot
// be had is refused, never replaced in silence.
func backupMode(mode string) (backup.Mode, error) {
	switch backup.Mode(mode) {
	case backup.ModeAuto, backup.ModeFreeze:
		return backup.ModeFreeze, nil // auto: no provider so far has a group
	case backup.ModeGroup:
		return "", backup.Hint(fmt.Errorf("%w: mode group: the local provider cannot cut several volumes at one instant by itself: %w", backup.ErrUsage, backup.ErrUnsupported), "use --mode freeze")
	case backup.ModeBracketed:
		return "", fmt.Errorf("%w: mode bracketed: %w", backup.ErrUsage, backup.ErrNotThere)
	}
	return "", fmt.Errorf("%w: mode %q: auto, group, freeze or bracketed", backup.ErrUsage, mode)
}

func (a *app) notes(notes []string) {
	for _, n := range notes {
		a.line("  note: %s", n)
	}
}
