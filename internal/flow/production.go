package flow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
	"cleancut/internal/flow/restore"
	"cleancut/internal/flow/verify"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// ProductionOptions says how a backup takes production's place.
type ProductionOptions struct {
	ID backup.ID
	Recovery
	Target postgres.Target // where the original is, or was
	// Archive is the archive_command from now on; "" for none.
	Archive string
	Catalog string // URL of the flow's catalog
	Storage string // name for `storage attach`; "": the cluster's
	Fstab   string
	// MdadmConf is the file for the lines of arrays.
	MdadmConf string
	Level     backup.Level // how deep it is checked before: start or rows
	// OriginalGone: where nobody can tell whether it is the original that
	// answers, or does not, somebody has said that it is not. A server that
	// answers with its system identifier is refused all the same.
	OriginalGone bool
	Start        bool // start the server; else only say how
}

// Produced is a cluster in production's place.
type Produced struct {
	Copy          backup.Copy       `json:"copy"`
	Timeline      uint32            `json:"timeline"`
	Archive       string            `json:"archive_command"`
	Config        string            `json:"config_file"` // "" in the data directory
	StartCommand  []string          `json:"start_command"`
	Started       bool              `json:"started"` // it runs and takes connections
	Answers       []postgres.Answer `json:"original"`
	Slots         []string          `json:"slots_lost,omitempty"`
	Subscriptions []string          `json:"subscriptions_disabled,omitempty"`
	Synchronous   string            `json:"synchronous_standby_names_was,omitempty"`
	Alone         []string          `json:"files_left_alone,omitempty"`
	Arrays        bool              `json:"arrays"`
}

// Produce restores a backup in the place of a cluster that is lost: at its
// mount points, with its configuration, on a new timeline, archiving to a new
// place. It is recovered as an isolated copy first and checked; only then does
// it leave the isolation. Whatever fails or is interrupted before it is put
// into service is undone on the spot; from then on nothing is, and an error
// (the server does not start, say) leaves production standing: the result then
// has Copy.ID.
//
// It is refused, before anything is made, while the original answers or may,
// where its mount points, its port or its place in the archive are taken.
func (f *Flow) Produce(ctx context.Context, o ProductionOptions) (p Produced, err error) {
	release, err := f.State.Lock("production-" + f.Cluster)
	if err != nil {
		return p, fmt.Errorf("another restore of cluster %s into production's place is running on this host: %w", f.Cluster, err)
	}
	defer release()
	if o.Storage == "" {
		o.Storage = f.Cluster
	}
	entry, err := f.Catalog.Backup(ctx, o.ID)
	if err != nil {
		return p, err
	}
	m := entry.Manifest
	if err := refuseGolden(m, RestoreOptions{production: &backup.Production{}}); err != nil {
		return p, err
	}
	files, err := f.sideContents(ctx, m)
	if err != nil {
		return p, err
	}
	f.tell("original", "does it answer?")
	if p.Answers, err = f.mayProduce(ctx, m, o, files); err != nil {
		return p, err
	}
	r, releaseCopy, err := f.Restore(ctx, RestoreOptions{ID: o.ID, Purpose: backup.ForProduction, Recovery: o.Recovery,
		production: &backup.Production{Storages: backup.NameStorages(o.Storage, m.Topology), Fstab: o.Fstab, MdadmConf: o.MdadmConf}})
	if err != nil {
		return p, err
	}
	defer releaseCopy()
	if err := f.stand(ctx, o, &r, files, &p); err != nil {
		return p, errors.Join(err, f.undoCopy(ctx, r.Copy))
	}
	p.Copy = r.Copy
	if !o.Start {
		return p, nil
	}
	if err := f.startProduced(ctx, &p); err != nil {
		return p, backup.Hint(fmt.Errorf("production stands in %s and stays, but its server was not seen to start: %w", p.Copy.DataDirectory, err),
			"see its log, then: "+strings.Join(p.StartCommand, " "))
	}
	return p, nil
}

// stand brings a recovered copy into production's place and into service. Any
// error is from before that.
func (f *Flow) stand(ctx context.Context, o ProductionOptions, r *Restored, files []restore.SideContent, p *Produced) (err error) {
	m, c := r.Manifest, &r.Copy
	if p.Subscriptions, err = r.Instance.Databases(ctx); err != nil {
		return err
	}
	v, err := verify.Run(ctx, verify.Options{Copy: *c, Manifest: m, Instance: r.Instance, Installation: r.Installation, Level: o.Level,
		Progress: func(check string) { f.tell("check", check) }})
	if err != nil {
		return err
	}
	if !v.Good() {
		return fmt.Errorf("backup %s does not take production's place: %w: %s", m.ID, backup.ErrDamage, failed(v))
	}
	control, err := postgres.ReadControl(filepath.Join(c.DataDirectory, "global", "pg_control"))
	if err != nil {
		return err
	}
	p.Timeline, p.Archive = control.TimeLine, o.Archive
	if p.Timeline <= m.Server.Timeline {
		return fmt.Errorf("recovery ended on timeline %d, production was on %d: %w", p.Timeline, m.Server.Timeline, backup.ErrUnsupported)
	}
	stood, err := restore.Stand(ctx, restore.StandOptions{Manifest: m, Copy: c, Installation: r.Installation, Files: files, Settings: overrides(m, o.Archive),
		Refuse: func(original string) error { return newPlace(o.Archive, original) }, Save: f.State.PutCopy, Progress: f.tell})
	if err != nil {
		return err
	}
	if p.StartCommand, err = stood.Site.StartCommand(); err != nil {
		return err
	}
	p.Config, p.Slots, p.Alone, p.Arrays, p.Synchronous = stood.Site.Config, stood.Slots, stood.Alone, stood.Arrays, m.Server.Settings["synchronous_standby_names"]
	f.tell("original", "does it still not answer?")
	if p.Answers, err = f.listen(ctx, m, o); err != nil {
		return err
	}
	if err := fault.Point(ctx, "production.service"); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.Production.InService, c.Ready, c.DataDirectory, c.SocketDir, c.Port = true, true, stood.Site.Data, "", portOf(m)
	for i, fs := range m.Topology.Filesystems {
		c.Filesystems[i].Mountpoint = fs.Mountpoint
	}
	if err := f.State.PutCopy(*c); err != nil {
		c.Production.InService, c.Ready = false, false
		return err
	}
	f.tell("in service", stood.Site.Data)
	return nil
}

func failed(v backup.Verdict) string {
	var out []string
	for _, c := range v.Checks {
		if c.Result != backup.Passed {
			out = append(out, c.Name+" "+string(c.Result)+": "+c.Detail)
		}
	}
	return strings.Join(out, "; ")
}

// startProduced starts the server and sees that it is the one that was put
// there.
func (f *Flow) startProduced(ctx context.Context, p *Produced) error {
	f.tell("start", strings.Join(p.StartCommand, " "))
	if _, err := host.Run(ctx, p.StartCommand[0], p.StartCommand[1:]...); err != nil {
		return err
	}
	status, err := postgres.Accepting(ctx, p.Copy.DataDirectory)
	if err != nil {
		return err
	}
	p.Started, p.Copy.SocketDir, p.Copy.Port = true, status.SocketDir, status.Port
	return f.State.PutCopy(p.Copy)
}

// sideContents reads the side files of a backup.
func (f *Flow) sideContents(ctx context.Context, m backup.Manifest) ([]restore.SideContent, error) {
	var out []restore.SideContent
	for _, s := range m.SideFiles {
		content, err := f.Catalog.SideFile(ctx, m.ID, s)
		if err != nil {
			return nil, fmt.Errorf("configuration of the original: %w", err)
		}
		out = append(out, restore.SideContent{SideFile: s, Content: content})
	}
	return out, nil
}

// productionSettings are for the isolated server of what becomes production:
// what it would otherwise take away from the data for good. Without
// track_commit_timestamp the server removes the times that it finds
// (CompleteCommitTsInitialization).
func productionSettings(m backup.Manifest, p *backup.Production) map[string]string {
	if p == nil || m.Server.Settings["track_commit_timestamp"] != "on" {
		return nil
	}
	return map[string]string{"track_commit_timestamp": "on"}
}

// overrides are the settings that beat the original's configuration.
func overrides(m backup.Manifest, archive string) map[string]string {
	out := map[string]string{"archive_mode": "on", "archive_command": archive}
	if m.Server.Settings["archive_mode"] == "always" {
		out["archive_mode"] = "always"
	}
	if archive == "" {
		out["archive_mode"] = "off"
	}
	if m.Server.Major() >= 15 {
		out["archive_library"] = "" // 16 and later refuse both; before it would beat the command
	}
	if m.Server.Settings["synchronous_standby_names"] != "" {
		out["synchronous_standby_names"] = "" // the standbys are of the old timeline: every commit would wait for ever
	}
	return out
}

// mayProduce refuses what must not be begun.
func (f *Flow) mayProduce(ctx context.Context, m backup.Manifest, o ProductionOptions, files []restore.SideContent) ([]postgres.Answer, error) {
	answers, err := f.listen(ctx, m, o)
	if err != nil {
		return answers, err
	}
	for _, check := range []func() error{
		func() error { return f.noOther(ctx, m, o) },
		func() error { return vacant(m) },
		func() error { return sameUser(m) },
		func() error { return f.archivesElsewhere(ctx, m, o, files) },
		func() error { return findsData(m, files) },
	} {
		if err := check(); err != nil {
			return answers, err
		}
	}
	return answers, nil
}

// noOther: neither did a restore on this host take the place already, nor is
// the storage's name taken.
func (f *Flow) noOther(ctx context.Context, m backup.Manifest, o ProductionOptions) error {
	copies, err := f.State.Copies()
	if err != nil {
		return err
	}
	for _, c := range copies {
		if c.Cluster != m.Cluster || !c.InService() {
			continue
		}
		inv, err := f.Provider.List(ctx, c.Tags())
		if err != nil {
			return err
		}
		if len(inv.Volumes) > 0 {
			return backup.Hint(fmt.Errorf("cluster %s was put into production's place on this host already, in %s (from backup %s): %w", c.Cluster, c.DataDirectory, c.Backup, backup.ErrExists),
				"if that one is lost, too: `cleancut storage destroy` each of "+strings.Join(c.Production.Storages, ", "))
		}
	}
	for _, name := range backup.NameStorages(o.Storage, m.Topology) {
		if name == "" {
			continue
		}
		if err := backup.CheckClusterName(name); err != nil {
			return fmt.Errorf("storage name: %w", err)
		}
		inv, err := f.Provider.List(ctx, backup.Tags{backup.TagStorage: name, backup.TagHost: f.Host})
		if err != nil {
			return err
		}
		if len(inv.Volumes) > 0 {
			return backup.Hint(fmt.Errorf("storage %s of this host: %w", name, backup.ErrExists), "choose another name with --storage, or `cleancut storage destroy "+name+"`")
		}
		for _, file := range []string{o.Fstab, o.MdadmConf} {
			if line, err := host.LineOf(file, name); err == nil {
				return backup.Hint(fmt.Errorf("%s has a line of storage %s: %q: %w", file, name, line, backup.ErrExists), "choose another name with --storage, or `cleancut storage destroy "+name+"`")
			}
		}
	}
	return nil
}

// vacant: nothing lies where the original's filesystems were mounted.
func vacant(m backup.Manifest) error {
	for _, fs := range m.Topology.Filesystems {
		if err := host.CheckVacant(fs.Mountpoint); err != nil {
			return backup.Hint(fmt.Errorf("the original's mount point is not free: %w", err), "move it away; nothing there is overwritten")
		}
	}
	for _, p := range m.Topology.Places {
		if err := host.CheckVacant(p.Path); err != nil {
			return backup.Hint(fmt.Errorf("the original's %s directory is not free: %w", p.Kind, err), "move it away; nothing there is overwritten")
		}
	}
	return nil
}

// sameUser: the files belong to a number, which must be the same user here.
func sameUser(m backup.Manifest) error {
	if m.Server.User == "" {
		return nil
	}
	is := "nobody"
	uid := strconv.FormatUint(uint64(m.Server.UID), 10)
	if u, err := user.LookupId(uid); err == nil {
		is = u.Username
	}
	if is == m.Server.User {
		return nil
	}
	return backup.Hint(fmt.Errorf("the cluster's files belong to uid %s, which was %s and is %s on this host: %w", uid, m.Server.User, is, backup.ErrUnsupported),
		fmt.Sprintf("give the user its number, before anything else uses it: usermod -u %s %s && groupmod -g %d %s", uid, m.Server.User, m.Server.GID, m.Server.User))
}

// findsData: the configuration names the data directory by a path that leads
// there on this host, too.
func findsData(m backup.Manifest, files []restore.SideContent) error {
	for _, f := range files {
		if f.Path != restore.ConfigFile(m) {
			continue
		}
		named, found := postgres.SettingIn(f.Content, "data_directory")
		if !found || filepath.Clean(named) == m.Server.DataDirectory {
			return nil
		}
		if to, err := os.Readlink(named); err == nil && to == m.Server.DataDirectory {
			return nil
		}
		if parent, err := filepath.EvalSymlinks(filepath.Dir(named)); err == nil && filepath.Join(parent, filepath.Base(named)) == m.Server.DataDirectory {
			return nil
		}
		return backup.Hint(fmt.Errorf("%s names the data directory %s, which led to %s and does not on this host: %w", f.Path, named, m.Server.DataDirectory, backup.ErrNotFound),
			fmt.Sprintf("ln -s %s %s", m.Server.DataDirectory, named))
	}
	return nil
}

func portOf(m backup.Manifest) int {
	if port, err := strconv.Atoi(m.Server.Settings["port"]); err == nil {
		return port
	}
	return 5432
}

// hosts lists what the settings of the original name: sockets and addresses of
// this host, where its port must be free, and addresses of its own.
func hosts(m backup.Manifest, here string) (local, remote []string) {
	sockets, known := m.Server.Settings["unix_socket_directories"]
	if !known { // Debian's built-in default, and PostgreSQL's own
		sockets = "/var/run/postgresql, /tmp"
	}
	for dir := range strings.SplitSeq(sockets, ",") {
		if dir = strings.TrimSpace(dir); filepath.IsAbs(dir) {
			local = append(local, dir)
		}
	}
	listen, known := m.Server.Settings["listen_addresses"]
	if !known {
		listen = "localhost"
	}
	for address := range strings.SplitSeq(listen, ",") {
		address = strings.TrimSpace(address)
		ip := net.ParseIP(address)
		if address == "" {
			continue
		}
		if !slices.Contains(local, "127.0.0.1") {
			local = append(local, "127.0.0.1", "::1")
		}
		switch {
		case address == "*", ip != nil && ip.IsUnspecified():
			if m.Host != here {
				remote = append(remote, m.Host)
			}
		case address != "localhost" && (ip == nil || !ip.IsLoopback()):
			remote = append(remote, address)
		}
	}
	return local, remote
}

// listen asks everywhere the original may answer, and refuses while it does or
// may.
func (f *Flow) listen(ctx context.Context, m backup.Manifest, o ProductionOptions) ([]postgres.Answer, error) {
	local, remote := hosts(m, f.Host)
	system := m.Server.SystemIdentifier
	address := func(h string) postgres.Target {
		return postgres.Target{DSN: fmt.Sprintf("host='%s' port=%d user='%s' dbname=postgres", h, portOf(m), m.Server.Superuser)}
	}
	var all []postgres.Answer
	for _, h := range local {
		answers, err := postgres.Ask(ctx, address(h), system)
		if err != nil {
			return all, err
		}
		all = append(all, answers...)
		for _, a := range answers {
			if a.Voice != postgres.Silent && a.Voice != postgres.Wanted {
				return all, backup.Hint(fmt.Errorf("the original's port is taken on this host, at %s: %s (%s): %w", a.Address, a.Voice, a.Detail, backup.ErrInUse),
					"stop that server; one that the package made by itself: pg_dropcluster --stop VERSION main")
			}
		}
	}
	targets := []postgres.Target{o.Target, {DataDirectory: m.Server.DataDirectory}}
	for _, h := range remote {
		targets = append(targets, address(h))
	}
	for _, t := range targets {
		answers, err := postgres.Ask(ctx, t, system)
		if err != nil {
			return all, err
		}
		all = append(all, answers...)
	}
	for _, a := range all {
		switch {
		case a.Voice == postgres.Wanted:
			return all, backup.Hint(fmt.Errorf("the original answers at %s (%s): %w", a.Address, a.Detail, backup.ErrInUse),
				"this command is for a cluster that is lost; for a copy beside it: cleancut restore "+string(m.ID)+" --to DIR")
		case (a.Voice == postgres.Unclear || a.Voice == postgres.Unproven) && !o.OriginalGone:
			return all, backup.Hint(fmt.Errorf("whether the original is gone cannot be told: %s: %s (%s): %w", a.Address, a.Voice, a.Detail, backup.ErrInUse),
				"see to it that it is down and stays so (power, network, fencing), then say --original-is-gone")
		}
	}
	return all, nil
}

// archivesElsewhere refuses an archive_command that is known, before anything
// is made, to write to the original's place, or into one that has WAL already.
func (f *Flow) archivesElsewhere(ctx context.Context, m backup.Manifest, o ProductionOptions, files []restore.SideContent) error {
	if strings.ContainsAny(o.Archive, "\n\r\x00") {
		return fmt.Errorf("%w: an archive_command is one line", backup.ErrUsage)
	}
	if o.Archive != "" && m.Server.Settings["wal_level"] == "minimal" {
		return backup.Hint(fmt.Errorf("the original has wal_level = minimal, with which PostgreSQL does not archive: %w", backup.ErrUnsupported), "say --archive-command '', and set wal_level afterwards")
	}
	for _, file := range files {
		if original, found := postgres.SettingIn(file.Content, "archive_command"); found {
			if err := newPlace(o.Archive, original); err != nil {
				return err
			}
		}
	}
	place, err := pushPlace(o.Archive, o.Catalog, f.Cluster)
	if err != nil || place == nil {
		return err
	}
	hint := "archive to a new place: another --cluster of the catalog, or another --catalog"
	if place.cluster == f.Cluster && sameCatalog(place.catalog, o.Catalog) {
		return backup.Hint(fmt.Errorf("%w: --archive-command writes to %s, cluster %s, where the original's WAL is", backup.ErrUsage, place.catalog, place.cluster), hint)
	}
	store, err := catalog.Open(place.catalog)
	if err != nil {
		return fmt.Errorf("the catalog of --archive-command: %w", err)
	}
	switch _, err := catalog.New(store, place.cluster).WAL().System(ctx); {
	case err == nil:
		return backup.Hint(fmt.Errorf("the place of --archive-command, %s, cluster %s, has WAL already: %w", place.catalog, place.cluster, backup.ErrExists), hint)
	case !errors.Is(err, backup.ErrNotFound):
		return err
	}
	return nil
}

// newPlace refuses the original's own archive_command.
func newPlace(command, original string) error {
	if command != "" && strings.Join(strings.Fields(command), " ") == strings.Join(strings.Fields(original), " ") {
		return backup.Hint(fmt.Errorf("%w: --archive-command is the original's own, %q: two timelines of WAL would meet in one place", backup.ErrUsage, original), "archive to a new place")
	}
	return nil
}

type walPlace struct{ catalog, cluster string }

// pushPlace tells where a command with `cleancut wal push` writes to; nil for
// any other command, of which nothing is known.
func pushPlace(command, defaultCatalog, defaultCluster string) (*walPlace, error) {
	var words []string
	for w := range strings.FieldsSeq(command) {
		words = append(words, strings.Trim(w, `'"`))
	}
	at := slices.Index(words, "wal")
	if at < 0 || !slices.Contains(words[at:], "push") || !slices.ContainsFunc(words, func(w string) bool { return filepath.Base(w) == "cleancut" }) {
		return nil, nil
	}
	p := walPlace{}
	value := func(i int, flag, variable string) (string, bool) {
		if v, ok := strings.CutPrefix(words[i], flag+"="); ok {
			return v, true
		}
		if words[i] == flag && i+1 < len(words) {
			return words[i+1], true
		}
		return strings.CutPrefix(words[i], variable+"=")
	}
	otherConfig := false
	for i := range words {
		if v, ok := value(i, "--catalog", "CLEANCUT_CATALOG"); ok {
			p.catalog = v
		}
		if v, ok := value(i, "--cluster", "CLEANCUT_CLUSTER"); ok {
			p.cluster = v
		}
		_, ok := value(i, "--config", "CLEANCUT_CONFIG")
		otherConfig = otherConfig || ok
	}
	if otherConfig && (p.catalog == "" || p.cluster == "") {
		return nil, backup.Hint(fmt.Errorf("%w: where --archive-command writes to is said in another configuration file", backup.ErrUsage), "name --catalog and --cluster in it")
	}
	if p.catalog == "" {
		p.catalog = defaultCatalog
	}
	if p.cluster == "" {
		p.cluster = defaultCluster
	}
	return &p, nil
}

// sameCatalog compares two URLs of catalogs; folders by where they lead.
func sameCatalog(a, b string) bool {
	real := func(url string) string {
		dir, isFile := strings.CutPrefix(url, "file://")
		if !isFile && !filepath.IsAbs(url) {
			return strings.TrimSuffix(url, "/")
		}
		if r, err := filepath.EvalSymlinks(dir); err == nil {
			return r
		}
		return filepath.Clean(dir)
	}
	return real(a) == real(b)
}

// notInService reads the ledger of a copy anew, under its lock: since it was
// read before, the copy may have become production.
func (f *Flow) notInService(id backup.ID) error {
	copies, err := f.State.Copies()
	i := slices.IndexFunc(copies, func(c backup.Copy) bool { return c.ID == id })
	switch {
	case i >= 0:
		return restore.NotInService(copies[i])
	case err != nil: // perhaps it is the ledger that cannot be read
		return err
	}
	return nil // volumes without one
}
