package main_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
)

func TestWrongRequestsOfRetentionExitWith2(t *testing.T) {
	const id = "20261122T211704Z-5f3a9c"
	for _, c := range []struct{ args, words string }{
		{"prune", "no rule says what to keep|--keep-last|[retention]"},
		{"prune --keep-last 0", "no rule says what to keep"},
		{"prune --keep-last -1", "below zero"},
		{"prune --keep-last many", "many|prune --help"},
		{"prune --keep-last 1 --wal-window soon", "--wal-window|soon|7d"},
		{"prune --keep-last 1 --wal-window -7d", "--wal-window|-7d"},
		{"prune --wal-window 7d", "no rule says what to keep"},
		{"prune surplus", "takes no arguments"},
		{"hold", "wants the id of a backup"},
		{"hold nonsense", "is no backup id"},
		{"hold --until yesterday " + id, "yesterday|30d"},
		{"hold --until 2020-01-01 " + id, "not in the future"},
		{"hold --release --reason x " + id, "--release"},
		{"restore --hydrate", "--to DIR"},
		{"restore --hydrate-rate 5M --to /tmp/x " + id, "--hydrate-rate goes with --hydrate"},
		{"restore --hydrate --hydrate-rate fast --to /tmp/x " + id, "fast|200M"},
		{"restore --hydrate --hydrate-rate 0 --to /tmp/x " + id, "above zero"},
		{"restore --undo /tmp/x --hydrate", "--undo DIR stands alone"},
	} {
		t.Run(c.args, func(t *testing.T) {
			l := bare(t)
			l.run(t, strings.Fields(c.args)...).refused(t, 2, strings.Split(c.words, "|")...)
			if _, err := os.Stat(l.catalog); err == nil {
				t.Error("a catalog was made")
			}
		})
	}
	t.Run("a variable that is no number", func(t *testing.T) {
		bare(t).runWith(t, []string{"CLEANCUT_KEEP_DAILY=all"}, "prune").refused(t, 2, "CLEANCUT_KEEP_DAILY", "all")
	})
	t.Run("a variable that is no length of time", func(t *testing.T) {
		bare(t).runWith(t, []string{"CLEANCUT_WAL_WINDOW=all"}, "prune").refused(t, 2, "CLEANCUT_WAL_WINDOW", "all", "7d")
	})
	t.Run("a window in the configuration that is none", func(t *testing.T) {
		l := bare(t)
		file := filepath.Join(l.dir, "c.toml")
		if err := os.WriteFile(file, []byte("[retention]\nlast = 1\nwal_window = \"soon\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		l.run(t, "prune", "--config", file).refused(t, 2, "soon", "7d", "~~~")
	})
	t.Run("an unknown rule in the configuration", func(t *testing.T) {
		l := bare(t)
		file := filepath.Join(l.dir, "c.toml")
		if err := os.WriteFile(file, []byte("[retention]\nhourly = 3\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		l.run(t, "prune", "--config", file).refused(t, 2, "unknown key", "hourly = 3", "~~~")
	})
	t.Run("a hold without a catalog", func(t *testing.T) {
		bare(t).run(t, "hold", id).refused(t, 1, "catalog", "not found")
	})
}

// pruned is the JSON of prune.
type pruned struct {
	OK     bool
	DryRun bool `json:"dry_run"`
	Rules  backup.Retention
	Keep   []backup.Choice
	Remove []struct {
		ID          backup.ID
		Why         []string
		Done        bool
		Kept, Error string
	}
}

func (o outcome) pruned(t *testing.T) (p pruned) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(o.out))
	if err := dec.Decode(&p); err != nil || dec.More() {
		t.Fatalf("%v: exit %d\n%s%s", err, o.code, o.out, o.err)
	}
	return p
}

func (p pruned) removes() []backup.ID {
	var out []backup.ID
	for _, r := range p.Remove {
		out = append(out, r.ID)
	}
	return out
}

func (p *production) ids(t *testing.T) []backup.ID {
	t.Helper()
	var got struct {
		Backups []struct{ ID backup.ID }
	}
	if err := json.Unmarshal([]byte(p.must(t, "list", "--json").out), &got); err != nil {
		t.Fatal(err)
	}
	var out []backup.ID
	for _, b := range got.Backups {
		out = append(out, b.ID)
	}
	return out
}

// TestRetention: five backups of one day, of which the second is proven.
func TestRetention(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	var ids []backup.ID
	for range 5 {
		ids = append(ids, p.backup(t))
	}
	p.must(t, "verify", "--level", "start", string(ids[1]))
	p.run(t, "delete", string(ids[1])).refused(t, 2, "the last one with a good verdict", "--force-last "+string(ids[1]))
	t.Run("hold", func(t *testing.T) { p.held(t, ids[0]) })
	t.Run("the rules of the configuration", func(t *testing.T) { p.configured(t, ids) })
	t.Run("a copy stands", func(t *testing.T) {
		root := filepath.Join(p.dir, "copy", "a")
		p.must(t, "restore", string(ids[2]), "--to", root)
		got := p.must(t, "prune", "--keep-last", "2", "--dry-run", "--json").pruned(t)
		if len(got.Remove) > 0 || !got.DryRun || !got.OK || !strings.Contains(strings.Join(got.Keep[2].Why, ""), "in use: copy") {
			t.Errorf("got %+v, want nothing removed: one is held, one proven, one in use, two newest", got)
		}
		p.must(t, "restore", "--undo", root)
	})
	t.Run("a snapshot that is not ours", func(t *testing.T) { p.foreignSnapshot(t, ids[2]) })
	t.Run("prune", func(t *testing.T) {
		dry := p.must(t, "prune", "--keep-daily", "1", "--dry-run")
		for _, words := range [][]string{{"keep", string(ids[0]), "held by"}, {"keep", string(ids[1]), "the newest with a good verdict"}, {"delete", string(ids[3]), "no rule keeps it"}, {"keep", string(ids[4]), "daily 20"}} {
			if !slices.ContainsFunc(strings.Split(dry.out, "\n"), func(line string) bool { return hasAll(line, words) }) {
				t.Errorf("no line with %q:\n%s", words, dry.out)
			}
		}
		o := p.must(t, "prune", "--keep-daily", "1", "--json")
		got := o.pruned(t)
		if !slices.Equal(got.removes(), []backup.ID{ids[3]}) || !got.Remove[0].Done || !got.OK || got.Rules != (backup.Retention{Daily: 1}) {
			t.Errorf("got %s", o.out)
		}
		golden(t, "json/prune.txt", shape(t, o.out))
		if again := p.must(t, "prune", "--keep-daily", "1", "--json").pruned(t); len(again.Remove) > 0 {
			t.Errorf("again it removes %v", again.removes())
		}
	})
	p.must(t, "hold", "--release", string(ids[0]))
	if got := p.must(t, "prune", "--keep-last", "1", "--json").pruned(t); !slices.Equal(got.removes(), []backup.ID{ids[0]}) {
		t.Errorf("released, and pruned is %v", got.removes())
	}
	if got := p.ids(t); len(got) != 2 || !slices.Contains(got, ids[1]) || !slices.Contains(got, ids[4]) {
		t.Errorf("left %v", got)
	}
	p.must(t, "verify", "--level", "start", string(ids[4]))
	p.must(t, "delete", string(ids[1]))
	p.must(t, "delete", "--force-last", string(ids[4]))
	p.clean(t)
}

func hasAll(line string, words []string) bool {
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
}

// held: who, when and why is kept and shown; delete is refused.
func (p *production) held(t *testing.T, id backup.ID) {
	o := p.with("SUDO_USER=ann").must(t, "hold", string(id), "--reason", "before the migration", "--until", "30d")
	if !strings.Contains(o.out, "held by ann on prod since 20") || !strings.Contains(o.out, "until 20") {
		t.Errorf("got %s", o.out)
	}
	for _, args := range [][]string{{"delete", string(id)}, {"delete", "--force-last", string(id)}} {
		p.run(t, args...).refused(t, 2, "is held by ann on prod", "before the migration", "cleancut hold --release "+string(id))
	}
	if list := p.must(t, "list"); !slices.ContainsFunc(strings.Split(list.out, "\n"), func(line string) bool { return hasAll(line, []string{string(id), "held"}) }) {
		t.Errorf("list does not mark it:\n%s", list.out)
	}
	if show := p.must(t, "show", string(id)); !strings.Contains(show.out, "held by ann on prod") {
		t.Errorf("show does not tell:\n%s", show.out)
	}
	golden(t, "json/hold.txt", shape(t, p.must(t, "hold", "--json", string(id), "--until", "12h", "--reason", "twice is fine").out))
	var shown struct {
		Holds []struct {
			By, Reason string
			Active     bool
		}
	}
	if err := json.Unmarshal([]byte(p.must(t, "show", "--json", string(id)).out), &shown); err != nil || len(shown.Holds) != 2 || shown.Holds[0].By != "ann" || !shown.Holds[1].Active {
		t.Errorf("show --json: %+v, %v", shown, err)
	}
	golden(t, "json/show-held.txt", shape(t, p.must(t, "show", "--json", string(id)).out))
}

// configured: the cluster's section beats the general one, the variable both,
// the flag all; each number for itself.
func (p *production) configured(t *testing.T, ids []backup.ID) {
	file := filepath.Join(p.dir, "c.toml")
	if err := os.WriteFile(file, []byte("[retention]\nlast = 2\nweekly = 7\n[cluster.main.retention]\nweekly = 0\nmonthly = 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := p.with("CLEANCUT_KEEP_MONTHLY=4")
	for _, c := range []struct {
		l    *lab
		more []string
		want backup.Retention
	}{
		{p.lab, nil, backup.Retention{Last: 2, Monthly: 3}},
		{l, nil, backup.Retention{Last: 2, Monthly: 4}},
		{l, []string{"--keep-monthly", "5", "--keep-last", "0", "--keep-daily", "9"}, backup.Retention{Daily: 9, Monthly: 5}},
	} {
		got := c.l.must(t, append([]string{"prune", "--dry-run", "--json", "--config", file}, c.more...)...).pruned(t)
		if got.Rules != c.want {
			t.Errorf("%v: rules %+v, want %+v", c.more, got.Rules, c.want)
		}
	}
	if got := p.ids(t); len(got) != len(ids) {
		t.Errorf("a dry run left %d of %d", len(got), len(ids))
	}
}

// foreignSnapshot: a manifest that names a snapshot of another cluster instead
// of one of its own. The backup goes with the snapshots that carry its tags.
func (p *production) foreignSnapshot(t *testing.T, id backup.ID) {
	inv := p.inventory(t)
	var m struct{ Manifest backup.Manifest }
	if err := json.Unmarshal([]byte(p.must(t, "show", "--json", string(id)).out), &m); err != nil {
		t.Fatal(err)
	}
	victim := "snap-" + strings.Repeat("ab", 8)
	for _, s := range inv.Snapshots { // of the same form as the pool's own
		victim = string(s.ID[:len(s.ID)-4]) + "beef"
	}
	own := filepath.Join(p.pool, "snapshots", string(m.Manifest.Snapshots[1].ID))
	foreign := filepath.Join(p.pool, "snapshots", victim)
	sidecar, err := os.ReadFile(own + ".json")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(string(m.Manifest.Snapshots[1].ID), victim, string(id), "20200101T000000Z-00beef").Replace(string(sidecar))
	if err := errors.Join(os.WriteFile(foreign+".json", []byte(text), 0o600), os.WriteFile(foreign+".img", make([]byte, 4096), 0o600)); err != nil {
		t.Fatal(err)
	}
	m.Manifest.Snapshots[1].ID = backup.SnapshotID(victim)
	b, err := backup.EncodeManifest(m.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(p.catalog, "clusters", "main", "backups", string(id))
	done, _ := json.Marshal(backup.Complete{ID: id, Digest: backup.Digest(b)})
	if err := errors.Join(os.WriteFile(filepath.Join(folder, "manifest.json"), b, 0o600), os.WriteFile(filepath.Join(folder, "complete.json"), done, 0o600)); err != nil {
		t.Fatal(err)
	}
	got := p.must(t, "prune", "--keep-last", "2", "--json").pruned(t)
	if !slices.Equal(got.removes(), []backup.ID{id}) || !got.Remove[0].Done {
		t.Errorf("pruned %+v", got)
	}
	if _, err := os.Stat(foreign + ".img"); err != nil {
		t.Errorf("the snapshot that is not ours: %v", err)
	}
	if _, err := os.Stat(own + ".img"); err == nil {
		t.Error("our own, which the manifest did not name, is left")
	}
	if err := errors.Join(os.Remove(foreign+".img"), os.Remove(foreign+".json")); err != nil {
		t.Fatal(err)
	}
}

// TestPruneStoppedAnywhereLeavesWholeBackups stops a prune of two backups at
// every outside call: after an error or a cancel each backup is whole or gone,
// after a kill sweep brings that about.
func TestPruneStoppedAnywhereLeavesWholeBackups(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.writer(t)
	keeper := p.backup(t)
	p.must(t, "verify", "--level", "start", string(keeper))
	rest := func(t *testing.T, _ outcome) {
		t.Helper()
		got := p.ids(t)
		if !slices.Contains(got, keeper) || len(got) < 2 {
			t.Errorf("left %v, want the proven one and the newest", got)
		}
		for _, id := range got {
			if id != keeper {
				p.must(t, "delete", string(id))
			}
		}
	}
	p.underFaults(t, flowUnderFault{removes: rest, always: true, retries: true, from: "catalog.put intent", args: func(t *testing.T) []string {
		for range 2 { // one to go, one to stay; several at once are in package flow
			p.backup(t)
		}
		return []string{"prune", "--keep-last", "1"}
	}})
	p.must(t, "verify", "--level", "start", string(keeper))
	p.clean(t)
}
