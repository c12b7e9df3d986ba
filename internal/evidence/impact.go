package evidence

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"cleancut/internal/backup"
)

// What is to be reached, of the rate of production alone.
const (
	toKeep  = 0.98
	noBelow = 0.8
)

// Kept is the share of production's throughput alone that is left beside the
// tool.
func (p Pair) Kept() float64 { return p.With.Rate() / p.Alone.Rate() }

// Worst is the worst second beside the tool, as a share of the mean alone.
func (p Pair) Worst() float64 { return p.With.Worst(p.Alone.Rate()) }

// of returns the pairs of a tool.
func (m Measurement) of(tool string) []Pair {
	return slices.DeleteFunc(slices.Clone(m.Pairs), func(p Pair) bool { return p.Tool != tool })
}

// has says whether that tool was one of the measurement's.
func (m Measurement) has(tool string) bool {
	return slices.ContainsFunc(m.Tools, func(t Tool) bool { return t.Key == tool })
}

// repeats is how often the tools were measured, in words.
func (m Measurement) repeats() string {
	var counts []int
	for _, t := range m.Tools {
		if n := len(m.of(t.Key)); n > 0 {
			counts = append(counts, n)
		}
	}
	switch {
	case len(counts) == 0:
		return "0"
	case slices.Min(counts) == slices.Max(counts):
		return fmt.Sprint(counts[0])
	}
	return fmt.Sprintf("%d to %d", slices.Min(counts), slices.Max(counts))
}

// low counts the whole seconds below noBelow: beside the tools, and alone.
func low(pairs []Pair) (with, ofWith, alone, ofAlone int) {
	for _, p := range pairs {
		with, ofWith = with+p.With.Below(noBelow, p.Alone.Rate()), ofWith+len(p.With.PerSecond)
		alone, ofAlone = alone+p.Alone.Below(noBelow, p.Alone.Rate()), ofAlone+len(p.Alone.PerSecond)
	}
	return with, ofWith, alone, ofAlone
}

func (p *page) impact(m Measurement) {
	c := m.Conditions
	p.line("## What a backup costs production%s", strings.TrimSuffix(": "+m.Name, ": "))
	p.line("")
	p.line("Begun %s UTC.", m.At.UTC().Format("2006-01-02 15:04"))
	p.machine(m.Machine)
	loads := each(m.Pairs, func(p Pair) float64 { return p.Load })
	p.line("The machine's load average before each pair, with what the measurement itself had just done, was %s.", spread("%.1f", loads))
	for _, n := range m.Notes {
		p.line("%s", n)
	}
	p.line("")
	speed := "as fast as it can"
	if c.Rate > 0 {
		speed = fmt.Sprintf("at %d transactions/s, as far as it can", c.Rate)
	}
	p.line("Production is one server on one XFS filesystem on one volume of the local provider, limited to %d IOPS and %.0f MB/s, reads and writes each, in the root blkio cgroup, so that the kernel's", c.IOPS, megabytes(c.Throughput))
	p.line("writeback is limited, too. Server and tools share %s of memory, page cache included; pgbench at scale %d runs with %d sessions %s. `shared_buffers` is 128 MB,", c.Memory, c.Scale, c.Clients, speed)
	p.line("`checkpoint_timeout` %g s with the default spread instead of 5 min, so that all windows hold about the same share of checkpoints; page checksums are on. What tools write goes to another filesystem,", float64(c.Checkpoint))
	p.line("of the machine's disk, without a limit.")
	p.line("")
	p.line("A pair begins with a checkpoint, the database read into the page cache, and a quiet volume, all without the limit. Then %g s of warm-up, a window of %g s alone, and the window of the tool:", float64(c.WarmUp), float64(c.Alone))
	p.line("from its call to its end, for cleancut on to %g s after its end. Each tool was measured %s times, in an order of its own in each repeat. cleancut's backup is deleted after its pair.", float64(c.After), m.repeats())
	p.line("**Kept** is the mean of the tool's window over the mean alone right before it, **worst second** the least transactions of a whole second over the same mean; the row of production alone has the")
	p.line("same for the windows alone. Latencies are of whole transactions up to the answer to their commit, in milliseconds; reads and writes are the volume's own.")
	p.line("")
	p.costs(m)
	p.reached(m)
	p.line("")
	if len(m.Pairs) > 0 {
		p.line("![transactions of each second, of each tool's pair with the median of what was kept](%s)", m.ChartFile())
		p.line("")
	}
	for _, t := range m.Tools {
		version := ""
		if t.Version != "" {
			version = " " + t.Version
		}
		p.line("- %s%s: %s", t.Name, version, t.Command)
	}
	p.line("- cleancut, group: a provider with a group call is needed. The local one has none, and device mapper, by which a test can play one, is missing in this kernel; the user-mode guest that has it has one processor.")
	if !m.has(Bracketed) {
		p.line("- cleancut, bracketed: not one of the tools of this measurement; its checkpoint at the start is the one that other tools begin with, unless it is spread.")
	}
	p.line("")
}

func (p *page) costs(m Measurement) {
	p.head("", "kept", "worst second", fmt.Sprintf("seconds below %g", noBelow), "p99, alone → with it", "longest", "read, MB (alone in as long)", "written, MB (alone in as long)", "takes, s")
	_, _, alone, ofAlone := low(m.Pairs)
	p.row("production alone", "1", spread("%.2f", each(m.Pairs, func(p Pair) float64 { return p.Alone.Worst(p.Alone.Rate()) })), share(alone, ofAlone),
		spread("%.0f", each(m.Pairs, func(p Pair) float64 { return p.Alone.P99MS })), spread("%.0f", each(m.Pairs, func(p Pair) float64 { return p.Alone.LongestMS })),
		spread("%.0f", each(m.Pairs, func(p Pair) float64 { return megabytes(p.Alone.Read) })), spread("%.0f", each(m.Pairs, func(p Pair) float64 { return megabytes(p.Alone.Written) })), "–")
	for _, t := range m.Tools {
		pairs := m.of(t.Key)
		if len(pairs) == 0 {
			why := t.Missing
			if why == "" {
				why = "not measured"
			}
			p.row(t.Name, why, "", "", "", "", "", "", "")
			continue
		}
		with, ofWith, _, _ := low(pairs)
		volume := func(figure func(w Window) backup.Bytes) string {
			alone := each(pairs, func(p Pair) float64 { return megabytes(figure(p.Alone)) * p.With.Seconds / p.Alone.Seconds })
			return fmt.Sprintf("%s (%.0f)", spread("%.0f", each(pairs, func(p Pair) float64 { return megabytes(figure(p.With)) })), Median(alone))
		}
		p.row(t.Name, "**"+spread("%.3f", each(pairs, Pair.Kept))+"**", spread("%.2f", each(pairs, Pair.Worst)), share(with, ofWith), fmt.Sprintf("%.0f → %s", Median(each(pairs, func(p Pair) float64 { return p.Alone.P99MS })), spread("%.0f", each(pairs, func(p Pair) float64 { return p.With.P99MS }))),
			spread("%.0f", each(pairs, func(p Pair) float64 { return p.With.LongestMS })), volume(func(w Window) backup.Bytes { return w.Read }), volume(func(w Window) backup.Bytes { return w.Written }), spread("%.1f", each(pairs, func(p Pair) float64 { return p.Seconds })))
	}
	p.row("cleancut, group", "not measured here", "", "", "", "", "", "", "")
	if !m.has(Bracketed) {
		p.row("cleancut, bracketed", "not measured", "", "", "", "", "", "", "")
	}
	p.line("")
}

// reached says how far cleancut is from what is to be reached.
func (p *page) reached(m Measurement) {
	pairs := m.of("cleancut-freeze")
	if len(pairs) == 0 {
		p.line("cleancut was not measured: nothing is claimed.")
		return
	}
	kept := Median(each(pairs, Pair.Kept))
	worst := Quantile(each(pairs, Pair.Worst), 0)
	p.line("**To reach**: cleancut keeps %.2f of the throughput, and no second is below %.1f.", toKeep, noBelow)
	verdict := "Reached."
	var short []string
	if kept < toKeep {
		short = append(short, fmt.Sprintf("the throughput kept is %.3f, %.3f too little", kept, toKeep-kept))
	}
	if worst < noBelow {
		short = append(short, fmt.Sprintf("the worst second is %.2f, %.2f too little", worst, noBelow-worst))
	}
	if len(short) > 0 {
		verdict = "**Not reached**: " + strings.Join(short, "; ") + "."
	}
	if dump := m.of("pg_dumpall"); len(dump) > 0 {
		verdict += fmt.Sprintf(" pg_dumpall keeps %.3f in the same run.", Median(each(dump, Pair.Kept)))
	}
	p.line("%s", verdict)
	p.why(m, pairs)
}

// why tells the seconds below apart: while the backup ran, afterwards, and in
// windows in which there was none.
func (p *page) why(m Measurement, pairs []Pair) {
	during, ofDuring, later, ofLater := 0, 0, 0, 0
	for _, q := range pairs {
		running := min(int(math.Ceil(q.Seconds)), len(q.With.PerSecond))
		for i, n := range q.With.PerSecond {
			below := 0
			if float64(n) < noBelow*q.Alone.Rate() {
				below = 1
			}
			if i < running {
				during, ofDuring = during+below, ofDuring+1
			} else {
				later, ofLater = later+below, ofLater+1
			}
		}
	}
	_, _, alone, ofAlone := low(m.Pairs)
	p.line("Of the seconds in which cleancut itself ran %s were below %.1f, of those after its end %s; of the seconds of production alone %s.", share(during, ofDuring), noBelow, share(later, ofLater), share(alone, ofAlone))
	var cuts []Cut
	for _, q := range pairs {
		if q.Cut != nil {
			cuts = append(cuts, *q.Cut)
		}
	}
	rounds := each(cuts, func(c Cut) float64 { return float64(len(c.Rounds)) })
	synced := each(cuts, func(c Cut) float64 {
		sum := 0.0
		for _, r := range c.Rounds {
			sum += r
		}
		return sum
	})
	if len(cuts) > 0 {
		p.line("The filesystem was frozen for %s ms, after %s rounds of syncfs that took %s ms together.", spread("%.0f", each(cuts, func(c Cut) float64 { return c.FreezeMS })), spread("%.0f", rounds), spread("%.0f", synced))
	}
	rates := each(m.Pairs, func(p Pair) float64 { return p.Alone.Rate() })
	p.line("The windows alone themselves had %s transactions/s: shares of them that differ by less than those do say nothing.", spread("%.0f", rates))
}

func (p *page) sizes(m Measurement) {
	c := m.Conditions
	p.line("## Size of the database")
	p.line("")
	p.line("The same machine and measurement, without a limit, the server at rest, one volume. Each time a checkpoint, one backup that does not count, %d backups with the real program (`--deadline 2m`) from its call to its end,", c.Backups)
	p.line("and %d restores of the last one, from the start of the restore to the first query. An aged volume was brought into at least %d extents: a clone is kept while every second block of a file on it is written anew.", c.Restores, c.Extents)
	p.line("")
	p.head("databases", "volume", "extents", "backup, s", "frozen, ms", "first query, s")
	for _, s := range m.Sizes {
		age := "fresh"
		if s.Aged {
			age = "aged"
		}
		p.row(s.Database.String(), age, fmt.Sprint(s.Extents), spread("%.2f", s.Backups), spread("%.0f", s.Frozen), spread("%.2f", s.Restores))
	}
	p.line("")
	for _, aged := range []bool{false, true} {
		p.growth(m.Sizes, aged)
	}
	p.line("")
}

// growth compares the largest database with the smallest.
func (p *page) growth(all []Size, aged bool) {
	sizes := slices.DeleteFunc(slices.Clone(all), func(s Size) bool { return s.Aged != aged })
	if len(sizes) < 2 {
		return
	}
	slices.SortFunc(sizes, func(a, b Size) int { return int(a.Database>>20) - int(b.Database>>20) })
	small, large := sizes[0], sizes[len(sizes)-1]
	p.line("%s volumes: %.1f times the database takes %.2f times as long to back up, and %.2f times as long to the first query (medians).", map[bool]string{false: "Fresh", true: "Aged"}[aged],
		float64(large.Database)/float64(small.Database), Median(large.Backups)/Median(small.Backups), Median(large.Restores)/Median(small.Restores))
}
