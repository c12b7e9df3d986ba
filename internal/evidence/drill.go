package evidence

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/drill"
)

// Drill is what docs/evidence/drill-*.json holds: the part of the report.json
// of `cleancut drill` that the page tells. A whole report.json is read, too.
type Drill struct {
	Name   string `json:"-"` // of the file
	Trials []struct {
		drill.Cell
		Seed   int64       `json:"seed"`
		N      int         `json:"n"`
		At     time.Time   `json:"at"`
		Class  drill.Class `json:"class"`
		Reason string      `json:"reason,omitempty"`
	} `json:"trials"`
	Runs []struct {
		Began   time.Time     `json:"began"`
		Machine drill.Machine `json:"machine"`
	} `json:"runs"`
}

// ReadDrill reads one file.
func ReadDrill(file string) (Drill, error) {
	d := Drill{Name: nameOf("drill", file)}
	b, err := os.ReadFile(file)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return d, fmt.Errorf("%s: %w", file, err)
	}
	return d, nil
}

// Keep writes it as drill-NAME.json into a folder of data.
func (d Drill) Keep(dir, name string) error {
	return writeLines(filepath.Join(dir, "drill-"+name+".json"), d, "where", "runs", "began")
}

// cells counts its trials with the drill's own statistics.
func (d Drill) cells() []drill.CellSummary {
	var trials []drill.Trial
	for _, t := range d.Trials {
		trials = append(trials, drill.Trial{Cell: t.Cell, Seed: t.Seed, N: t.N, Class: t.Class})
	}
	return drill.Summarize(trials)
}

func (p *page) drills(drills []Drill) {
	p.line("## What careless and held cuts give")
	p.line("")
	if len(drills) == 0 {
		p.line("No drill was run for this page yet.")
		return
	}
	p.line("Trials of `cleancut drill` (docs/drill.md says how they come about and what the classes are). Intervals are of 95 %%; where nothing or everything was damaged, the rule of three. These are rates of")
	p.line("one load on one machine: proof that such damage exists, not how often it happens elsewhere.")
	p.line("")
	for _, d := range drills {
		p.drill(d)
	}
	p.held(drills)
}

func (p *page) drill(d Drill) {
	p.line("### %s", d.Name)
	p.line("")
	if len(d.Trials) == 0 || len(d.Runs) == 0 {
		p.line("No trial.")
		p.line("")
		return
	}
	first, last := d.Trials[0].At, d.Trials[0].At
	for _, t := range d.Trials {
		if t.At.Before(first) {
			first = t.At
		}
		if t.At.After(last) {
			last = t.At
		}
	}
	m := d.Runs[len(d.Runs)-1].Machine
	server, _, _ := strings.Cut(m.PostgreSQL, " on ")
	var versions []string
	for _, r := range d.Runs {
		if !slices.Contains(versions, r.Machine.Cleancut) {
			versions = append(versions, r.Machine.Cleancut)
		}
	}
	p.line("%s to %s UTC, %d production runs. %d processors, Linux %s, %s, cleancut %s.", first.UTC().Format("2006-01-02 15:04"), last.UTC().Format("2006-01-02 15:04"), len(d.Runs), m.Processors, m.Kernel, server, strings.Join(versions, ", "))
	p.line("")
	head := []string{"cuts", "trials"}
	for _, c := range drill.Classes() {
		head = append(head, c.Words())
	}
	p.head(append(head, "not judged", "damaged", "95 % interval")...)
	for _, c := range d.cells() {
		row := []string{c.Conditions(), fmt.Sprint(c.Trials)}
		for _, class := range drill.Classes() {
			row = append(row, fmt.Sprint(c.Count(class)))
		}
		p.row(append(row, fmt.Sprint(c.Unjudged), drill.Percent(c.Share), drill.Percent(c.Lower)+" to "+drill.Percent(c.Upper))...)
	}
	p.line("")
	for _, c := range d.cells() {
		p.line("- %s", c.Said)
	}
	p.line("")
}

// held adds up the cuts that cleancut vouches for, by layout and recovery: an
// image that was recovered in two ways is one cut of each.
func (p *page) held(drills []Drill) {
	type total struct{ trials, damaged int }
	totals := map[string]total{}
	var order []string
	for _, d := range drills {
		for _, c := range d.cells() {
			if !c.Protected() {
				continue
			}
			layout := fmt.Sprintf("%s of %d, %s, %s, %s recovery", c.Layout, c.Volumes, c.Filesystem, c.Where, c.Recovery)
			if !slices.Contains(order, layout) {
				order = append(order, layout)
			}
			t := totals[layout]
			totals[layout] = total{t.trials + c.Trials, t.damaged + c.Damaged}
		}
	}
	p.line("### All held cuts")
	p.line("")
	p.line("Of all files, loads and times between members, by layout and way of recovery. The limit is the upper one of the 95 %% interval; it takes the cuts for independent, which those of one production run are not quite.")
	p.line("")
	p.head("layout, recovery", "held cuts", "damaged", "at most")
	slices.Sort(order)
	for _, layout := range order {
		t := totals[layout]
		p.row(layout, fmt.Sprint(t.trials), fmt.Sprint(t.damaged), drill.Percent(drill.Share95(t.damaged, t.trials).Upper))
	}
}
