package ec2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// The roles of hosts, as docs/aws.md has policies for them.
const (
	RoleBackup   = "backup host"  // takes backups and deletes old ones
	RoleRestore  = "restore host" // makes, attaches and removes copies
	RoleReadOnly = "read-only"    // lists and checks
)

// Action is one action of EC2 that this package calls.
type Action struct {
	Name  string // CreateSnapshot; ec2:CreateSnapshot in policies
	For   string
	Roles []string
}

// Actions are all actions that this package calls, sorted by name.
func Actions() []Action {
	all := []string{RoleBackup, RoleRestore, RoleReadOnly}
	return []Action{
		{"AttachVolume", "attach the volumes of copies", []string{RoleRestore}},
		{"CreateSnapshot", "cut volumes under a freeze", []string{RoleBackup}},
		{"CreateSnapshots", "cut all volumes at one instant without a freeze", []string{RoleBackup}},
		{"CreateTags", "say on snapshots and volumes what they belong to", []string{RoleBackup, RoleRestore}},
		{"CreateVolume", "make volumes from snapshots", []string{RoleRestore}},
		{"DeleteSnapshot", "remove failed and old backups", []string{RoleBackup}},
		{"DeleteVolume", "remove copies", []string{RoleRestore}},
		{"DescribeInstances", "find this instance's volumes, device names and zone", all},
		{"DescribeSnapshots", "find snapshots and wait until they are completed", all},
		{"DescribeVolumes", "find volumes and where they are attached", all},
		{"DetachVolume", "detach the volumes of copies", []string{RoleRestore}},
	}
}

// dummy stands in a dry run for a thing of ours that does not exist yet.
const (
	dummyVolume   = "vol-00000000000000000"
	dummySnapshot = "snap-00000000000000000"
)

// Permissions asks EC2 for each of Actions whether this host may call it, by
// DryRun: nothing is done. An action that needs a volume or snapshot of ours is
// asked with one, as policies look at its tags; where there is none yet, it
// could not be asked. Denied is only what EC2 denies.
func (p *Provider) Permissions(ctx context.Context) []provider.Permission {
	s := p.specimen(ctx)
	ask := p.questions(ctx, s)
	var out []provider.Permission
	for _, a := range Actions() {
		permission := provider.Permission{Action: "ec2:" + a.Name, Grant: provider.Unasked, For: a.For, Roles: a.Roles}
		var err error
		if err = ctx.Err(); err == nil {
			err = dryRun(ctx, a.Name, ask[a.Name]())
		}
		lacks := s.lacks(a.Name)
		switch {
		case err == nil:
			permission.Grant = provider.Allowed
		case lacks != "":
			permission.Note = lacks
		case errors.Is(err, errNotAllowed):
			permission.Grant, permission.Note = provider.Denied, err.Error()
		default:
			permission.Note = err.Error()
		}
		out = append(out, permission)
	}
	return out
}

// specimen is what the dry runs name.
type specimen struct {
	instance, zone             string
	attached, volume, snapshot string // a volume of this instance; a volume and a snapshot of ours
	freeName                   string
}

func (p *Provider) specimen(ctx context.Context) specimen {
	s := specimen{instance: "i-00000000000000000", attached: dummyVolume, volume: dummyVolume, snapshot: dummySnapshot, freeName: "/dev/sdp"}
	me, err := p.self(ctx)
	if err != nil {
		return s
	}
	s.instance = me.instance
	if zone, err := p.zone(ctx); err == nil {
		s.zone = zone
	}
	if all, err := p.volumes(ctx, filter("attachment.instance-id", s.instance)); err == nil && len(all) > 0 {
		s.attached = aws.ToString(all[0].VolumeId)
	}
	if inv, err := p.list(ctx, nil); err == nil {
		if i := slices.IndexFunc(inv.Volumes, func(v provider.Volume) bool { return v.Tags[tagToken] != "" }); i >= 0 {
			s.volume = string(inv.Volumes[i].ID)
		}
		if i := slices.IndexFunc(inv.Snapshots, func(s provider.Snapshot) bool { return s.Tags[backup.TagBackup] != "" }); i >= 0 {
			s.snapshot = string(inv.Snapshots[i].ID)
		}
	}
	return s
}

// lacks says what is missing to ask for an action, or "".
func (s specimen) lacks(action string) string {
	switch action {
	case "AttachVolume", "DetachVolume", "DeleteVolume":
		if s.volume == dummyVolume {
			return "there is no volume of cleancut yet to ask with"
		}
	case "CreateTags", "DeleteSnapshot":
		if s.snapshot == dummySnapshot {
			return "there is no snapshot of cleancut yet to ask with"
		}
	case "CreateSnapshot", "CreateSnapshots":
		if s.attached == dummyVolume {
			return "which instance this is, or its volumes, are not known"
		}
	case "CreateVolume":
		if s.zone == "" {
			return "the availability zone of this instance is not known"
		}
	}
	return ""
}

func (p *Provider) questions(ctx context.Context, s specimen) map[string]func() error {
	yes := aws.Bool(true)
	tags := backup.Tags{backup.TagBackup: "dry-run", backup.TagCluster: "dry-run"}
	snapshotTags := tagSpecification(types.ResourceTypeSnapshot, tags)
	return map[string]func() error{
		"AttachVolume": func() error {
			_, err := p.api.AttachVolume(ctx, &ec2.AttachVolumeInput{DryRun: yes, VolumeId: &s.volume, InstanceId: &s.instance, Device: &s.freeName})
			return err
		},
		"CreateSnapshot": func() error {
			_, err := p.api.CreateSnapshot(ctx, &ec2.CreateSnapshotInput{DryRun: yes, VolumeId: &s.attached, TagSpecifications: snapshotTags})
			return err
		},
		"CreateSnapshots": func() error {
			_, err := p.api.CreateSnapshots(ctx, &ec2.CreateSnapshotsInput{DryRun: yes, InstanceSpecification: &types.InstanceSpecification{InstanceId: &s.instance}, TagSpecifications: snapshotTags})
			return err
		},
		"CreateTags": func() error {
			_, err := p.api.CreateTags(ctx, &ec2.CreateTagsInput{DryRun: yes, Resources: []string{s.snapshot}, Tags: awsTags(tags)})
			return err
		},
		"CreateVolume": func() error {
			_, err := p.api.CreateVolume(ctx, &ec2.CreateVolumeInput{DryRun: yes, AvailabilityZone: &s.zone, Size: aws.Int32(1), VolumeType: types.VolumeType(p.o.VolumeType),
				TagSpecifications: tagSpecification(types.ResourceTypeVolume, tags.With(tagToken, "dry-run"))})
			return err
		},
		"DeleteSnapshot": func() error {
			_, err := p.api.DeleteSnapshot(ctx, &ec2.DeleteSnapshotInput{DryRun: yes, SnapshotId: &s.snapshot})
			return err
		},
		"DeleteVolume": func() error {
			_, err := p.api.DeleteVolume(ctx, &ec2.DeleteVolumeInput{DryRun: yes, VolumeId: &s.volume})
			return err
		},
		"DescribeInstances": func() error {
			_, err := p.api.DescribeInstances(ctx, &ec2.DescribeInstancesInput{DryRun: yes})
			return err
		},
		"DescribeSnapshots": func() error {
			_, err := p.api.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{DryRun: yes, OwnerIds: ownAccount()})
			return err
		},
		"DescribeVolumes": func() error {
			_, err := p.api.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{DryRun: yes})
			return err
		},
		"DetachVolume": func() error {
			_, err := p.api.DetachVolume(ctx, &ec2.DetachVolumeInput{DryRun: yes, VolumeId: &s.volume, InstanceId: &s.instance})
			return err
		},
	}
}

// Examine tells what Prepare would judge by, and makes nothing: whether a
// group cut of these volumes is possible, and what doctor explains of device
// names, attachments and new volumes. EBS keeps snapshots outside of the
// volumes, so Free, Size and Need are 0, as are extents and estimates. Errors
// are Prepare's for a volume that is not there.
func (p *Provider) Examine(ctx context.Context, ids []backup.VolumeID) (provider.Examination, error) {
	x := provider.Examination{Kind: "EBS snapshots, region " + p.cfg.Region}
	volumes, err := p.volumesByID(ctx, ids)
	if err != nil {
		return x, fmt.Errorf("examine: %w", err)
	}
	for _, id := range ids {
		x.Volumes = append(x.Volumes, provider.ExaminedVolume{ID: id})
	}
	if len(volumes) > 0 {
		x.Notes = append(x.Notes, p.groupNote(ctx, volumes, ids))
	}
	me, err := p.self(ctx)
	if err != nil {
		return x, fmt.Errorf("examine: %w", err)
	}
	inst, err := p.instance(ctx, me.instance)
	if err != nil {
		return x, fmt.Errorf("examine: %w", err)
	}
	naming, err := p.naming()
	if err != nil {
		return x, fmt.Errorf("examine: %w", err)
	}
	x.Notes = append(x.Notes, fmt.Sprintf("instance %s (%s): %s", me.instance, inst.InstanceType, naming))
	x.Notes = append(x.Notes, fmt.Sprintf("%d volumes are attached to it; many types take 28, network interfaces and NVMe disks included, and a copy needs as many as the cluster has", len(inst.BlockDeviceMappings)))
	rate := "blocks of a new volume are loaded when they are first read: initialization_rate in [provider.ec2] (100 to 300 MiB/s, for a fee per GiB) loads them all"
	if p.o.InitializationRate > 0 {
		rate = fmt.Sprintf("new volumes are loaded at %d MiB/s, for a fee per GiB", p.o.InitializationRate)
	}
	x.Notes = append(x.Notes, fmt.Sprintf("new volumes are of type %s; %s", p.o.VolumeType, rate))
	return x, nil
}

// naming explains how this machine calls its volumes. EC2's own word for the
// hypervisor is xen on Nitro as well.
func (p *Provider) naming() (string, error) {
	entries, err := os.ReadDir(filepath.Join(p.o.Devices, "sys/block"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for _, entry := range entries {
		if id, err := p.serial(entry.Name()); err != nil || id != "" {
			return "volumes are known by the NVMe serial numbers of their devices (`lsblk -o +SERIAL`); the order of /dev/nvme… says nothing", err
		}
	}
	return "devices have no NVMe serial numbers and are called after their attachments: /dev/sdf is /dev/xvdf or /dev/sdf here", nil
}

// groupNote says whether these volumes can be cut at one instant.
func (p *Provider) groupNote(ctx context.Context, volumes []types.Volume, ids []backup.VolumeID) string {
	for _, v := range volumes {
		if err := checkAttached(v); err != nil {
			return "no cut is possible: " + err.Error()
		}
	}
	instance, err := oneInstance(volumes)
	if err != nil {
		return "no group cut: " + err.Error()
	}
	out, err := p.exclusion(ctx, p.api, instance, ids)
	if err != nil {
		return "no group cut: " + err.Error()
	}
	return fmt.Sprintf("a group cut is possible: CreateSnapshots of instance %s without %s", instance, out)
}
