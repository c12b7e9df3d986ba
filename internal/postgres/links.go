package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

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

// move says where a link of production led and where the copy's leads.
type move struct {
	Link     string `json:"link"`     // below the data directory
	Original string `json:"original"` // absolute, on production
	Copy     string `json:"copy"`     // real, below the copy's root
	// Fresh: production made the link after the image's last checkpoint began,
	// or just before, so redo makes it again (tblspc_redo).
	Fresh bool `json:"fresh"`
}

// rewriteLinks lets pg_wal and pg_tblspc/* lead to the copy's own folders, and
// records the moves for Start. What the image holds decides which links there
// are: a tablespace may have been made or dropped between the look at the
// server and the cut.
func (c *image) rewriteLinks(context.Context) error {
	if info, err := c.data.Lstat("pg_wal"); err != nil {
		return err
	} else if !info.IsDir() && info.Mode()&fs.ModeSymlink == 0 {
		return fmt.Errorf("%s/pg_wal is neither a directory nor a link", c.dataPath)
	}
	known, err := readMoves(c.rootPath)
	if err != nil {
		return err
	}
	if c.plan.without.has(layerLinks) {
		return nil
	}
	var moves []move
	for _, link := range c.placeLinks() {
		if strings.HasSuffix(link, ".tmp") { // of a run that was killed
			if err := c.data.Remove(link); err != nil {
				return err
			}
			continue
		}
		m, err := c.move(link, known)
		if err != nil {
			return err
		}
		moves = append(moves, m)
	}
	// Recorded first: a run that is killed in between finds the originals again.
	b, err := json.Marshal(moves)
	if err != nil {
		return err
	}
	if err := c.write(c.root, movesFile, string(b)+"\n"); err != nil {
		return err
	}
	for _, m := range moves {
		if err := relink(c.data, m, c.uid, c.gid); err != nil {
			return err
		}
	}
	return nil
}

const movesFile = Private + "/moves.json"

// readMoves returns what Prepare recorded below root, nothing if it has not.
func readMoves(root string) ([]move, error) {
	b, err := os.ReadFile(filepath.Join(root, movesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var moves []move
	if err := json.Unmarshal(b, &moves); err != nil {
		return nil, fmt.Errorf("%s: %w", movesFile, err)
	}
	for _, m := range moves {
		if m.Copy == root || !below(root, filepath.Clean(m.Copy)) {
			return nil, fmt.Errorf("%s names %s, out of the copy: %w", movesFile, m.Copy, backup.ErrUnsupported)
		}
	}
	return moves, nil
}

// relink makes the link of m lead into the copy; one that does is left alone.
// A rename replaces the link itself, so a running server never lacks it.
func relink(data *os.Root, m move, uid, gid int) error {
	if now, err := data.Readlink(m.Link); err == nil && now == m.Copy {
		return nil
	}
	tmp := m.Link + ".tmp"
	if err := data.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(data.Symlink(m.Copy, tmp), data.Lchown(tmp, uid, gid), data.Rename(tmp, m.Link))
}

// move finds where link must lead: from the manifest's place, which is a real
// path while the link may go through others; for a tablespace made after the
// look at the server from the link itself.
func (c *image) move(link string, known []move) (move, error) {
	m := move{Link: link}
	for _, p := range c.plan.Places {
		if p.Link == link {
			m.Original = p.Path
		}
	}
	now, err := c.data.Readlink(link)
	if err != nil {
		return move{}, err
	}
	info, err := c.data.Lstat(link)
	if err != nil {
		return move{}, err
	}
	redo := c.control.CheckpointTime
	if b := c.plan.Bracket; b != nil && b.Started.Before(redo) {
		redo = b.Started
	}
	m.Fresh = c.control.State != ControlShutDown && info.ModTime().Add(time.Second).After(redo)
	for _, k := range known {
		if k.Link == link && k.Copy == now { // rewritten by an earlier run
			m.Original, m.Fresh = cmp.Or(m.Original, k.Original), k.Fresh
		}
	}
	if m.Original == "" {
		m.Original = now
		if !filepath.IsAbs(now) {
			m.Original = filepath.Join(c.plan.Server.DataDirectory, filepath.Dir(link), now)
		}
	}
	path, ok := c.plan.Map(filepath.Clean(m.Original))
	if !ok {
		return move{}, backup.Hint(fmt.Errorf("%s leads to %s, which no filesystem of the backup holds: %w", link, m.Original, backup.ErrVoid),
			"the tablespace was probably made after the topology was read; take a new backup")
	}
	if m.Copy, err = filepath.EvalSymlinks(path); err != nil {
		return move{}, fmt.Errorf("%s: %w", link, err)
	}
	if m.Copy == c.rootPath || !below(c.rootPath, m.Copy) {
		return move{}, fmt.Errorf("%s would lead to %s, out of the copy: %w", link, m.Copy, backup.ErrUnsupported)
	}
	if info, err := os.Lstat(m.Copy); err != nil || !info.IsDir() {
		return move{}, errors.Join(fmt.Errorf("%s would lead to %s, which is no directory", link, m.Copy), err)
	}
	return m, nil
}

// holdsData reports whether an entry of the data directory is PostgreSQL's
// own, so that a copy without it is no copy.
func holdsData(rel string) bool {
	top, _, _ := strings.Cut(filepath.ToSlash(rel), "/")
	for _, e := range emptied() {
		if top == e {
			return false
		}
	}
	return top == "base" || top == "global" || top == "PG_VERSION" || (strings.HasPrefix(top, "pg_") && !strings.HasSuffix(top, ".conf") && top != "pg_log" && top != "pg_stat")
}

// strayFile notes the links that verifyLinks took away.
const strayFile = Private + "/links-removed.json"

// stray is a link of production that led out of the copy.
type stray struct {
	Link string `json:"link"` // below the data directory
	To   string `json:"to"`
}

// verifyLinks follows every link of the copy. One that leaves the root is
// taken away where it is none of the server's data (log, certificates,
// configuration: the copy has its own), and noted in Root/.cleancut; one that
// should hold data is an error.
func (c *image) verifyLinks(ctx context.Context) error {
	if c.plan.without.has(layerLinks) {
		return nil
	}
	var gone []stray
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
			gone = append(gone, stray{rel, to})
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
	b, err := json.Marshal(gone)
	if err != nil {
		return err
	}
	return c.write(c.root, strayFile, string(b)+"\n")
}
