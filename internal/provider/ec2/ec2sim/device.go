package ec2sim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// device is an attached volume as the kernel has it, and what its instance
// sees of it.
type device struct {
	local backup.VolumeID
	node  string // /dev/loop3, or /dev/dm-0 over it
	shown string // the link or folder in the instance's Devices
}

// plug attaches a volume of the pool and shows it to the instance.
func (s *Server) plug(ctx context.Context, local backup.VolumeID, id string, i *instance, name string) (_ *device, err error) {
	d := &device{local: local}
	if d.node, err = s.pool.Attach(ctx, local); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unplug(context.WithoutCancel(ctx), d))
		}
	}()
	if s.dm == "" {
		if d.node, err = linear(ctx, local, d.node); err != nil {
			return nil, err
		}
	}
	if i.Xen {
		d.shown, err = link(filepath.Join(s.Devices(i.ID), "dev"), guestName(name), d.node)
	} else {
		d.shown, err = sysfs(filepath.Join(s.Devices(i.ID), "sys", "block"), filepath.Base(d.node), id)
	}
	return d, err
}

// link shows a device as Xen does, by its name.
func link(dir, name, node string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	return path, os.Symlink(node, path)
}

// sysfs shows a device as Nitro does: an NVMe disk whose serial number is the
// volume's id without its dash. The numbers are padded with spaces (NVM Express
// Base Specification, Identify Controller: 20 and 40 bytes). It is there whole
// or not at all.
func sysfs(dir, kernelName, id string) (string, error) {
	next := filepath.Join(filepath.Dir(dir), "."+kernelName)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.RemoveAll(next), os.MkdirAll(filepath.Join(next, "device"), 0o755)); err != nil {
		return "", err
	}
	for name, text := range map[string]string{
		"serial": fmt.Sprintf("%-20s\n", strings.Replace(id, "-", "", 1)),
		"model":  fmt.Sprintf("%-40s\n", "Amazon Elastic Block Store"),
	} {
		if err := os.WriteFile(filepath.Join(next, "device", name), []byte(text), 0o444); err != nil {
			return "", err
		}
	}
	path := filepath.Join(dir, kernelName)
	return path, os.Rename(next, path)
}

// unplug takes a device away, or says ErrInUse and leaves it as it was. What
// the instance sees goes first: the kernel gives the name to the next device
// as soon as it is free.
func (s *Server) unplug(ctx context.Context, d *device) error {
	if claimed(d.node) {
		if node, err := dmNode(d.local); err != nil || node == "" || node == d.node {
			return fmt.Errorf("%s: %w", d.node, backup.ErrInUse)
		}
	}
	hidden := ""
	if d.shown != "" {
		hidden = filepath.Join(filepath.Dir(filepath.Dir(d.shown)), ".gone-"+string(d.local))
		if err := os.Rename(d.shown, hidden); err != nil {
			return err
		}
	}
	err := s.removeDevice(ctx, d.local)
	if err == nil {
		err = s.pool.Detach(ctx, d.local)
	}
	if hidden == "" {
		return err
	}
	if err != nil {
		return errors.Join(err, os.Rename(hidden, d.shown))
	}
	return os.RemoveAll(hidden)
}

// lockFolder makes a folder ours until the file is closed.
func lockFolder(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		// Close removes the name first: then this is nobody's lock.
		ours, err1 := f.Stat()
		there, err2 := os.Stat(name)
		if err1 == nil && err2 == nil && os.SameFile(ours, there) {
			return f, nil
		}
	}
	_ = f.Close()
	return nil, backup.Hint(fmt.Errorf("another ec2sim uses %s: %w", dir, backup.ErrInUse), "give each its own folder of devices, or wait for its end")
}
