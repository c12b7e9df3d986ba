package postgres

import (
	"errors"
	"fmt"
	"strings"

	"cleancut/internal/backup"
)

// oldest is the first major version this program knows; no newest, because
// what is used of a server is stable since.
const oldest = 13

// Allow lifts single refusals of Preflight.
type Allow struct {
	// NoFullPageWrites: the volumes write 8 KiB without tearing them, so that
	// full_page_writes=off is sound.
	NoFullPageWrites bool
	// Standby: the backup is bracketed, so that recovery knows where a standby's
	// image becomes consistent.
	Standby bool
}

// Finding is one thing Preflight has to say.
type Finding struct {
	Refuse bool // a backup must not be taken
	Text   string
	Hint   string
	Is     error // sentinel of a refusal, or nil
}

// Preflight judges whether a cut of this server could be recovered, and what
// its owner should know. It only looks at r.
func Preflight(r Running, allow Allow) []Finding {
	s := r.Server.Settings
	var out []Finding
	refuse := func(is error, hint, format string, a ...any) {
		out = append(out, Finding{Refuse: true, Text: fmt.Sprintf(format, a...), Hint: hint, Is: is})
	}
	note := func(hint, format string, a ...any) {
		out = append(out, Finding{Text: fmt.Sprintf(format, a...), Hint: hint})
	}
	if r.Server.Major() < oldest {
		refuse(backup.ErrUnsupported, "upgrade the server", "PostgreSQL %d is older than %d", r.Server.Major(), oldest)
	}
	if !r.Superuser {
		refuse(nil, "name a superuser with user= in dsn", "the role is no superuser")
	}
	if r.InRecovery && !allow.Standby {
		refuse(backup.ErrUnsupported, "use --mode bracketed, or take the backup of the primary", "the server is a standby, of which only a bracketed backup can be taken")
	}
	if r.BackupLabel {
		refuse(nil, "end it with pg_stop_backup(), or remove backup_label if no backup runs",
			"an exclusive backup runs: backup_label lies in the data directory, and a cut would recover from the wrong place")
	}
	if s["fsync"] == "off" {
		refuse(nil, "set fsync = on, reload and run a CHECKPOINT", "fsync is off: no image of the volumes is sure to recover")
	}
	switch {
	case s["full_page_writes"] != "off":
	case allow.NoFullPageWrites:
		note("", "full_page_writes is off: recovery relies on storage that never tears a page")
	default:
		refuse(nil, "set full_page_writes = on, or say that the storage never tears a page",
			"full_page_writes is off: a page that was half written at the cut cannot be repaired")
	}
	for _, l := range r.Links {
		refuseLink(l, refuse, note)
	}
	return append(out, notes(r)...)
}

// refuseLink: data behind a link that somebody made is not covered by the cut.
func refuseLink(link string, refuse func(error, string, string, ...any), note func(string, string, ...any)) {
	name, _, _ := strings.Cut(link, " ")
	if holdsData(name) {
		refuse(backup.ErrUnsupported, "move the data back into the data directory, or into a tablespace", "a link inside the data directory leads out of it: %s", link)
		return
	}
	note("", "a link that leads out of the data directory comes back without its target: %s", link)
}

// notes are the findings that do not stop a backup.
func notes(r Running) []Finding {
	var out []Finding
	note := func(hint, format string, a ...any) {
		out = append(out, Finding{Text: fmt.Sprintf(format, a...), Hint: hint})
	}
	if r.Server.Settings["synchronous_commit"] == "off" {
		note("", "synchronous_commit is off: transactions of the last 3 × wal_writer_delay (%s) before the cut may be lost, as in a crash",
			r.Server.Settings["wal_writer_delay"])
	}
	if !r.Server.DataChecksums {
		note("pg_checksums --enable, on the stopped server", "data checksums are off: a verification cannot see torn or rotten pages")
	}
	if n := len(r.Server.Unlogged); n > 0 {
		note("", "%d unlogged tables or sequences come back empty: %s", n, shorten(r.Server.Unlogged, 5))
	}
	if n := len(r.ConfigFiles); n > 0 {
		note("", "configuration files outside of the data directory are kept in the catalog: %s", shorten(r.ConfigFiles, 5))
	}
	if r.Prepared > 0 {
		note("", "%d prepared transactions come back in doubt and hold their locks", r.Prepared)
	}
	for _, t := range r.Tablespaces {
		if t.Fresh {
			note("run CHECKPOINT first, or wait for one", "tablespace %s is newer than the last checkpoint: recovery of this cut makes it again and may need an empty folder %s on its host", t.Name, t.Path)
		}
	}
	for _, n := range r.Server.Notes {
		note("", "%s", n)
	}
	return out
}

// shorten joins at most n of the words.
func shorten(words []string, n int) string {
	if len(words) <= n {
		return strings.Join(words, ", ")
	}
	return strings.Join(words[:n], ", ") + fmt.Sprintf(" and %d more", len(words)-n)
}

// Refused makes one error of the findings that refuse, nil if none does.
func Refused(findings []Finding) error {
	var errs []error
	for _, f := range findings {
		if !f.Refuse {
			continue
		}
		err := errors.New(f.Text)
		if f.Is != nil {
			err = fmt.Errorf("%s: %w", f.Text, f.Is)
		}
		errs = append(errs, backup.Hint(err, f.Hint))
	}
	return errors.Join(errs...)
}
