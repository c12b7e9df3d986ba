package report_test

import (
	"fmt"
	"testing"
	"time"

	"cleancut/internal/report"
)

func TestFactsReadAsTheirKeysSay(t *testing.T) {
	got := report.Facts(map[string]any{
		"size_bytes": int64(2 << 30), "freeze_ms": 7.568, "seconds_to_first_query": 32.702143232, "per_second": 67.0, "rows": map[string]int64{"play.words": 200000, "play.bulk": 0},
		"volumes": []string{"/dev/loop0 = vol-1", "/dev/loop1 = vol-2"}, "still_serving": true, "listen_addresses": "", "sync_rounds_ms": []float64{183.071}, "nothing": []int{},
		"committed": time.Date(2026, 11, 23, 4, 49, 23, 714567733, time.UTC), "markers": map[string]bool{"row": false}, "cannot": func() {},
	})
	want := []report.Fact{
		{Name: "cannot", Value: "json: unsupported type: func()"}, {Name: "committed", Value: "2026-11-23 04:49:23.714 UTC"}, {Name: "freeze", Value: "7.57 ms"}, {Name: "listen addresses", Value: "empty"},
		{Name: "markers", Value: "row: no"}, {Name: "nothing", Value: "none"}, {Name: "per second", Value: "67"}, {Name: "rows", Value: "play.bulk: 0\nplay.words: 200,000"},
		{Name: "seconds to first query", Value: "32.7 s"}, {Name: "size bytes", Value: "2.00 GiB"}, {Name: "still serving", Value: "yes"}, {Name: "sync rounds", Value: "183 ms"},
		{Name: "volumes", Value: "/dev/loop0 = vol-1\n/dev/loop1 = vol-2"},
	}
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
