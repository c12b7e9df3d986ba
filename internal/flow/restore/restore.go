// Package restore makes a running, isolated copy of a cluster from a manifest
// and its snapshots.
//
//	manifest → snapshots checked → volumes → attach → assemble → identity checked → mount → Prepare → Start = running copy
//
// What always holds: the ledger is saved before each kind of effect; Undo
// removes everything, also after a crash at any point; every device is proved
// to be the wanted one by what is on it before it is mounted; the original is
// neither needed nor touched.
package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// ErrNoStart: the volumes of the copy stand, and the image itself kept them
// from being mounted or the server from recovering.
var ErrNoStart = errors.New("the image does not come up")

// What kept it from coming up lies below the server: each wraps ErrNoStart.
var (
	errNoMount    = fmt.Errorf("%w: it does not mount", ErrNoStart)
	errUnreadable = fmt.Errorf("%w: its filesystem is damaged", ErrNoStart)
)

// Blamed names the check that an error of Run, which wraps ErrNoStart, failed.
func Blamed(err error) string {
	switch {
	case errors.Is(err, errNoMount):
		return backup.CheckMounted
	case errors.Is(err, errUnreadable):
		return backup.CheckReadable
	}
	return backup.CheckRecovered
}

// Provider is the part of provider.Provider that a restore needs.
type Provider interface {
	Snapshots(ctx context.Context, ids []backup.SnapshotID) ([]provider.Snapshot, error)
	CreateVolume(ctx context.Context, spec provider.VolumeSpec) (backup.Volume, error)
	Attach(ctx context.Context, id backup.VolumeID) (string, error)
	Detach(ctx context.Context, id backup.VolumeID) error
	DeleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error
	List(ctx context.Context, match backup.Tags) (provider.Inventory, error)
}

// Options says what to make a copy of.
type Options struct {
	Manifest     backup.Manifest
	Digest       string      // of the stored manifest; every snapshot must carry it
	Copy         backup.Copy // ID, Backup, Cluster, Host, Purpose and Root are set
	Installation postgres.Installation
	// Segment opens a WAL file of a bracketed backup.
	Segment  func(ctx context.Context, name string) (io.ReadCloser, error)
	Archive  *Archive          // nil: recovery needs nothing beyond the backup
	Standby  *Standby          // nil: none; never together with Archive
	Settings map[string]string // more for the copy's server, beating all others; may be nil
	// Listen is the ADDRESS:PORT that the copy's gate is going to be opened at;
	// "": none. Program is cleancut itself, which plays it.
	Listen  string
	Program string
	// NewTimeline lets recovery end on a timeline of its own in any case, also
	// of an atomic cut without an archive.
	NewTimeline bool
	// Finish runs when the server is up and before the copy is ready; an error
	// of it is one of Run. nil: nothing is left to do.
	Finish   func(ctx context.Context, i *postgres.Instance, c *backup.Copy) error
	Save     func(backup.Copy) error // writes the ledger
	Progress func(phase, detail string)
}

// Archive is the recovery beyond a backup.
type Archive struct {
	Settings map[string]string          // the target
	Command  func(socket string) string // restore_command
	// Serve begins to answer restore_command for a copy's server, whose files
	// have that owner. What stop returns made restore_command fail.
	Serve func(ctx context.Context, socket string, uid, gid uint32) (stop func() error, err error)
}

// Run makes the copy and returns it with its ledger. On an error the caller
// calls Undo with the returned ledger, which holds what was made so far. An
// error that wraps ErrNoStart says that the image itself is at fault; where
// this host cannot run it the error does not.
func Run(ctx context.Context, p Provider, o Options) (backup.Copy, *postgres.Instance, error) {
	c, m := o.Copy, o.Manifest
	o.Progress("snapshots", fmt.Sprintf("%d, checking", len(m.Snapshots)))
	if err := checkSnapshots(ctx, p, m, o.Digest); err != nil {
		return c, nil, err
	}
	if o.Standby != nil {
		o.Progress("slot", c.Standby.Slot)
		if err := o.Standby.Hold(ctx); err != nil {
			return c, nil, err
		}
	}
	o.Progress("volumes", "create and attach")
	err := attachVolumes(ctx, p, m, &c)
	if err := errors.Join(err, o.Save(c)); err != nil {
		return c, nil, err
	}
	o.Progress("devices", "assemble")
	err = assemble(ctx, m, &c)
	if err := errors.Join(err, o.Save(c)); err != nil {
		return c, nil, err
	}
	o.Progress("mount", c.Root)
	if err := mount(ctx, m, &c); err != nil {
		return c, nil, blameMount(ctx, err)
	}
	instance, err := recoverCopy(ctx, o, &c)
	if err != nil {
		return c, nil, err
	}
	if o.Finish != nil {
		if err := o.Finish(ctx, instance, &c); err != nil {
			return c, nil, err
		}
	}
	c.Ready = true
	return c, instance, o.Save(c)
}

// recoverCopy prepares the data directory and starts the server on it.
func recoverCopy(ctx context.Context, o Options, c *backup.Copy) (*postgres.Instance, error) {
	m := o.Manifest
	data, _ := m.Topology.Place(backup.PlaceData)
	c.DataDirectory = c.Path(data.Path)
	plan := postgres.Plan{Root: c.Root, Data: c.DataDirectory, Server: m.Server, Places: m.Topology.Places,
		Map:     func(original string) (string, bool) { return inCopy(*c, m.Topology, original) },
		Bracket: m.Bracket, Segment: o.Segment, Archive: o.Archive != nil || o.NewTimeline, Standby: o.Standby.ServerOf(*c)}
	if err := postgres.Prepare(ctx, plan); err != nil {
		return nil, blame(ctx, c.DataDirectory, err)
	}
	o.Progress("recover", m.Server.Version)
	instance, err := start(ctx, o, c)
	if err != nil {
		return nil, err
	}
	if instance.NetworkNote != "" {
		o.Progress("network", "NOT isolated, the copy's server shares the host's network: "+instance.NetworkNote)
	}
	if o.Standby == nil {
		tellPrepared(ctx, o, instance)
	}
	c.SocketDir, c.Port, c.Superuser = instance.SocketDir, instance.Port, instance.Superuser
	c.EndOfRecovery, c.FirstQuery = instance.EndOfRecovery, instance.FirstQuery.Seconds()
	c.Answered = time.Since(c.Created).Seconds()
	return instance, nil
}

// tellPrepared says which transactions are in doubt in the copy: they keep
// their locks, and whoever coordinates them settles those of production only.
func tellPrepared(ctx context.Context, o Options, i *postgres.Instance) {
	all, err := i.ListPrepared(ctx)
	if err != nil {
		o.Progress("prepared", "the transactions in doubt cannot be listed: "+err.Error())
	}
	if len(all) == 0 {
		return
	}
	names := make([]string, len(all))
	for k, p := range all {
		names[k] = fmt.Sprintf("%q of database %s", p.GID, p.Database)
	}
	o.Progress("prepared", fmt.Sprintf("%d transactions are in doubt and keep their locks (ROLLBACK PREPARED): %s", len(all), strings.Join(names, ", ")))
}

// start starts the server and serves it WAL until it is out of recovery. An
// archive that failed is not the image's fault.
func start(ctx context.Context, o Options, c *backup.Copy) (*postgres.Instance, error) {
	if o.Standby != nil {
		return Follow(ctx, o, *c)
	}
	copied := postgres.Copy{Root: c.Root, Data: c.DataDirectory, Server: o.Manifest.Server, Installation: o.Installation,
		Networked: o.Copy.Purpose == backup.ForProduction, Listen: o.Listen, Program: o.Program}
	if o.Archive == nil {
		copied.Settings = with(recovery(o.Manifest, o.NewTimeline), o.Settings)
		instance, err := postgres.Start(ctx, copied)
		if err != nil {
			return nil, blame(ctx, c.DataDirectory, err)
		}
		return instance, nil
	}
	socket := walSocket(c.Root)
	copied.Settings = with(o.Archive.Settings, o.Settings)
	// Nobody asks the copy anything before it is out of recovery. A hot standby
	// would stop for ever where production raised max_connections or its like
	// (RecoveryRequiresIntParameter), and would look for the data of prepared
	// transactions in segments of the timeline before (xlog_redo of a shutdown
	// checkpoint, XlogReadTwoPhaseData), which recovery has under the next one's name.
	copied.Settings["hot_standby"] = "off"
	copied.Settings["restore_command"] = o.Archive.Command(socket)
	stop, err := o.Archive.Serve(ctx, socket, o.Manifest.Server.UID, o.Manifest.Server.GID)
	if err != nil {
		return nil, err
	}
	instance, err := postgres.Start(ctx, copied)
	served := stop()
	switch {
	case err == nil:
		return instance, nil // an archive that failed later, after the target, no longer matters
	case served != nil:
		return nil, fmt.Errorf("recovery stopped, because the archive failed: %w; %w", served, err)
	case unreached.MatchString(err.Error()):
		return nil, backup.Hint(fmt.Errorf("the WAL in the catalog does not hold the recovery target: %w: %w", backup.ErrNotFound, err),
			"see how far it reaches: cleancut wal list")
	case tooEarly.MatchString(err.Error()):
		return nil, backup.Hint(fmt.Errorf("the recovery target lies before the copy is consistent: %w: %w", backup.ErrNotFound, err),
			"a later target, or an earlier backup")
	case otherName.MatchString(err.Error()):
		return nil, backup.Hint(fmt.Errorf("PostgreSQL does not find the data of a prepared transaction: %w: %w", backup.ErrUnsupported, err),
			"the target lies just before the beginning of a timeline: recover along the one before, with --timeline")
	case notFetched.MatchString(err.Error()):
		return nil, fmt.Errorf("recovery stopped, because its restore_command failed: %w", err)
	}
	return nil, blame(ctx, c.DataDirectory, err)
}

// unreached is PostgreSQL's FATAL where all WAL was replayed and the target was
// not met (PerformWalRecovery; lc_messages is C): nothing is wrong with the image.
var unreached = regexp.MustCompile(`recovery ended before configured recovery target was reached`)

// tooEarly is the other FATAL of PerformWalRecovery: the target was met in the
// WAL that the image needs to become consistent.
var tooEarly = regexp.MustCompile(`requested recovery stop point is before consistent recovery point`)

// otherName are the FATALs of read_local_xlog_page and XlogReadTwoPhaseData where a transaction was
// prepared in the segment that a timeline begins in, and recovery ends in it
// before that: it has the segment under the new timeline's name and looks for
// it under that of the old one, which is not there or an old file.
var otherName = regexp.MustCompile(`requested WAL segment \S+ has already been removed|could not read two-phase state from WAL`)

// notFetched is the FATAL of RestoreArchivedFile (xlogarchive.c) where
// restore_command was ended by a signal or could not be run. The archive need
// not know: what it could not send is the other side's loss.
var notFetched = regexp.MustCompile(`could not restore file "[^"]*" from archive`)

// recovery is what the server is told about its recovery. Of an atomic cut it
// is crash recovery, to which nothing is to be said. Of a bracketed one it is
// archive recovery of the WAL that was kept with it, which ends where backup
// mode did: all of it is in pg_wal, and the "archive" never has a file. A
// target, "immediate" too, would need one record more. The timeline is the
// label's own: to follow another one, or to name it by number, takes a history
// file. The same gives an atomic cut a timeline of its own: its WAL is replayed
// first (InitWalRecovery), then none is found in the archive.
func recovery(m backup.Manifest, newTimeline bool) map[string]string {
	if m.Bracket == nil && !newTimeline {
		return nil
	}
	return map[string]string{"restore_command": "false", "recovery_target_timeline": "current", "hot_standby": "off"}
}

// blame wraps ErrNoStart around err where the image is at fault: its filesystem
// says that it is damaged, its control file cannot be read, or the server went
// as far as to begin recovery and then ended or let nobody in. It writes
// postmaster.opts, which Prepare removed, when all that
// concerns the host (libraries, memory, sockets) is behind it (postmaster.c,
// CreateOptsFile before StartupDataBase).
func blame(ctx context.Context, data string, err error) error {
	if ctx.Err() != nil {
		return err
	}
	// EFSCORRUPTED and EFSBADCRC of Linux' filesystems (fs/xfs/xfs_linux.h).
	if errors.Is(err, unix.EUCLEAN) || errors.Is(err, unix.EBADMSG) {
		return fmt.Errorf("%w: %w", errUnreadable, err)
	}
	_, control := postgres.ReadControl(filepath.Join(data, "global", "pg_control"))
	_, began := os.Stat(filepath.Join(data, "postmaster.opts"))
	if control != nil || began == nil && errors.Is(err, postgres.ErrNotUp) {
		return fmt.Errorf("%w: %w", ErrNoStart, err)
	}
	return err
}

// blameMount wraps errNoMount around err where mount(8) itself answered that
// the filesystem could not be mounted (its exit status 32): the devices were
// proved to be the right ones before.
func blameMount(ctx context.Context, err error) error {
	var exit *exec.ExitError
	if ctx.Err() == nil && errors.As(err, &exit) && exit.ExitCode() == 32 {
		return fmt.Errorf("%w: %w", errNoMount, err)
	}
	return err
}

// inCopy maps a path of the original into the copy, if one of the copy's
// filesystems holds it.
func inCopy(c backup.Copy, t backup.Topology, original string) (string, bool) {
	for _, fs := range t.Filesystems {
		if original == fs.Mountpoint || strings.HasPrefix(original, fs.Mountpoint+"/") {
			return c.Path(original), true
		}
	}
	return "", false
}

// with returns all settings; those of more beat the others.
func with(settings, more map[string]string) map[string]string {
	out := maps.Clone(settings)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, more)
	return out
}
