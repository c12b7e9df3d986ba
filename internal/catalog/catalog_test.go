package catalog_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
)

const (
	older = backup.ID("20261121T211704Z-aaaaaa")
	id    = backup.ID("20261122T211704Z-5f3a9c") // of the golden manifest
	newer = backup.ID("20261123T211704Z-000000")
)

func TestABackupGoesThroughItsLife(t *testing.T) {
	c, _ := open(t)
	ctx := t.Context()
	m := manifest(t, id)

	if _, err := c.Backup(ctx, id); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "cleancut list") {
		t.Errorf("before all: got %v (hint %q), want not found and the hint to list", err, backup.HintOf(err))
	}
	f, err := c.PutSideFile(ctx, id, 0, "/etc/pg_hba.conf", []byte("local all all peer\n"))
	if err != nil || f.Name != "0" || f.Path != "/etc/pg_hba.conf" {
		t.Fatalf("side file: got %+v, %v", f, err)
	}
	if _, err := c.Backup(ctx, id); !errors.Is(err, backup.ErrIncomplete) {
		t.Errorf("with a side file only: got %v, want %v", err, backup.ErrIncomplete)
	}
	m.SideFiles = []backup.SideFile{f}
	digest, err := c.PutManifest(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	e, err := c.Backup(ctx, id)
	if !errors.Is(err, backup.ErrIncomplete) || !strings.Contains(backup.HintOf(err), "cleancut sweep") || e.Digest != digest {
		t.Errorf("without complete.json: got %v (hint %q), want incomplete, the hint to sweep and the manifest", err, backup.HintOf(err))
	}
	done := backup.Complete{ID: id, Digest: digest, Completed: m.Created.Add(time.Second)}
	if err := c.PutComplete(ctx, done); err != nil {
		t.Fatal(err)
	}
	e, err = c.Backup(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if e.ID != id || !reflect.DeepEqual(e.Manifest, m) || e.Digest != digest || e.Complete == nil || *e.Complete != done || e.Verdicts != nil || e.Dumps != nil {
		t.Errorf("got %+v", e)
	}
	content, err := c.SideFile(ctx, id, e.Manifest.SideFiles[0])
	if err != nil || string(content) != "local all all peer\n" {
		t.Errorf("side file: got %q, %v", content, err)
	}
	if err := c.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Backup(ctx, id); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("after removal: got %v, want %v", err, backup.ErrNotFound)
	}
	if err := c.Remove(ctx, id); err != nil {
		t.Errorf("removed again: %v", err)
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	c, _ := open(t)
	ctx := t.Context()
	e := whole(t, c, id)
	v := backup.Verdict{Backup: id, Time: time.Unix(1, 0)}
	i := backup.Intent{ID: id, Cluster: "main"}
	for range 2 {
		_, errManifest := c.PutManifest(ctx, e.Manifest)
		_, errFile := c.PutSideFile(ctx, id, 0, "/x", nil)
		errs := map[string]error{
			"manifest": errManifest, "complete": c.PutComplete(ctx, *e.Complete), "side file": errFile,
			"verdict": c.PutVerdict(ctx, v), "dump": c.PutDumpPart(ctx, id, "d", "x", strings.NewReader("")), "intent": c.PutIntent(ctx, i),
		}
		if errFile == nil {
			continue // the first time it is new
		}
		for what, err := range errs {
			if !errors.Is(err, backup.ErrExists) {
				t.Errorf("%s: got %v, want %v", what, err, backup.ErrExists)
			}
		}
	}
}

func TestCompleteBelongsToTheManifestAsItIsStored(t *testing.T) {
	c, root := open(t)
	ctx := t.Context()
	digest, err := c.PutManifest(ctx, manifest(t, id))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PutComplete(ctx, backup.Complete{ID: id, Digest: strings.Repeat("0", 64)}); err == nil || !strings.Contains(err.Error(), digest) {
		t.Errorf("put with another digest: got %v, want an error that names the manifest's", err)
	}
	if err := c.PutComplete(ctx, backup.Complete{ID: newer, Digest: digest}); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("put without a manifest: got %v, want %v", err, backup.ErrNotFound)
	}
	if _, err := c.Complete(ctx, id); !errors.Is(err, backup.ErrIncomplete) {
		t.Errorf("get without one: got %v, want %v", err, backup.ErrIncomplete)
	}
	want := backup.Complete{ID: id, Digest: digest}
	if err := c.PutComplete(ctx, want); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Complete(ctx, id); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}

	// One blank more: the same manifest to a reader, and yet not the one.
	path := filepath.Join(root, "clusters/main/backups", string(id), "manifest.json")
	overwrite(t, path, append(read(t, path), ' '))
	_, errComplete := c.Complete(ctx, id)
	e, errBackup := c.Backup(ctx, id)
	for _, err := range []error{errComplete, errBackup} {
		if !errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrIncomplete) || backup.HintOf(err) == "" {
			t.Errorf("changed manifest: got %v, want %v with a hint and not incomplete", err, backup.ErrDamage)
		}
	}
	if e.Complete != nil {
		t.Errorf("changed manifest: got %+v, want no complete", e.Complete)
	}
}

func TestVerdictsComeNewestLastAndABadOneHindersNoRestore(t *testing.T) {
	c, root := open(t)
	ctx := t.Context()
	whole(t, c, id)
	now := time.Date(2026, 11, 22, 22, 0, 0, 0, time.FixedZone("CET", 3600))
	for _, offset := range []time.Duration{2 * time.Hour, time.Microsecond, 0, 3 * time.Hour} {
		v := backup.Verdict{Backup: id, Level: backup.LevelFull, Time: now.Add(offset).UTC(), EndLSN: 7, Checks: []backup.Check{{Name: "start", Result: backup.Passed}}}
		if err := c.PutVerdict(ctx, v); err != nil {
			t.Fatal(err)
		}
	}
	verdicts, err := c.Verdicts(ctx, id)
	if err != nil || len(verdicts) != 4 {
		t.Fatalf("got %v, %v, want 4 verdicts", verdicts, err)
	}
	for i, offset := range []time.Duration{0, time.Microsecond, 2 * time.Hour, 3 * time.Hour} {
		if got, want := verdicts[i].Time, now.Add(offset); !got.Equal(want) || verdicts[i].EndLSN != 7 || !verdicts[i].Good() {
			t.Errorf("verdict %d: got %+v, want that of %v", i, verdicts[i], want)
		}
	}
	overwrite(t, filepath.Join(root, "clusters/main/backups", string(id), "verdicts/20261122T210000.000001Z.json"), []byte(`{"backup`))
	e, err := c.Backup(ctx, id)
	if err != nil || len(e.Verdicts) != 3 || !errors.Is(e.VerdictErr, backup.ErrDamage) {
		t.Errorf("got %d verdicts, %v and %v, want 3, no error and %v", len(e.Verdicts), err, e.VerdictErr, backup.ErrDamage)
	}
}

func TestAVerdictOfANewerProgramIsStillRead(t *testing.T) {
	c, root := open(t)
	put(t, catalog.NewDir(root), "clusters/main/backups/"+string(id)+"/verdicts/x.json", `{"backup": "`+string(id)+`", "level": "rows", "mood": "fine"}`)
	got, err := c.Verdicts(t.Context(), id)
	if err != nil || len(got) != 1 || got[0].Level != backup.LevelRows {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestASideFileIsCheckedAgainstItsDigest(t *testing.T) {
	c, root := open(t)
	f, err := c.PutSideFile(t.Context(), id, 12, "/etc/x", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, filepath.Join(root, "clusters/main/backups", string(id), "files/12"), []byte("Content"))
	if got, err := c.SideFile(t.Context(), id, f); !errors.Is(err, backup.ErrDamage) {
		t.Errorf("got %q, %v, want %v", got, err, backup.ErrDamage)
	}
	for _, name := range []string{"", "../manifest.json", "../../x/files/1", "/etc/passwd"} {
		if got, err := c.SideFile(t.Context(), id, backup.SideFile{Name: name}); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("name %q from a manifest: got %q, %v, want %v", name, got, err, backup.ErrUsage)
		}
	}
}

func TestADumpIsWholeWithItsManifest(t *testing.T) {
	c, root := open(t)
	ctx := t.Context()
	whole(t, c, id)
	begun := backup.DumpBegun{Backup: id, Name: "d", Host: "h"}
	m := backup.DumpManifest{Version: backup.DumpVersion, Name: "d", Backup: id, Cluster: "main", Format: backup.DumpSQL, Parts: []backup.DumpPart{{Name: "all.sql.zst", Size: 4}}}
	if err := errors.Join(c.BeginDump(ctx, begun), c.PutDumpPart(ctx, id, "d", "all.sql.zst", strings.NewReader("dump"))); err != nil {
		t.Fatal(err)
	}
	if err := c.PutDumpPart(ctx, id, "d", "x", failing{}); !errors.Is(err, errPipe) {
		t.Errorf("a part that breaks: got %v, want %v", err, errPipe)
	}
	if err := c.BeginDump(ctx, begun); !errors.Is(err, backup.ErrExists) {
		t.Errorf("begun twice: got %v, want %v", err, backup.ErrExists)
	}
	if dumps, err := c.Dumps(ctx, id); err != nil || len(dumps) != 1 || dumps[0].Complete || dumps[0].Size < 4 || dumps[0].Modified.IsZero() {
		t.Errorf("before its manifest: got %+v, %v", dumps, err)
	}
	if _, err := c.DumpManifest(ctx, id, "d"); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v, want %v", err, backup.ErrNotFound)
	}
	if err := c.PutDumpManifest(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "clusters/main/backups", string(id), "dumps/a.sql.zst"), []byte("an old one"), 0o600); err != nil {
		t.Fatal(err)
	}
	dumps, err := c.Dumps(ctx, id)
	if err != nil || len(dumps) != 2 || dumps[0].Name != "a.sql.zst" || !dumps[0].File || !dumps[0].Complete || dumps[0].Size != 10 || dumps[1].Name != "d" || !dumps[1].Complete || dumps[1].File {
		t.Errorf("got %+v, %v", dumps, err)
	}
	if e, err := c.Backup(ctx, id); err != nil || !reflect.DeepEqual(e.Dumps, dumps) {
		t.Errorf("entry: got %+v, %v, want %+v", e.Dumps, err, dumps)
	}
	if got, err := c.DumpManifest(ctx, id, "d"); err != nil || !reflect.DeepEqual(got.Parts, m.Parts) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := c.DumpBegun(ctx, id, "d"); err != nil || got != begun {
		t.Errorf("got %+v, %v", got, err)
	}
	r, err := c.DumpPart(ctx, id, "d", "all.sql.zst")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil || string(b) != "dump" {
		t.Errorf("got %q, %v", b, err)
	}
	k := backup.DumpCheck{Backup: id, Dump: "d", Checks: []backup.Check{{Name: "x", Result: backup.Passed}}}
	if err := c.PutDumpCheck(ctx, k); err != nil {
		t.Fatal(err)
	}
	if got, err := c.DumpChecks(ctx, id, "d"); err != nil || len(got) != 1 || got[0].Result() != backup.Passed {
		t.Errorf("got %+v, %v", got, err)
	}
	if again, err := c.Dumps(ctx, id); err != nil || !reflect.DeepEqual(again, dumps) {
		t.Errorf("a check changes what is told of the dump: %+v, %v", again, err)
	}
	overwrite(t, filepath.Join(root, "clusters/main/backups", string(id), "dumps/d/manifest.json"), []byte(`{"version":1,"name":"e"}`))
	if _, err := c.DumpManifest(ctx, id, "d"); !errors.Is(err, backup.ErrDamage) {
		t.Errorf("another's manifest: got %v, want %v", err, backup.ErrDamage)
	}
	if err := c.PutDumpPart(ctx, id, "a/b", "x", strings.NewReader("")); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("got %v, want %v", err, backup.ErrUsage)
	}
}

func TestADumpWhoseRemovalIsInterruptedIsNeverTakenForWhole(t *testing.T) {
	for n := 1; ; n++ {
		c, _ := open(t)
		whole(t, c, id)
		m := backup.DumpManifest{Version: backup.DumpVersion, Name: "d", Backup: id, Cluster: "main", Format: backup.DumpSQL, Parts: []backup.DumpPart{{Name: "x"}}}
		err := errors.Join(c.BeginDump(t.Context(), backup.DumpBegun{Backup: id, Name: "d"}), c.PutDumpPart(t.Context(), id, "d", "x", strings.NewReader("x")), c.PutDumpManifest(t.Context(), m))
		if err != nil {
			t.Fatal(err)
		}
		i := &fault.Injector{Action: "error", At: n}
		err = c.RemoveDump(fault.With(t.Context(), i), id, "d")
		dumps, listed := c.Dumps(t.Context(), id)
		if listed != nil {
			t.Fatal(listed)
		}
		switch {
		case err == nil && (len(dumps) > 0 || n != 9): // a list and three deletes, each with a point before and after
			t.Fatalf("point %d: left %+v", n, dumps)
		case err == nil:
			return
		case len(dumps) > 0 && dumps[0].Complete && n > 3:
			t.Errorf("point %d: it still looks whole", n)
		case len(dumps) > 0:
			if _, err := c.DumpBegun(t.Context(), id, "d"); err != nil {
				t.Errorf("point %d: nobody knows whose it is: %v", n, err)
			}
		}
		if err := c.RemoveDump(t.Context(), id, "d"); err != nil {
			t.Errorf("point %d, again: %v", n, err)
		}
		if dumps, err := c.Dumps(t.Context(), id); err != nil || len(dumps) > 0 {
			t.Errorf("point %d: left %+v, %v", n, dumps, err)
		}
	}
}

func TestIntentsAreThereUntilTheyEnd(t *testing.T) {
	c, root := open(t)
	ctx := t.Context()
	want := []backup.Intent{
		{ID: older, Cluster: "main", Host: "db1", PID: 7, Started: older.Time(), Tags: backup.Tags{backup.TagBackup: string(older)}, Deletes: true},
		{ID: id, Cluster: "main", Host: "db1", PID: 8, Started: id.Time(), Mounts: []string{"/srv/pg"}},
	}
	for _, i := range []int{1, 0} {
		if err := c.PutIntent(ctx, want[i]); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := c.Intents(ctx); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	put(t, catalog.NewDir(root), "clusters/main/intents/"+string(newer)+".json", "")
	if got, err := c.Intents(ctx); !errors.Is(err, backup.ErrDamage) || !reflect.DeepEqual(got, want) {
		t.Errorf("with a torn one: got %+v, %v, want both others and %v", got, err, backup.ErrDamage)
	}
	for _, i := range []backup.ID{older, id, newer, id} {
		if err := c.EndIntent(ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := c.Intents(ctx); err != nil || len(got) != 0 {
		t.Errorf("got %+v, %v, want none", got, err)
	}
}

func TestOneClusterDoesNotSeeAnother(t *testing.T) {
	c, root := open(t)
	whole(t, c, id)
	other := catalog.New(catalog.NewDir(root), "mai")
	if got, err := other.Backups(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v, want none", got, err)
	}
	if _, err := other.PutManifest(t.Context(), manifest(t, id)); err == nil {
		t.Error("a manifest of another cluster was taken")
	}
	if err := other.PutIntent(t.Context(), backup.Intent{ID: id, Cluster: "main"}); err == nil {
		t.Error("an intent of another cluster was taken")
	}
}

func TestMalformedNamesAreRefusedByEveryMethod(t *testing.T) {
	root := t.TempDir()
	ctx := t.Context()
	for _, test := range []struct {
		cluster string
		id      backup.ID
	}{{"main", ""}, {"main", "../x"}, {"main", "latest"}, {"", id}, {"../main", id}, {"a/b", id}} {
		c := catalog.New(catalog.NewDir(root), test.cluster)
		m := manifest(t, id)
		m.ID, m.Cluster = test.id, test.cluster
		errs := map[string]error{
			"put complete": c.PutComplete(ctx, backup.Complete{ID: test.id}), "retract": c.Retract(ctx, test.id), "remove": c.Remove(ctx, test.id),
			"put verdict": c.PutVerdict(ctx, backup.Verdict{Backup: test.id}), "end intent": c.EndIntent(ctx, test.id),
			"put intent": c.PutIntent(ctx, backup.Intent{ID: test.id, Cluster: test.cluster}), "put dump": c.PutDumpPart(ctx, test.id, "x", "y", strings.NewReader("")),
		}
		_, errs["put manifest"] = c.PutManifest(ctx, m)
		_, _, errs["manifest"] = c.Manifest(ctx, test.id)
		_, errs["complete"] = c.Complete(ctx, test.id)
		_, errs["verdicts"] = c.Verdicts(ctx, test.id)
		_, errs["put side file"] = c.PutSideFile(ctx, test.id, 0, "/x", nil)
		_, errs["side file"] = c.SideFile(ctx, test.id, backup.SideFile{Name: "0"})
		_, errs["dump"] = c.DumpPart(ctx, test.id, "x", "y")
		_, errs["dump manifest"] = c.DumpManifest(ctx, test.id, "x")
		errs["remove dump"] = c.RemoveDump(ctx, test.id, "x")
		_, errs["dumps"] = c.Dumps(ctx, test.id)
		_, errs["backup"] = c.Backup(ctx, test.id)
		if test.id == id {
			_, errs["backups"] = c.Backups(ctx)
			_, errs["intents"] = c.Intents(ctx)
		}
		for method, err := range errs {
			if !errors.Is(err, backup.ErrUsage) {
				t.Errorf("cluster %q, id %q, %s: got %v, want %v", test.cluster, test.id, method, err, backup.ErrUsage)
			}
		}
	}
	if got := files(t, root); got != "" {
		t.Errorf("something was written: %q", got)
	}
}

func TestEveryStoreCallIsBetweenTwoFaultPoints(t *testing.T) {
	c, _ := open(t)
	i := &fault.Injector{}
	ctx := fault.With(t.Context(), i)
	m := manifest(t, id)
	_ = c.PutIntent(ctx, backup.Intent{ID: id, Cluster: "main"})
	_, _ = c.PutSideFile(ctx, id, 0, "/x", nil)
	digest, _ := c.PutManifest(ctx, m)
	_ = c.PutComplete(ctx, backup.Complete{ID: id, Digest: digest})
	_ = c.PutVerdict(ctx, backup.Verdict{Backup: id})
	_ = c.PutDumpPart(ctx, id, "x", "y", strings.NewReader(""))
	_, _ = c.Backup(ctx, id)
	_, _ = c.Backups(ctx)
	_, _ = c.Intents(ctx)
	_ = c.Retract(ctx, id)
	_ = c.EndIntent(ctx, id)
	var want []string
	entry := []string{"catalog.get verdict", "catalog.get manifest", "catalog.get complete"}
	for _, name := range slices.Concat(
		[]string{"catalog.put intent", "catalog.put file", "catalog.put manifest", "catalog.get manifest", "catalog.put complete", "catalog.put verdict", "catalog.put dump"},
		[]string{"catalog.list backup"}, entry, []string{"catalog.list backups"}, entry,
		[]string{"catalog.list intents", "catalog.get intent", "catalog.delete complete", "catalog.delete intent"},
	) {
		want = append(want, name, name+" done")
	}
	if got := i.Passed(); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAFaultAfterAGetClosesTheReader(t *testing.T) {
	c, _ := open(t)
	whole(t, c, id)
	before := len(descriptors(t))
	for range 10 {
		ctx := fault.With(t.Context(), &fault.Injector{Action: "error", At: 2})
		if _, _, err := c.Manifest(ctx, id); !errors.Is(err, fault.ErrInjected) {
			t.Fatalf("got %v, want %v", err, fault.ErrInjected)
		}
	}
	if after := len(descriptors(t)); after >= before+10 {
		t.Errorf("%d descriptors are open, before there were %d", after, before)
	}
}

func open(t *testing.T) (c *catalog.Catalog, root string) {
	t.Helper()
	root = t.TempDir()
	return catalog.New(catalog.NewDir(root), "main"), root
}

// manifest is the golden one under another id.
func manifest(t *testing.T, id backup.ID) backup.Manifest {
	t.Helper()
	m, err := backup.DecodeManifest(read(t, "../backup/testdata/manifest-v5-raid0.json"))
	if err != nil {
		t.Fatal(err)
	}
	m.ID, m.SideFiles = id, nil
	return m
}

// whole stores a complete backup.
func whole(t *testing.T, c *catalog.Catalog, id backup.ID) catalog.Entry {
	t.Helper()
	digest, err := c.PutManifest(t.Context(), manifest(t, id))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PutComplete(t.Context(), backup.Complete{ID: id, Digest: digest}); err != nil {
		t.Fatal(err)
	}
	e, err := c.Backup(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// overwrite does what no program of ours does.
func overwrite(t *testing.T, path string, b []byte) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func descriptors(t *testing.T) []os.DirEntry {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return entries
}
