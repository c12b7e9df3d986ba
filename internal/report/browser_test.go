package report_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/report"
)

// harness loads the report into a frame of a chosen width and writes what it
// finds there into its own text: from inside the frame's document, which only
// this test's browser allows between files. It looks when the page says that
// each plot is drawn; the browser's clock is a virtual one, which stands still
// while anything is loaded or drawn, so a slow machine changes nothing.
const harness = `<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;display:block;width:%dpx;height:900px" src="report.html"></iframe><pre id="finding" hidden></pre>
<script>
const frame = document.querySelector("iframe");
const find = (d) => {
  const style = d.defaultView.getComputedStyle(d.documentElement);
  const all = (q, f) => [...d.querySelectorAll(q)].map(f);
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom].map(Math.round); };
  const tops = all("h2", (e) => [e.getBoundingClientRect().top, e.id]).sort((a, b) => a[0] - b[0]);
  return {
    plots: all(".canvas canvas", box), outcomes: all(".outcomes", box), lanes: all(".lanes", box), stalls: all(".stalls", box), checks: all(".checks", box),
    failed: all(".canvas:not([data-drawn])", (e) => e.textContent),
    names: all(".lanes .lane", (e) => e.textContent), order: tops.map((t) => t[1]),
    dots: all(".stalls circle", (e) => e.getBoundingClientRect().left),
    classes: all(".outcomes rect", (e) => e.getBoundingClientRect().width + " " + e.getAttribute("class")),
    steps: d.querySelectorAll(".steps tbody tr").length, bold: d.querySelectorAll("b").length, title: d.title,
    colors: Object.fromEntries([...d.styleSheets].flatMap((s) => [...s.cssRules]).filter((r) => r.selectorText === ":root")
      .flatMap((r) => [...r.style]).map((n) => [n.slice(2), style.getPropertyValue(n).trim()])),
    scroll: d.documentElement.scrollWidth, width: d.documentElement.clientWidth, height: d.documentElement.scrollHeight,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
  };
};
const look = () => {
  const d = frame.contentDocument;
  if (d.fonts.status !== "loaded" || [...d.querySelectorAll(".canvas")].some((e) => !("drawn" in e.dataset) && !e.textContent)) return setTimeout(look, 20);
  frame.style.height = d.documentElement.scrollHeight + "px";
  document.getElementById("finding").textContent = JSON.stringify(find(d));
};
frame.onload = look;
</script>`

type finding struct {
	Plots, Outcomes, Lanes, Stalls, Checks [][4]int // boxes: left, top, right, bottom
	Failed, Names, Order, Classes, Fetched []string
	Dots                                   []float64 // from the left
	Colors                                 map[string]string
	Steps, Bold, Scroll, Width, Height     int
	Title                                  string
	picture                                *image.RGBA
}

// browser runs headless Chromium to its end and returns what it prints.
func browser(t *testing.T, scheme string, args ...string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a browser")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	flags := []string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1", "--virtual-time-budget=60000",
		"--blink-settings=preferredColorScheme=" + map[string]string{"light": "1", "dark": "0"}[scheme], "--user-data-dir=" + t.TempDir(),
	}
	command := exec.CommandContext(ctx, cmp.Or(os.Getenv("CLEANCUT_BROWSER"), "chromium"), append(flags, args...)...)
	command.WaitDelay = 5 * time.Second
	out, err := command.Output()
	if err != nil {
		t.Fatalf("run %s (apt-get install -y --no-install-recommends chromium, or set CLEANCUT_BROWSER): %v", command.Path, err)
	}
	return string(out)
}

// look has a browser show the page in that width and scheme, light or dark, and
// returns what is there and its picture.
func look(t *testing.T, page string, width int, scheme string) finding {
	t.Helper()
	folder := t.TempDir()
	shot := filepath.Join(folder, "shot.png")
	for name, text := range map[string]string{"report.html": page, "harness.html": fmt.Sprintf(harness, width)} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	wide := max(width, 500) // the browser makes no narrower window
	dom := browser(t, scheme, "--allow-file-access-from-files", fmt.Sprintf("--window-size=%d,%d", wide, min(9e6/wide, 15000)), "--dump-dom", "--screenshot="+shot, "file://"+folder+"/harness.html")
	m := regexp.MustCompile(`(?s)<pre id="finding"[^>]*>(.+?)</pre>`).FindStringSubmatch(dom)
	if m == nil {
		t.Fatalf("the page was never ready; the browser has: %s", dom)
	}
	var f finding
	if err := json.Unmarshal([]byte(html.UnescapeString(m[1])), &f); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(shot)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	picture, err := png.Decode(file)
	if err != nil {
		t.Fatal(err)
	}
	f.picture = image.NewRGBA(picture.Bounds())
	draw.Draw(f.picture, picture.Bounds(), picture, image.Point{}, draw.Src)
	return f
}

// palette names the colours of the style sheet.
func (f finding) palette() map[color.RGBA][]string {
	names := map[color.RGBA][]string{}
	for name, text := range f.Colors {
		var c color.RGBA
		if n, _ := fmt.Sscanf(text, "#%02x%02x%02x", &c.R, &c.G, &c.B); n == 3 && len(text) == 7 {
			c.A = 0xff
			names[c] = append(names[c], name)
		}
	}
	return names
}

// ink counts the pixels of each of them in a box.
func (f finding) ink(box [4]int) map[string]int {
	names, out := f.palette(), map[string]int{}
	for y := box[1]; y < box[3]; y++ {
		for x := box[0]; x < box[2]; x++ {
			for _, name := range names[f.picture.RGBAAt(x, y)] {
				out[name]++
			}
		}
	}
	return out
}

// drawn fails the test unless that many charts are there and each has at least
// so many pixels of each colour.
func (f finding) drawn(t *testing.T, what string, boxes [][4]int, want, least int, colors ...string) {
	t.Helper()
	if len(boxes) != want {
		t.Errorf("got %d %s, want %d", len(boxes), what, want)
	}
	for i, box := range boxes {
		ink := f.ink(box)
		for _, c := range colors {
			if ink[c] < least {
				t.Errorf("%s %d is as good as empty: %d pixels of %s, want at least %d (box %v)", what, i, ink[c], c, least, box)
			}
		}
	}
}

// whole fails the test if the page is wider than its window, fetched something
// or left a plot out.
func (f finding) whole(t *testing.T, width int) {
	t.Helper()
	if f.Width != width || f.Scroll > f.Width {
		t.Errorf("the page is %d wide in a window of %d: it scrolls sideways", f.Scroll, f.Width)
	}
	if high := f.picture.Bounds().Dy(); f.Height > high {
		t.Errorf("the page is %d high, its picture %d", f.Height, high)
	}
	if len(f.Failed) != 0 || len(f.Fetched) != 0 {
		t.Errorf("plots that failed: %q; fetched: %q", f.Failed, f.Fetched)
	}
}

func schemes() map[string]string { return map[string]string{"light": "#ffffff", "dark": "#14171a"} }

func TestInABrowserTheDemosChartsAreThere(t *testing.T) {
	for scheme, background := range schemes() {
		t.Run(scheme, func(t *testing.T) {
			f := look(t, written(t, demo()), 1200, scheme)
			f.whole(t, 1200)
			if f.Colors["bg"] != background || f.ink([4]int{0, 0, 20, 20})["bg"] != 400 {
				t.Errorf("background %s, want %s", f.Colors["bg"], background)
			}
			f.drawn(t, "plots", f.Plots, 2, 500, "line", "bg")
			f.drawn(t, "Gantt charts", f.Lanes, 2, 160, "phase2", "phase3", "phase4")
			f.drawn(t, "Gantt charts", f.Lanes, 2, 15, "phase5") // an instant
			f.drawn(t, "stalls", f.Stalls, 1, 10, "edge")
			f.drawn(t, "chart of the whole cut", f.Lanes[:1], 1, 1000, "phase1")
			if want := "syncfs, freeze pg, volume 0, volume 1, volume 2, volume 3, freeze pg, volume 0, volume 1, volume 2, volume 3"; strings.Join(f.Names, ", ") != want {
				t.Errorf("got lanes %q", f.Names)
			}
			if want := "verdict, stalls, throughput, cut, steps, machine"; strings.Join(f.Order, ", ") != want || f.Steps != 6 {
				t.Errorf("got parts %q and %d steps", f.Order, f.Steps)
			}
		})
	}
}

func TestInABrowserTheDrillsChartsAreThere(t *testing.T) {
	for scheme := range schemes() {
		t.Run(scheme, func(t *testing.T) {
			f := look(t, written(t, drill()), 1200, scheme)
			f.whole(t, 1200)
			f.seesTheDrill(t)
			if want := "verdict, outcomes, stalls, checks, throughput, cut, machine"; strings.Join(f.Order, ", ") != want {
				t.Errorf("got parts %q", f.Order)
			}
		})
	}
}

func (f finding) seesTheDrill(t *testing.T) {
	t.Helper()
	f.drawn(t, "plots", f.Plots, 2, 100, "line")
	f.drawn(t, "outcomes", f.Outcomes, 1, 150, "class0", "class1", "class2", "class3", "class4", "class5", "class6")
	f.drawn(t, "stalls", f.Stalls, 1, 10, "edge")
	f.drawn(t, "checks", f.Checks, 1, 100, "line", "class1", "rule")
	f.drawn(t, "Gantt charts", f.Lanes, 2, 160, "phase3", "phase4")
	if len(f.Classes) != 8 {
		t.Errorf("got outcomes %q, want 8", f.Classes)
	}
	if len(f.Dots) != 20 || slices.Max(f.Dots)-slices.Min(f.Dots) < float64(f.Width)/4 {
		t.Errorf("got dots at %.0f, want 20 that stand apart", f.Dots)
	}
	seen := map[string]bool{}
	for i := range 7 {
		seen[f.Colors[fmt.Sprint("class", i)]] = true
	}
	if len(seen) != 7 {
		t.Errorf("two classes have one colour: %v", f.Colors)
	}
}

func TestInABrowserAPhoneShowsAll(t *testing.T) {
	f := look(t, written(t, drill()), 360, "dark")
	f.whole(t, 360)
	f.seesTheDrill(t)
	f = look(t, written(t, demo()), 360, "light")
	f.whole(t, 360)
	f.drawn(t, "plots", f.Plots, 2, 100, "line", "bg")
	f.drawn(t, "Gantt charts", f.Lanes, 2, 160, "phase3", "phase4")
}

func TestInABrowserHostileNamesStayText(t *testing.T) {
	for _, p := range []report.Page{everywhere(hostile), experiment(hostile)} {
		f := look(t, written(t, p), 360, "light")
		f.whole(t, 360)
		if f.Bold != 0 || f.Title == "pwned" {
			t.Errorf("a name became markup or code: %+v", f)
		}
		f.drawn(t, "plots", f.Plots, 1, 100, "line")
	}
}

func TestInABrowserAPageWithoutDataDoesNotFail(t *testing.T) {
	f := look(t, written(t, report.Page{Throughput: []report.Series{{Name: "nothing"}, {Name: "one", Points: []report.Point{{start(), 0}}}}}), 360, "light")
	f.whole(t, 360)
	f.drawn(t, "plots, of the series that has a point,", f.Plots, 1, 100, "rule")
}
