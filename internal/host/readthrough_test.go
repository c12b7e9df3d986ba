package host_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
)

// image writes a file of that size.
func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<20), 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadThroughReadsEveryByteOnce(t *testing.T) {
	for _, size := range []int64{0, 4096, 1 << 20, 1<<20 + 4096, 37<<20 - 4096} {
		for _, readers := range []int{0, 1, 7, 64} {
			var n, paced atomic.Int64
			path := image(t, size)
			err := host.ReadThrough(t.Context(), path, host.Reading{Readers: readers, Read: func(b backup.Bytes) { n.Add(int64(b)) },
				Pace: func(_ context.Context, b backup.Bytes) error { paced.Add(int64(b)); return nil }})
			if err != nil || n.Load() != size || paced.Load() != size {
				t.Errorf("%d bytes, %d readers: read %d, paced %d, %v", size, readers, n.Load(), paced.Load(), err)
			}
			if got, err := host.Size(path); err != nil || int64(got) != size {
				t.Errorf("size %d of %d, %v", got, size, err)
			}
		}
	}
}

func TestReadThroughStopsWhenItIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var n atomic.Int64
	err := host.ReadThrough(ctx, image(t, 256<<20), host.Reading{Readers: 4, Read: func(backup.Bytes) {
		if n.Add(1) == 8 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || n.Load() > 16 {
		t.Errorf("%d reads, %v", n.Load(), err)
	}
	if err := host.ReadThrough(ctx, image(t, 1<<20), host.Reading{Readers: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("begun after that: %v", err)
	}
	if err := host.ReadThrough(t.Context(), "/nonexistent", host.Reading{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no such device: %v", err)
	}
}

// TestReadThroughNamesWhereADeviceFails cuts the file behind a loop device
// short: what is beyond its end cannot be read any more.
func TestReadThroughNamesWhereADeviceFails(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	file := image(t, 16<<20)
	device := attach(t, file)
	if err := host.ReadThrough(t.Context(), device, host.Reading{Readers: 3}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 5<<20); err != nil {
		t.Fatal(err)
	}
	err := host.ReadThrough(t.Context(), device, host.Reading{Readers: 1})
	if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "read "+device+" at byte 5242880") {
		t.Errorf("got %v", err)
	}
}
