package postgres

import (
	"fmt"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// confine gives the calling thread a mount namespace in which everything but
// root, /dev (shared memory) and /proc is read-only (mount_namespaces(7),
// mount_setattr(2), Linux 5.12). Unmounting on the host still takes effect
// inside (MS_SLAVE), so a running copy keeps no other filesystem busy.
func confine(root string) error {
	fail := func(what string, err error) error {
		return backup.Hint(fmt.Errorf("keep the copy's server away from the host's folders: %s: %w", what, err),
			"needs root with CAP_SYS_ADMIN and Linux 5.12")
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fail("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fail("make mounts a slave of the host's", err)
	}
	// A mount of its own, so that root can be writable in a read-only parent.
	if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fail("bind "+root, err)
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fail("make / read-only", err)
	}
	for _, path := range []string{root, "/dev", "/proc"} {
		if err := unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fail("make "+path+" writable", err)
		}
	}
	return nil
}
