package flow_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/provider"
	"cleancut/internal/state"
)

// goldenSet returns a manifest that was once written, its bytes, and the
// snapshots of its backup as they are when it is complete.
func goldenSet(t *testing.T) (backup.Manifest, []byte, []provider.Snapshot) {
	t.Helper()
	stored, err := os.ReadFile("../backup/testdata/manifest-v5-raid0.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := backup.DecodeManifest(stored)
	if err != nil {
		t.Fatal(err)
	}
	return m, stored, setOf(t, m, stored)
}

func setOf(t *testing.T, m backup.Manifest, stored []byte) []provider.Snapshot {
	t.Helper()
	members := m.Topology.Members()
	tags, err := backup.ManifestTags(stored, backup.Digest(stored), len(members))
	if err != nil {
		t.Fatal(err)
	}
	var out []provider.Snapshot
	for i, s := range m.Snapshots {
		all := backup.SnapshotTags(m.ID, m.Cluster, members[s.Member], len(members))
		maps.Copy(all, tags[i])
		out = append(out, provider.Snapshot{ID: s.ID, Volume: s.Volume.ID, Size: s.Volume.Size, State: provider.Completed, Tags: all})
	}
	return out
}

// tampered returns the set of a manifest that was changed before it was cut.
func tampered(t *testing.T, m backup.Manifest, stored []byte, from, to string) []provider.Snapshot {
	t.Helper()
	if !bytes.Contains(stored, []byte(from)) {
		t.Fatalf("the manifest has no %q", from)
	}
	return setOf(t, m, bytes.ReplaceAll(stored, []byte(from), []byte(to)))
}

func TestPlanRebuild(t *testing.T) {
	m, stored, _ := goldenSet(t)
	digest := backup.Digest(stored)
	entry := func(e catalog.Entry) map[backup.ID]catalog.Entry { return map[backup.ID]catalog.Entry{m.ID: e} }
	for _, c := range []struct {
		name  string
		facts func(t *testing.T, set []provider.Snapshot) flow.RebuildFacts
		kind  flow.RebuildKind
		err   error
		why   string
	}{
		{"a whole set and an empty catalog", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildPut, nil, "all completed, with one digest"},
		{"in any order", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			slices.Reverse(s)
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildPut, nil, ""},
		{"the catalog has it", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Entries: entry(catalog.Entry{Digest: digest, Manifest: m, Complete: &backup.Complete{}})}
		}, flow.RebuildThere, nil, "the same manifest"},
		{"the catalog has its manifest only", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Entries: entry(catalog.Entry{Digest: digest, Manifest: m, Err: backup.ErrIncomplete})}
		}, flow.RebuildPut, nil, ""},
		{"the catalog has its verdicts only", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Entries: entry(catalog.Entry{Err: backup.ErrIncomplete})}
		}, flow.RebuildPut, nil, ""},
		{"the catalog has another manifest", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Entries: entry(catalog.Entry{Digest: "other", Manifest: m, Complete: &backup.Complete{}})}
		}, flow.RebuildCannot, backup.ErrDamage, "another manifest"},
		{"the catalog's manifest is damaged", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Entries: entry(catalog.Entry{Err: backup.ErrDamage})}
		}, flow.RebuildCannot, backup.ErrDamage, "stays as it is"},
		{"somebody is at work on it", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: s, Intents: map[backup.ID]bool{m.ID: true}}
		}, flow.RebuildLeave, nil, "sweep --dry-run"},
		{"it never became complete", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			for i := range s {
				delete(s[i].Tags, backup.TagDigest)
			}
			return flow.RebuildFacts{Snapshots: s[:2]}
		}, flow.RebuildLeave, nil, "incomplete"},
		{"its tagging was interrupted", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			delete(s[3].Tags, backup.TagDigest)
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildLeave, nil, "only some"},
		{"a snapshot is pending", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			s[3].State = provider.Pending
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildLeave, nil, "pending"},
		{"a snapshot is broken", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			s[3].State = provider.Broken
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildCannot, backup.ErrDamage, "member 3"},
		{"a member is missing", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: append(s[:1], s[2:]...)}
		}, flow.RebuildCannot, backup.ErrDamage, "missing: member 1"},
		{"a member is there twice", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: append(s, s[0])}
		}, flow.RebuildCannot, backup.ErrDamage, "twice"},
		{"a piece is damaged", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			s[1].Tags["cleancut:manifest.1"] = strings.ToLower(s[1].Tags["cleancut:manifest.1"])
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildCannot, backup.ErrDamage, "manifest in the tags"},
		{"it did not fit", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			for i := range s {
				maps.DeleteFunc(s[i].Tags, func(k, _ string) bool { return strings.HasPrefix(k, "cleancut:manifest.") || k == backup.TagPieces })
			}
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildCannot, backup.ErrNotFound, "not in the tags"},
		{"its snapshots are copies with other ids", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			s[2].ID = "snap-copied"
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildCannot, backup.ErrDamage, "not among these"},
		{"a newer cleancut wrote it", func(t *testing.T, _ []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: tampered(t, m, stored, `"version": 5,`, `"version": 999,`)}
		}, flow.RebuildCannot, backup.ErrUnsupported, "version 999"},
		{"the manifest is of another backup", func(t *testing.T, _ []provider.Snapshot) flow.RebuildFacts {
			return flow.RebuildFacts{Snapshots: tampered(t, m, stored, string(m.ID), "20200101T000000Z-abcdef")}
		}, flow.RebuildCannot, backup.ErrDamage, "20200101T000000Z-abcdef"},
		{"a backup without an id", func(_ *testing.T, s []provider.Snapshot) flow.RebuildFacts {
			for i := range s {
				s[i].Tags[backup.TagBackup] = "my backup"
			}
			return flow.RebuildFacts{Snapshots: s}
		}, flow.RebuildLeave, nil, "do not say"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, set := goldenSet(t)
			facts := c.facts(t, set)
			facts.Cluster = m.Cluster
			plan := flow.PlanRebuild(facts)
			if len(plan.Actions) != 1 || plan.Actions[0].Kind != c.kind || !strings.Contains(plan.Actions[0].Why, c.why) {
				t.Fatalf("got %+v, want %s with %q", plan.Actions, c.kind, c.why)
			}
			a := plan.Actions[0]
			if (a.Kind == flow.RebuildPut) != bytes.Equal(a.Manifest, stored) {
				t.Errorf("%s with a manifest of %d bytes", a.Kind, len(a.Manifest))
			}
			if err := plan.Err(); (err == nil) != (c.err == nil) || c.err != nil && !errors.Is(err, c.err) {
				t.Errorf("got %v, want %v", err, c.err)
			}
		})
	}
}

func TestPlanRebuildNamesOtherClustersAndTouchesNoneOfThem(t *testing.T) {
	m, _, set := goldenSet(t)
	plan := flow.PlanRebuild(flow.RebuildFacts{Cluster: "else", Snapshots: set})
	if len(plan.Actions) != 0 || !slices.Equal(plan.Others, []string{m.Cluster}) || plan.Err() != nil {
		t.Errorf("got %+v, want only the name of %s", plan, m.Cluster)
	}
}

// described is a provider that lists what it is given.
type describedSet struct {
	provider.Provider
	snapshots []provider.Snapshot
}

func (d describedSet) List(ctx context.Context, _ backup.Tags) (provider.Inventory, error) {
	return provider.Inventory{Snapshots: d.snapshots}, ctx.Err()
}

func TestRebuildBringsAWipedCatalogBackByteForByte(t *testing.T) {
	m, stored, set := goldenSet(t)
	dir := t.TempDir()
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "catalog")
	f := &flow.Flow{Provider: describedSet{snapshots: set}, Catalog: catalog.New(catalog.NewDir(root), m.Cluster), State: st, Cluster: m.Cluster, Host: "prod", Log: slog.New(slog.DiscardHandler)}
	rebuild := func() flow.RebuildPlan {
		t.Helper()
		facts, err := f.RebuildFacts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		plan := flow.PlanRebuild(facts)
		if err := errors.Join(f.Rebuild(t.Context(), plan), plan.Err()); err != nil {
			t.Fatal(err)
		}
		return plan
	}
	plan := rebuild()
	if len(m.SideFiles) == 0 || len(plan.Actions[0].Lost) != len(m.SideFiles) || plan.Actions[0].Lost[0] != m.SideFiles[0].Path {
		t.Errorf("lost: got %v, want the side files %v", plan.Actions[0].Lost, m.SideFiles)
	}
	got, err := os.ReadFile(filepath.Join(root, "clusters", m.Cluster, "backups", string(m.ID), "manifest.json"))
	if err != nil || !bytes.Equal(got, stored) {
		t.Errorf("got %d other bytes, %v", len(got), err)
	}
	e, err := f.Catalog.Backup(t.Context(), m.ID)
	if err != nil || e.Complete == nil || e.Digest != backup.Digest(stored) {
		t.Errorf("got %+v, %v", e.Complete, err)
	}
	if _, err := f.Catalog.SideFile(t.Context(), m.ID, m.SideFiles[0]); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "rebuilt") || !strings.Contains(err.Error(), m.SideFiles[0].Path) {
		t.Errorf("a lost side file: got %v (hint %q)", err, backup.HintOf(err))
	}
	if again := rebuild(); again.Actions[0].Kind != flow.RebuildThere {
		t.Errorf("again: got %+v", again.Actions)
	}
	// Half of it is lost: the rest is left as it is.
	if err := f.Catalog.Retract(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	if third := rebuild(); third.Actions[0].Kind != flow.RebuildPut {
		t.Errorf("without complete.json: got %+v", third.Actions)
	}
	if _, err := f.Catalog.Complete(t.Context(), m.ID); err != nil {
		t.Error(err)
	}
}

func TestRebuildStopsWhereADeletionHasBegunSinceThePlan(t *testing.T) {
	m, _, set := goldenSet(t)
	dir := t.TempDir()
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	f := &flow.Flow{Provider: describedSet{snapshots: set}, Catalog: catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), m.Cluster), State: st, Cluster: m.Cluster, Host: "prod", Log: slog.New(slog.DiscardHandler)}
	plan := flow.PlanRebuild(flow.RebuildFacts{Cluster: m.Cluster, Snapshots: set})
	if err := f.Catalog.PutIntent(t.Context(), backup.Intent{ID: m.ID, Cluster: m.Cluster, Host: "other", Started: time.Now(), Deletes: true}); err != nil {
		t.Fatal(err)
	}
	if err := f.Rebuild(t.Context(), plan); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("got %v, want %v", err, backup.ErrInUse)
	}
	if _, err := f.Catalog.Backup(t.Context(), m.ID); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v, want %v", err, backup.ErrNotFound)
	}
	facts, err := f.RebuildFacts(t.Context())
	if err != nil || !facts.Intents[m.ID] {
		t.Errorf("got %+v, %v, want the intent", facts.Intents, err)
	}
	if n, err := strconv.Atoi(set[0].Tags[backup.TagMembers]); err != nil || n != len(set) {
		t.Errorf("the set says %d members, %v", n, err)
	}
}
