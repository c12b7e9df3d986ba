package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

// cloneConfig is [clone].
type cloneConfig struct {
	MaxTTL backup.Span `toml:"max_ttl"` // 0: backup.DefaultMaxTTL
	Max    int         `toml:"max"`     // 0: backup.DefaultClones
}

func (a *app) cloneCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "clone", GroupID: "main", Args: known("see `cleancut clone --help`"),
		Short: "Make copies of backups for people: with a name, an owner and an end",
		Long: `Make copies of backups that people work with. A clone is a copy as "cleancut
restore" makes it, isolated from production, with volumes, array identity,
mounts and socket folder of its own; any number stand beside one another. It has
a name, an owner and a lease: when that has ended "cleancut clone reap" removes
it, unless somebody uses it.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return backup.Hint(fmt.Errorf("%w: clone wants one of create, list, show, extend, start, psql, destroy, reap", backup.ErrUsage), "see `cleancut clone --help`")
		},
	}
	c.AddCommand(a.cloneCreateCommand(), a.cloneListCommand(), a.cloneShowCommand(), a.cloneExtendCommand(), a.cloneStartCommand(), a.clonePsqlCommand(), a.cloneDestroyCommand(), a.cloneReapCommand())
	return c
}

func (a *app) cloneCreateCommand() *cobra.Command {
	var o flow.CloneOptions
	var ttl string
	var latest bool
	c := &cobra.Command{
		Use: "create ID --name NAME | --latest --name NAME", Args: cobra.MaximumNArgs(1),
		Short: "Make a clone of a backup",
		Long: `Make a clone of a backup. Its folder is clones/NAME below the state folder, or
--to DIR. Its lease ends after --ttl, and never later than max_ttl ([clone] in
the configuration, default 7d) after its creation; at most max (default 10)
clones stand on a host.

The masks (--mask, in their order) run before anybody else can connect; where
one fails the clone is removed. Passwords of roles are reset unless
--keep-passwords. Without --listen only root and the owner of the data reach it,
by its socket: see "cleancut clone psql".`,
		Example: "  cleancut clone create 20261122T211704Z-5f3a9c --name qa-1 --purpose 'ticket 4711' --ttl 8h\n  cleancut clone create --latest --name qa-2 --golden --mask /etc/cleancut/mask.sql --listen 10.0.0.5:5433",
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case o.Name == "":
				return backup.Hint(fmt.Errorf("%w: clone create wants --name NAME", backup.ErrUsage), "see `cleancut clone create --help`")
			case latest == (len(args) == 1):
				return backup.Hint(fmt.Errorf("%w: clone create wants the id of a backup, or --latest", backup.ErrUsage), "see `cleancut list`")
			}
			var err error
			if len(args) == 1 {
				if o.ID, err = backup.ParseID(args[0]); err != nil {
					return err
				}
			}
			if ttl != "" {
				if o.TTL, err = backup.ParseSpan(ttl); err != nil {
					return fmt.Errorf("--ttl: %w", err)
				}
				if o.TTL == 0 {
					return fmt.Errorf("%w: --ttl must be above zero", backup.ErrUsage)
				}
			}
			f, s, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			if s.Clone.Max < 0 {
				return fmt.Errorf("%w: max = %d under [clone]", backup.ErrUsage, s.Clone.Max)
			}
			o.MaxTTL, o.Most = s.Clone.MaxTTL, s.Clone.Max
			if latest {
				if o.ID, err = f.LatestProven(c.Context()); err != nil {
					return err
				}
			}
			status, err := f.CreateClone(c.Context(), o)
			if err != nil {
				return err
			}
			return a.print(status, func() {
				a.cloneText(status)
				a.line("  extend:   cleancut clone extend %s --by 4h", status.Name)
				a.line("  destroy:  cleancut clone destroy %s", status.Name)
			})
		},
	}
	c.Flags().BoolVar(&latest, "latest", false, "of the newest backup whose last verdict is good, instead of an ID")
	c.Flags().StringVar(&o.Name, "name", "", "name of the clone, unique on this host")
	c.Flags().StringVar(&o.Owner, "owner", cmp.Or(os.Getenv("SUDO_USER"), os.Getenv("USER")), "who answers for it")
	c.Flags().Lookup("owner").DefValue = "" // it would differ from user to user
	c.Flags().Lookup("owner").Usage += " (default $SUDO_USER, else $USER)"
	c.Flags().StringVar(&o.Purpose, "purpose", "", "what it is for, for whoever finds it")
	c.Flags().StringVar(&ttl, "ttl", "", "how long it stands: 8h, 3d (default 8h, or max_ttl if that is shorter)")
	c.Flags().StringVar(&o.Root, "to", "", "its folder, new or empty (default clones/NAME below the state folder)")
	c.Flags().BoolVar(&o.Golden, "golden", false, "make it of the backup's golden image, which needs no recovery and is made if there is none")
	c.Flags().StringArrayVar(&o.Mask, "mask", nil, "FILE with SQL, or DATABASE:FILE, to run before anybody else can connect; may be given several times")
	c.Flags().BoolVar(&o.KeepPasswords, "keep-passwords", false, "do not reset the passwords of roles")
	c.Flags().StringVar(&o.Listen, "listen", "", "ADDRESS:PORT where it takes TCP connections, with passwords (default: none)")
	return c
}

func (a *app) cloneListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Args: exactly(0, ""), Aliases: []string{"ls"},
		Short: "List the clones of this host, until when they stand and who uses them",
		Long: `List the clones of this host: ready, expired (its lease has ended), down (with
what is not there), being made, being removed, half made or half removed (its
process died: "cleancut sweep" removes it), ledger lost (this host's state has
lost it; "cleancut sweep" removes it, or where somebody uses it puts the ledger
back).`,
		RunE: func(c *cobra.Command, _ []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			list, err := f.Clones(c.Context())
			perr := a.print(map[string]any{"clones": list}, func() {
				rows := [][]string{{"NAME", "OWNER", "STATE", "UNTIL", "SESSIONS", "BACKUP", "GOLDEN", "AT", "PURPOSE"}}
				for _, s := range list {
					golden := ""
					if s.Golden {
						golden = string(s.MadeOf)
					}
					rows = append(rows, []string{s.Name, s.Owner, stateText(s), s.Expires.Local().Format(time.DateTime), sessionsOr(s), string(s.Backup), golden, s.Root, s.Purpose})
				}
				a.table(rows)
			})
			return errors.Join(err, perr)
		},
	}
}

// stateText is a clone's state with what is not there.
func stateText(s flow.CloneStatus) string {
	if s.Down == "" {
		return s.State
	}
	return s.State + ": " + strings.ReplaceAll(s.Down, "\n", " ")
}

// sessionsOr writes how many sessions a clone has, if that is known.
func sessionsOr(s flow.CloneStatus) string {
	if s.Sessions == nil {
		return "?"
	}
	return fmt.Sprint(s.Sessions.Count)
}

func (a *app) cloneShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Args: exactly(1, "the name of a clone"),
		Short: "Show one clone: its lease, its state, who uses it and how to connect",
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			s, err := f.Clone(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(s, func() { a.cloneText(s) })
		},
	}
}

func (a *app) cloneExtendCommand() *cobra.Command {
	var ttl, by string
	c := &cobra.Command{
		Use: "extend NAME --ttl 4h | --by 4h", Args: exactly(1, "the name of a clone"),
		Short: "Let a clone stand longer",
		Long: `Let a clone stand for --ttl from now on, or --by so much longer than so far. It
never stands longer than max_ttl ([clone] in the configuration, as it was when
the clone was made) after its creation.`,
		RunE: func(c *cobra.Command, args []string) error {
			if (ttl == "") == (by == "") {
				return backup.Hint(fmt.Errorf("%w: clone extend wants either --ttl or --by", backup.ErrUsage), "usage: "+c.UseLine())
			}
			span, err := backup.ParseSpan(ttl + by)
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			s, err := f.ExtendClone(c.Context(), args[0], span, by != "")
			if err != nil {
				return err
			}
			return a.print(s, func() { a.cloneText(s) })
		},
	}
	c.Flags().StringVar(&ttl, "ttl", "", "how long from now: 4h, 2d")
	c.Flags().StringVar(&by, "by", "", "how much longer than so far: 4h, 2d")
	return c
}

func (a *app) cloneStartCommand() *cobra.Command {
	return &cobra.Command{
		Use: "start NAME", Args: exactly(1, "the name of a clone"),
		Short: "Bring a clone up again whose server is down, also after a reboot",
		Long: `Bring a clone up again: its volumes are attached, assembled and mounted where
they are not, and its server is started. The data is as it was. One that answers
is left alone.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			s, err := f.StartClone(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(s, func() { a.cloneText(s) })
		},
	}
}

func (a *app) clonePsqlCommand() *cobra.Command {
	return &cobra.Command{
		Use: "psql NAME [-- ARGS...]", Args: cobra.MinimumNArgs(1),
		Short: "Run psql on a clone, as its superuser",
		Long: `Become psql of the clone's major version at its socket, as its superuser. What
follows -- is psql's.`,
		Example: "  cleancut clone psql qa-1\n  cleancut clone psql qa-1 -- -X -d shop -c 'SELECT count(*) FROM orders'",
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			path, argv, env, err := f.ClonePsql(c.Context(), args[0], args[1:])
			if err != nil {
				return err
			}
			return fmt.Errorf("run %s: %w", path, unix.Exec(path, argv, env))
		},
	}
}

func (a *app) cloneDestroyCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "destroy NAME", Args: exactly(1, "the name of a clone"),
		Short: "Remove a clone",
		Long: `Remove a clone: its server, mounts, arrays and volumes. One that somebody is
connected to is refused unless --force is given.`,
		RunE: func(c *cobra.Command, args []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			removed, err := f.DestroyClone(c.Context(), args[0], force)
			if err != nil {
				return err
			}
			return a.print(removed, func() { a.line("clone %s at %s is removed", args[0], removed.Root) })
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also where somebody is connected")
	return c
}

func (a *app) cloneReapCommand() *cobra.Command {
	var yes, force bool
	var most int
	c := &cobra.Command{
		Use: "reap", Args: exactly(0, ""),
		Short: "Remove the clones whose lease has ended and that nobody uses",
		Long: `Remove the clones whose lease has ended, the one that ended first first. Without
--yes the plan is shown and nothing is done. One that somebody is connected to
is kept, and so is one whose server runs and cannot be asked, unless --force is
given. At most --max are removed in one run: a wrong clock does not take all.`,
		Example: "  cleancut clone reap          # only show the plan\n  cleancut clone reap --yes",
		RunE: func(c *cobra.Command, _ []string) error {
			if most < 1 {
				return fmt.Errorf("%w: --max must be at least 1", backup.ErrUsage)
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			plan, err := f.PlanReap(c.Context(), most, force)
			if err != nil {
				return err
			}
			done := []flow.Reaped{}
			if yes {
				done, err = f.Reap(c.Context(), plan, force)
			} else {
				for _, p := range plan {
					done = append(done, flow.Reaped{ReapAction: p})
				}
			}
			perr := a.print(map[string]any{"dry_run": !yes, "ok": err == nil, "actions": done}, func() { a.reapText(done, yes) })
			return cmp.Or(err, perr)
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do it, instead of only showing the plan")
	c.Flags().BoolVar(&force, "force", false, "also those that somebody is connected to")
	c.Flags().IntVar(&most, "max", 5, "remove at most so many in one run")
	return c
}

func (a *app) reapText(actions []flow.Reaped, yes bool) {
	if len(actions) == 0 {
		a.line("no lease has ended")
		return
	}
	var rows [][]string
	for _, r := range actions {
		did := "destroy"
		switch {
		case !r.Destroy:
			did = "keep"
		case r.Error != "":
			did, r.Why = "destroy: FAILED", strings.ReplaceAll(r.Error, "\n", "; ")
		case r.Kept != "":
			did, r.Why = "keep", r.Kept
		case r.Done:
			did = "destroy: done"
		}
		rows = append(rows, []string{did, r.Name, r.Owner, r.Why})
	}
	a.table(rows)
	if !yes {
		a.line("nothing was done: add --yes")
	}
}

func (a *app) cloneText(s flow.CloneStatus) {
	of := "backup " + string(s.Backup)
	if s.Golden {
		of += " (golden image " + string(s.MadeOf) + ")"
	}
	a.line("clone %s of %s: %s", s.Name, of, stateText(s))
	a.line("  owner:    %s", s.Owner)
	if s.Purpose != "" {
		a.line("  purpose:  %s", s.Purpose)
	}
	a.line("  until:    %s (it can be extended to %s)", s.Expires.Local().Format(time.DateTime), s.Longest.Local().Format(time.DateTime))
	if len(s.Masked) > 0 {
		a.line("  masked:   %s", strings.Join(s.Masked, ", "))
	}
	if s.Sessions != nil && s.Sessions.Count > 0 {
		a.line("  sessions: %d, the newest query %s ago", s.Sessions.Count, time.Duration(*s.Sessions.Newest*float64(time.Second)).Round(time.Second))
	}
	a.line("  folder:   %s", s.Root)
	if s.SocketDir == "" {
		return
	}
	a.line("  connect:  cleancut clone psql %s", s.Name)
	a.line("            psql -h %s -p %d -U %s", s.SocketDir, s.Port, s.Superuser)
	if s.Listen != "" {
		a.line("  TCP:      %s, with a password", s.Listen)
	}
}
