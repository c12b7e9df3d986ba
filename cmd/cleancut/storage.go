package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
)

func (a *app) storageCommand() *cobra.Command {
	hint := "it is `cleancut storage create` or `cleancut storage destroy`"
	c := &cobra.Command{Use: "storage", GroupID: "main", Short: "Make or remove the storage of a cluster: volumes, striped or joined, and a filesystem", Args: known(hint),
		RunE: func(*cobra.Command, []string) error {
			return backup.Hint(fmt.Errorf("%w: storage wants to know what to do", backup.ErrUsage), hint)
		}}
	c.AddCommand(a.storageCreateCommand(), a.storageAttachCommand(), a.storageDestroyCommand())
	return c
}

func (a *app) storageCreateCommand() *cobra.Command {
	var o flow.StorageOptions
	var size, chunk, options string
	c := &cobra.Command{
		Use: "create NAME --mount DIR", Args: exactly(1, "a name"),
		Short: "Make volumes, attach them, build the array and the filesystem, write the fstab and mdadm.conf lines, mount",
		Long: `Make N volumes of equal size, attach them, join them, make a filesystem on
that, the lines in fstab and mdadm.conf that bring it back after a reboot, and
mount it. --level says what joins them: an md array, raid0 or linear (one
volume needs none), or LVM, the volume group cleancut_NAME with the logical
volume data, linear (lvm) or striped over all of them (lvm-striped). If the
pool of the local provider is an empty folder, it is made a pool first.`,
		Example: `  cleancut storage create pg --mount /srv/pg --volumes 4 --size 8G
  cleancut storage create pg --mount /srv/pg --level lvm-striped --chunk 256K --fs ext4`,
		RunE: func(c *cobra.Command, args []string) error {
			var err1, err2 error
			o.Name = args[0]
			o.Size, err1 = backup.ParseBytes(size)
			o.Chunk, err2 = backup.ParseBytes(chunk)
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			o.MountOptions = strings.FieldsFunc(options, func(r rune) bool { return r == ',' })
			s, err := a.settings()
			if err != nil {
				return err
			}
			if err := a.initPool(c, s); err != nil {
				return err
			}
			p, err := a.provider(c.Context(), s)
			if err != nil {
				return err
			}
			o.Host = s.Host
			res, err := flow.CreateStorage(c.Context(), p, o)
			if err != nil {
				return err
			}
			return a.print(res, func() {
				a.line("%s on %s: %s over %s, mounted", o.Filesystem, o.Mountpoint, joinedBy(res), strings.Join(res.Devices, " "))
				for i, v := range res.Volumes {
					a.line("  %s  volume %s, %s", res.Devices[i], v, o.Size)
				}
			})
		},
	}
	f := c.Flags()
	f.StringVar(&o.Mountpoint, "mount", "", "where to mount it (needed)")
	f.IntVar(&o.Volumes, "volumes", 4, "how many volumes")
	f.StringVar(&size, "size", "4G", "size of each volume")
	f.StringVar(&o.Level, "level", "raid0", "raid0 or linear (md), lvm or lvm-striped")
	f.StringVar(&chunk, "chunk", "64K", "chunk size of the stripe, 4K to 1M")
	f.StringVar(&o.Filesystem, "fs", "xfs", "xfs or ext4")
	f.StringVar(&options, "mount-options", "noatime", "mount options, comma-separated")
	tableFlags(c, &o)
	return c
}

func tableFlags(c *cobra.Command, o *flow.StorageOptions) {
	c.Flags().StringVar(&o.Fstab, "fstab", "/etc/fstab", "file for the mount line")
	c.Flags().StringVar(&o.MdadmConf, "mdadm-conf", "/etc/mdadm/mdadm.conf", "file for the array line")
}

// joinedBy names what joins the volumes.
func joinedBy(res flow.StorageResult) string {
	switch {
	case res.LogicalVolume != "":
		return res.LogicalVolume + " of volume group " + res.Group
	case res.Array != "":
		return res.Array
	}
	return "no array"
}

// initPool makes an empty folder a pool.
func (a *app) initPool(c *cobra.Command, s settings) error {
	if s.cluster.Provider != "local" || s.Provider.Local.Pool == "" {
		return nil
	}
	entries, err := os.ReadDir(s.Provider.Local.Pool)
	if err != nil {
		return backup.Hint(fmt.Errorf("%w: pool: %w", backup.ErrUsage, err), "make a filesystem with `mkfs.xfs -m reflink=1`, mount it, and name a folder on it")
	}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			return nil // Open says whether it is a pool
		}
	}
	return local.Init(c.Context(), s.Provider.Local.Pool)
}

// named opens the provider and fills in which storage on which host is meant.
func (a *app) named(c *cobra.Command, name string, o *flow.StorageOptions) (provider.Provider, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	o.Name, o.Host = name, s.Host
	return a.provider(c.Context(), s)
}

func (a *app) storageAttachCommand() *cobra.Command {
	var o flow.StorageOptions
	c := &cobra.Command{
		Use: "attach NAME", Args: exactly(1, "a name"),
		Short: "Bring storage back after a reboot: attach its volumes, then by LVM or the line in mdadm.conf and the one in fstab bring it up and mount",
		RunE: func(c *cobra.Command, args []string) error {
			p, err := a.named(c, args[0], &o)
			if err != nil {
				return err
			}
			res, err := flow.AttachStorage(c.Context(), p, o)
			if err != nil {
				return err
			}
			return a.print(res, func() {
				a.line("%s: %s over %s, mounted", res.Mountpoint, joinedBy(res), strings.Join(res.Devices, " "))
			})
		},
	}
	tableFlags(c, &o)
	return c
}

func (a *app) storageDestroyCommand() *cobra.Command {
	var o flow.StorageOptions
	c := &cobra.Command{
		Use: "destroy NAME", Args: exactly(1, "a name"),
		Short: "Unmount it, stop the array or logical volume, remove the lines, detach and delete the volumes and all data on them",
		RunE: func(c *cobra.Command, args []string) error {
			p, err := a.named(c, args[0], &o)
			if err != nil {
				return err
			}
			if err := flow.DestroyStorage(c.Context(), p, o); err != nil {
				return err
			}
			return a.print(map[string]any{"destroyed": o.Name}, func() { a.line("storage %s is gone", o.Name) })
		},
	}
	tableFlags(c, &o)
	return c
}
