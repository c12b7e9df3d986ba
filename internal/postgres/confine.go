package postgres

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// software is where programs, libraries and what they read lie; mounts at or
// below these stay visible to a confined server.
func software() []string {
	return []string{"/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/etc", "/nix", "/gnu", "/dev", "/proc", "/sys"}
}

// confine gives the calling thread a mount namespace (mount_namespaces(7),
// mount_setattr(2), Linux 5.12) in which
//
//   - everything but the copy's root, /dev (shared memory) and /proc is read-only;
//   - filesystems that the server does not need are not mounted, production's
//     among them: else a copy would keep their devices busy after they were
//     unmounted on the host. Unmounting there takes effect here where the host's
//     mounts are shared, as under systemd (MS_SLAVE), but not elsewhere;
//   - the copy's own folders of tablespaces are seen at production's paths. Redo
//     of CREATE TABLESPACE goes there literally: it sets permissions, before 15
//     it also empties the folder, and makes the link lead there (tblspc_redo,
//     create_tablespace_directories). Start sets the link right afterwards.
func confine(i *Instance, moves []move) error {
	fail := func(what string, err error) error {
		return backup.Hint(fmt.Errorf("keep the copy's server away from the host's folders: %s: %w", what, err),
			"needs root with CAP_SYS_ADMIN and Linux 5.12")
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil { // and CLONE_FS, so the working directory is the thread's own
		return fail("unshare", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fail("leave the working directory", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fail("make mounts a slave of the host's", err)
	}
	needed := []string{i.Root, "/run", "/var", "/tmp"} // root first: see showOriginal
	if bin, err := filepath.EvalSymlinks(i.Installation.Bin); err == nil {
		needed = append(needed, bin)
	}
	// A mount of its own, so that root can be writable in a read-only parent.
	if err := unix.Mount(i.Root, i.Root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fail("bind "+i.Root, err)
	}
	if err := unmountForeign(i.Root, needed); err != nil {
		return fail("unmount", err)
	}
	for _, m := range moves {
		if err := showOriginal(m, needed); err != nil {
			return fail("show "+m.Copy+" as "+m.Original, err)
		}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fail("make / read-only", err)
	}
	writable := []string{i.Root, "/dev", "/proc"}
	for _, m := range moves {
		if shown(m) {
			writable = append(writable, m.Original)
		}
	}
	for _, path := range writable {
		if err := unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fail("make "+path+" writable", err)
		}
	}
	return nil
}

// unmountForeign takes away, in this namespace only, what neither holds
// software nor leads to a path that is needed.
func unmountForeign(root string, needed []string) error {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) { // children after their parents
		keep := m.Mountpoint == "/" || below(root, m.Mountpoint)
		for _, s := range software() {
			keep = keep || below(s, m.Mountpoint)
		}
		for _, n := range needed {
			keep = keep || below(m.Mountpoint, n)
		}
		if keep {
			continue
		}
		err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // gone with its parent
			return fmt.Errorf("%s: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// showOriginal mounts the copy's folder of a tablespace at production's path.
// Where that does not exist (any more: its filesystem was taken away) an empty
// filesystem in memory takes the place of the deepest folder that does, unless
// something needed lies there; then recovery says so if it wants the path.
func showOriginal(m move, needed []string) error {
	if !strings.HasPrefix(m.Link, "pg_tblspc/") || !filepath.IsAbs(m.Original) {
		return nil
	}
	real, err := filepath.EvalSymlinks(m.Original)
	if err != nil {
		at := m.Original
		for !isDir(at) {
			at = filepath.Dir(at)
		}
		if at, err = filepath.EvalSymlinks(at); err != nil {
			return err
		}
		leadsTo := func(n string) bool { return below(at, n) }
		isPart := func(s string) bool { return below(at, s) || (s != "/opt" && below(s, at)) }
		if slices.ContainsFunc(needed, leadsTo) || slices.ContainsFunc(software(), isPart) {
			return nil
		}
		if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=64k,mode=0755"); err != nil {
			return err
		}
		mask := unix.Umask(0o022) // of this thread; the server's uid must be able to pass
		err := os.MkdirAll(m.Original, 0o755)
		unix.Umask(mask)
		if err != nil {
			return err
		}
		real = m.Original
	}
	root := needed[0]
	if below(root, real) || slices.ContainsFunc(needed, func(n string) bool { return below(real, n) }) {
		return nil
	}
	return unix.Mount(m.Copy, real, "", unix.MS_BIND, "")
}

// shown reports whether the copy's folder is what lies at production's path.
func shown(m move) bool {
	a, err := os.Stat(m.Original)
	b, err2 := os.Stat(m.Copy)
	return strings.HasPrefix(m.Link, "pg_tblspc/") && err == nil && err2 == nil && os.SameFile(a, b)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// mayRunUnconfined refuses what only confine makes harmless.
func mayRunUnconfined(_ *Instance, moves []move) error {
	for _, m := range moves {
		if strings.HasPrefix(m.Link, "pg_tblspc/") && m.Fresh && isDir(m.Original) && m.Original != m.Copy {
			return backup.Hint(fmt.Errorf("redo would make the tablespace in %s again, which exists on this host: %w", m.Original, backup.ErrUnsupported),
				"start the copy confined, as root, or on another host")
		}
	}
	return nil
}
