package flow_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/provider"
)

const (
	first  backup.ID = "20260101T000000Z-000001"
	second backup.ID = "20260102T000000Z-000002"
	third  backup.ID = "20260103T000000Z-000003"
)

func intent(id backup.ID, host string) backup.Intent {
	return backup.Intent{ID: id, Cluster: "main", Host: host, Tags: backup.Tags{backup.TagBackup: string(id), backup.TagCluster: "main"}}
}

func deletion(id backup.ID) backup.Intent {
	i := intent(id, "prod")
	i.Deletes = true
	return i
}

func standing(id backup.ID, purpose backup.Purpose, ready bool) backup.Copy {
	return backup.Copy{ID: id, Backup: first, Cluster: "main", Host: "prod", Purpose: purpose, Ready: ready, Root: "/srv/" + string(id)}
}

func leased(id backup.ID, ready bool) backup.Copy {
	c := standing(id, backup.ForClone, ready)
	c.Clone = &backup.Clone{Name: "qa", Expires: time.Date(2026, 1, 2, 8, 0, 0, 0, time.UTC)}
	return c
}

func inService(id backup.ID) backup.Copy {
	c := standing(id, backup.ForProduction, true)
	c.Production = &backup.Production{InService: true}
	return c
}

func stored(v provider.Volume) provider.Volume {
	v.Tags = v.Tags.With(backup.TagStorage, "main")
	return v
}

func snapshots(id backup.ID, cluster string, n int) []provider.Snapshot {
	var out []provider.Snapshot
	for range n {
		out = append(out, provider.Snapshot{ID: "snap-x", Tags: backup.Tags{backup.TagBackup: string(id), backup.TagCluster: cluster}})
	}
	return out
}

func volume(copyID backup.ID, host, cluster, attached string) provider.Volume {
	return provider.Volume{ID: "vol-x", Attached: attached, Tags: backup.Tags{backup.TagCopy: string(copyID), backup.TagBackup: string(first), backup.TagHost: host, backup.TagCluster: cluster}}
}

// said is a plan in short: what is done to what.
func said(plan []flow.Action) string {
	var out []string
	for _, a := range plan {
		out = append(out, string(a.Kind)+" "+a.Name)
	}
	return strings.Join(out, "; ")
}

func TestPlanSweep(t *testing.T) {
	states := func(s flow.BackupState) map[backup.ID]flow.BackupState {
		return map[backup.ID]flow.BackupState{first: s}
	}
	for _, c := range []struct {
		name  string
		facts flow.Facts
		want  string
		why   string
	}{
		{"nothing at all", flow.Facts{}, "", ""},
		{"a complete backup and nothing else", flow.Facts{Backups: states(flow.Complete), Inventory: provider.Inventory{Snapshots: snapshots(first, "main", 4)}}, "", ""},
		{"an intent whose backup never came to a manifest", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}}, "remove backup backup " + string(first), "interrupted before it was complete"},
		{"an intent whose backup is incomplete", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Backups: states(flow.Incomplete)}, "remove backup backup " + string(first), "interrupted"},
		{"an intent whose backup was taken", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Backups: states(flow.Taken)}, "finish backup backup " + string(first), "waited for its snapshots"},
		{"an interrupted deletion of one that was taken", flow.Facts{Intents: []backup.Intent{deletion(first)}, Backups: states(flow.Taken)}, "remove backup backup " + string(first), "deletion was interrupted"},
		{"an intent whose backup is complete", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Backups: states(flow.Complete)}, "end intent backup " + string(first), "only its intent was left"},
		{"an intent whose backup cannot be read", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Backups: states(flow.Doubtful)}, "leave backup " + string(first), "may be a good backup"},
		{"an incomplete backup without an intent", flow.Facts{Backups: states(flow.Incomplete), Inventory: provider.Inventory{Snapshots: snapshots(first, "main", 2)}}, "", ""},
		{"an interrupted deletion of a complete backup", flow.Facts{Intents: []backup.Intent{deletion(first)}, Backups: states(flow.Complete)}, "remove backup backup " + string(first), "deletion was interrupted"},
		{"an interrupted deletion of one that cannot be read", flow.Facts{Intents: []backup.Intent{deletion(first)}, Backups: states(flow.Doubtful)}, "remove backup backup " + string(first), "deletion was interrupted"},
		{"an intent of another host", flow.Facts{Intents: []backup.Intent{intent(first, "other")}}, "leave backup " + string(first), "belongs to host other: run sweep there"},
		{"a deletion of another host", flow.Facts{Intents: []backup.Intent{{ID: first, Cluster: "main", Host: "other", Deletes: true}}}, "leave backup " + string(first), "run sweep there"},
		{"an intent while a backup runs", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Busy: map[string]bool{"backup-main": true}}, "leave backup " + string(first), "a backup of this cluster is running"},
		{"a deletion while a backup runs", flow.Facts{Intents: []backup.Intent{deletion(first)}, Busy: map[string]bool{"backup-main": true}}, "leave backup " + string(first), "is running"},
		{"an intent while a backup of another cluster runs", flow.Facts{Intents: []backup.Intent{intent(first, "prod")}, Busy: map[string]bool{"backup-else": true}}, "remove backup backup " + string(first), "interrupted"},
		{"a restored copy that stands", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForRestore, true)}}, "leave copy " + string(second), "restore --undo /srv/" + string(second)},
		{"a standby that stands", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForStandby, true)}}, "leave copy " + string(second), "a standby at /srv/" + string(second)},
		{"a standby that was interrupted", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForStandby, false)}}, "remove copy copy " + string(second), "its standby or its removal was interrupted"},
		{"a restore that was interrupted", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForRestore, false)}}, "remove copy copy " + string(second), "its restore or its removal was interrupted"},
		{"production in service", flow.Facts{Copies: []backup.Copy{inService(second)}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "never removed"},
		{"production whose storage was destroyed", flow.Facts{Copies: []backup.Copy{inService(second)}}, "leave copy " + string(second), "its volumes are gone"},
		{"production that was interrupted before it was in service", flow.Facts{Copies: []backup.Copy{{ID: second, Cluster: "main", Host: "prod", Purpose: backup.ForProduction, Ready: true, Production: &backup.Production{}}}}, "remove copy copy " + string(second), "interrupted"},
		{"volumes in production's place without a ledger", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{stored(volume(second, "prod", "main", ""))}}}, "leave copy " + string(second), "storage destroy main"},
		{"a copy for verify that is ready", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForVerify, true)}}, "remove copy copy " + string(second), "its verify or its removal was interrupted"},
		{"a copy for a dump that is ready", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForDump, true)}}, "remove copy copy " + string(second), "its dump or its removal was interrupted"},
		{"a copy for a golden image that is ready", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForGolden, true)}}, "remove copy copy " + string(second), "its golden or its removal was interrupted"},
		{"a copy that somebody works on", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForVerify, false)}, Busy: map[string]bool{"copy-" + string(second): true}}, "leave copy " + string(second), "in use by a running verify"},
		{"volumes of a copy that this host's state does not know", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", ""), volume(second, "prod", "main", "")}}}, "remove copy copy " + string(second), "knows nothing of it"},
		{"the same, attached", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "attached as /dev/loop7"},
		{"the same, the second of them attached", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", ""), volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "attached as /dev/loop7"},
		{"the same, worked on", flow.Facts{Busy: map[string]bool{"copy-" + string(second): true}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "")}}}, "leave copy " + string(second), "being made or removed"},
		{"the same of another host", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "other", "main", "")}}}, "", ""},
		{"the same of another cluster", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "else", "")}}}, "", ""},
		{"volumes of a copy with a ledger", flow.Facts{Copies: []backup.Copy{standing(second, backup.ForRestore, true)}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "meant to stay"},
		{"a clone that stands", flow.Facts{Copies: []backup.Copy{leased(second, true)}}, "leave copy " + string(second), "clone qa at /srv/" + string(second) + ", meant to stay until 2026-01-02T08:00:00Z"},
		{"a clone that was interrupted", flow.Facts{Copies: []backup.Copy{leased(second, false)}}, "remove copy copy " + string(second), "its clone or its removal was interrupted"},
		{"a clone whose ledger is lost", flow.Facts{Lost: map[backup.ID]flow.LostCopy{second: {Copy: leased(second, true)}}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "remove copy copy " + string(second), "whose ledger is lost"},
		{"the same, used", flow.Facts{Lost: map[backup.ID]flow.LostCopy{second: {Copy: leased(second, true), Used: true}}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "put ledger back copy " + string(second), "somebody uses it"},
		{"the same, worked on", flow.Facts{Lost: map[backup.ID]flow.LostCopy{second: {Copy: leased(second, true)}}, Busy: map[string]bool{"copy-" + string(second): true}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "being made or removed"},
		{"the record of another copy proves nothing", flow.Facts{Lost: map[backup.ID]flow.LostCopy{third: {Copy: leased(third, true)}}, Inventory: provider.Inventory{Volumes: []provider.Volume{volume(second, "prod", "main", "/dev/loop7")}}}, "leave copy " + string(second), "attached as /dev/loop7"},
		{"volumes of storage", flow.Facts{Inventory: provider.Inventory{Volumes: []provider.Volume{{ID: "vol-x", Tags: backup.Tags{backup.TagStorage: "pg", backup.TagHost: "prod"}}}}}, "", ""},
		{"snapshots that the catalog does not know", flow.Facts{Inventory: provider.Inventory{Snapshots: snapshots(third, "main", 4)}}, "leave snapshots of backup " + string(third), "4 snapshots of cluster main that this catalog does not know"},
		{"snapshots of another cluster", flow.Facts{Inventory: provider.Inventory{Snapshots: snapshots(third, "else", 4)}}, "", ""},
		{"snapshots of a backup that cannot be read", flow.Facts{Backups: states(flow.Doubtful), Inventory: provider.Inventory{Snapshots: snapshots(first, "main", 4)}}, "", ""},
		{"one of each, in the order of names", flow.Facts{Intents: []backup.Intent{intent(second, "prod"), intent(first, "prod")}, Copies: []backup.Copy{standing(third, backup.ForDump, false)}, Backups: states(flow.Complete)},
			"end intent backup " + string(first) + "; remove backup backup " + string(second) + "; remove copy copy " + string(third), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.facts.Host, c.facts.Cluster = "prod", "main"
			plan := flow.PlanSweep(c.facts)
			if got := said(plan); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if c.why != "" && (len(plan) == 0 || !strings.Contains(plan[0].Why, c.why)) {
				t.Errorf("got %+v, want a reason with %q", plan, c.why)
			}
		})
	}
}

// anything makes facts at random out of few names, so that they meet.
func anything(r *rand.Rand) flow.Facts {
	ids := []backup.ID{first, second, third}
	id := func() backup.ID { return ids[r.IntN(len(ids))] }
	name := func(of ...string) string { return of[r.IntN(len(of))] }
	x := flow.Facts{Host: "prod", Cluster: "main", Backups: map[backup.ID]flow.BackupState{}, Busy: map[string]bool{}}
	used := map[backup.ID]bool{}
	for range r.IntN(3) {
		i := intent(id(), name("prod", "other"))
		if i.Deletes = r.IntN(3) == 0; !used[i.ID] {
			x.Intents = append(x.Intents, i)
		}
		used[i.ID] = true
	}
	for range r.IntN(3) {
		x.Backups[id()] = flow.BackupState(name(string(flow.Complete), string(flow.Taken), string(flow.Incomplete), string(flow.Doubtful)))
	}
	for range r.IntN(3) {
		x.Copies = append(x.Copies, standing(id(), backup.Purpose(name("restore", "verify", "dump", "standby", "golden")), r.IntN(2) == 0))
	}
	for range r.IntN(3) {
		x.Busy[name("backup-main", "backup-else", "copy-"+string(first), "copy-"+string(second))] = true
	}
	for range r.IntN(3) {
		x.Inventory.Volumes = append(x.Inventory.Volumes, volume(id(), name("prod", "other"), name("main", "else"), name("", "/dev/loop7")))
		x.Inventory.Snapshots = append(x.Inventory.Snapshots, snapshots(id(), name("main", "else"), 1+r.IntN(4))...)
	}
	return x
}

func TestWhateverIsFoundSweepRemovesOnlyWhatItMay(t *testing.T) {
	for seed := range uint64(20_000) {
		x := anything(rand.New(rand.NewPCG(seed, 0)))
		plan := flow.PlanSweep(x)
		if again := flow.PlanSweep(x); said(again) != said(plan) {
			t.Fatalf("seed %d: twice the same facts, two plans: %s; %s", seed, said(plan), said(again))
		}
		for _, a := range plan {
			if complaint := mayNot(x, a); complaint != "" {
				t.Fatalf("seed %d: %s %s: %s\n%+v", seed, a.Kind, a.Name, complaint, x)
			}
			if a.Why == "" || a.Name == "" {
				t.Fatalf("seed %d: %+v does not say what or why", seed, a)
			}
		}
	}
}

// mayNot says why an action may not be, or "".
func mayNot(x flow.Facts, a flow.Action) string {
	named := slices.ContainsFunc(x.Intents, func(i backup.Intent) bool { return i.ID == a.Intent.ID && i.Deletes == a.Intent.Deletes })
	ledger := slices.ContainsFunc(x.Copies, func(c backup.Copy) bool { return c.ID == a.Copy.ID })
	switch a.Kind {
	case flow.RemoveBackup, flow.FinishBackup, flow.EndIntent:
		switch state := x.Backups[a.Intent.ID]; {
		case !named:
			return "no intent names it"
		case a.Intent.Host != x.Host:
			return "it is another host's"
		case x.Busy["backup-"+x.Cluster]:
			return "somebody works on it"
		case a.Kind == flow.RemoveBackup && !a.Intent.Deletes && (state == flow.Complete || state == flow.Taken || state == flow.Doubtful):
			return "it is " + string(state)
		case a.Kind == flow.FinishBackup && (a.Intent.Deletes || state != flow.Taken):
			return "there is nothing to finish"
		case a.Kind == flow.EndIntent && state != flow.Complete:
			return "an intent is all that leads to it"
		}
	case flow.RemoveCopy:
		switch {
		case x.Busy["copy-"+string(a.Copy.ID)]:
			return "somebody works on it"
		case a.Copy.Host != x.Host || a.Copy.Cluster != x.Cluster:
			return "it is another's"
		case ledger && (a.Copy.Purpose == backup.ForRestore || a.Copy.Purpose == backup.ForStandby) && a.Copy.Ready:
			return "it is meant to stay"
		case !ledger && slices.ContainsFunc(x.Inventory.Volumes, func(v provider.Volume) bool {
			return v.Attached != "" && v.Tags.Match(a.Copy.Tags())
		}):
			return "it is attached and nobody knows why"
		}
	case flow.OnlyList:
	default:
		return "unknown kind"
	}
	return ""
}

func TestAnEmptyCatalogNeverCostsASnapshot(t *testing.T) {
	for seed := range uint64(5_000) {
		x := anything(rand.New(rand.NewPCG(seed, 1)))
		x.Intents, x.Backups = nil, nil // the wrong catalog, or an empty one
		for _, a := range flow.PlanSweep(x) {
			if a.Kind == flow.RemoveBackup || a.Kind == flow.EndIntent {
				t.Fatalf("seed %d: %s %s", seed, a.Kind, a.Name)
			}
		}
	}
}

func TestEveryUnknownSnapshotIsListedOnce(t *testing.T) {
	for seed := range uint64(5_000) {
		x := anything(rand.New(rand.NewPCG(seed, 2)))
		x.Intents, x.Backups = nil, nil
		want := map[string]bool{}
		for _, s := range x.Inventory.Snapshots {
			if s.Tags[backup.TagCluster] == x.Cluster {
				want["snapshots of backup "+s.Tags[backup.TagBackup]] = true
			}
		}
		got := map[string]bool{}
		for _, a := range flow.PlanSweep(x) {
			if strings.HasPrefix(a.Name, "snapshots") {
				if got[a.Name] {
					t.Fatalf("seed %d: %s twice", seed, a.Name)
				}
				got[a.Name] = true
			}
		}
		if len(got) != len(want) {
			t.Fatalf("seed %d: got %v, want %v", seed, got, want)
		}
	}
}
