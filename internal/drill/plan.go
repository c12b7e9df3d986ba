package drill

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// batch is one production run that is to be: trial n of the cells that share a
// ground.
type batch struct {
	ground Cell
	n      int
	seed   uint64
	cuts   []planned // in the order in which they are made
}

// planned is a cut that is to be made, and how its image is to be recovered.
type planned struct {
	cell       Cell // of the cut
	recoveries []string
}

// ships: the batch has an image that needs WAL of production.
func (b batch) ships() bool {
	return slices.ContainsFunc(b.cuts, planned.ships)
}

func (p planned) ships() bool {
	return p.cell.Mode != backup.ModeBracketed && slices.Contains(p.recoveries, Archive)
}

// plan lists the production runs that are still to be made, trial by trial, so
// that a drill that is stopped has about as many trials of each cell.
func plan(cells []Cell, seed int64, trials int, done func(c Cell, n int) bool) []batch {
	var out []batch
	for n := 1; n <= trials; n++ {
		var grounds []Cell
		for _, c := range cells {
			if g := c.ground(); !slices.Contains(grounds, g) {
				grounds = append(grounds, g)
			}
		}
		for _, g := range grounds {
			b := batch{ground: g, n: n, seed: runSeed(seed, g, n)}
			for _, c := range cells {
				if c.ground() == g {
					b.add(c, done(c, n))
				}
			}
			// Ordered by what they are, not by how they were asked for; then
			// shuffled as a whole, so that done ones do not change the order.
			slices.SortFunc(b.cuts, func(x, y planned) int { return cmp.Compare(x.cell.Conditions(), y.cell.Conditions()) })
			b.random().Shuffle(len(b.cuts), func(i, j int) { b.cuts[i], b.cuts[j] = b.cuts[j], b.cuts[i] })
			b.cuts = slices.DeleteFunc(b.cuts, func(p planned) bool { return len(p.recoveries) == 0 })
			if len(b.cuts) > 0 {
				out = append(out, b)
			}
		}
	}
	return out
}

// add has a cell's image cut, once for all ways to recover it.
func (b *batch) add(c Cell, done bool) {
	i := slices.IndexFunc(b.cuts, func(p planned) bool { return p.cell == c.cut() })
	if i < 0 {
		i = len(b.cuts)
		b.cuts = append(b.cuts, planned{cell: c.cut()})
	}
	if !done {
		b.cuts[i].recoveries = append(b.cuts[i].recoveries, c.Recovery)
	}
}

// runSeed mixes the drill's seed with what the run is, so that every run of
// every drill has conditions of its own.
func runSeed(seed int64, ground Cell, n int) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d/%s/%d", seed, ground.Ground(), n)
	return h.Sum64()
}

func (b batch) random() *rand.Rand { return rand.New(rand.NewPCG(b.seed, uint64(b.n))) }

// pause is the time before a cut, which moves it against the load's own
// beat (a checkpoint every four seconds).
func (b batch) pause(c Cell) time.Duration {
	h := fnv.New64a()
	fmt.Fprint(h, c.Conditions())
	r := rand.New(rand.NewPCG(b.seed, h.Sum64()))
	return 500*time.Millisecond + time.Duration(r.Int64N(int64(4*time.Second)))
}

// Cut is one cut that is to be made, and what the seed says about it.
type Cut struct {
	Cell       Cell   // without a recovery
	Recoveries string // ways in which its image is to be judged, with commas
	N          int
	Seed       uint64 // of the production run
	Pause      time.Duration
}

// Schedule lists the cuts that are still to be made, in their order.
func Schedule(cells []Cell, seed int64, trials int, done func(c Cell, n int) bool) []Cut {
	var out []Cut
	for _, b := range plan(cells, seed, trials, done) {
		for _, c := range b.cuts {
			out = append(out, Cut{c.cell, strings.Join(c.recoveries, ","), b.n, b.seed, b.pause(c.cell)})
		}
	}
	return out
}
