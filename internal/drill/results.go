package drill

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/load"
)

// Trial is one line of trials.jsonl: one image, recovered in one way, and what
// became of it.
type Trial struct {
	Cell
	Seed     int64          `json:"seed"`
	N        int            `json:"n"`   // counts the trials of a cell, from 1
	Run      string         `json:"run"` // the production run
	Backup   backup.ID      `json:"backup,omitempty"`
	At       time.Time      `json:"at"`
	Class    Class          `json:"class"` // "": not judged
	Reason   string         `json:"reason,omitempty"`
	Checks   []backup.Check `json:"checks"`
	Found    *load.Finding  `json:"found,omitempty"`
	Target   string         `json:"target,omitempty"` // of recovery by shipped WAL
	Cut      backup.Cut     `json:"cut"`
	Members  []MemberTime   `json:"members"`
	StallMS  float64        `json:"stall_ms"` // longest time without a commit, from a second before the cut to a second after
	Answered float64        `json:"seconds_to_first_query"`
	Seconds  float64        `json:"judged_in_seconds"`
	Kept     string         `json:"kept,omitempty"` // folder of the image set, below the output folder
}

// MemberTime is when one member was cut.
type MemberTime struct {
	Member    int       `json:"member"`
	Requested time.Time `json:"requested"`
	Responded time.Time `json:"responded"`
}

// ProductionRun is one line of runs.jsonl.
type ProductionRun struct {
	ID         string       `json:"id"`
	Ground     Cell         `json:"ground"`
	Seed       int64        `json:"seed"`
	N          int          `json:"n"`
	Began      time.Time    `json:"began"`
	Machine    Machine      `json:"machine"`
	Throughput []load.Point `json:"throughput"` // commits of each second
}

// Machine is where it ran.
type Machine struct {
	Host       string `json:"host"`
	Kernel     string `json:"kernel"`
	Processors int    `json:"processors"`
	PostgreSQL string `json:"postgresql"`
	Cleancut   string `json:"cleancut"`
}

// store is the output folder.
type store struct {
	dir    string
	lock   *os.File
	trials []Trial
	runs   []ProductionRun
}

// openStore reads what is there. A last line that a crash cut short is cut
// off; any other line that is none is an error: the file was not written here.
func openStore(dir string) (*store, error) {
	if err := os.MkdirAll(filepath.Join(dir, "images"), 0o755); err != nil {
		return nil, fmt.Errorf("output folder: %w", err)
	}
	s := &store{dir: dir}
	var err error
	if s.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644); err != nil {
		return nil, fmt.Errorf("output folder: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(backup.Hint(fmt.Errorf("another drill writes to %s: %w", dir, backup.ErrInUse), "wait for it, or choose another --out"), s.lock.Close())
	}
	if err := s.read(); err != nil {
		return nil, errors.Join(err, s.lock.Close())
	}
	return s, nil
}

func (s *store) close() error { return s.lock.Close() }

// read looks at what was written, also by another process, the guest's.
func (s *store) read() error {
	s.trials, s.runs = nil, nil
	err := errors.Join(readLines(filepath.Join(s.dir, "trials.jsonl"), &s.trials), readLines(filepath.Join(s.dir, "runs.jsonl"), &s.runs))
	for i, t := range s.trials {
		s.trials[i].Cell = t.Cell.whole()
	}
	return err
}

func readLines[T any](name string, into *[]T) error {
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("results: %w", err)
	}
	if whole := bytes.LastIndexByte(b, '\n') + 1; whole < len(b) {
		if err := os.Truncate(name, int64(whole)); err != nil {
			return fmt.Errorf("results: %w", err)
		}
		b = b[:whole]
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, 64<<20)
	for n := 1; lines.Scan(); n++ {
		var v T
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			return fmt.Errorf("%s, line %d: %w", name, n, err)
		}
		*into = append(*into, v)
	}
	return lines.Err()
}

// done: a trial that was judged is not run again. One that could not be judged
// is.
func (s *store) done(seed int64) func(c Cell, n int) bool {
	type key struct {
		Cell
		n int
	}
	judged := map[key]bool{}
	for _, t := range s.trials {
		if t.Seed == seed && t.Class != "" {
			judged[key{t.Cell, t.N}] = true
		}
	}
	return func(c Cell, n int) bool { return judged[key{c, n}] }
}

func (s *store) addTrial(t Trial) error {
	s.trials = append(s.trials, t)
	return appendLine(filepath.Join(s.dir, "trials.jsonl"), t)
}

func (s *store) addRun(r ProductionRun) error {
	s.runs = append(s.runs, r)
	return appendLine(filepath.Join(s.dir, "runs.jsonl"), r)
}

// appendLine writes a whole line at once and has it on the disk on return.
func appendLine(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}
