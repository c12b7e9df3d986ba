package drill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

// cloud is an EC2 test server over the pool, with an instance for production
// and one for the host that judges.
type cloud struct {
	sim    *ec2sim.Server
	server *http.Server
	ended  chan error
	a, b   *ec2.Provider
}

const (
	instanceA = "i-0000000000000000a"
	instanceB = "i-0000000000000000b"
)

// newCloud starts it and asks nothing of a real account: address and
// credentials are the test server's, no file of the user's is read. The
// variables stay set until the program ends.
func newCloud(ctx context.Context, pool, devices string, log *slog.Logger) (_ *cloud, err error) {
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": ec2sim.AccessKey, "AWS_SECRET_ACCESS_KEY": ec2sim.SecretKey, "AWS_SESSION_TOKEN": "", "AWS_PROFILE": "",
		"AWS_WEB_IDENTITY_TOKEN_FILE": "", "AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull} {
		if err := os.Setenv(name, value); err != nil {
			return nil, fmt.Errorf("EC2 test server: %w", err)
		}
	}
	c := &cloud{ended: make(chan error, 1)}
	// The drill's cuts follow each other faster than EBS would let them.
	o := ec2sim.Options{Pool: pool, Devices: devices, Region: "eu-central-1", RateWindow: time.Nanosecond, Instances: []ec2sim.Instance{{ID: instanceA}, {ID: instanceB}}}
	if c.sim, err = ec2sim.New(ctx, o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if err := c.hideLoops(devices); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("EC2 test server: %w", err)
	}
	c.server = &http.Server{Handler: c.sim, ReadHeaderTimeout: time.Minute}
	go func() { c.ended <- c.server.Serve(l) }()
	for instance, p := range map[string]**ec2.Provider{instanceA: &c.a, instanceB: &c.b} {
		*p, err = ec2.Open(ctx, ec2.Options{Region: o.Region, Endpoint: "http://" + l.Addr().String(), Instance: instance,
			Devices: filepath.Join(devices, instance), SnapshotGap: o.RateWindow}, log)
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

// hideLoops has LVM look at the volumes only and not also at the loop devices
// that they lie on, where it would find all its labels a second time.
func (c *cloud) hideLoops(devices string) error {
	if c.sim.GroupCuts() != "" { // the volumes are the loop devices
		return nil
	}
	dir := devices + "-lvm"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("EC2 test server: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lvm.conf"), []byte(`devices { global_filter = [ "r|^/dev/loop|" ] }`+"\n"), 0o644); err != nil {
		return fmt.Errorf("EC2 test server: %w", err)
	}
	return os.Setenv("LVM_SYSTEM_DIR", dir)
}

// close ends the server and takes away what it made.
func (c *cloud) close() error {
	var err error
	if c.server != nil {
		err = c.server.Close()
		if end := <-c.ended; !errors.Is(end, http.ErrServerClosed) {
			err = errors.Join(err, end)
		}
	}
	return errors.Join(err, c.sim.Close())
}
