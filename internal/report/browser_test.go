//go:build browser

package report_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cleancut/internal/report"
)

// harness loads the report into a frame of a chosen width and writes what it
// finds there into its own text: from inside the frame's document, which only
// this test's browser allows between files.
const harness = `<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:%dpx;height:900px" src="report.html"></iframe><pre id="finding"></pre>
<script>
const frame = document.querySelector("iframe");
const inked = (canvas) => {
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const colors = new Map(), line = [11, 92, 173];
  let drawn = 0, series = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] === 0) continue;
    drawn++;
    colors.set(data[i] << 16 | data[i + 1] << 8 | data[i + 2], true);
    if (line.every((c, j) => Math.abs(c - data[i + j]) < 12) && data[i + 3] > 230) series++;
  }
  return { width, height, drawn, series, colors: colors.size };
};
frame.onload = () => setTimeout(() => {
  const d = frame.contentDocument;
  document.getElementById("finding").textContent = JSON.stringify({
    plots: [...d.querySelectorAll(".canvas canvas")].map(inked),
    failed: [...d.querySelectorAll(".canvas")].filter((b) => !b.querySelector("canvas")).map((b) => b.textContent),
    lanes: [...d.querySelectorAll(".gantt .lane")].map((e) => e.textContent),
    bars: [...d.querySelectorAll(".gantt rect")].map((e) => e.getBoundingClientRect().width),
    outcomes: [...d.querySelectorAll(".outcomes rect")].map((e) => e.getBoundingClientRect().width + "×" + getComputedStyle(e).fill),
    dots: [...d.querySelectorAll(".stalls circle")].map((e) => e.getBoundingClientRect().left),
    steps: d.querySelectorAll(".steps tbody tr").length,
    scroll: d.documentElement.scrollWidth, width: d.documentElement.clientWidth,
    bold: d.querySelectorAll("b").length, title: d.title,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
  });
}, 500);
</script>`

type finding struct {
	Plots []struct {
		Width, Height, Drawn, Series, Colors int
	}
	Failed, Lanes, Fetched []string
	Bars                   []float64
	Outcomes               []string  // width and colour
	Dots                   []float64 // from the left
	Steps                  int
	Scroll, Width, Bold    int
	Title                  string
}

// browser runs headless Chromium to its end and returns what it prints.
func browser(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	flags := []string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1", "--virtual-time-budget=5000",
		"--user-data-dir=" + t.TempDir(),
	}
	command := exec.CommandContext(ctx, cmp.Or(os.Getenv("CLEANCUT_BROWSER"), "chromium"), append(flags, args...)...)
	command.WaitDelay = 5 * time.Second
	out, err := command.Output()
	if err != nil {
		t.Fatalf("run %s (apt-get install -y --no-install-recommends chromium, or set CLEANCUT_BROWSER): %v", command.Path, err)
	}
	return string(out)
}

func saved(t *testing.T, p report.Page) (folder string) {
	t.Helper()
	folder = t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "report.html"), []byte(written(t, p)), 0o644); err != nil {
		t.Fatal(err)
	}
	return folder
}

func look(t *testing.T, p report.Page, width int) finding {
	t.Helper()
	file := filepath.Join(saved(t, p), "harness.html")
	if err := os.WriteFile(file, fmt.Appendf(nil, harness, width), 0o644); err != nil {
		t.Fatal(err)
	}
	dom := browser(t, "--allow-file-access-from-files", "--window-size=1300,1000", "--dump-dom", "file://"+file)
	m := regexp.MustCompile(`(?s)<pre id="finding">(.+?)</pre>`).FindStringSubmatch(dom)
	if m == nil {
		t.Fatalf("the browser found nothing in: %s", dom)
	}
	var f finding
	if err := json.Unmarshal([]byte(html.UnescapeString(m[1])), &f); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestInABrowserTheChartsAreThere(t *testing.T) {
	for name, width := range map[string]int{"on a wide screen": 1200, "on a phone": 390, "on a narrow phone": 320} {
		t.Run(name, func(t *testing.T) {
			f := look(t, demo(), width)
			if len(f.Plots) != 2 || len(f.Failed) != 0 {
				t.Fatalf("got %d plots (failed: %q), want 2", len(f.Plots), f.Failed)
			}
			for i, p := range f.Plots {
				if p.Width < width/2 || p.Height < 150 || p.Drawn < p.Width*p.Height/4 || p.Series < p.Width/2 || p.Colors < 20 {
					t.Errorf("plot %d is as good as empty: %+v", i, p)
				}
			}
			if len(f.Lanes) != 15 || len(f.Bars) != 16 || f.Bars[0] < float64(width)/3 {
				t.Errorf("got lanes %q and bars %.1f, want 15 and 16", f.Lanes, f.Bars)
			}
			if f.Steps != 6 {
				t.Errorf("got %d steps, want 6", f.Steps)
			}
			if f.Width != width || f.Scroll > f.Width {
				t.Errorf("the page is %d wide in a window of %d: it scrolls sideways", f.Scroll, f.Width)
			}
			if len(f.Fetched) != 0 {
				t.Errorf("the page fetched %q", f.Fetched)
			}
		})
	}
}

func TestInABrowserADrillsChartsAreThere(t *testing.T) {
	for name, width := range map[string]int{"on a wide screen": 1200, "on a phone": 390} {
		t.Run(name, func(t *testing.T) {
			f := look(t, drill(), width)
			if len(f.Plots) != 2 || len(f.Failed) != 0 || f.Plots[0].Series < width/2 {
				t.Errorf("got plots %+v (failed: %q)", f.Plots, f.Failed)
			}
			colours := map[string]bool{}
			whole := 0.0
			for _, o := range f.Outcomes {
				w, colour, _ := strings.Cut(o, "×")
				n, err := strconv.ParseFloat(w, 64)
				if err != nil || n < 10 {
					t.Errorf("an outcome of width %q", o)
				}
				colours[colour] = true
				whole = max(whole, n)
			}
			if len(f.Outcomes) != 8 || len(colours) != 7 || whole < float64(width)/3 {
				t.Errorf("got outcomes %q, want 8 in 7 colours", f.Outcomes)
			}
			if len(f.Dots) != 20 || slices.Max(f.Dots)-slices.Min(f.Dots) < float64(width)/4 {
				t.Errorf("got dots at %.0f, want 20 that stand apart", f.Dots)
			}
			if f.Scroll > f.Width || len(f.Fetched) != 0 || f.Steps != 0 {
				t.Errorf("the page is %d wide in a window of %d, fetched %q, has %d steps", f.Scroll, f.Width, f.Fetched, f.Steps)
			}
		})
	}
}

func TestInABrowserHostileNamesStayText(t *testing.T) {
	f := look(t, everywhere(hostile), 390)
	if f.Bold != 0 || f.Title == "pwned" || len(f.Fetched) != 0 {
		t.Errorf("a name became markup or code: %+v", f)
	}
	if len(f.Plots) != 1 || f.Plots[0].Series < 100 {
		t.Errorf("got plots %+v, want one", f.Plots)
	}
	if f.Scroll > f.Width {
		t.Errorf("the page is %d wide in a window of %d: it scrolls sideways", f.Scroll, f.Width)
	}
}

func TestInABrowserAPageWithoutDataDoesNotFail(t *testing.T) {
	p := report.Page{Throughput: []report.Series{{Name: "nothing"}, {Name: "one", Points: []report.Point{{start(), 0}}}}}
	if f := look(t, p, 390); len(f.Plots) != 1 || len(f.Failed) != 0 || f.Plots[0].Drawn == 0 {
		t.Errorf("got %+v, want one plot, of the series that has a point", f)
	}
}

// A plot must be drawn in the colours of its background: this looks at the
// picture, not at the page.
func TestInABrowserPlotsFollowLightAndDark(t *testing.T) {
	for _, c := range []struct {
		name, flag string
		back, line color.RGBA
	}{
		{"light", "--blink-settings=preferredColorScheme=1", color.RGBA{0xff, 0xff, 0xff, 0xff}, color.RGBA{0x0b, 0x5c, 0xad, 0xff}},
		{"dark", "--blink-settings=preferredColorScheme=0", color.RGBA{0x14, 0x17, 0x1a, 0xff}, color.RGBA{0x6c, 0xb6, 0xff, 0xff}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := demo()
			p.Gantt = nil // whose bars have the colour of the plot
			folder := saved(t, p)
			shot := filepath.Join(folder, "shot.png")
			browser(t, c.flag, "--window-size=1100,1400", "--screenshot="+shot, "file://"+filepath.Join(folder, "report.html"))
			file, err := os.Open(shot)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			picture, err := png.Decode(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := picture.At(2, 2); color.RGBAModel.Convert(got) != c.back {
				t.Errorf("got background %v, want %v", got, c.back)
			}
			if n := count(picture, c.line); n < 500 {
				t.Errorf("got %d pixels in the colour of a series, want at least 500", n)
			}
		})
	}
}

func count(picture image.Image, want color.RGBA) int {
	n, b := 0, picture.Bounds()
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			if color.RGBAModel.Convert(picture.At(x, y)) == want {
				n++
			}
		}
	}
	return n
}
