package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

// nightlyConfig is [nightly] and [cluster.NAME.nightly]; nil: not given. Each
// key is the flag of its name with - for _.
type nightlyConfig struct {
	Skip        []string `toml:"skip"`
	Textfile    *string  `toml:"textfile"`
	Mode        *string  `toml:"mode"`
	DumpFormat  *string  `toml:"dump_format"`
	Recipients  []string `toml:"recipients"`
	Identities  []string `toml:"identities"`
	Level       *int     `toml:"level"`
	Jobs        *int     `toml:"jobs"`
	VerifyLevel *string  `toml:"verify_level"`
}

// values are the keys that are given, as their flags take them.
func (n nightlyConfig) values() map[string][]string {
	out := map[string][]string{}
	for flag, list := range map[string][]string{"skip": n.Skip, "recipient": n.Recipients, "identity": n.Identities} {
		if list != nil {
			out[flag] = list
		}
	}
	for flag, s := range map[string]*string{"textfile": n.Textfile, "mode": n.Mode, "dump-format": n.DumpFormat, "verify-level": n.VerifyLevel} {
		if s != nil {
			out[flag] = []string{*s}
		}
	}
	for flag, i := range map[string]*int{"level": n.Level, "jobs": n.Jobs} {
		if i != nil {
			out[flag] = []string{strconv.Itoa(*i)}
		}
	}
	return out
}

// nightlyFlags are the flags that are not of the backup.
type nightlyFlags struct {
	skip, recipients, identities []string
	format, level, textfile      string
	zstd, jobs                   int
}

func (a *app) nightlyCommand() *cobra.Command {
	var n nightlyFlags
	var cut func() (flow.BackupOptions, error)
	c := &cobra.Command{
		Use: "nightly", GroupID: "main", Args: exactly(0, ""),
		Short: "Back up, dump and check the dump, verify, prune: one night's work with one summary",
		Long: `Take a backup, write its SQL dump into the catalog and check that, verify the
backup, and prune: each as its own command does it, one after the other, with
one summary at the end.

A part that fails does not keep the others from running where that makes sense.
Without a backup of this night there is no dump and no verification. Nothing is
deleted where the backup failed, where damage was found, or where the
verification could not prove the backup.

--skip leaves parts out. Without the backup the newest complete one is dumped
and verified: so the database server may run "--skip dump,verify" and another
host, later, "--skip backup,prune". The rules of prune are those of the
configuration; without any the command refuses to begin unless prune is skipped.

Exit status of the worst part: 4 before 5, 3, 1 and 2 (see docs/operations.md).
--textfile writes metrics for node_exporter, also when parts failed.`,
		Example: "  cleancut nightly --textfile /var/lib/prometheus/node-exporter/cleancut.prom\n  cleancut nightly --skip backup,prune --verify-level rows",
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := a.nightlyOptions(c, &n, cut)
			if err != nil {
				return err
			}
			f, s, err := a.flow(c.Context())
			sum := flow.Nightly{Cluster: s.name, Host: s.Host, Started: time.Now().UTC()}
			if err == nil {
				if sum, err = f.Nightly(c.Context(), o); err != nil {
					return err // another one is at it, and its textfile is to come
				}
				err = nightlyError(&sum)
				if err == nil {
					err = c.Context().Err()
				}
			}
			code := exitCode(err)
			if werr := writeMetrics(n.textfile, sum, code); werr != nil && err == nil {
				err, code = werr, exitCode(werr)
			}
			if len(sum.Steps) == 0 { // nothing could begin
				return err
			}
			if perr := a.print(nightlyResult{OK: err == nil, Exit: code, Nightly: sum}, func() { a.nightlyText(sum, code) }); err == nil {
				err = perr
			}
			return err
		},
	}
	cut = a.backupFlags(c)
	p := c.Flags()
	p.StringSliceVar(&n.skip, "skip", nil, "parts to leave out: backup, dump, verify, prune")
	p.StringVar(&n.textfile, "textfile", "", "file for node_exporter's textfile collector, DIR/NAME.prom; each cluster needs its own")
	p.StringVar(&n.format, "dump-format", string(backup.DumpSQL), "sql or per-database")
	p.StringArrayVar(&n.recipients, "recipient", nil, "age recipient that the dump is encrypted for; may be given several times")
	p.StringArrayVar(&n.identities, "identity", nil, "file with an age identity that opens the dump for its check; may be given several times")
	p.IntVar(&n.zstd, "level", 1, "zstd level of the dump, 1 to 22")
	p.IntVar(&n.jobs, "jobs", 1, "databases that are dumped and checked at once, with --dump-format per-database")
	p.StringVar(&n.level, "verify-level", string(backup.LevelFull), "start, rows or full")
	return c
}

// nightlyOptions puts flags and configuration together and checks both before
// anything is done.
func (a *app) nightlyOptions(c *cobra.Command, n *nightlyFlags, cut func() (flow.BackupOptions, error)) (o flow.NightlyOptions, err error) {
	s, err := a.settings()
	if err != nil {
		return o, err
	}
	given := s.Nightly.values()
	for flag, v := range s.cluster.Nightly.values() {
		given[flag] = v
	}
	for flag, values := range given {
		if c.Flags().Changed(flag) {
			continue
		}
		for _, v := range values {
			if err := c.Flags().Set(flag, v); err != nil {
				return o, fmt.Errorf("%w: configuration, section nightly: %s: %w", backup.ErrUsage, strings.ReplaceAll(flag, "-", "_"), err)
			}
		}
	}
	for _, p := range n.skip {
		if !slices.Contains(flow.NightlyParts(), flow.NightlyPart(p)) {
			return o, fmt.Errorf("%w: --skip %q: backup, dump, verify or prune", backup.ErrUsage, p)
		}
		o.Skip = append(o.Skip, flow.NightlyPart(p))
	}
	o.Level = backup.Level(n.level)
	switch format := backup.DumpFormat(n.format); {
	case o.Level != backup.LevelStart && o.Level != backup.LevelRows && o.Level != backup.LevelFull:
		return o, fmt.Errorf("%w: --verify-level %q: start, rows or full", backup.ErrUsage, n.level)
	case format != backup.DumpSQL && format != backup.DumpPerDatabase:
		return o, fmt.Errorf("%w: --dump-format %q: sql or per-database", backup.ErrUsage, n.format)
	case n.zstd < 1 || n.zstd > 22:
		return o, fmt.Errorf("%w: zstd level %d: 1 to 22", backup.ErrUsage, n.zstd)
	case n.jobs < 1:
		return o, fmt.Errorf("%w: --jobs %d: 1 or more", backup.ErrUsage, n.jobs)
	case n.textfile != "" && !strings.HasSuffix(n.textfile, ".prom"):
		return o, fmt.Errorf("%w: --textfile %s: node_exporter reads only files that end in .prom", backup.ErrUsage, n.textfile)
	}
	o.Dump = flow.DumpOptions{Level: n.zstd, Format: backup.DumpFormat(n.format), Jobs: n.jobs, Recipients: n.recipients}
	o.Identities = n.identities
	if !slices.Contains(o.Skip, flow.NightlyPrune) {
		if o.Rules, o.Window, err = a.retention(c); err != nil && o.Rules == (backup.Retention{}) {
			err = backup.Hint(err, "give [retention] in the configuration, or --skip prune")
		}
		if err != nil {
			return o, err
		}
	}
	o.Backup, err = cut()
	return o, err
}

// nightlyResult is the JSON of nightly.
type nightlyResult struct {
	OK   bool `json:"ok"`
	Exit int  `json:"exit"`
	flow.Nightly
}

// nightlyError sets the exit status of each part and returns the error of the
// worst one.
func nightlyError(n *flow.Nightly) error {
	worst := -1
	for i := range n.Steps {
		s := &n.Steps[i]
		if s.Exit = exitCode(s.Err); worst < 0 || severity(s.Exit) > severity(n.Steps[worst].Exit) {
			worst = i
		}
	}
	if s := n.Steps[worst]; s.Err != nil {
		return fmt.Errorf("%s: %w", s.Part, s.Err)
	}
	return nil
}

// severity orders exit statuses: data in doubt before things left, before a
// backup that is void, before what failed and undid itself.
func severity(code int) int {
	return slices.Index([]int{exitDone, exitUsage, exitFailed, exitVoid, exitLeft, exitDamage}, code)
}

func (a *app) nightlyText(n flow.Nightly, code int) {
	how := "done"
	if code != exitDone {
		how = fmt.Sprintf("FAILED (exit status %d)", code)
	}
	a.line("\nnightly job of cluster %s on %s: %s, in %.0f s", n.Cluster, n.Host, how, n.Seconds)
	rows := [][]string{}
	for _, s := range n.Steps {
		state := string(s.State)
		if s.State == flow.StepFailed {
			state = "FAILED"
		}
		rows = append(rows, []string{"  " + string(s.Part), state, fmt.Sprintf("%.1f s", s.Seconds), cmp.Or(s.Why, strings.ReplaceAll(s.Error, "\n", "; "), nightlyDetail(n, s.Part))})
	}
	a.table(rows)
	for _, s := range n.Steps {
		if s.Hint != "" {
			a.line("  %s, what to do: %s", s.Part, s.Hint)
		}
	}
}

// nightlyDetail is what a part brought, in one line.
func nightlyDetail(n flow.Nightly, p flow.NightlyPart) string {
	switch {
	case p == flow.NightlyBackup && n.Backup != nil:
		b := n.Backup
		return fmt.Sprintf("%s: %s cut of %s at %s, frozen for %.1f ms", b.ID, b.Achieved, b.Bytes, b.Cut.Format(time.RFC3339), b.FreezeMS)
	case p == flow.NightlyDump && n.Dump != nil:
		d := n.Dump
		if d.Check == nil {
			return fmt.Sprintf("%s: %s of SQL, %s compressed; NOT CHECKED: %s", d.Name, d.SQL, d.Compressed, d.Unchecked)
		}
		return fmt.Sprintf("%s: %s of SQL, %s compressed; checked", d.Name, d.SQL, d.Compressed)
	case p == flow.NightlyVerify && n.Verdict != nil:
		return fmt.Sprintf("%s (level %s)", n.Verdict.Word(), n.Verdict.Level)
	case p == flow.NightlyPrune && n.Pruned != nil:
		return fmt.Sprintf("%s deleted, %d kept", plural(prunedBackups(n), "backup"), len(n.Pruned.Keep)+len(n.Pruned.Remove)-prunedBackups(n))
	}
	return ""
}

// prunedBackups counts the backups that prune deleted.
func prunedBackups(n flow.Nightly) (deleted int) {
	for _, r := range n.Pruned.Remove {
		if r.Done {
			deleted++
		}
	}
	return deleted
}
