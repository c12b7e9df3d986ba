package flow_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
	"cleancut/internal/flow"
	"cleancut/internal/provider"
	"cleancut/internal/state"
)

// shelf is a provider that only keeps and deletes what is on it, under the
// conditions of the contract.
type shelf struct {
	provider.Provider
	mu        sync.Mutex
	snapshots map[backup.SnapshotID]backup.Tags
	volumes   []provider.Volume
	broken    map[backup.SnapshotID]error // deleting these fails
}

func (s *shelf) List(ctx context.Context, match backup.Tags) (provider.Inventory, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	inv := provider.Inventory{Volumes: s.volumes}
	for id, tags := range s.snapshots {
		if len(match) == 0 || tags.Match(match) {
			inv.Snapshots = append(inv.Snapshots, provider.Snapshot{ID: id, Tags: tags})
		}
	}
	return inv, ctx.Err()
}

func (s *shelf) DeleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if tags, ok := s.snapshots[id]; ok && !tags.Match(owner) {
			return fmt.Errorf("%s: %w", id, backup.ErrNotOurs)
		}
		if err := s.broken[id]; err != nil {
			return fmt.Errorf("delete %s: %w", id, err)
		}
	}
	for _, id := range ids {
		delete(s.snapshots, id)
	}
	return ctx.Err()
}

// keeping is a flow over a shelf, a catalog and a state of its own.
type keeping struct {
	*flow.Flow
	shelf *shelf
	dir   string
}

func newKeeping(t *testing.T) *keeping {
	t.Helper()
	dir := t.TempDir()
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	s := &shelf{snapshots: map[backup.SnapshotID]backup.Tags{}, broken: map[backup.SnapshotID]error{}}
	return &keeping{dir: dir, shelf: s, Flow: &flow.Flow{Provider: s, Catalog: catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), "main"), State: st,
		Cluster: "main", Host: "prod", Log: slog.New(slog.DiscardHandler)}}
}

// snapshotsOf names the two snapshots of a backup.
func snapshotsOf(id backup.ID) []backup.SnapshotID {
	return []backup.SnapshotID{backup.SnapshotID("snap-" + string(id) + "-0"), backup.SnapshotID("snap-" + string(id) + "-1")}
}

// put puts a complete backup of two volumes into catalog and shelf; the
// manifest names the snapshots given, else its own.
func (k *keeping) put(t *testing.T, id backup.ID, named ...backup.SnapshotID) {
	t.Helper()
	k.putAs(t, id, nil, named...)
}

// putAs is put of a manifest that change has had its way with.
func (k *keeping) putAs(t *testing.T, id backup.ID, change func(*backup.Manifest), named ...backup.SnapshotID) {
	t.Helper()
	m := backup.Manifest{Version: backup.ManifestVersion, ID: id, Cluster: "main", Created: id.Time(), Cut: backup.Cut{Achieved: backup.Atomic, How: backup.ModeFreeze}}
	for i, mount := range []string{"/data", "/wal"} {
		v := backup.Volume{ID: backup.VolumeID(fmt.Sprintf("vol-%d", i)), Provider: "local", Size: 1 << 30}
		m.Topology.Filesystems = append(m.Topology.Filesystems, backup.Filesystem{Type: "xfs", Mountpoint: mount, Device: backup.Device{Kind: backup.DeviceVolume, Name: "loop1", Volume: &v}})
		m.Topology.Places = append(m.Topology.Places, backup.Place{Kind: []backup.PlaceKind{backup.PlaceData, backup.PlaceWAL}[i], Path: mount, Filesystem: i, Rel: "."})
		snap := snapshotsOf(id)[i]
		k.shelf.snapshots[snap] = backup.Tags{backup.TagBackup: string(id), backup.TagCluster: "main"}
		if len(named) > i {
			snap = named[i]
		}
		m.Snapshots = append(m.Snapshots, backup.Snapshot{ID: snap, Volume: v, Member: i})
	}
	if change != nil {
		change(&m)
	}
	digest, err := k.Catalog.PutManifest(t.Context(), m)
	if err == nil {
		err = k.Catalog.PutComplete(t.Context(), backup.Complete{ID: id, Digest: digest, Completed: id.Time()})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (k *keeping) judge(t *testing.T, id backup.ID, result backup.CheckResult) {
	t.Helper()
	if err := k.Catalog.PutVerdict(t.Context(), backup.Verdict{Backup: id, Time: time.Now(), Checks: []backup.Check{{Name: "x", Result: result}}}); err != nil {
		t.Fatal(err)
	}
}

func (k *keeping) hold(t *testing.T, id backup.ID) backup.Hold {
	t.Helper()
	h := backup.Hold{Backup: id, By: "ann", Host: "prod", Time: time.Now().UTC(), Reason: "audit"}
	if err := k.Hold(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	return h
}

// there lists the backups that are whole: records and both snapshots.
func (k *keeping) there(t *testing.T) []backup.ID {
	t.Helper()
	entries, err := k.Catalog.Backups(t.Context())
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		t.Fatal(err)
	}
	var out []backup.ID
	for _, e := range entries {
		snaps := 0
		for _, s := range snapshotsOf(e.ID) {
			if k.shelf.snapshots[s] != nil {
				snaps++
			}
		}
		if e.Err != nil || snaps != 2 {
			t.Errorf("backup %s: %v, %d of 2 snapshots", e.ID, e.Err, snaps)
		}
		out = append(out, e.ID)
	}
	return out
}

// plan is what prune --keep-last n would do now.
func (k *keeping) plan(t *testing.T, n int) []backup.Choice {
	t.Helper()
	facts, err := k.PruneFacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, remove, err := backup.PlanRetention(facts, backup.Retention{Last: n}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return remove
}

// three puts three backups of which the newest is proven.
func three(t *testing.T) *keeping {
	t.Helper()
	k := newKeeping(t)
	for _, id := range []backup.ID{first, second, third} {
		k.put(t, id)
	}
	k.judge(t, third, backup.Passed)
	return k
}

func ids(choices []backup.Choice) []backup.ID {
	var out []backup.ID
	for _, c := range choices {
		out = append(out, c.ID)
	}
	return out
}

func TestPruneDeletesWholeSetsAndNothingElse(t *testing.T) {
	k := three(t)
	done, err := k.Prune(t.Context(), k.plan(t, 1))
	if err != nil || len(done) != 2 || !done[0].Done || !done[1].Done {
		t.Errorf("got %+v, %v", done, err)
	}
	if got := k.there(t); !slices.Equal(got, []backup.ID{third}) || len(k.shelf.snapshots) != 2 {
		t.Errorf("left %v and snapshots %v", got, k.shelf.snapshots)
	}
	if intents, err := k.Catalog.Intents(t.Context()); err != nil || len(intents) > 0 {
		t.Errorf("intents %v, %v", intents, err)
	}
	if again := k.plan(t, 1); len(again) > 0 {
		t.Errorf("planned again it removes %v", again)
	}
}

func TestASnapshotThatIsNotOursIsNeverDeletedThoughTheCatalogNamesIt(t *testing.T) {
	for name, tags := range map[string]backup.Tags{
		"of nobody":          {"Name": "precious"},
		"of another backup":  {backup.TagBackup: string(third), backup.TagCluster: "main"},
		"of another cluster": {backup.TagBackup: string(first), backup.TagCluster: "else"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeping(t)
			k.shelf.snapshots["snap-foreign"] = tags
			k.put(t, first, "snap-foreign")
			for _, id := range []backup.ID{second, third} {
				k.put(t, id)
			}
			k.judge(t, second, backup.Passed)
			if _, err := k.Prune(t.Context(), k.plan(t, 1)); err != nil {
				t.Error(err)
			}
			if k.shelf.snapshots["snap-foreign"] == nil {
				t.Error("it was deleted")
			}
			if got := k.there(t); !slices.Equal(got, []backup.ID{second, third}) {
				t.Errorf("left %v", got)
			}
		})
	}
}

func TestOneDeletionThatFailsDoesNotKeepTheOthers(t *testing.T) {
	k := three(t)
	k.shelf.broken[snapshotsOf(first)[1]] = errors.New("the cloud is angry")
	done, err := k.Prune(t.Context(), k.plan(t, 1))
	if !errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), string(first)) || !strings.Contains(err.Error(), "angry") || strings.Contains(err.Error(), string(second)) {
		t.Errorf("got %v", err)
	}
	if len(done) != 2 || done[0].Done || done[0].Error == "" || !done[1].Done {
		t.Errorf("got %+v", done)
	}
	if again := k.plan(t, 1); len(again) > 0 {
		t.Errorf("what is left is sweep's, prune wants %v", again)
	}
	k.shelf.broken = nil
	facts, err := k.SweepFacts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Sweep(t.Context(), flow.PlanSweep(facts)); err != nil {
		t.Error(err)
	}
	if got := k.there(t); !slices.Equal(got, []backup.ID{third}) {
		t.Errorf("left %v", got)
	}
}

func TestWhatChangedSinceThePlanIsRespected(t *testing.T) {
	k := three(t)
	remove := k.plan(t, 1)
	if got := ids(remove); !slices.Equal(got, []backup.ID{first, second}) {
		t.Fatalf("plan %v", got)
	}
	k.hold(t, first)
	if err := k.State.PutCopy(backup.Copy{ID: "20260104T000000Z-000004", Backup: second, Cluster: "main", Host: "prod", Purpose: backup.ForDump, Root: "/srv/x"}); err != nil {
		t.Fatal(err)
	}
	done, err := k.Prune(t.Context(), append(remove, backup.Choice{ID: "20260105T000000Z-000005"}))
	if err != nil || len(done) != 3 {
		t.Fatalf("got %+v, %v", done, err)
	}
	for i, want := range []string{"held", "in use", "gone"} {
		if done[i].Done || !strings.HasPrefix(done[i].Kept, want+" since") {
			t.Errorf("got %+v, want it kept: %s", done[i], want)
		}
	}
	if got := k.there(t); len(got) != 3 {
		t.Errorf("left %v", got)
	}
	if again := k.plan(t, 1); len(again) > 0 {
		t.Errorf("planned again it removes %v", again)
	}
}

func TestPruneFacts(t *testing.T) {
	k := three(t)
	k.judge(t, second, backup.Failed)
	k.shelf.volumes = []provider.Volume{{ID: "vol-x", Tags: backup.Tags{backup.TagCopy: "20260104T000000Z-000004", backup.TagBackup: string(first), backup.TagCluster: "main", backup.TagHost: "far"}}}
	if err := k.Catalog.PutIntent(t.Context(), backup.Intent{ID: third, Cluster: "main", Host: "far"}); err != nil {
		t.Fatal(err)
	}
	holds := filepath.Join(k.dir, "catalog/clusters/main/backups", string(second), "holds")
	if err := errors.Join(os.MkdirAll(holds, 0o700), os.WriteFile(filepath.Join(holds, "20260101T000000.000000Z.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := k.PruneFacts(t.Context())
	if err != nil || len(got) != 3 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if !strings.Contains(got[0].InUse, "on host far") || got[0].Verdict != backup.Unproven {
		t.Errorf("a copy on another host: %+v", got[0])
	}
	if !strings.Contains(got[1].Held, "cannot be read") || got[1].Verdict != backup.Damaged {
		t.Errorf("a hold that cannot be read: %+v", got[1])
	}
	if !strings.Contains(got[2].Begun, "being made on host far") || got[2].Verdict != backup.Good {
		t.Errorf("a backup that is being made: %+v", got[2])
	}
	if remove := k.plan(t, 1); len(remove) > 0 {
		t.Errorf("plan %v, want nothing to go", ids(remove))
	}
	if err := os.WriteFile(filepath.Join(k.State.Path(), "copies", "x.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.PruneFacts(t.Context()); err == nil {
		t.Error("a ledger that cannot be read: it may be of any backup, want an error")
	}
}

func TestOnlyCompleteBackupsCount(t *testing.T) {
	k := three(t)
	if err := k.Catalog.Retract(t.Context(), second); err != nil { // its cut is good, its snapshots not yet complete
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(k.dir, "catalog/clusters/main/backups", string(first), "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	const damaged backup.ID = "20260106T000000Z-000006"
	folder := filepath.Join(k.dir, "catalog/clusters/main/backups", string(damaged))
	if err := errors.Join(os.MkdirAll(folder, 0o700), os.WriteFile(filepath.Join(folder, "manifest.json"), b[:len(b)/2], 0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := k.PruneFacts(t.Context())
	if err != nil || len(got) != 4 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if got[0].Incomplete || !got[1].Incomplete || got[2].Incomplete || got[3].Unreadable == "" {
		t.Errorf("got %+v", got)
	}
	if remove := ids(k.plan(t, 1)); !slices.Equal(remove, []backup.ID{first}) {
		t.Errorf("plan %v", remove)
	}
	if remove := ids(k.plan(t, 2)); len(remove) > 0 {
		t.Errorf("plan %v", remove)
	}
}

func TestAHeldBackupIsNotDeletedBeforeItIsReleased(t *testing.T) {
	k := three(t)
	k.hold(t, first)
	k.hold(t, first)
	for name, remove := range map[string]func(context.Context, backup.ID) error{"delete": k.Delete, "delete --force-last": k.DeleteLast} {
		err := remove(t.Context(), first)
		if !errors.Is(err, backup.ErrUsage) || !errors.Is(err, backup.ErrHeld) || !strings.Contains(err.Error(), "held by ann on prod since") || !strings.Contains(backup.HintOf(err), "hold --release "+string(first)) {
			t.Errorf("%s: got %v, hint %q", name, err, backup.HintOf(err))
		}
	}
	if intents, err := k.Catalog.Intents(t.Context()); err != nil || len(intents) > 0 {
		t.Errorf("intents %v, %v", intents, err)
	}
	if got := ids(k.plan(t, 1)); !slices.Equal(got, []backup.ID{second}) {
		t.Errorf("plan %v", got)
	}
	were, err := k.Release(t.Context(), first)
	if err != nil || len(were) != 2 || were[0].Reason != "audit" {
		t.Errorf("released %+v, %v", were, err)
	}
	if err := k.Delete(t.Context(), first); err != nil {
		t.Error(err)
	}
	if got := k.there(t); !slices.Equal(got, []backup.ID{second, third}) {
		t.Errorf("left %v", got)
	}
	if _, err := k.Release(t.Context(), first); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("release of what is gone: %v", err)
	}
}

func TestTheLastProvenBackupIsNotDeletedByMistake(t *testing.T) {
	k := three(t)
	err := k.Delete(t.Context(), third)
	if !errors.Is(err, backup.ErrUsage) || !strings.Contains(backup.HintOf(err), "--force-last") {
		t.Errorf("got %v, hint %q", err, backup.HintOf(err))
	}
	k.judge(t, second, backup.Passed)
	if err := k.Delete(t.Context(), second); err != nil { // third is proven still
		t.Error(err)
	}
	if err := k.Delete(t.Context(), first); err != nil { // it never was
		t.Error(err)
	}
	if err := k.DeleteLast(t.Context(), third); err != nil {
		t.Error(err)
	}
	if got := k.there(t); len(got) > 0 {
		t.Errorf("left %v", got)
	}
}

func TestOnlyAWholeBackupThatStaysCanBeHeld(t *testing.T) {
	k := three(t)
	if err := errors.Join(k.Catalog.Retract(t.Context(), first), k.Catalog.PutIntent(t.Context(), deletion(second))); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[backup.ID]error{first: backup.ErrIncomplete, second: backup.ErrInUse, "20260105T000000Z-000005": backup.ErrNotFound} {
		if err := k.Hold(t.Context(), backup.Hold{Backup: id, Time: time.Now()}); !errors.Is(err, want) {
			t.Errorf("hold %s: got %v, want %v", id, err, want)
		}
		if holds, err := k.Catalog.Holds(t.Context(), id); err != nil || len(holds) > 0 {
			t.Errorf("%s has holds %v, %v", id, holds, err)
		}
	}
}

func TestADeletionThatHadNotBegunGivesWayToAHold(t *testing.T) {
	k := three(t)
	h := k.hold(t, first)
	if err := k.Catalog.PutIntent(t.Context(), deletion(first)); err != nil { // killed right after it, the hold came between
		t.Fatal(err)
	}
	sweep := func() []flow.Action {
		facts, err := k.SweepFacts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return flow.PlanSweep(facts)
	}
	old := sweep()
	if len(old) != 1 || old[0].Kind != flow.EndIntent || !strings.Contains(old[0].Why, "it is held") {
		t.Fatalf("plan %+v", old)
	}
	if err := k.Sweep(t.Context(), old); err != nil {
		t.Error(err)
	}
	if got := k.there(t); len(got) != 3 {
		t.Errorf("left %v", got)
	}
	// And one whose plan is older than the hold.
	if err := errors.Join(k.Catalog.WithdrawHold(t.Context(), h), k.Catalog.PutIntent(t.Context(), deletion(first))); err != nil {
		t.Fatal(err)
	}
	old = sweep()
	if err := k.Catalog.PutHold(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if err := k.Sweep(t.Context(), old); !errors.Is(err, backup.ErrHeld) {
		t.Errorf("got %v", err)
	}
	if got := k.there(t); len(got) != 3 {
		t.Errorf("left %v", got)
	}
}

// TestAHoldThatSucceededIsNeverLost lets hold and delete meet at every pair of
// their steps.
func TestAHoldThatSucceededIsNeverLost(t *testing.T) {
	wins := map[string]int{}
	for range 200 {
		k := newKeeping(t)
		k.put(t, first)
		var both sync.WaitGroup
		var held, deleted error
		both.Go(func() { held = k.Hold(t.Context(), backup.Hold{Backup: first, By: "ann", Time: time.Now()}) })
		both.Go(func() { deleted = k.Delete(t.Context(), first) })
		both.Wait()
		there := k.there(t)
		switch {
		case held == nil && len(there) == 0:
			t.Fatal("the hold succeeded and the backup is gone")
		case deleted == nil && len(there) > 0:
			t.Fatal("the delete succeeded and the backup is there")
		}
		wins[fmt.Sprintf("held %v, deleted %v", held == nil, deleted == nil)]++
	}
	t.Logf("%v", wins)
}

// TestPruneStoppedAnywhere fails and cancels a prune at each of its points.
func TestPruneStoppedAnywhere(t *testing.T) {
	for n := 1; ; n++ {
		k := three(t)
		remove := k.plan(t, 1)
		i := &fault.Injector{Action: "error", At: n}
		done, err := k.Prune(fault.With(t.Context(), i), remove)
		if len(i.Passed()) < n {
			if n < 20 || err != nil {
				t.Fatalf("only %d points, %v", n-1, err)
			}
			t.Logf("%d points", n-1)
			return
		}
		point := i.Passed()[n-1]
		if (err == nil) != (done[0].Done && done[1].Done) || err != nil && done[0].Done == done[1].Done {
			t.Errorf("%s: got %+v, %v: one may fail, and the error says so", point, done, err)
		}
		want := []backup.ID{third}
		for _, d := range done {
			if !d.Done {
				want = append([]backup.ID{d.ID}, want...)
			}
		}
		if errors.Is(err, backup.ErrLeft) {
			t.Errorf("%s: %v", point, err)
		}
		if got := k.there(t); !slices.Equal(got, want) {
			t.Errorf("%s: left %v, want %v (%v)", point, got, want, err)
		}
	}
}

func TestPruneThatIsInterruptedEndsWhatItBegan(t *testing.T) {
	k := three(t)
	ctx, cancel := context.WithCancel(t.Context())
	k.Progress = func(_, detail string) {
		if detail == string(first) {
			cancel()
		}
	}
	done, err := k.Prune(ctx, k.plan(t, 1))
	if !errors.Is(err, context.Canceled) || len(done) != 2 || done[0].Done || done[1].Done || !strings.Contains(done[1].Error, "not begun") {
		t.Errorf("got %+v, %v", done, err)
	}
	if got := k.there(t); len(got) != 3 {
		t.Errorf("left %v", got)
	}
	b, err := json.Marshal(done)
	if err != nil || !strings.Contains(string(b), `"id":"`+string(first)+`"`) || !strings.Contains(string(b), `"why":`) || !strings.Contains(string(b), `"done":false`) {
		t.Errorf("as JSON %s, %v", b, err)
	}
}

func TestPruneBesideABackupDeletesNothing(t *testing.T) {
	k := three(t)
	release, err := k.State.Lock("backup-main")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if _, err := k.Prune(t.Context(), k.plan(t, 1)); !errors.Is(err, backup.ErrInUse) || !strings.Contains(err.Error(), "is running") {
		t.Errorf("got %v", err)
	}
	if got := k.there(t); len(got) != 3 {
		t.Errorf("left %v", got)
	}
}
