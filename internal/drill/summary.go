package drill

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"cleancut/internal/backup"
)

// Summary is what a drill has come to: all trials of its output folder, of
// whatever seed.
type Summary struct {
	Seed        int64         `json:"seed"`
	Cells       []CellSummary `json:"cells"`
	Checks      []CheckCount  `json:"checks"`
	Interrupted bool          `json:"interrupted,omitempty"`
	Report      string        `json:"report"`
	JSON        string        `json:"data"`
}

// Alarm is the one outcome that must not be: a cut that was held is damaged. The
// error wraps backup.ErrDamage.
func (s Summary) Alarm() error {
	var errs []error
	for _, c := range s.Cells {
		if c.Protected() && c.Damaged > 0 {
			errs = append(errs, fmt.Errorf("%s: %d of %d cuts that cleancut vouches for: %w", c.Conditions(), c.Damaged, c.Trials, backup.ErrDamage))
		}
	}
	return backup.Hint(errors.Join(errs...), "look at the trials in the data beside the report; `--keep damaged` keeps their images; please report it")
}

// CellSummary counts the trials of one cell.
type CellSummary struct {
	Cell
	Trials   int `json:"trials"` // that were judged
	Sound    int `json:"sound"`
	Lost     int `json:"lost"`
	Phantom  int `json:"phantom"`
	Silent   int `json:"silent"`
	NoStart  int `json:"nostart"`
	NoMount  int `json:"nomount"`
	FSDamage int `json:"fsdamage"`
	Unjudged int `json:"unjudged"` // could not be judged and were not repeated with success
	Damaged  int `json:"damaged"`  // all but the sound ones
	// Share is that of the damaged ones, within the interval.
	Share float64 `json:"share"`
	Interval
	Said string `json:"said"`
}

// Count returns how many are of a class.
func (s CellSummary) Count(c Class) int { return *s.counter(c) }

func (s *CellSummary) counter(c Class) *int {
	switch c {
	case Sound:
		return &s.Sound
	case Lost:
		return &s.Lost
	case Phantom:
		return &s.Phantom
	case Silent:
		return &s.Silent
	case NoStart:
		return &s.NoStart
	case NoMount:
		return &s.NoMount
	case FSDamage:
		return &s.FSDamage
	}
	return &s.Unjudged
}

// CheckCount is how a check did on the damaged images.
type CheckCount struct {
	Check       string `json:"check"`
	Caught      int    `json:"caught"`        // damaged images that it failed
	Missed      int    `json:"missed"`        // damaged images that it passed
	CouldNotRun int    `json:"could_not_run"` // damaged images that it could not look at
	OnSound     int    `json:"sound_passed"`  // sound images that it passed
}

// Summarize counts trials by cell.
func Summarize(trials []Trial) []CellSummary {
	byCell := map[Cell]*CellSummary{}
	type key struct {
		Cell
		seed int64
		n    int
	}
	judged := map[key]bool{}
	for _, t := range trials {
		if t.Class != "" {
			judged[key{t.Cell.whole(), t.Seed, t.N}] = true
		}
	}
	counted := map[key]bool{}
	for _, t := range trials {
		t.Cell = t.Cell.whole()
		s := byCell[t.Cell]
		if s == nil {
			s = &CellSummary{Cell: t.Cell}
			byCell[t.Cell] = s
		}
		k := key{t.Cell, t.Seed, t.N}
		if t.Class == "" && judged[k] || counted[k] {
			continue // repeated
		}
		counted[k] = true
		*s.counter(t.Class)++
		if t.Class != "" {
			s.Trials++
		}
	}
	var out []CellSummary
	for _, s := range byCell {
		s.Damaged = s.Trials - s.Sound
		s.Interval = Share95(s.Damaged, s.Trials)
		if s.Trials > 0 {
			s.Share = float64(s.Damaged) / float64(s.Trials)
		}
		s.Said = s.Sentence()
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b CellSummary) int {
		return cmp.Or(strings.Compare(a.Ground(), b.Ground()), cmp.Compare(b.Mode, a.Mode)*-1, strings.Compare(b.Checkpoint, a.Checkpoint), cmp.Compare(a.SkewMS, b.SkewMS), strings.Compare(a.Order, b.Order),
			strings.Compare(b.Recovery, a.Recovery))
	})
	return out
}

// rows is the name under which the comparison with the promise is counted.
const rows = "rows beside the promise"

// CountChecks says what each check caught and missed.
func CountChecks(trials []Trial) []CheckCount {
	var out []CheckCount
	for _, t := range trials {
		if t.Class == "" {
			continue
		}
		results := map[string]backup.CheckResult{}
		var order []string
		add := func(name string, r backup.CheckResult) {
			if _, seen := results[name]; !seen {
				order = append(order, name)
			}
			if results[name] != backup.Failed { // of several filesystems one is enough
				results[name] = r
			}
		}
		for _, c := range t.Checks {
			if c.Name != backup.CheckOwner {
				add(c.Kind(), c.Result)
			}
		}
		switch {
		case t.Found == nil:
			add(rows, backup.CouldNotRun)
		case len(t.Found.Problems()) > 0:
			add(rows, backup.Failed)
		default:
			add(rows, backup.Passed)
		}
		for _, name := range order {
			i := slices.IndexFunc(out, func(c CheckCount) bool { return c.Check == name })
			if i < 0 {
				i = len(out)
				out = append(out, CheckCount{Check: name})
			}
			out[i].add(t.Class, results[name])
		}
	}
	return out
}

func (c *CheckCount) add(class Class, r backup.CheckResult) {
	switch {
	case class == Sound && r == backup.Passed:
		c.OnSound++
	case class == Sound:
	case r == backup.Failed:
		c.Caught++
	case r == backup.Passed:
		c.Missed++
	default:
		c.CouldNotRun++
	}
}
