package report

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"io"
	"time"
)

//go:embed page.html page.css page.js uplot/uPlot.iife.min.js uplot/uPlot.min.css uplot/LICENSE
var files embed.FS

// Point is one measurement: V holds from T until the next point of its
// series. A V that is not a number or infinite is a missing measurement.
type Point struct {
	T time.Time
	V float64
}

// Series is one measured quantity over time, drawn from zero in a plot of its
// own above a common time axis. Unit is that of V, such as "rows/s". Points
// may come in any order. Where two of them are more than one and a half times
// the series' usual distance apart, the plot shows a gap.
type Series struct {
	Name   string
	Unit   string
	Points []Point
}

// Mark is an interval of the run, shaded and named in every throughput plot,
// or an instant where To is not after From. A mark with a zero From is listed
// as not measured.
type Mark struct {
	From, To time.Time
	Name     string
}

// Bar is an interval of the cut, or an instant where To is not after From.
// Bars with the same Lane share a line of the Gantt chart; lanes stand in the
// order of their first bar in Page.Gantt. Name tells bars of one lane apart
// and may be empty; Phase gives its colour. A bar with a zero From is listed as
// not measured.
type Bar struct {
	Lane, Name string
	Phase      Phase
	From, To   time.Time
}

// Fact is a named value, written as it is.
type Fact struct {
	Name, Value string
}

// Step is one step of the story with its outcome. Error is shown where it is
// not empty, with its line breaks.
type Step struct {
	N       int
	Name    string
	OK      bool
	Seconds float64
	Facts   []Fact
	Error   string
}

// Stalls are how long commits stood still in one kind of situation, one dot a
// length. Those of one Ground stand under its name and should follow each other.
type Stalls struct {
	Ground, Name string
	Lengths      []time.Duration
}

// Page is all that a report shows. Said are the plain words about what was
// proven and what was not, a line each.
//
// OK is what the run says about itself. The page says "passed" only if OK is
// set, there is a step, and no step failed.
type Page struct {
	Title, Subtitle string
	OK              bool
	Said            []string
	Machine         []Fact
	Steps           []Step
	Throughput      []Series
	Marks           []Mark
	StallsSaid      string   // what a dot of Stalls is, a sentence
	Stalls          []Stalls // a drill's are those of its cells
	Cut             string   // a sentence: which cut Gantt shows
	Gantt           []Bar
	Drill           *Drill // of an experiment; nil: the page tells of steps
}

// Write writes the page to w as one HTML document in UTF-8, in one call and
// only if all of it could be made; otherwise nothing is written. The page
// holds no time of its own: the same Page gives the same bytes.
func (p Page) Write(w io.Writer) error {
	v := p.view()
	if err := v.load(); err != nil {
		return err
	}
	text, err := files.ReadFile("page.html")
	if err != nil {
		return fmt.Errorf("read the report's template: %w", err)
	}
	t, err := template.New("page").Parse(string(text))
	if err != nil {
		return fmt.Errorf("parse the report's template: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, v); err != nil {
		return fmt.Errorf("fill the report's template: %w", err)
	}
	if _, err := w.Write(bytes.ToValidUTF8(out.Bytes(), []byte("\uFFFD"))); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// load puts styles and script into the view. The policy names the script by
// its digest, so that no other one runs. The licence of uPlot asks to be part
// of every copy.
func (v *view) load() error {
	var text [5]string
	for i, name := range []string{"uplot/LICENSE", "uplot/uPlot.iife.min.js", "page.js", "uplot/uPlot.min.css", "page.css"} {
		b, err := files.ReadFile(name)
		if err != nil {
			return fmt.Errorf("read the report's own files: %w", err)
		}
		text[i] = string(b)
	}
	script := "/*\n" + text[0] + "*/\n" + text[1] + "\n" + text[2]
	digest := sha256.Sum256([]byte(script))
	v.Script = template.JS(script)
	v.Digest = "sha256-" + base64.StdEncoding.EncodeToString(digest[:])
	v.Style = template.CSS(text[3] + "\n" + text[4])
	return nil
}
