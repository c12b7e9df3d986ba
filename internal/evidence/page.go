package evidence

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"cleancut/internal/backup"
)

// Data is all that the page tells.
type Data struct {
	Impacts []Measurement
	Drills  []Drill
}

// Read reads the data of a folder: impact.json, impact-NAME.json and
// drill-NAME.json, in order of their names. None need be there. A field of a
// measurement that it does not know is an error.
func Read(dir string) (Data, error) {
	var d Data
	impacts, err := filepath.Glob(filepath.Join(dir, "impact-*.json"))
	if err != nil {
		return d, err
	}
	for _, f := range append([]string{ImpactFile(dir, "")}, impacts...) {
		m := Measurement{Name: nameOf("impact", f)}
		err := readStrictly(f, &m)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return d, err
		}
		d.Impacts = append(d.Impacts, m)
	}
	files, err := filepath.Glob(filepath.Join(dir, "drill-*.json"))
	if err != nil {
		return d, err
	}
	for _, f := range files {
		drill, err := ReadDrill(f)
		if err != nil {
			return d, err
		}
		d.Drills = append(d.Drills, drill)
	}
	return d, nil
}

// ImpactFile is where a measurement of a name, which may be "", is kept in a
// folder of data.
func ImpactFile(dir, name string) string { return filepath.Join(dir, withName("impact", name)+".json") }

func withName(kind, name string) string {
	if name == "" {
		return kind
	}
	return kind + "-" + name
}

// nameOf is the part of a file's name after its kind.
func nameOf(kind, file string) string {
	return strings.TrimPrefix(strings.TrimPrefix(strings.TrimSuffix(filepath.Base(file), ".json"), kind), "-")
}

func readStrictly(file string, into any) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// Write writes evidence.md of a folder, and its charts, from the data in its
// evidence/.
func Write(docs string) error {
	d, err := Read(filepath.Join(docs, "evidence"))
	if err != nil {
		return err
	}
	for _, m := range d.Impacts {
		if err := os.WriteFile(filepath.Join(docs, m.ChartFile()), []byte(Chart(m)), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(docs, "evidence.md"), []byte(Page(d)), 0o644)
}

// ChartFile is the path of its chart, from the page.
func (m Measurement) ChartFile() string { return "evidence/" + withName("throughput", m.Name) + ".svg" }

// Page is the page. The same data gives the same page.
func Page(d Data) string {
	p := &page{}
	p.line("# Evidence")
	p.line("")
	p.line("Written by a program from the data in `docs/evidence/`; a test compares the two. `make bench-impact` (root, about an hour) measures what backups cost and writes the page,")
	p.line("`make evidence` only writes it. Only figures of one run may be compared. Where there are several measurements of a thing its median stands first, then the lowest and the highest.")
	p.line("")
	if len(d.Impacts) == 0 {
		p.line("What a backup costs production was not measured yet.")
		p.line("")
	}
	for _, m := range d.Impacts {
		p.impact(m)
		if len(m.Conditions.Sizes) > 0 {
			p.sizes(m)
		}
	}
	p.drills(d.Drills)
	return p.String()
}

// page is text that grows by lines.
type page struct{ strings.Builder }

func (p *page) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

// row is one of a table.
func (p *page) row(cells ...string) { p.line("| %s |", strings.Join(cells, " | ")) }

func (p *page) head(cells ...string) {
	p.row(cells...)
	p.row(strings.Split(strings.Repeat("---,", len(cells)-1)+"---", ",")...)
}

// spread is the median of some values, and, where they are several, the range.
func spread(format string, values []float64) string {
	if len(values) == 0 {
		return "–"
	}
	out := fmt.Sprintf(format, Median(values))
	if len(values) > 1 {
		out += " (" + fmt.Sprintf(format, Quantile(values, 0)) + " to " + fmt.Sprintf(format, Quantile(values, 1)) + ")"
	}
	return out
}

// each is a figure of each of some things.
func each[T any](things []T, figure func(T) float64) []float64 {
	var out []float64
	for _, t := range things {
		if v := figure(t); !math.IsNaN(v) {
			out = append(out, v)
		}
	}
	return out
}

// share is a part of a whole in words.
func share(part, whole int) string {
	if whole == 0 {
		return "–"
	}
	return fmt.Sprintf("%d of %d (%.1f %%)", part, whole, 100*float64(part)/float64(whole))
}

func megabytes(b backup.Bytes) float64 { return float64(b) / 1e6 }

func (p *page) machine(m Machine) {
	p.line("%s, %d processors (%s), %s of memory, Linux %s, %s, cleancut %s.", m.System, m.Processors, m.Processor, m.Memory, m.Kernel, m.PostgreSQL, m.Cleancut)
}
