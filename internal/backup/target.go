package backup

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// TargetKind says what ends a recovery.
type TargetKind string

// The kinds of recovery target. End is what lies in the backup itself: the
// moment of an atomic cut, the end of backup mode of a bracketed one. Latest
// is the end of the WAL that was shipped. The others are PostgreSQL's
// (config.sgml, "Recovery Target").
const (
	TargetEnd       TargetKind = "end"
	TargetLatest    TargetKind = "latest"
	TargetImmediate TargetKind = "immediate"
	TargetTime      TargetKind = "time"
	TargetLSN       TargetKind = "lsn"
	TargetName      TargetKind = "name" // of pg_create_restore_point
	TargetXID       TargetKind = "xid"
)

// Target is where recovery ends. Exactly the field of Kind is set. What is at
// the target itself is in the copy: the last commit at or before a time, the
// first record that begins at or after an LSN, a transaction.
type Target struct {
	Kind TargetKind `json:"kind"`
	Time time.Time  `json:"time,omitzero"`
	LSN  LSN        `json:"lsn,omitempty"`
	Name string     `json:"name,omitempty"`
	XID  uint32     `json:"xid,omitempty"`
}

const targetHint = "end, latest, immediate, time=2026-11-23T05:00:00Z, lsn=0/16B3748, name=RESTORE_POINT or xid=1234"

// ParseTarget reads what --target takes. A time needs its zone: without one it
// would be another moment on another host. The error wraps ErrUsage.
func ParseTarget(s string) (Target, error) {
	word, value, valued := strings.Cut(s, "=")
	t := Target{Kind: TargetKind(word)}
	var err error
	switch t.Kind {
	case TargetEnd, TargetLatest, TargetImmediate:
		if valued {
			err = fmt.Errorf("%s takes no value", word)
		}
	case TargetTime:
		t.Time, err = parseMoment(value)
	case TargetLSN:
		if t.LSN, err = ParseLSN(value); err == nil && t.LSN == 0 {
			err = fmt.Errorf("0/0 is no position")
		}
	case TargetName:
		// MAXFNAMELEN of xlog_internal.h: 64 with the final zero.
		if t.Name = value; value == "" || len(value) > 63 || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			err = fmt.Errorf("the name of a restore point has 1 to 63 bytes")
		}
	case TargetXID:
		var n uint64
		if n, err = strconv.ParseUint(value, 10, 32); err == nil && n < 3 { // FirstNormalTransactionId
			err = fmt.Errorf("%d is no transaction", n)
		}
		t.XID = uint32(n)
	default:
		err = fmt.Errorf("unknown")
	}
	if err != nil {
		return Target{}, Hint(fmt.Errorf("%w: recovery target %q: %w", ErrUsage, s, err), targetHint)
	}
	return t, nil
}

// parseMoment takes RFC 3339, also with a blank instead of the T, and
// PostgreSQL's own spelling of zones (+00).
func parseMoment(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02 15:04:05.999999999Z07:00", "2006-01-02 15:04:05.999999999Z07", "2006-01-02T15:04:05.999999999Z07"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("want a date, a time and its zone, as in 2026-11-23T05:00:00Z or 2026-11-23 06:00:00+01")
}

// String is what ParseTarget reads.
func (t Target) String() string {
	switch t.Kind {
	case TargetTime:
		return "time=" + t.Time.UTC().Format(time.RFC3339Nano)
	case TargetLSN:
		return "lsn=" + t.LSN.String()
	case TargetName:
		return "name=" + t.Name
	case TargetXID:
		return "xid=" + strconv.FormatUint(uint64(t.XID), 10)
	}
	return string(t.Kind)
}

// Archived: recovery needs WAL that does not lie with the backup.
func (t Target) Archived() bool {
	return t.Kind != TargetEnd && t.Kind != TargetImmediate && t.Kind != ""
}

// Settings are the server's settings that stop recovery there and let the
// copy go on as a cluster of its own.
func (t Target) Settings() map[string]string {
	out := map[string]string{"recovery_target_action": "promote"}
	switch t.Kind {
	case TargetTime:
		out["recovery_target_time"] = t.Time.UTC().Format("2006-01-02 15:04:05.999999+00")
	case TargetLSN:
		out["recovery_target_lsn"] = t.LSN.String()
	case TargetName:
		out["recovery_target_name"] = t.Name
	case TargetXID:
		out["recovery_target_xid"] = strconv.FormatUint(uint64(t.XID), 10)
	case TargetLatest, TargetEnd, TargetImmediate: // to the end of the WAL that there is
	}
	return out
}
