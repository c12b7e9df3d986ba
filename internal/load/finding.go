package load

import (
	"fmt"
	"slices"
	"strings"
)

// sampleSize is how many ids of a kind a finding names.
const sampleSize = 5

// Finding is a copy beside its promise, in numbers.
type Finding struct {
	Words       Tally        `json:"words"`
	Transfers   Tally        `json:"transfers"`
	BulkVisible int64        `json:"bulk_visible"` // rows of Bulk that can be seen; want 0
	Sums        Sums         `json:"sums"`
	Tables      []TableCount `json:"tables"`
	Markers     []MarkerSeen `json:"markers"`
	// Unreadable names what the server could not read, with its message: a
	// table that is gone, an invalid page.
	Unreadable []Unreadable `json:"unreadable,omitempty"`
}

// Tally compares the ids of one beater.
type Tally struct {
	Acked         int64 `json:"acked"`   // before the cut
	Found         int64 `json:"found"`   // rows in the copy
	Sent          int64 `json:"sent"`    // in all
	Missing       int64 `json:"missing"` // acknowledged before the cut and not in the copy
	MissingSample []ID  `json:"missing_sample,omitempty"`
	Phantom       int64 `json:"phantom"` // in the copy and never sent
	PhantomSample []ID  `json:"phantom_sample,omitempty"`
	Torn          int64 `json:"torn"` // in the copy with a wrong checksum; Words only
	TornSample    []ID  `json:"torn_sample,omitempty"`
	Twice         int64 `json:"twice"` // in the copy more than once
	TwiceSample   []ID  `json:"twice_sample,omitempty"`
}

// Sums are the four sums of the bank, over all branches. Off lists the
// branches whose own four sums differ.
type Sums struct {
	Branches  int64 `json:"branches"`
	Tellers   int64 `json:"tellers"`
	Accounts  int64 `json:"accounts"`
	Transfers int64 `json:"transfers"`
	Off       []int `json:"off,omitempty"`
}

// TableCount compares the rows of a table.
type TableCount struct {
	Table string `json:"table"`
	Want  int64  `json:"want"`
	Found int64  `json:"found"`
}

// MarkerSeen compares a marker.
type MarkerSeen struct {
	N    int  `json:"n"`
	Want bool `json:"want"`
	Row  bool `json:"row"`
	View bool `json:"view"`
}

// Unreadable is something the server failed to read.
type Unreadable struct {
	What    string `json:"what"`
	Message string `json:"message"`
}

// Problems says in plain words, one line each, where the copy breaks the
// promise. None means that it keeps it.
func (f Finding) Problems() []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, u := range f.Unreadable {
		add("%s cannot be read: %s", u.What, u.Message)
	}
	unreadable := func(what string) bool {
		return slices.ContainsFunc(f.Unreadable, func(u Unreadable) bool { return u.What == what })
	}
	if !unreadable(wordsTable) {
		out = append(out, f.Words.problems("word")...)
	}
	if !unreadable(transfersTable) {
		out = append(out, f.Transfers.problems("transfer")...)
	}
	if f.BulkVisible > 0 {
		add("%d rows of the transaction that never committed are visible", f.BulkVisible)
	}
	if len(f.Sums.Off) > 0 && !slices.ContainsFunc(bank(), func(b bankTable) bool { return unreadable(b.table) }) {
		add("sums differ in %d branches (the first is %d): branches %d, tellers %d, accounts %d, transfers %d",
			len(f.Sums.Off), f.Sums.Off[0], f.Sums.Branches, f.Sums.Tellers, f.Sums.Accounts, f.Sums.Transfers)
	}
	for _, t := range f.Tables {
		if t.Found != t.Want && !unreadable(t.Table) {
			add("%s has %d rows, recorded were %d", t.Table, t.Found, t.Want)
		}
	}
	for _, m := range f.Markers {
		out = append(out, m.problems()...)
	}
	return out
}

func (m MarkerSeen) problems() []string {
	var out []string
	for _, part := range []struct {
		name  string
		there bool
	}{{"row", m.Row}, {"view", m.View}} {
		switch {
		case m.Want && !part.there:
			out = append(out, fmt.Sprintf("marker %d: its %s is missing", m.N, part.name))
		case !m.Want && part.there:
			out = append(out, fmt.Sprintf("marker %d: its %s is there and should not be", m.N, part.name))
		}
	}
	return out
}

func (t Tally) problems(thing string) []string {
	var out []string
	add := func(n int64, what string, sample []ID) {
		if n == 0 {
			return
		}
		var names []string
		for _, id := range sample {
			names = append(names, id.String())
		}
		out = append(out, fmt.Sprintf("%d %ss %s (stream/number: %s)", n, thing, what, strings.Join(names, ", ")))
	}
	add(t.Missing, "acknowledged before the cut are missing", t.MissingSample)
	add(t.Phantom, "are there that were never sent", t.PhantomSample)
	add(t.Torn, "are torn: their checksum is wrong", t.TornSample)
	add(t.Twice, "are there more than once", t.TwiceSample)
	return out
}
