package backup

import "time"

// Level is how deep a verification goes.
type Level string

// The levels; each includes the ones before it.
const (
	LevelStart Level = "start" // recovers, reaches the promised LSN, stops cleanly
	LevelRows  Level = "rows"  // and every row of every database is read
	LevelFull  Level = "full"  // and indexes, visibility, page checksums and the filesystems
)

// CheckResult is the outcome of one check. "could not run" is not "passed".
type CheckResult string

// The three outcomes.
const (
	Passed      CheckResult = "passed"
	Failed      CheckResult = "failed"
	CouldNotRun CheckResult = "could not run"
)

// Check is one line of a verdict.
type Check struct {
	Name    string      `json:"name"`
	Result  CheckResult `json:"result"`
	Detail  string      `json:"detail,omitempty"`
	Seconds float64     `json:"seconds"`
}

// Verdict is the recorded result of restoring and checking a backup.
type Verdict struct {
	Backup   ID        `json:"backup"`
	Level    Level     `json:"level"`
	Tool     string    `json:"tool"`
	Host     string    `json:"host"`
	Time     time.Time `json:"time"`
	Seconds  float64   `json:"seconds"`
	EndLSN   LSN       `json:"end_of_recovery"`
	FirstSec float64   `json:"seconds_to_first_query"`
	Checks   []Check   `json:"checks"`
}

// Good reports whether nothing failed and at least one check passed.
func (v Verdict) Good() bool {
	passed := false
	for _, c := range v.Checks {
		if c.Result == Failed {
			return false
		}
		passed = passed || c.Result == Passed
	}
	return passed
}

// Word is the verdict in one word for a list: good, damaged.
func (v Verdict) Word() string {
	if v.Good() {
		return "good"
	}
	return "damaged"
}
