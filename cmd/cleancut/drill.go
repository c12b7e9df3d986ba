package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
)

func (a *app) drillCommand() *cobra.Command {
	o := drill.Options{Version: version}
	var lists gridFlags
	var size, provider, judge string
	var here bool
	c := &cobra.Command{
		Use: "drill", GroupID: "look", Args: exactly(0, ""),
		Short: "Repeat the experiment: cut under chosen conditions many times, judge every image, count the damage",
		Long: `Repeat the experiment: put a PostgreSQL of its own under load, cut its volumes
in every way of the grid, restore each image and judge it. Flags that take
lists are combined, each value with each of all others.

Each image is recovered in the ways of --recovery. crash: on the image alone,
as after a power failure; of a bracketed cut too, whose label and WAL are then
left aside, which shows what they are for. archive: a bracketed cut by its
label and the WAL kept with it, any other by WAL shipped into a catalog, to a
moment shortly after the cut.

An image is one of: sound; lost (acknowledged commits are missing); phantom
(rows never committed, never sent, or half of a transaction); silent (the
server starts and the rows are right, another check fails); nostart; nomount;
fsdamage (mounts, and the filesystem's own check fails). The first thing that a
restore would meet names it.

Results are lines in the output folder. A drill that was stopped goes on where
it was; the same seed with more --trials, or another seed, adds to them. The
seed makes the conditions of every trial again (load, order, moment of the
cut), not how the machine schedules them.

Runs natively as root where the kernel has what the cell needs (separate: loop
devices; raid0, linear: md arrays; lvm, lvm-striped and mode group: device
mapper), else in a user-mode Linux guest. With --provider ec2 the volumes are
those of an EC2 test server, reached through the AWS SDK, which also cuts
groups: one call, so no skew. A cell of the grid that cannot be done is named,
and nothing is begun. Only mode none makes torn sets; no other command restores
them. The exit code is 4 if any cut that was held is damaged; of a bracketed
one only its archive recovery counts.`,
		Example: "  cleancut drill --mode freeze,none --skew 0,5s --load heavy --trials 3",
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.Grid, err = lists.grid(); err != nil {
				return err
			}
			if o.VolumeSize, err = backup.ParseBytes(size); err != nil {
				return err
			}
			if o.Program, err = os.Executable(); err != nil {
				return fmt.Errorf("own program: %w", err)
			}
			if o.Out, err = filepath.Abs(o.Out); err != nil {
				return fmt.Errorf("%w: output folder: %w", backup.ErrUsage, err)
			}
			if o.Report == "" {
				o.Report = filepath.Join(o.Out, "report.html")
			}
			if o.Report, err = filepath.Abs(o.Report); err != nil {
				return fmt.Errorf("%w: report: %w", backup.ErrUsage, err)
			}
			o.Grid.Provider = provider
			o.Progress, o.Log = a.err, a.log
			if judge != "" {
				return a.judgeKept(c.Context(), o, judge)
			}
			if here {
				return drill.Inside(c.Context(), o)
			}
			res, err := drill.Run(c.Context(), o)
			if len(res.Cells) == 0 && err != nil {
				return err
			}
			if perr := a.print(res, func() { a.drillText(res) }); perr != nil {
				return perr
			}
			return errors.Join(err, res.Alarm())
		},
	}
	f := c.Flags()
	lists.define(f)
	f.StringVar(&provider, "provider", drill.Local, "who owns the volumes: local, or ec2, a test server over the same pool")
	f.IntVar(&o.Trials, "trials", 1, "trials of each cell; those already in the output folder count")
	f.Int64Var(&o.Seed, "seed", 1, "of the load, the order of the cells and the moments of the cuts")
	f.StringVar(&o.Out, "out", "cleancut-drill", "folder of the results; they add up there")
	f.StringVar(&o.Keep, "keep", drill.KeepNone, "image sets to keep in the output folder: none, damaged or all")
	f.StringVar(&o.Report, "report", "", "file for the report; its data goes beside it (default: report.html in the output folder)")
	f.Int64Var(&o.Rows, "rows", 20000, "rows of the play database")
	f.StringVar(&size, "size", "1G", "size of each volume")
	f.StringVar(&judge, "judge", "", "judge this folder of kept images once more, and do nothing else")
	f.BoolVar(&here, "here", false, "make trials in this process's kernel, whatever it is, and nothing else")
	_ = f.MarkHidden("here")
	return c
}

// judgeKept judges one image set; damage in it is a result, not a failure.
func (a *app) judgeKept(ctx context.Context, o drill.Options, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("%w: kept images: %w", backup.ErrUsage, err)
	}
	j, err := drill.JudgeKept(ctx, o, dir)
	if err != nil {
		return err
	}
	return a.print(j, func() {
		for _, one := range j.Judgements {
			a.line("\n%s, %s recovery: %s", j.Backup, one.Recovery, cmp.Or(string(one.Class), "not judged"))
			if one.Reason != "" {
				a.line("  %s", one.Reason)
			}
			a.checksText(one.Checks)
		}
	})
}

// gridFlags are the flags that take lists.
type gridFlags struct {
	mode, skew, order, volumes, chunk, layout, fs, load, checkpoint, recovery []string
}

// flagSet is the part of cobra's flags that define needs.
type flagSet interface {
	StringSliceVar(p *[]string, name string, value []string, usage string)
}

func (g *gridFlags) define(f flagSet) {
	for _, l := range []struct {
		into              *[]string
		name, value, text string
	}{
		{&g.mode, "mode", "freeze,none", "ways to cut: freeze, group (needs --provider ec2), bracketed (each filesystem by itself, in backup mode), none (nothing is held)"},
		{&g.skew, "skew", "0,5s", "time between members, from the answer for one to the request for the next"},
		{&g.order, "order", "forward", "of the members, with a skew: forward (data, WAL, tablespaces, or the slots; bracketed: data, tablespaces, WAL), backward"},
		{&g.volumes, "volumes", "4", "numbers of volumes"},
		{&g.chunk, "chunk", "64K", "chunk sizes of a stripe, 4K to 1M"},
		{&g.layout, "layout", "raid0", "raid0, linear, lvm, lvm-striped; separate: data, WAL and tablespaces on volumes of their own"},
		{&g.fs, "fs", "xfs", "filesystems: xfs, ext4"},
		{&g.load, "load", "heavy", "light, heavy or metadata"},
		{&g.checkpoint, "checkpoint", "none", "before: one ends right before each cut; none"},
		{&g.recovery, "recovery", "crash,archive", "ways to recover each image: crash (the image alone), archive (with the WAL kept with a bracketed one, or shipped)"},
	} {
		f.StringSliceVar(l.into, l.name, strings.Split(l.value, ","), l.text)
	}
}

// grid reads the lists.
func (g *gridFlags) grid() (out drill.Grid, err error) {
	out = drill.Grid{Orders: g.order, Layouts: g.layout, Filesystems: g.fs, Loads: g.load, Checkpoints: g.checkpoint, Recoveries: g.recovery}
	for _, m := range g.mode {
		out.Modes = append(out.Modes, backup.Mode(m))
	}
	for _, s := range g.skew {
		d, err := time.ParseDuration(s)
		if err != nil {
			return out, fmt.Errorf("%w: skew %q: 0, 100ms, 5s", backup.ErrUsage, s)
		}
		out.Skews = append(out.Skews, d)
	}
	for _, v := range g.volumes {
		n, err := strconv.Atoi(v)
		if err != nil {
			return out, fmt.Errorf("%w: volumes %q: a number", backup.ErrUsage, v)
		}
		out.Volumes = append(out.Volumes, n)
	}
	for _, s := range g.chunk {
		b, err := backup.ParseBytes(s)
		if err != nil {
			return out, err
		}
		out.Chunks = append(out.Chunks, b)
	}
	return out, nil
}

func (a *app) drillText(s drill.Summary) {
	rows := [][]string{{"MODE", "SKEW", "RECOVERY", "CONDITIONS", "TRIALS"}}
	for _, c := range drill.Classes() {
		rows[0] = append(rows[0], strings.ToUpper(string(c)))
	}
	rows[0] = append(rows[0], "DAMAGED", "95 % INTERVAL")
	for _, c := range s.Cells {
		conditions := c.Ground()
		if c.Order != "" {
			conditions += ", " + c.Order
		}
		if c.Checkpoint == drill.CheckpointBefore {
			conditions += ", checkpoint before"
		}
		row := []string{string(c.Mode), c.Skew().String(), c.Recovery, conditions, strconv.Itoa(c.Trials)}
		for _, class := range drill.Classes() {
			row = append(row, strconv.Itoa(c.Count(class)))
		}
		rows = append(rows, append(row, fmt.Sprintf("%.0f %%", 100*c.Share), fmt.Sprintf("%.1f to %.1f %%", 100*c.Lower, 100*c.Upper)))
	}
	a.table(rows)
	a.line("")
	for _, c := range s.Cells {
		a.line("%s", c.Said)
		if c.Unjudged > 0 {
			a.line("  %d of these could not be judged and are not counted; the same command tries them again", c.Unjudged)
		}
	}
	if s.Interrupted {
		a.line("\nInterrupted: what was judged is kept, and the same command goes on from here.")
	}
	a.line("\nreport: %s\ndata:   %s", s.Report, s.JSON)
}
