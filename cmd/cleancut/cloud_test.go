package main_test

import (
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

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
	p.must(t, "verify", "--level", "start", string(keeper))
	p.clean(t)
}
