package bench_test

import (
	"time"

	"cleancut/internal/evidence"
)

// figures are the measurements of one thing.
type figures []float64

func (f figures) at(q float64) float64 { return evidence.Quantile(f, q) }
func (f figures) p50() float64         { return f.at(0.50) }
func (f figures) p95() float64         { return f.at(0.95) }
func (f figures) max() float64         { return f.at(1) }

// ms is a duration in milliseconds.
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
