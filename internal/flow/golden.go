package flow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow/cut"
	"cleancut/internal/flow/restore"
	"cleancut/internal/flow/verify"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// Golden returns the golden image of a backup: the one that there is, or a new
// one. Copies of it start without recovery.
//
//	verdict → Restore → checks → clean stop → isolation taken back → unmount → cut while nothing is mounted → Undo
//
// A backup without a good verdict of level full is verified first, on a copy of
// its own: pg_amcheck and VACUUM write into what they check, which must not be in
// the image. Damage is an error that wraps backup.ErrDamage, and no image is made.
//
// There is never more than one image of a backup. Whoever asks while another
// process of this host makes it waits for that; where another host does, or was
// interrupted, the error wraps backup.ErrInUse. On an error, and when ctx ends,
// nothing new is left, or the error wraps backup.ErrLeft. The golden image of a
// golden image is itself.
func (f *Flow) Golden(ctx context.Context, id backup.ID) (backup.ID, error) {
	of, err := f.Catalog.Backup(ctx, id)
	if err != nil {
		return "", err
	}
	if of.Manifest.Golden != nil {
		return id, nil
	}
	golden := backup.GoldenID(id, of.Digest)
	release, err := f.awaitLock(ctx, "golden-"+string(golden))
	if err != nil {
		return "", err
	}
	defer release()
	there, err := f.goldenThere(ctx, of, golden)
	if err != nil {
		return "", err
	}
	if !there {
		if err := f.prove(ctx, of); err != nil {
			return "", err
		}
		if err := f.makeGolden(ctx, of, golden); err != nil {
			return "", fmt.Errorf("golden image of backup %s: %w", id, err)
		}
	}
	return golden, nil
}

// awaitLock takes a lock as soon as nobody has it.
func (f *Flow) awaitLock(ctx context.Context, name string) (release func(), err error) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for told := false; ; told = true {
		if release, err = f.State.Lock(name); !errors.Is(err, backup.ErrInUse) {
			return release, err
		}
		if !told {
			f.tell("wait", "another cleancut has "+name)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), err)
		}
	}
}

// goldenThere: the image can be used. One whose snapshots were deleted behind
// cleancut's back is removed, so that it is made anew.
func (f *Flow) goldenThere(ctx context.Context, of catalog.Entry, golden backup.ID) (bool, error) {
	intents, err := f.Catalog.Intents(ctx)
	if err != nil {
		return false, err
	}
	if i := slices.IndexFunc(intents, func(i backup.Intent) bool { return i.ID == golden }); i >= 0 {
		return false, goldenBegun(intents[i])
	}
	e, err := f.Catalog.Backup(ctx, golden)
	if errors.Is(err, backup.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if g := e.Manifest.Golden; g == nil || g.Of != of.ID || g.Digest != of.Digest {
		return false, fmt.Errorf("%s is no golden image of backup %s as it is now: %w", golden, of.ID, backup.ErrExists)
	}
	for _, e := range []catalog.Entry{of, e} {
		if verdictOf(e) == backup.Damaged {
			return false, backup.Hint(fmt.Errorf("backup %s was verified since its golden image was made, and has failed: %w", e.ID, backup.ErrDamage),
				"see `cleancut show "+string(e.ID)+"`; to make the image anew: `cleancut delete "+string(golden)+"` first")
		}
	}
	var ids []backup.SnapshotID
	for _, s := range e.Manifest.Snapshots {
		ids = append(ids, s.ID)
	}
	if _, err = f.Provider.Snapshots(ctx, ids); errors.Is(err, backup.ErrNotFound) {
		f.tell("golden", "its snapshots are gone, so it is made anew")
		return false, f.deleteBackup(ctx, golden)
	}
	return err == nil, err
}

func goldenBegun(i backup.Intent) error {
	return backup.Hint(fmt.Errorf("golden image %s: %s: %w", i.ID, begun(i), backup.ErrInUse), "wait for it, or run `cleancut sweep` on host "+i.Host)
}

// prove verifies the backup unless its newest verdict is good and of level full.
func (f *Flow) prove(ctx context.Context, of catalog.Entry) error {
	if n := len(of.Verdicts); n > 0 && of.VerdictErr == nil {
		if v := of.Verdicts[n-1]; v.Good() && v.Level == backup.LevelFull && v.Target == "" {
			return nil
		}
	}
	f.tell("verify", "level full, for the golden image")
	_, err := f.Verify(ctx, VerifyOptions{ID: of.ID, Level: backup.LevelFull})
	return err
}

func (f *Flow) makeGolden(ctx context.Context, of catalog.Entry, golden backup.ID) (err error) {
	r, release, err := f.Restore(ctx, RestoreOptions{ID: of.ID, Purpose: backup.ForGolden})
	if errors.Is(err, restore.ErrNoStart) && !errors.Is(err, backup.ErrLeft) && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", backup.ErrDamage, err)
	}
	if err != nil {
		return err
	}
	defer release()
	defer func() { err = errors.Join(err, f.undoCopy(ctx, r.Copy)) }()
	m, lsn, err := f.settle(ctx, of, r)
	if err != nil {
		return err
	}
	m.ID = golden
	writable, err := f.holdStill(ctx, r.Copy)
	if err != nil {
		return err
	}
	defer writable()
	return f.cutGolden(ctx, m, lsn)
}

// settle checks a recovered copy, shuts it down and makes its image what
// production's would be. It leaves the filesystems unmounted and returns the
// manifest of the image, but for its ID and its cut, and the position of the
// shutdown.
func (f *Flow) settle(ctx context.Context, of catalog.Entry, r Restored) (m backup.Manifest, lsn backup.LSN, err error) {
	tell := func(check string) { f.tell("check", check) }
	v, err := verify.Run(ctx, verify.Options{Copy: r.Copy, Manifest: r.Manifest, Instance: r.Instance, Installation: r.Installation, Level: backup.LevelFull, Image: true, Progress: tell})
	if err == nil {
		err = allPassed(v, r.Manifest.Server)
	}
	if err != nil {
		return m, 0, err
	}
	control, err := postgres.ReadControl(filepath.Join(r.Copy.DataDirectory, "global", "pg_control"))
	if err != nil {
		return m, 0, err
	}
	// It refuses a server that was not stopped cleanly.
	if _, err := postgres.Reinstate(ctx, r.Copy.Root, r.Copy.DataDirectory); err != nil {
		return m, 0, err
	}
	m = r.Manifest
	m.Version, m.Tool, m.Host, m.Created = backup.ManifestVersion, f.Tool, f.Host, time.Now().UTC()
	m.Bracket, m.SideFiles, m.Topology.NotCovered, m.Server.Timeline = nil, nil, nil, control.TimeLine
	if m.Topology.Filesystems, err = f.onDisk(ctx, m.Topology, r.Copy); err != nil {
		return m, 0, err
	}
	v.Checks = append(v.Checks, verify.Filesystems(ctx, r.Copy, tell)...)
	if err := errors.Join(ctx.Err(), allPassed(v, m.Server)); err != nil {
		return m, 0, err
	}
	m.Golden = &backup.Golden{Of: of.ID, Digest: of.Digest, Checks: v.Checks}
	return m, backup.LSN(control.CheckpointLSN), nil
}

// allPassed: what could not be checked is no image to make others of, either.
func allPassed(v backup.Verdict, s backup.Server) error {
	if !v.Good() {
		return fmt.Errorf("%w: %s", backup.ErrDamage, failed(v))
	}
	for _, c := range v.Checks {
		if c.Result != backup.Passed && (c.Name != backup.CheckChecksums || s.DataChecksums) {
			return fmt.Errorf("%s %s: %s", c.Name, c.Result, c.Detail)
		}
	}
	return nil
}

// onDisk describes the filesystems of a copy as they are now, at the places of
// the original.
func (f *Flow) onDisk(ctx context.Context, t backup.Topology, c backup.Copy) ([]backup.Filesystem, error) {
	out := slices.Clone(t.Filesystems)
	for i := range out {
		fs := &out[i]
		id, err := host.Identify(ctx, c.Filesystems[i].Device)
		if err != nil {
			return nil, err
		}
		if fs.Device, err = host.TreeOf(ctx, c.Filesystems[i].Device, f.Provider.Resolve); err != nil {
			return nil, fmt.Errorf("device of %s: %w", c.Filesystems[i].Mountpoint, err)
		}
		fs.Type, fs.UUID, fs.Label, fs.Size = id.Type, id.UUID, id.Label, fs.Device.Size
	}
	return out, nil
}

// holdStill takes down all that stands on the volumes of a copy and keeps it
// down, with everything written, until release is called.
func (f *Flow) holdStill(ctx context.Context, c backup.Copy) (release func(), err error) {
	var devices []string
	for _, v := range c.Volumes {
		devices = append(devices, v.Device)
	}
	for range 3 { // udev may bring an array or a group up once more
		if err := host.Release(ctx, devices); err != nil {
			return nil, err
		}
		if release, err = host.HoldStill(ctx, devices); !errors.Is(err, backup.ErrInUse) {
			return release, err
		}
	}
	return nil, err
}

// cutGolden snapshots the volumes of a manifest's topology and makes a backup of
// them in the catalog.
func (f *Flow) cutGolden(ctx context.Context, m backup.Manifest, lsn backup.LSN) (err error) {
	release, err := f.awaitLock(ctx, lockBackup(f.Cluster))
	if err != nil {
		return err
	}
	defer release()
	intent := backup.Intent{ID: m.ID, Cluster: f.Cluster, Host: f.Host, PID: os.Getpid(), Started: time.Now().UTC(), Golden: m.Golden.Of,
		Tags: backup.Tags{backup.TagBackup: string(m.ID), backup.TagCluster: f.Cluster}}
	err = f.Catalog.PutIntent(ctx, intent)
	if errors.Is(err, backup.ErrExists) {
		return backup.Hint(fmt.Errorf("another host makes it just now, or that was interrupted: %w: %w", backup.ErrInUse, err), "see `cleancut list`; `cleancut sweep` there ends what was interrupted")
	}
	if err == nil { // another host may have made it since the first look
		if _, err = f.Catalog.Backup(ctx, m.ID); errors.Is(err, backup.ErrNotFound) {
			err = nil
		} else if err == nil {
			return f.Catalog.EndIntent(ctx, m.ID)
		}
	}
	if err != nil { // nothing is made yet
		undo, cancel := undoing(ctx)
		defer cancel()
		return errors.Join(err, f.Catalog.EndIntent(undo, m.ID))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.undoBackup(ctx, intent))
		}
	}()
	f.tell("cut", fmt.Sprintf("%d volumes, nothing is mounted", len(m.Topology.Members())))
	res, err := cut.Run(ctx, f.Provider, cut.Options{ID: m.ID, Cluster: f.Cluster, Topology: m.Topology, Mode: backup.ModeStill,
		FlushedLSN: func(context.Context) (backup.LSN, error) { return lsn, nil }})
	if err != nil {
		return err
	}
	m.Cut, m.Snapshots = res.Cut, res.Snapshots
	return f.finishBackup(ctx, m)
}

// refuseGolden refuses what a golden image cannot be: it stands alone, since the
// WAL it goes on with is not production's.
func refuseGolden(m backup.Manifest, o RestoreOptions) error {
	what := ""
	switch {
	case m.Golden == nil:
	case o.production != nil:
		what = "does not take production's place"
	case o.standby != nil:
		what = "follows no primary"
	case o.Target.Kind != "" && o.Target.Kind != backup.TargetEnd:
		what = "is recovered to no target but its own end"
	}
	if what == "" {
		return nil
	}
	return backup.Hint(fmt.Errorf("%w: %s is the golden image of backup %s: it %s: %w", backup.ErrUsage, m.ID, m.Golden.Of, what, backup.ErrUnsupported),
		"use that backup: `cleancut show "+string(m.Golden.Of)+"`")
}
