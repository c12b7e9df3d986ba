package bench_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const sizeRuns = 9

// BenchmarkSize measures a backup from its first call to complete.json, with a
// small database and with one of ten times its size, on a server at rest.
func BenchmarkSize(b *testing.B) {
	p := newProduction(b, map[string]string{"max_wal_size": "2GB", "autovacuum": "off"})
	p.server.Exec(b, "CREATE TABLE filler (n bigint, filler text) TABLESPACE "+onTables)
	grow := func(rows int) {
		// A row of 1 KiB is below the size from which PostgreSQL compresses.
		p.server.Exec(b, fmt.Sprintf("INSERT INTO filler SELECT g, repeat(md5(g::text), 31) FROM generate_series(1, %d) g", rows), "CHECKPOINT")
	}
	const small = 180_000 // about 200 MB with what every cluster holds
	b.Run("200MB-2GB", func(b *testing.B) {
		once(b, func() {
			grow(small)
			few, fewBytes := p.timeBackups(b)
			grow(9*small + small/4)
			many, manyBytes := p.timeBackups(b)
			b.ReportMetric(few.p50(), "small-ms")
			b.ReportMetric(many.p50(), "large-ms")
			b.ReportMetric(many.p50()/few.p50(), "ratio")
			b.Log(strings.Join([]string{fmt.Sprintf("%s: p50 %.0f, p95 %.0f ms: %.0f", fewBytes, few.p50(), few.p95(), []float64(few)),
				fmt.Sprintf("%s: p50 %.0f, p95 %.0f ms: %.0f", manyBytes, many.p50(), many.p95(), []float64(many))}, "\n"))
		})
	})
}

// timeBackups returns the milliseconds of some backups, and how large the
// databases are and what of it was the cut.
func (p *production) timeBackups(b *testing.B) (took figures, about string) {
	b.Helper()
	var frozen, synced figures
	size := ""
	p.backup(b) // what the growth left to write back is not the backup's
	for range sizeRuns {
		began := time.Now()
		m := p.backup(b)
		took = append(took, ms(time.Since(began)))
		frozen = append(frozen, m.Cut.FreezeMS)
		synced = append(synced, m.Cut.SyncRounds...)
		size = databases(m).String()
	}
	return took, fmt.Sprintf("%s (frozen p50 %.0f ms, a syncfs round p50 %.0f ms)", size, frozen.p50(), synced.p50())
}
