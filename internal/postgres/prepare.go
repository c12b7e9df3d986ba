package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// Private is the folder below a copy's root that holds what is ours:
// configuration, socket and log. It belongs to the copy's uid, mode 0700.
const Private = ".cleancut"

// Plan says what Prepare makes of a restored image.
type Plan struct {
	Root   string // the copy's folder; everything of the copy lies below it
	Data   string // the data directory, below Root
	Server backup.Server
	Places []backup.Place // of the manifest's topology
	// Map gives the path that an absolute path of production has in the copy;
	// false if no filesystem of the copy holds it. It is pure.
	Map func(original string) (string, bool)
	// Bracket is the backup mode around the cut, nil for an atomic one; Segment
	// opens a file of its WAL, whole.
	Bracket *backup.Bracket
	Segment func(ctx context.Context, name string) (io.ReadCloser, error)
	// Archive lets the server recover beyond the image, by WAL that its
	// restore_command brings (recovery.signal). Without a label it recovers
	// from the image's own WAL first (InitWalRecovery, "atomic filesystem snapshot").
	Archive bool
	// Standby makes a standby of the copy (standby.signal); nil: none.
	Standby *Standby

	without without
}

// Prepare turns the image of a data directory, with its WAL and tablespaces
// already in place, into a copy that Start can run without touching anything
// outside Root. It is the only such function, for every way to restore.
//
// It checks that this is the cluster the manifest tells of (system
// identifier, major version); rewrites the links pg_wal and pg_tblspc/* to the
// copy's own paths; removes what a copy must not inherit (backup.sgml,
// "Backing Up the Data Directory"; basebackup.c); keeps postgresql.auto.conf as
// postgresql.auto.conf.production and leaves it empty; and writes the copy's
// own configuration into Root/.cleancut. In the end every symbolic link of the
// copy is followed: one that leaves Root is an error. pg_wal keeps its content,
// because crash recovery needs it; a bracketed backup brings its own, with the
// label by which recovery begins at its start.
//
// Links are never followed for writing except pg_wal and pg_tblspc/* after
// they were rewritten, so a hostile image reaches nothing outside.
//
// It may be called again after a failure, also after it succeeded. A server
// running in Data gives ErrInUse; a backup_label or a foreign system identifier
// is refused with a hint.
func Prepare(ctx context.Context, p Plan) (err error) {
	c, err := openCopy(p)
	if err != nil {
		return fmt.Errorf("prepare the copy in %s: %w", p.Root, err)
	}
	defer func() { err = errors.Join(err, c.data.Close(), c.root.Close()) }()
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"prepare.check", c.check},
		{"prepare.private", c.makePrivate},
		{"prepare.links", c.rewriteLinks},
		{"prepare.remove", c.discard},
		{"prepare.autoconf", c.emptyAutoConf},
		{"prepare.config", c.writeConfig},
		{"prepare.standby", c.placeStandby},
		{"prepare.bracket", c.placeBracket},
		{"prepare.verify", c.verifyLinks},
	}
	for _, s := range steps {
		if err := effect(ctx, s.name, func() error { return s.do(ctx) }); err != nil {
			return fmt.Errorf("prepare the copy in %s: %w", p.Root, err)
		}
	}
	return nil
}

// effect runs do between two fault points.
func effect(ctx context.Context, name string, do func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := fault.Point(ctx, "postgres."+name); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return fault.Point(ctx, "postgres."+name+".done")
}

// image is a copy that is being prepared. Its two folders are held open and
// names are resolved below them by the kernel's own descriptors (os.Root).
type image struct {
	plan     Plan
	rootPath string // real
	dataPath string // real
	root     *os.Root
	data     *os.Root
	uid, gid int
	control  Control
}

func openCopy(p Plan) (*image, error) {
	c := &image{plan: p}
	var err error
	if c.rootPath, err = filepath.EvalSymlinks(p.Root); err != nil {
		return nil, err
	}
	if c.dataPath, err = filepath.EvalSymlinks(p.Data); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(c.rootPath) || c.rootPath == "/" || c.rootPath == c.dataPath || !below(c.rootPath, c.dataPath) {
		return nil, fmt.Errorf("%w: the data directory %s is not below the copy's folder %s", backup.ErrUsage, c.dataPath, c.rootPath)
	}
	uid, gid, err := owner(c.dataPath)
	if err != nil {
		return nil, err
	}
	c.uid, c.gid = int(uid), int(gid)
	if c.root, err = os.OpenRoot(c.rootPath); err != nil {
		return nil, err
	}
	if c.data, err = os.OpenRoot(c.dataPath); err != nil {
		return nil, errors.Join(err, c.root.Close())
	}
	return c, nil
}

// check compares the image with the manifest before anything is changed.
func (c *image) check(context.Context) error {
	if pid := serverPID(c.dataPath); pid != 0 {
		return fmt.Errorf("process %d runs in %s: %w", pid, c.dataPath, backup.ErrInUse)
	}
	for _, dir := range []string{"global", "base", "pg_tblspc"} {
		if info, err := c.data.Lstat(dir); err != nil || !info.IsDir() {
			return errors.Join(fmt.Errorf("%s/%s is no directory", c.dataPath, dir), err)
		}
	}
	version, err := c.data.ReadFile("PG_VERSION")
	if err != nil {
		return err
	}
	if got, want := strings.TrimSpace(string(version)), fmt.Sprint(c.plan.Server.Major()); got != want {
		return fmt.Errorf("the image is of PostgreSQL %s, the manifest tells of %s: %w", got, want, backup.ErrVoid)
	}
	if info, err := c.data.Lstat("global/pg_control"); err != nil || !info.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s/global/pg_control is no file", c.dataPath), err)
	}
	if c.control, err = ReadControl(filepath.Join(c.dataPath, "global", "pg_control")); err != nil {
		return err
	}
	if got, want := backup.SystemIdentifier(c.control.SystemIdentifier), c.plan.Server.SystemIdentifier; got != want {
		return fmt.Errorf("the image is of the cluster with system identifier %d, the manifest tells of %d: %w", got, want, backup.ErrVoid)
	}
	if _, err := c.data.Lstat("backup_label"); err == nil && !c.placed() {
		// A backup through pg_backup_start never writes the label into the
		// data directory; only an exclusive one (13, 14) did, or a base backup
		// that was never started. It decides where recovery begins, so it is
		// neither ours to remove nor to follow.
		return backup.Hint(fmt.Errorf("the image holds a backup_label: %w", backup.ErrUnsupported),
			"production was in exclusive backup mode when it was cut, or an old label lay there: end that backup and take a new one")
	}
	return nil
}

// makePrivate makes Root/.cleancut, which must not be a link.
func (c *image) makePrivate(context.Context) error {
	mode := fs.FileMode(0o700)
	if c.plan.without.has(layerClosed) {
		mode = 0o755
	}
	for _, dir := range []string{Private, Private + "/log", Private + "/tmp"} {
		if err := c.root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		info, err := c.root.Lstat(dir)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%s is no directory: %w", filepath.Join(c.rootPath, dir), backup.ErrUnsupported)
		}
		if err := errors.Join(c.root.Lchown(dir, c.uid, c.gid), c.root.Chmod(dir, mode)); err != nil {
			return err
		}
	}
	return nil
}

// emptied are the directories whose content a copy does not inherit; the
// directories stay (excludeDirContents of basebackup.c). Replication slots
// would hold back WAL and could stop the start; the rest is zeroed or rebuilt
// at every start.
func emptied() []string {
	return []string{"pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"}
}

// removed are the files at the top of the data directory that a copy does not
// inherit. The signal files would make a standby of it; a tablespace_map
// without a label is ignored by the server; a backup_manifest is of an older
// base backup.
func removed() []string {
	return []string{
		"postmaster.pid", "postmaster.opts", "standby.signal", "recovery.signal", "tablespace_map", "backup_manifest",
		"postgresql.auto.conf.tmp", "current_logfiles", "current_logfiles.tmp",
	}
}

func (c *image) discard(ctx context.Context) error {
	for _, name := range removed() {
		if c.plan.without.has(layerSignals) && strings.HasSuffix(name, ".signal") {
			continue
		}
		if c.placed() && (name == c.signal() || name == "tablespace_map") { // ours, of an earlier run
			continue
		}
		if err := c.data.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := c.noteSlots(); err != nil {
		return err
	}
	for _, name := range emptied() {
		if c.plan.without.has(layerSlots) && name == "pg_replslot" {
			continue
		}
		if err := c.empty(name); err != nil {
			return err
		}
	}
	if err := c.removeReady(); err != nil {
		return err
	}
	roots := []string{c.dataPath}
	for _, link := range c.placeLinks() {
		real, err := filepath.EvalSymlinks(filepath.Join(c.dataPath, link))
		if err != nil {
			return err
		}
		roots = append(roots, real)
	}
	for _, root := range roots {
		if err := c.removeTemporary(ctx, root); err != nil {
			return err
		}
	}
	return nil
}

// empty leaves an empty directory name, also where the image has a link.
func (c *image) empty(name string) error {
	info, err := c.data.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.IsDir():
		if err := c.data.Remove(name); err != nil {
			return err
		}
		return errors.Join(c.data.Mkdir(name, 0o700), c.data.Lchown(name, c.uid, c.gid))
	}
	return emptyDir(c.data, name)
}

// emptyDir removes everything in directory name of r.
func emptyDir(r *os.Root, name string) error {
	entries, err := fs.ReadDir(r.FS(), name)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := r.RemoveAll(filepath.Join(name, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// removeReady removes the marks that WAL segments wait to be archived. The
// segments stay.
func (c *image) removeReady() error {
	wal, err := filepath.EvalSymlinks(filepath.Join(c.dataPath, "pg_wal"))
	if err != nil {
		return err
	}
	r, err := os.OpenRoot(wal)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	if info, err := r.Lstat("archive_status"); err != nil || !info.IsDir() {
		return nil // the server makes the directory itself (ValidateXLOGDirectoryStructure)
	}
	entries, err := fs.ReadDir(r.FS(), "archive_status")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".ready") {
			if err := r.Remove("archive_status/" + e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeTemporary removes temporary files and the caches of catalog rows,
// which the server builds anew (RemovePgTempFiles, RelationCacheInitFileRemove).
// WalkDir does not follow links.
func (c *image) removeTemporary(ctx context.Context, top string) error {
	r, err := os.OpenRoot(top)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	return filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		name := e.Name()
		if !strings.HasPrefix(name, "pgsql_tmp") && !strings.HasPrefix(name, "pg_internal.init") {
			return nil
		}
		rel, err := filepath.Rel(top, path)
		if err != nil {
			return err
		}
		if err := r.RemoveAll(rel); err != nil {
			return err
		}
		if e.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// emptyAutoConf: what ALTER SYSTEM set on production does not reach the copy.
// A production file kept by an earlier run is not overwritten by ours.
func (c *image) emptyAutoConf(context.Context) error {
	if c.plan.without.has(layerConfiguration) {
		return nil
	}
	const auto, keptAs, mark = "postgresql.auto.conf", "postgresql.auto.conf.production", Private + "/autoconf-kept"
	if _, err := c.root.Lstat(mark); errors.Is(err, fs.ErrNotExist) {
		if err := c.data.Rename(auto, keptAs); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := c.write(c.root, mark, ""); err != nil {
			return err
		}
	}
	return c.write(c.data, auto, "# cleancut: production's is in "+keptAs+"\n")
}

// write replaces file name of r, whatever it was before, with the copy's
// owner and mode 0600.
func (c *image) write(r *os.Root, name, content string) error {
	return writeOwned(r, name, content, c.uid, c.gid)
}

func writeOwned(r *os.Root, name, content string, uid, gid int) error {
	tmp := name + ".tmp"
	if err := r.RemoveAll(tmp); err != nil {
		return err
	}
	f, err := r.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err := errors.Join(err, f.Chown(uid, gid), f.Sync(), f.Close()); err != nil {
		return err
	}
	return r.Rename(tmp, name)
}

func (c *image) writeConfig(context.Context) error {
	hba := hbaFile
	if s := c.plan.Standby; s != nil && s.Listen != "" {
		hba += clients
	}
	return errors.Join(
		c.write(c.root, Private+"/postgresql.conf", configFile(c.plan.Server.Settings)),
		c.write(c.root, Private+"/pg_hba.conf", hba),
		c.write(c.root, Private+"/pg_ident.conf", "# Written by cleancut: maps nobody.\n"),
	)
}
