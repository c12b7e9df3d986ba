package ec2sim

import (
	"context"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// The states of an attachment. busy is detaching, but the guest has the device
// open.
const (
	attaching = "attaching"
	attached  = "attached"
	detaching = "detaching"
	busy      = "busy"
	detached  = "detached"
)

// A device that is in use is looked at again after busyFirst, then ever later.
const (
	busyFirst = 10 * time.Millisecond
	busyLast  = 200 * time.Millisecond
)

type attachment struct {
	instance string
	name     string // as it was asked for: /dev/sdf
	state    string
	since    time.Time
	root     bool
	device   *device // nil until it is there
}

// deviceName are the names that EC2 lets a data volume have on HVM
// (AWSEC2/latest/UserGuide/device_naming.html).
var deviceName = regexp.MustCompile(`^(/dev/)?(sd[a-z]|xvd[a-z]|xvd[b-d][a-z])$`)

// guestName is how Xen shows the device: /dev/sdf as xvdf.
func guestName(name string) string {
	name = strings.TrimPrefix(name, "/dev/")
	if rest, ok := strings.CutPrefix(name, "sd"); ok {
		return "xvd" + rest
	}
	return name
}

func noInstance(id string) error {
	return refuse("InvalidInstanceID.NotFound", "The instance ID '%s' does not exist", id)
}

func (s *Server) attachVolume(_ context.Context, c *call) (any, error) {
	id, instanceID, name := c.volumeID("VolumeId"), c.instanceID("InstanceId", true), c.needed("Device")
	if err := c.ready(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.findVolume(id)
	if err != nil {
		return nil, err
	}
	i := s.instances[instanceID]
	if i == nil {
		return nil, noInstance(instanceID)
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	if err := s.attachable(v, i, name); err != nil {
		return nil, err
	}
	if f, ok := c.hitBy(Stale); ok {
		v.blur.keep(v.seen(), f.N)
	}
	_, hangs := c.hitBy(NeverAttach)
	s.beginAttach(v, i, name, hangs)
	return v.attachmentSeen(), nil
}

// attachable refuses what EC2 refuses.
func (s *Server) attachable(v *volume, i *instance, name string) error {
	if !deviceName.MatchString(name) {
		return refuse("InvalidParameterValue", "Value (%s) for parameter device is invalid. %s is not a valid EBS device name.", name, name)
	}
	switch {
	case v.at != nil:
		return refuse("VolumeInUse", "%s is already attached to an instance", v.id)
	case v.state != available:
		return refuse("IncorrectState", "%s is not 'available'.", v.id)
	case v.zone != i.Zone:
		return refuse("InvalidVolume.ZoneMismatch", "The volume '%s' is not in the same availability zone as instance '%s'", v.id, i.ID)
	}
	count := 0
	for _, other := range s.volumes {
		if other.at == nil || other.at.instance != i.ID {
			continue
		}
		count++
		if guestName(other.at.name) == guestName(name) {
			return refuse("InvalidParameterValue", "Invalid value '%s' for unixDevice. Attachment point %s is already in use", name, name)
		}
	}
	if count >= i.MaxVolumes {
		return refuse("AttachmentLimitExceeded", "The maximum number of attachments (%d) for instance %s has been reached", i.MaxVolumes, i.ID)
	}
	return nil
}

// beginAttach puts a volume in state attaching; its device comes in the
// background, unless it hangs.
func (s *Server) beginAttach(v *volume, i *instance, name string, hangs bool) {
	at := &attachment{instance: i.ID, name: name, state: attaching, since: time.Now().UTC()}
	v.at, v.state = at, inUse
	if hangs {
		return
	}
	s.spawn(func(ctx context.Context) {
		v.work.Lock()
		defer v.work.Unlock()
		if !s.stillIn(v, at, attaching) {
			return
		}
		d, err := s.plug(ctx, v.local, v.id, i, name)
		if err != nil { // EC2 would leave it attaching as well
			s.log.ErrorContext(ctx, "attach volume", slog.String(keyVolume, v.id), slog.Any(keyError, err))
			return
		}
		s.mu.Lock()
		at.device = d
		s.mu.Unlock()
		s.settle(ctx, func() {
			if at.state == attaching {
				at.state = attached
			}
		})
	})
}

// stillIn reports whether that attachment is still the volume's, and in one of
// the states.
func (s *Server) stillIn(v *volume, at *attachment, states ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, state := range states {
		if v.at == at && at.state == state {
			return true
		}
	}
	return false
}

func (s *Server) detachVolume(_ context.Context, c *call) (any, error) {
	id, instanceID, name := c.volumeID("VolumeId"), c.instanceID("InstanceId", false), c.str("Device")
	if c.boolean("Force") {
		c.complain(refuse("UnsupportedOperation", "Force is not simulated: what is mounted would lose its device"))
	}
	if err := c.ready(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.findVolume(id)
	if err != nil {
		return nil, err
	}
	if instanceID != "" && s.instances[instanceID] == nil {
		return nil, noInstance(instanceID)
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	switch {
	case v.at == nil:
		return nil, refuse("IncorrectState", "Volume '%s' is in the '%s' state.", id, v.state)
	case instanceID != "" && v.at.instance != instanceID, name != "" && v.at.name != name:
		return nil, refuse("InvalidAttachment.NotFound", "The volume '%s' is not attached to instance '%s' as device '%s'", id, instanceID, name)
	case v.at.root:
		return nil, refuse("OperationNotPermitted", "Unable to detach root volume '%s' from instance '%s'", id, v.at.instance)
	case v.at.state == detaching || v.at.state == busy:
		return v.attachmentSeen(), nil
	}
	if f, ok := c.hitBy(Stale); ok {
		v.blur.keep(v.seen(), f.N)
	}
	v.at.state = detaching
	at := v.at
	s.spawn(func(ctx context.Context) { s.detach(ctx, v, at) })
	return v.attachmentSeen(), nil
}

// detach takes the device away as soon as nobody uses it.
func (s *Server) detach(ctx context.Context, v *volume, at *attachment) {
	for wait := busyFirst; ; wait = min(2*wait, busyLast) {
		err := s.unplugOnce(ctx, v, at)
		if err == nil {
			break
		}
		if !errors.Is(err, backup.ErrInUse) {
			s.log.ErrorContext(ctx, "detach volume", slog.String(keyVolume, v.id), slog.Any(keyError, err))
		}
		s.mu.Lock()
		at.state = busy
		s.mu.Unlock()
		if pause(ctx, wait) != nil {
			return // Close does the rest
		}
	}
	s.settle(ctx, func() { v.at, v.state = nil, available })
}

func (s *Server) unplugOnce(ctx context.Context, v *volume, at *attachment) error {
	v.work.Lock()
	defer v.work.Unlock()
	s.mu.Lock()
	d := at.device
	s.mu.Unlock()
	if d == nil {
		return nil
	}
	if err := s.unplug(ctx, d); err != nil {
		return err
	}
	s.mu.Lock()
	at.device = nil
	s.mu.Unlock()
	return nil
}

func (v *volume) attachmentSeen() attachmentXML {
	return attachmentXML{VolumeID: v.id, InstanceID: v.at.instance, Device: v.at.name, Status: v.at.state, AttachTime: stamp(v.at.since), DeleteOnTermination: v.at.root}
}

// claimed reports whether a block device is mounted, in an array or held by
// device mapper: then it refuses O_EXCL (open(2)).
func claimed(node string) bool {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return errors.Is(err, unix.EBUSY)
}
