package ec2

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// filterValues is how many values a filter may have, pageSize how many results
// are asked for at once (EC2 API reference, Filter and DescribeSnapshots).
const (
	filterValues = 200
	pageSize     = 500
)

const gib = backup.Bytes(1 << 30)

func filter(name string, values ...string) types.Filter {
	return types.Filter{Name: aws.String(name), Values: values}
}

// literal protects what filters take for wildcards.
func literal(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`).Replace(s)
}

// volumes describes the volumes that filters select. Those that are being
// deleted are not there any more.
func (p *Provider) volumes(ctx context.Context, filters ...types.Filter) ([]types.Volume, error) {
	return volumesBy(ctx, p.api, filters...)
}

func volumesBy(ctx context.Context, api *ec2.Client, filters ...types.Filter) ([]types.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var out []types.Volume
	in := &ec2.DescribeVolumesInput{Filters: filters, MaxResults: aws.Int32(pageSize)}
	for pages := ec2.NewDescribeVolumesPaginator(api, in); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, border(ctx, "DescribeVolumes", err)
		}
		out = append(out, page.Volumes...)
	}
	return slices.DeleteFunc(out, going), nil
}

// volumesByID describes volumes, in the order of ids. A volume that this
// process has just made is waited for. ErrNotFound names what is missing.
func (p *Provider) volumesByID(ctx context.Context, ids []backup.VolumeID) ([]types.Volume, error) {
	var found map[string]types.Volume
	missing, err := p.waitForAll(ctx, ids2text(ids), func(chunk []string) ([]string, error) {
		all, err := p.volumesNamed(ctx, chunk)
		if found == nil {
			found = map[string]types.Volume{}
		}
		var seen []string
		for _, v := range all {
			found[aws.ToString(v.VolumeId)] = v
			seen = append(seen, aws.ToString(v.VolumeId))
		}
		return seen, err
	})
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("volume %s: %w", strings.Join(missing, ", "), backup.ErrNotFound)
	}
	out := make([]types.Volume, len(ids))
	for i, id := range ids {
		out[i] = found[string(id)]
	}
	return out, nil
}

// volumesNamed asks by id, which EC2 finds at once. If one of them is missing
// EC2 refuses all: then it asks by a filter, for which EC2 pages through all
// volumes of the account.
func (p *Provider) volumesNamed(ctx context.Context, ids []string) ([]types.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := p.api.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{VolumeIds: ids})
	switch {
	case err == nil:
		return slices.DeleteFunc(out.Volumes, going), nil
	case unknownID(codeOf(err)):
		return p.volumes(ctx, filter("volume-id", ids...))
	}
	return nil, border(ctx, "DescribeVolumes", err)
}

// unknownID: EC2 does not know an id, or it has not the form of one.
func unknownID(code string) bool {
	return strings.HasSuffix(code, ".NotFound") || strings.HasSuffix(code, ".Malformed") || code == "InvalidParameterValue"
}

func going(v types.Volume) bool {
	return v.State == types.VolumeStateDeleting || v.State == types.VolumeStateDeleted
}

func ids2text[T ~string](ids []T) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = string(id)
	}
	return out
}

// waitForAll describes ids in portions, and those that are missing again while
// they are young. It returns what is missing then.
func (p *Provider) waitForAll(ctx context.Context, ids []string, describe func(chunk []string) (seen []string, err error)) (missing []string, err error) {
	missing = slices.Clone(ids)
	err = p.until(ctx, p.o.pace.settle, p.o.pace.pollMax, func() (bool, error) {
		var left []string
		for chunk := range slices.Chunk(missing, filterValues) {
			seen, err := describe(chunk)
			if err != nil {
				return false, err
			}
			for _, id := range chunk {
				if !slices.Contains(seen, id) {
					left = append(left, id)
				}
			}
		}
		missing = left
		return !slices.ContainsFunc(missing, func(id string) bool { return p.made.young(id, p.o.pace.settle) }), nil
	})
	if errors.Is(err, errPending) {
		err = nil
	}
	return missing, err
}

// volume describes one volume.
func (p *Provider) volume(ctx context.Context, id backup.VolumeID) (types.Volume, error) {
	found, err := p.volumesByID(ctx, []backup.VolumeID{id})
	if err != nil {
		return types.Volume{}, err
	}
	return found[0], nil
}

// snapshots describes the snapshots that filters select, of any owner.
func (p *Provider) snapshots(ctx context.Context, owner []string, filters ...types.Filter) ([]types.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var out []types.Snapshot
	in := &ec2.DescribeSnapshotsInput{Filters: filters, OwnerIds: owner, MaxResults: aws.Int32(pageSize)}
	for pages := ec2.NewDescribeSnapshotsPaginator(p.api, in); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, border(ctx, "DescribeSnapshots", err)
		}
		out = append(out, page.Snapshots...)
	}
	return out, nil
}

// ownAccount is the OwnerIds of what belongs to this account.
func ownAccount() []string { return []string{"self"} }

// snapshotsByID describes snapshots of any owner by id and returns the missing
// ones' names.
func (p *Provider) snapshotsByID(ctx context.Context, ids []backup.SnapshotID) (map[backup.SnapshotID]types.Snapshot, []string, error) {
	found := map[backup.SnapshotID]types.Snapshot{}
	missing, err := p.waitForAll(ctx, ids2text(ids), func(chunk []string) ([]string, error) {
		all, err := p.snapshotsNamed(ctx, chunk)
		var seen []string
		for _, s := range all {
			found[backup.SnapshotID(aws.ToString(s.SnapshotId))] = s
			seen = append(seen, aws.ToString(s.SnapshotId))
		}
		return seen, err
	})
	return found, missing, err
}

// snapshotsNamed is volumesNamed for snapshots.
func (p *Provider) snapshotsNamed(ctx context.Context, ids []string) ([]types.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := p.api.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{SnapshotIds: ids})
	switch {
	case err == nil:
		return out.Snapshots, nil
	case unknownID(codeOf(err)):
		return p.snapshots(ctx, nil, filter("snapshot-id", ids...))
	}
	return nil, border(ctx, "DescribeSnapshots", err)
}

// instance describes one instance.
func (p *Provider) instance(ctx context.Context, id string) (types.Instance, error) {
	if err := ctx.Err(); err != nil {
		return types.Instance{}, err
	}
	out, err := p.api.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
	if err != nil {
		return types.Instance{}, border(ctx, "DescribeInstances", err)
	}
	for _, r := range out.Reservations {
		for _, i := range r.Instances {
			if aws.ToString(i.InstanceId) == id {
				return i, nil
			}
		}
	}
	return types.Instance{}, fmt.Errorf("instance %s: %w", id, backup.ErrNotFound)
}

// Snapshots describes snapshots by DescribeSnapshots. The contract is
// provider.Provider's.
func (p *Provider) Snapshots(ctx context.Context, ids []backup.SnapshotID) ([]provider.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("describe snapshots: %w", err)
	}
	found, missing, err := p.snapshotsByID(ctx, ids)
	if err != nil {
		return nil, fmt.Errorf("describe snapshots: %w", err)
	}
	var out []provider.Snapshot
	for _, id := range ids {
		if s, ok := found[id]; ok {
			out = append(out, described(s))
		}
	}
	if len(missing) > 0 {
		return out, fmt.Errorf("snapshot %s: %w", strings.Join(missing, ", "), backup.ErrNotFound)
	}
	return out, nil
}

func described(s types.Snapshot) provider.Snapshot {
	state := provider.Pending
	switch s.State {
	case types.SnapshotStateCompleted:
		state = provider.Completed
	case types.SnapshotStateError, types.SnapshotStateRecoverable, types.SnapshotStateRecovering:
		state = provider.Broken
	}
	return provider.Snapshot{ID: backup.SnapshotID(aws.ToString(s.SnapshotId)), Volume: backup.VolumeID(aws.ToString(s.VolumeId)),
		Size: backup.Bytes(aws.ToInt32(s.VolumeSize)) * gib, State: state, Started: aws.ToTime(s.StartTime), Tags: tagsOf(s.Tags)}
}

func volumeOf(v types.Volume) backup.Volume {
	return backup.Volume{ID: backup.VolumeID(aws.ToString(v.VolumeId)), Provider: Name, Size: backup.Bytes(aws.ToInt32(v.Size)) * gib}
}

func tagsOf(list []types.Tag) backup.Tags {
	out := backup.Tags{}
	for _, t := range list {
		out[aws.ToString(t.Key)] = aws.ToString(t.Value)
	}
	return out
}

func awsTags(tags backup.Tags) []types.Tag {
	var out []types.Tag
	for _, key := range slices.Sorted(maps.Keys(tags)) {
		out = append(out, types.Tag{Key: aws.String(key), Value: aws.String(tags[key])})
	}
	return out
}

func tagSpecification(kind types.ResourceType, tags backup.Tags) []types.TagSpecification {
	return []types.TagSpecification{{ResourceType: kind, Tags: awsTags(tags)}}
}

// ours reports whether tags have one of cleancut's.
func ours(tags backup.Tags) bool {
	for key := range tags {
		if strings.HasPrefix(key, tagPrefix) {
			return true
		}
	}
	return false
}

const tagPrefix = "cleancut:"

// List finds volumes and snapshots of this account by their tags. The contract
// is provider.Provider's. What this process has just made and EC2 does not
// show yet is waited for.
func (p *Provider) List(ctx context.Context, match backup.Tags) (provider.Inventory, error) {
	inv, err := p.list(ctx, match)
	if err != nil {
		return provider.Inventory{}, fmt.Errorf("list what carries our tags: %w", err)
	}
	return inv, nil
}

func (p *Provider) list(ctx context.Context, match backup.Tags) (provider.Inventory, error) {
	filters := []types.Filter{filter("tag-key", tagPrefix+"*")}
	for _, key := range slices.Sorted(maps.Keys(match)) {
		if match[key] == "" {
			filters = append(filters, filter("tag-key", literal(key)))
		} else {
			filters = append(filters, filter("tag:"+literal(key), literal(match[key])))
		}
	}
	var volumes []types.Volume
	var snapshots []types.Snapshot
	err := p.until(ctx, p.o.pace.settle, p.o.pace.pollMax, func() (_ bool, err error) {
		if volumes, err = p.volumes(ctx, filters...); err != nil {
			return false, err
		}
		if snapshots, err = p.snapshots(ctx, ownAccount(), filters...); err != nil {
			return false, err
		}
		return p.allSeen(match, volumes, snapshots), nil
	})
	if err != nil && !errors.Is(err, errPending) {
		return provider.Inventory{}, err
	}
	return p.inventory(ctx, match, volumes, snapshots)
}

// allSeen reports whether everything is there that this process made lately.
func (p *Provider) allSeen(match backup.Tags, volumes []types.Volume, snapshots []types.Snapshot) bool {
	seen := map[string]bool{}
	for _, v := range volumes {
		seen[aws.ToString(v.VolumeId)] = true
	}
	for _, s := range snapshots {
		seen[aws.ToString(s.SnapshotId)] = true
		lost := lostKey(tagsOf(s.Tags)[backup.TagCut], aws.ToString(s.VolumeId))
		p.made.forget(lost)
		seen[lost] = true
	}
	return !slices.ContainsFunc(p.made.expected(match, p.o.pace.settle), func(id string) bool { return !seen[id] })
}

func (p *Provider) inventory(ctx context.Context, match backup.Tags, volumes []types.Volume, snapshots []types.Snapshot) (inv provider.Inventory, err error) {
	matches := func(tags backup.Tags) bool { return ours(tags) && (len(match) == 0 || tags.Match(match)) }
	attached := func(v types.Volume) bool { return len(attachments(v)) > 0 }
	var me self
	if slices.ContainsFunc(volumes, attached) {
		// Outside of EC2 nothing is attached here; asking costs seconds there.
		if me, err = p.self(ctx); err != nil && ctx.Err() != nil {
			return provider.Inventory{}, ctx.Err()
		}
	}
	for _, v := range volumes {
		tags := tagsOf(v.Tags)
		if !matches(tags) {
			continue
		}
		out := provider.Volume{ID: backup.VolumeID(aws.ToString(v.VolumeId)), Size: volumeOf(v).Size, From: backup.SnapshotID(aws.ToString(v.SnapshotId)),
			Created: aws.ToTime(v.CreateTime), Tags: tags}
		if out.Attached, err = p.attachedTo(v, me.instance); err != nil {
			return provider.Inventory{}, err
		}
		inv.Volumes = append(inv.Volumes, out)
	}
	for _, s := range snapshots {
		if d := described(s); matches(d.Tags) {
			inv.Snapshots = append(inv.Snapshots, d)
		}
	}
	return inv, nil
}

// attachedTo names the device on this host, or the instance where there is
// none; "" if the volume is attached nowhere.
func (p *Provider) attachedTo(v types.Volume, me string) (string, error) {
	at := attachments(v)
	if len(at) == 0 {
		return "", nil
	}
	if a := here(v, me); a != nil {
		if device, err := p.node(v, *a); err != nil || device != "" {
			return device, err
		}
	}
	return aws.ToString(at[0].InstanceId), nil
}

// attachments are those that still hold the volume.
func attachments(v types.Volume) []types.VolumeAttachment {
	return slices.DeleteFunc(slices.Clone(v.Attachments), func(a types.VolumeAttachment) bool {
		return a.State == types.VolumeAttachmentStateDetached
	})
}
