package ec2_test

import (
	"log/slog"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
	"cleancut/internal/provider/providertest"
)

const (
	instanceA = "i-0000000000000000a"
	instanceB = "i-0000000000000000b"
	region    = "eu-central-1"
	gib       = 1 << 30
)

// cloud is a running ec2sim.
type cloud struct {
	*ec2sim.Server
	url string
}

// start runs a server over a pool of its own until the test ends. Every fault
// that is injected must have hit by then.
func start(t *testing.T, o ec2sim.Options) *cloud {
	t.Helper()
	if o.Pool == "" {
		o.Pool = labtest.Pool(t, "xfs", 512<<20)
	}
	if o.RateWindow == 0 {
		o.RateWindow = time.Nanosecond
	}
	if o.Completion == 0 {
		o.Completion = 20 * time.Millisecond
	}
	if o.Transition == 0 {
		o.Transition = 5 * time.Millisecond
	}
	s, err := ec2sim.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	t.Cleanup(func() {
		for _, f := range s.ClearFaults() {
			t.Errorf("the fault %s of %s hit nothing", f.Kind, f.Action)
		}
		h.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("AWS_ACCESS_KEY_ID", ec2sim.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", ec2sim.SecretKey)
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	return &cloud{s, h.URL}
}

func (c *cloud) options(instance string) ec2.Options {
	return ec2.Quick(ec2.Options{Region: region, Endpoint: c.url, Instance: instance, Devices: c.Devices(instance)}, 10*time.Second)
}

func (c *cloud) open(t *testing.T, o ec2.Options) *ec2.Provider {
	t.Helper()
	p, err := ec2.Open(t.Context(), o, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// claim holds a device as a mount does.
func claim(t *testing.T, device string) (release func()) {
	t.Helper()
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return func() { _ = unix.Close(fd) }
}

func conformance(t *testing.T, o ec2sim.Options) {
	o.Pool = labtest.Pool(t, "xfs", 512<<20)
	providertest.Run(t, func(t *testing.T) providertest.Harness {
		c := start(t, o)
		return providertest.Harness{Provider: c.open(t, c.options(instanceA)), Size: gib, Foreign: providertest.Loop(t, 1<<20), Hold: claim}
	})
}

func TestEC2KeepsTheContract(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	for _, c := range []struct {
		name string
		xen  bool
	}{{"on Nitro, with serial numbers", false}, {"on Xen, by device names", true}} {
		t.Run(c.name, func(t *testing.T) {
			conformance(t, ec2sim.Options{Instances: []ec2sim.Instance{{ID: instanceA, Xen: c.xen}, {ID: instanceB, Xen: c.xen}}})
		})
	}
}
