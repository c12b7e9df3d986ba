package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/postgres"
)

func (a *app) standbyCommand() *cobra.Command {
	var o flow.StandbyOptions
	var primary string
	c := &cobra.Command{
		Use: "standby ID --to DIR", GroupID: "main", Args: cobra.ArbitraryArgs, // looked at below
		Short: "Make a warm standby of a backup, which follows production",
		Long: `Make a copy of a backup, as "cleancut restore" does, that stays in recovery and
follows the primary by streaming replication. It can be read and promoted.

A replication slot of its own lets the primary keep the WAL that it needs. WAL
that the primary has no longer comes from the catalog (see "cleancut wal"),
until the standby streams; then this command ends. What neither has is refused
before anything is made.

All else of the copy is isolated as that of any other: it archives nothing, has
no subscriptions, writes only below DIR, and is never a synchronous standby. A
slot that nobody reads keeps WAL on the primary for ever: remove the standby
with "cleancut standby remove DIR" (or "restore --undo DIR"), which drops it.`,
		Example: "  cleancut standby 20261122T211704Z-5f3a9c --to /srv/standby\n  cleancut standby status /srv/standby\n  cleancut standby promote /srv/standby\n  cleancut standby remove /srv/standby",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 || o.Root == "" {
				return backup.Hint(fmt.Errorf("%w: standby wants the id of a backup and --to DIR, or one of list, status, start, promote, remove", backup.ErrUsage), "see `cleancut standby --help`")
			}
			var err error
			if o.ID, err = backup.ParseID(args[0]); err != nil {
				return err
			}
			f, s, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			o.Primary = s.target()
			if primary != "" {
				o.Primary = postgres.Target{DSN: primary}
			}
			status, release, err := f.Standby(c.Context(), o)
			if err != nil {
				return err
			}
			defer release()
			return a.print(status, func() {
				a.standbyText(status)
				a.line("  promote:  cleancut standby promote %s", status.Root)
				a.line("  remove:   cleancut standby remove %s", status.Root)
			})
		},
	}
	c.Flags().StringVar(&o.Root, "to", "", "folder of the copy, new or empty")
	c.Flags().StringVar(&primary, "primary", "", "connection string of the server to follow (default: dsn of the cluster)")
	c.Flags().StringVar(&o.Slot, "slot", "", "replication slot to make on it (default: a new name for every standby)")
	c.Flags().StringVar(&o.Listen, "listen", "", "ADDRESS:PORT where the standby takes TCP connections, with passwords (default: none)")
	c.AddCommand(a.standbyListCommand(), a.standbyStatusCommand(), a.standbyStartCommand(), a.standbyPromoteCommand(), a.standbyRemoveCommand())
	return c
}

func (a *app) standbyListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Args: exactly(0, ""), Aliases: []string{"ls"},
		Short: "List the standbys of this host, how far behind they are and what they hold back",
		RunE: func(c *cobra.Command, _ []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			list, err := f.Standbys(c.Context())
			if err != nil {
				return err
			}
			return a.print(map[string]any{"standbys": list}, func() {
				rows := [][]string{{"STANDBY", "BACKUP", "STATE", "TIMELINE", "LAG", "HELD ON THE PRIMARY", "AT"}}
				for _, s := range list {
					rows = append(rows, []string{string(s.ID), string(s.Backup), s.State, fmt.Sprint(s.Timeline), sizeOr(s.LagBytes), sizeOr(s.HeldBack), s.Root})
				}
				a.table(rows)
			})
		},
	}
}

// sizeOr writes a size that may not be known.
func sizeOr(b *backup.Bytes) string {
	if b == nil {
		return "?"
	}
	return b.String()
}

func (a *app) standbyStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status DIR", Args: exactly(1, "the folder of a standby"),
		Short: "Show whether a standby follows, how far behind it is, and why not",
		Long: `Show whether the standby in DIR follows its primary: streaming, catching up,
broken (with the reason; exit status 1) or promoted.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			s, err := f.StandbyStatus(c.Context(), args[0])
			if err != nil {
				return err
			}
			err = a.print(s, func() { a.standbyText(s) })
			if s.State == flow.Broken {
				err = errors.Join(err, fmt.Errorf("the standby at %s is broken: %s", s.Root, s.Why))
			}
			return err
		},
	}
}

func (a *app) standbyStartCommand() *cobra.Command {
	return &cobra.Command{
		Use: "start DIR", Args: exactly(1, "the folder of a standby"),
		Short: "Start the server of a standby that was stopped, or that follows no longer",
		Long: `Start the server of the standby in DIR where it does not run, and anew where it
follows no longer. What the primary has no longer comes from the catalog, as
far as that has it, and a slot that was lost is made again. The volumes must be
mounted: after a reboot of the host they are not, and the standby is made anew.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			s, err := f.StartStandby(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(s, func() { a.standbyText(s) })
		},
	}
}

func (a *app) standbyPromoteCommand() *cobra.Command {
	return &cobra.Command{
		Use: "promote DIR", Args: exactly(1, "the folder of a standby"),
		Short: "Make a standby a primary of its own",
		Long: `Promote the standby in DIR and wait until it is out of recovery. It does not ask
whether the primary is gone, and it stays isolated: it archives nothing and
takes no TCP connections unless --listen was given. Its slot on the primary is
dropped if that answers.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			p, err := f.PromoteStandby(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(p, func() {
				a.line("promoted: %s is on timeline %d; it has what the primary wrote before %s", p.Root, p.Timeline, p.From)
				if p.Slot != "" {
					a.line("  replication slot %s is left on the primary: %s", p.Slot, p.Why)
				}
			})
		},
	}
}

func (a *app) standbyRemoveCommand() *cobra.Command {
	var leave bool
	c := &cobra.Command{
		Use: "remove DIR", Args: exactly(1, "the folder of a standby"),
		Short: "Remove a standby and its slot on the primary",
		Long: `Remove the standby in DIR, its volumes, and its replication slot on the primary.
If the primary does not answer, all the rest is removed and the slot is named
(exit status 5); run it again, or "cleancut sweep", when the primary is back.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			removed, err := f.RemoveStandby(c.Context(), args[0], leave)
			if err != nil {
				return err
			}
			return a.print(removed, func() { a.line("standby %s at %s is removed", removed.ID, removed.Root) })
		},
	}
	c.Flags().BoolVar(&leave, "leave-slot", false, "give up on the slot: the primary is gone for ever, or it was dropped there by hand")
	return c
}

func (a *app) standbyText(s flow.StandbyStatus) {
	a.line("standby %s of backup %s: %s, timeline %d", s.ID, s.Backup, s.State, s.Timeline)
	if s.Why != "" {
		a.line("  %s", s.Why)
	}
	if s.LagBytes != nil && s.LagSeconds != nil {
		a.line("  replayed to %s, %s and %s behind the primary", s.Replayed, *s.LagBytes, time.Duration(*s.LagSeconds*float64(time.Second)).Round(time.Millisecond))
	}
	if s.Slot != "" {
		a.line("  slot %s (%s), for which the primary keeps %s of WAL", s.Slot, s.SlotStatus, sizeOr(s.HeldBack))
	}
	a.line("  connect:  psql -h %s -p %d -U %s", s.SocketDir, s.Port, s.Superuser)
}
