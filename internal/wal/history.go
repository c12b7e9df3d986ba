package wal

import (
	"bufio"
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// History is where a timeline comes from: what its history file says. A
// timeline without ancestors has no file and no Forks.
type History struct {
	Timeline Timeline
	Forks    []Fork // the oldest ancestor first
}

// Fork is the end of an ancestor: its WAL counts up to End, which is the
// beginning of the next one.
type Fork struct {
	Timeline Timeline   `json:"timeline"`
	End      backup.LSN `json:"end"`
	Reason   string     `json:"reason,omitempty"`
}

var forkLine = regexp.MustCompile(`^\s*(\d+)\s+([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})\s*(.*)$`)

// ParseHistory reads the content of the history file of timeline t (timeline.c:
// readTimeLineHistory): a line an ancestor, oldest first; empty lines and those
// that begin with # count for nothing. Timelines must grow and be below t, and
// ends must not fall. The error wraps backup.ErrDamage.
func ParseHistory(t Timeline, content []byte) (History, error) {
	h := History{Timeline: t}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		line := lines.Text()
		if s := strings.TrimSpace(line); s == "" || s[0] == '#' {
			continue
		}
		m := forkLine.FindStringSubmatch(line)
		if m == nil {
			return History{}, fmt.Errorf("%w: history of timeline %d: line %q", backup.ErrDamage, t, line)
		}
		n, err := strconv.ParseUint(m[1], 10, 32)
		end, err2 := backup.ParseLSN(m[2])
		f := Fork{Timeline: Timeline(n), End: end, Reason: m[3]}
		if err != nil || err2 != nil || !h.grows(f) {
			return History{}, fmt.Errorf("%w: history of timeline %d: line %q does not follow", backup.ErrDamage, t, line)
		}
		h.Forks = append(h.Forks, f)
	}
	if err := lines.Err(); err != nil {
		return History{}, fmt.Errorf("%w: history of timeline %d: %w", backup.ErrDamage, t, err)
	}
	if t > 1 && len(h.Forks) == 0 {
		return History{}, fmt.Errorf("%w: history of timeline %d is empty", backup.ErrDamage, t)
	}
	return h, nil
}

func (h History) grows(f Fork) bool {
	if f.Timeline == 0 || f.Timeline >= h.Timeline {
		return false
	}
	if len(h.Forks) == 0 {
		return true
	}
	last := h.Forks[len(h.Forks)-1]
	return f.Timeline > last.Timeline && f.End >= last.End
}

// Format returns the content of a history file that says the same.
func (h History) Format() []byte {
	var b bytes.Buffer
	for _, f := range h.Forks {
		fmt.Fprintf(&b, "%d\t%s\t%s\n", f.Timeline, f.End, f.Reason)
	}
	return b.Bytes()
}

// Holder returns the timeline, h's own or an ancestor, that the byte at lsn
// belongs to.
func (h History) Holder(lsn backup.LSN) Timeline {
	for _, f := range h.Forks {
		if lsn < f.End {
			return f.Timeline
		}
	}
	return h.Timeline
}

// Begin returns where timeline t, h's own or an ancestor, begins; 0 for the
// oldest. Not one of them: false.
func (h History) Begin(t Timeline) (backup.LSN, bool) {
	begin := backup.LSN(0)
	for _, f := range h.Forks {
		if f.Timeline == t {
			return begin, true
		}
		begin = f.End
	}
	return begin, t == h.Timeline
}

// End returns where ancestor t ends. h's own timeline, or none of them: false.
func (h History) End(t Timeline) (backup.LSN, bool) {
	for _, f := range h.Forks {
		if f.Timeline == t {
			return f.End, true
		}
	}
	return 0, false
}

// Path returns the segment with that number that recovery along h reads: the
// one of the newest timeline that has begun before its end, because the first
// segment of a timeline begins with a copy of what its ancestor wrote
// (xlog.c: XLogInitNewTimeline).
func (h History) Path(number uint64, s Size) Segment {
	end := Segment{Number: number}.End(s)
	out := Segment{Timeline: h.Timeline, Number: number}
	for i := len(h.Forks) - 1; i >= 0 && h.Forks[i].End >= end; i-- {
		out.Timeline = h.Forks[i].Timeline
	}
	return out
}
