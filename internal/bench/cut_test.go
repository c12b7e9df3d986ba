package bench_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/bench"
)

const (
	clusters   = 4      // made anew for the fresh cuts: cuts under load age volumes
	cutsEach   = 10     // fresh ones on each of them
	agedCuts   = 32     // on one
	agedEnough = 100000 // extents of one volume
	quiet      = 500 * time.Millisecond
)

// BenchmarkCut measures how long production stands still for a cut of four
// filesystems while pgbench writes to all of them, and where that time goes:
// on volumes as they are made, and with one of them in 100,000 extents.
func BenchmarkCut(b *testing.B) {
	settings := map[string]string{"checkpoint_timeout": "30s"}
	b.Run("fresh", func(b *testing.B) {
		var all []*production
		for range clusters {
			p := newProduction(b, settings)
			p.fill(b, 10)
			p.server.Stop(b)
			all = append(all, p)
		}
		once(b, func() {
			var seen []observed
			for _, p := range all {
				p.server.Start(b)
				seen = append(seen, p.cutUnderLoad(b, cutsEach)...)
				p.server.Stop(b)
			}
			report(b, seen)
		})
	})
	b.Run("aged", func(b *testing.B) {
		p := newProduction(b, settings)
		p.fill(b, 10)
		if err := bench.Age(p.mounts[onTables], p.images[onTables], filepath.Join(p.pool, "aged.img"), agedEnough); err != nil {
			b.Fatal(err)
		}
		once(b, func() { report(b, p.cutUnderLoad(b, agedCuts)) })
	})
}

// observed is a cut and what was seen beside its manifest.
type observed struct {
	cut         backup.Cut
	snapshots   []backup.Snapshot
	extents     float64 // of all volumes, before
	stall, calm float64 // ms of the slowest transaction during the freeze, and in as long a while later, but at most 250 ms
	perSecond   float64 // transactions, in the whole run
}

// frozen returns the whole of the freeze.
func (o observed) frozen() (from, held, to time.Time) {
	from, held, to = o.cut.Frozen[0].Called, o.cut.Frozen[0].Held, o.cut.Frozen[0].Thawed
	for _, f := range o.cut.Frozen {
		from, held, to = earlier(from, f.Called), later(held, f.Held), later(to, f.Thawed)
	}
	return from, held, to
}

// cutUnderLoad takes backups one after the other while pgbench runs.
func (p *production) cutUnderLoad(b *testing.B, n int) []observed {
	b.Helper()
	load := p.pgbench(b)
	pause(b, 2*time.Second)
	var seen []observed
	for range n {
		var extents float64
		for _, image := range p.images {
			n, err := bench.Extents(image)
			if err != nil {
				b.Fatal(err)
			}
			extents += float64(n)
		}
		m := p.backup(b)
		seen = append(seen, observed{cut: m.Cut, snapshots: m.Snapshots, extents: extents})
		pause(b, quiet)
	}
	pause(b, 2*time.Second) // pgbench's log is written in blocks
	transactions, perSecond := load.stop(b)
	for i := range seen {
		from, _, to := seen[i].frozen()
		seen[i].stall = ms(slowest(transactions, from, to))
		from, to = to.Add(quiet/2), to.Add(quiet/2+min(to.Sub(from), quiet/2)) // before the next one
		seen[i].calm, seen[i].perSecond = ms(slowest(transactions, from, to)), perSecond
	}
	return seen
}

// report says how long the cuts took and where the time went.
func report(b *testing.B, seen []observed) {
	b.Helper()
	var freeze, spread, take, rest, rounds, stall, calm, extents, perExtent, rate figures
	each := map[string]figures{}
	var order []string
	for _, o := range seen {
		from, held, to := o.frozen()
		asked, answered := o.snapshots[0].Requested, o.snapshots[0].Responded
		for _, s := range o.snapshots {
			asked, answered = earlier(asked, s.Requested), later(answered, s.Responded)
		}
		for _, f := range o.cut.Frozen {
			name := filepath.Base(f.Mountpoint)
			if len(each[name]) == 0 {
				order = append(order, name)
			}
			each[name] = append(each[name], ms(f.Held.Sub(f.Called)))
		}
		freeze, spread = append(freeze, ms(to.Sub(from))), append(spread, o.cut.SpreadMS)
		take, rest = append(take, ms(answered.Sub(asked))), append(rest, ms(asked.Sub(held)+to.Sub(answered)))
		rounds, stall, calm = append(rounds, float64(len(o.cut.SyncRounds))), append(stall, o.stall), append(calm, o.calm)
		extents, perExtent, rate = append(extents, o.extents), append(perExtent, 1000*ms(answered.Sub(asked))/o.extents), append(rate, o.perSecond)
	}
	for name, f := range map[string]figures{"freeze": freeze, "spread": spread, "stall": stall} {
		b.ReportMetric(f.p50(), name+"-p50-ms")
		b.ReportMetric(f.p95(), name+"-p95-ms")
	}
	table := []string{fmt.Sprintf("%d cuts under %.0f to %.0f transactions/s; the four volumes in %.0f to %.0f extents, %.0f us of snapshot for each (p50); at most %.0f syncfs rounds",
		len(seen), rate.at(0), rate.max(), extents.at(0), extents.max(), perExtent.p50(), rounds.max())}
	row := func(name string, f figures) {
		table = append(table, fmt.Sprintf("%-21s p50 %7.1f  p95 %7.1f  max %7.1f ms", name, f.p50(), f.p95(), f.max()))
	}
	row("freeze to thaw", freeze)
	for _, name := range order {
		row("  FIFREEZE of "+name, each[name])
	}
	row("  snapshots", take)
	row("  between, and FITHAW", rest)
	row("slowest transaction", stall)
	table[len(table)-1] += fmt.Sprintf("; in a while without a cut: %.1f, %.1f, %.1f", calm.p50(), calm.p95(), calm.max())
	b.Log(strings.Join(table, "\n")) // package testing shows nine lines of a benchmark
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
