package backup

import (
	"strings"
	"time"
)

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

// Names of checks by which somebody decides what kind of damage it is. A
// filesystem's check is named for its device, see FilesystemCheck.
const (
	CheckMounted   = "mounted"             // only recorded where it fails
	CheckReadable  = "filesystem readable" // only recorded where it fails
	CheckRecovered = "recovered"
	CheckFlushed   = "flushed WAL reached"
	CheckOwner     = "the owner's own look"
	CheckChecksums = "page checksums (pg_checksums)" // could not run where the cluster has none

	filesystemCheck = " check of "
)

// FilesystemCheck names the check of one filesystem.
func FilesystemCheck(fstype, device string) string { return fstype + filesystemCheck + device }

// Kind is the check's name without the device, the same for every image.
func (c Check) Kind() string {
	if fstype, _, ok := strings.Cut(c.Name, filesystemCheck); ok {
		return fstype + filesystemCheck + "the filesystem"
	}
	return c.Name
}

// OfFilesystem tells a check of a filesystem from one of the server.
func (c Check) OfFilesystem() bool {
	return c.Name == CheckReadable || strings.Contains(c.Name, filesystemCheck)
}

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
	Target   string    `json:"target,omitempty"` // of the recovery, as ParseTarget reads it; empty: the end of the backup
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
