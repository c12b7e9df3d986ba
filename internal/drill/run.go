package drill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/lab"
	"cleancut/internal/uml"
)

// Run makes the trials that are not yet in the output folder, natively or in
// the user-mode guest as each layout needs, and sums up all that are. The error
// wraps backup.ErrUsage if any cell of the grid cannot be done: then nothing
// was run. When ctx ends, what was judged is kept and summed up, and the error
// is the context's.
func Run(ctx context.Context, o Options) (Summary, error) {
	if err := o.check(); err != nil {
		return Summary{}, err
	}
	cells, refused := o.Grid.Cells(place(ctx))
	if len(refused) > 0 {
		return Summary{}, refusal(refused, len(cells))
	}
	st, err := openStore(o.Out)
	if err != nil {
		return Summary{}, err
	}
	defer func() { _ = st.close() }() // a lock and nothing else
	err = o.repeat(ctx, st, plan(cells, o.Seed, o.Trials, st.done(o.Seed)))
	s := o.summary(st)
	s.Interrupted = ctx.Err() != nil
	return s, errors.Join(err, o.writeReport(st, s))
}

// Inside is Run for the guest, which only makes trials; the host sums up.
func Inside(ctx context.Context, o Options) error {
	cells, refused := o.Grid.Cells(place(ctx))
	if len(refused) > 0 {
		return refusal(refused, len(cells))
	}
	st := &store{dir: o.Out} // the host holds the lock
	if err := st.read(); err != nil {
		return err
	}
	return here(ctx, o, st, plan(cells, o.Seed, o.Trials, st.done(o.Seed)))
}

func (o Options) check() error {
	switch {
	case o.Trials < 0:
		return fmt.Errorf("%w: %d trials", backup.ErrUsage, o.Trials)
	case o.Keep != KeepNone && o.Keep != KeepDamaged && o.Keep != KeepAll:
		return fmt.Errorf("%w: --keep %q: none, damaged or all", backup.ErrUsage, o.Keep)
	case o.VolumeSize < 320<<20:
		return fmt.Errorf("%w: volumes of %s: XFS wants at least 320 MiB", backup.ErrUsage, o.VolumeSize)
	case o.Rows < 1:
		return fmt.Errorf("%w: %d rows", backup.ErrUsage, o.Rows)
	}
	return nil
}

// refusal names every cell that cannot be done.
func refusal(refused []Refusal, others int) error {
	var lines []string
	for _, r := range refused {
		lines = append(lines, r.Cell+": "+r.Why)
	}
	return backup.Hint(fmt.Errorf("%w: %d cells of the grid cannot be done here, so none was begun:\n%s", backup.ErrUsage, len(refused), strings.Join(lines, "\n")),
		fmt.Sprintf("take them out of the grid; the other %d can be done", others))
}

// repeat makes the batches that this kernel can make, then those of the guest.
func (o Options) repeat(ctx context.Context, st *store, batches []batch) error {
	native, guest := []batch{}, []batch{}
	for _, b := range batches {
		if b.ground.Where == string(lab.Native) {
			native = append(native, b)
		} else {
			guest = append(guest, b)
		}
	}
	if len(native) > 0 {
		if err := here(ctx, o, st, native); err != nil {
			return err
		}
	}
	if len(guest) == 0 {
		return ctx.Err()
	}
	fmt.Fprintf(o.Progress, "%d production runs in a user-mode Linux guest: this kernel lacks what the layout or the mode needs, or this user is not root\n", len(guest))
	return errors.Join(o.inGuest(ctx, guest), st.read())
}

// walRoom is for the WAL that production runs ship, beside the pool; the file
// behind it is sparse.
const walRoom = 4 << 30

// inGuest runs the same command as root of a guest that shares the output
// folder. A guest that hangs is begun once more: what it judged is kept.
func (o Options) inGuest(ctx context.Context, batches []batch) error {
	var layouts []string
	for _, b := range batches {
		if !slices.Contains(layouts, b.ground.Layout) {
			layouts = append(layouts, b.ground.Layout)
		}
	}
	args := append([]string{o.Program, "drill", "--here", "--layout", strings.Join(layouts, ",")}, o.arguments()...)
	for again := true; ; again = false {
		code, err := uml.Guest{Args: args, Scratch: int64(poolSize(o) + walRoom), Share: []string{o.Out}, Stdout: o.Progress, Stderr: o.Progress, Timeout: 24 * time.Hour}.Run(ctx)
		if errors.Is(err, uml.ErrHung) && again {
			fmt.Fprintf(o.Progress, "the guest hung and is begun again: %v\n", err)
			continue
		}
		if err != nil {
			return fmt.Errorf("user-mode guest: %w", err)
		}
		if code != 0 {
			return fmt.Errorf("the drill in the guest ended with status %d", code)
		}
		return nil
	}
}

// arguments are the flags that make the same drill in another process, but for
// its layouts.
func (o Options) arguments() []string {
	list := func(n int, at func(i int) string) string {
		var out []string
		for i := range n {
			out = append(out, at(i))
		}
		return strings.Join(out, ",")
	}
	g := o.Grid
	return []string{
		"--provider", cmp.Or(g.Provider, Local), "--mode", list(len(g.Modes), func(i int) string { return string(g.Modes[i]) }),
		"--skew", list(len(g.Skews), func(i int) string { return g.Skews[i].String() }),
		"--order", strings.Join(g.Orders, ","), "--volumes", list(len(g.Volumes), func(i int) string { return strconv.Itoa(g.Volumes[i]) }),
		"--chunk", list(len(g.Chunks), func(i int) string { return strconv.FormatInt(int64(g.Chunks[i]), 10) }),
		"--fs", strings.Join(g.Filesystems, ","), "--load", strings.Join(g.Loads, ","), "--checkpoint", strings.Join(g.Checkpoints, ","), "--recovery", strings.Join(g.Recoveries, ","),
		"--trials", strconv.Itoa(o.Trials), "--seed", strconv.FormatInt(o.Seed, 10), "--out", o.Out, "--keep", o.Keep,
		"--rows", strconv.FormatInt(o.Rows, 10), "--size", strconv.FormatInt(int64(o.VolumeSize), 10),
	}
}

func (o Options) summary(st *store) Summary {
	return Summary{Seed: o.Seed, Cells: Summarize(st.trials), Checks: CountChecks(st.trials), Report: o.Report, JSON: jsonBeside(o.Report)}
}

// jsonBeside is the data's file beside the report.
func jsonBeside(report string) string {
	return strings.TrimSuffix(report, ".html") + ".json"
}

func writeFile(name string, write func(f *os.File) error) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return errors.Join(write(f), f.Close())
}
