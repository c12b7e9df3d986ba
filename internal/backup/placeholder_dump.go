package backup

import (
	"slices"
	"time"
)

// DumpFormat stands for that of the dump helper's branch, whose dump.go takes
// this file's place at the merge.
type DumpFormat string

// The formats, as above.
const (
	DumpSQL         DumpFormat = "sql"
	DumpPerDatabase DumpFormat = "per-database"
)

// DumpCheck, as above.
type DumpCheck struct {
	Backup  ID        `json:"backup"`
	Dump    string    `json:"dump"`
	Tool    string    `json:"tool"`
	Host    string    `json:"host"`
	Time    time.Time `json:"time"`
	Seconds float64   `json:"seconds"`
	Server  int       `json:"server_major"`
	Tables  int       `json:"tables"`
	Rows    int64     `json:"rows"`
	Checks  []Check   `json:"checks"`
}

// Result, as above.
func (c DumpCheck) Result() CheckResult {
	has := func(r CheckResult) bool {
		return slices.ContainsFunc(c.Checks, func(k Check) bool { return k.Result == r })
	}
	switch {
	case has(Failed):
		return Failed
	case has(CouldNotRun) || !has(Passed):
		return CouldNotRun
	}
	return Passed
}
