package flow_test

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// record is a record of WAL, as pg_walinspect sees it. Of kinds other than
// those below only the place counts.
type record struct {
	start, end backup.LSN
	kind       string // COMMIT, ABORT, COMMIT_PREPARED, ABORT_PREPARED, PREPARE, RESTORE_POINT or another
	xid        uint32 // of the transaction, also where another one ended it
	time       time.Time
	name       string   // of the restore point, or of the prepared transaction
	after      rows     // what is committed, once it is replayed
	doubt      []string // and what is in doubt
}

// ends reports whether it is a transaction's commit or rollback.
func (r record) ends() bool {
	return strings.HasPrefix(r.kind, "COMMIT") || strings.HasPrefix(r.kind, "ABORT")
}

// line is a timeline: all WAL from the history's begin along it and its
// ancestors, as far as the catalog has it.
type line struct {
	parent  uint32
	fork    backup.LSN // where it leaves its parent
	reach   backup.LSN // end of the catalog's last segment of it
	records []record
}

var ended = regexp.MustCompile(`^(?:(\d+): )?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\+00`)

// endLine keeps the records of the timeline that ends, and holds them against
// what was acknowledged.
func (h *history) endLine(reach backup.LSN) {
	h.t.Helper()
	all, err := h.conn.Query(h.t.Context(), fmt.Sprintf(`SELECT (start_lsn - '0/0')::bigint, (end_lsn - '0/0')::bigint, xid::text::bigint, record_type, description
		FROM pg_get_wal_records_info_till_end_of_wal('%s') WHERE end_lsn <= pg_current_wal_flush_lsn()`, h.base))
	if err != nil {
		h.t.Fatal(err)
	}
	defer all.Close()
	l := h.lines[h.now.timeline]
	l.reach = reach
	state, doubt, ends := rows{"a": "", "b": ""}, map[string]bool{}, h.now.ends
	for all.Next() {
		var r record
		var description string
		if err := all.Scan(&r.start, &r.end, &r.xid, &r.kind, &description); err != nil {
			h.t.Fatal(err)
		}
		switch {
		case r.kind == "RESTORE_POINT":
			r.name = description
		case r.kind == "PREPARE" && h.now.gids[r.xid] != "":
			r.name = h.now.gids[r.xid]
			doubt[r.name] = true
		case r.ends():
			m := ended.FindStringSubmatch(description)
			if m == nil {
				h.t.Fatalf("%s %s: %q", r.start, r.kind, description)
			}
			if m[1] != "" {
				n, _ := strconv.ParseUint(m[1], 10, 32)
				r.xid = uint32(n)
			}
			if r.time, err = time.Parse("2006-01-02 15:04:05.999999", m[2]); err != nil {
				h.t.Fatal(err)
			}
			ends = h.acknowledged(ends, r)
			if len(ends) > 0 && ends[0].xid == r.xid {
				state, ends = ends[0].after, ends[1:]
			}
			delete(doubt, h.now.gids[r.xid])
		}
		r.after, r.doubt = state, slices.Sorted(maps.Keys(doubt))
		l.records = append(l.records, r)
	}
	if err := all.Err(); err != nil {
		h.t.Fatal(err)
	}
	for _, e := range ends {
		if e.commit {
			h.t.Errorf("%d was acknowledged, and the WAL of timeline %d does not hold its commit", e.xid, h.now.timeline)
		}
	}
	h.lines[h.now.timeline] = l
}

// acknowledged leaves out rollbacks that a crash has lost, and demands that r
// is what came next.
func (h *history) acknowledged(ends []ending, r record) []ending {
	h.t.Helper()
	// A rollback is not flushed: after a crash its number may be given once more.
	for len(ends) > 0 && !ends[0].commit && (ends[0].xid != r.xid || r.start > ends[0].high) {
		ends = ends[1:]
	}
	commit := strings.HasPrefix(r.kind, "COMMIT")
	switch {
	case len(ends) == 0 || ends[0].xid != r.xid:
		if commit && h.now.begun[r.xid] { // else a backup made it, to have its WAL flushed (FlushedRecordEnd)
			h.t.Errorf("%s at %s of %d: it was not acknowledged", r.kind, r.start, r.xid)
		}
	case ends[0].commit != commit || r.start < ends[0].low || r.end > ends[0].high || commit && !r.time.Equal(ends[0].when):
		h.t.Errorf("%s at %s of %d at %s: acknowledged as %+v", r.kind, r.start, r.xid, r.time, ends[0])
	}
	return ends
}

// promise is what PostgreSQL's documentation (config.sgml, "Recovery Target";
// recovery_target_inclusive is on) and ours (restore.md) promise of a target.
type promise struct {
	refused string   // why it cannot be had: said before anything is made
	perhaps bool     // recovery itself may find that it lies before the copy is consistent
	from    int      // the target lies behind so many records of the line,
	to      int      // or up to so many: of what a frozen image ends with
	line    []record // by which
	also    []int    // or behind so many: a name that was given again, if the first lies inside a frozen image
	instead uint32   // the timeline to take where PostgreSQL cannot, see inDoubtAtAFork
}

// inDoubtAtAFork looks for a transaction that is in doubt at the stop and was
// prepared in the segment of a fork, where the stop lies before that fork:
// PostgreSQL 15 has this segment under the new timeline's name then, and looks
// for the transaction under that of the old one, which is returned.
func (h *history) inDoubtAtAFork(p promise, along uint32, stop int) uint32 {
	for l := h.lines[along]; l.parent != 0; l = h.lines[l.parent] {
		for _, r := range p.line[:stop+1] {
			if r.kind == "PREPARE" && r.start/segment == l.fork/segment && p.line[stop].end <= l.fork && slices.Contains(p.line[stop].doubt, r.name) {
				return l.parent
			}
		}
	}
	return 0
}

// text is what a copy shows behind the n-th record.
func (p promise) text(n int) []string {
	out := []string{}
	if n == 0 {
		return []string{"a", "b"}
	}
	r := p.line[n-1]
	for k, v := range r.after {
		out = append(out, strings.TrimSpace(k+" "+v))
	}
	slices.Sort(out)
	for _, gid := range r.doubt {
		out = append(out, "in doubt "+gid)
	}
	return out
}

// moment is when a backup was whole.
func (b taken) moment() time.Time {
	if b.Bracket != nil {
		return b.Bracket.Stopped
	}
	var out time.Time
	for _, f := range b.Cut.Frozen {
		if f.Thawed.After(out) {
			out = f.Thawed
		}
	}
	return out
}

// from is where a backup's own WAL ends, as its manifest says.
func (b taken) from() backup.LSN {
	if b.Bracket != nil {
		return b.Bracket.StopLSN
	}
	return b.Cut.FlushLSN
}

// leads reports whether recovery of a backup can go along a timeline.
func (h *history) leads(b taken, along uint32) bool {
	l, ok := h.lines[along]
	if !ok || b.from()/segment*segment+segment > l.reach {
		return false
	}
	for along != b.timeline {
		if l = h.lines[along]; l.parent == 0 || b.from() > l.fork {
			return false
		}
		along = l.parent
	}
	return true
}

// promised is the model.
func (h *history) promised(b taken, target backup.Target, along uint32) promise {
	if !target.Archived() {
		if along != 0 {
			return promise{refused: "a timeline for what lies in the backup"}
		}
		return h.promisedEnd(b)
	}
	for t := uint32(len(h.lines)); along == 0 && t > 0; t-- {
		if h.leads(b, t) {
			along = t
		}
	}
	if !h.leads(b, along) {
		return promise{refused: "another timeline"}
	}
	l := h.lines[along]
	p := promise{line: slices.DeleteFunc(slices.Clone(l.records), func(r record) bool { return r.end > l.reach })}
	stop := -1 // the last record that is replayed
	switch target.Kind {
	case backup.TargetLatest:
		stop = len(p.line) - 1
	case backup.TargetLSN: // after the first record that begins there or later
		if target.LSN >= b.from() {
			stop = slices.IndexFunc(p.line, func(r record) bool { return r.start >= target.LSN })
		}
	case backup.TargetXID: // after its end
		stop = slices.IndexFunc(p.line, func(r record) bool { return r.ends() && r.xid == target.XID && r.start >= b.from() })
	case backup.TargetName:
		named := func(r record) bool { return r.kind == "RESTORE_POINT" && r.name == target.Name }
		stop = slices.IndexFunc(p.line, func(r record) bool { return named(r) && r.start >= b.from() })
		p.perhaps = slices.IndexFunc(p.line, named) != stop // one that is older may be met first
	case backup.TargetTime: // before the first that ended later
		stop = slices.IndexFunc(p.line, func(r record) bool {
			return r.ends() && r.start >= b.from()/segment*segment && r.time.After(target.Time)
		}) - 1
		if target.Time.Before(b.moment()) || stop < 0 {
			return promise{refused: "before the backup, or nothing shows that the WAL is complete up to then"}
		}
	}
	if stop < 0 {
		return promise{refused: "not between the backup and the end of the WAL"}
	}
	// A frozen image may hold more than was known to be flushed, and nothing
	// stops inside it.
	p.perhaps = p.perhaps || b.Bracket == nil && p.line[stop].start < b.behind && target.Kind != backup.TargetTime
	for n := stop + 1; target.Kind == backup.TargetName && p.perhaps && b.Bracket == nil && n < len(p.line); n++ {
		if r := p.line[n]; r.kind == "RESTORE_POINT" && r.name == target.Name && p.line[stop].start < b.behind {
			p.also = append(p.also, n+1)
		}
	}
	p.from, p.to, p.instead = stop+1, stop+1, h.inDoubtAtAFork(p, along, stop)
	return p
}

// promisedEnd: all that was committed before a frozen backup began, and in order
// whatever else came before it ended; of a bracketed one what lies before its stop.
func (h *history) promisedEnd(b taken) promise {
	p := promise{line: h.lines[b.timeline].records}
	before := func(end backup.LSN) int {
		n := slices.IndexFunc(p.line, func(r record) bool { return r.end > end })
		if n < 0 {
			n = len(p.line)
		}
		return n
	}
	p.from, p.to = before(b.from()), before(b.from())
	if b.Bracket == nil {
		p.to = before(b.behind)
	}
	return p
}
