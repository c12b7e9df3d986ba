package bench_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

const (
	goldenCopies = 10 // at once
	goldenRounds = 5  // of a restore of each
)

// BenchmarkGolden measures what a golden image saves: the restore of one and the
// same cluster in three sizes, each with a part of it just written anew, from
// the image and from the backup itself; and many copies of one image at once.
func BenchmarkGolden(b *testing.B) {
	p := newProduction(b, map[string]string{"max_wal_size": "6GB", "checkpoint_timeout": "1h"})
	once(b, func() {
		var first, last float64
		for _, scale := range []int{3, 33, 133} { // pgbench's: 15 MB and more each
			p.fill(b, scale)
			p.server.Exec(b, fmt.Sprintf("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid <= %d", scale*100_000/5))
			m := p.backup(b)
			began := time.Now()
			golden, err := p.flow.Golden(b.Context(), m.ID)
			if err != nil {
				b.Fatal(err)
			}
			made := time.Since(began).Seconds()
			var size backup.Bytes
			for _, d := range m.Server.Databases {
				size += d.Size
			}
			var fast, slow figures
			for range goldenRounds {
				fast = append(fast, p.restored(b, golden))
				slow = append(slow, p.restored(b, m.ID))
			}
			last = fast.p50()
			if first == 0 {
				first = last
			}
			b.ReportMetric(last, fmt.Sprintf("golden-%d-s", scale))
			b.ReportMetric(slow.p50(), fmt.Sprintf("backup-%d-s", scale))
			b.Logf("%s: from the image %.2f s, from the backup %.2f s; the image was made in %.1f s, with the verification before", size, []float64(fast), []float64(slow), made)
			if scale == 33 {
				p.copiesAtOnce(b, golden)
			}
		}
		b.ReportMetric(last/first, "big/small")
	})
}

// restored restores a backup to its first query and removes the copy. It returns
// the seconds of the first.
func (p *production) restored(b *testing.B, id backup.ID) float64 {
	b.Helper()
	began := time.Now()
	r, release, err := p.flow.Restore(b.Context(), flow.RestoreOptions{ID: id, Root: filepath.Join(p.dir, "copy"), Purpose: backup.ForRestore})
	took := time.Since(began).Seconds()
	if err != nil {
		b.Fatal(err)
	}
	release()
	p.removeCopy(b, r.Copy.Root)
	return took
}

// copiesAtOnce makes copies of one backup at the same time and removes them at
// the same time.
func (p *production) copiesAtOnce(b *testing.B, id backup.ID) {
	b.Helper()
	each, errs := make(figures, goldenCopies), make([]error, goldenCopies)
	root := func(i int) string { return filepath.Join(p.dir, fmt.Sprint("clone", i)) }
	all := func(do func(i int)) float64 {
		began := time.Now()
		var group sync.WaitGroup
		for i := range goldenCopies {
			group.Go(func() { do(i) })
		}
		group.Wait()
		return time.Since(began).Seconds()
	}
	began := time.Now()
	answer := all(func(i int) {
		_, release, err := p.flow.Restore(b.Context(), flow.RestoreOptions{ID: id, Root: root(i), Purpose: backup.ForRestore})
		if errs[i] = err; err == nil {
			each[i] = time.Since(began).Seconds()
			release()
		}
	})
	for _, err := range errs {
		if err != nil {
			b.Error(err)
		}
	}
	gone := all(func(i int) { p.removeCopy(b, root(i)) })
	inv, err := p.flow.Provider.List(b.Context(), nil)
	if err != nil || len(inv.Volumes) != len(p.mounts) {
		b.Errorf("%d volumes stand, %v", len(inv.Volumes), err)
	}
	b.ReportMetric(answer, "ten-answer-s")
	b.ReportMetric(gone, "ten-gone-s")
	b.Log(strings.TrimSpace(fmt.Sprintf("%d at once, four volumes each: all answer after %.2f s (the first after %.2f s, p50 %.2f s); all gone %.2f s later", goldenCopies, answer, each.at(0), each.p50(), gone)))
}
