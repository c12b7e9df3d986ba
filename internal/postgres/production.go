package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

const slotsFile = Private + "/slots-removed.json"

// noteSlots records the replication slots that the copy does not inherit.
func (c *image) noteSlots() error {
	info, err := c.data.Lstat("pg_replslot")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() { // a link that somebody made: empty() replaces it
		return nil
	}
	if err != nil {
		return err
	}
	entries, err := fs.ReadDir(c.data.FS(), "pg_replslot")
	if err != nil || len(entries) == 0 { // emptied by an earlier run, perhaps
		return err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	b, err := json.Marshal(names)
	if err != nil {
		return err
	}
	return c.write(c.root, slotsFile, string(b)+"\n")
}

// Reinstated is what a data directory that takes production's place has not
// got back.
type Reinstated struct {
	Slots []string // replication slots that production had
}

// Reinstate takes back what Prepare did to the data directory of a copy for
// its isolation, so that it can stand where the original did: the links of
// pg_wal and pg_tblspc lead to the real paths of production, the links that led
// out of the copy are there again, postgresql.auto.conf is production's.
// Replication slots and the signal files of a standby do not come back.
//
// Of the WAL only that of the timeline which recovery began is marked to be
// archived, with its history: what is older belongs to the old place.
//
// The server has been stopped cleanly. It may be called again after a failure.
func Reinstate(ctx context.Context, root, data string) (r Reinstated, err error) {
	c, err := openCopy(Plan{Root: root, Data: data})
	if err != nil {
		return r, fmt.Errorf("take back the isolation of %s: %w", data, err)
	}
	defer func() { err = errors.Join(err, c.data.Close(), c.root.Close()) }()
	steps := []struct {
		name string
		do   func() error
	}{
		{"reinstate.check", c.stoppedCleanly},
		{"reinstate.archive", c.markWAL},
		{"reinstate.strays", c.restoreStrays},
		{"reinstate.autoconf", c.restoreAutoConf},
		{"reinstate.links", c.restoreLinks},
	}
	for _, s := range steps {
		if err := effect(ctx, s.name, s.do); err != nil {
			return r, fmt.Errorf("take back the isolation of %s: %w", data, err)
		}
	}
	_, err = c.readPrivate(slotsFile, &r.Slots)
	return r, err
}

func (c *image) stoppedCleanly() (err error) {
	if pid := serverPID(c.dataPath); pid != 0 {
		return fmt.Errorf("process %d runs in %s: %w", pid, c.dataPath, backup.ErrInUse)
	}
	if c.control, err = ReadControl(filepath.Join(c.dataPath, "global", "pg_control")); err != nil {
		return err
	}
	if c.control.State != ControlShutDown {
		return fmt.Errorf("%s: the control file says %q: %w", c.dataPath, c.control.State, backup.ErrUnsupported)
	}
	return nil
}

// markWAL leaves exactly the marks that the archiver is to find. While the
// copy was isolated archive_mode was off: its first segments and its history
// file have none, and the last checkpoint's segment is still being written.
func (c *image) markWAL() (err error) {
	r, err := c.openWAL()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := r.Mkdir("archive_status", 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := errors.Join(r.Lchown("archive_status", c.uid, c.gid), emptyDir(r, "archive_status")); err != nil {
		return err
	}
	entries, err := fs.ReadDir(r.FS(), ".")
	if err != nil {
		return err
	}
	size := wal.Size(c.control.WALSegmentSize)
	now := wal.At(wal.Timeline(c.control.TimeLine), backup.LSN(c.control.CheckpointLSN), size)
	for _, e := range entries {
		file, err := wal.ParseFile(e.Name())
		if err != nil {
			continue
		}
		mark := ".done"
		switch segment, err := file.Segment(size); {
		case file.Timeline > now.Timeline:
			continue // none can be there
		case file.Timeline == now.Timeline && (err != nil || segment.Number < now.Number):
			mark = ".ready"
		case file.Timeline == now.Timeline:
			continue // not full yet, or made ahead
		}
		if err := c.write(r, "archive_status/"+e.Name()+mark, ""); err != nil {
			return err
		}
	}
	return nil
}

// readPrivate reads what Prepare noted, if it did.
func (c *image) readPrivate(name string, into any) (found bool, err error) {
	b, err := c.root.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	return err == nil, err
}

// restoreStrays makes the links again that led out of the copy: to logs,
// certificates or configuration of production's host.
func (c *image) restoreStrays() error {
	var gone []stray
	if _, err := c.readPrivate(strayFile, &gone); err != nil {
		return err
	}
	for _, s := range gone {
		if now, err := c.data.Readlink(s.Link); err == nil && now == s.To {
			continue
		}
		if err := errors.Join(c.data.Symlink(s.To, s.Link), c.data.Lchown(s.Link, c.uid, c.gid)); err != nil {
			return err
		}
	}
	return nil
}

func (c *image) restoreAutoConf() error {
	const auto, kept = "postgresql.auto.conf", "postgresql.auto.conf.production"
	if err := c.data.Rename(kept, auto); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range []string{"postmaster.opts", "tablespace_map.old"} { // they name the copy's folder
		if err := c.data.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// restoreLinks lets every link that leads to a folder of the copy lead to the
// same folder of production. Below the copy's root everything kept its place.
func (c *image) restoreLinks() error {
	for _, link := range c.placeLinks() {
		to, err := c.data.Readlink(link)
		if err != nil {
			return err
		}
		rel, inCopy := strings.CutPrefix(to, c.rootPath+"/")
		if !inCopy {
			continue // done already, or in place (15+)
		}
		if err := relink(c.data, move{Link: link, Copy: "/" + rel}, c.uid, c.gid); err != nil {
			return err
		}
	}
	return nil
}

var assignment = regexp.MustCompile(`^\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(?:=|\s)\s*`)

// Override puts settings into postgresql.auto.conf of a stopped server, as
// ALTER SYSTEM would: they beat all configuration files. Others there stay.
func Override(ctx context.Context, data string, settings map[string]string) (err error) {
	uid, gid, err := owner(data)
	if err != nil {
		return err
	}
	r, err := os.OpenRoot(data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	const auto = "postgresql.auto.conf"
	old, err := r.ReadFile(auto)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var b strings.Builder
	for line := range strings.Lines(string(old)) {
		if m := assignment.FindStringSubmatch(line); m != nil {
			if _, ours := settings[strings.ToLower(m[1])]; ours {
				continue
			}
		}
		b.WriteString(strings.TrimSuffix(line, "\n") + "\n")
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&b, "%s = %s\n", name, quoteSetting(settings[name]))
	}
	return effect(ctx, "override", func() error { return writeOwned(r, auto, b.String(), int(uid), int(gid)) })
}

// quoteSetting writes a value as a configuration file takes it (guc-file.l,
// DeescapeQuotedString).
func quoteSetting(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(v) + "'"
}

// SettingIn looks for the last assignment of a setting in the text of a
// configuration file; what it includes is not followed.
func SettingIn(content []byte, name string) (value string, found bool) {
	all := SettingsIn(content, name)
	if len(all) == 0 {
		return "", false
	}
	return all[len(all)-1], true
}

// SettingsIn is SettingIn for all assignments, in order: include_dir may come
// more than once.
func SettingsIn(content []byte, name string) (values []string) {
	for line := range strings.Lines(string(content)) {
		m := assignment.FindStringSubmatch(line)
		if m == nil || !strings.EqualFold(m[1], name) {
			continue
		}
		rest := strings.TrimSpace(line[len(m[0]):])
		if quoted, ok := strings.CutPrefix(rest, "'"); ok {
			values = append(values, unquoteSetting(quoted))
		} else {
			word, _, _ := strings.Cut(rest, "#")
			values = append(values, strings.TrimSpace(word))
		}
	}
	return values
}

func unquoteSetting(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
		case s[i] == '\'' && i+1 < len(s) && s[i+1] == '\'':
			i++
		case s[i] == '\'':
			return b.String()
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Site is a server's place on this host: where its data and its configuration
// lie. Config is "" where it lies in the data directory.
type Site struct {
	Data         string
	Config       string
	Installation Installation
}

// Effective asks the programs what value a setting will have when the server
// starts there (postgres -C): configuration files, what they include and
// postgresql.auto.conf together. It starts nothing.
func (s Site) Effective(ctx context.Context, name string) (string, error) {
	uid, gid, err := owner(s.Data)
	if err != nil {
		return "", err
	}
	i := Instance{Installation: s.Installation, UID: uid, GID: gid, SocketDir: "/nonexistent"}
	args := append([]string{"-D", s.Data}, s.options()...)
	cmd := exec.CommandContext(ctx, filepath.Join(s.Installation.Bin, "postgres"), append(args, "-C", name)...)
	cmd.Dir, cmd.Env, cmd.SysProcAttr = "/", i.environment(), childAttributes(i.credential())
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("setting %s of the server in %s: %w", name, s.Data, err)
	}
	return strings.TrimSuffix(string(out), "\n"), nil
}

func (s Site) options() []string {
	if s.Config == "" {
		return nil
	}
	return []string{"-c", "config_file=" + s.Config}
}

var debianConfig = regexp.MustCompile(`^/etc/postgresql/([0-9]+)/([^/]+)/postgresql\.conf$`)

// StartCommand is the command that starts the server as this host does it:
// Debian's pg_ctlcluster, which goes through systemd where that runs, for a
// configuration where that looks for it; else pg_ctl as the data's owner.
func (s Site) StartCommand() ([]string, error) {
	if m := debianConfig.FindStringSubmatch(s.Config); m != nil {
		if _, err := exec.LookPath("pg_ctlcluster"); err == nil {
			return []string{"pg_ctlcluster", m[1], m[2], "start"}, nil
		}
	}
	uid, gid, err := owner(s.Data)
	if err != nil {
		return nil, err
	}
	groups := "--clear-groups"
	if _, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		groups = "--init-groups"
	}
	out := []string{"setpriv", fmt.Sprintf("--reuid=%d", uid), fmt.Sprintf("--regid=%d", gid), groups,
		filepath.Join(s.Installation.Bin, "pg_ctl"), "-D", s.Data, "-l", filepath.Join(s.Data, "startup.log"), "-w", "-t", "3600"}
	if s.Config != "" {
		out = append(out, "-o", "-c config_file="+s.Config)
	}
	return append(out, "start"), nil
}

// Databases opens every database of a copy that lets anybody in, reads its
// list of relations, and disables the subscriptions in it: the publisher may
// have moved on, and would never send again what this copy lacks. It returns
// them as database.subscription.
func (i *Instance) Databases(ctx context.Context) (disabled []string, err error) {
	conn, err := i.Connect(ctx, "postgres")
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	rows, err := conn.Query(ctx, `SELECT datname::text FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY 1`)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := i.openDatabase(ctx, name, &disabled); err != nil {
			return disabled, fmt.Errorf("database %s: %w", name, err)
		}
	}
	return disabled, nil
}

func (i *Instance) openDatabase(ctx context.Context, name string, disabled *[]string) error {
	conn, err := i.Connect(ctx, name)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var relations int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM pg_catalog.pg_class`).Scan(&relations); err != nil {
		return err
	}
	rows, err := conn.Query(ctx, `SELECT subname::text FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
		WHERE d.datname = pg_catalog.current_database() AND subenabled ORDER BY 1`)
	if err != nil {
		return err
	}
	subscriptions, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(subscriptions) == 0 {
		return err
	}
	if _, err := conn.Exec(ctx, `SET session_replication_role = replica`); err != nil { // event triggers of production keep still
		return err
	}
	for _, s := range subscriptions {
		if _, err := conn.Exec(ctx, `ALTER SUBSCRIPTION `+pgx.Identifier{s}.Sanitize()+` DISABLE`); err != nil {
			return fmt.Errorf("disable subscription %s: %w", s, err)
		}
		*disabled = append(*disabled, name+"."+s)
	}
	return nil
}

// Listening is where a running server takes connections.
type Listening struct {
	SocketDir string // the first of them, "" for none
	Port      int
}

// Accepting waits until the server in data says that it takes connections;
// ErrNotFound when none runs there.
func Accepting(ctx context.Context, data string) (Listening, error) {
	tick := time.NewTicker(startPause)
	defer tick.Stop()
	for {
		l, err := readLock(data)
		if err != nil || !alive(l.PID) {
			return Listening{}, fmt.Errorf("no server runs in %s: %w", data, orNotFound(err))
		}
		if l.Status == "ready" {
			return Listening{SocketDir: l.SocketDir, Port: l.Port}, nil
		}
		select {
		case <-ctx.Done():
			return Listening{}, context.Cause(ctx)
		case <-tick.C:
		}
	}
}
