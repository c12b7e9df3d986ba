package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// Dir is a Store in a directory: a key is a path below it. Files are 0600,
// folders 0700. The directory itself is made by the first Put. Folders that
// become empty are removed. Of a process that died only temporary files stay;
// no method but Tidy shows or touches them.
type Dir struct {
	root string
	link bool // publish by link(2), as if the filesystem had no RENAME_NOREPLACE
}

// NewDir returns the store in the directory root, an absolute path. It touches
// nothing yet.
func NewDir(root string) *Dir { return &Dir{root: filepath.Clean(root)} }

// tempPrefix begins with a dot, which no part of a key does.
const tempPrefix = ".put-"

// Put writes to a temporary name in the object's own folder, syncs it, gives
// it the object's name unless that is taken, and syncs the folder. ctx is
// looked at between two reads of r, not while one blocks.
func (d *Dir) Put(ctx context.Context, key string, r io.Reader) error {
	if err := check(ctx, CheckKey(key)); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	path := d.path(key)
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("put %s: %w", key, backup.ErrExists)
	}
	f, err := d.temp(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	_, err = io.Copy(f, reader{ctx, r})
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = d.publish(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, errors.Join(err, unlink(f.Name())))
	}
	if err := syncFolder(filepath.Dir(path)); err != nil {
		// It is visible but not durable: the caller will take it for absent.
		return fmt.Errorf("put %s: %w", key, errors.Join(err, unlink(path)))
	}
	return nil
}

// temp opens a new temporary file in folder, which is made if it is missing.
// A Delete may remove the still empty folder between the two, hence the
// repetition; with the file in it the folder stays.
func (d *Dir) temp(folder string) (*os.File, error) {
	var f *os.File
	err := error(fs.ErrNotExist)
	for range 100 {
		if err = makeFolder(folder); err == nil {
			f, err = os.CreateTemp(folder, tempPrefix) // O_EXCL, 0600
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return f, err
}

// publish gives the finished file its name, backup.ErrExists if it is taken.
// renameat2(2): EINVAL is the answer of filesystems without RENAME_NOREPLACE
// (NFS, for one), ENOSYS that of kernels before 3.15.
func (d *Dir) publish(temp, path string) error {
	err := error(unix.EINVAL)
	if !d.link {
		err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if err = unix.Link(temp, path); err == nil {
			_ = unlink(temp) // the object is there; Tidy finds a leftover
		}
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %w", backup.ErrExists, err)
	}
	return err
}

// Get opens the file.
func (d *Dir) Get(ctx context.Context, key string) (io.ReadCloser, error) {
	if err := check(ctx, CheckKey(key)); err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	f, err := os.Open(d.path(key))
	if absent(err) {
		return nil, fmt.Errorf("get %s: %w: %w", key, backup.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: no regular file", backup.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, errors.Join(err, f.Close()))
	}
	return struct {
		io.Reader
		io.Closer
	}{reader{ctx, f}, f}, nil
}

// List walks the folder that the prefix names. Only regular files with a fit
// name count.
func (d *Dir) List(ctx context.Context, prefix string) ([]Object, error) {
	if err := check(ctx, CheckPrefix(prefix)); err != nil {
		return nil, fmt.Errorf("list %q: %w", prefix, err)
	}
	folder := prefix[:strings.LastIndexByte(prefix, '/')+1]
	var out []Object
	err := d.walk(ctx, folder, func(path string, e fs.DirEntry) error {
		key := strings.TrimPrefix(strings.TrimPrefix(path, d.root), "/")
		if !strings.HasPrefix(key, prefix) || CheckKey(key) != nil {
			return nil
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted since the folder was read
		}
		if err == nil {
			out = append(out, Object{Key: key, Size: backup.Bytes(info.Size()), Modified: info.ModTime()})
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list %q: %w", prefix, err)
	}
	slices.SortFunc(out, func(a, b Object) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// there demands that the root exists. "Nothing there" would be a lie where a
// filesystem is only not mounted: there would be no backups, and a deletion
// would be done.
func (d *Dir) there() error {
	_, err := os.Stat(d.root)
	if absent(err) {
		return backup.Hint(fmt.Errorf("catalog %s: %w: %w", d.root, backup.ErrNotFound, err),
			"is its filesystem mounted? If it is meant to be new: the first `cleancut backup` makes it")
	}
	return err
}

// walk visits the regular files below folder. What vanishes meanwhile is
// passed over.
func (d *Dir) walk(ctx context.Context, folder string, visit func(path string, e fs.DirEntry) error) error {
	if err := d.there(); err != nil {
		return err
	}
	top := d.path(folder) + "/" // with the slash a symbolic link is followed
	return filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		switch {
		case absent(err):
			return nil
		case err != nil:
			return err
		case e.IsDir() && path != top && strings.HasPrefix(e.Name(), "."):
			return fs.SkipDir // .snapshot, .zfs: other people's
		case e.IsDir():
			return nil
		case !e.Type().IsRegular():
			// To pass it over would hide what it leads to.
			return fmt.Errorf("%s is neither a file nor a folder: %w", path, backup.ErrUnsupported)
		}
		return visit(path, e)
	})
}

// Delete unlinks the file, syncs its folder and removes folders left empty.
func (d *Dir) Delete(ctx context.Context, key string) error {
	if err := check(ctx, CheckKey(key)); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	if err := d.there(); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	path := d.path(key)
	if err := unlink(path); err != nil && !errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	// Also when it was gone already: an earlier Delete may have died before
	// its sync.
	folder := filepath.Dir(path)
	if err := syncFolder(folder); err != nil && !absent(err) {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	for ; folder != d.root && len(folder) > len(d.root); folder = filepath.Dir(folder) {
		if err := unix.Rmdir(folder); err != nil && !absent(err) {
			break // not empty, mostly; an empty folder shows nowhere
		}
	}
	return nil
}

// Tidy removes the temporary files that were last written to more than
// olderThan ago and returns how many. A Put that is still at work but stalled
// for that long fails; a day is safe.
func (d *Dir) Tidy(ctx context.Context, olderThan time.Duration) (int, error) {
	removed := 0
	err := d.walk(ctx, "", func(path string, e fs.DirEntry) error {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			return nil
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || (err == nil && time.Since(info.ModTime()) < olderThan) {
			return nil
		}
		if err == nil {
			err = unlink(path)
		}
		if err == nil {
			removed++
		}
		return err
	})
	if err != nil {
		return removed, fmt.Errorf("tidy %s: %w", d.root, err)
	}
	return removed, nil
}

func (d *Dir) path(key string) string { return filepath.Join(d.root, filepath.FromSlash(key)) }

// check returns the first thing that forbids to begin.
func check(ctx context.Context, invalid error) error {
	if invalid != nil {
		return invalid
	}
	return ctx.Err()
}

// absent reports that a path leads nowhere: a part is missing or is a file.
func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// unlink removes a file and nothing else (os.Remove would take an empty
// folder too); nil if there is none.
func unlink(path string) error {
	if err := unix.Unlink(path); err != nil && !absent(err) {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}

// makeFolder makes a folder and its missing parents, each durable: a new
// folder lasts once its parent was synced.
func makeFolder(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) && path != filepath.Dir(path) {
		if err := makeFolder(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// reader ends with ctx's error once ctx is done.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
