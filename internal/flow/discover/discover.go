// Package discover finds where a running cluster's bytes live.
//
//	running cluster → directories → mounts → device tree → volumes = Topology
//
// What always holds: it changes nothing; whatever it cannot vouch for is an
// error that names it, never a hole in the topology.
package discover

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// Options chooses what to look at.
type Options struct {
	Server       postgres.Running
	Resolve      host.Resolve
	AllowForeign bool // other data on the cluster's filesystems may be frozen along
}

// Run returns the topology of the server's data directory, WAL and
// tablespaces. Errors wrap backup.ErrUnsupported or ErrNotThere where
// something is refused; all refusals are reported together.
func Run(ctx context.Context, o Options) (backup.Topology, error) {
	t := backup.Topology{NotCovered: o.Server.ConfigFiles}
	byNumber := map[[2]int]int{}
	var refused []error
	for _, p := range places(o.Server) {
		m, err := host.MountOf(p.Path)
		if err != nil {
			return t, fmt.Errorf("%s: %w", p.Path, err)
		}
		number := [2]int{m.Major, m.Minor}
		i, known := byNumber[number]
		if !known {
			fs, err := filesystem(ctx, m, o.Resolve)
			if err != nil {
				refused = append(refused, fmt.Errorf("%s %s: %w", p.Kind, p.Path, err))
				continue
			}
			i = len(t.Filesystems)
			byNumber[number] = i
			t.Filesystems = append(t.Filesystems, fs)
		}
		p.Filesystem = i
		p.Rel, err = filepath.Rel(t.Filesystems[i].Mountpoint, p.Path)
		if err != nil || p.Rel == ".." || strings.HasPrefix(p.Rel, "../") {
			refused = append(refused, backup.Hint(fmt.Errorf("%s %s is seen through %s, another mount of the filesystem at %s: %w",
				p.Kind, p.Path, m.Mountpoint, t.Filesystems[i].Mountpoint, backup.ErrUnsupported), "mount each filesystem of the cluster once"))
			continue
		}
		t.Places = append(t.Places, p)
	}
	if len(refused) > 0 {
		return t, errors.Join(refused...)
	}
	if !o.AllowForeign {
		if err := refuseForeign(t); err != nil {
			return t, err
		}
	}
	return t, t.Validate()
}

func places(s postgres.Running) []backup.Place {
	out := []backup.Place{{Kind: backup.PlaceData, Path: s.DataDirectory}}
	wal := backup.Place{Kind: backup.PlaceWAL, Path: s.WALDirectory}
	if s.WALDirectory != filepath.Join(s.DataDirectory, "pg_wal") {
		wal.Link = "pg_wal"
	}
	out = append(out, wal)
	for _, ts := range s.Tablespaces {
		out = append(out, backup.Place{Kind: backup.PlaceTablespace, OID: ts.OID, Path: ts.Path, Link: ts.Link})
	}
	return out
}

func filesystem(ctx context.Context, m host.Mount, resolve host.Resolve) (backup.Filesystem, error) {
	if err := host.CheckCuttable(m, ""); err != nil { // the clearest reason first
		return backup.Filesystem{}, err
	}
	device, err := host.Tree(ctx, m.Major, m.Minor, resolve)
	if err != nil {
		return backup.Filesystem{}, err
	}
	if err := host.CheckCuttable(m, "/dev/"+device.Name); err != nil {
		return backup.Filesystem{}, err
	}
	id, err := host.Identify(ctx, "/dev/"+device.Name)
	if err != nil {
		return backup.Filesystem{}, err
	}
	return backup.Filesystem{Type: m.Type, UUID: id.UUID, Label: id.Label, Mountpoint: m.Mountpoint, Options: m.AllOptions(),
		Size: device.Size, Device: device}, nil
}

func refuseForeign(t backup.Topology) error {
	for i, fs := range t.Filesystems {
		var rels []string
		for _, p := range t.Places {
			if p.Filesystem == i {
				rels = append(rels, p.Rel)
			}
		}
		foreign, err := host.Foreign(fs.Mountpoint, rels)
		if err != nil {
			return err
		}
		if len(foreign) > 0 {
			return backup.Hint(fmt.Errorf("%s holds other data that would be frozen along with the cluster: %s: %w",
				fs.Mountpoint, strings.Join(foreign, ", "), backup.ErrUnsupported),
				"move it elsewhere, or say --allow-foreign if its users can wait as long as PostgreSQL's")
		}
	}
	return nil
}
