package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// readSize is one read of ReadThrough: with it EBS reaches its throughput, and
// it is the memory of one reader.
const readSize = 1 << 20

// Reading says how to read a device through.
type Reading struct {
	Readers int                                             // reads under way at the same time, at least 1
	Pace    func(ctx context.Context, n backup.Bytes) error // waited for before each read; may be nil
	Read    func(n backup.Bytes)                            // told of what was read, by several goroutines; may be nil
}

// Size returns the bytes of a block device.
func Size(device string) (backup.Bytes, error) {
	f, err := openDevice(device)
	if err != nil {
		return 0, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, fmt.Errorf("size of %s: %w", device, err)
	}
	return backup.Bytes(size), nil
}

// ReadThrough reads all of a block device once, from its beginning to its end,
// past the page cache (O_DIRECT), and forgets what it read. It holds one MiB a
// reader. An error names the device and the byte at which the read began that
// failed; the reads under way are waited for. It may be called while the
// device is mounted and written to.
func ReadThrough(ctx context.Context, device string, o Reading) (err error) {
	f, err := openDevice(device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var next atomic.Int64
	var readers sync.WaitGroup
	for range max(o.Readers, 1) {
		readers.Go(func() {
			if err := readChunks(ctx, f, size, &next, o); err != nil {
				stop(err)
			}
		})
	}
	readers.Wait()
	return context.Cause(ctx)
}

// readChunks reads one chunk after the other that no other reader has taken.
func readChunks(ctx context.Context, f *os.File, size int64, next *atomic.Int64, o Reading) (err error) {
	// O_DIRECT wants aligned memory; anonymous pages are, and go back at once.
	buf, err := unix.Mmap(-1, 0, readSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory to read %s: %w", f.Name(), err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	for ctx.Err() == nil {
		at := next.Add(readSize) - readSize
		n := min(readSize, size-at)
		if n <= 0 {
			return nil
		}
		if o.Pace != nil {
			if err := o.Pace(ctx, backup.Bytes(n)); err != nil {
				return fmt.Errorf("read %s at byte %d: %w", f.Name(), at, err)
			}
		}
		if _, err := f.ReadAt(buf[:n], at); err != nil {
			return fmt.Errorf("read %s at byte %d: %w", f.Name(), at, err)
		}
		if o.Read != nil {
			o.Read(backup.Bytes(n))
		}
	}
	return fmt.Errorf("read %s: %w", f.Name(), context.Cause(ctx))
}
