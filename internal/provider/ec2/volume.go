package ec2

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// tagToken holds the token of a volume's VolumeSpec, as clientToken has it:
// EC2 forgets client tokens, a resumed restore does not.
const tagToken = tagPrefix + "token"

// CreateVolume makes an EBS volume in this instance's availability zone by
// CreateVolume and waits until it is available. Sizes are rounded up to GiB;
// the result has the real one. The contract is provider.Provider's; a spec
// without token or tag of cleancut is ErrUsage.
func (p *Provider) CreateVolume(ctx context.Context, spec provider.VolumeSpec) (backup.Volume, error) {
	v, err := p.createVolume(ctx, spec)
	if err != nil {
		return backup.Volume{}, fmt.Errorf("create volume: %w", err)
	}
	p.log.DebugContext(ctx, "volume created", slog.String(keyVolume, string(v.ID)), slog.String(keySnapshot, string(spec.From)))
	return v, nil
}

func (p *Provider) createVolume(ctx context.Context, spec provider.VolumeSpec) (backup.Volume, error) {
	if err := checkSpec(spec); err != nil {
		return backup.Volume{}, err
	}
	if err := ctx.Err(); err != nil {
		return backup.Volume{}, err
	}
	made, err := p.volumes(ctx, filter("tag:"+tagToken, literal(clientToken(spec.Token))))
	if err != nil {
		return backup.Volume{}, err
	}
	if len(made) > 0 {
		return p.madeBefore(ctx, spec, made)
	}
	if spec.From != "" {
		if err := p.restorable(ctx, spec); err != nil {
			return backup.Volume{}, err
		}
	}
	in, err := p.request(ctx, spec)
	if err != nil {
		return backup.Volume{}, err
	}
	var out *ec2.CreateVolumeOutput
	err = effect(ctx, "CreateVolume", func() error {
		out, err = p.api.CreateVolume(ctx, in)
		return err
	})
	if err != nil {
		return backup.Volume{}, err
	}
	id := backup.VolumeID(aws.ToString(out.VolumeId))
	p.made.add(string(id), tagsOf(in.TagSpecifications[0].Tags))
	return p.waitAvailable(ctx, id)
}

func checkSpec(spec provider.VolumeSpec) error {
	switch {
	case spec.Token == "":
		return fmt.Errorf("%w: no token", backup.ErrUsage)
	case !ours(spec.Tags):
		return fmt.Errorf("%w: no tag of cleancut", backup.ErrUsage)
	case spec.Size < 0 || spec.Size == 0 && spec.From == "":
		return fmt.Errorf("%w: size %d", backup.ErrUsage, spec.Size)
	}
	return checkTags(spec.Tags)
}

// checkTags refuses what EC2 would (EC2 user guide, "Tag restrictions"); two
// tags of our own come on top.
func checkTags(tags backup.Tags) error {
	for key, value := range tags {
		if len([]rune(key)) > 128 || len([]rune(value)) > 256 || key == "" || strings.HasPrefix(strings.ToLower(key), "aws:") {
			return fmt.Errorf("%w: tag %q does not fit EC2: up to 128 and 256 characters", backup.ErrUsage, key)
		}
	}
	if len(tags) > 48 {
		return fmt.Errorf("%w: %d tags are too many for EC2", backup.ErrUsage, len(tags))
	}
	return nil
}

// clientToken makes a token fit EC2's ClientToken: up to 64 characters of ASCII.
func clientToken(token string) string {
	fits := len(token) <= 64 && !strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' })
	if fits {
		return token
	}
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// inGiB rounds up to EBS's unit.
func inGiB(size backup.Bytes) int32 { return int32((size + gib - 1) / gib) }

// madeBefore returns the volume that an earlier call with this token made.
func (p *Provider) madeBefore(ctx context.Context, spec provider.VolumeSpec, made []types.Volume) (backup.Volume, error) {
	if len(made) > 1 {
		return backup.Volume{}, fmt.Errorf("volumes %s and %s both carry token %q: %w", aws.ToString(made[0].VolumeId), aws.ToString(made[1].VolumeId), spec.Token, backup.ErrExists)
	}
	v := made[0]
	same := aws.ToString(v.SnapshotId) == string(spec.From) && (spec.Size == 0 || aws.ToInt32(v.Size) == inGiB(spec.Size))
	if !same || !tagsOf(v.Tags).Match(spec.Tags) {
		return backup.Volume{}, fmt.Errorf("token %q made volume %s, which differs: %w", spec.Token, aws.ToString(v.VolumeId), backup.ErrExists)
	}
	return p.waitAvailable(ctx, backup.VolumeID(aws.ToString(v.VolumeId)))
}

// restorable checks the snapshot of a spec before EC2 does, whose refusals come
// late or in other words.
func (p *Provider) restorable(ctx context.Context, spec provider.VolumeSpec) error {
	found, err := p.Snapshots(ctx, []backup.SnapshotID{spec.From})
	if err != nil {
		return err
	}
	s := found[0]
	if s.State != provider.Completed {
		return backup.Hint(fmt.Errorf("snapshot %s is %s, not completed", s.ID, s.State), "restore a complete backup; see `cleancut list`")
	}
	if spec.Size != 0 && spec.Size < s.Size {
		return fmt.Errorf("%w: size %d is less than the %d of %s", backup.ErrUsage, spec.Size, s.Size, s.ID)
	}
	return nil
}

func (p *Provider) request(ctx context.Context, spec provider.VolumeSpec) (*ec2.CreateVolumeInput, error) {
	zone, err := p.zone(ctx)
	if err != nil {
		return nil, err
	}
	token := clientToken(spec.Token)
	in := &ec2.CreateVolumeInput{
		AvailabilityZone:  aws.String(zone),
		ClientToken:       aws.String(token),
		VolumeType:        types.VolumeType(p.o.VolumeType),
		TagSpecifications: tagSpecification(types.ResourceTypeVolume, spec.Tags.With(tagToken, token)),
	}
	if spec.Size > 0 {
		in.Size = aws.Int32(inGiB(spec.Size))
	}
	if p.o.IOPS > 0 {
		in.Iops = aws.Int32(p.o.IOPS)
	}
	if p.o.Throughput > 0 {
		in.Throughput = aws.Int32(p.o.Throughput)
	}
	if p.o.KMSKey != "" {
		in.Encrypted, in.KmsKeyId = aws.Bool(true), aws.String(p.o.KMSKey)
	}
	if spec.From != "" {
		in.SnapshotId = aws.String(string(spec.From))
		if p.o.InitializationRate > 0 {
			in.VolumeInitializationRate = aws.Int32(p.o.InitializationRate)
		}
	}
	return in, nil
}

// waitAvailable waits until a volume can be attached, or is.
func (p *Provider) waitAvailable(ctx context.Context, id backup.VolumeID) (backup.Volume, error) {
	var v types.Volume
	err := p.until(ctx, p.o.pace.change, p.o.pace.pollMax, func() (_ bool, err error) {
		if v, err = p.volume(ctx, id); err != nil {
			return false, err
		}
		if v.State == types.VolumeStateError {
			return false, backup.Hint(fmt.Errorf("volume %s ended in state error", id),
				"often the snapshot's KMS key cannot be used here (docs/aws.md); `cleancut sweep` removes the volume")
		}
		return v.State == types.VolumeStateAvailable || v.State == types.VolumeStateInUse, nil
	})
	if errors.Is(err, errPending) {
		err = fmt.Errorf("volume %s is still %s: %w", id, v.State, err)
	}
	if err != nil {
		return backup.Volume{}, err
	}
	return volumeOf(v), nil
}

// DeleteVolume deletes a volume of ours by DeleteVolume and waits until EC2
// does not show it any more. The contract is provider.Provider's.
func (p *Provider) DeleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error {
	if err := p.deleteVolume(ctx, id, owner); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	return nil
}

func (p *Provider) deleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error {
	release, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, err := p.volume(ctx, id)
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if tags := tagsOf(v.Tags); !tags.Match(owner) || !ours(tags) {
		return backup.ErrNotOurs
	}
	if at := attachments(v); len(at) > 0 {
		return fmt.Errorf("attached to instance %s: %w", aws.ToString(at[0].InstanceId), backup.ErrInUse)
	}
	err = effect(ctx, "DeleteVolume", func() error {
		_, err := p.api.DeleteVolume(ctx, &ec2.DeleteVolumeInput{VolumeId: aws.String(string(id))})
		return err
	})
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		return err
	}
	p.made.forget(string(id))
	return p.until(ctx, p.o.pace.change, p.o.pace.pollMax, func() (bool, error) {
		_, err := p.volume(ctx, id)
		if errors.Is(err, backup.ErrNotFound) {
			return true, nil
		}
		return false, err
	})
}
