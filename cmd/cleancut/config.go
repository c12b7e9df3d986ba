package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// config is the configuration file, see docs/configuration.md.
type config struct {
	Catalog   string                   `toml:"catalog"`
	State     string                   `toml:"state"`
	Host      string                   `toml:"host"`
	BinDirs   []string                 `toml:"bin_dirs"`
	Cluster   map[string]clusterConfig `toml:"cluster"`
	Provider  providerConfig           `toml:"provider"`
	Retention retentionConfig          `toml:"retention"`
	Clone     cloneConfig              `toml:"clone"`
	Nightly   nightlyConfig            `toml:"nightly"`
}

type clusterConfig struct {
	DSN           string          `toml:"dsn"`
	DataDirectory string          `toml:"data_directory"`
	Provider      string          `toml:"provider"`
	Retention     retentionConfig `toml:"retention"`
	Nightly       nightlyConfig   `toml:"nightly"`
}

type providerConfig struct {
	Local struct {
		Pool string `toml:"pool"`
	} `toml:"local"`
	EC2 struct {
		Region     string `toml:"region"`
		Endpoint   string `toml:"endpoint"`
		Instance   string `toml:"instance"`
		Devices    string `toml:"devices"`
		VolumeType string `toml:"volume_type"`
		IOPS       int32  `toml:"iops"`
		Throughput int32  `toml:"throughput"`
		Rate       int32  `toml:"initialization_rate"`
		KMSKey     string `toml:"kms_key"`
	} `toml:"ec2"`
}

const (
	defaultConfig  = "/etc/cleancut.toml"
	defaultCatalog = "file:///var/lib/cleancut"
	defaultState   = "/var/lib/cleancut-host"
	defaultDSN     = "host=/var/run/postgresql user=postgres"
)

// overrides are the keys given by flag or by CLEANCUT_ variable, which beat
// the file.
type overrides struct {
	flags *pflag.FlagSet
}

// overridable names every flag that overrides a key, with its help.
func overridable() map[string]string {
	return map[string]string{
		"catalog":        "where manifests, verdicts and dumps are kept: file:///DIR or s3://BUCKET/PREFIX (default " + defaultCatalog + ")",
		"state":          "folder for what this host remembers: copies and locks (default " + defaultState + ")",
		"host-name":      "name of this host in tags and records (default: the system's)",
		"bin-dirs":       "where PostgreSQL's programs are, colon-separated (default: Debian's and PGDG's places, PATH)",
		"dsn":            "connection string of the running server (default \"" + defaultDSN + "\")",
		"data-directory": "data directory of the running server, instead of a dsn",
		"provider":       "who owns the volumes: local or ec2",
		"pool":           "pool of the local provider: a folder on XFS (reflink=1) or btrfs",
	}
}

// overridableEC2 names the flags for the keys of [provider.ec2]. They are left
// out of the help of every command: a configuration file or variables are the
// place for them.
func overridableEC2() map[string]string {
	return map[string]string{
		"ec2-region":              "region (default: the SDK's chain, then the instance's metadata)",
		"ec2-endpoint":            "address of EC2's API",
		"ec2-instance":            "this instance (default: the instance's metadata)",
		"ec2-devices":             "folder that stands for /, with sys/block and dev in it: for the test server",
		"ec2-volume-type":         "type of the volumes that are made (default gp3)",
		"ec2-iops":                "their IOPS",
		"ec2-throughput":          "their throughput, MiB/s",
		"ec2-initialization-rate": "how fast EC2 fills volumes from snapshots, MiB/s (costs extra)",
		"ec2-kms-key":             "key for volumes from unencrypted snapshots",
	}
}

func (o *overrides) register(p *pflag.FlagSet) {
	o.flags = p
	for name, usage := range overridable() {
		p.String(name, "", usage+" [$"+variable(name)+"]")
	}
	for name, usage := range overridableEC2() {
		p.String(name, "", usage+" [$"+variable(name)+"]")
		_ = p.MarkHidden(name) // it was made one line above
	}
}

func variable(flag string) string {
	return "CLEANCUT_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// set overwrites *to by the flag, else by the variable, if either is given.
func (o *overrides) set(flag string, to *string) {
	if f := o.flags.Lookup(flag); f.Changed {
		*to = f.Value.String()
	} else if v, ok := os.LookupEnv(variable(flag)); ok {
		*to = v
	}
}

// setNumber is set for a number.
func (o *overrides) setNumber(flag string, to *int32) error {
	var text string
	if o.set(flag, &text); text == "" {
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 0 {
		return fmt.Errorf("%w: --%s (or %s): %q is no number that could be meant", backup.ErrUsage, flag, variable(flag), text)
	}
	*to = int32(n)
	return nil
}

// settings is the configuration of one cluster, overrides applied.
type settings struct {
	config
	name    string
	cluster clusterConfig
}

func (a *app) settings() (s settings, err error) {
	if s.config, err = readConfig(a.configFile()); err != nil {
		return s, err
	}
	if s.name, err = a.clusterName(s.config); err != nil {
		return s, err
	}
	s.cluster = s.Cluster[s.name]
	bin := strings.Join(s.BinDirs, ":")
	for flag, to := range map[string]*string{"catalog": &s.Catalog, "state": &s.State, "host-name": &s.Host, "bin-dirs": &bin,
		"dsn": &s.cluster.DSN, "data-directory": &s.cluster.DataDirectory, "provider": &s.cluster.Provider, "pool": &s.Provider.Local.Pool,
		"ec2-region": &s.Provider.EC2.Region, "ec2-endpoint": &s.Provider.EC2.Endpoint, "ec2-instance": &s.Provider.EC2.Instance,
		"ec2-devices": &s.Provider.EC2.Devices, "ec2-volume-type": &s.Provider.EC2.VolumeType, "ec2-kms-key": &s.Provider.EC2.KMSKey} {
		a.over.set(flag, to)
	}
	for flag, to := range map[string]*int32{"ec2-iops": &s.Provider.EC2.IOPS, "ec2-throughput": &s.Provider.EC2.Throughput, "ec2-initialization-rate": &s.Provider.EC2.Rate} {
		if err := a.over.setNumber(flag, to); err != nil {
			return s, err
		}
	}
	s.BinDirs = strings.FieldsFunc(bin, func(r rune) bool { return r == ':' })
	orElse(&s.Catalog, defaultCatalog)
	orElse(&s.State, defaultState)
	orElse(&s.cluster.Provider, "local")
	if s.cluster.DSN == "" && s.cluster.DataDirectory == "" {
		s.cluster.DSN = defaultDSN
	}
	if s.Host == "" {
		if s.Host, err = os.Hostname(); err != nil {
			return s, fmt.Errorf("name of this host: %w", err)
		}
	}
	return s, nil
}

func orElse(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// configFile returns the file to read; "" for none.
func (a *app) configFile() string {
	file := a.file
	if file == "" {
		file = os.Getenv("CLEANCUT_CONFIG")
	}
	if file == "" {
		if _, err := os.Stat(defaultConfig); err == nil {
			return defaultConfig
		}
	}
	return file
}

// clusterName picks the cluster: the flag, the variable, the only one in the
// file, or main.
func (a *app) clusterName(c config) (string, error) {
	name := a.name
	if name == "" {
		name = os.Getenv("CLEANCUT_CLUSTER")
	}
	var known []string
	for k := range c.Cluster {
		known = append(known, k)
	}
	sort.Strings(known)
	switch {
	case name == "" && len(known) == 1:
		name = known[0]
	case name == "" && len(known) > 1:
		return "", fmt.Errorf("%w: the configuration has clusters %s: choose one with --cluster", backup.ErrUsage, strings.Join(known, ", "))
	case name == "":
		name = "main"
	}
	if _, ok := c.Cluster[name]; !ok && len(known) > 0 {
		return "", fmt.Errorf("%w: the configuration has no cluster %q, only %s", backup.ErrUsage, name, strings.Join(known, ", "))
	}
	return name, backup.CheckClusterName(name)
}

// readConfig reads the file strictly: an unknown key or a value of the wrong
// kind is shown with its line.
func readConfig(file string) (config, error) {
	var c config
	if file == "" {
		return c, nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return c, fmt.Errorf("%w: configuration: %w", backup.ErrUsage, err)
	}
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&c)
	var strict *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		return c, fmt.Errorf("%w: configuration %s: unknown key\n%s", backup.ErrUsage, file, strict.String())
	case errors.As(err, &decode):
		return c, fmt.Errorf("%w: configuration %s:\n%s", backup.ErrUsage, file, decode.String())
	case err != nil:
		return c, fmt.Errorf("%w: configuration %s: %w", backup.ErrUsage, file, err)
	}
	for name := range c.Cluster {
		if err := backup.CheckClusterName(name); err != nil {
			return c, fmt.Errorf("configuration %s: %w", file, err)
		}
	}
	return c, nil
}

// provider opens the provider of the settings.
func (a *app) provider(ctx context.Context, s settings) (provider.Provider, error) {
	switch s.cluster.Provider {
	case "local":
		if s.Provider.Local.Pool == "" {
			return nil, backup.Hint(fmt.Errorf("%w: the local provider needs its pool", backup.ErrUsage),
				"give --pool DIR, or `pool` under [provider.local] in the configuration")
		}
		return local.Open(ctx, s.Provider.Local.Pool, a.log)
	case "ec2":
		e := s.Provider.EC2
		return ec2.Open(ctx, ec2.Options{Region: e.Region, Endpoint: e.Endpoint, Instance: e.Instance, Devices: e.Devices, VolumeType: e.VolumeType,
			IOPS: e.IOPS, Throughput: e.Throughput, InitializationRate: e.Rate, KMSKey: e.KMSKey}, a.log)
	}
	return nil, fmt.Errorf("%w: provider %q: local or ec2", backup.ErrUsage, s.cluster.Provider)
}

// flow opens everything and wires it.
func (a *app) flow(ctx context.Context) (*flow.Flow, settings, error) {
	s, err := a.settings()
	if err != nil {
		return nil, s, err
	}
	store, err := catalog.Open(s.Catalog)
	if err != nil {
		return nil, s, err
	}
	p, err := a.provider(ctx, s)
	if err != nil {
		return nil, s, err
	}
	st, err := state.Open(s.State)
	if err != nil {
		return nil, s, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, s, fmt.Errorf("own program: %w", err)
	}
	return &flow.Flow{Provider: p, Catalog: catalog.New(store, s.name), State: st, Cluster: s.name, Host: s.Host, Tool: version,
		Watchdog: []string{exe, "watchdog"}, Program: exe, BinDirs: s.BinDirs, Log: a.log, Progress: a.progress}, s, nil
}

// bareFlow opens the state folder only: thaw must work when everything else
// is broken.
func (a *app) bareFlow() (*flow.Flow, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	st, err := state.Open(s.State)
	return &flow.Flow{State: st, Cluster: s.name, Host: s.Host, Log: a.log, Progress: a.progress}, err
}

func (s settings) target() postgres.Target {
	return postgres.Target{DSN: s.cluster.DSN, DataDirectory: s.cluster.DataDirectory}
}

// keepAway lists what must not lie on a filesystem that is frozen.
func (s settings) keepAway() []string {
	out := []string{s.Provider.Local.Pool, os.TempDir()}
	if dir, ok := strings.CutPrefix(s.Catalog, "file://"); ok {
		out = append(out, dir)
	}
	return out
}
