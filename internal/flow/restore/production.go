package restore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// StandOptions says what takes production's place.
type StandOptions struct {
	Manifest     backup.Manifest
	Copy         *backup.Copy // recovered and stopped; its Production says where the lines go
	Installation postgres.Installation
	Files        []SideContent
	Settings     map[string]string // beat the original's configuration
	// Refuse judges the original's archive_command, with all configuration in
	// its place.
	Refuse   func(original string) error
	Save     func(backup.Copy) error
	Progress func(phase, detail string)
}

// SideContent is a side file with its content.
type SideContent struct {
	backup.SideFile
	Content []byte
}

// Stood is a cluster in production's place, not running yet.
type Stood struct {
	Site   postgres.Site
	Slots  []string // replication slots that the original had and this one has not
	Alone  []string // side files that were not put over what is here, each with the reason
	Arrays bool     // lines were added to mdadm.conf
}

// Stand puts a recovered, cleanly stopped copy where the original was:
//
//	isolation taken back → unmounted → new filesystem UUIDs → mounted at the
//	original's mount points → configuration files → lines → settings
//
// What it makes on the host is in the ledger before it is made. It does not
// start the server. On an error the caller calls Undo.
func Stand(ctx context.Context, o StandOptions) (s Stood, err error) {
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"plan", func(context.Context) error { return s.plan(o) }},
		{"reinstate", func(ctx context.Context) error {
			r, err := postgres.Reinstate(ctx, o.Copy.Root, o.Copy.DataDirectory)
			s.Slots = r.Slots
			return err
		}},
		{"unmount", func(ctx context.Context) error { return unmount(ctx, *o.Copy) }},
		{"identity", func(ctx context.Context) error { return renew(ctx, o) }},
		{"mount", func(ctx context.Context) error { return mountOriginal(ctx, o) }},
		{"files", func(ctx context.Context) error { return placeFiles(ctx, o) }},
		{"lines", func(ctx context.Context) error { return s.addLines(ctx, o) }},
		{"settings", func(ctx context.Context) error { return s.settings(ctx, o) }},
		{"look", func(ctx context.Context) error { return s.look(ctx, o) }},
	}
	for _, step := range steps {
		if ctx.Err() != nil {
			return s, context.Cause(ctx)
		}
		o.Progress("production", step.name)
		if err := fault.Point(ctx, "production."+step.name); err != nil {
			return s, err
		}
		if err := step.do(ctx); err != nil {
			return s, fmt.Errorf("take production's place (%s): %w", step.name, err)
		}
		if err := fault.Point(ctx, "production."+step.name+".done"); err != nil {
			return s, err
		}
	}
	return s, nil
}

// ConfigFile is where the original's server found its configuration: "" in its
// data directory.
func ConfigFile(m backup.Manifest) string {
	config := m.Server.Settings["config_file"]
	if config == "" { // manifests before version 4
		for _, f := range m.SideFiles {
			if filepath.Base(f.Path) == "postgresql.conf" {
				config = f.Path
			}
		}
	}
	if config == filepath.Join(m.Server.DataDirectory, "postgresql.conf") {
		return ""
	}
	return config
}

// plan decides what is going to be made on the host, and writes it down.
func (s *Stood) plan(o StandOptions) error {
	c, p := o.Copy, o.Copy.Production
	data, _ := o.Manifest.Topology.Place(backup.PlaceData)
	s.Site = postgres.Site{Data: data.Path, Config: ConfigFile(o.Manifest), Installation: o.Installation}
	p.Files, p.Folders = nil, nil
	folder := func(dir string) {
		for _, missing := range host.MissingFolders(dir) {
			if !slices.Contains(p.Folders, missing) {
				p.Folders = append(p.Folders, missing)
			}
		}
	}
	for _, f := range o.Manifest.Topology.Filesystems {
		folder(f.Mountpoint)
	}
	for _, dir := range included(o.Files) {
		if _, held := inCopy(*c, o.Manifest.Topology, dir); !held {
			folder(dir)
		}
	}
	for _, f := range o.Files {
		if _, held := inCopy(*c, o.Manifest.Topology, f.Path); held {
			if _, err := os.Lstat(c.Path(f.Path)); err == nil {
				continue // it came with the volumes
			}
		} else {
			folder(filepath.Dir(f.Path))
		}
		now, err := os.ReadFile(f.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			p.Files = append(p.Files, backup.PlacedFile{Path: f.Path, SHA256: f.SHA256})
		case err != nil:
			return err
		case bytes.Equal(now, f.Content):
		case f.Path == o.Manifest.Server.Settings["ssl_cert_file"]:
			s.Alone = append(s.Alone, f.Path+": its private key is not in the backup, and the pair that is here belongs together")
		default:
			p.Files = append(p.Files, backup.PlacedFile{Path: f.Path, KeptAs: f.Path + ".before-" + string(c.ID), SHA256: f.SHA256})
		}
	}
	return o.Save(*c)
}

// unmount takes the copy's filesystems from its folder, inner ones first, and
// removes the folder.
func unmount(ctx context.Context, c backup.Copy) error {
	for _, i := range byDepth(c, true) {
		if err := host.Unmount(ctx, c.Filesystems[i].Mountpoint); err != nil {
			return err
		}
	}
	return removeFolders(c)
}

// byDepth orders the filesystems of a copy, outer ones first or inner ones.
func byDepth(c backup.Copy, innerFirst bool) []int {
	order := make([]int, len(c.Filesystems))
	for i := range order {
		order[i] = i
	}
	sort.SliceStable(order, func(a, b int) bool {
		la, lb := len(c.Filesystems[order[a]].Mountpoint), len(c.Filesystems[order[b]].Mountpoint)
		return innerFirst && la > lb || !innerFirst && la < lb
	})
	return order
}

// filesystemUUID is the filesystem's new identity, as copyUUID is the array's:
// fstab must not pick the original's volume if that turns up on this host.
func filesystemUUID(id backup.ID, original string) string {
	sum := sha256.Sum256([]byte("filesystem" + string(id) + original))
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // RFC 9562, version 8
	h := hex.EncodeToString(sum[:16])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func renew(ctx context.Context, o StandOptions) error {
	for i, f := range o.Manifest.Topology.Filesystems {
		if err := host.RenewFilesystem(ctx, f.Type, o.Copy.Filesystems[i].Device, filesystemUUID(o.Copy.ID, f.UUID)); err != nil {
			return err
		}
	}
	return nil
}

// options of the original's mount that a filesystem with an identity of its
// own needs.
func options(f backup.Filesystem) []string {
	return slices.DeleteFunc(slices.Clone(f.Options), func(o string) bool { return o == "nouuid" })
}

func mountOriginal(ctx context.Context, o StandOptions) error {
	for _, i := range byDepth(*o.Copy, false) {
		f := o.Manifest.Topology.Filesystems[i]
		if err := host.CheckVacant(f.Mountpoint); err != nil {
			return err
		}
		if err := host.MountDevice(ctx, o.Copy.Filesystems[i].Device, f.Mountpoint, f.Type, options(f)); err != nil {
			return err
		}
	}
	return nil
}

// included lists the folders whose files the configuration includes. The server
// does not start without them, and an empty one is among no side files.
func included(files []SideContent) []string {
	var out []string
	for _, f := range files {
		for _, dir := range postgres.SettingsIn(f.Content, "include_dir") {
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(filepath.Dir(f.Path), dir)
			}
			out = append(out, dir)
		}
	}
	return out
}

// makeFolder makes a folder for configuration, if it is missing, which then
// belongs to that owner.
func makeFolder(dir string, uid, gid int) error {
	if len(host.MissingFolders(dir)) == 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chown(dir, uid, gid)
}

// placeFiles puts the side files of the plan to their paths. What differs there
// is kept beside them.
func placeFiles(ctx context.Context, o StandOptions) error {
	for _, p := range o.Copy.Production.Files {
		i := slices.IndexFunc(o.Files, func(f SideContent) bool { return f.Path == p.Path })
		f := o.Files[i]
		mode, err := strconv.ParseUint(f.Mode, 8, 12)
		uid, gid := int(f.UID), int(f.GID)
		if f.Mode == "" { // manifests before version 4
			mode, uid, gid, err = 0o640, int(o.Manifest.Server.UID), int(o.Manifest.Server.GID), nil
		}
		if err != nil {
			return fmt.Errorf("mode of %s: %w", f.Path, err)
		}
		if err := makeFolder(filepath.Dir(f.Path), uid, gid); err != nil {
			return err
		}
		if p.KeptAs != "" {
			if err := os.Rename(p.Path, p.KeptAs); err != nil {
				return err
			}
		}
		if err := fault.Point(ctx, "production.file"); err != nil {
			return err
		}
		if err := host.PlaceFile(f.Path, f.Content, os.FileMode(mode), uid, gid); err != nil {
			return err
		}
	}
	for _, dir := range included(o.Files) {
		if err := makeFolder(dir, int(o.Manifest.Server.UID), int(o.Manifest.Server.GID)); err != nil {
			return err
		}
	}
	return nil
}

// addLines writes the lines that bring the storage back after a reboot, as
// storage create does: by the new identities alone.
func (s *Stood) addLines(ctx context.Context, o StandOptions) error {
	p := o.Copy.Production
	var arrays []struct{ name, line string }
	for i, f := range o.Manifest.Topology.Filesystems {
		found, err := arrayLines(ctx, f.Device, o.Copy)
		if err != nil {
			return err
		}
		for n, line := range found {
			name := lineName(o, i)
			if n > 0 {
				name += "-array-" + strconv.Itoa(n+1)
			}
			if !slices.ContainsFunc(arrays, func(a struct{ name, line string }) bool { return a.line == line }) {
				arrays = append(arrays, struct{ name, line string }{name, line})
				p.MdadmLines = append(p.MdadmLines, name)
			}
		}
		p.FstabLines = append(p.FstabLines, lineName(o, i))
	}
	s.Arrays = len(arrays) > 0
	if err := o.Save(*o.Copy); err != nil {
		return err
	}
	for _, a := range arrays {
		if err := host.AddLine(p.MdadmConf, a.name, a.line); err != nil {
			return err
		}
	}
	for _, i := range byDepth(*o.Copy, false) { // mount -a goes by their order
		f := o.Manifest.Topology.Filesystems[i]
		opts := append([]string{"defaults", "nofail"}, options(f)...)
		line := host.FstabLine(filesystemUUID(o.Copy.ID, f.UUID), f.Mountpoint, f.Type, opts)
		if err := host.AddLine(p.Fstab, lineName(o, i), line); err != nil {
			return err
		}
	}
	return nil
}

// lineName is the name of a filesystem's lines: that of its storage, and one of
// its own where it has none.
func lineName(o StandOptions, i int) string {
	p := o.Copy.Production
	if p.Storages[i] != "" {
		return p.Storages[i]
	}
	return p.Storages[0] + "-with-" + strconv.Itoa(i+1)
}

// arrayLines returns a line for every array of a device, the uppermost first.
func arrayLines(ctx context.Context, d backup.Device, c *backup.Copy) ([]string, error) {
	var out []string
	if d.Kind == backup.DeviceArray {
		uuid := copyUUID(c.ID, d.Array.UUID)
		dev, err := arrayDevice(ctx, uuid, c)
		if err != nil {
			return nil, err
		}
		out = append(out, fmt.Sprintf("ARRAY %s metadata=1.2 UUID=%s", dev, uuid))
	}
	for _, m := range d.Members {
		below, err := arrayLines(ctx, m, c)
		if err != nil {
			return nil, err
		}
		out = append(out, below...)
	}
	return out, nil
}

// arrayDevice finds the array with that UUID on the volumes of the copy.
func arrayDevice(ctx context.Context, uuid string, c *backup.Copy) (string, error) {
	var devices []string
	for _, v := range c.Volumes {
		devices = append(devices, v.Device)
	}
	arrays, err := host.ArraysOn(devices)
	if err != nil {
		return "", err
	}
	for _, a := range arrays {
		if now, err := host.ArrayUUID(ctx, a); err == nil && now == uuid {
			return a, nil
		}
	}
	return "", fmt.Errorf("array %s: %w", uuid, backup.ErrNotFound)
}

// settings compares with the original's own and puts the new ones over them.
func (s *Stood) settings(ctx context.Context, o StandOptions) error {
	original, err := s.Site.Effective(ctx, "archive_command")
	if err != nil {
		return backup.Hint(err, "the original's configuration does not work on this host: see what it names")
	}
	if err := o.Refuse(original); err != nil {
		return err
	}
	if err := postgres.Override(ctx, s.Site.Data, o.Settings); err != nil {
		return err
	}
	for name, want := range o.Settings {
		got, err := s.Site.Effective(ctx, name)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("setting %s would be %q in spite of postgresql.auto.conf, not %q: %w", name, got, want, backup.ErrUnsupported)
		}
	}
	return nil
}

// look sees that the server will find what its configuration names.
func (s *Stood) look(ctx context.Context, o StandOptions) error {
	value := map[string]string{}
	names := []string{"data_directory", "unix_socket_directories", "external_pid_file", "logging_collector", "log_directory", "ssl", "ssl_cert_file", "ssl_key_file"}
	for _, name := range names {
		var err error
		if value[name], err = s.Site.Effective(ctx, name); err != nil {
			return err
		}
	}
	var folders []string
	for dir := range strings.SplitSeq(value["unix_socket_directories"], ",") {
		folders = append(folders, strings.TrimSpace(dir))
	}
	if value["external_pid_file"] != "" {
		folders = append(folders, filepath.Dir(value["external_pid_file"]))
	}
	if value["logging_collector"] == "on" {
		folders = append(folders, value["log_directory"])
	}
	for _, dir := range folders {
		if !filepath.IsAbs(dir) {
			continue // below the data directory; no socket at all; an abstract one
		}
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return backup.Hint(fmt.Errorf("the server's configuration names the folder %s: %w on this host", dir, backup.ErrNotFound),
				fmt.Sprintf("make it: install -d -o %d -g %d %s", o.Manifest.Server.UID, o.Manifest.Server.GID, dir))
		}
	}
	if real, err := filepath.EvalSymlinks(value["data_directory"]); err != nil || real != s.Site.Data {
		return backup.Hint(fmt.Errorf("the server's configuration names the data directory %s, which does not lead to %s here: %w", value["data_directory"], s.Site.Data, backup.ErrNotFound),
			fmt.Sprintf("ln -s %s %s", s.Site.Data, value["data_directory"]))
	}
	if value["ssl"] == "on" {
		for _, name := range []string{"ssl_cert_file", "ssl_key_file"} {
			path := value[name]
			if !filepath.IsAbs(path) {
				path = filepath.Join(s.Site.Data, path)
			}
			if _, err := os.Stat(path); err != nil {
				return backup.Hint(fmt.Errorf("ssl is on, and %s %s: %w on this host", name, path, backup.ErrNotFound),
					"private keys are in no backup: put the key there with its certificate")
			}
		}
	}
	return nil
}

// withdraw takes away what Stand put on the host beside the volumes, which are
// gone by now. It may be called again.
func withdraw(c backup.Copy) error {
	p := c.Production
	if p == nil {
		return nil
	}
	var errs []error
	for _, name := range p.FstabLines {
		errs = append(errs, host.RemoveLine(p.Fstab, name))
	}
	for _, name := range p.MdadmLines {
		errs = append(errs, host.RemoveLine(p.MdadmConf, name))
	}
	for _, f := range slices.Backward(p.Files) {
		errs = append(errs, takeBack(f))
	}
	for _, dir := range slices.Backward(p.Folders) {
		errs = append(errs, host.RemoveEmpty(dir, dir))
	}
	return errors.Join(errs...)
}

// takeBack lets what had been there lie at a file's path again.
func takeBack(f backup.PlacedFile) error {
	if f.KeptAs != "" {
		if err := os.Rename(f.KeptAs, f.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	now, err := os.ReadFile(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if sum := sha256.Sum256(now); err != nil || hex.EncodeToString(sum[:]) != f.SHA256 {
		return err // somebody else's
	}
	return os.Remove(f.Path)
}
