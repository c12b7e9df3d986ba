package evidence

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// Measurement is all of docs/evidence/impact.json: what backups cost
// production, and how long they take for databases of several sizes.
type Measurement struct {
	Name string `json:"-"` // of impact-NAME.json
	Start
	Pairs []Pair `json:"pairs"`
	Sizes []Size `json:"sizes"`
}

// Start is what is known when a measurement begins.
type Start struct {
	At         time.Time  `json:"at"`
	Machine    Machine    `json:"machine"`
	Conditions Conditions `json:"conditions"`
	Tools      []Tool     `json:"tools"`
	Notes      []string   `json:"notes,omitempty"` // what whoever measured has to say
}

// Machine is where it ran.
type Machine struct {
	Kernel     string       `json:"kernel"`
	System     string       `json:"system"`
	Processor  string       `json:"processor"`
	Processors int          `json:"processors"`
	Memory     backup.Bytes `json:"memory_bytes"`
	PostgreSQL string       `json:"postgresql"`
	Cleancut   string       `json:"cleancut"`
}

// Conditions are what the measurement was asked to be.
type Conditions struct {
	Scale      int          `json:"scale"` // pgbench's
	Clients    int          `json:"clients"`
	Rate       int          `json:"rate"`             // transactions a second that are asked for; 0: as many as there can be
	IOPS       int          `json:"iops"`             // of the volume, each way
	Throughput backup.Bytes `json:"bytes_per_second"` // of the volume, each way
	Memory     backup.Bytes `json:"memory_bytes"`     // of the server and the tools together
	Checkpoint Seconds      `json:"checkpoint_timeout_seconds"`
	WarmUp     Seconds      `json:"warm_up_seconds"`
	Alone      Seconds      `json:"alone_seconds"`
	After      Seconds      `json:"after_seconds"` // that a window of cleancut goes on after the backup
	Repeats    int          `json:"repeats"`
	Seed       uint64       `json:"seed"`

	Sizes    []backup.Bytes `json:"sizes_bytes"`
	Extents  int            `json:"extents"`  // of an aged volume, at least
	Backups  int            `json:"backups"`  // of each size
	Restores int            `json:"restores"` // of each size
}

// Seconds are a length of time.
type Seconds float64

// Duration is the same as a duration.
func (s Seconds) Duration() time.Duration { return time.Duration(float64(s) * float64(time.Second)) }

// Tool is one way to make a backup.
type Tool struct {
	Key     string `json:"key"`
	Name    string `json:"name"`
	Version string `json:"version"`
	Command string `json:"command"`           // in words
	Missing string `json:"missing,omitempty"` // why it was not measured
}

// Bracketed is the key of cleancut's bracketed mode, which older measurements
// do not have.
const Bracketed = "cleancut-bracketed"

// Pair is a window of a tool and the window of production alone right before
// it.
type Pair struct {
	Repeat  int       `json:"repeat"` // from 1
	Tool    string    `json:"tool"`
	At      time.Time `json:"at"`
	Load    float64   `json:"load_average"` // of the machine over the last minute before the pair
	Alone   Window    `json:"alone"`
	With    Window    `json:"with"`
	Seconds float64   `json:"tool_seconds"`
	Cut     *Cut      `json:"cut,omitempty"` // of cleancut
}

// Cut is what cleancut's manifest says about a cut.
type Cut struct {
	FreezeMS float64   `json:"freeze_ms"`
	Rounds   []float64 `json:"sync_rounds_ms"`
}

// Size is how long backups and restores of one database take.
type Size struct {
	Want     backup.Bytes `json:"want_bytes"`
	Aged     bool         `json:"aged"`
	Database backup.Bytes `json:"database_bytes"`
	Extents  int          `json:"extents"` // of the volume, before the backups
	Backups  []float64    `json:"backup_seconds"`
	Frozen   []float64    `json:"freeze_ms"`
	Restores []float64    `json:"first_query_seconds"` // from the start of the restore
}

// line is one line of a measurement that is under way. One field is set.
type line struct {
	Start *Start `json:"start,omitempty"`
	Pair  *Pair  `json:"pair,omitempty"`
	Size  *Size  `json:"size,omitempty"`
}

// Diary is a measurement under way: a file to which each result is added at
// once, so that an interrupted measurement keeps what it has.
type Diary struct {
	Measurement
	path string
}

// OpenDiary begins a diary, or goes on with one that has the same conditions
// but for the repeats, the same tools and the same version. Any other is an
// error that wraps backup.ErrUsage.
func OpenDiary(path string, s Start) (*Diary, error) {
	d := &Diary{path: path}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		d.Start = s
		return d, d.add(line{Start: &s})
	}
	if err != nil {
		return nil, fmt.Errorf("diary: %w", err)
	}
	whole := bytes.LastIndexByte(text, '\n') + 1
	if whole < len(text) { // a crash cut the last line short
		if err := os.Truncate(path, int64(whole)); err != nil {
			return nil, fmt.Errorf("diary: %w", err)
		}
	}
	for n, b := range bytes.Split(bytes.TrimSpace(text[:whole]), []byte("\n")) {
		var l line
		if err := json.Unmarshal(b, &l); err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, n+1, err)
		}
		switch {
		case l.Start != nil:
			d.Start = *l.Start
		case l.Pair != nil:
			d.Pairs = append(d.Pairs, *l.Pair)
		case l.Size != nil:
			d.Sizes = append(d.Sizes, *l.Size)
		}
	}
	d.Conditions.Repeats = s.Conditions.Repeats // fewer end it sooner
	if !reflect.DeepEqual([]any{d.Conditions, d.Machine, d.Tools}, []any{s.Conditions, s.Machine, s.Tools}) {
		return nil, backup.Hint(fmt.Errorf("%w: %s was begun under other conditions, with other tools or with another version of cleancut", backup.ErrUsage, path),
			"measure with the same ones, or remove it to begin anew")
	}
	return d, nil
}

func (d *Diary) add(l line) error {
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("diary: %w", err)
	}
	f, err := os.OpenFile(d.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("diary: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("diary: %w", err)
	}
	return nil
}

// AddPair adds a pair. It is on the disk on return.
func (d *Diary) AddPair(p Pair) error {
	d.Pairs = append(d.Pairs, p)
	return d.add(line{Pair: &p})
}

// AddSize adds a size. It is on the disk on return.
func (d *Diary) AddSize(s Size) error {
	d.Sizes = append(d.Sizes, s)
	return d.add(line{Size: &s})
}

// HasPair reports whether a tool was measured in a repeat.
func (d *Diary) HasPair(repeat int, tool string) bool {
	for _, p := range d.Pairs {
		if p.Repeat == repeat && p.Tool == tool {
			return true
		}
	}
	return false
}

// HasSize reports whether a size was measured.
func (d *Diary) HasSize(want backup.Bytes, aged bool) bool {
	for _, s := range d.Sizes {
		if s.Want == want && s.Aged == aged {
			return true
		}
	}
	return false
}

// Finish writes the measurement to a file and removes the diary.
func (d *Diary) Finish(path string) error {
	if err := writeLines(path, d.Measurement, "machine", "conditions", "tools", "key", "pairs", "repeat", "sizes", "want_bytes"); err != nil {
		return err
	}
	return os.Remove(d.path)
}

// writeLines writes JSON with a new line before each object or field that
// begins with one of some names. Quotes within strings are escaped, so none of
// these is taken for a name.
func writeLines(path string, v any, names ...string) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	text := string(b)
	for _, name := range names {
		name = strconv.Quote(name) + ":"
		text = strings.NewReplacer("{"+name, "\n{"+name, ","+name, ",\n"+name).Replace(text)
	}
	return os.WriteFile(path, []byte(text+"\n"), 0o644)
}
