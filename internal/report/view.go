package report

import (
	"cmp"
	"fmt"
	"html/template"
)

// view is a Page with everything decided: what the template and page.js show
// as it is.
type view struct {
	Page
	Script  template.JS
	Digest  string
	Style   template.CSS
	Verdict verdict
	Steps   []stepView
	Origin  string // the wall clock time of 0:00
	Plots   []plot
	Marks   []markView
	Charts  []chart
	Stalls  *stallsView
	Drill   *drillView
	Data    drawing
}

type verdict struct {
	Class, Sign, Word, Text string
}

type stepView struct {
	Step
	Time string
}

// drawing is what page.js reads. Times are seconds after the origin.
type drawing struct {
	End   float64    `json:"end"`
	Plots []plot     `json:"plots"`
	Marks []markView `json:"marks"`
}

func (p Page) view() *view {
	v := &view{Page: p, Verdict: p.verdict(), Charts: charts(p.Gantt), Stalls: p.stalls(), Drill: p.Drill.view()}
	v.Title = cmp.Or(p.Title, "cleancut")
	for _, s := range p.Steps {
		v.Steps = append(v.Steps, stepView{Step: s, Time: seconds(s.Seconds)})
	}
	from, to := span(p.Throughput, p.Marks)
	if !from.IsZero() {
		v.Origin = from.UTC().Format("2006-01-02 15:04:05") + " UTC"
	}
	v.Plots = plots(p.Throughput, from)
	v.Marks = marks(p.Marks, from)
	v.Data = drawing{End: round(to.Sub(from).Seconds()), Plots: []plot{}, Marks: []markView{}}
	for _, q := range v.Plots {
		if len(q.T) > 0 {
			v.Data.Plots = append(v.Data.Plots, q)
			v.Data.End = max(v.Data.End, round(q.T[len(q.T)-1]+q.Step))
		}
	}
	for _, m := range v.Marks {
		if m.Known {
			v.Data.Marks = append(v.Data.Marks, m)
		}
	}
	return v
}

// verdict weighs what the run says about itself against its steps. A check
// that did not run is not a check that passed.
func (p Page) verdict() verdict {
	if p.Drill != nil {
		return p.Drill.verdict()
	}
	passed, first := 0, -1
	for i, s := range p.Steps {
		if s.OK {
			passed++
		} else if first < 0 {
			first = i
		}
	}
	counted := fmt.Sprintf("%d of %d steps passed.", passed, len(p.Steps))
	switch {
	case first >= 0:
		s := p.Steps[first]
		return verdict{"bad", "✗", "Failed", fmt.Sprintf("Step %d failed: %s. %s", s.N, s.Name, counted)}
	case !p.OK && len(p.Steps) > 0:
		return verdict{"bad", "✗", "Failed", counted + " The run as a whole did not pass."}
	case !p.OK:
		return verdict{"bad", "✗", "Failed", "No step was recorded."}
	case len(p.Steps) == 0:
		return verdict{"none", "?", "Nothing checked", "No step was recorded, so nothing is proven."}
	}
	return verdict{"ok", "✓", "Passed", counted}
}
