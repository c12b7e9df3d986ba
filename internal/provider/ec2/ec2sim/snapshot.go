package ec2sim

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// The states of a snapshot, and broken.
const (
	pending   = "pending"
	completed = "completed"
)

// suspendLimit is how long writers may be held up before the call gives up.
const suspendLimit = 30 * time.Second

// snapshot is an EBS snapshot, guarded by Server.mu.
type snapshot struct {
	id          string
	local       backup.SnapshotID // in the pool; "" of a root volume's
	volume      string
	size        int
	started     time.Time
	finished    time.Time // completed then
	state       string
	message     string
	description string
	encrypted   bool
	key         string
	tags        backup.Tags
	gone        bool // deleted, but perhaps still seen
	blur        blur[snapshotXML]
}

func noSnapshot(id string) error {
	return refuse("InvalidSnapshot.NotFound", "The snapshot '%s' does not exist.", id)
}

// findSnapshot returns a snapshot that has not been deleted.
func (s *Server) findSnapshot(id string) (*snapshot, error) {
	if m := s.snapshots[id]; m != nil && !m.gone {
		return m, nil
	}
	return nil, noSnapshot(id)
}

func (s *Server) createSnapshot(ctx context.Context, c *call) (any, error) {
	id, description, tags := c.volumeID("VolumeId"), c.str("Description"), c.tagSpecs("snapshot")
	if err := c.ready(); err != nil {
		return nil, err
	}
	v, err := s.beginSnapshot(c, id)
	if err != nil {
		return nil, err
	}
	if f, ok := c.hitBy(Skew); ok {
		if err := pause(ctx, time.Duration(f.place)*f.Delay); err != nil {
			return nil, err
		}
	}
	v.work.Lock()
	defer v.work.Unlock()
	made := newSnapshot(v, description, tags, time.Now().UTC())
	if err := s.clone(ctx, v, made); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(c, made)
	return made.seen(), nil
}

// beginSnapshot finds the volume and uses up its place in the rate window.
func (s *Server) beginSnapshot(c *call, id string) (*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.findVolume(id)
	if err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	if v.state != available && v.state != inUse {
		return nil, refuse("IncorrectState", "Volume '%s' is in the '%s' state.", id, v.state)
	}
	if err := s.snapshotLimits(v); err != nil {
		return nil, err
	}
	v.lastSnapshot = time.Now()
	return v, nil
}

// snapshotLimits are those of one volume (ebs-resource-quotas.html;
// aws-ebs-csi-driver issue 1608 for the rate).
func (s *Server) snapshotLimits(v *volume) error {
	if time.Since(v.lastSnapshot) < s.opts.RateWindow {
		return refuse("SnapshotCreationPerVolumeRateExceeded", "The maximum per volume CreateSnapshot request rate has been exceeded. Use an increasing or variable sleep interval between requests.")
	}
	limit, count := 5, 0
	if v.kind == "st1" || v.kind == "sc1" {
		limit = 1
	}
	for _, other := range s.snapshots {
		if other.volume == v.id && other.state == pending && !other.gone {
			count++
		}
	}
	if count >= limit {
		return refuse("ConcurrentSnapshotLimitExceeded", "Maximum allowed in-progress snapshots for a single volume (%d) exceeded.", limit)
	}
	return nil
}

func newSnapshot(v *volume, description string, tags backup.Tags, started time.Time) *snapshot {
	return &snapshot{id: "snap-0" + randomHex(8), volume: v.id, size: v.size, started: started, state: pending, description: description,
		encrypted: v.encrypted, key: v.key, tags: maps.Clone(tags)}
}

// clone takes the point in time of one volume, attached or not.
func (s *Server) clone(ctx context.Context, v *volume, made *snapshot) (err error) {
	if v.local == "" {
		return nil // a root volume has no bytes
	}
	if v.at == nil || v.at.device == nil { // the pool cuts only what is attached
		if _, err := s.pool.Attach(ctx, v.local); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.pool.Detach(context.WithoutCancel(ctx), v.local)) }()
	}
	return s.cut(ctx, []*volume{v}, []*snapshot{made}, false)
}

// cut takes the points in time of volumes that are all attached. made[i]
// becomes that of volumes[i].
func (s *Server) cut(ctx context.Context, volumes []*volume, made []*snapshot, group bool) (err error) {
	ctx, cancel := context.WithTimeout(ctx, suspendLimit)
	defer cancel()
	var set provider.Set
	var locals []backup.VolumeID
	for i, v := range volumes {
		set.Members = append(set.Members, provider.Member{Volume: v.local, Tags: s.mine(made[i].id)})
		locals = append(locals, v.local)
	}
	c, err := s.pool.Prepare(ctx, set)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	taken, err := s.take(ctx, c, locals, group)
	if err != nil {
		return err
	}
	for i, m := range taken.Members {
		made[i].local = m.Snapshot
	}
	return nil
}

// take clones all members, for a group with all writers held up meanwhile.
func (s *Server) take(ctx context.Context, c provider.Cut, locals []backup.VolumeID, group bool) (_ provider.Taken, err error) {
	if !group {
		return c.Take(ctx)
	}
	resume, err := suspend(locals)
	if err != nil {
		return provider.Taken{}, err
	}
	defer func() { err = errors.Join(err, resume()) }()
	return c.Take(ctx)
}

// add puts snapshots in place and completes them in the background.
func (s *Server) add(c *call, made ...*snapshot) {
	failing, fails := c.hitBy(EndInError)
	_, never := c.hitBy(NeverComplete)
	stale, isStale := c.hitBy(Stale)
	for _, m := range made {
		s.snapshots[m.id] = m
		if isStale {
			m.blur.hide(stale.N)
		}
		switch {
		case never:
		case fails:
			s.spawn(func(ctx context.Context) {
				if pause(ctx, max(failing.Delay, s.opts.Completion)) == nil {
					s.finish(m, broken, "An internal error has occurred.")
				}
			})
		default:
			s.spawn(func(ctx context.Context) { s.complete(ctx, m) })
		}
	}
}

// complete makes a snapshot durable and then completed.
func (s *Server) complete(ctx context.Context, m *snapshot) {
	err := pause(ctx, s.opts.Completion)
	if err == nil && m.local != "" {
		err = s.pool.Complete(ctx, []backup.SnapshotID{m.local}, []backup.Tags{nil})
	}
	switch {
	case err == nil:
		s.finish(m, completed, "")
	case ctx.Err() != nil || errors.Is(err, backup.ErrNotFound): // deleted meanwhile
	default:
		s.log.ErrorContext(ctx, "complete snapshot", slog.String(keySnapshot, m.id), slog.Any(keyError, err))
		s.finish(m, broken, err.Error())
	}
}

func (s *Server) finish(m *snapshot, state, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.state, m.message, m.finished = state, message, time.Now().UTC()
}

func (s *Server) deleteSnapshot(ctx context.Context, c *call) (any, error) {
	id := c.snapshotID(c.needed("SnapshotId"))
	if err := c.ready(); err != nil {
		return nil, err
	}
	gone, err := s.forget(c, id)
	if err != nil {
		return nil, err
	}
	if gone.local != "" {
		if err := s.pool.DeleteSnapshots(ctx, []backup.SnapshotID{gone.local}, s.mine(id)); err != nil {
			return nil, err
		}
	}
	return trueXML{true}, nil
}

func (s *Server) forget(c *call, id string) (*snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.findSnapshot(id)
	if err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	if f, ok := c.hitBy(Stale); ok {
		m.blur.keep(m.seen(), f.N)
	}
	m.gone = true
	return m, nil
}

func (m *snapshot) seen() snapshotXML {
	x := snapshotXML{SnapshotID: m.id, VolumeID: m.volume, Status: m.state, StatusMessage: m.message, StartTime: stamp(m.started), Progress: "0%", OwnerID: Account,
		VolumeSize: m.size, Description: m.description, Encrypted: m.encrypted, KmsKeyID: m.key, StorageTier: "standard", Tags: tagsXML(m.tags)}
	if m.state == completed {
		x.Progress = "100%"
		t := stamp(m.finished)
		x.CompletionTime = &t
	}
	return x
}

func (m *snapshot) info() snapshotInfoXML {
	return snapshotInfoXML{SnapshotID: m.id, VolumeID: m.volume, State: m.state, StartTime: stamp(m.started), Progress: "0%", OwnerID: Account,
		VolumeSize: m.size, Description: m.description, Encrypted: m.encrypted, Tags: tagsXML(m.tags)}
}

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
			return nil, refuse("InvalidParameterValue", "Value (%s) for parameter volumeId is invalid. Expected: 'vol-...'.", id)
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
