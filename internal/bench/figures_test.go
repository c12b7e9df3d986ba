package bench_test

import (
	"math"
	"slices"
	"testing"
	"time"
)

// figures are the measurements of one thing.
type figures []float64

// at returns the q-quantile by the nearest rank: a value that was measured.
func (f figures) at(q float64) float64 {
	if len(f) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(f))
	return sorted[max(int(math.Ceil(q*float64(len(sorted))))-1, 0)]
}

func (f figures) p50() float64 { return f.at(0.50) }
func (f figures) p95() float64 { return f.at(0.95) }
func (f figures) max() float64 { return f.at(1) }

// ms is a duration in milliseconds.
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func TestQuantilesAreValuesThatWereMeasured(t *testing.T) {
	var f figures
	for i := range 40 {
		f = append(f, float64(40-i))
	}
	for _, c := range []struct{ q, want float64 }{{0, 1}, {0.5, 20}, {0.95, 38}, {1, 40}} {
		if got := f.at(c.q); got != c.want {
			t.Errorf("quantile %v of 1 to 40: got %v, want %v", c.q, got, c.want)
		}
	}
	if got := (figures{}).at(0.5); !math.IsNaN(got) {
		t.Errorf("quantile of nothing: got %v, want NaN", got)
	}
}
