package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
)

func TestOneBadBackupDoesNotHideTheOthers(t *testing.T) {
	ids := []backup.ID{"20260101T000000Z-000001", "20260102T000000Z-000002", "20260103T000000Z-000003", "20260104T000000Z-000004", "20260105T000000Z-000005", "20260106T000000Z-000006"}
	c, root := open(t)
	file := func(id backup.ID, name string) string {
		return filepath.Join(root, "clusters/main/backups", string(id), name)
	}
	for _, i := range ids {
		whole(t, c, i)
	}
	torn := file(ids[1], "manifest.json")
	overwrite(t, torn, read(t, torn)[:1000])
	overwrite(t, file(ids[2], "manifest.json"), []byte(`{"version": 99}`))
	overwrite(t, file(ids[3], "manifest.json"), read(t, file(ids[0], "manifest.json")))
	overwrite(t, file(ids[4], "complete.json"), []byte(`{"id": `))
	if err := os.Remove(file(ids[5], "complete.json")); err != nil {
		t.Fatal(err)
	}

	entries, err := c.Backups(t.Context())
	if err != nil || len(entries) != len(ids) {
		t.Fatalf("got %d entries, %v, want %d", len(entries), err, len(ids))
	}
	for i, want := range []error{nil, backup.ErrDamage, backup.ErrUnsupported, backup.ErrDamage, backup.ErrDamage, backup.ErrIncomplete} {
		e := entries[i]
		if e.ID != ids[i] {
			t.Errorf("entry %d: got %s, want %s", i, e.ID, ids[i])
		}
		if !errors.Is(e.Err, want) || (want != nil && backup.HintOf(e.Err) == "") {
			t.Errorf("%s: got %v (hint %q), want %v with a hint", e.ID, e.Err, backup.HintOf(e.Err), want)
		}
		for _, wrong := range []error{backup.ErrVoid, backup.ErrUsage} {
			if errors.Is(e.Err, wrong) {
				t.Errorf("%s: %v is also %v", e.ID, e.Err, wrong)
			}
		}
		if (e.Complete != nil) != (want == nil) {
			t.Errorf("%s: complete is %v", e.ID, e.Complete)
		}
		if _, err := c.Backup(t.Context(), ids[i]); fmt.Sprint(err) != fmt.Sprint(e.Err) {
			t.Errorf("%s alone: got %v, want %v", e.ID, err, e.Err)
		}
	}
}

func TestBackupsAreListedOldestFirstAndForeignThingsAreSaid(t *testing.T) {
	c, root := open(t)
	for _, i := range []backup.ID{newer, older, id} {
		whole(t, c, i)
	}
	put(t, catalog.NewDir(root), "clusters/main/backups/README", "a file beside the backups")
	put(t, catalog.NewDir(root), "clusters/main/backups/zzz/manifest.json", "{}")
	entries, err := c.Backups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []backup.ID
	for _, e := range entries {
		got = append(got, e.ID)
	}
	if want := []backup.ID{older, id, newer, "zzz"}; !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	if entries[3].Err == nil || entries[2].Err != nil {
		t.Errorf("got %v and %v, want only the foreign one to be wrong", entries[3].Err, entries[2].Err)
	}
}

// A fault at every point of a removal: what is left is never a backup that
// may be restored, always says which snapshots were its own until the last,
// and a second removal ends it.
func TestARemovalCutShortAnywhereLeavesAnIncompleteBackup(t *testing.T) {
	for n := 1; ; n++ {
		c, root := open(t)
		whole(t, c, id)
		if _, err := c.PutSideFile(t.Context(), id, 0, "/x", nil); err != nil {
			t.Fatal(err)
		}
		if err := c.PutVerdict(t.Context(), backup.Verdict{Backup: id}); err != nil {
			t.Fatal(err)
		}
		if err := c.PutDumpPart(t.Context(), id, "zzz", "x", strings.NewReader("")); err != nil {
			t.Fatal(err)
		}
		err := c.Remove(fault.With(t.Context(), &fault.Injector{Action: "error", At: n}), id)
		if err == nil {
			if n != 13 { // list and five deletes, each with a point before and after
				t.Errorf("ended at point %d, want 13", n)
			}
			return
		}
		if !errors.Is(err, fault.ErrInjected) {
			t.Fatalf("point %d: %v", n, err)
		}
		e, err := c.Backup(t.Context(), id)
		gone, left := errors.Is(err, backup.ErrNotFound), files(t, root) != ""
		switch {
		case n == 1 && err != nil:
			t.Errorf("before the first deletion: %v", err)
		case n > 1 && !gone && (!errors.Is(err, backup.ErrIncomplete) || len(e.Manifest.Snapshots) != 4):
			t.Errorf("point %d: got %v and %d snapshots, want %v and 4", n, err, len(e.Manifest.Snapshots), backup.ErrIncomplete)
		case gone && left:
			t.Errorf("point %d: not found, and yet there is %q", n, files(t, root))
		}
		if err := c.Remove(t.Context(), id); err != nil || files(t, root) != "" {
			t.Errorf("point %d: again: %v, left %q", n, err, files(t, root))
		}
	}
}

func TestADoneContextIsAnErrorOfTheListAndNotOfTheBackups(t *testing.T) {
	c, _ := open(t)
	whole(t, c, id)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := c.Backups(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, %v, want %v", got, err, context.Canceled)
	}
}

func TestARecordThatIsFarTooLargeIsNotReadIntoMemory(t *testing.T) {
	c, root := open(t)
	whole(t, c, id)
	if err := os.Truncate(filepath.Join(root, "clusters/main/backups", string(id), "manifest.json"), 17<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Backup(t.Context(), id); !errors.Is(err, backup.ErrDamage) {
		t.Errorf("got %v, want %v", err, backup.ErrDamage)
	}
}
