package evidence_test

import (
	"encoding/xml"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/evidence"
)

func TestThePageIsWhatItsDataGive(t *testing.T) {
	d, err := evidence.Read("../../docs/evidence")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../docs/evidence.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := evidence.Page(d); string(got) != want {
		t.Errorf("docs/evidence.md is not what docs/evidence gives: run `make evidence`")
	}
	for _, m := range d.Impacts {
		if got, err = os.ReadFile("../../docs/" + m.ChartFile()); err != nil {
			t.Fatal(err)
		}
		if string(got) != evidence.Chart(m) {
			t.Errorf("docs/%s is not what docs/evidence gives: run `make evidence`", m.ChartFile())
		}
	}
}

func at(seconds float64) time.Time {
	return time.Unix(1000, 0).Add(evidence.Seconds(seconds).Duration())
}

func TestPgbenchsLogIsReadAndALineCutShortIsNot(t *testing.T) {
	got, err := evidence.Transactions(strings.NewReader("0 1 500000 0 1000 0\n1 1 2000000 0 1003 250000\nprogress: x\n0 2 1000 0 10"))
	if err != nil {
		t.Fatal(err)
	}
	want := []evidence.Transaction{{From: at(-0.5), To: at(0)}, {From: at(1.25), To: at(3.25)}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func FuzzTransactions(f *testing.F) {
	f.Add("0 1 500000 0 1000 0\n")
	f.Add("0 1 -9223372036854775808 0 9223372036854775807 -1\n1 1 1 0 1 1")
	f.Fuzz(func(t *testing.T, log string) {
		got, err := evidence.Transactions(strings.NewReader(log))
		if lines := strings.Count(log, "\n") + 1; len(got) > lines {
			t.Errorf("%d transactions of %d lines, %v", len(got), lines, err)
		}
	})
}

func TestAWindowCountsWhatEndedInIt(t *testing.T) {
	var all []evidence.Transaction
	for i := range 100 { // ten a second from 0 to 10, each of 50 ms
		end := float64(i) / 10
		all = append(all, evidence.Transaction{From: at(end - 0.05), To: at(end)})
	}
	all = slices.DeleteFunc(all, func(x evidence.Transaction) bool { return !x.To.Before(at(4)) && x.To.Before(at(4.8)) })
	all = append(all, evidence.Transaction{From: at(3.95), To: at(7.75)}) // of the session that stood still
	w := evidence.Look(all, at(2), at(5.5))
	if got, want := w.PerSecond, []int{10, 10, 2}; !slices.Equal(got, want) {
		t.Errorf("per second: got %v, want %v", got, want)
	}
	if w.Transactions != 27 || w.Seconds != 3.5 {
		t.Errorf("got %d transactions in %v s, want 27 in 3.5", w.Transactions, w.Seconds)
	}
	if w.P99MS != 50 || w.LongestMS != 3800 {
		t.Errorf("got p99 %v and longest %v ms, want 50 and 3800", w.P99MS, w.LongestMS)
	}
	if got := w.Worst(10); got != 0.2 {
		t.Errorf("worst second: got %v, want 0.2", got)
	}
	if got := w.Below(0.8, 10); got != 1 {
		t.Errorf("seconds below: got %d, want 1", got)
	}
	empty := evidence.Look(nil, at(0), at(2))
	if empty.Worst(10) != 0 || empty.Below(0.8, 10) != 2 || empty.P99MS != 0 {
		t.Errorf("a window in which nothing ended: got %+v", empty)
	}
}

func TestQuantilesAreValuesThatWereMeasured(t *testing.T) {
	var f []float64
	for i := range 40 {
		f = append(f, float64(40-i))
	}
	for _, c := range []struct{ q, want float64 }{{0, 1}, {0.5, 20}, {0.95, 38}, {1, 40}} {
		if got := evidence.Quantile(f, c.q); got != c.want {
			t.Errorf("quantile %v of 1 to 40: got %v, want %v", c.q, got, c.want)
		}
	}
	if got := evidence.Quantile(nil, 0.5); !math.IsNaN(got) {
		t.Errorf("quantile of nothing: got %v, want NaN", got)
	}
}

// steady is a window of ten seconds with so many transactions in each.
func steady(perSecond ...int) evidence.Window {
	w := evidence.Window{Seconds: float64(len(perSecond)), PerSecond: perSecond}
	for _, n := range perSecond {
		w.Transactions += n
	}
	return w
}

func measurement(with ...evidence.Window) evidence.Data {
	m := evidence.Measurement{Start: evidence.Start{Tools: []evidence.Tool{{Key: "cleancut-freeze", Name: "cleancut, freeze"}, {Key: "pg_dumpall", Name: "pg_dumpall"}, {Key: "barman", Name: "Barman", Missing: "barman is not installed here"}}}}
	for i, w := range with {
		m.Pairs = append(m.Pairs, evidence.Pair{Repeat: i + 1, Tool: "cleancut-freeze", Alone: steady(100, 100, 70, 130), With: w, Seconds: 1.5})
	}
	m.Pairs = append(m.Pairs, evidence.Pair{Repeat: 1, Tool: "pg_dumpall", Alone: steady(100, 100), With: steady(40, 60), Seconds: 2})
	return evidence.Data{Impacts: []evidence.Measurement{m}}
}

func TestThePageSaysWhetherTheTargetWasReached(t *testing.T) {
	for _, c := range []struct {
		name string
		data evidence.Data
		want []string
	}{
		{"both parts", measurement(steady(100, 99, 98, 97), steady(100, 100, 100, 100), steady(100, 100, 100, 100)),
			[]string{"\nReached. pg_dumpall keeps 0.500 in the same run.", "Of the seconds in which cleancut itself ran 0 of 6 (0.0 %) were below 0.8, of those after its end 0 of 6 (0.0 %); of the seconds of production alone 3 of 14 (21.4 %)."}},
		{"one second of one repeat is too low", measurement(steady(100, 100, 100, 100), steady(100, 100, 79, 121)),
			[]string{"**Not reached**: the worst second is 0.79, 0.01 too little.", "of those after its end 1 of 4 (25.0 %)"}},
		{"the median is too low", measurement(steady(90, 90, 90, 90), steady(91, 91, 91, 91), steady(100, 100, 100, 100)), []string{"**Not reached**: the throughput kept is 0.910, 0.070 too little."}},
		{"both parts are missed", measurement(steady(0, 90, 100, 100)), []string{"the throughput kept is 0.725, 0.255 too little; the worst second is 0.00, 0.80 too little."}},
		{"cleancut is missing", measurement(), []string{"nothing is claimed", "| cleancut, freeze | not measured |"}},
		{"a tool is missing", measurement(), []string{"| Barman | barman is not installed here |"}},
		{"nothing was measured", evidence.Data{}, []string{"was not measured yet", "No drill was run"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := evidence.Page(c.data)
			for _, want := range c.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in:\n%s", want, got)
				}
			}
			if strings.Contains(got, "NaN") || strings.Contains(got, "%!") {
				t.Errorf("not a figure in:\n%s", got)
			}
		})
	}
}

func TestTheChartShowsThePairWithTheMedianOfEachToolAndIsXML(t *testing.T) {
	d := measurement(steady(10, 10), steady(95, 97), steady(200, 300))
	d.Impacts[0].Tools[0].Name = "a <b> & c"
	got := evidence.Chart(d.Impacts[0])
	if err := xml.Unmarshal([]byte(got), new(struct{})); err != nil {
		t.Errorf("%v in:\n%s", err, got)
	}
	for _, want := range []string{">kept 0.96<", ">kept 0.50<", "a &lt;b&gt; &amp; c"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if n := strings.Count(got, "<polyline"); n != 4 {
		t.Errorf("%d lines, want two of each of two tools", n)
	}
	if got := evidence.Chart(evidence.Measurement{}); got != "" {
		t.Errorf("nothing was measured, and the chart is %q", got)
	}
}

func TestSizesAreComparedLargestWithSmallest(t *testing.T) {
	d := measurement()
	d.Impacts[0].Conditions.Sizes = []backup.Bytes{1}
	d.Impacts[0].Sizes = []evidence.Size{
		{Database: 4 << 30, Backups: []float64{0.6, 0.5, 0.7}, Restores: []float64{3}},
		{Database: 1 << 30, Backups: []float64{0.5, 0.5, 0.5}, Restores: []float64{2}},
		{Database: 4 << 30, Aged: true, Backups: []float64{9}, Restores: []float64{9}},
	}
	got := evidence.Page(d)
	for _, want := range []string{"| 4.00 GiB | fresh | 0 | 0.60 (0.50 to 0.70) | – | 3.00 |", "Fresh volumes: 4.0 times the database takes 1.20 times as long to back up, and 1.50 times as long"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "Aged volumes:") {
		t.Errorf("one aged size was compared:\n%s", got)
	}
}

func TestADiaryGoesOnWhereItStopped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "part.jsonl")
	start := evidence.Start{Conditions: evidence.Conditions{Scale: 1, Sizes: []backup.Bytes{1}}, Tools: []evidence.Tool{{Key: "a"}}}
	d, err := evidence.OpenDiary(path, start)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.AddPair(evidence.Pair{Repeat: 2, Tool: "a"}), d.AddSize(evidence.Size{Want: 1, Aged: true})); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(`{"pair":{"repeat":3,"to`) // a crash
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if d, err = evidence.OpenDiary(path, start); err != nil {
		t.Fatal(err)
	}
	if !d.HasPair(2, "a") || d.HasPair(3, "a") || d.HasPair(2, "b") || !d.HasSize(1, true) || d.HasSize(1, false) {
		t.Errorf("the diary holds %+v", d.Measurement)
	}
	start.Conditions.Scale = 2
	if _, err := evidence.OpenDiary(path, start); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("other conditions: got %v, want ErrUsage", err)
	}
	out := evidence.ImpactFile(filepath.Dir(path), "x")
	if err := d.Finish(out); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the diary of a finished measurement is still there: %v", err)
	}
	data, err := evidence.Read(filepath.Dir(path))
	if err != nil || len(data.Impacts) != 1 || len(data.Impacts[0].Pairs) != 1 || data.Impacts[0].Name != "x" {
		t.Errorf("read again: %+v, %v", data.Impacts, err)
	}
}

func TestHeldCutsOfAllFilesAreAddedUp(t *testing.T) {
	dir := t.TempDir()
	trial := func(mode, skew, n string) string {
		return `{"where":"native","layout":"separate","volumes":4,"fs":"xfs","load":"heavy","mode":"` + mode + `","skew_ms":` + skew + `,"seed":1,"n":` + n + `,"at":"2026-11-23T01:02:03Z","class":"` + map[string]string{"freeze": "sound", "none": "lost"}[mode] + `"}`
	}
	write := func(name string, trials ...string) {
		t.Helper()
		text := `{"cells":[],"trials":[` + strings.Join(trials, ",") + `],"runs":[{"machine":{"processors":2}}]}`
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("drill-one.json", trial("freeze", "0", "1"), trial("freeze", "0", "2"), trial("none", "0", "1"))
	write("drill-two.json", trial("freeze", "0", "1"), trial("freeze", "100", "1"))
	d, err := evidence.Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := evidence.Page(d)
	for _, want := range []string{"### one\n", "### two\n", "| separate of 4, xfs, native, crash recovery | 4 | 0 | 75 % |", "1 of 1 cut (none, with all members at once) was damaged", "| none, all at once, crash recovery, separate of 4, xfs, heavy load, native | 1 | 0 | 0 | 0 | 1 |"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if err := d.Drills[0].Keep(dir, "three"); err != nil {
		t.Fatal(err)
	}
	kept, err := evidence.ReadDrill(filepath.Join(dir, "drill-three.json"))
	if err != nil || len(kept.Trials) != 3 || kept.Name != "three" || kept.Trials[2] != d.Drills[0].Trials[2] {
		t.Errorf("kept and read again: %+v, %v", kept, err)
	}
}
