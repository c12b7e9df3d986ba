package evidence

import (
	"fmt"
	"html"
	"slices"
	"strings"
)

// Measures of the chart in pixels.
const (
	chartWidth  = 900
	chartLeft   = 130 // of the plots, right of the names
	panelHeight = 90
	panelGap    = 22
	chartTop    = 30
)

// Chart draws, for each tool that was measured, the seconds of the pair with
// the median of what was kept, as an SVG image: transactions of each second
// over the mean of the window alone, the tool's own time shaded. "" without any
// pair.
func Chart(m Measurement) string {
	var pairs []Pair
	var names []string
	highest, before, after := 1.25, 1, 1
	for _, t := range m.Tools {
		of := m.of(t.Key)
		if len(of) == 0 {
			continue
		}
		slices.SortFunc(of, func(a, b Pair) int { return int(1e6 * (a.Kept() - b.Kept())) })
		p := of[(len(of)-1)/2]
		pairs, names = append(pairs, p), append(names, t.Name)
		before, after = max(before, len(p.Alone.PerSecond)), max(after, len(p.With.PerSecond))
		highest = max(highest, float64(slices.Max(append(slices.Clone(p.Alone.PerSecond), p.With.PerSecond...)))/p.Alone.Rate())
	}
	if len(pairs) == 0 {
		return ""
	}
	highest = min(highest, 3)
	x := func(second float64) float64 {
		return chartLeft + (second+float64(before))/float64(before+after)*(chartWidth-chartLeft-10)
	}
	var b strings.Builder
	height := chartTop + len(pairs)*(panelHeight+panelGap) + 20
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", chartWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/><text x="10" y="18">Transactions of each second over the mean alone. Grey: alone. Shaded: the tool runs. Lines: 1 and %g.</text>`+"\n", chartWidth, height, noBelow)
	for i, p := range pairs {
		top := float64(chartTop + i*(panelHeight+panelGap))
		y := func(share float64) float64 { return top + panelHeight*(1-min(share, highest)/highest) }
		fmt.Fprintf(&b, `<text x="10" y="%.0f">%s</text><text x="10" y="%.0f">kept %.2f</text>`+"\n", top+panelHeight/2, html.EscapeString(names[i]), top+panelHeight/2+16, p.Kept())
		fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%d" fill="#fde8c8"/>`+"\n", x(0), top, max(x(p.Seconds)-x(0), 1), panelHeight)
		for _, share := range []float64{0, noBelow, 1} {
			fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#bbb"/><text x="%d" y="%.1f" font-size="9" text-anchor="end">%g</text>`+"\n",
				chartLeft, chartWidth-10, y(share), y(share), chartLeft-3, y(share)+3, share)
		}
		for _, s := range []struct {
			from   int
			counts []int
			colour string
		}{{-len(p.Alone.PerSecond), p.Alone.PerSecond, "#888"}, {0, p.With.PerSecond, "#0b5fa5"}} {
			var points []string
			for j, n := range s.counts {
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(float64(s.from+j)+0.5), y(float64(n)/p.Alone.Rate())))
			}
			fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" points="%s"/>`+"\n", s.colour, strings.Join(points, " "))
		}
	}
	for second := -(before / 60) * 60; second <= after; second += 60 {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle" font-size="10">%d s</text>`+"\n", x(float64(second)), height-8, second)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
