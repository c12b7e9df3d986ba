package storage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/provider"
)

// Attach brings storage back that Create made, as after a reboot: it attaches
// the volumes, and the lines in mdadm.conf and fstab do the rest; a volume group
// is found on the volumes themselves. What stands
// already is left as it is, so it may be called again. Name, Host and the two
// files of o are needed.
func Attach(ctx context.Context, p provider.Provider, o Options) (res Result, err error) {
	inv, err := p.List(ctx, o.Tags())
	if err != nil {
		return res, err
	}
	if len(inv.Volumes) == 0 {
		return res, fmt.Errorf("storage %s of host %s: %w", o.Name, o.Host, backup.ErrNotFound)
	}
	slices.SortFunc(inv.Volumes, func(a, b provider.Volume) int {
		return memberOf(a) - memberOf(b)
	})
	for _, v := range inv.Volumes {
		dev, err := p.Attach(ctx, v.ID)
		if err != nil {
			return res, err
		}
		res.Volumes, res.Devices = append(res.Volumes, v.ID), append(res.Devices, dev)
	}
	if err := assembleByTable(ctx, o, &res); err != nil {
		return res, err
	}
	return res, mountByTable(ctx, o, &res)
}

// memberOf is the volume's place; Create tagged it.
func memberOf(v provider.Volume) int {
	n, err := strconv.Atoi(v.Tags[backup.TagMember])
	if err != nil {
		return -1
	}
	return n
}

// assembleByTable leaves it to mdadm and the line in mdadm.conf, unless udev
// has done it by then.
func assembleByTable(ctx context.Context, o Options, res *Result) error {
	line, err := host.LineOf(o.MdadmConf, o.Name)
	if errors.Is(err, backup.ErrNotFound) {
		return activateGroup(ctx, o, res) // one volume, or LVM
	}
	if err != nil {
		return err
	}
	fields := strings.Fields(line) // ARRAY device metadata=… UUID=…
	for _, f := range fields {
		if uuid, ok := strings.CutPrefix(f, "UUID="); ok {
			res.ArrayUUID = uuid
		}
	}
	arrays, err := host.ArraysOn(res.Devices)
	if err != nil {
		return err
	}
	if len(arrays) == 0 {
		if _, err := host.Run(ctx, "mdadm", "--assemble", "--scan", "--config="+o.MdadmConf); err != nil {
			return err
		}
		if arrays, err = host.ArraysOn(res.Devices); err != nil {
			return err
		}
	}
	if len(arrays) != 1 {
		return fmt.Errorf("volumes of storage %s are in %d arrays (%s): %w", o.Name, len(arrays), strings.Join(arrays, " "), backup.ErrInUse)
	}
	res.Array = arrays[0]
	return nil
}

// activateGroup brings up the volume group, if the volumes carry one.
func activateGroup(ctx context.Context, o Options, res *Result) error {
	id, err := host.Identify(ctx, res.Devices[0])
	if err != nil || id.Type != "LVM2_member" {
		return err
	}
	res.LogicalVolume, err = host.ActivateGroup(ctx, res.Devices)
	res.Group = o.group()
	return err
}

func mountByTable(ctx context.Context, o Options, res *Result) error {
	line, err := host.LineOf(o.Fstab, o.Name)
	if err != nil {
		return err
	}
	fields := strings.Fields(line) // UUID=… mountpoint type options 0 0
	if len(fields) < 4 {
		return fmt.Errorf("line of storage %s in %s: %q: %w", o.Name, o.Fstab, line, backup.ErrUsage)
	}
	res.Filesystem, res.Mountpoint = strings.TrimPrefix(fields[0], "UUID="), fields[1]
	if m, err := host.MountOf(res.Mountpoint); err == nil && m.Mountpoint == res.Mountpoint {
		return nil
	}
	_, err = host.Run(ctx, "mount", "--fstab", o.Fstab, res.Mountpoint)
	return err
}
