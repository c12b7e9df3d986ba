package main_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

const instance = "i-0000000000000000a"

// newCloudProduction is newProduction on volumes of an EC2 test server, which
// runs in this process; the program finds it as it would find EC2.
func newCloudProduction(t testing.TB) (*production, *ec2sim.Server) {
	t.Helper()
	l := newLab(t, "xfs", 16<<30)
	devices := filepath.Join(l.dir, "ec2")
	sim, err := ec2sim.New(t.Context(), ec2sim.Options{Pool: l.pool, Devices: devices, Instances: []ec2sim.Instance{{ID: instance}},
		RateWindow: time.Nanosecond, Transition: time.Millisecond, Completion: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sim.Close(); err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(sim)
	t.Cleanup(server.Close)
	l.base = []string{"CLEANCUT_PROVIDER=ec2", "CLEANCUT_EC2_DEVICES=" + filepath.Join(devices, instance), "AWS_ENDPOINT_URL_EC2=" + server.URL,
		"AWS_EC2_METADATA_SERVICE_ENDPOINT=" + ec2sim.MetadataEndpoint(server.URL, instance), "AWS_REGION=eu-central-1",
		"AWS_ACCESS_KEY_ID=" + ec2sim.AccessKey, "AWS_SECRET_ACCESS_KEY=" + ec2sim.SecretKey}
	l.cloud = openCloud(t, server.URL, devices)
	return l.cluster(t, pgtest.Options{}), sim
}

func openCloud(t testing.TB, api, devices string) *ec2.Provider {
	t.Helper()
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": ec2sim.AccessKey, "AWS_SECRET_ACCESS_KEY": ec2sim.SecretKey} {
		t.Setenv(k, v)
	}
	p, err := ec2.Open(t.Context(), ec2.Options{Region: "eu-central-1", Endpoint: api, Instance: instance, Devices: filepath.Join(devices, instance)}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEveryFlowThroughEC2KilledAfterAnyCallIsSwept(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p, _ := newCloudProduction(t)
	p.writer(t)
	keeper := p.backup(t)
	root := filepath.Join(p.dir, "copy", "a")
	t.Run("backup", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, within: "ec2.", removes: func(t *testing.T, o outcome) {
			t.Helper()
			p.must(t, "delete", string(p.manifestOf(t, o).ID))
		}, args: func(*testing.T) []string { return []string{"backup", "--json"} }})
	})
	t.Run("restore", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, within: "ec2.", removes: func(t *testing.T, _ outcome) {
			t.Helper()
			p.must(t, "restore", "--undo", root)
		}, args: func(*testing.T) []string { return []string{"restore", string(keeper), "--to", root} }})
	})
	var id backup.ID
	t.Run("delete", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, within: "ec2.", removes: func(*testing.T, outcome) {}, args: func(t *testing.T) []string {
			id = p.backup(t)
			return []string{"delete", string(id)}
		}})
	})
	t.Run("a lost catalog", func(t *testing.T) {
		manifest := filepath.Join(p.catalog, "clusters", "main", "backups", string(keeper), "manifest.json")
		had, err := os.ReadFile(manifest)
		if err := errors.Join(err, os.RemoveAll(p.catalog)); err != nil {
			t.Fatal(err)
		}
		p.must(t, "catalog", "rebuild")
		if got, err := os.ReadFile(manifest); err != nil || !bytes.Equal(got, had) {
			t.Errorf("rebuilt from EC2's tags it reads\n%s\nand was\n%s (%v)", got, had, err)
		}
	})
	p.must(t, "verify", "--level", "start", string(keeper))
	p.clean(t)
}

// Only the guest has a device mapper, and so a group.
func TestAGroupCutKilledAfterAnyCallIsSwept(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	p, sim := newCloudProduction(t)
	p.underFaults(t, flowUnderFault{killsOnce: true, within: "ec2.", removes: func(t *testing.T, o outcome) {
		t.Helper()
		m := p.manifestOf(t, o)
		if m.Cut.How != backup.ModeGroup || m.Cut.Achieved != backup.Atomic {
			t.Errorf("a cut by %s, %s: want an atomic group", m.Cut.How, m.Cut.Achieved)
		}
		p.must(t, "delete", string(m.ID))
	}, args: func(*testing.T) []string { return []string{"backup", "--json"} }})
	if calls := sim.Calls(); calls["CreateSnapshot"] != 0 || calls["CreateSnapshots"] < 3 {
		t.Errorf("calls %v: want CreateSnapshots only", calls)
	}
	p.clean(t)
}
