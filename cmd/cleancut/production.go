package main

import (
	"fmt"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

const productionHelp = `
--production is the way back after a real loss: on this host, which need never
have seen the original, the cluster is recovered and checked as an isolated copy,
then mounted where it was, with its own configuration and lines in fstab and
mdadm.conf, put into service on a new timeline, and started. From then on
nothing of cleancut removes it. It is refused while the original answers; where
that cannot be told, --original-is-gone says it, and you answer for it.
--archive-command is where WAL goes from now on: a new place, or '' for none.
docs/runbook.md has every step.
`

// productionFlags are those of restore --production.
type productionFlags struct {
	on   bool
	o    flow.ProductionOptions
	lvl  string
	only []string // flags that go with --production alone
}

func (p *productionFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&p.on, "production", false, "put the backup into the place of the original, which is lost")
	f.StringVar(&p.o.Archive, "archive-command", "", "archive_command from now on, '' for none (needed with --production)")
	f.StringVar(&p.o.Storage, "storage", "", "with --production: name of its storage for \"cleancut storage attach\" (default: the cluster's)")
	f.StringVar(&p.o.Fstab, "fstab", "/etc/fstab", "with --production: file for the mount lines")
	f.StringVar(&p.o.MdadmConf, "mdadm-conf", "/etc/mdadm/mdadm.conf", "with --production: file for the array lines")
	f.StringVar(&p.lvl, "level", string(backup.LevelStart), "with --production: how deep it is checked before, start or rows")
	f.BoolVar(&p.o.OriginalGone, "original-is-gone", false, "the original is down and stays so, though that cannot be told from here")
	f.BoolVar(&p.o.Start, "start", true, "start the server; --start=false only says how")
	p.only = []string{"archive-command", "storage", "fstab", "mdadm-conf", "level", "original-is-gone", "start"}
}

// check refuses flags that do not go together.
func (p *productionFlags) check(c *cobra.Command, to, undo string) error {
	if !p.on {
		for _, name := range p.only {
			if c.Flags().Changed(name) {
				return fmt.Errorf("%w: --%s goes with --production", backup.ErrUsage, name)
			}
		}
		return nil
	}
	switch {
	case to != "" || undo != "":
		return fmt.Errorf("%w: --production goes to the original's own places: neither --to nor --undo", backup.ErrUsage)
	case !c.Flags().Changed("archive-command"):
		return backup.Hint(fmt.Errorf("%w: --production wants --archive-command: where WAL goes from now on, '' for nowhere", backup.ErrUsage),
			"a new place, never the original's: cleancut wal push --cluster NEWNAME %p")
	case p.lvl != string(backup.LevelStart) && p.lvl != string(backup.LevelRows):
		return fmt.Errorf("%w: --level %q: start or rows (full writes to the databases)", backup.ErrUsage, p.lvl)
	}
	return nil
}

func (p *productionFlags) options(id backup.ID, until flow.Recovery, s settings) flow.ProductionOptions {
	o := p.o
	o.ID, o.Recovery, o.Target, o.Catalog, o.Level = id, until, s.target(), s.Catalog, backup.Level(p.lvl)
	return o
}

// produce prints what stands, also where the server did not start. hydrate, if
// not nil, reads its volumes through afterwards.
func (a *app) produce(c *cobra.Command, f *flow.Flow, s settings, o flow.ProductionOptions, hydrate *flow.HydrateOptions) error {
	p, err := f.Produce(c.Context(), o)
	if p.Copy.ID == "" {
		return err
	}
	if hydrate != nil && err == nil {
		stop := a.bars(hydrate)
		after, herr := f.HydrateAt(c.Context(), p.Copy.Root, *hydrate)
		stop()
		if err = herr; after.ID != "" {
			p.Copy = after
		}
	}
	if perr := a.print(p, func() { a.producedText(p, s) }); err == nil {
		err = perr
	}
	return err
}

func (a *app) producedText(p flow.Produced, s settings) {
	c := p.Copy
	state := "is in service"
	if !p.Started {
		state = "stands, and is not running"
	}
	a.line("cluster %s %s in %s: backup %s, recovered to %s, now on timeline %d", c.Cluster, state, c.DataDirectory, c.Backup, c.EndOfRecovery, p.Timeline)
	for _, answer := range p.Answers {
		a.line("  original:  %s: %s", answer.Address, answer.Voice)
	}
	for i, fs := range c.Filesystems {
		a.line("  mounted:   %s on %s (storage %s)", fs.Device, fs.Mountpoint, c.Production.Storages[i])
	}
	lines := c.Production.Fstab
	if p.Arrays {
		lines += ", " + c.Production.MdadmConf
	}
	a.line("  lines in:  %s", lines)
	if h := c.Hydrated; h != nil {
		a.line("  hydrated:  %s of %s", h.Bytes, h.Size)
	} else if s.cluster.Provider == "ec2" {
		a.line("  not hydrated: its volumes fetch each block from the snapshot when it is first read, slowly")
	}
	if p.Config != "" {
		a.line("  config:    %s", p.Config)
	}
	for _, file := range c.Production.Files {
		if file.KeptAs != "" {
			a.line("  replaced:  %s; what was here is %s", file.Path, file.KeptAs)
		}
	}
	for _, left := range p.Alone {
		a.line("  not placed: %s", left)
	}
	if p.Archive != "" {
		a.line("  archive:   %s", p.Archive)
	} else {
		a.line("  archive:   NONE. What is committed from now on is in no backup until the next one is taken")
	}
	if len(p.Slots) > 0 {
		a.line("  lost:      replication slots %s: their standbys and subscribers must be made anew", strings.Join(p.Slots, ", "))
	}
	if len(p.Subscriptions) > 0 {
		a.line("  disabled:  subscriptions %s: their publisher may have moved on; see docs/runbook.md", strings.Join(p.Subscriptions, ", "))
	}
	if p.Synchronous != "" {
		a.line("  emptied:   synchronous_standby_names (was %q): no commit waits for standbys that are to be made anew", p.Synchronous)
	}
	if p.Arrays {
		if _, err := exec.LookPath("update-initramfs"); err == nil {
			a.line("  then:      update-initramfs -u (it carries mdadm.conf)")
		}
	}
	if s.cluster.Provider == "local" {
		a.line("  at boot:   %s, from a unit: docs/operations.md, After a reboot", attachCommands(c.Production.Storages))
	}
	if !p.Started {
		a.line("  start:     %s", quoted(p.StartCommand))
		return
	}
	a.line("  connect:   psql -h %s -p %d -U %s", c.SocketDir, c.Port, c.Superuser)
	a.line("  started:   %s", quoted(p.StartCommand))
}

func attachCommands(storages []string) string {
	var out []string
	for _, name := range storages {
		if name != "" {
			out = append(out, "cleancut storage attach "+name)
		}
	}
	return strings.Join(out, "; ")
}

// quoted writes a command as it is typed.
func quoted(command []string) string {
	var out []string
	for _, w := range command {
		if strings.ContainsAny(w, " '\"$\\*?;&|<>()") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		out = append(out, w)
	}
	return strings.Join(out, " ")
}
