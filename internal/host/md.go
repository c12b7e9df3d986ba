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

	"golang.org/x/sys/unix"

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
// returns the device. What the members' superblocks say is held against the
// list before anything is changed: members of several sets, a wrong slot, a
// missing or a foreign one are ErrNotOurs, a broken superblock is the error of
// ReadSuperblock. Members that something else (udev) has assembled already are
// taken over, but only if every member of what holds them is in the list; else
// ErrNotOurs. Assembled so before: the same device again. On an error nothing
// of the list stays assembled that this call assembled.
func AssembleArray(ctx context.Context, members []string, uuid string) (string, error) {
	members, err := kernelNames(members)
	if err != nil {
		return "", err
	}
	unlock, err := lockDevices(ctx, members)
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := checkRoles(members, uuid); err != nil {
		return "", err
	}
	var last error
	for range 20 {
		dev, err := takeOver(ctx, members, uuid)
		if err != nil || dev != "" {
			return dev, err
		}
		dev, err = onFreeArray(ctx, func(dev string) error {
			args := []string{"--assemble", dev, "--config=none", "--update=uuid", "--uuid=" + uuid}
			_, err := Run(ctx, "mdadm", append(args, members...)...)
			if err == nil {
				err = checkSlots(dev, members)
			}
			if err != nil {
				err = errors.Join(err, stopOurs(ctx, dev, members))
			}
			return err
		})
		if err == nil {
			return dev, nil
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

// checkRoles demands that every device says of itself that it is the member of
// that slot, and that all are of one set. A set that bears the new UUID in part
// (a run before this one was cut short) is refused: mdadm takes no such set.
func checkRoles(members []string, uuid string) error {
	var set string
	for i, dev := range members {
		sb, err := ReadSuperblock(dev)
		if err != nil {
			return fmt.Errorf("member %d: %w", i, err)
		}
		if sb.Role != i || sb.RaidDisks != len(members) {
			return fmt.Errorf("%s is member %d of %d of its array, wanted is member %d of %d: %w", dev, sb.Role, sb.RaidDisks, i, len(members), backup.ErrNotOurs)
		}
		of := sb.SetUUID.String()
		switch {
		case i == 0 || of == set:
			set = of
		case of == uuid || set == uuid:
			return backup.Hint(fmt.Errorf("some of %s bear the new UUID %s and some do not, an assembly was cut short: %w", members, uuid, backup.ErrNotOurs),
				"remove this copy and restore again")
		default:
			return fmt.Errorf("%s is of array %s, those before it are of %s: %w", dev, of, set, backup.ErrNotOurs)
		}
	}
	return nil
}

// lockDevices keeps systemd-udevd away from the whole devices below members
// (systemd.io/BLOCK_DEVICE_LOCKING: flock, whose holder udevd waits for): if
// its `mdadm --incremental` took one while ours writes the new UUID, the set
// would bear two. It waits for the events that are being handled.
func lockDevices(ctx context.Context, members []string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var held []*os.File
	unlock = func() {
		for _, f := range held {
			_ = f.Close()
		}
	}
	for _, m := range members {
		whole, err := wholeDevice(m)
		if err != nil {
			unlock()
			return nil, err
		}
		if slices.ContainsFunc(held, func(f *os.File) bool { return f.Name() == whole }) {
			continue
		}
		f, err := os.Open(whole)
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock member: %w", err)
		}
		held = append(held, f)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		for errors.Is(err, unix.EWOULDBLOCK) && pause(ctx, 20*time.Millisecond) == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock %s against udev: %w", whole, errors.Join(err, ctx.Err()))
		}
	}
	return unlock, nil
}

// wholeDevice returns the device that a partition is on, else the device.
func wholeDevice(device string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", filepath.Base(device)))
	if err != nil {
		return "", fmt.Errorf("sysfs of %s: %w", device, err)
	}
	if exists(dir, "partition") {
		dir = filepath.Dir(dir)
	}
	return "/dev/" + filepath.Base(dir), nil
}

// stopOurs stops what a failed assembly left at dev: mdadm leaves an array
// that lacks members standing, inactive, with those it found. One that holds
// anything else is not touched.
func stopOurs(ctx context.Context, dev string, members []string) error {
	held, err := membersOf(dev)
	if err != nil || len(held) == 0 || slices.ContainsFunc(held, func(h string) bool { return !slices.Contains(members, h) }) {
		return nil // not there, or another's
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return StopArray(ctx, dev)
}

// takeOver stops arrays that hold some of the members. It returns the device
// if one of them is the wanted array already.
func takeOver(ctx context.Context, members []string, uuid string) (string, error) {
	holders, err := arraysHolding(members)
	if err != nil {
		return "", err
	}
	for _, md := range holders { // all are looked at before any is stopped
		held, err := membersOf(md)
		if err != nil {
			return "", err
		}
		for _, h := range held {
			if !slices.Contains(members, h) {
				return "", backup.Hint(fmt.Errorf("array %s holds some of %s and also %s, which is not part of this set: %w", md, members, h, backup.ErrNotOurs),
					"something assembled members of two sets together; stop "+md+" by hand and put `AUTO -all` into mdadm.conf on restore hosts")
			}
		}
	}
	for _, md := range holders {
		if now, err := ArrayUUID(ctx, md); err == nil && now == uuid && checkSlots(md, members) == nil {
			return md, nil
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
		if err == nil && try <= 25 {
			continue // look whether it is gone, and stays so
		}
		if try > 25 || pause(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("stop array %s: %w: %w", dev, backup.ErrInUse, errors.Join(ctx.Err(), err))
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

// kernelNames returns the paths under which the kernel's own lists name the
// devices, whatever links were given.
func kernelNames(devices []string) ([]string, error) {
	out := make([]string, len(devices))
	for i, d := range devices {
		name, err := kernelName(d)
		if err != nil {
			return nil, err
		}
		out[i] = "/dev/" + name
	}
	return out, nil
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
