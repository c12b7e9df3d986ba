package restore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/provider"
)

// checkSnapshots demands that every snapshot of the manifest is there,
// completed and tagged as the member it is said to be.
func checkSnapshots(ctx context.Context, p Provider, m backup.Manifest, digest string) error {
	var ids []backup.SnapshotID
	for _, s := range m.Snapshots {
		ids = append(ids, s.ID)
	}
	found, err := p.Snapshots(ctx, ids)
	if err != nil {
		if errors.Is(err, backup.ErrNotFound) {
			err = backup.Hint(err, "somebody deleted it behind cleancut's back; the set cannot be restored without it: choose another backup from `cleancut list`")
		}
		return fmt.Errorf("snapshots of backup %s: %w", m.ID, err)
	}
	for i, s := range found {
		want := backup.Tags{backup.TagBackup: string(m.ID), backup.TagMember: strconv.Itoa(m.Snapshots[i].Member),
			backup.TagMembers: strconv.Itoa(len(m.Snapshots)), backup.TagDigest: digest}
		if s.State != provider.Completed {
			return fmt.Errorf("snapshot %s is %s: %w", s.ID, s.State, backup.ErrIncomplete)
		}
		if !s.Tags.Match(want) {
			return fmt.Errorf("snapshot %s does not say that it is member %d of this backup (its tags: %v): %w", s.ID, m.Snapshots[i].Member, s.Tags, backup.ErrNotOurs)
		}
	}
	return nil
}

// attachVolumes makes a volume of every snapshot and attaches it, all at once.
func attachVolumes(ctx context.Context, p Provider, m backup.Manifest, c *backup.Copy) error {
	c.Volumes = make([]backup.CopyVolume, len(m.Snapshots))
	errs := make([]error, len(m.Snapshots))
	var all sync.WaitGroup
	for i, s := range m.Snapshots {
		all.Go(func() {
			v := &c.Volumes[i]
			*v = backup.CopyVolume{Member: s.Member, Snapshot: s.ID}
			made, err := p.CreateVolume(ctx, provider.VolumeSpec{Token: fmt.Sprintf("%s-%d", c.ID, s.Member), From: s.ID,
				Tags: c.VolumeTags(m.Topology.Members()[s.Member])})
			if err != nil {
				errs[i] = fmt.Errorf("volume from snapshot %s: %w", s.ID, err)
				return
			}
			v.Volume = made.ID
			if v.Device, err = p.Attach(ctx, made.ID); err != nil {
				errs[i] = fmt.Errorf("attach %s: %w", made.ID, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// assemble builds the device of every filesystem and returns the paths in the
// order of the topology.
func assemble(ctx context.Context, m backup.Manifest, c *backup.Copy) error {
	devices := map[backup.VolumeID]string{} // by the original's volume
	for _, v := range c.Volumes {
		for _, s := range m.Snapshots {
			if s.Member == v.Member {
				devices[s.Volume.ID] = v.Device
			}
		}
	}
	for _, fs := range m.Topology.Filesystems {
		dev, err := build(ctx, fs.Device, c.ID, devices)
		if err != nil {
			return fmt.Errorf("device of %s: %w", fs.Mountpoint, err)
		}
		id, err := host.Identify(ctx, dev)
		if err != nil {
			return blameIdentity(ctx, err)
		}
		if id.UUID != fs.UUID || id.Type != fs.Type {
			return fmt.Errorf("%s holds %s %s, the backup says %s %s: %w", dev, id.Type, id.UUID, fs.Type, fs.UUID, backup.ErrNotOurs)
		}
		c.Filesystems = append(c.Filesystems, backup.CopyFilesystem{Type: fs.Type, Device: dev, Mountpoint: c.Path(fs.Mountpoint)})
	}
	return nil
}

// blameIdentity wraps errNoMount around err where blkid(8) could read the
// device and found nothing that it knows (its exit status 2): the volume is the
// right one, its snapshot carries the backup's tags.
func blameIdentity(ctx context.Context, err error) error {
	var exit *exec.ExitError
	if ctx.Err() == nil && errors.As(err, &exit) && exit.ExitCode() == 2 {
		return fmt.Errorf("%w: no filesystem can be recognized: %w", errNoMount, err)
	}
	return err
}

func build(ctx context.Context, d backup.Device, id backup.ID, devices map[backup.VolumeID]string) (string, error) {
	var members []string
	for _, m := range d.Members {
		dev, err := build(ctx, m, id, devices)
		if err != nil {
			return "", err
		}
		members = append(members, dev)
	}
	switch d.Kind {
	case backup.DeviceVolume:
		return devices[d.Volume.ID], nil
	case backup.DevicePartition:
		return host.WaitDevice(ctx, members[0], d.Partition.Number)
	case backup.DeviceArray:
		if err := checkMembers(*d.Array, copyUUID(id, d.Array.UUID), members); err != nil {
			return "", err
		}
		return host.AssembleArray(ctx, members, copyUUID(id, d.Array.UUID))
	case backup.DeviceLogicalVolume:
		return host.ImportVolume(ctx, members, *d.LogicalVolume, groupName(id, d.LogicalVolume.Group.UUID))
	}
	return "", fmt.Errorf("device kind %q: %w", d.Kind, backup.ErrUnsupported)
}

// checkMembers demands that every device is the member of that array that the
// backup says it is, by its own superblock: RAID 0 itself cannot tell members
// of two sets apart.
func checkMembers(a backup.Array, uuid string, members []string) error {
	for i, dev := range members {
		sb, err := host.ReadSuperblock(dev)
		if err != nil {
			return fmt.Errorf("member %d (%s): %w", i, dev, err)
		}
		if set := sb.SetUUID.String(); set != a.UUID && set != uuid || sb.Role != i || sb.RaidDisks != len(members) {
			return fmt.Errorf("%s is member %d of %d of array %s, wanted is member %d of %d of %s: %w",
				dev, sb.Role, sb.RaidDisks, sb.SetUUID, i, len(members), a.UUID, backup.ErrNotOurs)
		}
	}
	return nil
}

// copyUUID is the array's new identity: another for every copy, the same when
// the step is run again.
func copyUUID(id backup.ID, original string) string {
	sum := sha256.Sum256([]byte(string(id) + original))
	h := hex.EncodeToString(sum[:16])
	return h[:8] + ":" + h[8:16] + ":" + h[16:24] + ":" + h[24:]
}

// groupName is the volume group's name in the copy: another for every copy and
// group, the same when the step is run again. LVM makes the new UUID.
func groupName(id backup.ID, original string) string {
	sum := sha256.Sum256([]byte(original))
	return "cleancut_copy_" + strings.ReplaceAll(string(id), "-", "_") + "_" + hex.EncodeToString(sum[:3])
}

// mount mounts every filesystem below the copy's root, outer ones first, with
// the options of the original. XFS gets nouuid: the original may be mounted on
// the same host.
func mount(ctx context.Context, m backup.Manifest, c *backup.Copy) error {
	for _, i := range byDepth(*c, false) {
		fs := c.Filesystems[i]
		options := slices.Clone(m.Topology.Filesystems[i].Options)
		if fs.Type == "xfs" {
			options = append(options, "nouuid")
		}
		if err := host.MountDevice(ctx, fs.Device, fs.Mountpoint, fs.Type, options); err != nil {
			return err
		}
	}
	return nil
}
