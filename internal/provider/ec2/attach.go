package ec2

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/backup"
)

// nameTries is how many device names Attach tries where EC2 refuses one.
const nameTries = 10

// names are device names on their way to EC2, which does not show them yet.
type names struct {
	mu    sync.Mutex
	taken map[string]bool
}

// take returns the first name that is neither used nor on its way.
func (n *names) take(used map[string]bool) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken == nil {
		n.taken = map[string]bool{}
	}
	for _, name := range deviceNames() {
		if !n.taken[name] && !used[tailOf(name)] {
			n.taken[name] = true
			return name, true
		}
	}
	return "", false
}

func (n *names) release(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.taken, name)
}

// deviceNames are those that EC2 recommends for EBS volumes (EBS user guide,
// "Device names on Linux instances").
func deviceNames() (out []string) {
	for c := 'f'; c <= 'p'; c++ {
		out = append(out, "/dev/sd"+string(c))
	}
	for _, first := range "bcd" {
		for c := 'a'; c <= 'z'; c++ {
			out = append(out, "/dev/xvd"+string(first)+string(c))
		}
	}
	return out
}

// tailOf makes /dev/sdf and /dev/xvdf one name, as the kernel may.
func tailOf(name string) string {
	for _, c := range candidates(name) {
		return c
	}
	return name
}

// Attach attaches a volume to this instance by AttachVolume and waits for its
// device. It chooses the device name. A volume that does not get beyond
// `attaching` in time is detached again, and the error says so. The contract is
// provider.Provider's.
func (p *Provider) Attach(ctx context.Context, id backup.VolumeID) (string, error) {
	device, err := p.attach(ctx, id)
	if err != nil {
		return "", fmt.Errorf("attach %s: %w", id, err)
	}
	p.log.DebugContext(ctx, "volume attached", slog.String(keyVolume, string(id)), slog.String(keyDevice, device))
	return device, nil
}

func (p *Provider) attach(ctx context.Context, id backup.VolumeID) (string, error) {
	release, err := p.turns.take(ctx, id)
	if err != nil {
		return "", err
	}
	defer release()
	me, err := p.self(ctx)
	if err != nil {
		return "", err
	}
	v, err := p.volume(ctx, id)
	if err != nil {
		return "", err
	}
	if err := elsewhere(v, me.instance); err != nil {
		return "", err
	}
	if a := here(v, me.instance); a != nil && a.State == types.VolumeAttachmentStateDetaching {
		if v, err = p.waitDetached(ctx, id, me.instance); err != nil {
			return "", err
		}
	}
	if here(v, me.instance) == nil {
		name, err := p.connect(ctx, id, me.instance)
		defer p.names.release(name)
		if err != nil {
			return "", err
		}
	}
	v, a, err := p.waitAttached(ctx, id, me.instance)
	if err != nil {
		return "", err
	}
	return p.waitNode(ctx, v, a)
}

// elsewhere tells by ErrInUse that a volume is attached to another instance.
// Multi-Attach is no excuse: no filesystem of ours stands two writers.
func elsewhere(v types.Volume, instance string) error {
	for _, a := range attachments(v) {
		if other := aws.ToString(a.InstanceId); other != instance {
			return backup.Hint(fmt.Errorf("attached to instance %s: %w", other, backup.ErrInUse), "detach it there first")
		}
	}
	return nil
}

// connect calls AttachVolume with one device name after the other until one is
// free: EC2 says InvalidParameterValue to a name that is in use, and may know
// more of them than it shows. The name stays taken until it is released.
func (p *Provider) connect(ctx context.Context, id backup.VolumeID, instance string) (name string, err error) {
	used, err := p.usedNames(ctx, instance)
	if err != nil {
		return "", err
	}
	for range nameTries {
		next, ok := p.names.take(used)
		if !ok {
			return "", backup.Hint(errors.New("no device name is free"), "end copies on this host, or restore on another")
		}
		err = p.settled(ctx, string(id), func() error {
			return effect(ctx, "AttachVolume", func() error {
				_, err := p.api.AttachVolume(ctx, &ec2.AttachVolumeInput{Device: aws.String(next), InstanceId: aws.String(instance), VolumeId: aws.String(string(id))})
				return err
			})
		})
		switch codeOf(err) {
		case "InvalidParameterValue":
			used[tailOf(next)] = true
			p.names.release(next)
			continue
		case "VolumeInUse", "IncorrectState": // perhaps by a call whose answer was lost
			p.names.release(next)
			return "", p.attachedAnyway(ctx, id, instance, err)
		}
		if err != nil {
			p.names.release(next)
			return "", err
		}
		return next, nil
	}
	return "", err
}

// usedNames are the device names of an instance, as tailOf has them.
func (p *Provider) usedNames(ctx context.Context, instance string) (map[string]bool, error) {
	inst, err := p.instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, m := range inst.BlockDeviceMappings {
		used[tailOf(aws.ToString(m.DeviceName))] = true
	}
	return used, nil
}

// attachedAnyway returns nil if the volume is attached to the instance, or on
// its way there, in spite of a refusal; else the refusal with its reason.
func (p *Provider) attachedAnyway(ctx context.Context, id backup.VolumeID, instance string, refused error) error {
	v, err := p.volume(ctx, id)
	if err != nil {
		return errors.Join(refused, err)
	}
	if err := elsewhere(v, instance); err != nil {
		return errors.Join(err, refused)
	}
	if here(v, instance) != nil {
		return nil
	}
	return refused
}

// waitAttached waits until EC2 says `attached`.
func (p *Provider) waitAttached(ctx context.Context, id backup.VolumeID, instance string) (v types.Volume, a types.VolumeAttachment, err error) {
	err = p.until(ctx, p.o.pace.change, p.o.pace.pollMax, func() (bool, error) {
		if v, err = p.volume(ctx, id); err != nil {
			return false, err
		}
		found := here(v, instance)
		if found == nil {
			return false, nil // described before the effect shows
		}
		a = *found
		return a.State == types.VolumeAttachmentStateAttached || a.State == types.VolumeAttachmentStateBusy, nil
	})
	if !errors.Is(err, errPending) {
		return v, a, err
	}
	err = backup.Hint(fmt.Errorf("it is not attached to %s %w", instance, err), "the name or the instance may be stuck: repeat; if that fails as well, restart the instance or restore on another")
	if a.State != types.VolumeAttachmentStateAttaching {
		return v, a, err
	}
	back := effect(ctx, "DetachVolume", func() error {
		_, err := p.api.DetachVolume(ctx, &ec2.DetachVolumeInput{VolumeId: aws.String(string(id)), InstanceId: aws.String(instance)})
		return err
	})
	if back != nil {
		return v, a, errors.Join(err, fmt.Errorf("detach it again: %w", back))
	}
	return v, a, err
}

// waitNode waits until the kernel shows the device, and verifies it.
func (p *Provider) waitNode(ctx context.Context, v types.Volume, a types.VolumeAttachment) (device string, err error) {
	var last error
	err = p.until(ctx, p.o.pace.device, p.o.pace.pollMax, func() (bool, error) {
		if device, err = p.node(v, a); err != nil || device == "" {
			return false, err
		}
		last = checkSize(device, volumeOf(v).Size)
		return last == nil, nil
	})
	if errors.Is(err, errPending) {
		if last != nil {
			return "", last
		}
		return "", backup.Hint(fmt.Errorf("it is attached as %s, and no device with its serial number or name appears: %w", aws.ToString(a.Device), err),
			"look at `lsblk -o +SERIAL` and the kernel's log; `cleancut doctor` explains the names")
	}
	return device, err
}

// Detach detaches a volume from this instance by DetachVolume, never by force,
// and waits until it is available and the device is gone. The contract is
// provider.Provider's.
func (p *Provider) Detach(ctx context.Context, id backup.VolumeID) error {
	if err := p.detach(ctx, id); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	p.log.DebugContext(ctx, "volume detached", slog.String(keyVolume, string(id)))
	return nil
}

func (p *Provider) detach(ctx context.Context, id backup.VolumeID) error {
	release, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	me, err := p.self(ctx)
	if err != nil {
		return err
	}
	v, err := p.volume(ctx, id)
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	a := here(v, me.instance)
	if a == nil {
		return nil
	}
	device, err := p.node(v, *a)
	if err != nil {
		return fmt.Errorf("find its device: %w", err)
	}
	if a.State != types.VolumeAttachmentStateDetaching {
		if device != "" {
			if err := checkFree(device); err != nil {
				return err
			}
		}
		if err := p.disconnect(ctx, id, me.instance); err != nil {
			return err
		}
	}
	if _, err := p.waitDetached(ctx, id, me.instance); err != nil {
		return err
	}
	return p.waitGone(ctx, v, *a)
}

// disconnect calls DetachVolume. IncorrectState and InvalidAttachment: somebody
// did before, perhaps a call whose answer was lost; the wait that follows sees.
func (p *Provider) disconnect(ctx context.Context, id backup.VolumeID, instance string) error {
	err := effect(ctx, "DetachVolume", func() error {
		_, err := p.api.DetachVolume(ctx, &ec2.DetachVolumeInput{VolumeId: aws.String(string(id)), InstanceId: aws.String(instance)})
		return err
	})
	switch codeOf(err) {
	case "IncorrectState", "InvalidAttachment.NotFound", "InvalidVolume.NotFound":
		return nil
	}
	return err
}

// waitDetached waits until the instance does not hold the volume any more.
func (p *Provider) waitDetached(ctx context.Context, id backup.VolumeID, instance string) (v types.Volume, err error) {
	busy := false
	err = p.until(ctx, p.o.pace.change, p.o.pace.pollMax, func() (bool, error) {
		v, err = p.volume(ctx, id)
		if errors.Is(err, backup.ErrNotFound) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		a := here(v, instance)
		busy = a != nil && a.State == types.VolumeAttachmentStateBusy
		return a == nil && v.State != types.VolumeStateInUse, nil
	})
	if errors.Is(err, errPending) && busy {
		return v, backup.Hint(fmt.Errorf("EC2 says that the instance holds it (busy): %w: %w", backup.ErrInUse, err), "unmount it and stop the array on it: EC2 goes on as soon as it is free")
	}
	if errors.Is(err, errPending) {
		return v, backup.Hint(fmt.Errorf("it is still detaching: %w", err), "repeat later; EC2 finishes it by itself, or after a restart of the instance")
	}
	return v, err
}

// waitGone waits until the kernel does not show the device any more. Without
// serial numbers another volume may have got the name meanwhile.
func (p *Provider) waitGone(ctx context.Context, v types.Volume, a types.VolumeAttachment) error {
	return p.until(ctx, p.o.pace.device, p.o.pace.pollMax, func() (bool, error) {
		device, err := p.node(v, a)
		if err != nil || device == "" {
			return true, err
		}
		if nvme(strings.TrimPrefix(device, "/dev/")) {
			return false, nil
		}
		used, err := p.usedNames(ctx, aws.ToString(a.InstanceId))
		return used[tailOf(aws.ToString(a.Device))], err
	})
}
