package ec2sim

import (
	"context"
	"errors"
	"log/slog"
	"maps"
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

// InPool returns what a snapshot is called in the pool, "" if there is none.
func (s *Server) InPool(id backup.SnapshotID) backup.SnapshotID {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.snapshots[string(id)]; m != nil {
		return m.local
	}
	return ""
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
	began := time.Now()
	resume, err := suspend(locals)
	if err != nil {
		return provider.Taken{}, err
	}
	defer func() {
		err = errors.Join(err, resume())
		s.log.DebugContext(ctx, "writers were held up", slog.Duration(keyTook, time.Since(began)))
	}()
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
