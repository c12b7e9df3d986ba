package postgres

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// confine gives the calling thread a mount namespace in which everything but
// root, /dev (shared memory) and /proc is read-only (mount_namespaces(7),
// mount_setattr(2), Linux 5.12). Unmounting on the host still takes effect
// inside (MS_SLAVE), so a running copy keeps no other filesystem busy.
//
// Where production's folder of a tablespace exists on this host, the copy's
// own is seen in its place: redo of CREATE TABLESPACE sets permissions there,
// before 15 also empties it, and lets the link lead there (tblspc_redo,
// create_tablespace_directories). Start sets the link right afterwards.
func confine(root string, moves []move) error {
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
	writable := []string{root, "/dev", "/proc"}
	for _, m := range moves {
		if !strings.HasPrefix(m.Link, "pg_tblspc/") {
			continue
		}
		// The link's target is used literally, so links on the way are followed.
		real, err := filepath.EvalSymlinks(m.Original)
		info, err2 := os.Stat(m.Original)
		if err != nil || err2 != nil || !info.IsDir() || below(real, root) || below(root, real) {
			continue // recovery says so if it needs the folder
		}
		if err := unix.Mount(m.Copy, real, "", unix.MS_BIND, ""); err != nil {
			return fail("show "+m.Copy+" as "+real, err)
		}
		writable = append(writable, real)
	}
	for _, path := range writable {
		if err := unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fail("make "+path+" writable", err)
		}
	}
	return nil
}
