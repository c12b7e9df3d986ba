// Command impact measures what a backup costs production, and how long backups
// and restores take for databases of several sizes, and writes
// docs/evidence.md. `make bench-impact` runs it.
//
//	volume with a limit → server → pgbench alone | beside a tool → diary → docs/evidence/impact.json → docs/evidence.md
//
// What always holds:
//   - All that it makes goes away again, also after an error and after ^C:
//     the limit first, and it is an error if the limit is still there.
//   - A result is on the disk before the next one is begun. The same command
//     goes on where an interrupted one stopped.
//   - A tool that is not installed is told as that, and has no figures.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/evidence"
)

// version is set by the Makefile.
var version = "dev"

func main() { os.Exit(run(os.Args[1:])) }

// options are the flags.
type options struct {
	evidence.Conditions
	program string // path of cleancut
	docs    string // folder of evidence.md
	work    string // folder for everything that is made
	tools   string // keys of those to measure, commas between; "": all
	render  bool
	drill   string // report.json of a drill, to be kept as data
	as      string // name of the drill's data, or of the measurement's
}

func (o options) data() string  { return filepath.Join(o.docs, "evidence") }
func (o options) file() string  { return evidence.ImpactFile(o.data(), o.as) }
func (o options) diary() string { return strings.TrimSuffix(o.file(), ".json") + ".part.jsonl" }

func run(args []string) int {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "impact:", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	switch {
	case o.drill != "":
		err = o.keepDrill()
	case !o.render:
		err = o.measure(ctx)
	}
	if err == nil {
		err = evidence.Write(o.docs)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "impact:", err)
		if hint := backup.HintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, "impact:", hint)
		}
		return 1
	}
	say("written: %s", filepath.Join(o.docs, "evidence.md"))
	return 0
}

func say(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().UTC().Format("15:04:05"), fmt.Sprintf(format, args...))
}

func parse(args []string) (options, error) {
	o := options{Conditions: evidence.Conditions{Throughput: 30_000_000, Memory: 400 << 20, Sizes: []backup.Bytes{200 << 20, 1 << 30, 4 << 30}}}
	f := flag.NewFlagSet("impact", flag.ContinueOnError)
	bytes := func(to *backup.Bytes, name, usage string) {
		f.Func(name, fmt.Sprintf("%s (default %d)", usage, *to), func(s string) (err error) { *to, err = backup.ParseBytes(s); return err })
	}
	seconds := func(to *evidence.Seconds, name string, d time.Duration, usage string) {
		*to = evidence.Seconds(d.Seconds())
		f.Func(name, fmt.Sprintf("%s (default %s)", usage, d), func(s string) error {
			d, err := time.ParseDuration(s)
			*to = evidence.Seconds(d.Seconds())
			return err
		})
	}
	f.IntVar(&o.Scale, "scale", 50, "pgbench's scale: 15 MB each")
	f.IntVar(&o.Clients, "clients", 8, "sessions of pgbench")
	f.IntVar(&o.Rate, "rate", 0, "transactions a second that pgbench begins; 0: as fast as it can")
	f.IntVar(&o.IOPS, "iops", 1000, "limit of the volume, reads and writes each")
	bytes(&o.Throughput, "throughput", "limit of the volume in bytes a second, reads and writes each")
	bytes(&o.Memory, "memory", "memory of the server and the tools, page cache included")
	seconds(&o.Checkpoint, "checkpoint", 30*time.Second, "checkpoint_timeout")
	seconds(&o.WarmUp, "warm-up", 35*time.Second, "load before each window alone; longer than -checkpoint")
	seconds(&o.Alone, "alone", time.Minute, "length of each window alone; a multiple of -checkpoint")
	seconds(&o.After, "after", 5*time.Minute, "how long a window of cleancut goes on after its backup")
	f.IntVar(&o.Repeats, "repeats", 3, "how often each tool is measured")
	f.Uint64Var(&o.Seed, "seed", 1, "of the order of the tools in each repeat")
	f.Func("sizes", "sizes of databases, commas between; empty: none (default 200M,1G,4G)", func(s string) (err error) {
		o.Sizes, err = sizesOf(s)
		return err
	})
	f.IntVar(&o.Extents, "extents", 100_000, "extents of an aged volume")
	f.IntVar(&o.Backups, "backups", 5, "backups of each size, after one that does not count")
	f.IntVar(&o.Restores, "restores", 3, "restores of each size")
	f.StringVar(&o.tools, "tools", "", "measure only these, commas between: cleancut-freeze, pg_dumpall, pg_basebackup, pgbackrest, barman (default all)")
	f.StringVar(&o.program, "program", "bin/cleancut", "cleancut")
	f.StringVar(&o.docs, "docs", "docs", "folder of evidence.md; its data is in evidence/ below")
	f.StringVar(&o.work, "work", "/tmp", "folder for everything that is made and goes away again, about 30 GB; short")
	f.BoolVar(&o.render, "render", false, "measure nothing: only write evidence.md from the data that is there")
	f.StringVar(&o.drill, "drill", "", "measure nothing: keep what the page tells of this report.json of a drill, then write evidence.md")
	f.StringVar(&o.as, "as", "", "name of that drill's data: evidence/drill-NAME.json; or of a measurement that stands beside the usual one: evidence/impact-NAME.json")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case f.NArg() > 0:
		return o, fmt.Errorf("%w: %q", backup.ErrUsage, f.Args())
	case (o.drill != "" || o.as != "") && backup.CheckClusterName(o.as) != nil:
		return o, fmt.Errorf("%w: -as NAME, of a-z 0-9 . _ -, without which -drill cannot be", backup.ErrUsage)
	case o.Repeats < 1 || o.Clients < 1 || o.Scale < 1 || o.IOPS < 1 || o.Throughput < 1 || o.Alone < 1:
		return o, fmt.Errorf("%w: -repeats, -clients, -scale, -iops, -throughput and -alone begin at 1", backup.ErrUsage)
	}
	var err error
	for _, path := range []*string{&o.program, &o.docs, &o.work} {
		if *path, err = filepath.Abs(*path); err != nil {
			return o, err
		}
	}
	return o, nil
}

// keepDrill takes a drill's report into the data.
func (o options) keepDrill() error {
	d, err := evidence.ReadDrill(o.drill)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.data(), 0o755); err != nil {
		return err
	}
	return d.Keep(o.data(), o.as)
}

func sizesOf(s string) ([]backup.Bytes, error) {
	var out []backup.Bytes
	for _, word := range strings.Split(s, ",") {
		if word == "" {
			continue
		}
		b, err := backup.ParseBytes(word)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// measure makes what is not yet in the diary. A tool that fails is told at the
// end: the others are measured all the same.
func (o options) measure(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return backup.Hint(fmt.Errorf("%w: loop devices and cgroups need root", backup.ErrUsage), "run it as root; -render alone needs nothing")
	}
	if _, err := os.Stat(o.program); err != nil {
		return backup.Hint(err, "make build")
	}
	if err := os.MkdirAll(o.data(), 0o755); err != nil {
		return err
	}
	m, err := machine(ctx)
	if err != nil {
		return err
	}
	tools, err := o.wantedTools(ctx)
	if err != nil {
		return err
	}
	start := evidence.Start{At: time.Now().UTC(), Machine: m, Conditions: o.Conditions}
	for _, t := range tools {
		start.Tools = append(start.Tools, t.Tool)
	}
	d, err := evidence.OpenDiary(o.diary(), start)
	if err != nil {
		return err
	}
	if err := o.impact(ctx, d, tools); err != nil {
		return backup.Hint(err, "what was measured is kept; the same command goes on")
	}
	if err := o.sizes(ctx, d); err != nil {
		return backup.Hint(err, "what was measured is kept; the same command goes on")
	}
	return d.Finish(o.file())
}
