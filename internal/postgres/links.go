package postgres

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"cleancut/internal/backup"
)

// placeLinks lists the links of the image that lead to WAL and tablespaces,
// relative to the data directory.
func (c *image) placeLinks() []string {
	var out []string
	if info, err := c.data.Lstat("pg_wal"); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		out = append(out, "pg_wal")
	}
	entries, err := fs.ReadDir(c.data.FS(), "pg_tblspc")
	if err != nil {
		return out
	}
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink != 0 {
			out = append(out, "pg_tblspc/"+e.Name())
		}
	}
	return out
}

// rewriteLinks lets pg_wal and pg_tblspc/* lead to the copy's own folders.
// What the image holds decides which links there are: a tablespace may have
// been made or dropped between the look at the server and the cut.
func (c *image) rewriteLinks(context.Context) error {
	if info, err := c.data.Lstat("pg_wal"); err != nil {
		return err
	} else if !info.IsDir() && info.Mode()&fs.ModeSymlink == 0 {
		return fmt.Errorf("%s/pg_wal is neither a directory nor a link", c.dataPath)
	}
	for _, link := range c.placeLinks() {
		if strings.HasSuffix(link, ".tmp") { // of a run that was killed
			if err := c.data.Remove(link); err != nil {
				return err
			}
			continue
		}
		target, err := c.target(link)
		if err != nil {
			return err
		}
		if now, err := c.data.Readlink(link); err == nil && now == target {
			continue
		}
		tmp := link + ".tmp"
		if err := c.data.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// A rename replaces the link itself, so the copy never lacks it.
		if err := errors.Join(c.data.Symlink(target, tmp), c.data.Lchown(tmp, c.uid, c.gid), c.data.Rename(tmp, link)); err != nil {
			return err
		}
	}
	return nil
}

// target returns the real path below the root that link must lead to. A link
// of the image that leads there already was rewritten by an earlier run.
func (c *image) target(link string) (string, error) {
	now, err := c.data.Readlink(link)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(filepath.Join(c.dataPath, link)); err == nil && filepath.IsAbs(now) && below(c.rootPath, real) {
		return real, nil
	}
	original := now
	if !filepath.IsAbs(original) {
		original = filepath.Join(c.plan.Server.DataDirectory, filepath.Dir(link), original)
	}
	for _, p := range c.plan.Places {
		if p.Link == link {
			original = p.Path // real; what the link says may go through others
		}
	}
	path, ok := c.plan.Map(filepath.Clean(original))
	if !ok {
		return "", backup.Hint(fmt.Errorf("%s leads to %s, which no filesystem of the backup holds: %w", link, original, backup.ErrVoid),
			"the tablespace was probably made after the topology was read; take a new backup")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w", link, err)
	}
	if real == c.rootPath || !below(c.rootPath, real) {
		return "", fmt.Errorf("%s would lead to %s, out of the copy: %w", link, real, backup.ErrUnsupported)
	}
	if info, err := os.Lstat(real); err != nil || !info.IsDir() {
		return "", errors.Join(fmt.Errorf("%s would lead to %s, which is no directory", link, real), err)
	}
	return real, nil
}

// holdsData reports whether an entry of the data directory is PostgreSQL's
// own, so that a copy without it is no copy.
func holdsData(rel string) bool {
	top, _, _ := strings.Cut(filepath.ToSlash(rel), "/")
	for _, e := range emptied {
		if top == e {
			return false
		}
	}
	return top == "base" || top == "global" || top == "PG_VERSION" || (strings.HasPrefix(top, "pg_") && !strings.HasSuffix(top, ".conf") && top != "pg_log" && top != "pg_stat")
}

// verifyLinks follows every link of the copy. One that leaves the root is
// taken away where it is none of the server's data (log, certificates,
// configuration: the copy has its own), and noted in Root/.cleancut; one that
// should hold data is an error.
func (c *image) verifyLinks(ctx context.Context) error {
	var gone []string
	check := func(r *os.Root, top string) error {
		return filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err != nil || ctx.Err() != nil {
				return errors.Join(err, context.Cause(ctx))
			}
			if e.Type()&fs.ModeSymlink == 0 {
				return nil
			}
			real, err := filepath.EvalSymlinks(path)
			if err == nil && below(c.rootPath, real) {
				return nil
			}
			rel, err := filepath.Rel(top, path)
			if err != nil {
				return err
			}
			to, err := r.Readlink(rel)
			if err != nil {
				return err
			}
			if top != c.dataPath || holdsData(rel) {
				return fmt.Errorf("the link %s leads out of the copy, to %s: %w", path, to, backup.ErrUnsupported)
			}
			gone = append(gone, rel+" → "+to)
			return r.Remove(rel)
		})
	}
	if err := check(c.data, c.dataPath); err != nil {
		return err
	}
	for _, link := range c.placeLinks() {
		real, err := filepath.EvalSymlinks(filepath.Join(c.dataPath, link))
		if err != nil {
			return err
		}
		r, err := os.OpenRoot(real)
		if err != nil {
			return err
		}
		if err := errors.Join(check(r, real), r.Close()); err != nil {
			return err
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return c.write(c.root, Private+"/links-removed.txt", strings.Join(gone, "\n")+"\n")
}
