package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
)

// goldenImage makes the golden image of a backup and returns its id.
func (p *production) goldenImage(t *testing.T, of backup.ID) string {
	t.Helper()
	return strings.TrimSpace(p.must(t, "golden", string(of)).out)
}

func TestAGoldenImageStoppedAnywhereIsWholeOrNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	keeper := p.backup(t)
	p.must(t, "verify", string(keeper)) // else each run would
	p.underFaults(t, flowUnderFault{
		// What comes before is a restore's, what comes after its undoing.
		of:   []string{"postgres.reinstate.links", "host.umount", "host.still", "catalog.put", "local.clone", "local.complete", "catalog.delete"},
		args: func(*testing.T) []string { return []string{"golden", string(keeper), "--json"} },
		removes: func(t *testing.T, o outcome) {
			t.Helper()
			var made struct{ Golden string }
			if err := json.Unmarshal([]byte(o.out), &made); err != nil {
				t.Fatalf("%v\n%s", err, o.out)
			}
			p.must(t, "delete", made.Golden)
		}})
	p.must(t, "verify", "--level", "rows", string(keeper))
	p.clean(t)
}

func TestTheGoldenImageOfABackup(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	of := p.backup(t)
	p.must(t, "verify", string(of))
	var runs []func() outcome
	for range 2 { // at once: one waits, none makes a second
		cmd, result := p.command(t, nil, "golden", string(of))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		runs = append(runs, func() outcome { wait(t, cmd); return result() })
	}
	first, second := runs[0](), runs[1]()
	id := strings.TrimSpace(first.out)
	if first.code != 0 || second.code != 0 || strings.TrimSpace(second.out) != id {
		t.Fatalf("two at once: exit %d and %d, %q and %q\n%s%s", first.code, second.code, first.out, second.out, first.err, second.err)
	}
	p.clean(t)
	if l := p.must(t, "list").out; !strings.Contains(l, "golden of "+string(of)) || strings.Count(l, "\n") != 3+2 {
		t.Errorf("list:\n%s", l)
	}
	if s := p.must(t, "show", id).out; !strings.Contains(s, "golden image of backup "+string(of)) || !strings.Contains(s, "clean stop") {
		t.Errorf("show:\n%s", s)
	}
	golden(t, "json/show-golden.txt", shape(t, p.must(t, "show", "--json", id).out))
	p.run(t, "restore", id, "--to", filepath.Join(p.dir, "copy", "x"), "--target", "latest").refused(t, 2, "golden image of backup "+string(of), "cleancut show "+string(of))
	p.run(t, "restore", id, "--production", "--archive-command", "").refused(t, 2, "does not take production's place")
	p.must(t, "dump", id, "--to", filepath.Join(p.dir, "golden.sql.zst"))

	// A catalog that is lost is rebuilt from the tags, with the image in it.
	if err := os.RemoveAll(p.catalog); err != nil {
		t.Fatal(err)
	}
	p.must(t, "catalog", "rebuild")
	if again := p.goldenImage(t, of); again != id {
		t.Errorf("after a rebuild: got %s, want %s", again, id)
	}
	root := filepath.Join(p.dir, "copy", "a")
	p.must(t, "restore", id, "--to", root)
	p.answers(t)

	// Its snapshots are deleted behind cleancut's back: it is made anew, and the copy stands.
	before := p.inventory(t).Snapshots
	for _, s := range before {
		if s.Tags[backup.TagBackup] == id {
			if err := p.provider(t).DeleteSnapshots(t.Context(), []backup.SnapshotID{s.ID}, backup.Tags{backup.TagBackup: id}); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if again := p.goldenImage(t, of); again != id || len(p.inventory(t).Snapshots) != len(before) {
		t.Errorf("made anew: %s of %d snapshots, want %s of %d", again, len(p.inventory(t).Snapshots), id, len(before))
	}
	p.must(t, "restore", "--undo", root)

	if o := p.must(t, "delete", "--force-last", string(of)); !strings.Contains(o.out, "golden image "+id) {
		t.Errorf("delete says:\n%s", o.out)
	}
	if left := p.complete(t); len(left) > 0 || len(p.inventory(t).Snapshots) > 0 {
		t.Errorf("left %v, %v", left, p.inventory(t).Snapshots)
	}
	p.clean(t)
}

func TestNoGoldenImageIsMadeOfDamage(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.server.Exec(t, "CREATE TABLE victim AS SELECT g AS n, repeat('v', 100) AS filler FROM generate_series(1, 5000) g", "VACUUM (FREEZE) victim", "CHECKPOINT")
	conn := p.server.Connect(t, "postgres")
	var path string
	if err := conn.QueryRow(t.Context(), "SELECT pg_relation_filepath('public.victim')").Scan(&path); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close(t.Context())
	for name, proven := range map[string]bool{"that verify finds": false, "since a good verdict": true} {
		t.Run(name, func(t *testing.T) {
			m := p.manifestOf(t, p.must(t, "backup", "--json"))
			if proven {
				p.must(t, "verify", string(m.ID))
			}
			p.inside(t, m, p.mounts[0], func(dir string) { overwrite(t, filepath.Join(dir, "pg", path), 8192, 8192, 0xA5) })
			had := p.inventory(t).Snapshots
			p.run(t, "golden", string(m.ID)).refused(t, 4, "damage")
			if now := p.inventory(t).Snapshots; len(now) != len(had) || !slices.Equal(p.complete(t), []string{string(m.ID)}) {
				t.Errorf("%d snapshots, were %d; backups %v", len(now), len(had), p.complete(t))
			}
			if v := p.verdicts(t, m.ID); len(v) != 1 || v[0].Good() != proven {
				t.Errorf("verdicts %+v", v)
			}
			p.clean(t)
			p.must(t, "delete", "--force-last", string(m.ID))
		})
	}
}

func TestAGoldenImageAtEC2(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p, _ := newCloudProduction(t)
	of := p.backup(t)
	p.must(t, "verify", string(of))
	p.underFaults(t, flowUnderFault{killsOnce: true, from: "host.still", within: "ec2.",
		args:    func(*testing.T) []string { return []string{"golden", string(of)} },
		removes: func(t *testing.T, o outcome) { t.Helper(); p.must(t, "delete", strings.TrimSpace(o.out)) }})
	id, root := p.goldenImage(t, of), filepath.Join(p.dir, "copy", "a")
	p.must(t, "restore", id, "--to", root)
	p.must(t, "restore", "--undo", root)
	p.clean(t)
}
