package ec2

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go/logging"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// What EBS allows (EBS user guide, "Amazon EBS snapshots" and CreateSnapshots).
const (
	pendingLimit    = 5 // snapshots of one volume that are pending
	pendingLimitHDD = 1 // of st1 and sc1
	excludeLimit    = 40
)

// Prepare describes the volumes anew and asks everything that EC2 would refuse
// while production stands still: attachment, snapshots pending or taken just
// now (it waits up to Options.SnapshotGap for the rate per volume), permissions by DryRun, the
// life of the credentials. The dry runs also open the connections that Take
// uses. It makes nothing. The contract is provider.Provider's; a missing
// permission is an error of its own, never ErrUnsupported.
func (p *Provider) Prepare(ctx context.Context, set provider.Set) (provider.Cut, error) {
	c, err := p.prepare(ctx, set)
	if err != nil {
		return nil, fmt.Errorf("prepare cut: %w", err)
	}
	return c, nil
}

func (p *Provider) prepare(ctx context.Context, set provider.Set) (_ *cut, err error) {
	if err := checkSet(ctx, set); err != nil {
		return nil, err
	}
	c := &cut{p: p, skew: set.Skew, group: set.Group}
	var ids []backup.VolumeID
	for _, m := range set.Members {
		ids = append(ids, m.Volume)
	}
	volumes, err := p.volumesByID(ctx, ids)
	if err != nil {
		return nil, err
	}
	for i, v := range volumes {
		if err := checkAttached(v); err != nil {
			return nil, err
		}
		c.members = append(c.members, member{volume: volumeOf(v), tags: set.Members[i].Tags})
	}
	if set.Group {
		if c.instance, err = oneInstance(volumes); err != nil {
			return nil, err
		}
		if c.exclude, err = p.exclusion(ctx, p.api, c.instance, ids); err != nil {
			return nil, err
		}
	}
	if err := p.checkSnapshots(ctx, volumes); err != nil {
		return nil, err
	}
	c.token()
	if err := c.connect(ctx); err != nil {
		return nil, err
	}
	if err := c.rehearse(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func checkSet(ctx context.Context, set provider.Set) error {
	if len(set.Members) == 0 {
		return fmt.Errorf("%w: no volume in the set", backup.ErrUsage)
	}
	seen := map[backup.VolumeID]bool{}
	for _, m := range set.Members {
		if seen[m.Volume] {
			return fmt.Errorf("%w: volume %s twice in the set", backup.ErrUsage, m.Volume)
		}
		if !ours(m.Tags) {
			return fmt.Errorf("%w: volume %s without a tag of cleancut for its snapshot", backup.ErrUsage, m.Volume)
		}
		if err := checkTags(m.Tags); err != nil {
			return err
		}
		seen[m.Volume] = true
	}
	return ctx.Err()
}

func checkAttached(v types.Volume) error {
	id, at := aws.ToString(v.VolumeId), attachments(v)
	switch {
	case len(at) > 1:
		return backup.Hint(fmt.Errorf("volume %s is attached to %d instances (Multi-Attach): %w", id, len(at), backup.ErrUnsupported), "detach it from all but one: nobody can stop the writers of the others")
	case v.State != types.VolumeStateInUse || len(at) == 0 || at[0].State != types.VolumeAttachmentStateAttached:
		return backup.Hint(fmt.Errorf("volume %s is not attached", id), "a cut is of volumes in use; see `cleancut topology`")
	}
	return nil
}

// oneInstance returns the instance that has all volumes.
func oneInstance(volumes []types.Volume) (string, error) {
	instance := aws.ToString(volumes[0].Attachments[0].InstanceId)
	for _, v := range volumes {
		if other := aws.ToString(v.Attachments[0].InstanceId); other != instance {
			return "", backup.Hint(fmt.Errorf("volumes %s and %s are attached to instances %s and %s, and EC2 cuts those of one instance: %w",
				aws.ToString(volumes[0].VolumeId), aws.ToString(v.VolumeId), instance, other, backup.ErrUnsupported), "freeze them: --mode freeze")
		}
	}
	return instance, nil
}

// exclusion is what CreateSnapshots must leave out: it has no list of members.
type exclusion struct {
	root bool
	data []string
}

// exclusion lists all volumes of an instance but the members.
func (p *Provider) exclusion(ctx context.Context, api *ec2.Client, instance string, members []backup.VolumeID) (x exclusion, err error) {
	out, err := api.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{instance}})
	if err != nil {
		return x, border(ctx, "DescribeInstances", err)
	}
	if len(out.Reservations) != 1 || len(out.Reservations[0].Instances) != 1 {
		return x, fmt.Errorf("instance %s: %w", instance, backup.ErrNotFound)
	}
	inst := out.Reservations[0].Instances[0]
	root, others := "", map[string]bool{}
	for _, m := range inst.BlockDeviceMappings {
		if m.Ebs == nil {
			continue
		}
		others[aws.ToString(m.Ebs.VolumeId)] = true
		if aws.ToString(m.DeviceName) == aws.ToString(inst.RootDeviceName) {
			root = aws.ToString(m.Ebs.VolumeId)
		}
	}
	// The two descriptions may be of different age.
	attached, err := volumesBy(ctx, api, filter("attachment.instance-id", instance))
	if err != nil {
		return x, err
	}
	for _, v := range attached {
		if len(attachments(v)) > 0 {
			others[aws.ToString(v.VolumeId)] = true
		}
	}
	for _, id := range members {
		delete(others, string(id))
	}
	x.root = root == "" || others[root]
	delete(others, root)
	for id := range others {
		x.data = append(x.data, id)
	}
	slices.Sort(x.data)
	if len(x.data) > excludeLimit {
		return x, backup.Hint(fmt.Errorf("instance %s has %d other volumes, and CreateSnapshots leaves out at most %d: %w", instance, len(x.data), excludeLimit, backup.ErrUnsupported), "freeze the filesystems: --mode freeze")
	}
	return x, nil
}

// checkSnapshots refuses what would hit EBS's limits per volume, or waits.
func (p *Provider) checkSnapshots(ctx context.Context, volumes []types.Volume) error {
	hdd := map[string]bool{}
	var ids []string
	for _, v := range volumes {
		ids = append(ids, aws.ToString(v.VolumeId))
		hdd[aws.ToString(v.VolumeId)] = v.VolumeType == types.VolumeTypeSt1 || v.VolumeType == types.VolumeTypeSc1
	}
	var wait time.Duration
	pending, ours := map[string]int{}, ""
	for chunk := range slices.Chunk(ids, filterValues) {
		found, err := p.snapshots(ctx, ownAccount(), filter("volume-id", chunk...))
		if err != nil {
			return err
		}
		for _, s := range found {
			if s.State == types.SnapshotStatePending {
				pending[aws.ToString(s.VolumeId)]++
			}
			if tagsOf(s.Tags)[backup.TagBackup] != "" {
				ours = aws.ToString(s.SnapshotId)
			}
			wait = max(wait, p.o.pace.rate-time.Since(aws.ToTime(s.StartTime)))
		}
	}
	for _, id := range ids {
		limit := pendingLimit
		if hdd[id] {
			limit = pendingLimitHDD
		}
		if pending[id] >= limit {
			return backup.Hint(fmt.Errorf("volume %s has %d snapshots pending, and EBS allows %d", id, pending[id], limit), "wait until one is completed, or delete it; see `aws ec2 describe-snapshots`")
		}
	}
	if err := p.askTags(ctx, ours); err != nil {
		return err
	}
	if wait = min(wait, p.o.pace.rate); wait > 0 {
		p.log.InfoContext(ctx, "waiting, as EC2 allows one snapshot of a volume in 15 s", slog.Duration(keyWait, wait))
		return pause(ctx, wait)
	}
	return nil
}

// askTags asks by DryRun whether tags can be added later. It needs a snapshot
// to ask with: before the first backup there is none.
func (p *Provider) askTags(ctx context.Context, snapshot string) error {
	if snapshot == "" {
		return nil
	}
	_, err := p.api.CreateTags(ctx, &ec2.CreateTagsInput{DryRun: aws.Bool(true), Resources: []string{snapshot}, Tags: awsTags(backup.Tags{backup.TagDigest: "dry-run"})})
	if err = dryRun(ctx, "CreateTags", err); errors.Is(err, backup.ErrNotFound) {
		return nil // deleted meanwhile
	}
	return err
}

// dryRun turns the answer to a dry run into nil where the call would have
// succeeded.
func dryRun(ctx context.Context, action string, err error) error {
	if err == nil {
		return fmt.Errorf("%s: the dry run was answered as if it were none", action)
	}
	if codeOf(err) == "DryRunOperation" {
		return nil
	}
	return border(ctx, action, err)
}

// token draws the cut's own tag and gives it to every member.
func (c *cut) token() {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never returns an error (Go 1.24)
	value := hex.EncodeToString(b)
	for i := range c.members {
		c.members[i].tags = c.members[i].tags.With(backup.TagCut, value)
	}
	c.common = backup.Tags{}
	for key, value := range c.members[0].tags {
		if !slices.ContainsFunc(c.members, func(m member) bool { got, ok := m.tags[key]; return !ok || got != value }) {
			c.common[key] = value
		}
	}
}

// connect makes the client of the cut: one attempt a call, whatever the
// environment says, and credentials that are not renewed meanwhile.
func (c *cut) connect(ctx context.Context) error {
	credentials, err := c.p.credentials(ctx)
	if err != nil {
		return err
	}
	c.expires = credentials
	c.http = c.p.httpClient(len(c.members))
	c.api = c.p.singleAttempts(c.expires, c.http)
	return nil
}

func (p *Provider) singleAttempts(credentials aws.Credentials, client *http.Client) *ec2.Client {
	return ec2.NewFromConfig(p.cfg, p.endpoint, func(o *ec2.Options) {
		o.Retryer, o.RetryMaxAttempts = aws.NopRetryer{}, 1
		o.HTTPClient = client
		o.Logger = logging.Nop{} // the log may lie on a frozen filesystem
		o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return credentials, nil })
	})
}

// credentials returns some that last for the cut.
func (p *Provider) credentials(ctx context.Context) (aws.Credentials, error) {
	for try := range 2 {
		got, err := p.cfg.Credentials.Retrieve(ctx)
		if ctx.Err() != nil {
			return got, ctx.Err()
		}
		if err != nil {
			return got, backup.Hint(fmt.Errorf("find credentials for AWS: %w", err), "give the instance a role, or configure a profile; docs/aws.md has the policies")
		}
		if !got.CanExpire || time.Until(got.Expires) > p.o.pace.credentials {
			return got, nil
		}
		cache, ok := p.cfg.Credentials.(*aws.CredentialsCache)
		if try > 0 || !ok {
			break
		}
		cache.Invalidate()
	}
	return aws.Credentials{}, backup.Hint(fmt.Errorf("the credentials for AWS expire within %s, perhaps inside the cut", p.o.pace.credentials), "renew them, and repeat")
}

// rehearse sends the calls of Take as dry runs, all at once and over the
// connections that Take will find open.
func (c *cut) rehearse(ctx context.Context) error {
	patient := func(o *ec2.Options) { o.Retryer, o.RetryMaxAttempts = c.p.patience(), 0 }
	if c.group {
		in := c.groupInput()
		in.DryRun = aws.Bool(true)
		_, err := c.api.CreateSnapshots(ctx, in, patient)
		return dryRun(ctx, "CreateSnapshots", err)
	}
	errs := make([]error, len(c.members))
	var all sync.WaitGroup
	for i, m := range c.members {
		all.Go(func() {
			in := m.input()
			in.DryRun = aws.Bool(true)
			_, err := c.api.CreateSnapshot(ctx, in, patient)
			if errs[i] = dryRun(ctx, "CreateSnapshot", err); errs[i] != nil {
				errs[i] = fmt.Errorf("snapshot of %s: %w", m.volume.ID, errs[i])
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func (m member) input() *ec2.CreateSnapshotInput {
	return &ec2.CreateSnapshotInput{
		VolumeId:          aws.String(string(m.volume.ID)),
		Description:       aws.String(description(m.tags)),
		TagSpecifications: tagSpecification(types.ResourceTypeSnapshot, m.tags),
	}
}

func (c *cut) groupInput() *ec2.CreateSnapshotsInput {
	spec := &types.InstanceSpecification{InstanceId: aws.String(c.instance), ExcludeBootVolume: aws.Bool(c.exclude.root), ExcludeDataVolumeIds: c.exclude.data}
	return &ec2.CreateSnapshotsInput{
		InstanceSpecification: spec,
		Description:           aws.String(description(c.common)),
		TagSpecifications:     tagSpecification(types.ResourceTypeSnapshot, c.common),
	}
}

// description is for people who look at EC2's console.
func description(tags backup.Tags) string {
	text := strings.Join(strings.Fields("cleancut "+tags[backup.TagCluster]+" "+tags[backup.TagBackup]), " ")
	return text[:min(len(text), 255)]
}
