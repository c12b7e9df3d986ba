package flow_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

const (
	instanceA = "i-0000000000000000a" // production
	instanceB = "i-0000000000000000b" // restores
)

// cloud is an EC2 test server over a pool of its own, and the provider of each
// of two instances.
func cloud(t *testing.T, o ec2sim.Options) (sim *ec2sim.Server, a, b *ec2.Provider) {
	t.Helper()
	o.Pool, o.Devices = labtest.Pool(t, "xfs", 20<<30), filepath.Join(labtest.Folder(t), "ec2")
	o.Instances = []ec2sim.Instance{{ID: instanceA}, {ID: instanceB}}
	sim, err := ec2sim.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(sim)
	t.Cleanup(func() {
		server.Close()
		if err := sim.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("AWS_ACCESS_KEY_ID", ec2sim.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", ec2sim.SecretKey)
	t.Setenv("AWS_ENDPOINT_URL_EC2", server.URL)
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	open := func(instance string) *ec2.Provider {
		t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", ec2sim.MetadataEndpoint(server.URL, instance))
		p, err := ec2.Open(t.Context(), ec2.Options{Devices: filepath.Join(o.Devices, instance), SnapshotGap: o.RateWindow}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	return sim, open(instanceA), open(instanceB)
}

func TestASecondBetweenSnapshotsAtEC2IsHarmless(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	sim, a, b := cloud(t, ec2sim.Options{Latency: 50 * time.Millisecond, RateWindow: time.Nanosecond})
	p := newProduction(t, a, b)
	p.create()
	sim.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Skew, Delay: time.Second})
	stop := p.beat()
	bare, _ := p.cut(backup.ModeNone)
	frozen, promiseOfFreeze := p.cut(backup.ModeFreeze)
	group, promiseOfGroup := p.cut(backup.ModeAuto)
	stop()
	p.isRefused(bare)
	if frozen.Cut.How != backup.ModeFreeze || frozen.Cut.FreezeMS < 3000 {
		t.Errorf("cut by %s, frozen for %.0f ms: one second between four members takes three", frozen.Cut.How, frozen.Cut.FreezeMS)
	}
	p.isSound(frozen, promiseOfFreeze)
	if group.Cut.How != backup.ModeGroup || len(group.Cut.Frozen) > 0 || len(group.Cut.SyncRounds) > 0 {
		t.Errorf("auto cut by %s, froze %v, synced %v: want the group, which touches nothing", group.Cut.How, group.Cut.Frozen, group.Cut.SyncRounds)
	}
	p.isSound(group, promiseOfGroup)
	if unused := sim.ClearFaults(); len(unused) > 0 {
		t.Errorf("nothing hit by %v", unused)
	}
	if calls := sim.Calls(); calls["CreateSnapshots"] != 1 || calls["CreateSnapshot"] != 8 {
		t.Errorf("got %v, want 8 CreateSnapshot and one CreateSnapshots", calls)
	}
	p.swapped(sim)
	inv, err := b.List(t.Context(), nil)
	if err != nil || len(inv.Volumes) != 4 {
		t.Errorf("%d volumes, want production's 4 (%v)", len(inv.Volumes), err)
	}
}

// swapped exchanges two members on purpose, in the answer and then, where
// nothing but the volumes' own superblocks can tell, in what they hold.
func (p *production) swapped(sim *ec2sim.Server) {
	p.t.Helper()
	swap := func(kind ec2sim.Kind) (backup.Manifest, error) {
		sim.Inject(ec2sim.Fault{Action: "CreateSnapshots", Kind: kind, Nth: 1})
		m, err := p.flow.Backup(p.t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeGroup})
		if unused := sim.ClearFaults(); len(unused) > 0 {
			p.t.Errorf("nothing hit by %v", unused)
		}
		return m, err
	}
	if m, err := swap(ec2sim.SwapAnswer); !errors.Is(err, backup.ErrVoid) {
		p.t.Errorf("two members are swapped in the answer, and backup %s says %v", m.ID, err)
	}
	m, err := swap(ec2sim.SwapBytes)
	if err != nil {
		p.t.Fatal(err)
	}
	_, err = p.other.Verify(p.t.Context(), flow.VerifyOptions{ID: m.ID, Level: backup.LevelStart})
	if !errors.Is(err, backup.ErrNotOurs) || !strings.Contains(fmt.Sprint(err), "member") {
		p.t.Errorf("two members hold each other's bytes, and verify says %v", err)
	}
}
