package report_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/report"
)

const hostile = `</script><b>bold</b><script>document.title="pwned"</script>"'<!--` + "\u2028`${1}"

func written(t *testing.T, p report.Page) string {
	t.Helper()
	var out bytes.Buffer
	if err := p.Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func start() time.Time { return time.Date(2026, 11, 22, 22, 3, 4, 250e6, time.UTC) }

func after(seconds float64) time.Time {
	return start().Add(time.Duration(seconds * float64(time.Second)))
}

// demo is a page as the demo writes it: three minutes of load, a cut at 1:10.
func demo() report.Page {
	words, transfers := report.Series{Name: "Single-row inserts", Unit: "rows/s"}, report.Series{Name: "Transfers", Unit: "transactions/s"}
	for i := range 180 {
		wave := math.Sin(float64(i)/9) * 180
		w, x := 3900+wave+float64(i*7919%400)-200, 310+wave/12+float64(i*104729%40)
		switch {
		case i == 70:
			w, x = w*0.93, x*0.9
		case i == 118:
			w, x = 0, 0
		case i > 140 && i < 147:
			continue
		}
		words.Points = append(words.Points, report.Point{T: after(float64(i)), V: math.Round(w)})
		transfers.Points = append(transfers.Points, report.Point{T: after(float64(i) + 0.4), V: math.Round(x)})
	}
	return report.Page{
		Title: "cleancut demo", Subtitle: "PostgreSQL 17.2, four volumes, md RAID 0, XFS, 22 November 2026", OK: true,
		Said: []string{
			"Proven: the copy holds every one of the 271,334 rows that production had acknowledged before the cut, and none that was never sent.",
			"Proven: production was frozen for 41.6 ms; the longest stall of single-row inserts was 58 ms.",
			"Proven: indexes, page checksums and a full dump of the copy are sound.",
			"Not proven: what happens when a volume's host loses power; this run did not try it.",
		},
		Throughput: []report.Series{words, transfers},
		Marks: []report.Mark{
			{From: after(66), To: after(78), Name: "backup"},
			{From: after(70.35), To: after(70.3916), Name: "freeze"},
			{From: after(64), Name: "marker 1"},
			{From: after(68.5), Name: "marker 2"},
			{From: after(82), Name: "marker 3"},
			{From: after(95), To: after(131), Name: "restore and verify"},
			{From: after(133), To: after(160), Name: "dump"},
		},
		StallsSaid: "A dot is a second.", Stalls: []report.Stalls{{Name: "each second", Lengths: []time.Duration{4e6, 9e6, 31e6}}, {Name: "the cut", Lengths: []time.Duration{58e6}}},
		Cut: "The cut of step 4.", Gantt: cut(), Steps: steps(), Machine: []report.Fact{
			{Name: "Kernel", Value: "Linux 6.1.0-32-amd64 x86_64"}, {Name: "Processors", Value: "2"}, {Name: "Memory", Value: "7.8 GiB"},
			{Name: "Volumes", Value: "4 × 1 GiB, files on XFS with reflinks"}, {Name: "Catalog", Value: "file:///var/lib/cleancut/catalog/with/a/very/long/path/that/has/no/space"},
		},
	}
}

func cut() []report.Bar {
	ms := func(v float64) time.Time { return after(70.3 + v/1000) }
	var snapshots []report.Snapshot
	for i := range 4 {
		snapshots = append(snapshots, report.Snapshot{Name: fmt.Sprintf("volume %d", i), Requested: ms(442.3 + float64(i)*0.4), Responded: ms(468 + float64(i)*1.7)})
	}
	return report.CutBars(backup.Cut{SyncRounds: []float64{412.7, 18.5}, Frozen: []backup.Frozen{{Mountpoint: "/mnt/pg", Called: ms(431.5), Held: ms(441.8), Thawed: ms(473.7)}}}, snapshots)
}

func steps() []report.Step {
	out := []report.Step{
		{Name: "Make 4 volumes of equal size and attach them", Seconds: 0.412, Facts: []report.Fact{
			{"Devices", "/dev/loop4 /dev/loop5 /dev/loop6 /dev/loop7"}, {"Size", "4 × 1 GiB"},
		}},
		{Name: "Stripe them, make a file system, mount it", Seconds: 2.81, Facts: []report.Fact{
			{"Array", "clean, 4 members, 256 KiB chunks"},
			{"Mount options", "rw,noatime,attr2,inode64,logbufs=8,logbsize=32k,sunit=512,swidth=2048,noquota"},
		}},
		{Name: "Load a play database", Seconds: 74.2, Facts: []report.Fact{{"Rows", "1,200,000"}, {"Size", "412 MB"}}},
		{Name: "The cut: all volumes at once", Seconds: 0.474, Facts: []report.Fact{
			{"Frozen", "41.6 ms"}, {"Spread of the requests", "1.2 ms"}, {"Cut achieved", "atomic"},
		}},
		{Name: "Compare the copy with what production promised", Seconds: 3.2, Facts: []report.Fact{
			{"Acknowledged before the cut", "271,334"}, {"Found", "271,341"}, {"Missing", "0"},
		}},
		{Name: "Remove everything", Seconds: 1.9},
	}
	for i := range out {
		out[i].N, out[i].OK = i+1, true
	}
	return out
}

// everywhere puts s into each text of a page.
func everywhere(s string) report.Page {
	facts := []report.Fact{{Name: s, Value: s}}
	return report.Page{
		Title: s, Subtitle: s, Said: []string{s}, Machine: facts, Steps: []report.Step{{N: 1, Name: s, Facts: facts, Error: s}},
		Throughput: []report.Series{{Name: s, Unit: s, Points: []report.Point{{start(), 1}, {after(1), 2}}}},
		Marks:      []report.Mark{{From: start(), To: after(1), Name: s}},
		StallsSaid: s, Stalls: []report.Stalls{{s, s, []time.Duration{1}}}, Cut: s,
		Gantt: []report.Bar{{Lane: s, Name: s + "x", From: start(), To: after(1)}},
	}
}

// experiment is everywhere with a drill in place of the steps.
func experiment(s string) report.Page {
	p := everywhere(s)
	p.Steps = nil
	p.Drill = &report.Drill{Word: s, Text: s, Explained: s, Classes: []report.Class{{Key: s, Words: s}}, Checks: []report.CheckRow{{Name: s}},
		Cells: []report.Cell{{Ground: s, Name: s, Said: s, Counts: []int{1}, Stalls: []time.Duration{time.Second}}}}
	return p
}

var page = flag.String("page", "", "write the realistic page to this file, to be looked at")

func TestARealisticPageShowsAllOfTheRun(t *testing.T) {
	got := written(t, demo())
	if *page != "" {
		if err := os.WriteFile(*page, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{
		"Passed", "6 of 6 steps passed.", "A dot is a second.", "median 9 ms, longest 31 ms, of 3", "from 2026-11-22 22:03:04 UTC", "<strong>freeze</strong> at 1:10.35, for 41.6 ms", "<strong>marker 1</strong> at 1:04<",
		"<strong>dump</strong> at 2:13, for 27.0 s", "Plot of Single-row inserts, rows/s over time: 174 values, lowest 0", "without data: 2:21 to 2:27.",
		"round 1, 0–413 ms: 413 ms", "round 2, 413–431 ms: 18.5 ms", "freeze pg", "freezing, 431–442 ms: 10.3 ms", "ms: 31.9 ms", "thawed, at 473 ms", "volume 3", "A closer look, without the lane &#34;syncfs&#34;", "Spread of the requests", "1 min 14 s", "41.6 ms", "Linux 6.1.0-32-amd64",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if again := written(t, demo()); again != got {
		t.Error("the same page gave other bytes")
	}
}

func TestHostileNamesStayText(t *testing.T) {
	for _, p := range []report.Page{everywhere(hostile), experiment(hostile)} {
		staysText(t, written(t, p))
	}
}

func staysText(t *testing.T, got string) {
	t.Helper()
	if n := strings.Count(strings.ToLower(got), "</script"); n != 2 {
		t.Errorf("got %d ends of a script, want 2", n)
	}
	for _, bad := range []string{"<b>", "<!--", "<script>document"} {
		if strings.Contains(got, bad) {
			t.Errorf("the page holds %q", bad)
		}
	}
	var data struct {
		Plots []struct{ Name, Unit string }
		Marks []struct{ Name string }
	}
	text := regexp.MustCompile(`(?s)<script type="application/json" id="data">(.*?)</script>`).FindStringSubmatch(got)
	if text == nil {
		t.Fatal("no data in the page")
	}
	if err := json.Unmarshal([]byte(text[1]), &data); err != nil {
		t.Fatal(err)
	}
	if data.Plots[0].Name != hostile || data.Plots[0].Unit != hostile || data.Marks[0].Name != hostile {
		t.Errorf("the data came out changed: %+v", data)
	}
}

func TestTextThatIsNotUTF8IsMended(t *testing.T) {
	got := written(t, everywhere("a\xffb"))
	if strings.Contains(got, "\xff") || !strings.Contains(got, "a\uFFFDb") {
		t.Error("the page is not UTF-8 with replacement characters")
	}
}

func TestNothingIsFetched(t *testing.T) {
	got := written(t, demo())
	for _, pattern := range []string{
		`(?i)(src|href|action|data|poster|srcset)\s*=\s*["']?\s*(https?:)?//`,
		`(?i)url\(`, `(?i)@import`, `(?i)<(link|img|iframe|object|embed|base)\b`,
		`\bfetch\(|XMLHttpRequest|WebSocket|importScripts|sendBeacon`,
	} {
		if m := regexp.MustCompile(pattern).FindString(got); m != "" {
			t.Errorf("the page may fetch something: %q", m)
		}
	}
	if !strings.Contains(got, `content="default-src 'none'; script-src 'sha256-`) {
		t.Error("the page has no content security policy")
	}
	if !strings.Contains(got, "Copyright (c) 2022 Leon Sorokin") {
		t.Error("the licence of uPlot is not in the page")
	}
}

func TestAPageWithoutDataSaysSo(t *testing.T) {
	for name, p := range map[string]report.Page{
		"an empty page":  {OK: true},
		"an empty array": {OK: true, Throughput: []report.Series{{Name: "inserts"}}},
		"only what is not a number": {OK: true,
			Throughput: []report.Series{{Name: "inserts", Points: []report.Point{{start(), math.NaN()}, {after(1), math.Inf(1)}, {time.Time{}, 1}}}},
			Marks:      []report.Mark{{Name: "backup"}}, Gantt: []report.Bar{{Lane: "thaw"}}},
	} {
		t.Run(name, func(t *testing.T) {
			got := written(t, p)
			for _, want := range []string{"No data", "No step was recorded, so nothing is proven.", "no step was recorded", "nothing is known about the machine"} {
				if !strings.Contains(got, want) {
					t.Errorf("the page does not say %q", want)
				}
			}
			for _, bad := range []string{"NaN", "Inf", "0001-01-01", `class="canvas"`, "<strong>Passed"} {
				if body, _, _ := strings.Cut(got[strings.Index(got, "<body>"):], "<script>"); strings.Contains(body, bad) {
					t.Errorf("the page says %q", bad)
				}
			}
		})
	}
}

func TestTheVerdictNeverSaysMoreThanTheSteps(t *testing.T) {
	good, bad := report.Step{N: 1, Name: "one", OK: true}, report.Step{N: 2, Name: "two", Error: "no space\nleft"}
	for _, c := range []struct {
		name string
		page report.Page
		want string
	}{
		{"all steps passed", report.Page{OK: true, Steps: []report.Step{good}}, "ok:1 of 1 steps passed."},
		{"a failed step makes a failed run", report.Page{OK: true, Steps: []report.Step{good, bad}}, "bad:Step 2 failed: two. 1 of 2 steps passed."},
		{"a run can fail though no step did", report.Page{Steps: []report.Step{good}}, "bad:1 of 1 steps passed. The run as a whole did not pass."},
		{"no step proves nothing", report.Page{OK: true}, "none:No step was recorded, so nothing is proven."},
		{"no step and not passed", report.Page{}, "bad:No step was recorded."},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := regexp.MustCompile(`(?s)<section class="verdict (\w+)".*?</h2>\s*<p>(.*?)</p>`).FindStringSubmatch(written(t, c.page))
			if m == nil {
				t.Fatal("no verdict in the page")
			}
			if got := m[1] + ":" + m[2]; got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestGapsAreFoundAndZerosAreNot(t *testing.T) {
	p := report.Page{Throughput: []report.Series{{Name: "inserts", Points: []report.Point{
		{after(4), 5}, {after(0), 7}, {after(1), 0}, {after(2), 6}, {after(8), 1}, {after(9), 2}, // not in order, nothing at 3, 5, 6 and 7
	}}}}
	got := written(t, p)
	if want := `"step":1,"t":[0,1,2,4,8,9],"v":[7,0,6,5,1,2],"gaps":[[3,4],[5,8]]`; !strings.Contains(got, want) {
		t.Errorf("the data does not hold %s", want)
	}
	if want := "6 values, lowest 0, median 5, highest 7, 1 of them zero; without data: 0:03 to 0:04, 0:05 to 0:08."; !strings.Contains(got, want) {
		t.Errorf("the page does not say %q", want)
	}
}

func TestBarsStandWhereTheyWere(t *testing.T) {
	p := report.Page{Gantt: []report.Bar{
		{Lane: "a", From: after(0), To: after(0.1)}, {Lane: "b", Name: "b", From: after(0.05), To: after(0.2)},
		{Lane: "a", Name: "late", From: after(0.15), To: after(0.12)}, {Lane: "c"},
	}}
	got := written(t, p)
	for _, want := range []string{
		`<rect class="phase0" x="0%" y="4" width="50%" height="16"/>`, `<rect class="phase0" x="25%" y="4" width="75%" height="16"/>`, `<rect class="phase0" x="75%" y="4" width="0%" height="16"/>`,
		"<span>0–100 ms: 100 ms</span>", "<span>late, at 150 ms</span>", "<span>50.0–200 ms: 150 ms</span>", "<span>not measured</span>", ">200 ms</text>",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the page does not hold %q", want)
		}
	}
	if n := strings.Count(got, `<span class="lane">`); n != 3 {
		t.Errorf("got %d lanes, want 3", n)
	}
}

type full struct{ calls int }

var errFull = errors.New("no space left on device")

func (f *full) Write([]byte) (int, error) { f.calls++; return 0, errFull }

func TestAWriteErrorIsReturned(t *testing.T) {
	w := &full{}
	if err := demo().Write(w); !errors.Is(err, errFull) || w.calls != 1 {
		t.Errorf("got error %v after %d calls, want %v after 1", err, w.calls, errFull)
	}
}

func ExamplePage_Write() {
	start := time.Date(2026, 11, 22, 22, 3, 4, 0, time.UTC)
	p := report.Page{
		Title: "cleancut demo", OK: true, Said: []string{"Proven: the copy starts."},
		Steps:      []report.Step{{N: 1, Name: "Start the copy", OK: true, Seconds: 1.25}},
		Throughput: []report.Series{{Name: "Inserts", Unit: "rows/s", Points: []report.Point{{T: start, V: 3900}, {T: start.Add(time.Second), V: 3871}}}},
		Marks:      []report.Mark{{Name: "freeze", From: start.Add(400 * time.Millisecond), To: start.Add(441 * time.Millisecond)}},
	}
	var file bytes.Buffer
	if err := p.Write(&file); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(regexp.MustCompile(`<title>.*</title>`).FindString(file.String()))
	// Output: <title>Passed: cleancut demo</title>
}
