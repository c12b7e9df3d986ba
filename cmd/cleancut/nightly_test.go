package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
)

func TestWrongRequestsOfTheNightlyJobExitWith2(t *testing.T) {
	for _, c := range []struct{ args, words string }{
		{"nightly", "no rule says what to keep|[retention]|--skip prune"},
		{"nightly surplus", "takes no arguments"},
		{"nightly --skip prune,lunch", "--skip \"lunch\"|backup, dump, verify or prune"},
		{"nightly --skip prune --verify-level deep", "--verify-level \"deep\""},
		{"nightly --skip prune --dump-format custom", "--dump-format \"custom\""},
		{"nightly --skip prune --level 23", "zstd level 23"},
		{"nightly --skip prune --jobs 0", "--jobs 0"},
		{"nightly --skip prune --mode torn", "mode \"torn\""},
		{"nightly --skip prune --textfile /tmp/metrics.txt", "end in .prom"},
	} {
		t.Run(c.args, func(t *testing.T) {
			l := bare(t)
			l.run(t, strings.Fields(c.args)...).refused(t, 2, strings.Split(c.words, "|")...)
			if _, err := os.Stat(l.catalog); err == nil {
				t.Error("a catalog was made")
			}
		})
	}
	for text, words := range map[string]string{
		"[nightly]\nskip = [\"lunch\"]":                                               "--skip \"lunch\"",
		"[nightly]\nlevel = 0\nskip = [\"prune\"]":                                    "zstd level 0",
		"[nightly]\nlevel = \"much\"":                                                 "level = \"much\"",
		"[nightly]\nweekly = true":                                                    "unknown key",
		"[nightly]\nskip = [\"prune\"]\n[cluster.a.nightly]\nverify_level = \"deep\"": "--verify-level \"deep\"",
		"[nightly]\nskip = [\"prune\"]\n[cluster.a.nightly]\nskip = []":               "no rule says what to keep",
		"[nightly]\nskip = [\"prune\"]\nmode = \"torn\"":                              "mode \"torn\"",
	} {
		t.Run(text, func(t *testing.T) {
			l := bare(t)
			file := filepath.Join(l.dir, "c.toml")
			if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			l.run(t, "nightly", "--config", file).refused(t, 2, words)
		})
	}
}

// nightlyLab is a cluster, its nightly job and the last textfile.
type nightlyLab struct {
	*production
	textfile string
}

// night is the JSON of nightly.
type night struct {
	OK    bool
	Exit  int
	Parts []struct {
		Part, State, Why, Error string
		Exit                    int
	}
	Backup *struct {
		ID    backup.ID
		Bytes int64
	}
	Dump *struct {
		Name  string
		Check *backup.DumpCheck
	}
	Verdict *backup.Verdict
	Prune   *struct{ Remove []struct{ Done bool } }
}

// nightly runs the job and reads its summary, whatever its end is.
func (l *nightlyLab) nightly(t *testing.T, env []string, more ...string) (n night, o outcome) {
	t.Helper()
	o = l.runWith(t, env, append([]string{"nightly", "--json", "--verify-level", "start", "--textfile", l.textfile}, more...)...)
	dec := json.NewDecoder(strings.NewReader(o.out))
	if err := dec.Decode(&n); err != nil || dec.More() {
		t.Fatalf("%v: exit %d\n%s%s", err, o.code, o.out, o.err)
	}
	if n.Exit != o.code || n.OK != (o.code == 0) {
		t.Errorf("it says exit %d, ok %v, and ends with %d", n.Exit, n.OK, o.code)
	}
	return n, o
}

// wants compares the states and exit statuses of the four parts, "done" and
// "failed 1", and the reasons with words that must be in them.
func (n night) wants(t *testing.T, parts ...string) {
	t.Helper()
	for i, want := range parts {
		got := n.Parts[i].State
		if got == "failed" {
			got = fmt.Sprintf("failed %d", n.Parts[i].Exit)
		}
		state, why, _ := strings.Cut(want, ": ")
		if got != state || !strings.Contains(n.Parts[i].Why, why) {
			t.Errorf("%s: %s (%s) %s, want %s", n.Parts[i].Part, got, n.Parts[i].Why, n.Parts[i].Error, want)
		}
	}
}

// metrics reads the textfile with Prometheus' own parser: name and labels to value.
func (l *nightlyLab) metrics(t *testing.T) map[string]float64 {
	t.Helper()
	f, err := os.Open(l.textfile)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if files, err := os.ReadDir(filepath.Dir(l.textfile)); err != nil || len(files) != 1 {
		t.Errorf("beside the textfile lie %v, %v", files, err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(f)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for name, family := range families {
		if family.GetHelp() == "" || family.GetType().String() != "GAUGE" {
			t.Errorf("%s has help %q, type %s", name, family.GetHelp(), family.GetType())
		}
		for _, m := range family.GetMetric() {
			key := strings.TrimPrefix(name, "cleancut_nightly_")
			for _, l := range m.GetLabel() {
				if l.GetName() == "part" {
					key += " " + l.GetValue()
				} else if l.GetName() != "cluster" || l.GetValue() != "main" {
					t.Errorf("%s has label %s=%s", name, l.GetName(), l.GetValue())
				}
			}
			out[key] = m.GetGauge().GetValue()
		}
	}
	return out
}

func (l *nightlyLab) measures(t *testing.T, want map[string]float64) map[string]float64 {
	t.Helper()
	got := l.metrics(t)
	for name, v := range want {
		if g, ok := got[name]; !ok || g != v {
			t.Errorf("%s is %v (there: %v), want %v", name, g, ok, v)
		}
	}
	return got
}

// pointAt finds the fault point of the run o to which words in the points lead,
// each behind the one before.
func (o outcome) pointAt(t *testing.T, path ...string) string {
	t.Helper()
	at := -1
	for _, word := range path {
		n := slices.IndexFunc(o.points[at+1:], func(p string) bool { return strings.Contains(p, word) })
		if n < 0 {
			t.Fatalf("no point %q, of %q:\n%s", word, path, strings.Join(o.points, "\n"))
		}
		at += n + 1
	}
	return fmt.Sprintf("CLEANCUT_FAULT=error@%d", at+1)
}

func TestNightly(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.extra = append(p.extra, "CLEANCUT_KEEP_LAST=1")
	l := &nightlyLab{production: p, textfile: filepath.Join(p.dir, "collector", "cleancut.prom")}
	if err := os.Mkdir(filepath.Dir(l.textfile), 0o755); err != nil {
		t.Fatal(err)
	}
	p.writer(t)
	n, _ := l.nightly(t, nil, "--skip", "backup,prune") // nothing there yet
	n.wants(t, "failed 1", "not run: no backup of this night", "not run: no backup of this night", "skipped")

	n, full := l.nightly(t, nil)
	n.wants(t, "done", "done", "done", "done")
	if full.code != 0 || n.Backup == nil || n.Dump == nil || n.Dump.Check == nil || n.Verdict == nil || !n.Verdict.Good() || n.Prune == nil || len(n.Prune.Remove) != 0 {
		t.Fatalf("exit %d\n%s", full.code, full.out)
	}
	golden(t, "json/nightly.txt", shape(t, full.out))
	first := l.measures(t, map[string]float64{"exit_code": 0, "part_exit_code backup": 0, "part_exit_code prune": 0, "verdict_good": 1, "pruned_backups": 0,
		"dump_good": 1, "backup_bytes": float64(n.Backup.Bytes)})
	for _, name := range []string{"last_run_timestamp_seconds", "backup_cut_timestamp_seconds", "backup_frozen_seconds", "dump_bytes", "dump_sql_bytes", "duration_seconds",
		"part_duration_seconds dump", "part_last_success_timestamp_seconds verify"} {
		if first[name] <= 0 {
			t.Errorf("%s is %v", name, first[name])
		}
	}

	t.Run("the next night deletes, and tells people", func(t *testing.T) {
		o := l.run(t, "nightly", "--verify-level", "start", "--skip", "dump", "--textfile", l.textfile)
		for _, words := range [][]string{{"nightly job of cluster main on prod: done"}, {"backup ", "done", "atomic cut of"}, {"dump ", "skipped"}, {"verify ", "done", "good (level start)"}, {"prune ", "done", "1 backup deleted, 1 kept"}} {
			if !slices.ContainsFunc(strings.Split(o.out, "\n"), func(line string) bool { return hasAll(line, words) }) {
				t.Errorf("no line with %q:\n%s%s", words, o.out, o.err)
			}
		}
		got := l.measures(t, map[string]float64{"exit_code": 0, "pruned_backups": 1, "part_last_success_timestamp_seconds dump": first["part_last_success_timestamp_seconds dump"]})
		if _, there := got["dump_bytes"]; there || got["part_last_success_timestamp_seconds backup"] < first["part_last_success_timestamp_seconds backup"] {
			t.Errorf("got %v", got)
		}
	})
	kept := p.ids(t)
	if len(kept) != 1 {
		t.Fatalf("kept %v", kept)
	}
	t.Run("another host dumps and verifies the newest backup", func(t *testing.T) {
		n, o := l.nightly(t, []string{"CLEANCUT_DSN=host=/nowhere"}, "--skip", "backup,prune")
		n.wants(t, "skipped", "done", "done", "skipped")
		if o.code != 0 || n.Backup == nil || n.Backup.ID != kept[0] || len(p.verdicts(t, kept[0])) != 2 {
			t.Errorf("exit %d\n%s", o.code, o.out)
		}
	})
	t.Run("the backup fails", func(t *testing.T) {
		before := l.metrics(t)
		n, o := l.nightly(t, []string{"CLEANCUT_DSN=host=/nowhere"})
		n.wants(t, "failed 1", "not run: no backup of this night", "not run: no backup of this night", "not run: no backup of this night")
		if o.code != 1 || !strings.Contains(o.err, "backup: connect to PostgreSQL") {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
		got := l.measures(t, map[string]float64{"exit_code": 1, "part_exit_code backup": 1,
			"part_last_success_timestamp_seconds backup": before["part_last_success_timestamp_seconds backup"], "part_last_success_timestamp_seconds prune": before["part_last_success_timestamp_seconds prune"]})
		if _, there := got["part_exit_code verify"]; there {
			t.Errorf("got %v", got)
		}
	})
	t.Run("the dump fails, the rest goes on", func(t *testing.T) {
		n, o := l.nightly(t, []string{full.pointAt(t, "catalog.put complete", "catalog.put dump")})
		n.wants(t, "done", "failed 1", "done", "done")
		if o.code != 1 || !strings.Contains(o.err, "dump: ") {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
		l.measures(t, map[string]float64{"exit_code": 1, "part_exit_code dump": 1, "part_exit_code verify": 0, "verdict_good": 1})
	})
	t.Run("the verification cannot judge", func(t *testing.T) {
		n, o := l.nightly(t, []string{"CLEANCUT_BIN_DIRS=", full.pointAt(t, "catalog.put dump", "postgres.start", "catalog.put dump", "postgres.start")})
		n.wants(t, "done", "done", "failed 1", "not run: is not proven")
		if o.code != 1 || len(p.ids(t)) < 2 {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
	})
	t.Run("damage: nothing is deleted, and 4 beats 1", func(t *testing.T) {
		m := p.manifestOf(t, p.must(t, "backup", "--json"))
		p.inside(t, m, p.mounts[0], func(dir string) { overwrite(t, filepath.Join(dir, "pg/global/pg_control"), 0, 100, 0) })
		count := len(p.ids(t))
		n, o := l.nightly(t, nil, "--skip", "backup")
		n.wants(t, "skipped", "failed 1", "failed 4", "not run: damage was found (verify)")
		if o.code != 4 || len(p.ids(t)) != count || n.Verdict == nil || n.Verdict.Good() {
			t.Errorf("exit %d\n%s%s", o.code, o.out, o.err)
		}
		l.measures(t, map[string]float64{"exit_code": 4, "part_exit_code verify": 4, "verdict_good": 0})
		p.must(t, "delete", string(m.ID))
	})
	t.Run("prune fails", func(t *testing.T) {
		_, two := l.nightly(t, nil, "--skip", "dump,verify") // there is one to delete, so the next run passes the same points
		if two.code != 0 {
			t.Fatalf("exit %d\n%s", two.code, two.err)
		}
		n, o := l.nightly(t, []string{two.pointAt(t, "catalog.delete intent", "catalog.put intent")}, "--skip", "dump,verify")
		n.wants(t, "done", "skipped", "skipped", fmt.Sprintf("failed %d", o.code))
		if o.code == 0 {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
		l.measures(t, map[string]float64{"exit_code": float64(o.code), "part_exit_code prune": float64(o.code)})
		p.run(t, "sweep")
	})
	t.Run("nothing can begin", func(t *testing.T) {
		before := l.metrics(t)
		o := l.runWith(t, []string{"CLEANCUT_POOL=/nowhere"}, "nightly", "--textfile", l.textfile)
		o.refused(t, 1, "/nowhere")
		l.measures(t, map[string]float64{"exit_code": 1, "part_last_success_timestamp_seconds backup": before["part_last_success_timestamp_seconds backup"]})
	})
	t.Run("the textfile cannot be written", func(t *testing.T) {
		o := l.run(t, "nightly", "--skip", "backup,dump,verify", "--textfile", "/nowhere/x.prom")
		o.refused(t, 1, "write the metrics", "/nowhere")
		if !strings.Contains(o.out, "prune ") || !strings.Contains(o.out, "FAILED (exit status 1)") {
			t.Errorf("the summary is\n%s", o.out)
		}
	})
	t.Run("a second one is refused, and SIGTERM ends the part", func(t *testing.T) {
		before := l.metrics(t)
		o, reached := l.stopped(t, "  nightly    dump", nil, func(cmd *exec.Cmd) {
			l.run(t, "nightly", "--textfile", l.textfile).refused(t, 1, "another nightly job of cluster main is running on this host")
			if got := l.metrics(t); got["last_run_timestamp_seconds"] != before["last_run_timestamp_seconds"] {
				t.Error("the one that was refused wrote the textfile")
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}, "nightly", "--verify-level", "start", "--textfile", l.textfile)
		if !reached || o.code != 1 {
			t.Errorf("reached %v, exit %d\n%s%s", reached, o.code, o.out, o.err)
		}
		for _, words := range [][]string{{"FAILED (exit status 1)"}, {"backup ", "done"}, {"dump ", "FAILED", "context canceled"}, {"verify ", "not run", "interrupted"}, {"prune ", "not run", "interrupted"}} {
			if !slices.ContainsFunc(strings.Split(o.out, "\n"), func(line string) bool { return hasAll(line, words) }) {
				t.Errorf("no line with %q:\n%s", words, o.out)
			}
		}
		l.measures(t, map[string]float64{"exit_code": 1, "part_exit_code backup": 0, "part_exit_code dump": 1})
	})

	p.clean(t)
}

func TestTheNightlyUnitsAreFit(t *testing.T) {
	verify, missing := exec.LookPath("systemd-analyze")
	if missing != nil {
		t.Log("NOTE no systemd-analyze here: the units are looked at by their words only")
	}
	dir := t.TempDir()
	var paths []string
	for unit, runs := range map[string]string{"cleancut-nightly": "nightly", "cleancut-reap": "clone reap --yes"} {
		for _, kind := range []string{".service", ".timer"} {
			b, err := os.ReadFile("../../dist/systemd/" + unit + kind)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			if kind == ".timer" {
				for _, line := range []string{"Persistent=true", "OnCalendar=", "RandomizedDelaySec=", "WantedBy=timers.target"} {
					if !strings.Contains(text, "\n"+line) {
						t.Errorf("%s%s lacks %s", unit, kind, line)
					}
				}
			} else {
				if !strings.Contains(text, "\nExecStart=/usr/local/bin/cleancut "+runs+"\n") {
					t.Errorf("%s%s does not run cleancut %s", unit, kind, runs)
				}
				for line := range strings.Lines(text) { // what hides mounts or devices, or keeps servers from running
					for _, bad := range []string{"Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Device", "Root", "Mount", "CapabilityBoundingSet", "MemoryDeny", "UMask", "RestrictNamespaces", "SystemCallFilter", "DynamicUser"} {
						if strings.HasPrefix(line, bad) {
							t.Errorf("%s%s has %s", unit, kind, line)
						}
					}
				}
			}
			path := filepath.Join(dir, unit+kind)
			if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "/usr/local/bin/cleancut", "/bin/true")), 0o644); err != nil {
				t.Fatal(err)
			}
			paths = append(paths, path)
		}
	}
	if missing == nil {
		if out, err := exec.CommandContext(t.Context(), verify, append([]string{"verify", "--recursive-errors=no"}, paths...)...).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v\n%s", err, out)
		}
	}
}
