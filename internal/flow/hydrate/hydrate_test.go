package hydrate_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/flow/hydrate"
)

// volumes makes files that are read as devices are.
func volumes(t *testing.T, sizes ...int64) []backup.CopyVolume {
	t.Helper()
	var out []backup.CopyVolume
	dir := t.TempDir()
	for i, size := range sizes {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		out = append(out, backup.CopyVolume{Member: i, Volume: backup.VolumeID(fmt.Sprintf("vol-%d", i)), Device: path})
	}
	return out
}

func TestEveryByteOfEveryVolumeIsReadAndTold(t *testing.T) {
	var sizes []int64
	for i := range int64(20) { // more than are read at once
		sizes = append(sizes, i<<20)
	}
	var mu sync.Mutex
	var began []backup.Bytes
	told := map[int]backup.Bytes{}
	res, err := hydrate.Run(t.Context(), hydrate.Options{Volumes: volumes(t, sizes...), Begin: func(s []backup.Bytes) { began = s },
		Read: func(i int, n backup.Bytes) { mu.Lock(); told[i] += n; mu.Unlock() }})
	if err != nil || !res.Complete || res.Bytes != 190<<20 || res.Size != res.Bytes || len(began) != 20 || res.Seconds <= 0 {
		t.Errorf("got %+v, %v", res, err)
	}
	for i, v := range res.Volumes {
		if int64(v.Size) != sizes[i] || v.Bytes != v.Size || told[i] != v.Size || began[i] != v.Size || v.Error != "" {
			t.Errorf("volume %d: %+v, told %d", i, v, told[i])
		}
	}
}

func TestTheRateIsThatOfAllVolumesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if _, err := hydrate.Run(t.Context(), hydrate.Options{Volumes: volumes(t, 8<<20, 2<<20, 1<<20), Rate: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 10*time.Second { // the first MiB at once
			t.Errorf("11 MiB at 1 MiB a second took %s", took)
		}
	})
}

func TestCancelStopsAWaitForTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
		defer cancel()
		start := time.Now()
		res, err := hydrate.Run(ctx, hydrate.Options{Volumes: volumes(t, 64<<20, 64<<20), Rate: 1 << 20})
		if !errors.Is(err, context.DeadlineExceeded) || strings.Count(err.Error(), "hydrate") != 1 || res.Complete || res.Bytes != 4<<20 || res.Size != 128<<20 {
			t.Errorf("got %+v, %v", res, err)
		}
		if took := time.Since(start); took != 3500*time.Millisecond {
			t.Errorf("it ended after %s", took)
		}
	})
}

func TestAVolumeThatFailsIsNamedAndDoesNotKeepTheOthers(t *testing.T) {
	for point := 1; point <= 6; point++ { // before and after each of three
		i := &fault.Injector{Action: "error", At: point}
		res, err := hydrate.Run(fault.With(t.Context(), i), hydrate.Options{Volumes: volumes(t, 2<<20, 2<<20, 2<<20)})
		if !errors.Is(err, fault.ErrInjected) || res.Complete || res.Bytes < 4<<20 {
			t.Errorf("point %d (%q): %+v, %v", point, i.Passed(), res, err)
		}
	}
	gone := volumes(t, 1<<20)
	gone[0].Device += "x"
	if res, err := hydrate.Run(t.Context(), hydrate.Options{Volumes: gone}); err == nil || !strings.Contains(err.Error(), "vol-0") || res.Complete {
		t.Errorf("a device that is not there: %+v, %v", res, err)
	}
}
