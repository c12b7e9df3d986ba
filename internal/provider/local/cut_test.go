package local_test

import (
	"os"
	"regexp"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
)

func cut(t testing.TB, p *local.Pool, volumes ...backup.Volume) []backup.SnapshotID {
	t.Helper()
	c, err := p.Prepare(t.Context(), set(volumes...))
	must(t, err)
	defer func() { must(t, c.Close()) }()
	taken, err := c.Take(t.Context())
	must(t, err)
	var ids []backup.SnapshotID
	for _, m := range taken.Members {
		ids = append(ids, m.Snapshot)
	}
	return ids
}

func complete(t testing.TB, p *local.Pool, ids []backup.SnapshotID) backup.SnapshotID {
	t.Helper()
	must(t, p.Complete(t.Context(), ids, digests(len(ids))))
	return ids[0]
}

func restore(t testing.TB, p *local.Pool, token string, from backup.SnapshotID) (backup.Volume, string) {
	t.Helper()
	v, err := p.CreateVolume(t.Context(), provider.VolumeSpec{Token: token, From: from, Tags: owner()})
	must(t, err)
	device, err := p.Attach(t.Context(), v.ID)
	must(t, err)
	detachAtEnd(t, p, v.ID)
	return v, device
}

func estimate(t testing.TB, p *local.Pool, volumes ...backup.Volume) time.Duration {
	t.Helper()
	c, err := p.Prepare(t.Context(), set(volumes...))
	must(t, err)
	must(t, c.Close())
	return c.Estimate()
}

func TestTheEstimateGrowsWithTheExtentsOfAllMembers(t *testing.T) {
	for fs, size := range filesystems() {
		t.Run(fs, func(t *testing.T) {
			p, dir := openPool(t, fs, size)
			v, device := volume(t, p, "one", 64<<20)
			w, second := volume(t, p, "two", 64<<20)
			fresh := estimate(t, p, v, w)
			fragment(t, device, 500)
			fragment(t, second, 100)
			got := estimate(t, p, v, w)
			// Its sum joins neighbours, its table has them all.
			count := len(regexp.MustCompile(`(?m)^ *\d+: `).FindAllString(command(t, "filefrag", "-v", image(dir, v), image(dir, w)), -1))
			if want := time.Duration(count)*20*time.Microsecond + 20*time.Millisecond; got != want || got <= fresh || count < 600 {
				t.Errorf("%d extents: got %v, want %v; fresh: %v", count, got, want, fresh)
			}
		})
	}
}

func TestOnXFSTheEstimateGrowsWhileClonesAreBeingFreed(t *testing.T) {
	for fs, factor := range map[string]time.Duration{"xfs": 5, "btrfs": 1} {
		t.Run(fs, func(t *testing.T) {
			p, dir := openPool(t, fs, 512<<20)
			v, _ := volume(t, p, "one", 16<<20)
			ids := cut(t, p, v)
			before := estimate(t, p, v)
			must(t, p.DeleteSnapshots(t.Context(), ids, owner()))
			if got := estimate(t, p, v); got != factor*before {
				t.Errorf("got %v, want %d times %v", got, factor, before)
			}
			old := time.Now().Add(-time.Hour)
			must(t, os.Chtimes(dir+"/freed", old, old))
			if got := estimate(t, p, v); got != before {
				t.Errorf("an hour later: got %v, want %v", got, before)
			}
		})
	}
}

func TestAVolumeThatIsNotAttachedIsNotCut(t *testing.T) {
	p, _ := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	must(t, p.Detach(t.Context(), v.ID))
	_, err := p.Prepare(t.Context(), set(v))
	refused(t, err, nil, string(v.ID), "not attached")
	if inv := list(t, p); len(inv.Snapshots) > 0 {
		t.Errorf("left: %+v", inv.Snapshots)
	}
}

func TestAfterACrashBetweenCutAndCompletionTheSnapshotIsPendingAndCanBeCompletedOrDeleted(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	v, device := volume(t, p, "one", 16<<20)
	fragment(t, device, 3)
	ids := append(cut(t, p, v), cut(t, p, v)...)
	// The process dies, another opens the pool.
	p, err := local.Open(t.Context(), dir, quiet())
	must(t, err)
	inv := list(t, p)
	if len(inv.Snapshots) != 2 || inv.Snapshots[0].State != provider.Pending || inv.Snapshots[1].State != provider.Pending {
		t.Errorf("got %+v", inv.Snapshots)
	}
	_, err = p.CreateVolume(t.Context(), provider.VolumeSpec{Token: "two", From: ids[0], Tags: owner()})
	refused(t, err, nil, "pending")
	must(t, p.DeleteSnapshots(t.Context(), ids[1:], owner()))
	_, copied := restore(t, p, "two", complete(t, p, ids[:1]))
	original, err := os.ReadFile(device)
	must(t, err)
	again, err := os.ReadFile(copied)
	must(t, err)
	if string(original) != string(again) {
		t.Error("the copy differs")
	}
}

func TestASnapshotThatWasPreparedButNotTakenCanNeverComplete(t *testing.T) {
	p, _ := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	c, err := p.Prepare(t.Context(), set(v))
	must(t, err)
	must(t, c.Close())
	id := list(t, p).Snapshots[0].ID
	refused(t, p.Complete(t.Context(), []backup.SnapshotID{id}, digests(1)), nil, string(id), "delete")
	must(t, p.DeleteSnapshots(t.Context(), []backup.SnapshotID{id}, owner()))
}

func TestASnapshotWithoutItsFileIsBrokenAndCanBeDeleted(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	id := complete(t, p, cut(t, p, v))
	must(t, os.Remove(dir+"/snapshots/"+string(id)+".img"))
	if got := list(t, p).Snapshots; len(got) != 1 || got[0].State != provider.Broken {
		t.Errorf("got %+v", got)
	}
	must(t, p.DeleteSnapshots(t.Context(), []backup.SnapshotID{id}, owner()))
	if got := list(t, p).Snapshots; len(got) != 0 {
		t.Errorf("got %+v", got)
	}
}
