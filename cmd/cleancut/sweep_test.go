package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/lab/labtest"
)

// allPoints is up to how many points a flow is stopped at each of them in
// every way; above, error and cancel take each distinct point once.
const allPoints = 64

// flowUnderFault is one command that is stopped at every outside call.
type flowUnderFault struct {
	args      func(t *testing.T) []string // makes what the run needs
	removes   func(t *testing.T, o outcome)
	stay      []string // folders of copies that stand before the run
	from      string   // only the points from this one on
	within    string   // only the points whose name begins so
	of        []string // only points whose names begin with one of these, each once in every way
	killsOnce bool     // only kills, at each distinct point once
	retries   bool     // a call that failed is made again
	always    bool     // removes also what a failed run left
}

// faults lists what to inject: "kill@7" and the like, by the points of a run
// that nothing disturbed.
func (f flowUnderFault) faults(points []string) []string {
	var out []string
	seen := map[string]bool{}
	start := 0
	if f.from != "" {
		start = slices.Index(points, f.from)
	}
	every := len(points) <= allPoints
	for i := max(start, 0); i < len(points); i++ {
		if !strings.HasPrefix(points[i], f.within) {
			continue
		}
		if f.of != nil && (seen[points[i]] || !slices.ContainsFunc(f.of, func(p string) bool { return strings.HasPrefix(points[i], p) })) {
			continue
		}
		fresh := !seen[points[i]]
		seen[points[i]] = true
		if fresh || !f.killsOnce {
			out = append(out, fmt.Sprintf("kill@%d", i+1))
		}
		if (fresh || every) && !f.killsOnce {
			out = append(out, fmt.Sprintf("error@%d", i+1), fmt.Sprintf("cancel@%d", i+1))
		}
	}
	return out
}

// underFaults runs the flow once to count its points, and then once for each
// fault. After an error or a cancel nothing may be left, or exit 5 says so;
// after a kill sweep removes all, or finishes a backup that was cut already.
func (p *production) underFaults(t *testing.T, f flowUnderFault) {
	t.Helper()
	o := p.must(t, f.args(t)...)
	f.removes(t, o)
	p.clean(t, f.stay...)
	t.Logf("%d points", len(o.points))
	points := o.points
	for _, fault := range f.faults(points) {
		var n int
		action, at, _ := strings.Cut(fault, "@")
		_, _ = fmt.Sscan(at, &n)
		t.Run(fault+" "+points[n-1], func(t *testing.T) {
			args := f.args(t)
			had := p.complete(t)
			o := p.runWith(t, []string{"CLEANCUT_FAULT=" + fault}, args...)
			p.flows(t)
			p.answers(t)
			left := p.leftovers(t, f.stay...)
			if action == "error" && o.code == 0 && len(o.points) >= n && !f.retries {
				t.Error("exit 0 though a call failed")
			}
			judge(t, action, n, o, left)
			if t.Failed() {
				t.Logf("cleancut %s, exit %d, passed %q:\n%s%s", strings.Join(args, " "), o.code, o.points, o.out, o.err)
			}
			if action == "kill" || len(left) > 0 && o.code != 0 {
				p.swept(t, f.stay...)
			}
			if action == "kill" && o.code != 0 {
				for _, id := range p.complete(t) {
					if !slices.Contains(had, id) {
						p.must(t, "delete", id)
					}
				}
			}
			if o.code == 0 || f.always {
				f.removes(t, o)
			}
			if o.code == 0 { // the signal may come when all is done
				p.clean(t, f.stay...)
			}
		})
	}
}

// complete lists the complete backups of the catalog.
func (p *production) complete(t *testing.T) []string {
	t.Helper()
	store, err := catalog.Open("file://" + p.catalog)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := catalog.New(store, "main").Backups(t.Context())
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Err == nil {
			out = append(out, string(e.ID))
		}
	}
	return out
}

// judge holds the exit code against what is left.
func judge(t *testing.T, action string, n int, o outcome, left []string) {
	t.Helper()
	if action == "kill" {
		if len(o.points) >= n && o.code != -1 {
			t.Errorf("exit %d, want it killed", o.code)
		}
		return
	}
	switch o.code {
	case 0:
	case 1, 3:
		for _, l := range left {
			t.Errorf("exit %d, but left: %s", o.code, l)
		}
	case 5:
		if len(left) == 0 {
			t.Error("exit 5, but nothing is left")
		}
	case 4: // of verify: the stop that failed is one of its checks
		if !strings.HasPrefix(o.points[n-1], "postgres.stop") || len(left) > 0 {
			t.Errorf("exit 4 after %s, left %q", o.points[n-1], left)
		}
	default:
		t.Errorf("exit %d", o.code)
	}
	if o.code != 0 && !strings.Contains(o.err, "cleancut: ") {
		t.Errorf("no message: %q", o.err)
	}
}

func TestEveryFlowStoppedAnywhereLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	keeper := p.backup(t)
	drop := func(t *testing.T, o outcome) {
		t.Helper()
		p.must(t, "delete", string(p.manifestOf(t, o).ID))
	}
	t.Run("backup", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{removes: drop, args: func(*testing.T) []string { return []string{"backup", "--json"} }})
	})
	root := filepath.Join(p.dir, "copy", "a")
	undo := func(t *testing.T, _ outcome) {
		t.Helper()
		p.must(t, "restore", "--undo", root)
	}
	t.Run("restore", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{removes: undo, args: func(*testing.T) []string { return []string{"restore", string(keeper), "--to", root} }})
	})
	none := func(*testing.T, outcome) {}
	t.Run("undo of a restore", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: none, args: func(t *testing.T) []string {
			p.must(t, "restore", string(keeper), "--to", root)
			return []string{"restore", "--undo", root}
		}})
	})
	t.Run("sweep", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: none, args: func(t *testing.T) []string {
			if o := p.runWith(t, []string{"CLEANCUT_FAULT=kill@27"}, "backup"); o.code != -1 || len(p.leftovers(t)) == 0 {
				t.Fatalf("a killed backup: exit %d, left %q", o.code, p.leftovers(t))
			}
			return []string{"sweep"}
		}})
	})
	var id backup.ID
	forget := func(t *testing.T, _ outcome) {
		t.Helper()
		if o := p.run(t, "delete", string(id)); o.code != 0 && !strings.Contains(o.err, "not found") {
			t.Errorf("delete it after all: exit %d\n%s", o.code, o.err)
		}
	}
	t.Run("delete", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{removes: forget, always: true, retries: true, from: "catalog.put intent", args: func(t *testing.T) []string {
			id = p.backup(t)
			return []string{"delete", string(id)}
		}})
	})
	t.Run("verify", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{from: "postgres.start.done", removes: none,
			args: func(t *testing.T) []string {
				// Each verdict is read by the next run, whose points would then move.
				if err := os.RemoveAll(filepath.Join(p.catalog, "clusters", "main", "backups", string(keeper), "verdicts")); err != nil {
					t.Fatal(err)
				}
				return []string{"verify", "--level", "start", string(keeper)}
			}})
	})
	o := p.must(t, "verify", "--level", "rows", "--json", string(keeper))
	var v backup.Verdict
	if err := json.Unmarshal([]byte(o.out), &v); err != nil || !v.Good() {
		t.Errorf("the backup that was there all the time: %v\n%s", err, o.out)
	}
	p.clean(t)
}
