// Package flow is the program on a few pages: each thing cleancut does, as the
// list of its steps.
//
//	Backup:  lock → discover → intent → cut → manifest → complete
//	Restore: manifest → ledger → volumes → devices → mount → recover
//	Verify, Dump: Restore → checks or dump → Undo
//	Golden: Restore → checks → stop → intent → cut → manifest → complete → Undo
//	Delete, Sweep: plan → apply
//
// What always holds: an intent or a ledger is written before the first thing
// is made, and whatever fails or is interrupted is undone on the spot; what
// that cannot remove is named in an error that wraps backup.ErrLeft.
package flow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow/cut"
	"cleancut/internal/flow/discover"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
	"cleancut/internal/state"
)

// Flow holds the machines that the steps touch. All fields but Progress and
// Now are needed; Catalog and Provider may be nil for flows that do not use them.
type Flow struct {
	Provider provider.Provider
	Catalog  *catalog.Catalog
	State    *state.Dir
	Cluster  string
	Host     string   // name of this host
	Tool     string   // version of cleancut
	Watchdog []string // command that runs host.Watch
	Program  string   // path of cleancut, which a copy's restore_command runs
	BinDirs  []string // where to look for PostgreSQL's programs first
	Log      *slog.Logger
	Progress func(phase, detail string) // what a person is told; may be nil
	Now      func() time.Time           // the clock of leases, and of nothing else; nil: time.Now
}

func (f *Flow) tell(phase, detail string) {
	if f.Progress != nil {
		f.Progress(phase, detail)
	}
	f.Log.Debug(phase, "detail", detail)
}

// undoTime is how long an undo may take after its cause was cancelled.
const undoTime = 5 * time.Minute

// undoing gives an undo a context of its own: it must run to its end even
// though the user pressed ^C.
func undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

// BackupOptions says how to back up.
type BackupOptions struct {
	Target   postgres.Target
	Mode     backup.Mode
	Deadline time.Duration
	Quick    time.Duration
	Rounds   int
	Skew     time.Duration // drill only, with ModeNone, ModeFreeze or ModeBracketed
	Backward bool          // drill only, with Skew: the last member or filesystem is cut first
	// FastCheckpoint lets backup mode begin at once, by a checkpoint that takes
	// all the I/O it can get; without it the checkpoint is spread. Only ModeBracketed.
	FastCheckpoint bool
	AllowForeign   bool
	AllowNoFPW     bool
	KeepAway       []string // files and folders that must not lie on a frozen filesystem, beside the state folder
	BeforeFreeze   func(ctx context.Context) error
}

// Discover looks at a running cluster.
func (f *Flow) Discover(ctx context.Context, o BackupOptions) (postgres.Running, backup.Topology, error) {
	conn, err := postgres.Connect(ctx, o.Target)
	if err != nil {
		return postgres.Running{}, backup.Topology{}, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	running, err := postgres.Inspect(ctx, conn)
	if err != nil {
		return running, backup.Topology{}, err
	}
	topology, err := discover.Run(ctx, discover.Options{Server: running, Resolve: f.Provider.Resolve, AllowForeign: o.AllowForeign})
	return running, topology, err
}

// Backup makes one backup and returns its manifest. On any error, and when ctx
// ends, nothing of it is left, or the error wraps backup.ErrLeft.
func (f *Flow) Backup(ctx context.Context, o BackupOptions) (m backup.Manifest, err error) {
	release, err := f.State.Lock(lockBackup(f.Cluster))
	if err != nil {
		return m, backup.Hint(fmt.Errorf("another backup of cluster %s is running on this host: %w", f.Cluster, err), "wait for it, or look for it with `ps`")
	}
	defer release()
	conn, err := postgres.Connect(ctx, o.Target)
	if err != nil {
		return m, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	f.tell("discover", "")
	running, err := postgres.Inspect(ctx, conn)
	if err != nil {
		return m, err
	}
	notes, err := preflight(running, o)
	if err != nil {
		return m, err
	}
	topology, err := discover.Run(ctx, discover.Options{Server: running, Resolve: f.Provider.Resolve, AllowForeign: o.AllowForeign})
	if err != nil {
		return m, err
	}
	if err := f.keepAway(topology, o.KeepAway); err != nil {
		return m, err
	}
	now := time.Now().UTC()
	m = backup.Manifest{Version: backup.ManifestVersion, ID: backup.NewID(now), Cluster: f.Cluster, Tool: f.Tool, Host: f.Host, Created: now,
		Server: running.Server, Topology: topology}
	m.Server.Notes = notes // Preflight repeats what Inspect noted
	intent := backup.Intent{ID: m.ID, Cluster: f.Cluster, Host: f.Host, PID: os.Getpid(), Started: now, Tags: backup.Tags{backup.TagBackup: string(m.ID), backup.TagCluster: f.Cluster}}
	for _, fs := range topology.Filesystems {
		intent.Mounts = append(intent.Mounts, fs.Mountpoint)
	}
	if err := f.State.RecordFreeze(intent.Mounts); err != nil {
		return m, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.undoBackup(ctx, intent))
		}
	}()
	if err := f.Catalog.PutIntent(ctx, intent); err != nil {
		return m, err
	}
	if m.SideFiles, err = f.keepSideFiles(ctx, m.ID, topology.NotCovered); err != nil {
		return m, err
	}
	take := func() error {
		f.tell("cut", fmt.Sprintf("%d volumes, %d filesystems", len(topology.Members()), len(topology.Filesystems)))
		res, err := cut.Run(ctx, f.Provider, cut.Options{ID: m.ID, Cluster: f.Cluster, Topology: topology, Mode: o.Mode, Skew: o.Skew, Backward: o.Backward, Deadline: o.Deadline,
			Quick: o.Quick, Rounds: o.Rounds, Watchdog: f.Watchdog, BeforeFreeze: o.BeforeFreeze,
			FlushedLSN: func(ctx context.Context) (backup.LSN, error) { return postgres.FlushedRecordEnd(ctx, conn) }})
		m.Cut, m.Snapshots = res.Cut, res.Snapshots
		return err
	}
	if o.Mode == backup.ModeBracketed {
		err = f.bracketed(ctx, o, &m, take)
	} else {
		err = take()
	}
	if err != nil {
		return m, err
	}
	return m, f.finishBackup(ctx, m)
}

// finishBackup writes the two facts: the manifest after the thaw, and
// complete.json when every snapshot is durable.
func (f *Flow) finishBackup(ctx context.Context, m backup.Manifest) error {
	f.tell("manifest", "")
	digest, err := f.Catalog.PutManifest(ctx, m)
	if err != nil {
		return err
	}
	return f.completeBackup(ctx, m, digest)
}

// completeBackup may be called again after a crash.
func (f *Flow) completeBackup(ctx context.Context, m backup.Manifest, digest string) error {
	f.tell("complete", "waiting for the snapshots")
	described := f.describe(m, digest)
	for _, members := range cuts(m) {
		var ids []backup.SnapshotID
		var tags []backup.Tags
		for i, s := range m.Snapshots {
			if slices.ContainsFunc(members, func(of backup.Member) bool { return of.Index == s.Member }) {
				ids, tags = append(ids, s.ID), append(tags, described[i])
			}
		}
		if err := f.Provider.Complete(ctx, ids, tags); err != nil {
			return fmt.Errorf("complete the snapshots: %w", err)
		}
	}
	if err := f.Catalog.PutComplete(ctx, backup.Complete{ID: m.ID, Digest: digest, Completed: time.Now().UTC()}); err != nil {
		return err
	}
	return f.Catalog.EndIntent(ctx, m.ID)
}

// cuts lists what was cut at one instant each, as the provider knows it: all
// members, or in backup mode those of one unit of filesystems after the other.
func cuts(m backup.Manifest) (out [][]backup.Member) {
	if m.Bracket == nil {
		return [][]backup.Member{m.Topology.Members()}
	}
	for _, filesystems := range m.Topology.Units() {
		out = append(out, m.Topology.MembersOf(filesystems))
	}
	return out
}

// undoBackup removes whatever a backup has made so far: found by its tags, not
// by what we remember of it.
func (f *Flow) undoBackup(ctx context.Context, i backup.Intent) error {
	ctx, cancel := undoing(ctx)
	defer cancel()
	if err := f.removeBackup(ctx, i); err != nil {
		return fmt.Errorf("backup %s: %w: %w", i.ID, backup.ErrLeft, err)
	}
	return nil
}

// removeBackup takes a backup away for good: first the fact that it is
// complete, then its snapshots as a whole set, then its records, then the
// intent. It can be run again from any point.
func (f *Flow) removeBackup(ctx context.Context, i backup.Intent) error {
	if err := f.Catalog.Retract(ctx, i.ID); err != nil {
		return err
	}
	owner := backup.Tags{backup.TagBackup: string(i.ID), backup.TagCluster: f.Cluster}
	inv, err := f.Provider.List(ctx, owner)
	if err != nil {
		return err
	}
	var ids []backup.SnapshotID
	for _, s := range inv.Snapshots {
		ids = append(ids, s.ID)
	}
	if len(ids) > 0 {
		if err := f.Provider.DeleteSnapshots(ctx, ids, owner); err != nil {
			return err
		}
	}
	if err := f.Catalog.Remove(ctx, i.ID); err != nil {
		return err
	}
	if err := os.RemoveAll(f.captureDir(i.ID)); err != nil { // of a process that was killed
		return fmt.Errorf("received WAL: %w", err)
	}
	return f.Catalog.EndIntent(ctx, i.ID)
}

// preflight refuses what could not be recovered and returns what is worth
// telling.
func preflight(r postgres.Running, o BackupOptions) (notes []string, err error) {
	findings := postgres.Preflight(r, postgres.Allow{NoFullPageWrites: o.AllowNoFPW, Standby: o.Mode == backup.ModeBracketed})
	for _, finding := range findings {
		if !finding.Refuse {
			notes = append(notes, finding.Text)
		}
	}
	return notes, postgres.Refused(findings)
}

// keepAway refuses to freeze a filesystem that cleancut itself writes to: the
// backup would wait for itself.
func (f *Flow) keepAway(t backup.Topology, paths []string) error {
	for _, path := range append([]string{f.State.Path()}, paths...) {
		if path == "" {
			continue
		}
		m, err := host.MountOf(path)
		for above := path; errors.Is(err, os.ErrNotExist) && above != filepath.Dir(above); { // it is going to be made
			above = filepath.Dir(above)
			m, err = host.MountOf(above)
		}
		if err != nil {
			return err
		}
		for _, fs := range t.Filesystems {
			if m.Mountpoint == fs.Mountpoint {
				return backup.Hint(fmt.Errorf("%s lies on %s, which is going to be frozen: %w", path, fs.Mountpoint, backup.ErrUsage),
					"put catalog, state and pool on another filesystem")
			}
		}
	}
	return nil
}

// keepSideFiles copies the cluster's files that no volume of it holds into
// the catalog.
func (f *Flow) keepSideFiles(ctx context.Context, id backup.ID, paths []string) ([]backup.SideFile, error) {
	var out []backup.SideFile
	for n, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			return out, fmt.Errorf("keep %s beside the manifest: %w", path, err)
		}
		side, err := f.Catalog.PutSideFile(ctx, id, n, path, content)
		if err == nil {
			err = ownership(&side)
		}
		if err != nil {
			return out, err
		}
		out = append(out, side)
	}
	return out, nil
}

// ownership notes the permissions and the owner of a side file.
func ownership(f *backup.SideFile) error {
	info, err := os.Stat(f.Path)
	if err != nil {
		return fmt.Errorf("keep %s beside the manifest: %w", f.Path, err)
	}
	f.Mode = fmt.Sprintf("%04o", info.Mode().Perm())
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.UID, f.GID = st.Uid, st.Gid
	}
	return nil
}

func lockBackup(cluster string) string { return "backup-" + cluster }
func lockCopy(id backup.ID) string     { return "copy-" + string(id) }
