package main_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/catalog/s3test"
	"cleancut/internal/lab/labtest"
)

// TestACatalogIsRebuiltFromTheSnapshots loses the whole catalog of a real
// backup and restores from what the snapshots say.
func TestACatalogIsRebuiltFromTheSnapshots(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	id := string(p.backup(t))
	record := filepath.Join(p.catalog, "clusters", "main", "backups", id, "manifest.json")
	want, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(p.catalog); err != nil {
		t.Fatal(err)
	}
	if o := p.must(t, "catalog", "rebuild", "--dry-run"); !strings.Contains(o.out, "rebuild  "+id) {
		t.Errorf("the plan does not name the backup:\n%s", o.out)
	}
	if _, err := os.Stat(p.catalog); err == nil {
		t.Error("--dry-run made a catalog")
	}
	o := p.must(t, "catalog", "rebuild", "--json")
	golden(t, "json/rebuild.txt", shape(t, o.out))
	got, err := os.ReadFile(record)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the manifest came back with %d bytes, %v, want %d", len(got), err, len(want))
	}
	if o := p.must(t, "list"); !strings.Contains(o.out, id) || !strings.Contains(o.out, "complete") {
		t.Errorf("list:\n%s", o.out)
	}
	p.must(t, "show", id)
	p.must(t, "verify", id, "--level", "start")
	if o := p.must(t, "catalog", "rebuild"); !strings.Contains(o.out, "there already  "+id) {
		t.Errorf("again:\n%s", o.out)
	}

	p.throughS3(t, id)

	// Another cluster's eyes, then a member that is gone.
	if o := p.must(t, "catalog", "rebuild", "--cluster", "else"); !strings.Contains(o.out, "no snapshots of cluster else") || !strings.Contains(o.out, "other clusters too: main") {
		t.Errorf("another cluster:\n%s", o.out)
	}
	if err := os.RemoveAll(p.catalog); err != nil {
		t.Fatal(err)
	}
	sidecar := filepath.Join(p.pool, "snapshots", string(p.inventory(t).Snapshots[0].ID)+".json")
	text, err := os.ReadFile(sidecar)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sidecar, bytes.ReplaceAll(text, []byte(backup.Digest(want)), bytes.Repeat([]byte("0"), 64)), 0o600); err != nil {
		t.Fatal(err)
	}
	o = p.run(t, "catalog", "rebuild", "--json")
	var plan struct {
		OK      *bool
		Actions []struct{ Action, Why string }
	}
	if err := json.Unmarshal([]byte(o.out), &plan); err != nil || o.code != 4 || plan.OK == nil || *plan.OK || len(plan.Actions) != 1 || plan.Actions[0].Action != "cannot" {
		t.Errorf("with a digest that differs: exit %d, %v\n%s%s", o.code, err, o.out, o.err)
	}
	if _, err := os.Stat(record); err == nil {
		t.Error("a manifest was put that nothing proves")
	}
}

// throughS3 rebuilds into an empty bucket, dumps into it and lists it.
func (p *production) throughS3(t *testing.T, id string) {
	t.Helper()
	server, err := s3test.Fake()
	if err != nil {
		t.Fatal(err)
	}
	endpoint, stop, err := s3test.Serve(server)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	env := []string{"CLEANCUT_CATALOG=" + s3test.Location(endpoint, "of/production")}
	for k, v := range s3test.Environment() {
		env = append(env, k+"="+v)
	}
	if o := p.runWith(t, env, "list"); o.code != 0 || !strings.Contains(o.out, "no backups") {
		t.Errorf("list of an empty bucket: exit %d\n%s%s", o.code, o.out, o.err)
	}
	for _, args := range [][]string{{"catalog", "rebuild"}, {"show", id}, {"dump", id}, {"doctor", "--for", "restore"}, {"sweep"}, {"list"}} {
		o := p.runWith(t, env, args...)
		if o.code != 0 {
			t.Errorf("%v: exit %d\n%s%s", args, o.code, o.out, o.err)
		}
		if args[0] == "list" && (!strings.Contains(o.out, id) || !strings.Contains(o.out, "complete")) {
			t.Errorf("list:\n%s", o.out)
		}
	}
}
