package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// Reopen brings a copy that was ready and is down up again, from wherever it
// is: its server killed, its filesystems unmounted, its arrays stopped, its
// volumes detached by a reboot. What stands is left standing, and the data is
// as the server left it: nothing is prepared anew. Of o the Manifest, Copy,
// Installation, Settings, Save and Progress count. On an error the copy stays
// as far as it came; Reopen may be called again, and Undo removes it.
func Reopen(ctx context.Context, p Provider, o Options) (backup.Copy, *postgres.Instance, error) {
	c, m := o.Copy, o.Manifest
	if err := postgres.Kill(ctx, c.Root); err != nil { // of a server that died its children may live
		return c, nil, err
	}
	o.Progress("volumes", "attach")
	if err := reattach(ctx, p, &c); err != nil {
		return c, nil, err
	}
	o.Progress("devices", "assemble")
	c.Filesystems = nil
	if err := assemble(ctx, m, &c); err != nil {
		return c, nil, err
	}
	if err := o.Save(c); err != nil {
		return c, nil, err
	}
	o.Progress("mount", c.Root)
	if err := mount(ctx, m, &c); err != nil {
		return c, nil, err
	}
	// The process ids in these may belong to somebody else since the reboot, and
	// the server would take that for itself (CreateLockFile); Kill has seen that
	// none of its processes is there.
	for _, lock := range []string{filepath.Join(c.DataDirectory, "postmaster.pid"), filepath.Join(c.SocketDir, fmt.Sprintf(".s.PGSQL.%d.lock", c.Port))} {
		if err := os.Remove(lock); err != nil && !errors.Is(err, os.ErrNotExist) {
			return c, nil, fmt.Errorf("stale lock of a server: %w", err)
		}
	}
	o.Progress("start", m.Server.Version)
	instance, err := postgres.Start(ctx, postgres.Copy{Root: c.Root, Data: c.DataDirectory, Server: m.Server, Installation: o.Installation, Settings: o.Settings, Listen: o.Listen, Program: o.Program})
	return c, instance, err
}

// reattach attaches the volumes of a ledger, which must all be there and carry
// the copy's tags.
func reattach(ctx context.Context, p Provider, c *backup.Copy) error {
	inv, err := p.List(ctx, c.Tags())
	if err != nil {
		return fmt.Errorf("volumes of copy %s: %w", c.ID, err)
	}
	c.Volumes = slices.Clone(c.Volumes)
	for i := range c.Volumes {
		v := &c.Volumes[i]
		if !slices.ContainsFunc(inv.Volumes, func(is provider.Volume) bool { return is.ID == v.Volume }) {
			return fmt.Errorf("volume %s of copy %s: %w", v.Volume, c.ID, backup.ErrNotFound)
		}
		if v.Device, err = p.Attach(ctx, v.Volume); err != nil {
			return fmt.Errorf("attach %s: %w", v.Volume, err)
		}
	}
	return nil
}

// Down says what keeps a copy that was ready from having a running server; ""
// if nothing below the server does. volumes are those of the provider that
// carry the copy's tags.
func Down(c backup.Copy, volumes []provider.Volume) string {
	var gone, detached []string
	for _, v := range c.Volumes {
		i := slices.IndexFunc(volumes, func(is provider.Volume) bool { return is.ID == v.Volume })
		switch {
		case i < 0:
			gone = append(gone, string(v.Volume))
		case volumes[i].Attached == "":
			detached = append(detached, string(v.Volume))
		}
	}
	switch {
	case len(gone) > 0:
		return fmt.Sprintf("its volumes %v are gone", gone)
	case len(detached) == len(c.Volumes):
		return "its volumes are not attached"
	case len(detached) > 0:
		return fmt.Sprintf("its volumes %v are not attached", detached)
	}
	for _, fs := range c.Filesystems {
		if on, err := host.MountOf(fs.Mountpoint); err != nil || on.Mountpoint != fs.Mountpoint {
			return "nothing is mounted at " + fs.Mountpoint
		}
	}
	return ""
}
