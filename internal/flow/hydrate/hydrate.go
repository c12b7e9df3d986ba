// Package hydrate reads the volumes of a copy through, so that every block of
// them is where it belongs: a volume that EBS makes from a snapshot fetches a
// block from S3 when it is first read, which takes many times as long.
//
//	volumes of a copy → read each to its end, past the page cache → what was read, how long it took
//
// What always holds: it only reads, also while the copy is in use; the memory
// does not grow with the volumes; the copy stays as it is, whatever happens.
package hydrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/host"
)

// At most so many volumes are read at the same time, with so many reads in
// all: 32 MiB of memory.
const (
	atOnce  = 16
	readers = 32
)

// Options says what to read and how fast.
type Options struct {
	Volumes []backup.CopyVolume // Volume and Device are set
	Rate    backup.Bytes        // a second, over all volumes together; 0: as fast as it goes
	// Begin is told the size of each volume before the first read, Read of
	// what was read of volume i; Read is called by several goroutines. Both
	// may be nil.
	Begin func(sizes []backup.Bytes)
	Read  func(i int, n backup.Bytes)
}

// Run reads every volume through. A volume that fails does not keep the
// others; the error names device and byte of each that did. When ctx ends it
// stops soon (after the reads under way). The result is filled in every case,
// but for Hydration.SinceRestore, which the caller knows.
func Run(ctx context.Context, o Options) (backup.Hydration, error) {
	start := time.Now()
	res := backup.Hydration{Volumes: make([]backup.HydratedVolume, len(o.Volumes))}
	sizes := make([]backup.Bytes, len(o.Volumes))
	for i, v := range o.Volumes {
		size, err := host.Size(v.Device)
		if err != nil {
			return res, fmt.Errorf("hydrate %s: %w", v.Volume, err)
		}
		sizes[i] = size
		res.Size += size
		res.Volumes[i] = backup.HydratedVolume{Volume: v.Volume, Device: v.Device, Size: size}
	}
	if o.Begin != nil {
		o.Begin(sizes)
	}
	pace := newPacer(o.Rate)
	errs := make([]error, len(o.Volumes))
	turn := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i := range o.Volumes {
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			errs[i] = one(ctx, o, i, pace, &res.Volumes[i])
		})
	}
	all.Wait()
	for _, v := range res.Volumes {
		res.Bytes += v.Bytes
	}
	res.Seconds = time.Since(start).Seconds()
	err := errors.Join(errs...)
	if err != nil && ctx.Err() != nil { // once, not for each volume
		err = fmt.Errorf("hydrate: %w", ctx.Err())
	}
	res.Complete = err == nil
	return res, err
}

// one reads one volume through.
func one(ctx context.Context, o Options, i int, p *pacer, v *backup.HydratedVolume) error {
	start := time.Now()
	var read atomic.Int64
	err := fault.Point(ctx, "hydrate.read")
	if err == nil {
		err = host.ReadThrough(ctx, v.Device, host.Reading{Readers: max(1, readers/max(len(o.Volumes), 4)), Pace: p.wait,
			Read: func(n backup.Bytes) {
				read.Add(int64(n))
				if o.Read != nil {
					o.Read(i, n)
				}
			}})
	}
	v.Bytes, v.Seconds = backup.Bytes(read.Load()), time.Since(start).Seconds()
	if err != nil {
		v.Error = err.Error()
		return fmt.Errorf("hydrate %s: %w", v.Volume, err)
	}
	return fault.Point(ctx, "hydrate.read.done")
}

// pacer spreads reads over time so that together they keep to a rate.
type pacer struct {
	rate backup.Bytes
	mu   sync.Mutex
	next time.Time
}

func newPacer(rate backup.Bytes) *pacer { return &pacer{rate: rate} }

// wait returns when n bytes may be read, or with ctx's error.
func (p *pacer) wait(ctx context.Context, n backup.Bytes) error {
	if p.rate <= 0 {
		return ctx.Err()
	}
	p.mu.Lock()
	if now := time.Now(); p.next.Before(now) {
		p.next = now
	}
	due := p.next
	p.next = due.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
