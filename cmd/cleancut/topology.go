package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) topologyCommand() *cobra.Command {
	var o flow.BackupOptions
	c := &cobra.Command{
		Use: "topology", GroupID: "look", Args: exactly(0, ""),
		Short: "Show where the running cluster's bytes live, down to the volumes",
		RunE: func(c *cobra.Command, _ []string) error {
			f, s, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			o.Target = s.target()
			running, t, err := f.Discover(c.Context(), o)
			if err != nil {
				return err
			}
			reach := "atomic, by freezing " + plural(len(t.Filesystems), "filesystem") + " while " + plural(len(t.Members()), "volume") + " are snapshotted"
			return a.print(map[string]any{"cluster": s.name, "server": running.Server, "topology": t, "members": t.Members(), "reachable": backup.Atomic, "why": reach}, func() {
				a.line("cluster %s: %s in %s", s.name, running.Server.Version, running.Server.DataDirectory)
				a.topologyText(t)
				a.line("\na cut can be %s", reach)
				if s.cluster.Provider == "local" {
					a.line("  (no group snapshot: the local provider cuts each volume by itself)")
				} else {
					a.line("  or by one CreateSnapshots call for all volumes of an instance, which freezes nothing: --mode auto asks EC2 for that first")
				}
			})
		},
	}
	c.Flags().BoolVar(&o.AllowForeign, "allow-foreign", false, "do not refuse other data on the cluster's filesystems")
	return c
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func (a *app) topologyText(t backup.Topology) {
	a.line("\ndirectories:")
	rows := [][]string{}
	for _, p := range t.Places {
		name := string(p.Kind)
		if p.OID != 0 {
			name += fmt.Sprintf(" %d", p.OID)
		}
		via := ""
		if p.Link != "" {
			via = "(link " + p.Link + ")"
		}
		rows = append(rows, []string{"  " + name, p.Path, "on " + t.Filesystems[p.Filesystem].Mountpoint, via})
	}
	a.table(rows)
	a.line("filesystems:")
	for _, fs := range t.Filesystems {
		a.line("  %s  %s %s, %s, mounted with %s", fs.Mountpoint, fs.Type, fs.UUID, fs.Size, strings.Join(fs.Options, ","))
		a.deviceText(fs.Device, "    ")
	}
	for _, n := range t.NotCovered {
		a.line("  not on any volume, kept beside the manifest: %s", n)
	}
}

func (a *app) deviceText(d backup.Device, indent string) {
	switch d.Kind {
	case backup.DeviceArray:
		a.line("%s%s  md %s of %d, chunk %s, %s", indent, d.Name, d.Array.Level, len(d.Members), d.Array.ChunkBytes, d.Array.UUID)
	case backup.DeviceLogicalVolume:
		a.line("%s%s  %s", indent, d.Name, logicalVolumeText(*d.LogicalVolume, len(d.Members)))
	case backup.DevicePartition:
		a.line("%s%s  partition %d, %s", indent, d.Name, d.Partition.Number, d.Size)
	case backup.DeviceVolume:
		a.line("%s%s  volume %s, %s (%s)", indent, d.Name, d.Volume.ID, d.Volume.Size, d.Volume.Provider)
	}
	for _, m := range d.Members {
		a.deviceText(m, indent+"  ")
	}
}

// logicalVolumeText says how it lies on its group's physical volumes, which
// are the lines below.
func logicalVolumeText(lv backup.LogicalVolume, members int) string {
	how := "linear"
	if n, size := lv.Stripes(); n > 1 {
		how = fmt.Sprintf("striped over %d, stripe %s", n, size)
	}
	if len(lv.Segments) > 1 {
		how += ", " + plural(len(lv.Segments), "segment")
	}
	return fmt.Sprintf("logical volume %s/%s, %s, group of %s, %s", lv.Group.Name, lv.Name, how, plural(members, "physical volume"), lv.UUID)
}
