// Package storage makes and removes the storage of a cluster: volumes, an
// array over them, a filesystem on it, the lines that bring it back after a
// reboot.
//
//	volumes → attach → array or logical volume → filesystem → fstab, mdadm.conf → mount
//
// What always holds: Destroy finds what Create made by the tags on the
// volumes, removes nothing else, and can be run again.
package storage

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/provider"
)

// The levels: what joins the volumes. The first two are md arrays, the others
// a volume group of LVM with one logical volume.
const (
	LevelRAID0      = "raid0"
	LevelLinear     = "linear"
	LevelLVM        = "lvm"         // linear
	LevelLVMStriped = "lvm-striped" // over all volumes
)

// logicalVolume is the name of the logical volume in its group.
const logicalVolume = "data"

// Options describes the storage to make or destroy.
type Options struct {
	Name         string
	Host         string
	Volumes      int
	Size         backup.Bytes // of each volume
	Level        string       // one volume needs no array, but has a logical volume if that is asked for
	Chunk        backup.Bytes // of a stripe: a power of two, 4 KiB to 1 MiB
	Filesystem   string       // xfs, ext4
	Mountpoint   string
	MountOptions []string
	Fstab        string // file to add the line to
	MdadmConf    string
}

// Result is what Create made.
type Result struct {
	Volumes       []backup.VolumeID `json:"volumes"`
	Devices       []string          `json:"devices"`
	Array         string            `json:"array,omitempty"`
	ArrayUUID     string            `json:"array_uuid,omitempty"`
	LogicalVolume string            `json:"logical_volume,omitempty"` // its device
	Group         string            `json:"volume_group,omitempty"`
	Filesystem    string            `json:"filesystem_uuid"`
	Mountpoint    string            `json:"mountpoint"`
}

// Tags is what the volumes of this storage carry.
func (o Options) Tags() backup.Tags {
	return backup.Tags{backup.TagStorage: o.Name, backup.TagHost: o.Host}
}

// group is the name of its volume group, if it has one.
func (o Options) group() string { return "cleancut_" + o.Name }

func (o Options) isLVM() bool { return o.Level == LevelLVM || o.Level == LevelLVMStriped }

func (o Options) check() error {
	if err := backup.CheckClusterName(o.Name); err != nil {
		return fmt.Errorf("storage name: %w", err)
	}
	switch {
	case o.Volumes < 1 || o.Volumes > 64:
		return fmt.Errorf("%w: %d volumes: want 1 to 64", backup.ErrUsage, o.Volumes)
	case o.Size < 320<<20:
		return fmt.Errorf("%w: volumes of %s: XFS wants at least 320 MiB", backup.ErrUsage, o.Size)
	case o.Level != LevelRAID0 && o.Level != LevelLinear && !o.isLVM() && (o.Volumes > 1 || o.Level != ""):
		return fmt.Errorf("%w: level %q: raid0, linear, lvm or lvm-striped", backup.ErrUsage, o.Level)
	case (o.Level == LevelRAID0 || o.Level == LevelLVMStriped) && o.Volumes > 1 && (o.Chunk < 4<<10 || o.Chunk > 1<<20 || o.Chunk&(o.Chunk-1) != 0):
		return fmt.Errorf("%w: chunk of %s: want a power of two from 4K to 1M", backup.ErrUsage, o.Chunk)
	case !filepath.IsAbs(o.Mountpoint) || filepath.Clean(o.Mountpoint) == "/":
		return fmt.Errorf("%w: mount point %q: want an absolute path", backup.ErrUsage, o.Mountpoint)
	case o.Filesystem != "xfs" && o.Filesystem != "ext4":
		return fmt.Errorf("%w: filesystem %q: xfs or ext4", backup.ErrUsage, o.Filesystem)
	}
	return nil
}

// Create makes the storage and mounts it. On an error it removes what it made.
func Create(ctx context.Context, p provider.Provider, o Options) (res Result, err error) {
	if err := o.check(); err != nil {
		return res, err
	}
	inv, err := p.List(ctx, o.Tags())
	if err != nil {
		return res, err
	}
	if len(inv.Volumes) > 0 {
		return res, backup.Hint(fmt.Errorf("storage %s: %w", o.Name, backup.ErrExists), "choose another name, or `cleancut storage destroy "+o.Name+"`")
	}
	if m, err := host.MountOf(o.Mountpoint); err == nil && m.Mountpoint == o.Mountpoint {
		return res, fmt.Errorf("something is mounted on %s: %w", o.Mountpoint, backup.ErrInUse)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Destroy(context.WithoutCancel(ctx), p, o))
		}
	}()
	for i := range o.Volumes {
		v, err := p.CreateVolume(ctx, provider.VolumeSpec{Token: fmt.Sprintf("storage-%s-%s-%d", o.Host, o.Name, i), Size: o.Size,
			Tags: o.Tags().With(backup.TagMember, strconv.Itoa(i))})
		if err != nil {
			return res, err
		}
		dev, err := p.Attach(ctx, v.ID)
		if err != nil {
			return res, err
		}
		res.Volumes, res.Devices = append(res.Volumes, v.ID), append(res.Devices, dev)
	}
	return res, format(ctx, o, &res)
}

func format(ctx context.Context, o Options, res *Result) error {
	device := res.Devices[0]
	switch {
	case o.isLVM():
		var err error
		device, err = host.CreateGroup(ctx, host.GroupSpec{Group: o.group(), Volume: logicalVolume, Striped: o.Level == LevelLVMStriped, Stripe: o.Chunk, Devices: res.Devices})
		if err != nil {
			return err
		}
		res.LogicalVolume, res.Group = device, o.group()
	case len(res.Devices) > 1:
		array, err := host.CreateArray(ctx, host.ArraySpec{Name: o.Name, Level: o.Level, Chunk: o.Chunk, Members: res.Devices})
		if err != nil {
			return err
		}
		if res.ArrayUUID, err = host.ArrayUUID(ctx, array); err != nil {
			return err
		}
		device, res.Array = array, array
		if err := host.AddLine(o.MdadmConf, o.Name, fmt.Sprintf("ARRAY %s metadata=1.2 UUID=%s", array, res.ArrayUUID)); err != nil {
			return err
		}
	}
	if err := host.MakeFilesystem(ctx, o.Filesystem, device, label(o.Name)); err != nil {
		return err
	}
	id, err := host.Identify(ctx, device)
	if err != nil {
		return err
	}
	res.Filesystem, res.Mountpoint = id.UUID, o.Mountpoint
	// By UUID, as names change; nofail, so that a missing volume does not stop the boot.
	options := append([]string{"defaults", "nofail"}, o.MountOptions...)
	if err := host.AddLine(o.Fstab, o.Name, host.FstabLine(id.UUID, o.Mountpoint, o.Filesystem, options)); err != nil {
		return err
	}
	return host.MountDevice(ctx, device, o.Mountpoint, o.Filesystem, o.MountOptions)
}

func label(name string) string {
	if len(name) > 12 { // XFS labels have at most 12 characters, ext4's 16
		return name[:12]
	}
	return name
}

// Destroy removes the storage and everything on it. Its volumes must not be
// in use beyond their own mount: a server on it is not stopped.
func Destroy(ctx context.Context, p provider.Provider, o Options) error {
	var err error
	for range 3 { // udev may bring an array or a group up once more before its volumes are detached
		var again bool
		if again, err = destroyVolumes(ctx, p, o); !again {
			break
		}
	}
	if err != nil {
		return err
	}
	return errors.Join(host.RemoveLine(o.Fstab, o.Name), host.RemoveLine(o.MdadmConf, o.Name))
}

// destroyVolumes also says whether a volume was in use when it was to be
// detached.
func destroyVolumes(ctx context.Context, p provider.Provider, o Options) (again bool, err error) {
	inv, err := p.List(ctx, o.Tags())
	if err != nil {
		return false, err
	}
	var devices []string
	for _, v := range inv.Volumes {
		if v.Attached != "" {
			devices = append(devices, v.Attached)
		}
	}
	if err := host.Release(ctx, devices); err != nil {
		return false, backup.Hint(err, "stop what uses it first")
	}
	var errs []error
	for _, v := range inv.Volumes {
		err := p.Detach(ctx, v.ID)
		again = again || errors.Is(err, backup.ErrInUse) && ctx.Err() == nil
		errs = append(errs, err, p.DeleteVolume(ctx, v.ID, o.Tags()))
	}
	return again, errors.Join(errs...)
}
