package bench_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

const (
	cuts       = 40     // of each kind
	agedEnough = 100000 // extents of one volume
	quiet      = 500 * time.Millisecond
)

// BenchmarkCut measures how long production stands still for a cut of four
// filesystems while pgbench writes to all of them, and where that time goes:
// on volumes as they are made, and with one of them in 100,000 extents.
func BenchmarkCut(b *testing.B) {
	p := newProduction(b, map[string]string{"checkpoint_timeout": "30s"})
	p.fill(b, 20)
	b.Run("fresh", func(b *testing.B) { once(b, func() { p.measureCuts(b) }) })
	b.Run("aged", func(b *testing.B) {
		p.age(b, onTables)
		once(b, func() { p.measureCuts(b) })
	})
}

// measureCuts takes backups under load and reports on their cuts.
func (p *production) measureCuts(b *testing.B) {
	b.Helper()
	load := p.pgbench(b)
	pause(b, 2*time.Second)
	var all []backup.Manifest
	var extents figures
	for range cuts {
		n := 0.0
		for _, image := range p.images {
			n += float64(countExtents(b, image))
		}
		extents = append(extents, n)
		all = append(all, p.backup(b))
		pause(b, quiet)
	}
	pause(b, 2*time.Second) // pgbench's log is written in blocks
	transactions, perSecond := load.stop(b)

	var freeze, spread, take, gap, thaw, rounds, stall, later figures
	each := map[string]figures{}
	var order []string
	for _, m := range all {
		c := m.Cut
		first, last := c.Frozen[0].Called, c.Frozen[0].Thawed // in the order of the freezes; thawed in reverse
		lastHeld := c.Frozen[len(c.Frozen)-1].Held
		asked, answered := m.Snapshots[0].Requested, m.Snapshots[0].Responded
		for _, s := range m.Snapshots {
			if s.Requested.Before(asked) {
				asked = s.Requested
			}
			if s.Responded.After(answered) {
				answered = s.Responded
			}
		}
		freeze, spread = append(freeze, c.FreezeMS), append(spread, c.SpreadMS)
		gap, take, thaw = append(gap, ms(asked.Sub(lastHeld))), append(take, ms(answered.Sub(asked))), append(thaw, ms(last.Sub(answered)))
		rounds = append(rounds, float64(len(c.SyncRounds)))
		for _, f := range c.Frozen {
			name := filepath.Base(f.Mountpoint)
			if len(each[name]) == 0 {
				order = append(order, name)
			}
			each[name] = append(each[name], ms(f.Held.Sub(f.Called)))
		}
		stall = append(stall, ms(slowest(transactions, first, last)))
		after := last.Add(quiet / 2)
		later = append(later, ms(slowest(transactions, after, after.Add(last.Sub(first)))))
	}
	b.ReportMetric(freeze.p50(), "freeze-p50-ms")
	b.ReportMetric(freeze.p95(), "freeze-p95-ms")
	b.ReportMetric(spread.p50(), "spread-p50-ms")
	b.ReportMetric(spread.p95(), "spread-p95-ms")
	b.ReportMetric(stall.p50(), "stall-p50-ms")
	b.ReportMetric(stall.p95(), "stall-p95-ms")
	table := []string{fmt.Sprintf("%d cuts under %.0f transactions/s; extents of the four volumes: %.0f at first, %.0f at last; syncfs rounds: p50 %.0f, max %.0f",
		cuts, perSecond, extents[0], extents[len(extents)-1], rounds.p50(), rounds.max())}
	row := func(name string, f figures) {
		table = append(table, fmt.Sprintf("%-28s p50 %7.1f  p95 %7.1f  max %7.1f ms", name, f.p50(), f.p95(), f.max()))
	}
	row("freeze to thaw", freeze)
	for _, name := range order {
		row("  FIFREEZE of "+name, each[name])
	}
	row("  until the first request", gap)
	row("  snapshots", take)
	row("  until the last FITHAW", thaw)
	row("spread of the requests", spread)
	row("slowest transaction", stall)
	row("  as long a while later", later)
	b.Log(strings.Join(table, "\n"))
}

// fiemap is struct fiemap of Linux include/uapi/linux/fiemap.h without its
// array: so the kernel only counts.
type fiemap struct {
	start, length                  uint64
	flags, mapped, count, reserved uint32
}

const fsIocFiemap = 0xC020660B

func countExtents(b *testing.B, path string) int {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	m := fiemap{length: ^uint64(0)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		b.Fatalf("FIEMAP of %s: %v", path, errno)
	}
	return int(m.mapped)
}

// age brings a volume into many extents as years of backups do: a snapshot is
// kept while every second block of a file on it is written anew.
func (p *production) age(b *testing.B, name string) {
	b.Helper()
	const block, blocks = 4096, agedEnough + agedEnough/8
	image := p.images[name]
	f, err := os.OpenFile(filepath.Join(p.mounts[name], ".filler"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600) // hidden: not foreign data
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	// Memory of a mapping is aligned to pages, as O_DIRECT wants it.
	buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Munmap(buffer) }()
	for i := range buffer {
		buffer[i] = byte(i * 7)
	}
	for at := 0; at < block*blocks; at += len(buffer) {
		if _, err := f.WriteAt(buffer, int64(at)); err != nil {
			b.Fatal(err)
		}
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		b.Fatal(err)
	}
	clone(b, image, filepath.Join(p.pool, "aged.img"))
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := 2 * w; i < blocks; i += 8 {
				if _, err := f.WriteAt(buffer[:block], int64(i)*block); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	if n := countExtents(b, image); n < agedEnough {
		b.Fatalf("the volume has %d extents, wanted are %d", n, agedEnough)
	}
}

// clone makes a reflink of a file.
func clone(b *testing.B, from, to string) {
	b.Helper()
	source, err := os.Open(from)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = target.Close() }()
	if err := unix.IoctlFileClone(int(target.Fd()), int(source.Fd())); err != nil {
		b.Fatalf("clone %s: %v", from, err)
	}
	if err := target.Sync(); err != nil {
		b.Fatal(err)
	}
}
