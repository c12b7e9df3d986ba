package drill

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/report"
)

// writeReport writes the page and, beside it, its data.
func (o Options) writeReport(st *store, s Summary) error {
	data := struct {
		Summary
		Trials []Trial         `json:"trials"`
		Runs   []ProductionRun `json:"runs"`
	}{s, st.trials, st.runs}
	page := Page(s, st.trials, st.runs)
	return errors.Join(writeFile(s.JSON, func(f *os.File) error {
		enc := json.NewEncoder(f)
		enc.SetIndent("", " ")
		return enc.Encode(data)
	}), writeFile(s.Report, func(f *os.File) error { return page.Write(f) }))
}

// Page is the report for people: all trials, and second by second the
// production run with most cuts and the last cut that was held.
func Page(s Summary, trials []Trial, runs []ProductionRun) report.Page {
	p := report.Page{Title: "cleancut drill", Subtitle: subtitle(trials), Drill: outcomes(s, trials), Said: []string{
		"Each trial of a cell is of a production run of its own. Intervals are Clopper and Pearson's, 95 %; where nothing or everything was damaged, the rule of three.",
		"The seed makes a trial's conditions again (load, order, moment of the cut), not how the machine schedules them.",
		"These are rates of this load on these volumes: proof that such damage exists, not how often it happens elsewhere."}}
	if len(runs) > 0 {
		shown := slices.MaxFunc(runs, func(a, b ProductionRun) int { return len(cutMarks(a, trials)) - len(cutMarks(b, trials)) })
		p.Throughput = []report.Series{throughput(shown)}
		p.Marks = cutMarks(shown, trials)
		p.Machine = machineFacts(runs[len(runs)-1], trials)
	}
	p.Cut, p.Gantt = cutBars(trials)
	return p
}

func subtitle(trials []Trial) string {
	if len(trials) == 0 {
		return "no trial yet"
	}
	first, last := trials[0].At, trials[0].At
	for _, t := range trials {
		first, last = earlier(first, t.At), later(last, t.At)
	}
	const day = "2006-01-02 15:04"
	return fmt.Sprintf("%d trials from %s to %s UTC", len(trials), first.UTC().Format(day), last.UTC().Format(day))
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// outcomes is the grid, and as verdict what the drill says about cleancut: not
// one protected cut may be damaged.
func outcomes(s Summary, trials []Trial) *report.Drill {
	d := &report.Drill{Word: "Measured", Text: "No protected cut was judged: nothing is claimed.",
		Explained: "A trial: a PostgreSQL under load is cut, the image is restored and checked. In mode freeze all filesystems are held frozen while their volumes are snapshotted; in mode none the volumes are snapshotted one after the other and nothing is held, as a careless script does; in mode bracketed each filesystem is cut at an instant of its own, in backup mode. \"1s apart\" is the time between one volume, or filesystem, and the next. After crash recovery the server had the image alone, after archive recovery also WAL: what was kept with a bracketed cut, or what production shipped until shortly after any other."}
	for _, c := range Classes() {
		d.Classes = append(d.Classes, report.Class{Key: string(c), Words: c.Words()})
	}
	protected, damaged, torn, tornDamaged := 0, 0, 0, 0
	cuts := map[Cell]bool{} // whose stalls are there
	for _, c := range s.Cells {
		ground := c.Ground()
		cell := report.Cell{Ground: ground, Name: strings.TrimSuffix(c.Conditions(), ", "+ground), Cut: strings.TrimSuffix(c.cut().Conditions(), ", "+ground), Said: strings.Replace(c.Said, " under these conditions ("+ground+")", "", 1)}
		for _, class := range Classes() {
			cell.Counts = append(cell.Counts, c.Count(class))
		}
		for _, t := range trials {
			if t.Cell == c.Cell && t.Class != "" && !cuts[c.cut()] {
				cell.Stalls = append(cell.Stalls, time.Duration(t.StallMS*float64(time.Millisecond)))
			}
		}
		cuts[c.cut()] = cuts[c.cut()] || len(cell.Stalls) > 0
		d.Cells = append(d.Cells, cell)
		if c.Protected() {
			protected, damaged = protected+c.Trials, damaged+c.Damaged
		} else {
			torn, tornDamaged = torn+c.Trials, tornDamaged+c.Damaged
		}
	}
	for _, c := range s.Checks {
		d.Checks = append(d.Checks, report.CheckRow{Name: c.Check, Caught: c.Caught, Missed: c.Missed, SoundPassed: c.OnSound})
	}
	if protected > 0 {
		held := damaged == 0
		d.Held, d.Word = &held, map[bool]string{true: "Every protected cut was sound", false: "A protected cut was damaged"}[held]
		d.Text = fmt.Sprintf("Damaged: %d of %d trials of protected cuts, and %d of %d of cuts that nothing protected.", damaged, protected, tornDamaged, torn)
	}
	return d
}

func throughput(r ProductionRun) report.Series {
	out := report.Series{Name: "Commits in the production run with most cuts (" + r.Ground.Ground() + ")", Unit: "commits/s"}
	for _, p := range r.Throughput[:max(0, len(r.Throughput)-1)] { // the last may be of less than a second
		out.Points = append(out.Points, report.Point{T: p.At, V: float64(p.Count)})
	}
	return out
}

// cutMarks marks the run's cuts, from the first thing done to production to the
// last.
func cutMarks(r ProductionRun, trials []Trial) []report.Mark {
	var out []report.Mark
	marked := map[backup.ID]int{}
	for _, t := range trials {
		if t.Run != r.ID || len(t.Members) == 0 {
			continue
		}
		class := cmp.Or(string(t.Class), "not judged")
		if i, another := marked[t.Backup]; another { // the same cut, recovered in the other way
			out[i].Name += fmt.Sprintf(", %s (%s)", class, t.Recovery)
			continue
		}
		marked[t.Backup] = len(out)
		m := report.Mark{Name: fmt.Sprintf("%s, %s: %s (%s)", t.Mode, t.Skew(), class, t.Recovery)}
		m.From, m.To = t.Members[0].Requested, t.Members[0].Responded
		for _, s := range t.Members {
			m.From, m.To = earlier(m.From, s.Requested), later(m.To, s.Responded)
		}
		for _, f := range t.Cut.Frozen {
			m.From, m.To = earlier(m.From, f.Called), later(m.To, f.Thawed)
		}
		out = append(out, m)
	}
	return out
}

// cutBars draws the last cut that was held, else the last one.
func cutBars(trials []Trial) (which string, bars []report.Bar) {
	var t *Trial
	for i := range trials {
		if len(trials[i].Members) > 0 && (t == nil || len(trials[i].Cut.Frozen) > 0 || len(t.Cut.Frozen) == 0) {
			t = &trials[i]
		}
	}
	if t == nil {
		return "", nil
	}
	var snapshots []report.Snapshot
	for _, m := range t.Members {
		snapshots = append(snapshots, report.Snapshot{Name: fmt.Sprintf("volume %d", m.Member), Requested: m.Requested, Responded: m.Responded})
	}
	return fmt.Sprintf("One cut, of %s: %s.", t.At.UTC().Format("2006-01-02 15:04 UTC"), t.cut().Conditions()), report.CutBars(t.Cut, snapshots)
}

func machineFacts(r ProductionRun, trials []Trial) []report.Fact {
	seeds := []int64{r.Seed}
	for _, t := range trials {
		seeds = append(seeds, t.Seed)
	}
	slices.Sort(seeds)
	return []report.Fact{{Name: "host", Value: r.Machine.Host}, {Name: "kernel", Value: r.Machine.Kernel}, {Name: "processors", Value: fmt.Sprint(r.Machine.Processors)},
		{Name: "PostgreSQL", Value: r.Machine.PostgreSQL}, {Name: "cleancut", Value: r.Machine.Cleancut},
		{Name: "seeds of the trials", Value: strings.Trim(fmt.Sprint(slices.Compact(seeds)), "[]")}}
}
