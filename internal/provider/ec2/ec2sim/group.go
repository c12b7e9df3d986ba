package ec2sim

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// groupRequest is CreateSnapshots' InstanceSpecification and the rest.
type groupRequest struct {
	instance    string
	withoutBoot bool
	exclude     []string
	copyTags    bool
	description string
	tags        backup.Tags
}

func (s *Server) createSnapshots(ctx context.Context, c *call) (any, error) {
	const spec = "InstanceSpecification."
	r := groupRequest{instance: c.instanceID(spec+"InstanceId", true), withoutBoot: c.boolean(spec + "ExcludeBootVolume"), exclude: c.list(spec + "ExcludeDataVolumeId"),
		description: c.str("Description"), tags: c.tagSpecs("snapshot")}
	switch v := c.str("CopyTagsFromSource"); v {
	case "volume":
		r.copyTags = true
	case "":
	default:
		c.complain(refuse("InvalidParameterValue", "Value (%s) for parameter CopyTagsFromSource is invalid.", v))
	}
	if len(r.exclude) > 40 {
		c.complain(refuse("InvalidParameterValue", "You can exclude at most 40 data volumes, not %d", len(r.exclude)))
	}
	if err := c.ready(); err != nil {
		return nil, err
	}
	if f, ok := c.hitBy(ExtraMember); ok && !c.dryRun {
		if err := s.intrude(ctx, r.instance, f); err != nil {
			return nil, err
		}
	}
	group, err := s.beginGroup(c, r)
	if err != nil {
		return nil, err
	}
	made, err := s.cutGroup(ctx, c, r, group)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(c, made...)
	var answer snapshotInfosXML
	for _, m := range made {
		answer.Snapshots.Items = append(answer.Snapshots.Items, m.info())
	}
	if _, ok := c.hitBy(SwapAnswer); ok && len(made) > 1 {
		a, b := &answer.Snapshots.Items[0], &answer.Snapshots.Items[1]
		a.VolumeID, b.VolumeID = b.VolumeID, a.VolumeID
	}
	return answer, nil
}

// beginGroup computes the members: all that is attached to the instance but
// for what is excluded.
func (s *Server) beginGroup(c *call, r groupRequest) ([]*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.instances[r.instance]
	if i == nil {
		return nil, noInstance(r.instance)
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	if s.dm != "" {
		return nil, refuse("UnsupportedOperation", "CreateSnapshots is not possible on this machine: %s", s.dm)
	}
	for _, id := range r.exclude {
		switch v := s.volumes[id]; {
		case !volumePattern.MatchString(id):
			return nil, malformedVolume(id)
		case v == nil:
			return nil, noVolume(id)
		case v.at == nil || v.at.instance != i.ID:
			return nil, refuse("InvalidParameterValue", "The volume '%s' is not attached to instance '%s'", id, i.ID)
		case v.at.root:
			return nil, refuse("InvalidParameterValue", "The volume '%s' is the root volume of '%s'; use ExcludeBootVolume", id, i.ID)
		}
	}
	var group []*volume
	for _, v := range s.volumes {
		wanted := v.at != nil && v.at.instance == i.ID && !(v.at.root && r.withoutBoot) && !slices.Contains(r.exclude, v.id)
		if !wanted {
			continue
		}
		if v.at.state != attached {
			return nil, refuse("IncorrectState", "Volume '%s' is in the '%s' state.", v.id, v.at.state)
		}
		group = append(group, v)
	}
	slices.SortFunc(group, func(a, b *volume) int { return cmp.Compare(a.id, b.id) })
	if _, ok := c.hitBy(MissingMember); ok && len(group) > 0 {
		group = group[:len(group)-1]
	}
	if len(group) == 0 {
		return nil, refuse("InvalidParameterValue", "The instance '%s' has no volumes to snapshot", i.ID)
	}
	for _, v := range group {
		if err := s.snapshotLimits(v); err != nil {
			return nil, err
		}
	}
	for _, v := range group {
		v.lastSnapshot = time.Now()
	}
	return group, nil
}

// cutGroup takes all members at one instant. Nobody plugs one of them in or
// out meanwhile; the group is sorted, so two calls cannot wait for each other.
func (s *Server) cutGroup(ctx context.Context, c *call, r groupRequest, group []*volume) ([]*snapshot, error) {
	started := time.Now().UTC()
	var made, real []*snapshot
	var volumes []*volume
	for _, v := range group {
		v.work.Lock()
		defer v.work.Unlock()
		tags := maps.Clone(r.tags)
		if r.copyTags {
			tags = maps.Clone(v.tags)
			maps.Copy(tags, r.tags)
		}
		m := newSnapshot(v, r.description, tags, started)
		made = append(made, m)
		if v.local != "" {
			real, volumes = append(real, m), append(volumes, v)
		}
	}
	if len(real) > 0 {
		if err := s.cut(ctx, volumes, real, true); err != nil {
			return nil, err
		}
	}
	if _, ok := c.hitBy(SwapBytes); ok && len(real) > 1 {
		real[0].local, real[1].local = real[1].local, real[0].local
	}
	return made, nil
}

// intrude attaches a blank volume to the instance, as somebody else might a
// moment before a group is cut, and waits until it is attached.
func (s *Server) intrude(ctx context.Context, instance string, f strike) error {
	s.mu.Lock()
	i := s.instances[instance]
	s.mu.Unlock()
	if i == nil {
		return nil // the call is refused for that in a moment
	}
	v := &volume{id: "vol-0" + randomHex(8), size: 1, kind: "gp3", iops: 3000, throughput: 125, zone: i.Zone, created: time.Now().UTC(), state: available, tags: backup.Tags{}}
	inPool, err := s.pool.CreateVolume(ctx, provider.VolumeSpec{Token: v.id, Size: gib, Tags: s.mine(v.id)})
	if err != nil {
		return err
	}
	s.mu.Lock()
	v.local = inPool.ID
	s.volumes[v.id] = v
	name := "/dev/sdz"
	for c := 'z'; c > 'b' && s.attachable(v, i, name) != nil; c-- {
		name = "/dev/sd" + string(c)
	}
	if err := s.attachable(v, i, name); err != nil {
		s.mu.Unlock()
		return err
	}
	s.beginAttach(v, i, name, false)
	at := v.at
	s.mu.Unlock()
	for s.stillIn(v, at, attaching) {
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}
