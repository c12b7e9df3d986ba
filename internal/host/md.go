package host

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// ArraySpec describes an array to make.
type ArraySpec struct {
	Name    string
	Level   string // raid0, linear
	Chunk   backup.Bytes
	Members []string // device paths in slot order
}

// HasMD reports whether this kernel can assemble md arrays now: the driver is
// there, or modprobe brings it.
func HasMD(ctx context.Context) bool {
	if exists("/proc/mdstat") {
		return true
	}
	_, _ = Run(ctx, "modprobe", "md-mod")
	return exists("/proc/mdstat")
}

// NewArrayUUID returns a random array UUID in mdadm's form.
func NewArrayUUID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	h := hex.EncodeToString(b)
	return h[:8] + ":" + h[8:16] + ":" + h[16:24] + ":" + h[24:]
}

// CreateArray makes a new array and returns its device. The members lose
// what they held.
func CreateArray(ctx context.Context, spec ArraySpec) (string, error) {
	return onFreeArray(ctx, func(dev string) error {
		args := []string{"--create", dev, "--run", "--config=none", "--metadata=1.2", "--name=" + spec.Name, "--level=" + spec.Level,
			fmt.Sprintf("--raid-devices=%d", len(spec.Members))}
		if spec.Level == "raid0" {
			args = append(args, fmt.Sprintf("--chunk=%dK", int64(spec.Chunk)/1024))
		}
		_, err := Run(ctx, "mdadm", append(args, spec.Members...)...)
		return err
	})
}

// AssembleArray assembles exactly these members, in slot order, under a new
// identity, so that the copy can stand beside its original in one kernel. It
// returns the device. Members that something else (udev) has assembled
// already are taken over, but only if every member of what holds them is in
// the list; else ErrNotOurs. Assembled so before: the same device again.
func AssembleArray(ctx context.Context, members []string, uuid string) (string, error) {
	var last error
	for range 20 {
		dev, err := takeOver(ctx, members, uuid)
		if err != nil || dev != "" {
			return dev, err
		}
		dev, err = onFreeArray(ctx, func(dev string) error {
			args := []string{"--assemble", dev, "--config=none", "--update=uuid", "--uuid=" + uuid}
			_, err := Run(ctx, "mdadm", append(args, members...)...)
			return err
		})
		if err == nil {
			return dev, checkSlots(dev, members)
		}
		if last = err; !strings.Contains(err.Error(), "busy") {
			return "", err
		}
		// udev --incremental came first: look again at who holds them.
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return "", fmt.Errorf("assemble: %w: %w", err, last)
		}
	}
	return "", last
}

// takeOver stops arrays that hold some of the members. It returns the device
// if one of them is the wanted array already.
func takeOver(ctx context.Context, members []string, uuid string) (string, error) {
	holders, err := arraysHolding(members)
	if err != nil {
		return "", err
	}
	for _, md := range holders {
		held, err := membersOf(md)
		if err != nil {
			return "", err
		}
		for _, h := range held {
			if !slices.Contains(members, h) {
				return "", backup.Hint(fmt.Errorf("array %s holds %s and also %s, which is not part of this set: %w", md, members, h, backup.ErrNotOurs),
					"something assembled members of two sets together; stop "+md+" by hand and put `AUTO -all` into mdadm.conf on restore hosts")
			}
		}
		out, err := Run(ctx, "mdadm", "--detail", "--export", md)
		if err == nil && parseExport(out)["MD_UUID"] == uuid && len(held) == len(members) {
			return md, checkSlots(md, members)
		}
		if err := StopArray(ctx, md); err != nil {
			return "", fmt.Errorf("take over: %w", err)
		}
	}
	return "", nil
}

// StopArray stops an array and returns when the kernel has let go of its
// members. Not there: nil. In use (mounted): ErrInUse.
func StopArray(ctx context.Context, dev string) error {
	name := filepath.Base(dev)
	for try := 0; ; try++ {
		if state := readString("/sys/block", name, "md/array_state"); state == "" || state == "clear" {
			return nil
		}
		_, err := Run(ctx, "mdadm", "--stop", "--config=none", dev)
		if err != nil && (ctx.Err() != nil || try > 25) {
			return fmt.Errorf("stop array: %w: %w", backup.ErrInUse, err)
		}
		if err != nil && pause(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("stop array: %w: %w", backup.ErrInUse, err)
		}
	}
}

// ArraysOn returns the arrays that hold any of the devices.
func ArraysOn(devices []string) ([]string, error) { return arraysHolding(devices) }

// ArrayUUID returns the UUID of an assembled array in mdadm's form.
func ArrayUUID(ctx context.Context, dev string) (string, error) {
	out, err := Run(ctx, "mdadm", "--detail", "--export", dev)
	return parseExport(out)["MD_UUID"], err
}

func arraysHolding(members []string) ([]string, error) {
	var out []string
	for _, m := range members {
		name, err := kernelName(m)
		if err != nil {
			return nil, err
		}
		holders, err := os.ReadDir(filepath.Join("/sys/class/block", name, "holders"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("holders of %s: %w", m, err)
		}
		for _, h := range holders {
			if dev := "/dev/" + h.Name(); exists("/sys/block", h.Name(), "md") && !slices.Contains(out, dev) {
				out = append(out, dev)
			}
		}
	}
	return out, nil
}

func membersOf(md string) ([]string, error) {
	slaves, err := os.ReadDir(filepath.Join("/sys/block", filepath.Base(md), "slaves"))
	if err != nil {
		return nil, fmt.Errorf("members of %s: %w", md, err)
	}
	out := make([]string, len(slaves))
	for i, s := range slaves {
		out[i] = "/dev/" + s.Name()
	}
	return out, nil
}

// checkSlots demands that the array consists of exactly these members in this
// order: a RAID 0 of the right members in the wrong order is garbage.
func checkSlots(dev string, members []string) error {
	slots, err := arraySlots(filepath.Join("/sys/block", filepath.Base(dev), "md"))
	if err != nil {
		return fmt.Errorf("%s: %w", dev, err)
	}
	for i, s := range slots {
		if len(slots) != len(members) || filepath.Base(s) != filepath.Base(members[i]) {
			return fmt.Errorf("%s has %d members, slot %d is %s; the backup says %s: %w", dev, len(slots), i, filepath.Base(s), members, backup.ErrNotOurs)
		}
	}
	return nil
}

// onFreeArray tries use with array numbers that are free until one works, as
// two restores may look for one at the same time.
func onFreeArray(ctx context.Context, use func(dev string) error) (string, error) {
	var err error
	for n, tries := 100, 0; n < 512 && tries < 4; n++ {
		if state := readString("/sys/block", fmt.Sprintf("md%d", n), "md/array_state"); state != "" && state != "clear" {
			continue
		}
		dev := fmt.Sprintf("/dev/md%d", n)
		if err = use(dev); err == nil {
			return dev, nil
		}
		if !strings.Contains(err.Error(), dev+" is already in use") {
			return "", err
		}
		tries++
	}
	return "", fmt.Errorf("find a free array number: %w", err)
}

func kernelName(device string) (string, error) {
	major, minor, err := deviceNumber(device)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err != nil {
		return "", fmt.Errorf("sysfs of %s: %w", device, err)
	}
	return filepath.Base(dir), nil
}
