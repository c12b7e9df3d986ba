package flow_test

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// At least one of so many torn cuts must be found damaged; how often that
// happens is what the drill measures. Each comes with a frozen one, and all
// frozen ones must be sound, of which there are to be some.
const (
	mostCuts  = 5
	leastCuts = 2
)

// skew between two members of the stripe.
const skew = 5 * time.Second

// production is one server on four striped volumes, and the host that restores
// its backups.
type production struct {
	t      *testing.T
	flow   *flow.Flow // of production's host
	other  *flow.Flow // of the restore host
	server *pgtest.Server
	load   *load.Load
	skew   time.Duration
	kept   load.Promise // of the loads that are over
}

// newProduction makes it on volumes of p; other is the provider as the restore
// host has it.
func newProduction(t *testing.T, p, other provider.Provider) *production {
	t.Helper()
	dir := labtest.Folder(t)
	data := storage(t, p, dir, flow.StorageOptions{Name: "pg", Volumes: 4, Level: "raid0", Chunk: 64 << 10})
	return serve(t, p, other, dir, pgtest.Options{Data: filepath.Join(data, "data")})
}

// storage makes a filesystem on volumes of p and returns where it is mounted.
func storage(t *testing.T, p provider.Provider, dir string, o flow.StorageOptions) string {
	t.Helper()
	o.Host, o.Size, o.Filesystem, o.MountOptions = "lab", 1<<30, "xfs", []string{"noatime"}
	o.Mountpoint, o.Fstab, o.MdadmConf = filepath.Join(dir, o.Name), filepath.Join(dir, "fstab"), filepath.Join(dir, "mdadm.conf")
	if _, err := flow.CreateStorage(t.Context(), p, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := flow.DestroyStorage(labtest.Context(t), p, o); err != nil {
			t.Error(err)
		}
	})
	return o.Mountpoint
}

// serve starts production's server.
func serve(t *testing.T, p, other provider.Provider, dir string, o pgtest.Options) *production {
	t.Helper()
	settings := map[string]string{}
	for _, s := range load.HeavySettings() {
		k, v, _ := strings.Cut(s, "=")
		settings[k] = v
	}
	maps.Copy(settings, o.Settings)
	o.Settings, o.Sync, o.Checksums = settings, true, true
	server := pgtest.New(t, o)
	store := catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), "lab")
	host := func(name string, p provider.Provider) *flow.Flow {
		st, err := state.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return &flow.Flow{Provider: p, Catalog: store, State: st, Cluster: "lab", Host: name, Tool: "test", Watchdog: labtest.Watchdog(t), Log: slog.New(slog.DiscardHandler)}
	}
	return &production{t: t, server: server, flow: host("a", p), other: host("b", other)}
}

// localPool is the local provider over a pool of its own.
func localPool(t *testing.T) provider.Provider {
	t.Helper()
	pool := labtest.Pool(t, "xfs", 20<<30)
	if err := local.Init(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	p, err := local.Open(t.Context(), pool, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *production) connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, p.server.DSN("postgres"))
}

// create makes the play database.
func (p *production) create() {
	p.t.Helper()
	conn, err := p.connect(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(p.t.Context())
	if _, err := load.Create(p.t.Context(), conn, load.Options{Rows: 20000}); err != nil {
		p.t.Fatal(err)
	}
}

// beat puts the heavy load on production until stop is called.
func (p *production) beat() (stop func()) {
	p.t.Helper()
	ctx := p.t.Context()
	which := load.All()
	which.Bulk.MaxBytes = 150 << 20
	which.Churn.CheckpointEvery = load.HeavyCheckpointEvery
	var err error
	if p.load, err = load.Start(ctx, p.connect, which); err != nil {
		p.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		if _, err := p.load.Stop(); err != nil {
			p.t.Error(err)
		}
		p.kept = p.kept.Join(p.load.Promise(time.Now()))
	})
	p.t.Cleanup(stop)
	if err := errors.Join(p.load.Words.Await(ctx, 200), p.load.Transfers.Await(ctx, 50), p.load.Churn.Await(ctx, 2)); err != nil {
		p.t.Fatal(err)
	}
	return stop
}

// cut takes one backup and the promise that goes with it.
func (p *production) cut(mode backup.Mode) (backup.Manifest, load.Promise) {
	p.t.Helper()
	m, err := p.flow.Backup(p.t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: mode, Skew: p.skew, FastCheckpoint: true,
		Deadline: 5 * time.Minute, Quick: time.Minute, Rounds: 10})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Logf("%s: %s, %s, members within %.0f ms, syncfs %.0f ms, frozen %.0f ms", m.ID, mode, m.Cut.Achieved, m.Cut.SpreadMS, m.Cut.SyncRounds, m.Cut.FreezeMS)
	if err := p.load.Err(); err != nil {
		p.t.Fatal(err)
	}
	if mode == backup.ModeNone {
		return m, load.Promise{}
	}
	first, last := m.Span()
	return m, p.load.PromiseUntil(first, last).Join(p.kept)
}

// judge looks at an image alone: what verify finds, and the promise if there
// is one.
func (p *production) judge(m backup.Manifest, promise load.Promise) error {
	p.t.Helper()
	_, err := p.other.Verify(p.t.Context(), flow.VerifyOptions{ID: m.ID, Level: backup.LevelFull, AllowTorn: true,
		Look: func(ctx context.Context, r flow.Restored) error {
			if len(promise.Words) == 0 {
				return nil
			}
			conn, err := r.Instance.Connect(ctx, "postgres")
			if err != nil {
				return err
			}
			defer conn.Close(ctx)
			found, err := load.Judge(ctx, conn, promise)
			if err != nil {
				return err
			}
			p.t.Logf("%s: %d acknowledged before the cut, %d found", m.ID, found.Words.Acked, found.Words.Found)
			if problems := found.Problems(); len(problems) > 0 {
				return errors.New(strings.Join(problems, "; "))
			}
			return nil
		}})
	if err != nil && !errors.Is(err, backup.ErrDamage) {
		p.t.Fatal(err)
	}
	return err
}

func TestMembersCutFiveSecondsApartAreDamagedUnlessTheyAreFrozen(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	pool := localPool(t)
	p := newProduction(t, pool, pool)
	p.skew = skew
	p.create()
	damaged := 0
	for n := 1; n <= leastCuts || damaged == 0 && n <= mostCuts; n++ {
		stop := p.beat()
		torn, _ := p.cut(backup.ModeNone)
		frozen, promise := p.cut(backup.ModeFreeze)
		stop()
		p.spread(frozen)
		p.isSound(frozen, promise)
		if p.tornIsDamaged(torn) {
			damaged++
		}
	}
	if damaged == 0 {
		t.Errorf("none of %d cuts with %v between members was found damaged", mostCuts, skew)
	}
}

// spread demands that the members were cut as far apart as was asked for.
func (p *production) spread(m backup.Manifest) {
	p.t.Helper()
	if m.Cut.SpreadMS < float64(3*skew.Milliseconds()) {
		p.t.Errorf("%s: the members were cut within %.0f ms, want at least %v apart", m.ID, m.Cut.SpreadMS, 3*skew)
	}
}

func (p *production) isSound(m backup.Manifest, promise load.Promise) {
	p.t.Helper()
	if m.Cut.Achieved != backup.Atomic {
		p.t.Errorf("%s is %s, want atomic", m.ID, m.Cut.Achieved)
	}
	if err := p.judge(m, promise); err != nil {
		p.t.Errorf("%s, a cut by %s, was judged damaged: %v", m.ID, m.Cut.How, err)
	}
}

func (p *production) tornIsDamaged(m backup.Manifest) bool {
	p.t.Helper()
	p.isRefused(m)
	err := p.judge(m, load.Promise{})
	p.t.Logf("torn %s: %v", m.ID, err)
	return err != nil
}

// isRefused demands that a cut that nothing held is known as torn and not
// restored.
func (p *production) isRefused(m backup.Manifest) {
	p.t.Helper()
	if m.Cut.Achieved != backup.Torn {
		p.t.Errorf("%s is %s, want torn", m.ID, m.Cut.Achieved)
	}
	if _, _, err := p.other.Restore(p.t.Context(), flow.RestoreOptions{ID: m.ID, Purpose: backup.ForRestore}); !errors.Is(err, backup.ErrUnsupported) {
		p.t.Errorf("a torn backup is restored: %v", err)
	}
}
