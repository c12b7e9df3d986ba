package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"cleancut/internal/backup"
)

// bracketPlaced marks that placeBracket is done. The server renames the label
// at its first start and keeps in pg_control how far it has come: putting the
// label back then would take it back to the start without undoing anything.
const bracketPlaced = Private + "/bracket-placed"

// placeBracket puts what backup mode gave to where recovery looks for it: the
// WAL from start to end in the place of whatever the image's pg_wal holds,
// tablespace_map with the copy's paths (the server makes the links of
// pg_tblspc anew from it), a standby's pg_control, the signal that makes
// recovery end with a timeline of its own or not at all, and the label, by which all of
// this counts, last.
func (c *image) placeBracket(ctx context.Context) error {
	b := c.plan.Bracket
	if b == nil && (c.plan.Archive || c.plan.Standby != nil) {
		return c.write(c.data, c.signal(), "")
	}
	if b == nil || c.placed() {
		return nil
	}
	paths, err := c.relocateMap(b.Map)
	if err != nil {
		return err
	}
	if err := c.replaceWAL(ctx, b.WAL); err != nil {
		return err
	}
	if b.Standby() {
		if err := c.replaceControl(b.Control); err != nil {
			return err
		}
	}
	if len(b.Map) > 0 {
		if err := c.write(c.data, "tablespace_map", paths); err != nil {
			return err
		}
	}
	return errors.Join(c.write(c.data, c.signal(), ""), c.write(c.data, "backup_label", string(b.Label)), c.write(c.root, bracketPlaced, ""))
}

func (c *image) placed() bool {
	_, err := c.root.Lstat(bracketPlaced)
	return err == nil
}

// replaceControl puts the control file of a standby, which was read after the
// last of the cuts, in the place of the image's.
func (c *image) replaceControl(content []byte) error {
	if err := c.write(c.data, "global/pg_control", string(content)); err != nil {
		return err
	}
	var err error
	if c.control, err = ReadControl(filepath.Join(c.dataPath, "global", "pg_control")); err != nil {
		return err
	}
	if got, want := backup.SystemIdentifier(c.control.SystemIdentifier), c.plan.Server.SystemIdentifier; got != want {
		return fmt.Errorf("the pg_control kept with the backup is of the cluster with system identifier %d, the manifest tells of %d: %w", got, want, backup.ErrVoid)
	}
	return nil
}

// openWAL opens pg_wal, wherever its link leads.
func (c *image) openWAL() (*os.Root, error) {
	path, err := filepath.EvalSymlinks(filepath.Join(c.dataPath, "pg_wal"))
	if err != nil {
		return nil, err
	}
	return os.OpenRoot(path)
}

// replaceWAL leaves nothing in pg_wal but the segments of the bracket.
func (c *image) replaceWAL(ctx context.Context, segments []string) (err error) {
	r, err := c.openWAL()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	entries, err := fs.ReadDir(r.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := r.RemoveAll(e.Name()); err != nil { // the server makes archive_status itself
			return err
		}
	}
	for _, name := range segments {
		if err := c.placeSegment(ctx, r, name); err != nil {
			return fmt.Errorf("WAL segment %s: %w", name, err)
		}
	}
	return nil
}

func (c *image) placeSegment(ctx context.Context, r *os.Root, name string) error {
	from, err := c.plan.Segment(ctx, name)
	if err != nil {
		return err
	}
	to, err := r.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return errors.Join(err, from.Close())
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, from.Close(), to.Chown(c.uid, c.gid), to.Sync(), to.Close())
}

// relocateMap gives tablespace_map the copy's paths.
func (c *image) relocateMap(original []byte) (string, error) {
	moves, err := readMoves(c.rootPath)
	if err != nil {
		return "", err
	}
	escapes := c.plan.Server.Major() >= 14
	spaces, err := parseTablespaceMap(original, escapes)
	if err != nil {
		return "", err
	}
	for i, s := range spaces {
		to, ok := c.plan.Map(s.path)
		for _, m := range moves {
			if m.Link == "pg_tblspc/"+strconv.FormatUint(uint64(s.oid), 10) {
				to, ok = m.Copy, true
			}
		}
		if !ok {
			return "", fmt.Errorf("tablespace %d was in %s, which no filesystem of the copy holds: %w", s.oid, s.path, backup.ErrUnsupported)
		}
		spaces[i].path = to
	}
	return formatTablespaceMap(spaces, escapes), nil
}

// tablespace is a line of tablespace_map.
type tablespace struct {
	oid  uint32
	path string
}

// parseTablespaceMap reads what do_pg_backup_start wrote (xlog.c; the reader is
// read_tablespace_map of xlogrecovery.c): "oid path" and a newline, with a
// backslash before each newline and carriage return of the path, and where
// escapes (14 and later) also before each backslash.
func parseTablespaceMap(b []byte, escapes bool) ([]tablespace, error) {
	var out []tablespace
	var line strings.Builder
	for i := 0; i < len(b); i++ {
		switch {
		case b[i] == '\\' && i+1 < len(b) && (escapes || b[i+1] == '\n' || b[i+1] == '\r'):
			i++
			line.WriteByte(b[i])
		case b[i] == '\n':
			number, path, found := strings.Cut(line.String(), " ")
			oid, err := strconv.ParseUint(number, 10, 32)
			if err != nil || !found || path == "" {
				return nil, fmt.Errorf("tablespace_map: line %d: %q: %w", len(out)+1, line.String(), backup.ErrDamage)
			}
			out = append(out, tablespace{uint32(oid), path})
			line.Reset()
		default:
			line.WriteByte(b[i])
		}
	}
	if line.Len() > 0 {
		return nil, fmt.Errorf("tablespace_map: no newline at its end: %w", backup.ErrDamage)
	}
	return out, nil
}

func formatTablespaceMap(spaces []tablespace, escapes bool) string {
	var b strings.Builder
	pairs := []string{"\n", "\\\n", "\r", "\\\r"}
	if escapes {
		pairs = append(pairs, `\`, `\\`)
	}
	escape := strings.NewReplacer(pairs...)
	for _, s := range spaces {
		fmt.Fprintf(&b, "%d %s\n", s.oid, escape.Replace(s.path))
	}
	return b.String()
}
