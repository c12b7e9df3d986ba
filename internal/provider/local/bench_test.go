package local_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// BenchmarkTake measures the spread between the requests of a cut and the time
// from its first request to its last response, over volumes of which so many
// single blocks are written; records is what FIEMAP counts of all members.
func BenchmarkTake(b *testing.B) {
	for _, fs := range []string{"xfs", "btrfs"} {
		for _, members := range []int{4, 32} {
			for _, extents := range []int{10, 1000} {
				b.Run(fmt.Sprintf("%s/members=%d/extents=%d", fs, members, extents), func(b *testing.B) {
					benchmarkTake(b, fs, members, extents)
				})
			}
		}
	}
}

func benchmarkTake(b *testing.B, fs string, members, extents int) {
	p, _ := openPool(b, fs, 8<<30)
	owner := backup.Tags{backup.TagBackup: "20200101T000000Z-000000"}
	var set provider.Set
	for i := range members {
		v, err := p.CreateVolume(b.Context(), provider.VolumeSpec{Token: fmt.Sprint(i), Size: 64 << 20, Tags: owner})
		if err != nil {
			b.Fatal(err)
		}
		device, err := p.Attach(b.Context(), v.ID)
		if err != nil {
			b.Fatal(err)
		}
		fragment(b, device, extents)
		set.Members = append(set.Members, provider.Member{Volume: v.ID, Tags: owner})
		b.Cleanup(func() {
			if err := p.Detach(context.WithoutCancel(b.Context()), v.ID); err != nil {
				b.Error(err)
			}
		})
	}
	var spreads, wholes []time.Duration
	var count float64
	for b.Loop() {
		c, err := p.Prepare(b.Context(), set)
		if err != nil {
			b.Fatal(err)
		}
		count = float64((c.Estimate() - 20*time.Millisecond) / (20 * time.Microsecond))
		taken, err := c.Take(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
		first, last, end := taken.Members[0].Requested, taken.Members[0].Requested, time.Time{}
		for _, m := range taken.Members {
			first, last, end = earlier(first, m.Requested), later(last, m.Requested), later(end, m.Responded)
		}
		spreads, wholes = append(spreads, last.Sub(first)), append(wholes, end.Sub(first))
	}
	report := func(name string, d []time.Duration) {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-p50-ms")
		b.ReportMetric(float64(d[len(d)*95/100].Microseconds())/1000, name+"-p95-ms")
	}
	report("spread", spreads)
	report("whole", wholes)
	b.ReportMetric(count, "records")
	b.ReportMetric(float64(wholes[len(wholes)/2].Nanoseconds())/1000/max(count, 1), "us/record")
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// fragment writes n separate blocks of a device, so that its file gets about
// 2n extents where there are no extent size hints.
func fragment(t testing.TB, device string, n int) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range n {
		if _, err := f.WriteAt([]byte{byte(i), 1, 2, 3}, int64(i)*2*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}
