package report

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// number writes v with thousands apart, and with decimals only where they
// say something.
func number(v float64) string {
	digits := 0
	if v != math.Trunc(v) {
		digits = max(0, 2-max(0, int(math.Floor(math.Log10(math.Abs(v))))))
	}
	return grouped(strconv.FormatFloat(v, 'f', digits, 64))
}

// grouped puts commas between the thousands of a decimal number.
func grouped(s string) string {
	whole, rest, point := strings.Cut(s, ".")
	sign := ""
	if strings.HasPrefix(whole, "-") {
		sign, whole = "-", whole[1:]
	}
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if point {
		whole += "." + rest
	}
	return sign + whole
}

// clock writes seconds after the origin as minutes and seconds, with hours
// and milliseconds where there are some.
func clock(s float64) string {
	d := time.Duration(math.Round(s*1000)) * time.Millisecond
	out := fmt.Sprintf("%d:%02d", d/time.Minute%60, d/time.Second%60)
	if h := d / time.Hour; h > 0 {
		out = fmt.Sprintf("%d:%02d:%02d", h, d/time.Minute%60, d/time.Second%60)
	}
	if ms := d % time.Second / time.Millisecond; ms != 0 {
		out += strings.TrimRight(fmt.Sprintf(".%03d", ms), "0")
	}
	return out
}

// seconds writes how long something lasted with about three digits.
func seconds(s float64) string {
	switch {
	case math.IsNaN(s) || math.IsInf(s, 0) || s < 0:
		return "not measured"
	case s == 0:
		return "0 s"
	case s < 1:
		return strconv.FormatFloat(s*1000, 'g', 3, 64) + " ms"
	case s < 10:
		return strconv.FormatFloat(s, 'f', 2, 64) + " s"
	case s < 60:
		return strconv.FormatFloat(s, 'f', 1, 64) + " s"
	case s < 3600:
		return fmt.Sprintf("%d min %02d s", int(s)/60, int(s)%60)
	}
	return fmt.Sprintf("%d h %02d min", int(s)/3600, int(s)/60%60)
}

// millis writes d in milliseconds without the unit, with three digits or
// more.
func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms == 0:
		return "0"
	case ms < 1:
		return strconv.FormatFloat(ms, 'f', 3, 64)
	case ms < 10:
		return strconv.FormatFloat(ms, 'f', 2, 64)
	case ms < 100:
		return strconv.FormatFloat(ms, 'f', 1, 64)
	}
	return grouped(strconv.FormatFloat(ms, 'f', 0, 64))
}
