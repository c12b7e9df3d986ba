package drill_test

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
)

// From R's binom.test, which computes Clopper and Pearson's interval.
func TestIntervalsAgreeWithTheTables(t *testing.T) {
	for _, c := range []struct {
		k, n         int
		lower, upper float64
	}{
		{1, 2, 0.0126, 0.9874}, {1, 10, 0.0025, 0.4450}, {5, 10, 0.1871, 0.8129}, {9, 10, 0.5550, 0.9975}, {2, 20, 0.0123, 0.3170}, {50, 100, 0.3983, 0.6017}, {1, 100, 0.0003, 0.0545},
		{0, 200, 0, 0.015}, {0, 10, 0, 0.3}, {0, 3, 0, 1}, {0, 1, 0, 1}, {10, 10, 0.7, 1}, {3, 3, 0, 1}, {0, 0, 0, 1},
	} {
		got := drill.Share95(c.k, c.n)
		if math.Abs(got.Lower-c.lower) > 5e-5 || math.Abs(got.Upper-c.upper) > 5e-5 {
			t.Errorf("%d of %d: got %.4f to %.4f, want %.4f to %.4f", c.k, c.n, got.Lower, got.Upper, c.lower, c.upper)
		}
	}
}

func choose(n, k int) float64 {
	a, _ := math.Lgamma(float64(n + 1))
	b, _ := math.Lgamma(float64(k + 1))
	c, _ := math.Lgamma(float64(n - k + 1))
	return a - b - c
}

func TestAnIntervalCoversTheTrueShareAsOftenAsItSays(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 10, 20, 50} {
		worst := 1.0
		intervals := make([]drill.Interval, n+1)
		for k := range intervals {
			intervals[k] = drill.Share95(k, n)
		}
		for i := 1; i < 200; i++ {
			p := float64(i) / 200
			covered := 0.0
			for k := 0; k <= n; k++ {
				if s := intervals[k]; s.Lower <= p && p <= s.Upper {
					covered += math.Exp(choose(n, k) + float64(k)*math.Log(p) + float64(n-k)*math.Log1p(-p))
				}
			}
			worst = min(worst, covered)
		}
		if worst < 0.925 {
			t.Errorf("%d trials: covers only %.1f %% for some share", n, 100*worst)
		}
	}
}

func TestAnIntervalHoldsItsOwnShareAndNarrowsWithTrials(t *testing.T) {
	for n := 1; n <= 24; n++ {
		for k := 0; k <= n; k++ {
			s, share := drill.Share95(k, n), float64(k)/float64(n)
			if s.Lower > share || s.Upper < share || s.Lower < 0 || s.Upper > 1 {
				t.Fatalf("%d of %d: %+v does not hold %.3f", k, n, s, share)
			}
			mirror := drill.Share95(n-k, n)
			if math.Abs(s.Lower-(1-mirror.Upper)) > 1e-9 {
				t.Fatalf("%d of %d: %+v is no mirror of %+v", k, n, s, mirror)
			}
			more := drill.Share95(2*k, 2*n)
			if more.Upper-more.Lower > s.Upper-s.Lower+1e-9 {
				t.Fatalf("%d of %d: %+v is wider than %+v", 2*k, 2*n, more, s)
			}
		}
		// The rule of three never claims more than the exact limit allows.
		if chance := math.Pow(1-drill.Share95(0, n).Upper, float64(n)); chance > 0.05 {
			t.Errorf("0 of %d: %.3f", n, chance)
		}
	}
}

func TestASentenceSaysHowItWasRecovered(t *testing.T) {
	for _, c := range []struct {
		mode           backup.Mode
		recovery, says string
	}{
		{backup.ModeFreeze, drill.Crash, "0 of 30 frozen cuts with 5s between members were damaged after crash recovery under these conditions"},
		{backup.ModeFreeze, drill.Archive, "0 of 30 frozen cuts with 5s between members were damaged after archive recovery under"},
		{backup.ModeBracketed, drill.Archive, "0 of 30 bracketed cuts with 5s between filesystems were damaged after archive recovery under"},
		{backup.ModeBracketed, drill.Crash, "0 of 30 bracketed cuts, their label and WAL left aside, with 5s between filesystems were damaged after crash recovery under"},
	} {
		s := drill.CellSummary{Cell: drill.Cell{Layout: "separate", Mode: c.mode, SkewMS: 5000, Recovery: c.recovery}, Trials: 30, Interval: drill.Share95(0, 30)}
		if got := s.Sentence(); !strings.HasPrefix(got, c.says) {
			t.Errorf("got %q, want %q", got, c.says)
		}
	}
}

func TestASentenceSaysWhatIsKnown(t *testing.T) {
	for _, c := range []struct {
		mode          backup.Mode
		skew          int64
		damaged, n    int
		says, saysNot string
	}{
		{backup.ModeFreeze, 0, 0, 200, "0 of 200 frozen cuts with all members at once were damaged under these conditions (separate of 4, xfs, heavy load, native): with 95 % confidence at most 1.5 % of such cuts are (3/200).", "never"},
		{backup.ModeFreeze, 5000, 0, 2, "so few say nothing about how often", "confidence"},
		{backup.ModeNone, 5000, 7, 10, "7 of 10 cuts that nothing held with 5s between members were damaged under these conditions (separate of 4, xfs, heavy load, native): 70 %, with a 95 % interval from 35 % to 93 %.", ""},
		{backup.ModeNone, 5000, 10, 10, "with 95 % confidence at least 70 % of such cuts are", "always"},
		{backup.ModeNone, 1000, 3, 3, "it happens; so few do not say how often", "confidence"},
		{backup.ModeNone, 1000, 1, 1, "1 of 1 cut (none, with 1s between members) was damaged", "confidence"},
		{backup.ModeNone, 1000, 0, 0, "nothing is known", "damaged"},
	} {
		t.Run(fmt.Sprintf("%d of %d", c.damaged, c.n), func(t *testing.T) {
			s := drill.CellSummary{Cell: drill.Cell{Where: "native", Layout: "separate", Volumes: 4, Filesystem: "xfs", Load: "heavy", Mode: c.mode, SkewMS: c.skew},
				Trials: c.n, Damaged: c.damaged, Interval: drill.Share95(c.damaged, c.n)}
			if c.n > 0 {
				s.Share = float64(c.damaged) / float64(c.n)
			}
			if got := s.Sentence(); !strings.Contains(got, c.says) || c.saysNot != "" && strings.Contains(got, c.saysNot) {
				t.Errorf("got %q", got)
			}
		})
	}
}
