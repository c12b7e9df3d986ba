package ec2sim

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"strconv"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// The states of a volume.
const (
	creating  = "creating"
	available = "available"
	inUse     = "in-use"
	deleting  = "deleting"
	broken    = "error"
)

// volume is an EBS volume. Its fields are guarded by Server.mu but for work.
type volume struct {
	work sync.Mutex // held while its device comes, goes or is cut; taken before Server.mu

	id               string
	local            backup.VolumeID // in the pool; "" while it is made, and of root volumes
	size             int             // GiB
	kind, zone, from string
	iops, throughput int
	rate             int
	encrypted        bool
	key              string
	created          time.Time
	state            string
	tags             backup.Tags
	at               *attachment // nil: none

	lastSnapshot time.Time
	blur         blur[volumeXML]
}

// token is what CreateVolume was called with, and what that made.
type token struct {
	request string
	volume  *volume
}

func itoa(n int) string { return strconv.Itoa(n) }

func noVolume(id string) error {
	return refuse("InvalidVolume.NotFound", "The volume '%s' does not exist.", id)
}

// findVolume returns a volume; one that is being deleted is none any more.
func (s *Server) findVolume(id string) (*volume, error) {
	if v := s.volumes[id]; v != nil && v.state != deleting {
		return v, nil
	}
	return nil, noVolume(id)
}

// mine are the tags in the pool of what becomes the EC2 resource id.
func (s *Server) mine(id string) backup.Tags {
	return backup.Tags{tagServer: s.opts.Devices, tagID: id}
}

func (s *Server) createVolume(ctx context.Context, c *call) (any, error) {
	v := &volume{zone: c.needed("AvailabilityZone"), size: c.integer("Size"), from: c.snapshotID(c.str("SnapshotId")), kind: c.str("VolumeType"), iops: c.integer("Iops"),
		throughput: c.integer("Throughput"), rate: c.integer("VolumeInitializationRate"), encrypted: c.boolean("Encrypted"), key: c.str("KmsKeyId"), tags: c.tagSpecs("volume")}
	if c.boolean("MultiAttachEnabled") {
		c.complain(refuse("UnsupportedOperation", "Multi-Attach is not simulated"))
	}
	clientToken := c.str("ClientToken")
	if len(clientToken) > 64 {
		c.complain(refuse("InvalidParameterValue", "The client token has more than 64 characters"))
	}
	if err := c.ready(); err != nil {
		return nil, err
	}
	request := maps.Clone(c.values)
	delete(request, "ClientToken")
	from, made, err := s.reserveVolume(c, v, clientToken, url.Values(request).Encode())
	if err != nil {
		return nil, err
	}
	if made != nil {
		return made, nil
	}
	// At once, though EC2 loads it later: the snapshot may be deleted as soon
	// as the call has returned.
	spec := provider.VolumeSpec{Token: v.id, Size: backup.Bytes(v.size) * gib, From: from, Tags: s.mine(v.id)}
	inPool, err := s.pool.CreateVolume(ctx, spec)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.volumes, v.id)
		delete(s.tokens, clientToken)
		return nil, err
	}
	v.local = inPool.ID
	s.spawn(func(ctx context.Context) { s.settle(ctx, func() { v.state = available }) })
	return v.seen(), nil
}

// settle does a change of state when a transition has taken its time.
func (s *Server) settle(ctx context.Context, change func()) {
	if pause(ctx, s.opts.Transition) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// reserveVolume checks what CreateVolume asks for and puts the volume in place,
// in state creating. made is the volume of an earlier call with the token.
func (s *Server) reserveVolume(c *call, v *volume, clientToken, request string) (from backup.SnapshotID, made any, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := v.zone == s.opts.Zone
	for _, i := range s.instances {
		known = known || v.zone == i.Zone
	}
	if !known {
		return "", nil, refuse("InvalidZone.NotFound", "The zone '%s' does not exist.", v.zone)
	}
	if earlier, ok := s.tokens[clientToken]; ok && clientToken != "" && !c.dryRun {
		if earlier.request != request {
			return "", nil, refuse("IdempotentParameterMismatch", "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).")
		}
		if s.volumes[earlier.volume.id] != earlier.volume {
			return "", nil, noVolume(earlier.volume.id)
		}
		return "", earlier.volume.seen(), nil
	}
	var source *snapshot
	if v.from != "" {
		if source, err = s.findSnapshot(v.from); err != nil {
			return "", nil, err
		}
	}
	if err := c.permitted(); err != nil {
		return "", nil, err
	}
	if err := v.fit(source); err != nil {
		return "", nil, err
	}
	v.id, v.created, v.state = "vol-0"+randomHex(8), time.Now().UTC(), creating
	s.volumes[v.id] = v
	if clientToken != "" {
		s.tokens[clientToken] = token{request, v}
	}
	if f, ok := c.hitBy(Stale); ok {
		v.blur.hide(f.N)
	}
	if source != nil {
		from = source.local
	}
	return from, nil, nil
}

// limits of a volume type (ebs/latest/userguide/ebs-volume-types.html). Zero
// IOPS or throughput: not to be chosen.
type limits struct {
	minSize, maxSize int // GiB
	minIops, maxIops int
	iopsPerGiB       int
	maxThroughput    int // MiB/s
}

func limitsOf(kind string) (limits, bool) {
	l, ok := map[string]limits{
		"gp2":      {minSize: 1, maxSize: 16384},
		"gp3":      {minSize: 1, maxSize: 65536, minIops: 3000, maxIops: 80000, iopsPerGiB: 500, maxThroughput: 2000},
		"io1":      {minSize: 4, maxSize: 16384, minIops: 100, maxIops: 64000, iopsPerGiB: 50},
		"io2":      {minSize: 4, maxSize: 65536, minIops: 100, maxIops: 256000, iopsPerGiB: 1000},
		"st1":      {minSize: 125, maxSize: 16384},
		"sc1":      {minSize: 125, maxSize: 16384},
		"standard": {minSize: 1, maxSize: 1024},
	}[kind]
	return l, ok
}

// fit fills in what CreateVolume leaves open and refuses what EBS does not
// make. from is nil for a blank volume.
func (v *volume) fit(from *snapshot) error {
	if v.kind == "" {
		v.kind = "gp2" // EC2's default, not gp3
	}
	l, ok := limitsOf(v.kind)
	if !ok {
		return refuse("InvalidParameterValue", "Value (%s) for parameter volumeType is invalid.", v.kind)
	}
	if err := v.fitSource(from); err != nil {
		return err
	}
	if v.size < l.minSize || v.size > l.maxSize {
		return refuse("InvalidParameterValue", "Volume of %dGiB is invalid. Volumes of type %s must be between %dGiB and %dGiB.", v.size, v.kind, l.minSize, l.maxSize)
	}
	if v.key != "" && !v.encrypted {
		return refuse("InvalidParameterDependency", "The parameter KmsKeyId requires the parameter Encrypted to be set.")
	}
	if err := v.fitIops(l); err != nil {
		return err
	}
	return v.fitThroughput(l)
}

func (v *volume) fitSource(from *snapshot) error {
	if from == nil {
		if v.rate != 0 {
			return refuse("InvalidParameterCombination", "The parameter VolumeInitializationRate is only supported for volumes created from snapshots.")
		}
		if v.size == 0 {
			return refuse("MissingParameter", "The request must contain the parameter size or snapshotId")
		}
		return nil
	}
	if from.state != completed {
		return refuse("IncorrectState", "Snapshot %s is in invalid state - %s", from.id, from.state)
	}
	if v.size == 0 {
		v.size = from.size
	}
	if v.size < from.size {
		return refuse("InvalidParameterValue", "The size of a volume from %s must be at least %dGiB, not %dGiB.", from.id, from.size, v.size)
	}
	if v.rate != 0 && (v.rate < 100 || v.rate > 300) {
		return refuse("InvalidParameterValue", "Value (%d) for parameter volumeInitializationRate is invalid. It must be between 100 and 300 MiB/s.", v.rate)
	}
	if from.encrypted {
		v.encrypted = true
		if v.key == "" {
			v.key = from.key
		}
	}
	return nil
}

func (v *volume) fitIops(l limits) error {
	switch {
	case l.maxIops == 0 && v.iops != 0:
		return refuse("InvalidParameterCombination", "The parameter iops is not supported for %s volumes.", v.kind)
	case l.maxIops == 0:
		if v.kind == "gp2" {
			v.iops = min(max(100, 3*v.size), 16000)
		}
		return nil
	case v.iops == 0 && v.kind == "gp3":
		v.iops = 3000
	case v.iops == 0:
		return refuse("MissingParameter", "The parameter iops must be specified for %s volumes.", v.kind)
	}
	// gp3's ratio counts only above the baseline, which every size has.
	if v.iops < l.minIops || v.iops > l.maxIops {
		return refuse("InvalidParameterValue", "Volume iops of %d is out of range. %s volumes have %d to %d.", v.iops, v.kind, l.minIops, l.maxIops)
	}
	if v.iops > v.size*l.iopsPerGiB && v.iops != 3000 {
		return refuse("InvalidParameterValue", "Iops to volume size ratio of %d/%d is too high; maximum is %d.", v.iops, v.size, l.iopsPerGiB)
	}
	return nil
}

func (v *volume) fitThroughput(l limits) error {
	switch {
	case l.maxThroughput == 0 && v.throughput != 0:
		return refuse("InvalidParameterCombination", "The parameter throughput is not supported for %s volumes.", v.kind)
	case l.maxThroughput == 0:
		return nil
	case v.throughput == 0:
		v.throughput = 125
	}
	if v.throughput < 125 || v.throughput > l.maxThroughput {
		return refuse("InvalidParameterValue", "Throughput of %d is out of range. %s volumes have 125 to %d.", v.throughput, v.kind, l.maxThroughput)
	}
	if 4*v.throughput > v.iops {
		return refuse("InvalidParameterValue", "Throughput (MiBps) to iops ratio of %d/%d is too high; maximum is 0.25 MiBps per iops.", v.throughput, v.iops)
	}
	return nil
}

func (s *Server) deleteVolume(ctx context.Context, c *call) (any, error) {
	id := c.volumeID("VolumeId")
	if err := c.ready(); err != nil {
		return nil, err
	}
	v, err := s.beginDelete(c, id)
	if err != nil {
		return nil, err
	}
	s.spawn(func(ctx context.Context) {
		v.work.Lock() // a snapshot may be taking its point in time
		defer v.work.Unlock()
		err := s.pool.DeleteVolume(ctx, v.local, s.mine(v.id))
		if err != nil {
			s.log.ErrorContext(ctx, "delete volume", slog.String(keyVolume, v.id), slog.Any(keyError, err))
		}
		s.settle(ctx, func() {
			if err != nil {
				v.state = broken
				return
			}
			delete(s.volumes, v.id)
		})
	})
	return trueXML{true}, nil
}

func (s *Server) beginDelete(c *call, id string) (*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.findVolume(id)
	if err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	switch {
	case v.at != nil:
		return nil, refuse("VolumeInUse", "Volume %s is currently attached to %s", id, v.at.instance)
	case v.state != available && v.state != broken:
		return nil, refuse("IncorrectState", "Volume '%s' is in the '%s' state.", id, v.state)
	}
	if f, ok := c.hitBy(Stale); ok {
		v.blur.keep(v.seen(), f.N)
	}
	v.state = deleting
	return v, nil
}

// seen is the volume as a describe shows it.
func (v *volume) seen() volumeXML {
	x := volumeXML{VolumeID: v.id, Size: v.size, SnapshotID: v.from, AvailabilityZone: v.zone, Status: v.state, CreateTime: stamp(v.created), Tags: tagsXML(v.tags),
		VolumeType: v.kind, Iops: v.iops, Throughput: v.throughput, InitializationRate: v.rate, Encrypted: v.encrypted}
	if v.encrypted {
		x.KmsKeyID = v.key
		if x.KmsKeyID == "" {
			x.KmsKeyID = fmt.Sprintf("arn:aws:kms:%s:%s:alias/aws/ebs", v.zone[:max(len(v.zone)-1, 0)], Account)
		}
	}
	if v.at != nil {
		x.Attachments.Items = []attachmentXML{v.attachmentSeen()}
	}
	return x
}

// blur is eventual consistency: for the next describes a thing looks as it did
// before.
type blur[T any] struct {
	left int
	old  *T // nil: the thing is not there
}

func (b *blur[T]) hide(describes int)        { *b = blur[T]{left: describes} }
func (b *blur[T]) keep(old T, describes int) { *b = blur[T]{left: describes, old: &old} }

// look uses up one describe: now, or as it was.
func (b *blur[T]) look(now T) (T, bool) {
	if b.left == 0 {
		return now, true
	}
	b.left--
	if b.old == nil {
		return now, false
	}
	return *b.old, true
}
