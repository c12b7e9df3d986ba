package local_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
)

// life is all that happens to a volume and its snapshot; every call is
// repeated until it succeeds, as after a lost answer. It returns how often.
func life(ctx context.Context, t *testing.T, p *local.Pool, token string) (repetitions int) {
	t.Helper()
	again := func(do func() error) {
		t.Helper()
		for {
			err := do()
			if err == nil {
				return
			}
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatal(err)
			}
			repetitions++
		}
	}
	var v, copied backup.Volume
	again(func() (err error) {
		v, err = p.CreateVolume(ctx, provider.VolumeSpec{Token: token, Size: 1 << 20, Tags: owner()})
		return err
	})
	again(func() error { _, err := p.Attach(ctx, v.ID); return err })
	var ids []backup.SnapshotID
	again(func() error {
		c, err := p.Prepare(ctx, set(v))
		if err != nil {
			return err
		}
		defer func() { must(t, c.Close()) }()
		taken, err := c.Take(ctx)
		if err == nil {
			ids = []backup.SnapshotID{taken.Members[0].Snapshot}
		}
		return err
	})
	again(func() error { return p.Complete(ctx, ids, digests(len(ids))) })
	again(func() (err error) {
		copied, err = p.CreateVolume(ctx, provider.VolumeSpec{Token: token + "-copy", From: ids[0], Tags: owner()})
		return err
	})
	again(func() error { return p.Detach(ctx, v.ID) })
	again(func() error { return p.DeleteVolume(ctx, copied.ID, owner()) })
	again(func() error { return p.DeleteVolume(ctx, v.ID, owner()) })
	// By tags, because a cut that failed leaves what only they know.
	again(func() error {
		inv, err := p.List(ctx, owner())
		if err != nil {
			return err
		}
		ids = nil
		for _, s := range inv.Snapshots {
			ids = append(ids, s.ID)
		}
		return p.DeleteSnapshots(ctx, ids, owner())
	})
	return repetitions
}

// checkSidecars fails for every file in the pool that List cannot show.
func checkSidecars(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*s", "*"))
	must(t, err)
	for _, f := range files {
		sidecar := strings.TrimSuffix(strings.TrimSuffix(f, ".new"), filepath.Ext(strings.TrimSuffix(f, ".new"))) + ".json"
		if _, err := os.Stat(sidecar); err != nil {
			t.Errorf("%s: no sidecar", f)
		}
	}
}

func TestWhereverACallFailsItsRepetitionFinishesAndNothingIsLeft(t *testing.T) {
	for fs, size := range filesystems() {
		t.Run(fs, func(t *testing.T) {
			p, dir := openPool(t, fs, size)
			count := &fault.Injector{}
			life(fault.With(t.Context(), count), t, p, "none")
			points := len(count.Passed())
			if points < 30 {
				t.Fatalf("only %d points: %v", points, count.Passed())
			}
			for n := 1; n <= points; n++ {
				i := &fault.Injector{Action: "error", At: n}
				if got := life(fault.With(t.Context(), i), t, p, fmt.Sprint(n)); got != 1 {
					t.Errorf("fault at %s: %d repetitions", i.Passed()[n-1], got)
				}
				checkSidecars(t, dir)
				files, err := filepath.Glob(filepath.Join(dir, "*s", "*"))
				must(t, err)
				if len(files) > 0 {
					t.Errorf("fault at %s: left %v", i.Passed()[n-1], files)
				}
			}
		})
	}
}

func TestWhereverTheProcessIsKilledWhatIsLeftIsListedAndTheNextOneFinishes(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	for n := 1; ; n++ {
		child := exec.Command(os.Args[0], "-test.run=^TestALifeInAnotherProcess$")
		child.Env = append(os.Environ(), "CLEANCUT_TEST_POOL="+dir, fmt.Sprintf("CLEANCUT_TEST_FAULT=kill@%d", n))
		out, err := child.CombinedOutput()
		checkSidecars(t, dir)
		if err == nil {
			if n < 30 {
				t.Errorf("only %d points", n)
			}
			return
		}
		if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("kill at %d: %v\n%s", n, err, out)
		}
		// What was half made is made to its end, or taken away by its tags.
		_, err = p.CreateVolume(t.Context(), provider.VolumeSpec{Token: "life", Size: 1 << 20, Tags: owner()})
		must(t, err)
		sweep(t, p)
		files, err := filepath.Glob(filepath.Join(dir, "*s", "*"))
		must(t, err)
		if len(files) > 0 {
			t.Errorf("kill at %d: left %v", n, files)
		}
	}
}

func sweep(t *testing.T, p *local.Pool) {
	t.Helper()
	inv := list(t, p)
	for _, v := range inv.Volumes {
		must(t, p.Detach(t.Context(), v.ID))
		must(t, p.DeleteVolume(t.Context(), v.ID, owner()))
	}
	var ids []backup.SnapshotID
	for _, s := range inv.Snapshots {
		ids = append(ids, s.ID)
	}
	must(t, p.DeleteSnapshots(t.Context(), ids, owner()))
}

// TestALifeInAnotherProcess is the child of the test above; alone it does
// nothing.
func TestALifeInAnotherProcess(t *testing.T) {
	dir := os.Getenv("CLEANCUT_TEST_POOL")
	if dir == "" {
		return
	}
	p, err := local.Open(t.Context(), dir, quiet())
	must(t, err)
	i, err := fault.Parse(os.Getenv("CLEANCUT_TEST_FAULT"))
	must(t, err)
	life(fault.With(t.Context(), i), t, p, "life")
}
