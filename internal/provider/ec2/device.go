package ec2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// serialPattern is what the NVMe serial number of an EBS volume looks like:
// its id without the dash. That of an instance store disk begins with AWS.
var serialPattern = regexp.MustCompile(`^vol-?([0-9a-f]{17}|[0-9a-f]{8})$`)

// blockDevice is a whole block device of this host.
type blockDevice struct {
	name string // the kernel's: nvme1n1, xvdf
	rdev uint64
}

func (d blockDevice) node() string { return "/dev/" + d.name }

// wholeDevice finds the device that a path leads to, by its device number; nil
// for partitions and what is no block device.
func wholeDevice(path string) (*blockDevice, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, nil
	}
	sys, err := filepath.EvalSymlinks(sysfs(st.Rdev))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(sys, "partition")); err == nil {
		return nil, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return &blockDevice{name: filepath.Base(sys), rdev: st.Rdev}, nil
}

func sysfs(rdev uint64) string {
	return fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
}

// serial returns the volume that a device's NVMe serial number names, or "".
func (p *Provider) serial(name string) (backup.VolumeID, error) {
	text, err := os.ReadFile(filepath.Join(p.o.Devices, "sys/block", name, "device/serial"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENODEV) { // ENODEV: going away
		return "", nil
	}
	if err != nil {
		return "", err
	}
	m := serialPattern.FindStringSubmatch(strings.Trim(string(text), " \n\x00"))
	if m == nil {
		return "", nil
	}
	return backup.VolumeID("vol-" + m[1]), nil
}

// Resolve finds the volume of a whole block device: on Nitro by the NVMe
// serial number, checked against the volume's attachment to this instance
// (DescribeVolumes); elsewhere by the attachment whose device name leads to the
// same device number. The contract is provider.Provider's.
func (p *Provider) Resolve(ctx context.Context, device string) (backup.Volume, error) {
	v, err := p.resolve(ctx, device)
	if err != nil {
		return backup.Volume{}, fmt.Errorf("resolve %s: %w", device, err)
	}
	return v, nil
}

func (p *Provider) resolve(ctx context.Context, path string) (backup.Volume, error) {
	if err := ctx.Err(); err != nil {
		return backup.Volume{}, err
	}
	device, err := wholeDevice(path)
	if err != nil {
		return backup.Volume{}, err
	}
	if device == nil {
		return backup.Volume{}, fmt.Errorf("no whole block device: %w", backup.ErrNotFound)
	}
	id, err := p.serial(device.name)
	if err != nil {
		return backup.Volume{}, err
	}
	me, err := p.self(ctx)
	if err != nil {
		return backup.Volume{}, err
	}
	if id != "" {
		v, err := p.volume(ctx, id)
		if err != nil {
			return backup.Volume{}, err
		}
		if here(v, me.instance) == nil {
			return backup.Volume{}, fmt.Errorf("its serial number names volume %s, which is not attached to this instance %s: %w", id, me.instance, backup.ErrNotFound)
		}
		return volumeOf(v), nil
	}
	return p.resolveByName(ctx, *device, me.instance)
}

// resolveByName is for instances without NVMe, whose kernel names a device
// after its attachment.
func (p *Provider) resolveByName(ctx context.Context, device blockDevice, instance string) (backup.Volume, error) {
	var found []backup.Volume
	if !nvme(device.name) {
		all, err := p.volumes(ctx, filter("attachment.instance-id", instance))
		if err != nil {
			return backup.Volume{}, err
		}
		for _, v := range all {
			a := here(v, instance)
			if a == nil {
				continue
			}
			other, err := p.deviceNamed(aws.ToString(a.Device))
			if err != nil {
				return backup.Volume{}, err
			}
			if other != nil && other.rdev == device.rdev {
				found = append(found, volumeOf(v))
			}
		}
	}
	switch len(found) {
	case 0:
		return backup.Volume{}, fmt.Errorf("no EBS volume of instance %s: %w", instance, backup.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return backup.Volume{}, fmt.Errorf("both %s and %s are attached under its names: %w", found[0].ID, found[1].ID, backup.ErrNotFound)
}

// nvme reports whether a name is one of NVMe's, whose order says nothing: a
// volume there is known by its serial number or not at all.
func nvme(name string) bool { return strings.HasPrefix(name, "nvme") }

// here returns the attachment of v to the instance, or nil.
func here(v types.Volume, instance string) *types.VolumeAttachment {
	for _, a := range attachments(v) {
		if aws.ToString(a.InstanceId) == instance {
			return &a
		}
	}
	return nil
}

// deviceNamed finds the device of an attachment's device name: /dev/sdf may be
// /dev/xvdf or /dev/sdf, and the root volume's /dev/sda1 is /dev/xvda (EBS user
// guide, "Device names on Linux instances"). nil if there is none.
func (p *Provider) deviceNamed(name string) (*blockDevice, error) {
	for _, candidate := range candidates(name) {
		device, err := wholeDevice(filepath.Join(p.o.Devices, "dev", candidate))
		if err != nil || device != nil && !nvme(device.name) {
			return device, err
		}
	}
	return nil, nil
}

func candidates(name string) (out []string) {
	name = strings.TrimPrefix(name, "/dev/")
	for _, base := range []string{name, strings.TrimRight(name, "0123456789")} {
		tail, sd := strings.CutPrefix(base, "sd")
		if !sd {
			tail = strings.TrimPrefix(base, "xvd")
		}
		if tail == base || tail == "" || strings.Contains(tail, "/") {
			continue
		}
		for _, c := range []string{"xvd" + tail, "sd" + tail} {
			if !slices.Contains(out, c) {
				out = append(out, c)
			}
		}
	}
	return out
}

// node returns the device of a volume that is attached here, verified; "" if
// the kernel does not show it.
func (p *Provider) node(v types.Volume, a types.VolumeAttachment) (string, error) {
	names, err := os.ReadDir(filepath.Join(p.o.Devices, "sys/block"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	id := backup.VolumeID(aws.ToString(v.VolumeId))
	for _, entry := range names {
		serial, err := p.serial(entry.Name())
		if err != nil {
			return "", err
		}
		if serial != id {
			continue
		}
		device, err := wholeDevice("/dev/" + entry.Name())
		if err != nil || device == nil {
			return "", err
		}
		return device.node(), nil
	}
	device, err := p.deviceNamed(aws.ToString(a.Device))
	if err != nil || device == nil {
		return "", err
	}
	// A name may be taken by a device with a serial number of its own.
	if serial, err := p.serial(device.name); err != nil || serial != "" {
		return "", err
	}
	return device.node(), nil
}

// checkSize compares a device with its volume and shows that it can be read.
func checkSize(device string, want backup.Bytes) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	if backup.Bytes(size) != want {
		return fmt.Errorf("%s has %d bytes, its volume has %d", device, size, want)
	}
	return nil
}

// checkFree tells by ErrInUse that a device is mounted, in an array, under
// device mapper, or held by anybody who claims it. What was written through it
// is on the volume afterwards: detaching flushes nothing.
func checkFree(device string) error {
	found, err := wholeDevice(device)
	if err != nil || found == nil {
		return err
	}
	holders, err := os.ReadDir(filepath.Join(sysfs(found.rdev), "holders"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(holders) > 0 {
		return backup.Hint(fmt.Errorf("%s is part of %s: %w", device, holders[0].Name(), backup.ErrInUse), "stop the array or mapping first")
	}
	// EBUSY: somebody holds the device or one of its partitions (open(2), O_EXCL
	// on block devices).
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return backup.Hint(fmt.Errorf("%s is mounted or held open: %w", device, backup.ErrInUse), "unmount it and stop the array on it first")
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
