package report_test

import (
	"cmp"
	"flag"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// The flags of scripts/screenshots.
var (
	shots  = flag.String("shots", "", "folder for pictures of a report (default: a throwaway one)")
	shotOf = flag.String("of", "", "the report, an HTML file (default: a drill's made up one)")
)

// What docs/ shows is what a browser shows, in files small enough for a
// repository.
func TestInABrowserPicturesForTheDocsAreSmall(t *testing.T) {
	page := written(t, drill())
	if *shotOf != "" {
		b, err := os.ReadFile(*shotOf)
		if err != nil {
			t.Fatal(err)
		}
		page = string(b)
	}
	for _, s := range []struct {
		name, scheme   string
		width, columns int
	}{{"light", "light", 1120, 1}, {"dark", "dark", 1120, 1}, {"phone", "light", 390, 5}} {
		f := look(t, page, s.width, s.scheme)
		f.whole(t, s.width)
		picture := few(columns(f.picture, s.width, f.Height, s.columns), f.palette())
		name := filepath.Join(cmp.Or(*shots, t.TempDir()), "drill-"+s.name+".png")
		file, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(file, picture); err != nil {
			t.Fatal(err)
		}
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		if b := picture.Bounds(); info.Size() > 350<<10 || info.Size() < 20<<10 || b.Dx() < s.width || b.Dy() < 1000 {
			t.Errorf("%s has %d bytes and %v pixels", name, info.Size(), b.Size())
		}
	}
}

// columns cuts a high picture into parts and puts them side by side.
func columns(from *image.RGBA, width, height, n int) *image.RGBA {
	const gap = 24
	high := (height + n - 1) / n
	to := image.NewRGBA(image.Rect(0, 0, n*width+(n-1)*gap, high))
	draw.Draw(to, to.Bounds(), image.NewUniform(color.Gray{0x80}), image.Point{}, draw.Src)
	for i := range n {
		draw.Draw(to, image.Rect(i*(width+gap), 0, i*(width+gap)+width, high), from, image.Pt(0, i*high), draw.Src)
	}
	return to
}

// few gives a picture those colours and its most frequent ones, 64 in all, and
// each other pixel the nearest of them.
func few(from *image.RGBA, keep map[color.RGBA][]string) *image.Paletted {
	counts := map[color.RGBA]int{}
	b := from.Bounds()
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			counts[from.RGBAAt(x, y)]++
		}
	}
	var palette color.Palette
	for c := range counts {
		palette = append(palette, c)
	}
	slices.SortFunc(palette, func(a, b color.Color) int {
		p, q := a.(color.RGBA), b.(color.RGBA)
		return cmp.Or(len(keep[q])-len(keep[p]), counts[q]-counts[p], int(p.R)-int(q.R), int(p.G)-int(q.G), int(p.B)-int(q.B))
	})
	palette = palette[:min(len(palette), 64)]
	index := map[color.RGBA]uint8{}
	for c := range counts {
		index[c] = uint8(palette.Index(c))
	}
	to := image.NewPaletted(b, palette)
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			to.SetColorIndex(x, y, index[from.RGBAAt(x, y)])
		}
	}
	return to
}
