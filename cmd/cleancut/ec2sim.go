package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/provider/ec2/ec2sim"
)

func (a *app) ec2simCommand() *cobra.Command {
	var o ec2sim.Options
	var listen string
	var instances, faults []string
	c := &cobra.Command{
		Use: "ec2sim", GroupID: "look", Args: exactly(0, ""),
		Short: "Play EC2 over a pool on this machine, for tests: real block devices, real bytes",
		Long: `Play the part of EC2 and EBS that cleancut uses, over a pool on this machine:
what is attached is a real block device (a loop device, where the kernel has
device mapper one of that over it), and a snapshot is a real point in time. It
serves the EC2 query protocol and the instance metadata service (IMDSv2) of
each instance until it is interrupted, and then takes away every volume,
snapshot and device it made.

It is a test server: everybody on this machine may use it, and nothing it
holds survives it. It listens on a loopback address only. CreateSnapshots
needs device mapper and is refused without.

A fault makes calls go wrong: ACTION[@NTH]:KIND[=VALUE][*TIMES], for example
CreateSnapshot:throttle*3 (the first three), CreateSnapshots@2:lose-answer
(the second), DescribeVolumes:delay=300ms (every one). docs/ec2sim.md lists
the kinds, and what this server does not do.`,
		Example: "  cleancut ec2sim --listen 127.0.0.1:4510 --pool /srv/pool\n" +
			"  cleancut ec2sim --listen 127.0.0.1:4510 --pool /srv/pool --fault 'CreateVolume@1:lose-answer' --latency 50ms",
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			if o.Instances, err = parseInstances(instances); err != nil {
				return err
			}
			var table []ec2sim.Fault
			for _, text := range faults {
				f, err := ec2sim.ParseFault(text)
				if err != nil {
					return err
				}
				table = append(table, f)
			}
			if o.Pool == "" {
				return backup.Hint(fmt.Errorf("%w: no pool", backup.ErrUsage), "name a folder on XFS (reflink=1) or btrfs: --pool DIR")
			}
			o.Log = a.log
			return a.playEC2(c.Context(), listen, o, table)
		},
	}
	f := c.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:4510", "loopback address and port; port 0: any")
	f.StringVar(&o.Pool, "pool", "", "folder on XFS (reflink=1) or btrfs; it becomes a pool if it is none")
	f.StringSliceVar(&instances, "instances", nil, "ID[:nitro|:xen][:ZONE], several (default two on Nitro)")
	f.StringArrayVar(&faults, "fault", nil, "ACTION[@NTH]:KIND[=VALUE][*TIMES], may be given several times")
	f.StringVar(&o.Devices, "devices", "", "folder below which each instance sees its devices (default POOL/ec2sim)")
	f.StringVar(&o.Region, "region", "eu-central-1", "region")
	f.StringVar(&o.Zone, "zone", "", "availability zone (default the region's a)")
	f.DurationVar(&o.Latency, "latency", 0, "of every call")
	f.DurationVar(&o.Completion, "completion", 50*time.Millisecond, "how long a snapshot stays pending at least")
	f.DurationVar(&o.RateWindow, "rate-window", 15*time.Second, "one snapshot per volume in it")
	return c
}

// parseInstances reads ID[:nitro|:xen][:ZONE].
func parseInstances(texts []string) ([]ec2sim.Instance, error) {
	var out []ec2sim.Instance
	for _, text := range texts {
		parts := strings.Split(text, ":")
		i := ec2sim.Instance{ID: parts[0]}
		for _, p := range parts[1:] {
			switch p {
			case "xen":
				i.Xen = true
			case "nitro":
			default:
				if i.Zone != "" || p == "" {
					return nil, backup.Hint(fmt.Errorf("%w: instance %q", backup.ErrUsage, text), "write ID[:nitro|:xen][:ZONE]")
				}
				i.Zone = p
			}
		}
		out = append(out, i)
	}
	return out, nil
}

// listenLocally listens, but on a loopback address only.
func listenLocally(ctx context.Context, address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("%w: listen on %q: %w", backup.ErrUsage, address, err), "write ADDRESS:PORT, such as 127.0.0.1:4510")
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, backup.Hint(fmt.Errorf("%w: listen on %q: it checks nobody's signature, so only on a loopback address", backup.ErrUsage, address), "use 127.0.0.1 or [::1]")
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}

// played is what a user of the server needs to know.
type played struct {
	URL       string           `json:"url"`
	Pool      string           `json:"pool"`
	GroupCuts bool             `json:"group_cuts"`
	Reason    string           `json:"no_group_cuts_because,omitempty"`
	Instances []playedInstance `json:"instances"`
}

type playedInstance struct {
	ID  string            `json:"id"`
	Env map[string]string `json:"env"`
}

// playEC2 serves until ctx ends and then takes everything away.
func (a *app) playEC2(ctx context.Context, address string, o ec2sim.Options, faults []ec2sim.Fault) (err error) {
	l, err := listenLocally(ctx, address)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	s, err := ec2sim.New(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	s.Inject(faults...)
	p := a.played(s, "http://"+l.Addr().String(), o)
	if err := a.print(p, func() { a.playedText(p) }); err != nil {
		return err
	}
	server := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(stop); err != nil { // calls that last: their connections are closed
		return errors.Join(server.Close(), fmt.Errorf("stop serving: %w", err))
	}
	return nil
}

func (a *app) played(s *ec2sim.Server, url string, o ec2sim.Options) played {
	p := played{URL: url, Pool: o.Pool, GroupCuts: s.GroupCuts() == "", Reason: s.GroupCuts()}
	for _, id := range s.Instances() {
		p.Instances = append(p.Instances, playedInstance{id, map[string]string{
			"AWS_ENDPOINT_URL_EC2":              url,
			"AWS_EC2_METADATA_SERVICE_ENDPOINT": ec2sim.MetadataEndpoint(url, id),
			"AWS_REGION":                        cmp.Or(o.Region, "eu-central-1"),
			"AWS_ACCESS_KEY_ID":                 ec2sim.AccessKey,
			"AWS_SECRET_ACCESS_KEY":             ec2sim.SecretKey,
			"CLEANCUT_PROVIDER":                 "ec2",
			"CLEANCUT_EC2_DEVICES":              s.Devices(id),
		}})
	}
	return p
}

func (a *app) playedText(p played) {
	a.line("# EC2 on %s over %s until it is interrupted", p.URL, p.Pool)
	if !p.GroupCuts {
		a.line("# CreateSnapshots is refused: %s", p.Reason)
	}
	for n, i := range p.Instances {
		a.line("# as instance %s:", i.ID)
		for _, name := range slices.Sorted(maps.Keys(i.Env)) {
			switch {
			case n == 0:
				a.line("export %s=%s", name, i.Env[name])
			case i.Env[name] != p.Instances[0].Env[name]:
				a.line("# export %s=%s", name, i.Env[name])
			}
		}
	}
}
