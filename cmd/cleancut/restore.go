package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) restoreCommand() *cobra.Command {
	var to, undo, rate string
	var production productionFlags
	var recovery func() (flow.Recovery, error)
	var hydrate bool
	c := &cobra.Command{
		Use: "restore ID --to DIR | --production", GroupID: "main", Args: cobra.ArbitraryArgs, // looked at below
		Short: "Make a running, isolated copy of a backup that stays",
		Long: `Make a copy of a backup: new volumes from its snapshots, assembled under a new
identity, mounted below DIR, recovered by PostgreSQL, isolated from production
(no TCP, no archiving, no subscriptions, its own socket directory). It needs
only the catalog and the provider, nothing of the host that was backed up.

The copy stays until "cleancut restore --undo DIR".

Volumes that EC2 makes from snapshots fetch each block when it is first read,
slowly. --hydrate reads all of them through once the copy answers, and both
times are told. If that fails or is interrupted the copy stays all the same
(exit status 1); --hydrate --to DIR without an id reads a standing copy.
` + productionHelp + `` + recoveryHelp + `
With a time and no id the latest backup that was cut before it is taken.`,
		Example: "  cleancut restore 20261122T211704Z-5f3a9c --to /srv/copy\n  cleancut restore 20261122T211704Z-5f3a9c --to /srv/copy --hydrate --hydrate-rate 200M\n  cleancut restore --undo /srv/copy\n  cleancut restore 20261122T211704Z-5f3a9c --production --archive-command 'cleancut wal push --cluster main-2 %p'",
		RunE: func(c *cobra.Command, args []string) error {
			until, err := recovery()
			if err != nil {
				return err
			}
			byTime := until.Target.Kind == backup.TargetTime && len(args) == 0
			standing := hydrate && len(args) == 0 && to != "" && !byTime
			if err := production.check(c, to, undo); err != nil {
				return err
			}
			switch {
			case production.on && (len(args) == 1 || byTime):
			case undo != "" && (len(args) > 0 || to != "" || hydrate):
				return fmt.Errorf("%w: --undo DIR stands alone", backup.ErrUsage)
			case undo == "" && !standing && (len(args) != 1 && !byTime || to == ""):
				return backup.Hint(fmt.Errorf("%w: restore wants the id of a backup and --to DIR", backup.ErrUsage), "see `cleancut list`")
			case rate != "" && !hydrate:
				return fmt.Errorf("%w: --hydrate-rate goes with --hydrate", backup.ErrUsage)
			}
			var id backup.ID
			var o flow.HydrateOptions
			if undo == "" && !standing && !byTime {
				if id, err = backup.ParseID(args[0]); err != nil {
					return err
				}
			}
			if rate != "" {
				if o.Rate, err = backup.ParseBytes(rate); err != nil || o.Rate == 0 {
					return errors.Join(fmt.Errorf("%w: --hydrate-rate %q: want bytes a second, above zero, as in 200M", backup.ErrUsage, rate), err)
				}
			}
			f, s, err := a.flow(c.Context())
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
			if standing {
				return a.hydrated(backup.Copy{}, o, func(o flow.HydrateOptions) (backup.Copy, error) { return f.HydrateAt(c.Context(), to, o) })
			}
			if byTime {
				if id, err = f.Nearest(c.Context(), until.Target.Time); err != nil {
					return err
				}
			}
			if production.on {
				warm := &o
				if !hydrate {
					warm = nil
				}
				return a.produce(c, f, s, production.options(id, until, s), warm)
			}
			r, release, err := f.Restore(c.Context(), flow.RestoreOptions{ID: id, Root: to, Purpose: backup.ForRestore, Recovery: until})
			if err != nil {
				return err
			}
			defer release()
			if hydrate {
				return a.hydrated(r.Copy, o, func(o flow.HydrateOptions) (backup.Copy, error) { return f.Hydrate(c.Context(), r.Copy, o) })
			}
			return a.print(r.Copy, func() {
				a.copyText(r.Copy)
				if len(r.Manifest.Snapshots) > 0 && r.Manifest.Snapshots[0].Volume.Provider == "ec2" {
					a.line("  not hydrated: its volumes fetch each block from the snapshot when it is first read, slowly;")
					a.line("  to read them through: cleancut restore --hydrate --to %s", r.Copy.Root)
				}
			})
		},
	}
	c.Flags().StringVar(&to, "to", "", "folder of the copy, new or empty")
	c.Flags().StringVar(&undo, "undo", "", "remove the copy that stands in this folder")
	c.Flags().BoolVar(&hydrate, "hydrate", false, "read all volumes of the copy through, once it answers")
	c.Flags().StringVar(&rate, "hydrate-rate", "", "at most so many bytes a second over all volumes, as in 200M (default: no limit)")
	recovery = recoveryFlags(c)
	production.add(c)
	return c
}

func (a *app) copyText(c backup.Copy) {
	a.line("copy %s of backup %s runs in %s", c.ID, c.Backup, c.DataDirectory)
	a.line("  recovered to %s, first query %.1f s after the start of its server, %.1f s after that of the restore", c.EndOfRecovery, c.FirstQuery, c.Answered)
	if h := c.Hydrated; h != nil && h.Complete {
		a.line("  hydrated %.1f s after the start of the restore: %s of %d volumes read in %.1f s", h.SinceRestore, h.Size, len(h.Volumes), h.Seconds)
	} else if h != nil {
		a.line("  NOT hydrated: %s of %s read in %.1f s", h.Bytes, h.Size, h.Seconds)
	}
	a.line("  connect:  psql -h %s -p %d -U %s", c.SocketDir, c.Port, c.Superuser)
	a.line("  remove:   cleancut restore --undo %s", c.Root)
}

// hydrated reads a copy's volumes through and prints the copy, which is there
// whatever becomes of that. c is the copy if it is known before.
func (a *app) hydrated(c backup.Copy, o flow.HydrateOptions, read func(flow.HydrateOptions) (backup.Copy, error)) error {
	stop := a.bars(&o)
	after, err := read(o)
	stop()
	if after.ID != "" {
		c = after
	}
	if c.ID == "" || !c.Ready {
		return err
	}
	if perr := a.print(c, func() { a.copyText(c) }); err == nil {
		err = perr
	}
	return err
}

// bars shows on a terminal how far each volume was read.
func (a *app) bars(o *flow.HydrateOptions) (stop func()) {
	if a.json || !isTerminal(a.err) {
		return func() {}
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithRefreshRate(200*time.Millisecond))
	var bars []*mpb.Bar
	o.Begin = func(volumes []backup.VolumeID, sizes []backup.Bytes) {
		for i, v := range volumes {
			bars = append(bars, p.AddBar(int64(sizes[i]), mpb.PrependDecorators(decor.Name(string(v)+" ")),
				mpb.AppendDecorators(decor.CountersKibiByte("% .1f of % .1f"), decor.AverageSpeed(decor.SizeB1024(0), "  % .1f"))))
		}
	}
	o.Read = func(i int, n backup.Bytes) { bars[i].IncrInt64(int64(n)) }
	return func() {
		for _, b := range bars {
			b.Abort(false) // what is complete stays so
		}
		p.Wait()
	}
}
