package evidence

import (
	"bufio"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// Transaction is one transaction of pgbench: from its begin to the answer to
// its commit.
type Transaction struct{ From, To time.Time }

// Transactions reads pgbench's log (pgbench(1), "Per-Transaction Logging"):
// client, number, microseconds, script, and the end's seconds and microseconds.
// A line that is none of that is left out: of a pgbench that was killed the
// last one is cut short.
func Transactions(log io.Reader) ([]Transaction, error) {
	var out []Transaction
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 6 {
			continue
		}
		took, err1 := strconv.ParseInt(f[2], 10, 64)
		seconds, err2 := strconv.ParseInt(f[4], 10, 64)
		micro, err3 := strconv.ParseInt(f[5], 10, 64)
		if err1 != nil || err2 != nil || err3 != nil {
			continue
		}
		end := time.Unix(seconds, micro*1000)
		out = append(out, Transaction{end.Add(-time.Duration(took) * time.Microsecond), end})
	}
	return out, lines.Err()
}

// Window is a stretch of time of production under load.
type Window struct {
	From         time.Time    `json:"from"`
	Seconds      float64      `json:"seconds"`
	Transactions int          `json:"transactions"` // that ended in it
	PerSecond    []int        `json:"per_second"`   // of its whole seconds
	P99MS        float64      `json:"p99_ms"`       // of those that ended in it
	LongestMS    float64      `json:"longest_ms"`   // of those that were under way in it
	Read         backup.Bytes `json:"read_bytes"`   // on the volume
	Written      backup.Bytes `json:"written_bytes"`
}

// Look cuts a window out of a run's transactions.
func Look(all []Transaction, from, to time.Time) Window {
	w := Window{From: from.UTC(), Seconds: to.Sub(from).Seconds(), PerSecond: make([]int, int(to.Sub(from)/time.Second))}
	var ms []float64
	for _, t := range all {
		took := float64(t.To.Sub(t.From).Microseconds()) / 1000
		if t.To.After(from) && t.From.Before(to) {
			w.LongestMS = max(w.LongestMS, took)
		}
		if t.To.Before(from) || !t.To.Before(to) {
			continue
		}
		w.Transactions++
		ms = append(ms, took)
		if second := int(t.To.Sub(from) / time.Second); second < len(w.PerSecond) {
			w.PerSecond[second]++
		}
	}
	if len(ms) > 0 { // without any, JSON has no word for it
		w.P99MS = Quantile(ms, 0.99)
	}
	return w
}

// Rate is the mean of the window in transactions a second.
func (w Window) Rate() float64 { return float64(w.Transactions) / w.Seconds }

// Worst is the least transactions of a whole second, as a share of a rate. NaN
// without a whole second.
func (w Window) Worst(rate float64) float64 {
	if len(w.PerSecond) == 0 {
		return math.NaN()
	}
	return float64(slices.Min(w.PerSecond)) / rate
}

// Below counts the whole seconds with less than that share of a rate.
func (w Window) Below(share, rate float64) int {
	n := 0
	for _, s := range w.PerSecond {
		if float64(s) < share*rate {
			n++
		}
	}
	return n
}

// Quantile is the q-quantile by the nearest rank: a value that was measured.
// NaN of nothing.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

// Median is the middle of some values, of two middle ones their mean; NaN of
// none.
func Median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}
