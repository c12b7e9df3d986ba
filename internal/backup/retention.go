package backup

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// ErrHeld: the backup is held, so nothing deletes it before that is released.
var ErrHeld = errors.New("held")

// Hold keeps a backup whatever retention says. A backup may have several; it
// is held while any of them is in force.
type Hold struct {
	Backup ID         `json:"backup"`
	By     string     `json:"by"` // user who asked for it
	Host   string     `json:"host"`
	Tool   string     `json:"tool"`
	Time   time.Time  `json:"time"`
	Until  *time.Time `json:"until,omitempty"` // nil: until it is released
	Reason string     `json:"reason,omitempty"`
}

// Active reports whether the hold is in force at that time.
func (h Hold) Active(now time.Time) bool { return h.Until == nil || now.Before(*h.Until) }

// String tells a person who holds since when, until when and why.
func (h Hold) String() string {
	s := "held by " + h.By + " on " + h.Host + " since " + h.Time.UTC().Format(time.RFC3339)
	if h.Until != nil {
		s += " until " + h.Until.UTC().Format(time.RFC3339)
	}
	if h.Reason != "" {
		s += ": " + h.Reason
	}
	return s
}

// ParseUntil reads the end of a hold: a date ("2026-12-31": to the end of that
// day in UTC), a time as in RFC 3339, or a duration from now ("30d", "12h").
// It must lie in the future. The error wraps ErrUsage.
func ParseUntil(s string, now time.Time) (time.Time, error) {
	until, err := parseUntil(s, now)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: time %q: want a date (2026-12-31), a time (2026-12-31T18:00:00Z) or a duration (30d, 12h)", ErrUsage, s)
	}
	if !until.After(now) {
		return time.Time{}, fmt.Errorf("%w: time %q is not in the future", ErrUsage, s)
	}
	return until.UTC(), nil
}

func parseUntil(s string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t.AddDate(0, 0, 1), nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	d, err := ParseSpan(s)
	return now.Add(time.Duration(d)), err
}

// Retention says how many complete backups stay. A backup stays if any of the
// rules keeps it. Days and weeks without a backup do not count: "the last
// seven days" are the last seven that have one. Days, weeks (ISO 8601, from
// Monday) and months are those of UTC; of each the newest backup stays.
type Retention struct {
	Last    int `json:"last"`
	Daily   int `json:"daily"`
	Weekly  int `json:"weekly"`
	Monthly int `json:"monthly"`
}

// Check refuses numbers below zero, and rules that keep nothing at all: no
// rules is a mistake, not the wish to delete everything. The error wraps
// ErrUsage.
func (r Retention) Check() error {
	if min(r.Last, r.Daily, r.Weekly, r.Monthly) < 0 {
		return fmt.Errorf("%w: retention: a number below zero", ErrUsage)
	}
	if r == (Retention{}) {
		return Hint(fmt.Errorf("%w: no rule says what to keep, so nothing is removed", ErrUsage),
			"give --keep-last, --keep-daily, --keep-weekly or --keep-monthly, or a [retention] section in the configuration")
	}
	return nil
}

// Candidate is what PlanRetention knows of a backup.
type Candidate struct {
	ID         ID
	Created    time.Time // orders those of one second; zero where it is not known
	Incomplete bool      // without its second fact: being made, or interrupted
	Unreadable string    // why its records cannot be read or judged; it may be a good backup
	Begun      string    // an intent names it: somebody makes or deletes it, or did
	Torn       bool      // the drill's; nothing else restores it
	Verdict    Word      // of its newest verdict
	Held       string    // by whom and why; empty: it is not held
	InUse      string    // what is made of it just now or stands somewhere
	Needed     string    // why something else that was promised needs it
}

// Word is a verdict in one word.
type Word string

// The words. Unproven is a backup that nobody verified, or whose verdicts
// cannot be read.
const (
	Unproven Word = ""
	Good     Word = "good"
	Damaged  Word = "damaged"
)

// Choice is what retention decides about one backup, and why.
type Choice struct {
	ID  ID       `json:"id"`
	Why []string `json:"why"`
}

// Bounds of PlanRetention.
const (
	// KeptUnproven is how many of the newest backups stay, whatever the rules
	// say, while not one backup has a good verdict.
	KeptUnproven = 3
	// clockSlack is how far the clocks of two hosts may be apart before a
	// backup counts as one from the future.
	clockSlack = time.Minute
)

// PlanRetention decides which backups stay and which go, both oldest first. It
// is pure; the same facts give the same plan, and applying a plan and planning
// again removes nothing more.
//
// Only complete backups count towards the numbers. Never removed are: what is
// held, in use, incomplete, unreadable, torn, named by an intent, or from the
// future; the newest backup with a good verdict; and while none has one, the
// newest KeptUnproven and all damaged ones. A damaged backup takes no place of
// a sound one; it goes when the rules would have let it go as a sound one.
func PlanRetention(all []Candidate, rules Retention, now time.Time) (keep, remove []Choice, err error) {
	if err := rules.Check(); err != nil {
		return nil, nil, err
	}
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Candidate) int { // newest first
		return cmp.Or(b.ID.Time().Compare(a.ID.Time()), b.Created.Compare(a.Created), cmp.Compare(b.ID, a.ID))
	})
	why := map[ID][]string{}
	because := func(id ID, reason string) { why[id] = append(why[id], reason) }
	var counted, sound []Candidate
	for _, c := range all {
		if reason := c.aside(now); reason != "" {
			because(c.ID, reason)
			continue
		}
		counted = append(counted, c)
		if c.Verdict != Damaged {
			sound = append(sound, c)
		}
	}
	rules.apply(sound, because)
	keepProof(sound, counted, because)
	rules.apply(counted, func(id ID, reason string) {
		if i := slices.IndexFunc(counted, func(c Candidate) bool { return c.ID == id }); counted[i].Verdict == Damaged {
			because(id, reason+", though damaged: it takes no place of a sound one")
		}
	})
	for _, c := range slices.Backward(all) {
		if c.Held != "" {
			because(c.ID, c.Held)
		}
		if c.InUse != "" {
			because(c.ID, "in use: "+c.InUse)
		}
		if c.Needed != "" {
			because(c.ID, c.Needed)
		}
		switch {
		case len(why[c.ID]) > 0:
			keep = append(keep, Choice{ID: c.ID, Why: why[c.ID]})
		case c.Verdict == Damaged:
			remove = append(remove, Choice{ID: c.ID, Why: []string{"no rule keeps it, and it is damaged"}})
		default:
			remove = append(remove, Choice{ID: c.ID, Why: []string{"no rule keeps it"}})
		}
	}
	return keep, remove, nil
}

// Sound reports whether the backup counts and is not known to be damaged.
func (c Candidate) Sound(now time.Time) bool { return c.aside(now) == "" && c.Verdict != Damaged }

// aside says why a backup neither counts nor is removed, or "".
func (c Candidate) aside(now time.Time) string {
	switch t := c.ID.Time(); {
	case c.Unreadable != "":
		return "left alone, not counted: " + c.Unreadable
	case c.Begun != "":
		return "left alone, not counted: " + c.Begun
	case c.Incomplete:
		return "left alone, not counted: incomplete (`cleancut sweep` removes what was interrupted)"
	case c.Torn:
		return "left alone, not counted: torn, made by the drill"
	case t.After(now.Add(clockSlack)):
		return "left alone, not counted: it is from the future (" + t.Sub(now).Round(time.Second).String() + " ahead): check the clocks"
	}
	return ""
}

// keepProof keeps the newest backup with a good verdict. Where there is none,
// nobody knows which backup would restore, so the newest stay, and those that
// are known to be damaged: something can be saved from them.
func keepProof(sound, counted []Candidate, because func(ID, string)) {
	if i := slices.IndexFunc(sound, func(c Candidate) bool { return c.Verdict == Good }); i >= 0 {
		because(sound[i].ID, "the newest with a good verdict")
		return
	}
	for _, c := range sound[:min(KeptUnproven, len(sound))] {
		because(c.ID, "no backup has a good verdict: the newest "+strconv.Itoa(KeptUnproven)+" stay (run `cleancut verify`)")
	}
	for _, c := range counted {
		if c.Verdict == Damaged {
			because(c.ID, "damaged, but no backup has a good verdict")
		}
	}
}

// apply tells which of these, newest first, the rules keep.
func (r Retention) apply(of []Candidate, because func(ID, string)) {
	for _, rule := range []struct {
		name   string
		n      int
		period func(t time.Time, i int) string
	}{
		{"last", r.Last, func(_ time.Time, i int) string { return fmt.Sprintf("%d of %d", i+1, r.Last) }},
		{"daily", r.Daily, func(t time.Time, _ int) string { return t.Format(time.DateOnly) }},
		{"weekly", r.Weekly, func(t time.Time, _ int) string {
			year, week := t.ISOWeek()
			return fmt.Sprintf("%d-W%02d", year, week)
		}},
		{"monthly", r.Monthly, func(t time.Time, _ int) string { return t.Format("2006-01") }},
	} {
		seen := map[string]bool{}
		for i, c := range of {
			p := rule.period(c.ID.Time().UTC(), i)
			if len(seen) == rule.n {
				break
			}
			if !seen[p] {
				seen[p] = true
				because(c.ID, rule.name+" "+p)
			}
		}
	}
}
