package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/demo"
	"cleancut/internal/lab"
)

func (a *app) demoCommand() *cobra.Command {
	o := demo.Options{Version: version}
	var size, mode string
	var here bool
	c := &cobra.Command{
		Use: "demo", GroupID: "look", Args: exactly(0, ""),
		Short: "Run the whole story on this machine: real md RAID 0, XFS and PostgreSQL, each step checked",
		Long: `Run the whole story on this machine and check every step: four volumes striped
by md RAID 0 under XFS, a PostgreSQL cluster under load, one atomic cut,
restored beside itself as another host would, recovered, verified, dumped,
and everything removed again.

With --provider ec2 every step goes through the AWS SDK to an EC2 test server
over real block devices, and to an S3 server that holds the catalog; one
instance is cut, another restores.

It runs natively where the kernel has md and this user is root, else in a
user-mode Linux guest, which needs neither.`,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.VolumeSize, err = backup.ParseBytes(size); err != nil {
				return err
			}
			o.Mode = backup.Mode(mode)
			if o.Program, err = os.Executable(); err != nil {
				return fmt.Errorf("own program: %w", err)
			}
			if o.Report, err = filepath.Abs(o.Report); err != nil {
				return fmt.Errorf("%w: report: %w", backup.ErrUsage, err)
			}
			o.Out, o.Log = a.err, a.log
			run := demo.Run
			if !here && lab.Where(c.Context()) == lab.UML {
				fmt.Fprintln(a.err, "running in a user-mode Linux guest: this kernel has no md arrays, or this user is not root")
				run = demo.RunInGuest
			} else if !here {
				fmt.Fprintln(a.err, "running natively: this kernel has md arrays and this user is root")
			}
			res, err := run(c.Context(), o)
			if err != nil {
				return err
			}
			if err := a.print(res, func() { a.demoText(res) }); err != nil {
				return err
			}
			if !res.OK {
				return errors.New("the story did not hold; the failed step is above")
			}
			return nil
		},
	}
	f := c.Flags()
	f.Int64Var(&o.Rows, "rows", 100000, "rows of the play database; the default makes about 60 MB")
	f.StringVar(&o.Provider, "provider", "local", "who owns the volumes: local, or ec2 over a test server with an S3 server beside it")
	f.StringVar(&mode, "mode", "auto", "auto, group (ec2), freeze or bracketed")
	f.DurationVar(&o.Latency, "latency", 0, "ec2: of every call")
	f.DurationVar(&o.Skew, "skew", 0, "ec2: between the snapshots of calls that are sent at once")
	f.StringVar(&size, "size", "2G", "size of each of the four volumes")
	f.StringVar(&o.Report, "report", "cleancut-demo.html", "file for the report; its data goes beside it")
	f.BoolVar(&here, "here", false, "run in this process's kernel, whatever it is")
	_ = f.MarkHidden("here")
	return c
}

func (a *app) demoText(res demo.Result) {
	done := 0
	for _, s := range res.Steps {
		if s.OK {
			done++
		}
	}
	a.line("\n%d steps held in %.0f s (%s, provider %s, mode %s)", done, res.Seconds, res.Where, res.Provider, res.Mode)
	if len(res.Calls) > 0 {
		var calls []string
		for _, action := range slices.Sorted(maps.Keys(res.Calls)) {
			calls = append(calls, fmt.Sprintf("%s %d", action, res.Calls[action]))
		}
		a.line("calls to EC2: %s", strings.Join(calls, ", "))
	}
	for _, s := range res.Said() {
		a.line("%s", s)
	}
	a.line("report: %s\ndata:   %s", res.Report, res.Data)
}

func (a *app) demoHostCommand() *cobra.Command {
	return &cobra.Command{
		Use: "demo-host HIDE... UNMOUNT", Hidden: true, Args: cobra.MinimumNArgs(1),
		Short: "Hold the namespaces of the demo's other host (started by demo)",
		RunE: func(_ *cobra.Command, args []string) error {
			last := len(args) - 1
			return demo.BeOtherHost(args[:last], args[last], os.Stdin, os.Stdout)
		},
	}
}
