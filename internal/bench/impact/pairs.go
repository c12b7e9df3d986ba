package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/evidence"
	"cleancut/internal/host"
	"cleancut/internal/lab"
)

// toolTime is when a backup that does not end is given up.
const toolTime = 30 * time.Minute

// impact measures each tool that is installed, in each repeat in an order that
// the seed gives.
func (o options) impact(ctx context.Context, d *evidence.Diary, tools []tool) (err error) {
	type job struct {
		repeat int
		tool   tool
	}
	var jobs []job
	for repeat := 1; repeat <= o.Repeats; repeat++ {
		rand.New(rand.NewPCG(o.Seed, uint64(repeat))).Shuffle(len(tools), func(i, j int) { tools[i], tools[j] = tools[j], tools[i] })
		for _, t := range tools {
			if t.Missing == "" && !d.HasPair(repeat, t.Key) {
				jobs = append(jobs, job{repeat, t})
			}
		}
	}
	if len(jobs) == 0 {
		return nil
	}
	say("making production: pgbench at scale %d", o.Scale)
	s, group, err := o.production(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.undo.End(ctx)) }()
	var failed []error
	for i, j := range jobs {
		say("pair %d of %d: %s, repeat %d", i+1, len(jobs), j.tool.Name, j.repeat)
		p, err := s.pair(ctx, group, j.tool)
		if ctx.Err() != nil {
			return cmp.Or(err, ctx.Err())
		}
		if err != nil {
			say("%s failed: %v", j.tool.Name, err)
			failed = append(failed, fmt.Errorf("%s, repeat %d: %w", j.tool.Name, j.repeat, err))
			continue
		}
		p.Repeat = j.repeat
		if err := d.AddPair(p); err != nil {
			return err
		}
		say("  alone %.0f transactions/s for %.0f s, worst second %.2f; with it %.0f for %.0f s, kept %.3f, worst second %.2f; the tool took %.1f s", p.Alone.Rate(), p.Alone.Seconds,
			p.Alone.Worst(p.Alone.Rate()), p.With.Rate(), p.With.Seconds, p.With.Rate()/p.Alone.Rate(), p.With.Worst(p.Alone.Rate()), p.Seconds)
	}
	return errors.Join(failed...)
}

// production is a server under the limits, with pgbench's tables.
func (o options) production(ctx context.Context) (s *site, group memoryGroup, err error) {
	s, err = o.newSite(ctx, backup.Bytes(o.Scale)*48<<20+4<<30, []string{fmt.Sprintf("checkpoint_timeout = %ds", int(o.Checkpoint)), "archive_mode = on", "archive_command = 'true'", "max_connections = 100"})
	if err != nil {
		return nil, group, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo.End(ctx))
		}
	}()
	if group, err = newMemoryGroup(o.Memory); err != nil {
		return s, group, err
	}
	s.undo.Later(func(context.Context) error { return group.remove() }) // when the server is gone
	s.undo.Later(s.server.Stop)
	if err := group.run(func() error { return s.server.Start(ctx) }); err != nil {
		return s, group, err
	}
	fill := s.server.Command(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(o.Scale), "postgres")
	if err := group.run(func() error { _, err := output(fill); return err }); err != nil {
		return s, group, err
	}
	return s, group, nil
}

// pair measures production alone and then beside a tool.
func (s *site) pair(ctx context.Context, group memoryGroup, t tool) (p evidence.Pair, err error) {
	p = evidence.Pair{Tool: t.Key, At: time.Now().UTC(), Load: loadAverage()}
	var release func(context.Context) error
	prepare := func() (err error) { release, err = t.prepare(ctx, s); return err }
	prepared := group.run(prepare)
	if release != nil {
		defer func() {
			undoing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
			defer cancel()
			err = errors.Join(err, release(undoing))
		}()
	}
	if prepared != nil {
		return p, prepared
	}
	if err := s.settle(ctx, group); err != nil {
		return p, err
	}
	unlimit, err := limitVolume(s.device, s.IOPS, s.Throughput)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, unlimit()) }()
	load, loaded, err := s.startLoad(ctx)
	if err != nil {
		return p, err
	}
	var marks [3]mark
	measured := s.windows(loaded, group, t, &p, &marks)
	all, err := load.stop()
	if err := errors.Join(measured, err); err != nil {
		return p, err
	}
	p.Alone, p.With = between(all, marks[0], marks[1]), between(all, marks[1], marks[2])
	return p, nil
}

// windows marks the begin of the window alone, of the tool, and its end.
func (s *site) windows(ctx context.Context, group memoryGroup, t tool, p *evidence.Pair, marks *[3]mark) (err error) {
	if err := wait(ctx, s.WarmUp.Duration()); err != nil {
		return err
	}
	if marks[0], err = s.mark(); err != nil {
		return err
	}
	if err := wait(ctx, s.Alone.Duration()); err != nil {
		return err
	}
	if marks[1], err = s.mark(); err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(ctx, toolTime, fmt.Errorf("not done after %s", toolTime))
	defer cancel()
	if err := group.run(func() (err error) { p.Cut, err = t.backup(limited, s); return err }); err != nil {
		return cmp.Or(context.Cause(limited), err)
	}
	p.Seconds = time.Since(marks[1].at).Seconds()
	if t.after {
		if err := wait(ctx, s.After.Duration()); err != nil {
			return err
		}
	}
	marks[2], err = s.mark()
	return err
}

// loadAverage is the machine's over the last minute, 0 if it is not told.
func loadAverage() float64 {
	text, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(text), " ")
	load, _ := strconv.ParseFloat(first, 64)
	return load
}

// machine says where this runs.
func machine(ctx context.Context) (evidence.Machine, error) {
	m := evidence.Machine{Processors: runtime.NumCPU(), Cleancut: version, Processor: fieldOf("/proc/cpuinfo", "model name", ":"), System: strings.Trim(fieldOf("/etc/os-release", "PRETTY_NAME", "="), `"`)}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, err
	}
	m.Memory = backup.Bytes(uint64(info.Totalram) * uint64(info.Unit))
	inst, err := lab.NewestInstallation(ctx)
	if err != nil {
		return m, err
	}
	out, err := host.Run(ctx, inst.Bin+"/postgres", "--version")
	m.PostgreSQL = strings.TrimSpace(string(out))
	return m, err
}

// fieldOf is the value of the first line of a file that begins with a name.
func fieldOf(file, name, separator string) string {
	text, _ := os.ReadFile(file)
	for line := range bytes.Lines(text) {
		key, value, _ := strings.Cut(string(line), separator)
		if strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
