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
	Impact *Measurement // nil: not there
	Drills []Drill
}

// Read reads the data of a folder: impact.json and drill-*.json, each of which
// may be missing. A field that it does not know is an error.
func Read(dir string) (Data, error) {
	var d Data
	var m Measurement
	switch err := readStrictly(filepath.Join(dir, "impact.json"), &m); {
	case err == nil:
		d.Impact = &m
	case !errors.Is(err, os.ErrNotExist):
		return d, err
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

// Write writes evidence.md of a folder, and its chart, from the data in its
// evidence/.
func Write(docs string) error {
	d, err := Read(filepath.Join(docs, "evidence"))
	if err != nil {
		return err
	}
	if d.Impact != nil {
		if err := os.WriteFile(filepath.Join(docs, chartFile), []byte(Chart(*d.Impact)), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(docs, "evidence.md"), []byte(Page(d)), 0o644)
}

// chartFile is the chart's path, from the page.
const chartFile = "evidence/throughput.svg"

// Page is the page. The same data gives the same page.
func Page(d Data) string {
	p := &page{}
	p.line("# Evidence")
	p.line("")
	p.line("Written by a program from the data in `docs/evidence/`; a test compares the two. `make bench-impact` (root, about an hour) measures what backups cost and writes the page,")
	p.line("`make evidence` only writes it. Only figures of one run may be compared. Where there are several measurements of a thing its median stands first, then the lowest and the highest.")
	p.line("")
	if d.Impact == nil {
		p.line("What a backup costs production was not measured yet.")
	} else {
		p.impact(*d.Impact)
		p.sizes(*d.Impact)
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
	out := fmt.Sprintf(format, Quantile(values, 0.5))
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
