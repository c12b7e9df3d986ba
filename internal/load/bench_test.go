package load_test

import (
	"testing"
	"time"

	"cleancut/internal/load"
)

// BenchmarkLoad measures the default play database, all beaters and a
// judgement, once: run it with -benchtime=1x.
func BenchmarkLoad(b *testing.B) {
	s := startServer(b)
	conn := s.conn(b, "postgres")
	began := time.Now()
	facts := create(b, conn, load.Options{})
	b.Logf("created %v in %v", facts.Bytes, time.Since(began))
	for b.Loop() {
		for name, which := range map[string]load.Which{
			"words":     {Words: &load.WordsOptions{}},
			"words4":    {Words: &load.WordsOptions{Sessions: 4}},
			"transfers": {Transfers: &load.TransfersOptions{}},
			"bulk":      {Bulk: &load.BulkOptions{}},
			"churn":     {Churn: &load.ChurnOptions{}},
			"all":       load.All(),
		} {
			l, err := load.Start(b.Context(), s.connect("postgres"), which)
			if err != nil {
				b.Fatal(err)
			}
			<-time.After(5 * time.Second) // the measurement
			sum, err := l.Stop()
			if err != nil {
				b.Fatal(err)
			}
			b.Logf("%s: words %.0f/s, transfers %.0f/s, bulk %.0f rows/s, churn %.1f tables/s, stall %v", name, sum.WordsPerSecond, sum.TransfersPerSecond,
				float64(sum.BulkRows)/sum.Duration.Seconds(), float64(sum.ChurnTables)/sum.Duration.Seconds(), sum.LongestStall.Length)
		}
	}
	run(b, conn, `truncate play.words_said`)
	run(b, conn, `insert into play.words_said select 7, i, 'word', md5('7/' || i || '/word')::uuid from generate_series(1, 1000000) i`)
	began = time.Now()
	f := judge(b, conn, load.Promise{Words: []load.Stream{{Stream: 7, Acked: 1_000_000, Sent: 1_000_000}}, Facts: &facts})
	b.Logf("judged 1,000,000 words and the rest in %v", time.Since(began))
	if f.Words.Found != 1_000_000 || f.Words.Missing+f.Words.Torn != 0 {
		b.Errorf("%+v", f.Words)
	}
}
