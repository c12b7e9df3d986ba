package flow_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// goldenLab is production with a table whose rows are known, and a backup that
// has WAL to recover.
func goldenLab(t *testing.T, p *production, mode backup.Mode) backup.Manifest {
	t.Helper()
	p.server.Exec(t, "CREATE TABLE kept AS SELECT g AS n, md5(g::text) AS filler FROM generate_series(1, 5000) g", "CREATE UNLOGGED TABLE scratch AS SELECT 1 AS n",
		"ALTER SYSTEM SET work_mem = '7MB'", "CHECKPOINT", "UPDATE kept SET filler = filler || 'x'")
	m, err := p.flow.Backup(t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: mode, FastCheckpoint: true,
		Deadline: 5 * time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		t.Fatal(err)
	}
	p.server.Exec(t, "INSERT INTO kept VALUES (0, 'after the backup')")
	return m
}

// goldenRows copies a backup and tells what is in it, what its server said and
// what its data directory holds of production's configuration.
func goldenRows(t *testing.T, f *flow.Flow, id backup.ID) (rows, log, auto string, r flow.Restored) {
	t.Helper()
	r, release, err := f.Restore(t.Context(), flow.RestoreOptions{ID: id, Purpose: backup.ForRestore})
	if err != nil {
		t.Fatal(err)
	}
	release()
	defer func() {
		if _, err := f.RemoveCopy(labtest.Context(t), r.Copy.Root); err != nil {
			t.Error(err)
		}
	}()
	conn, err := r.Instance.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(labtest.Context(t)) }()
	if err := conn.QueryRow(t.Context(), `SELECT (SELECT count(*) || ' ' || md5(string_agg(n || filler, ',' ORDER BY n)) FROM kept) || ', ' || (SELECT count(*) FROM scratch)
		|| ', ' || (SELECT string_agg(extname, ' ') FROM pg_extension)`).Scan(&rows); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(r.Copy.PrivateDir(), "postgres.log"))
	if err != nil {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(filepath.Join(r.Copy.DataDirectory, "postgresql.auto.conf.production"))
	if err != nil {
		t.Fatal(err)
	}
	return rows, string(text), string(kept), r
}

// goldenOf makes the golden image of a backup, asked for on two hosts at once, and
// holds it against the backup.
func goldenOf(t *testing.T, p *production, m backup.Manifest, hosts ...*flow.Flow) backup.ID {
	t.Helper()
	ctx := t.Context()
	before, err := p.flow.Provider.List(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]backup.ID, len(hosts))
	errs := make([]error, len(hosts))
	var all sync.WaitGroup
	for i, f := range hosts { // on one host one waits for the other, of two one may be refused
		all.Go(func() { ids[i], errs[i] = f.Golden(ctx, m.ID) })
	}
	all.Wait()
	id := backup.ID("")
	for i, err := range errs {
		if err != nil && (hosts[0] == hosts[1] || !errors.Is(err, backup.ErrInUse)) {
			t.Error(err)
		}
		id = max(id, ids[i])
	}
	t.Logf("NOTE of two: %v", errs)
	made, err := p.flow.Provider.List(ctx, nil)
	if err != nil || id == "" || ids[0] != "" && ids[1] != "" && ids[0] != ids[1] || len(made.Volumes) != len(before.Volumes) || len(made.Snapshots) != len(before.Snapshots)+len(m.Snapshots) {
		t.Errorf("images %v, %d volumes and %d snapshots; were %d and %d (%v)", ids, len(made.Volumes), len(made.Snapshots), len(before.Volumes), len(before.Snapshots), err)
	}
	if again, err := p.flow.Golden(ctx, m.ID); err != nil || again != id {
		t.Errorf("asked again: got %s, %v, want %s", again, err, id)
	}
	if again, err := p.flow.Golden(ctx, id); err != nil || again != id {
		t.Errorf("of itself: got %s, %v", again, err)
	}
	e, err := p.flow.Catalog.Backup(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	g := e.Manifest
	if g.Golden == nil || g.Golden.Of != m.ID || len(g.Golden.Checks) < 6 || g.Cut.How != backup.ModeStill || g.Cut.Achieved != backup.Atomic || g.Cut.FlushLSN <= m.Cut.FlushLSN ||
		!reflect.DeepEqual(g.Topology.Places, m.Topology.Places) {
		t.Errorf("manifest %+v\ncut %+v", g.Golden, g.Cut)
	}
	for _, c := range g.Golden.Checks {
		t.Logf("NOTE %s: %s %s", c.Name, c.Result, c.Detail)
		if c.Result != backup.Passed {
			t.Errorf("check %+v", c)
		}
	}
	for i, fs := range g.Topology.Filesystems {
		of := m.Topology.Filesystems[i]
		if fs.UUID != of.UUID || fs.Mountpoint != of.Mountpoint || fs.Size != of.Size || fs.Device.Kind != of.Device.Kind || fs.Device.Array != nil && fs.Device.Array.UUID == of.Device.Array.UUID {
			t.Errorf("filesystem %+v, of the backup %+v", fs, of)
		}
	}
	return id
}

// goldenIsTheBackup restores both, the image twice at once on one host.
func goldenIsTheBackup(t *testing.T, p *production, m backup.Manifest, id backup.ID) {
	t.Helper()
	want, redo, auto, _ := goldenRows(t, p.other, m.ID)
	if !strings.Contains(redo, "redo starts at") || !strings.Contains(auto, "7MB") {
		t.Errorf("the backup's copy recovered nothing, or lacks production's settings %q:\n%s", auto, redo)
	}
	first, release, err := p.other.Restore(t.Context(), flow.RestoreOptions{ID: id, Purpose: backup.ForRestore})
	if err != nil {
		t.Fatal(err)
	}
	release()
	got, log, kept, r := goldenRows(t, p.other, id)
	if got != want || kept != auto {
		t.Errorf("the image's copy holds %s and %q, the backup's %s and %q", got, kept, want, auto)
	}
	if !strings.Contains(log, "database system was shut down at") || strings.Contains(log, "redo") || strings.Contains(log, "not properly shut down") {
		t.Errorf("the image's copy recovered:\n%s", log)
	}
	if r.Copy.EndOfRecovery != r.Manifest.Cut.FlushLSN {
		t.Errorf("it is at %s, the image at %s", r.Copy.EndOfRecovery, r.Manifest.Cut.FlushLSN)
	}
	if _, err := p.other.RemoveCopy(t.Context(), first.Copy.Root); err != nil {
		t.Error(err)
	}
	if v, err := p.other.Verify(t.Context(), flow.VerifyOptions{ID: id, Level: backup.LevelFull}); err != nil {
		t.Errorf("verified: %v\n%+v", err, v)
	}
	if v, err := p.other.Verify(t.Context(), flow.VerifyOptions{ID: m.ID, Level: backup.LevelStart}); err != nil {
		t.Errorf("the backup: %v\n%+v", err, v)
	}
}

func TestAGoldenImageStartsWithoutRecovery(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := apart(t, localPool(t))
	m := goldenLab(t, p, backup.ModeFreeze)
	id := goldenOf(t, p, m, p.other, p.other)
	goldenIsTheBackup(t, p, m, id)
	p.goldenStandsAlone(m, id)
	p.goldenGoesWithItsBackup(m, id)
}

func TestAGoldenImageOfABracketedBackup(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := apart(t, localPool(t))
	m := goldenLab(t, p, backup.ModeBracketed)
	p.goldenOfAnotherHost(m)
	id := goldenOf(t, p, m, p.flow, p.other)
	goldenIsTheBackup(t, p, m, id)
	if e, err := p.flow.Catalog.Backup(t.Context(), id); err != nil || e.Manifest.Bracket != nil || e.Manifest.Server.Timeline != m.Server.Timeline+1 {
		t.Errorf("on timeline %d after %d, %v", e.Manifest.Server.Timeline, m.Server.Timeline, err)
	}
}

func TestAGoldenImageOnAnArrayAndOnALogicalVolume(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	for name, level := range map[string]string{"md RAID 0": "raid0", "LVM striped": "lvm-striped"} {
		t.Run(name, func(t *testing.T) {
			pool, dir := localPool(t), labtest.Folder(t)
			data := storage(t, pool, dir, flow.StorageOptions{Name: "pg", Volumes: 4, Level: level, Chunk: 64 << 10})
			p := serve(t, pool, pool, dir, goldenServer(data))
			m := goldenLab(t, p, backup.ModeFreeze)
			goldenIsTheBackup(t, p, m, goldenOf(t, p, m, p.other, p.other))
		})
	}
}

// goldenOfAnotherHost: somebody else is at it, so nothing is made here.
func (p *production) goldenOfAnotherHost(m backup.Manifest) {
	p.t.Helper()
	ctx := p.t.Context()
	e, err := p.flow.Catalog.Backup(ctx, m.ID)
	if err != nil {
		p.t.Fatal(err)
	}
	theirs := backup.Intent{ID: backup.GoldenID(m.ID, e.Digest), Cluster: "lab", Host: "elsewhere", Golden: m.ID}
	if err := p.flow.Catalog.PutIntent(ctx, theirs); err != nil {
		p.t.Fatal(err)
	}
	if id, err := p.other.Golden(ctx, m.ID); !errors.Is(err, backup.ErrInUse) || !strings.Contains(err.Error(), "elsewhere") {
		p.t.Errorf("got %s, %v, want that host elsewhere makes it", id, err)
	}
	if candidates, err := p.flow.PruneFacts(ctx); err != nil || len(candidates) != 1 || candidates[0].ID != m.ID || candidates[0].Begun != "" {
		p.t.Errorf("while it is made retention counts %+v, %v", candidates, err)
	}
	if err := p.flow.Catalog.EndIntent(ctx, theirs.ID); err != nil {
		p.t.Fatal(err)
	}
}

// goldenStandsAlone: nothing takes the image for a backup of production.
func (p *production) goldenStandsAlone(m backup.Manifest, id backup.ID) {
	p.t.Helper()
	ctx := p.t.Context()
	if got, err := p.flow.Nearest(ctx, m.Created.AddDate(1, 0, 0)); err != nil || got != m.ID {
		p.t.Errorf("nearest: got %s, %v, want %s", got, err, m.ID)
	}
	for what, err := range map[string]error{
		"latest":    restoreOnly(ctx, p.other, flow.RestoreOptions{ID: id, Purpose: backup.ForRestore, Recovery: flow.Recovery{Target: backup.Target{Kind: backup.TargetLatest}}}),
		"immediate": restoreOnly(ctx, p.other, flow.RestoreOptions{ID: id, Purpose: backup.ForRestore, Recovery: flow.Recovery{Target: backup.Target{Kind: backup.TargetImmediate}}}),
		"standby": func() error {
			_, _, err := p.other.Standby(ctx, flow.StandbyOptions{ID: id, Primary: postgres.Target{DSN: p.server.DSN("postgres")}})
			return err
		}(),
		"production": func() error {
			_, err := p.other.Produce(ctx, flow.ProductionOptions{ID: id, Target: postgres.Target{DSN: p.server.DSN("postgres")}, Level: backup.LevelStart})
			return err
		}(),
	} {
		if !errors.Is(err, backup.ErrUsage) || !strings.Contains(err.Error(), "golden image of backup "+string(m.ID)) {
			p.t.Errorf("%s: got %v", what, err)
		}
	}
	candidates, err := p.flow.PruneFacts(ctx)
	if err != nil || len(candidates) != 1 || candidates[0].ID != m.ID {
		p.t.Errorf("retention counts %+v, %v", candidates, err)
	}
	if copies, err := p.other.State.Copies(); err != nil || len(copies) > 0 {
		p.t.Errorf("refused, and copies %+v stand, %v", copies, err)
	}
}

func restoreOnly(ctx context.Context, f *flow.Flow, o flow.RestoreOptions) error {
	_, release, err := f.Restore(ctx, o)
	if err == nil {
		release()
	}
	return err
}

// goldenGoesWithItsBackup: prune and delete.
func (p *production) goldenGoesWithItsBackup(m backup.Manifest, id backup.ID) {
	p.t.Helper()
	ctx := p.t.Context()
	rules := backup.Retention{Last: 1}
	plan, err := p.flow.PlanPrune(ctx, rules, 0)
	if err != nil || len(plan.Remove) != 0 || len(plan.Keep) != 2 || plan.Keep[1].ID != id {
		p.t.Errorf("with its backup: %+v, %v", plan, err)
	}
	if kept, err := p.flow.Prune(ctx, []backup.Choice{{ID: id}}); err != nil || kept[0].Kept == "" {
		p.t.Errorf("pruned while its backup is there: %+v, %v", kept, err)
	}
	if err := p.flow.Hold(ctx, backup.Hold{Backup: id, By: "ada", Time: m.Created}); err != nil {
		p.t.Fatal(err)
	}
	if err := p.flow.DeleteLast(ctx, m.ID); !errors.Is(err, backup.ErrHeld) {
		p.t.Errorf("the backup of a held image: got %v", err)
	}
	if _, err := p.flow.Catalog.Backup(ctx, m.ID); err != nil {
		p.t.Error(err)
	}
	// A newer one takes its place; a held image stays without its backup.
	newer, err := p.flow.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeFreeze,
		Deadline: 5 * time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.other.Verify(ctx, flow.VerifyOptions{ID: newer.ID, Level: backup.LevelStart}); err != nil {
		p.t.Fatal(err)
	}
	if plan, err = p.flow.PlanPrune(ctx, rules, 0); err != nil || len(plan.Remove) != 1 || plan.Remove[0].ID != m.ID || len(plan.Keep) != 2 || plan.Keep[1].ID != id {
		p.t.Errorf("held: %+v, %v", plan, err)
	}
	if _, err := p.flow.Release(ctx, id); err != nil {
		p.t.Fatal(err)
	}
	if plan, err = p.flow.PlanPrune(ctx, rules, 0); err != nil || len(plan.Remove) != 2 || plan.Remove[0].ID != m.ID || plan.Remove[1].ID != id {
		p.t.Errorf("in one plan: %+v, %v", plan, err)
	}
	if gone, err := p.flow.Prune(ctx, plan.Remove); err != nil || !gone[0].Done || !gone[1].Done {
		p.t.Errorf("pruned: %+v, %v", gone, err)
	}
	inv, err := p.flow.Provider.List(ctx, nil)
	if err != nil || len(inv.Snapshots) != len(newer.Snapshots) {
		p.t.Errorf("left %v, %v", inv.Snapshots, err)
	}
}

func goldenServer(data string) pgtest.Options {
	return pgtest.Options{Data: filepath.Join(data, "data")}
}
