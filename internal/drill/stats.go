package drill

import (
	"fmt"
	"math"

	"cleancut/internal/backup"
)

// Interval is a 95 % confidence interval of a share.
type Interval struct {
	Lower float64 `json:"lower95"`
	Upper float64 `json:"upper95"`
}

// confidence that the interval holds the true share.
const confidence = 0.95

// Share95 is the interval of the share behind k of n, by Clopper and Pearson
// (Biometrika 26, 1934): the one that never covers less than 95 %, whatever the
// true share and however few trials. Wilson's is narrower, but covers less than
// it says for shares near 0 and 1, which is where a backup tool has to live.
//
// With k = 0 no lower limit is in doubt, so all five per cent lie above and the
// upper limit is the rule of three, 3/n (at most 1): a little more than the
// exact 1 − 0.05^(1/n). The same from the other side for k = n. Choosing one
// side after having seen the count has a price: for true shares near 3/n the
// two rules together are only sure to cover 92.5 %. Without trials nothing is
// known: 0 to 1.
func Share95(k, n int) Interval {
	switch {
	case n <= 0 || k < 0 || k > n:
		return Interval{0, 1}
	case k == 0:
		return Interval{0, min(1, 3/float64(n))}
	case k == n:
		return Interval{max(0, 1-3/float64(n)), 1}
	}
	tail := (1 - confidence) / 2
	// The share under which so many or more have the tail's chance, and the one
	// under which so many or fewer have it.
	lower := solve(func(p float64) bool { return 1-atMost(k-1, n, p) >= tail })
	upper := solve(func(p float64) bool { return atMost(k, n, p) <= tail })
	return Interval{lower, upper}
}

// solve finds where between 0 and 1 a condition that holds from some point on
// begins to hold.
func solve(holds func(p float64) bool) float64 {
	low, high := 0.0, 1.0
	for range 60 {
		if mid := (low + high) / 2; holds(mid) {
			high = mid
		} else {
			low = mid
		}
	}
	return (low + high) / 2
}

// atMost is the chance of k or fewer of n, each with chance p.
func atMost(k, n int, p float64) float64 {
	if p <= 0 {
		return 1
	}
	if p >= 1 {
		if k >= n {
			return 1
		}
		return 0
	}
	choose := func(i int) float64 {
		a, _ := math.Lgamma(float64(n + 1))
		b, _ := math.Lgamma(float64(i + 1))
		c, _ := math.Lgamma(float64(n - i + 1))
		return a - b - c
	}
	sum := 0.0
	for i := 0; i <= k; i++ {
		sum += math.Exp(choose(i) + float64(i)*math.Log(p) + float64(n-i)*math.Log1p(-p))
	}
	return min(sum, 1)
}

// Sentence is what may be quoted of a cell.
func (s CellSummary) Sentence() string {
	cuts := map[bool]string{true: "frozen cuts", false: "cuts that nothing held"}[s.Protected()]
	if s.Mode == backup.ModeGroup {
		cuts = "group cuts"
	}
	members := "members"
	if s.Mode == backup.ModeBracketed {
		cuts, members = "bracketed cuts", "filesystems"
		if s.Recovery == Crash {
			cuts = "bracketed cuts, their label and WAL left aside,"
		}
	}
	when := "with all " + members + " at once"
	if s.inTurn() {
		when = "with one filesystem right after the other"
	}
	if s.SkewMS > 0 {
		when = "with " + s.Skew().String() + " between " + members
		if s.Order != "" {
			when += ", the last first"
		}
	}
	after := ""
	if s.Recovery != "" {
		after = " after " + s.Recovery + " recovery"
	}
	what := fmt.Sprintf("%d of %d %s %s were damaged%s", s.Damaged, s.Trials, cuts, when, after)
	if s.Trials == 1 {
		what = fmt.Sprintf("%d of 1 cut (%s, %s) was damaged%s", s.Damaged, s.Mode, when, after)
	}
	under := " under these conditions (" + s.Ground() + ")"
	switch {
	case s.Trials == 0:
		return "No cut " + when + " was judged" + after + ": nothing is known."
	case s.Damaged == 0:
		if s.Upper >= 1 {
			return what + under + ": so few say nothing about how often such cuts are."
		}
		return fmt.Sprintf("%s%s: with 95 %% confidence at most %s of such cuts are (3/%d).", what, under, Percent(s.Upper), s.Trials)
	case s.Damaged == s.Trials && s.Lower <= 0:
		return what + under + ": it happens; so few do not say how often."
	case s.Damaged == s.Trials:
		return fmt.Sprintf("%s%s: with 95 %% confidence at least %s of such cuts are (1 − 3/%d).", what, under, Percent(s.Lower), s.Trials)
	}
	return fmt.Sprintf("%s%s: %s, with a 95 %% interval from %s to %s.", what, under, Percent(s.Share), Percent(s.Lower), Percent(s.Upper))
}

// Percent rounds so that no share but 0 and 1 reads as such.
func Percent(p float64) string {
	switch {
	case p > 0 && p < 0.001:
		return "less than 0.1 %"
	case p < 1 && p > 0.999:
		return "more than 99.9 %"
	case p < 0.1 && p > 0, p > 0.99 && p < 1:
		return fmt.Sprintf("%.1f %%", 100*p)
	}
	return fmt.Sprintf("%.0f %%", 100*p)
}
