package drill

import (
	"fmt"
	"slices"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/load"
)

// Class is what an image turned out to be. Every judged image has exactly one.
type Class string

// The classes, in the order in which they are tried: whoever restores the
// image meets them in this order, and the first one met names it. What else is
// wrong with an image stays in its trial's checks.
const (
	NoMount  Class = "nomount"  // a filesystem does not mount, or none is recognized
	NoStart  Class = "nostart"  // mounted, but the server does not come out of recovery
	FSDamage Class = "fsdamage" // mounted, and xfs_repair -n or e2fsck -n, or the kernel, says that it is damaged
	Lost     Class = "lost"     // the server starts: commits acknowledged before the cut are missing
	Phantom  Class = "phantom"  // nothing is lost: there are rows never committed, never sent, twice, or half of a transaction
	Silent   Class = "silent"   // every row is as promised: another check fails
	Sound    Class = "sound"    // all checks ran and passed
)

// Classes lists them from sound to what a restore meets first.
func Classes() []Class { return []Class{Sound, Silent, Phantom, Lost, FSDamage, NoStart, NoMount} }

// Words says what a class is.
func (c Class) Words() string {
	return map[Class]string{
		Sound: "sound", Silent: "silent damage", Phantom: "phantom or torn rows", Lost: "lost acknowledged commits",
		FSDamage: "filesystem damaged though it mounts", NoStart: "does not start", NoMount: "does not mount",
	}[c]
}

// Judge names the class of an image: of what verify found and, where the
// server could be asked, of its rows beside the promise. Without a class the
// image was not judged: no check failed, but not all ran; the reason says which.
func Judge(v backup.Verdict, found *load.Finding) (class Class, reason string) {
	failed := func(want func(backup.Check) bool) *backup.Check {
		i := slices.IndexFunc(v.Checks, func(c backup.Check) bool { return c.Result == backup.Failed && want(c) })
		if i < 0 {
			return nil
		}
		return &v.Checks[i]
	}
	named := func(name string) *backup.Check {
		return failed(func(c backup.Check) bool { return c.Name == name })
	}
	var lost, phantom, unreadable []string
	if found != nil {
		lost, phantom, unreadable = sort(*found)
	}
	if c := named(backup.CheckMounted); c != nil {
		return NoMount, c.Detail
	}
	if c := named(backup.CheckRecovered); c != nil {
		return NoStart, serverSaid(c.Detail)
	}
	if c := failed(backup.Check.OfFilesystem); c != nil {
		return FSDamage, said(*c)
	}
	if len(lost) > 0 {
		return Lost, strings.Join(lost, "; ")
	}
	if c := named(backup.CheckFlushed); c != nil {
		return Lost, c.Detail
	}
	if len(phantom) > 0 {
		return Phantom, strings.Join(phantom, "; ")
	}
	if c := failed(func(c backup.Check) bool { return c.Name != backup.CheckOwner }); c != nil {
		return Silent, said(*c)
	}
	if len(unreadable) > 0 {
		return Silent, strings.Join(unreadable, "; ")
	}
	if c := named(backup.CheckOwner); c != nil {
		return Silent, said(*c)
	}
	if missing := notRun(v, found); missing != "" {
		return "", missing
	}
	return Sound, ""
}

// serverSaid is the server's own reason out of the end of its log, else all
// that is known.
func serverSaid(detail string) string {
	for _, level := range []string{"PANIC:  ", "FATAL:  "} {
		if _, rest, ok := strings.Cut(detail, level); ok {
			reason, _, _ := strings.Cut(rest, "\n")
			return strings.TrimSpace(level) + " " + reason
		}
	}
	return detail
}

// notRun names what did not run, though nothing failed.
func notRun(v backup.Verdict, found *load.Finding) string {
	for _, c := range v.Checks {
		if c.Result != backup.Passed {
			return said(c)
		}
	}
	if found == nil || len(v.Checks) == 0 {
		return "its rows were not compared with the promise"
	}
	return ""
}

func said(c backup.Check) string { return strings.TrimSpace(c.Kind() + ": " + c.Detail) }

// sort puts the problems of a finding into three kinds. A table that cannot be
// read is no loss of its rows: they may be there.
func sort(f load.Finding) (lost, phantom, unreadable []string) {
	cannot := map[string]bool{}
	for _, u := range f.Unreadable {
		cannot[u.What] = true
		unreadable = append(unreadable, u.What+" cannot be read: "+u.Message)
	}
	add := func(to *[]string, n int64, format string, args ...any) {
		if n > 0 {
			*to = append(*to, fmt.Sprintf("%d ", n)+fmt.Sprintf(format, args...))
		}
	}
	for _, t := range []struct {
		table, thing string
		load.Tally
	}{{"play.words_said", "words", f.Words}, {"play.transfers", "transfers", f.Transfers}} {
		if cannot[t.table] {
			continue
		}
		add(&lost, t.Missing, "of %d %s acknowledged before the cut are missing", t.Acked, t.thing)
		add(&phantom, t.Phantom, "%s are there that were never sent", t.thing)
		add(&phantom, t.Torn, "%s are torn: their checksum is wrong", t.thing)
		add(&phantom, t.Twice, "%s are there twice", t.thing)
	}
	for _, t := range f.Tables {
		if !cannot[t.Table] {
			add(&lost, t.Want-t.Found, "of %d rows of %s are missing", t.Want, t.Table)
			add(&phantom, t.Found-t.Want, "rows too many in %s", t.Table)
		}
	}
	add(&phantom, f.BulkVisible, "rows of the transaction that never committed are visible")
	bank := []string{"play.branches", "play.tellers", "play.accounts", "play.transfers"}
	if !slices.ContainsFunc(bank, func(t string) bool { return cannot[t] }) {
		add(&phantom, int64(len(f.Sums.Off)), "branches whose sums differ: half of a transaction is there")
	}
	return lost, phantom, unreadable
}
