package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cleancut/internal/flow"
)

const lastSuccess = "cleancut_nightly_part_last_success_timestamp_seconds"

// writeMetrics replaces the textfile by one of this night (node_exporter,
// "Textfile Collector"), in one step: a reader sees the old or the new one. The
// times of the last successes of parts that did not run, or failed, are taken
// over from the old one. "" is no file.
func writeMetrics(file string, n flow.Nightly, exit int) (err error) {
	if file == "" {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write the metrics: %w", err)
		}
	}()
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".cleancut-*.tmp") // the collector takes *.prom only
	if err != nil {
		return err
	}
	_, err = f.WriteString(nightlyMetrics(n, exit, string(old)))
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// nightlyMetrics is the night in Prometheus' text format 0.0.4. old is the text
// of the last time.
func nightlyMetrics(n flow.Nightly, exit int, old string) string {
	var b strings.Builder
	family := func(name, help string, lines ...string) {
		if len(lines) > 0 {
			fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s gauge\n%s\n", name, help, name, strings.Join(lines, "\n"))
		}
	}
	cluster := fmt.Sprintf("{cluster=%q}", n.Cluster) // a cluster's name needs no escapes: backup.CheckClusterName
	one := func(name, help string, value any) { family(name, help, fmt.Sprintf("%s%s %v", name, cluster, value)) }
	one("cleancut_nightly_last_run_timestamp_seconds", "When the last nightly job began.", n.Started.Unix())
	one("cleancut_nightly_duration_seconds", "How long it took.", fmt.Sprintf("%.3f", n.Seconds))
	one("cleancut_nightly_exit_code", "Its exit status: 0 done, 1 failed, 2 usage, 3 void, 4 damage, 5 left behind.", exit)

	const code, took = "cleancut_nightly_part_exit_code", "cleancut_nightly_part_duration_seconds"
	var successes, codes, seconds []string
	for _, p := range flow.NightlyParts() {
		label := fmt.Sprintf("{cluster=%q,part=%q}", n.Cluster, p)
		last := ""
		for line := range strings.Lines(old) {
			if strings.HasPrefix(line, lastSuccess+label+" ") {
				last = strings.TrimSpace(line)
			}
		}
		for _, s := range n.Steps {
			if s.Part != p || s.State != flow.StepDone && s.State != flow.StepFailed {
				continue
			}
			codes = append(codes, fmt.Sprintf("%s%s %d", code, label, s.Exit))
			seconds = append(seconds, fmt.Sprintf("%s%s %.3f", took, label, s.Seconds))
			if s.State == flow.StepDone {
				end := s.Started.Add(time.Duration(s.Seconds * float64(time.Second)))
				last = fmt.Sprintf("%s%s %d", lastSuccess, label, end.Unix())
			}
		}
		if last != "" {
			successes = append(successes, last)
		}
	}
	family(lastSuccess, "When this part of the nightly job last succeeded.", successes...)
	family(code, "Exit status of the part, where the last job ran it.", codes...)
	family(took, "How long the part took, where the last job ran it.", seconds...)
	if c := n.Backup; c != nil {
		one("cleancut_nightly_backup_cut_timestamp_seconds", "The moment that the job's backup holds.", c.Cut.Unix())
		one("cleancut_nightly_backup_bytes", "Size of the volumes of the job's backup.", int64(c.Bytes))
		one("cleancut_nightly_backup_frozen_seconds", "How long the cut of the job's backup held production's filesystems.", c.FreezeMS/1000)
	}
	if d := n.Dump; d != nil {
		one("cleancut_nightly_dump_sql_bytes", "Size of the dump's SQL.", int64(d.SQL))
		one("cleancut_nightly_dump_bytes", "Size of the dump as it is stored.", int64(d.Compressed))
		one("cleancut_nightly_dump_good", "1 if the check of the dump found nothing, 0 if it did or there was none.", yes(d.Good()))
	}
	if v := n.Verdict; v != nil {
		one("cleancut_nightly_verdict_good", "1 if the verification found no damage, 0 if it found some.", yes(v.Good()))
	}
	if n.Pruned != nil {
		one("cleancut_nightly_pruned_backups", "Backups that the job deleted.", prunedBackups(n))
	}
	return b.String()
}

func yes(is bool) int {
	if is {
		return 1
	}
	return 0
}
