package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) dumpCommand() *cobra.Command {
	var to string
	var level int
	var recovery func() (flow.Recovery, error)
	c := &cobra.Command{
		Use: "dump ID [--to FILE]", GroupID: "main", Args: exactly(1, "the id of a backup"),
		Short: "Write the portable SQL dump of a backup, from a throwaway copy",
		Long: `Restore a backup into a throwaway copy, stream pg_dumpall through zstd into the
catalog or a file, and remove the copy. Production is not read at all.
` + recoveryHelp,
		Example: "  cleancut dump 20261122T211704Z-5f3a9c\n  cleancut dump 20261122T211704Z-5f3a9c --to /backup/db.sql.zst",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			if level < 1 || level > 22 {
				return fmt.Errorf("%w: zstd level %d: 1 to 22", backup.ErrUsage, level)
			}
			until, err := recovery()
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			o := flow.DumpOptions{ID: id, Level: level, Recovery: until, Name: time.Now().UTC().Format("20060102T150405Z") + ".sql.zst"}
			finish := func(error) error { return nil }
			if to != "" {
				if o.Out, finish, err = dumpFile(to); err != nil {
					return err
				}
			}
			bar, stop := a.bar()
			o.Progress = bar
			res, err := f.Dump(c.Context(), o)
			stop()
			if err := errors.Join(err, finish(err)); err != nil {
				return err
			}
			where := to
			if where == "" {
				where = "catalog: " + o.Name
			}
			return a.print(map[string]any{"backup": id, "to": where, "result": res}, func() {
				a.line("dump of %s: %s of SQL, %s compressed, in %.1f s → %s", id, res.SQL, res.Compressed, res.Seconds, where)
			})
		},
	}
	recovery = recoveryFlags(c)
	c.Flags().StringVar(&to, "to", "", "file to write; it must not exist (default: into the catalog)")
	c.Flags().IntVar(&level, "level", 1, "zstd level, 1 to 22")
	return c
}

// dumpFile opens a temporary file beside the target. finish(nil) makes it
// durable under its name, finish(err) removes it.
func dumpFile(to string) (io.Writer, func(error) error, error) {
	if _, err := os.Lstat(to); err == nil {
		return nil, nil, fmt.Errorf("%w: %s exists already", backup.ErrUsage, to)
	}
	f, err := os.CreateTemp(filepath.Dir(to), ".cleancut-*")
	if err != nil {
		return nil, nil, fmt.Errorf("%w: dump: %w", backup.ErrUsage, err)
	}
	return f, func(failed error) error {
		err := errors.Join(f.Sync(), f.Close())
		if failed == nil && err == nil {
			err = os.Link(f.Name(), to) // unlike a rename it never overwrites
		}
		err = errors.Join(err, os.Remove(f.Name()))
		if dir, derr := os.Open(filepath.Dir(to)); derr == nil {
			err = errors.Join(err, dir.Sync(), dir.Close())
		}
		return err
	}, nil
}

// bar shows the bytes of a dump on a terminal.
func (a *app) bar() (progress func(sql, compressed backup.Bytes), stop func()) {
	if a.json || !isTerminal(a.err) {
		return nil, func() {}
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithRefreshRate(200*time.Millisecond))
	b := p.New(0, mpb.SpinnerStyle(), mpb.PrependDecorators(decor.Name("dump ")),
		mpb.AppendDecorators(decor.CurrentKibiByte("% .1f of SQL"), decor.AverageSpeed(decor.SizeB1024(0), "  % .1f")))
	return func(sql, _ backup.Bytes) { b.SetCurrent(int64(sql)) }, func() { b.SetTotal(-1, true); p.Wait() }
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && f.Name() != os.DevNull
}
