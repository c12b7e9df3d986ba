package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/catalog"
	"cleancut/internal/catalog/s3test"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

// The two instances of the story.
const (
	instanceA = "i-0000000000000000a" // production
	instanceB = "i-0000000000000000b" // restores
)

// cloud is the EC2 ground: an EC2 test server over the pool and an S3 server,
// both asked through the real SDK. Both hosts reach them at the same loopback
// addresses, each in a network of its own.
type cloud struct {
	*story
	devices string
	sim     *ec2sim.Server
	s3      http.Handler
	addr    map[string]string // of handlers
	ec2     *ec2.Provider
}

func (s *story) newCloud(ctx context.Context) (_ *cloud, err error) {
	c := &cloud{story: s, devices: filepath.Join(s.work, "ec2"), addr: map[string]string{}}
	// A rate window as EC2 has it would have the story wait for nothing.
	c.sim, err = ec2sim.New(ctx, ec2sim.Options{Pool: s.pool, Devices: c.devices, Latency: s.Latency, RateWindow: time.Nanosecond,
		Instances: []ec2sim.Instance{{ID: instanceA}, {ID: instanceB}}, Log: s.Log})
	if err != nil {
		return nil, err
	}
	s.later("EC2 test server", func(context.Context) error { return c.sim.Close() })
	if s.Skew > 0 {
		c.sim.Inject(ec2sim.Fault{Action: "CreateSnapshot", Kind: ec2sim.Skew, Delay: s.Skew})
	}
	if c.s3, err = s3test.Fake(); err != nil {
		return nil, fmt.Errorf("S3 server: %w", err)
	}
	for name, handler := range c.handlers() {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		c.addr[name] = l.Addr().String()
		s.serve(l, handler)
	}
	s.setEnvironment(c.environmentOf(instanceA))
	if c.ec2, err = ec2.Open(ctx, ec2.Options{Devices: filepath.Join(c.devices, instanceA)}, s.Log); err != nil {
		return nil, err
	}
	s.later("nothing left at EC2", func(ctx context.Context) error {
		if err := isEmpty(ctx, c.ec2); err != nil {
			return fmt.Errorf("EC2: %w", err)
		}
		s.checked = append(s.checked, "no volume and no snapshot at EC2")
		return nil
	})
	return c, nil
}

func (c *cloud) handlers() map[string]http.Handler {
	return map[string]http.Handler{"ec2": c.sim, "s3": c.s3}
}

// serve answers on l until the story is undone.
func (s *story) serve(l net.Listener, h http.Handler) {
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	s.later("listener "+l.Addr().String(), func(context.Context) error {
		err := server.Close()
		if end := <-ended; !errors.Is(end, http.ErrServerClosed) {
			err = errors.Join(err, end)
		}
		return err
	})
}

// setEnvironment sets variables of this process until the story is undone.
func (s *story) setEnvironment(env []string) {
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		had, ok := os.LookupEnv(k)
		_ = os.Setenv(k, v) // only a name with = in it or a NUL is refused
		s.later("variable "+k, func(context.Context) error {
			if !ok {
				return os.Unsetenv(k)
			}
			return os.Setenv(k, had)
		})
	}
}

// environmentOf is what the SDK of one instance finds. Nothing of a real
// account may shine through: the credentials come from the instance's role, as
// the test server gives them.
func (c *cloud) environmentOf(instance string) []string {
	return []string{
		"AWS_EC2_METADATA_SERVICE_ENDPOINT=" + ec2sim.MetadataEndpoint("http://"+c.addr["ec2"], instance),
		"AWS_ENDPOINT_URL_EC2=http://" + c.addr["ec2"],
		"AWS_ENDPOINT_URL_S3=http://" + c.addr["s3"],
		"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null", "AWS_PROFILE=", "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=",
		"AWS_SESSION_TOKEN=", "AWS_WEB_IDENTITY_TOKEN_FILE=", "AWS_ENDPOINT_URL=",
	}
}

func (c *cloud) url() string {
	return "s3://" + s3test.Bucket + "/demo?path_style=true&region=eu-central-1"
}

func (c *cloud) provider(context.Context) (provider.Provider, error) { return c.ec2, nil }

func (c *cloud) store(ctx context.Context) (catalog.Store, error) { return catalog.Open(c.url()) }

func (c *cloud) keepAway() []string { return []string{c.pool} }

func (c *cloud) hide() []string { return []string{filepath.Join(c.devices, instanceA)} }

func (c *cloud) arguments() []string {
	return []string{"--provider", "ec2", "--catalog", c.url()}
}

func (c *cloud) environment() []string {
	return append(c.environmentOf(instanceB), "CLEANCUT_EC2_DEVICES="+filepath.Join(c.devices, instanceB))
}

func (c *cloud) calls() map[string]int {
	out := map[string]int{"CreateSnapshots": 0, "CreateSnapshot": 0} // also where they were never called
	maps.Copy(out, c.sim.Calls())
	return out
}

// admit listens at the same addresses in the other host's network.
func (c *cloud) admit(_ context.Context, pid int) error {
	for name, handler := range c.handlers() {
		l, err := listenIn(pid, c.addr[name])
		if err != nil {
			return fmt.Errorf("listen in the other host's network: %w", err)
		}
		c.serve(l, handler)
	}
	return nil
}

// listenIn listens in the network namespace of a process. A socket belongs to
// the namespace of the thread that made it (network_namespaces(7)).
func listenIn(pid int, addr string) (l net.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var ns *os.File
		if ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
			return
		}
		defer ns.Close()
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("setns: %w", err)
			return
		}
		l, err = net.Listen("tcp", addr)
	}()
	<-done
	return l, err
}
