package host

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// Identity is what blkid reads from a device.
type Identity struct {
	Type, UUID, Label string
}

// Identify reads a device's filesystem identity from the device itself, past
// every cache.
func Identify(ctx context.Context, device string) (Identity, error) {
	out, err := Run(ctx, "blkid", "-p", "-o", "export", device)
	if err != nil {
		return Identity{}, err
	}
	kv := parseExport(out)
	return Identity{Type: kv["TYPE"], UUID: kv["UUID"], Label: unescape(kv["LABEL"])}, nil
}

// unescape undoes what blkid -o export does to a value: a backslash before
// what a shell would read, \xHH for what cannot be printed (util-linux
// misc-utils/blkid.c, safe_print).
func unescape(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if n, err := strconv.ParseUint(hexEscape(s), 16, 8); err == nil {
			b.WriteByte(byte(n))
			s = s[4:]
			continue
		}
		if s[0] == '\\' && len(s) > 1 {
			s = s[1:]
		}
		b.WriteByte(s[0])
		s = s[1:]
	}
	return b.String()
}

func hexEscape(s string) string {
	if len(s) < 4 || !strings.HasPrefix(s, `\x`) {
		return ""
	}
	return s[2:4]
}

// CheckCuttable refuses a mount that a freeze and a snapshot of its devices
// would not capture whole, or that must not be frozen. Without a device (not
// known yet) all is checked but the place of an ext4 journal.
func CheckCuttable(m Mount, device string) error {
	switch {
	case m.Mountpoint == "/" || m.Mountpoint == "/boot":
		return backup.Hint(fmt.Errorf("the cluster is on the filesystem %s: freezing it would stop the whole system: %w", m.Mountpoint, backup.ErrUnsupported),
			"move the cluster to a filesystem of its own")
	case m.Root != "/":
		return fmt.Errorf("%s shows only %s of its filesystem: mount the whole of it: %w", m.Mountpoint, m.Root, backup.ErrUnsupported)
	case m.Type != "xfs" && m.Type != "ext4":
		return fmt.Errorf("%s is %s (xfs and ext4 are done so far): %w", m.Mountpoint, m.Type, backup.ErrUnsupported)
	}
	for _, o := range m.SuperOptions {
		if strings.HasPrefix(o, "logdev=") || strings.HasPrefix(o, "rtdev=") {
			return fmt.Errorf("%s has an XFS device elsewhere (%s): %w", m.Mountpoint, o, backup.ErrUnsupported)
		}
	}
	// ext4 turns the filesystem, not the mount, read-only after an error.
	if slices.Contains(m.Options, "ro") || slices.Contains(m.SuperOptions, "ro") {
		return fmt.Errorf("%s is mounted read-only: %w", m.Mountpoint, backup.ErrUnsupported)
	}
	if m.Type == "ext4" && device != "" {
		return checkJournal(device)
	}
	return nil
}

// checkJournal refuses an ext4 whose journal is on another device: s_journal_inum
// (offset 0xE0) is zero and s_journal_dev (0xE4) is not; Linux
// Documentation/filesystems/ext4/super.rst.
func checkJournal(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return fmt.Errorf("read ext4 superblock: %w", err)
	}
	defer f.Close()
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return fmt.Errorf("read ext4 superblock of %s: %w", device, err)
	}
	if binary.LittleEndian.Uint32(sb[0xE0:]) == 0 && binary.LittleEndian.Uint32(sb[0xE4:]) != 0 {
		return fmt.Errorf("%s has its ext4 journal on another device: %w", device, backup.ErrUnsupported)
	}
	return nil
}

// Foreign lists what lies on a mounted filesystem beside the places given
// (paths relative to the mount point, "." for all of it): directories and
// files that a freeze would stop along with the cluster. Hidden files and
// lost+found do not count.
func Foreign(mountpoint string, rels []string) ([]string, error) {
	var out []string
	onTheWay := map[string]bool{}
	for _, rel := range rels {
		if rel == "." {
			return nil, nil
		}
		if slices.ContainsFunc(rels, func(outer string) bool { return strings.HasPrefix(rel, outer+"/") }) {
			continue // part of another place
		}
		for dir := path.Dir(rel); ; dir = path.Dir(dir) {
			onTheWay[dir] = true
			if dir == "." {
				break
			}
		}
	}
	for dir := range onTheWay {
		entries, err := os.ReadDir(filepath.Join(mountpoint, dir))
		if err != nil {
			return nil, fmt.Errorf("look for foreign data: %w", err)
		}
		for _, e := range entries {
			rel := path.Join(dir, e.Name())
			if !onTheWay[rel] && !slices.Contains(rels, rel) && e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), ".") {
				out = append(out, filepath.Join(mountpoint, rel))
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// MakeFilesystem makes an empty filesystem with a label on device.
func MakeFilesystem(ctx context.Context, fstype, device, label string) error {
	flag := map[string]string{"xfs": "-f", "ext4": "-F"}[fstype]
	if flag == "" {
		return fmt.Errorf("filesystem %q: %w: xfs or ext4", fstype, backup.ErrUsage)
	}
	_, err := Run(ctx, "mkfs."+fstype, flag, "-q", "-L", label, device)
	return err
}

// CheckFilesystem examines an unmounted filesystem without changing it. It
// returns what the checker said, and backup.ErrDamage if it found damage. The
// filesystem must have been mounted once since the cut, so that its log is
// replayed: xfs_repair -n reports false damage on a dirty log.
func CheckFilesystem(ctx context.Context, fstype, device string) (said string, err error) {
	var out []byte
	switch fstype {
	case "xfs":
		out, err = Run(ctx, "xfs_repair", "-n", device)
	case "ext4":
		out, err = Run(ctx, "e2fsck", "-n", "-f", device)
	default:
		return "", fmt.Errorf("check %s: %w", fstype, backup.ErrUnsupported)
	}
	said = lastLines(string(out), 4)
	// xfs_repair(8): 1 = corruption; e2fsck(8): 4 = errors left uncorrected.
	if code := exitCode(err); fstype == "xfs" && code == 1 || fstype == "ext4" && code > 0 && code&4 != 0 {
		return said, fmt.Errorf("%w: %w", backup.ErrDamage, err)
	}
	return said, err
}

// WaitDevice waits until the kernel shows the partition of a whole device, or
// returns the device itself for partition 0.
func WaitDevice(ctx context.Context, device string, partition int) (string, error) {
	if partition == 0 {
		return device, nil
	}
	name := filepath.Base(device)
	part := fmt.Sprintf("%s%d", name, partition)
	if c := name[len(name)-1]; c >= '0' && c <= '9' {
		part = fmt.Sprintf("%sp%d", name, partition)
	}
	for range 100 {
		if exists("/sys/block", name, part) && exists("/dev", part) {
			return "/dev/" + part, fault.Point(ctx, "host.partition")
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("partition %d of %s: %w", partition, device, backup.ErrNotFound)
}
