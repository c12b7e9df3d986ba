package flow

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/archive"
	"cleancut/internal/flow/restore"
	"cleancut/internal/postgres"
	"cleancut/internal/wal"
)

// Recovery is how far a copy is to be recovered. The zero value is to the end
// of the backup itself.
type Recovery struct {
	Target backup.Target
	// Timeline to recover along: 0 is the newest that descends from the
	// backup's and that the catalog has.
	Timeline uint32
}

// planRecovery finds the way to the target and refuses, before anything is
// made, what the WAL in the catalog cannot reach; the error then tells what it
// can. nil: recovery needs nothing beyond the backup.
func (f *Flow) planRecovery(ctx context.Context, m backup.Manifest, r Recovery, inst postgres.Installation, id backup.ID) (*restore.Archive, error) {
	if !r.Target.Archived() {
		if r.Timeline != 0 {
			return nil, fmt.Errorf("%w: a timeline goes with a target in the shipped WAL", backup.ErrUsage)
		}
		return nil, nil
	}
	list, err := f.ListWAL(ctx)
	if err != nil {
		return nil, err
	}
	if list.System == nil {
		return nil, backup.Hint(fmt.Errorf("recovery to %s: the catalog has no WAL of cluster %s: %w", r.Target, f.Cluster, backup.ErrNotFound),
			"only --target end can be had: WAL is shipped by `cleancut wal stream`, or by wal push as archive_command")
	}
	if list.System.Identifier != m.Server.SystemIdentifier {
		return nil, fmt.Errorf("recovery to %s: the WAL in the catalog is of system %d, the backup of %d: %w", r.Target, list.System.Identifier, m.Server.SystemIdentifier, backup.ErrNotOurs)
	}
	way, err := r.way(m, list.reach(m), list.Since)
	if err != nil {
		return nil, err
	}
	if err := f.reachable(ctx, m, r, list, way, inst); err != nil {
		return nil, err
	}
	settings := r.Target.Settings()
	settings["recovery_target_timeline"] = strconv.FormatUint(uint64(way.Timeline), 10)
	return &restore.Archive{
		Settings: settings,
		Command: func(socket string) string {
			return strings.Join([]string{shellWord(f.Program), "wal", "fetch", "--from", shellWord(socket), "%f", `"%p"`}, " ")
		},
		Serve: f.serveWAL(*list.System, id, list.listed(m.Cut.FlushLSN)),
	}, nil
}

// serveWAL serves the WAL of the catalog to the server of that copy; planned is
// that of archive.ServeOptions.
func (f *Flow) serveWAL(system wal.System, id backup.ID, planned func(wal.File) bool) func(ctx context.Context, socket string, uid, gid uint32) (stop func() error, err error) {
	return func(ctx context.Context, socket string, uid, gid uint32) (func() error, error) {
		s, err := archive.Serve(ctx, archive.ServeOptions{WAL: f.Catalog.WAL(), System: system, Socket: socket, UID: uid, GID: gid,
			Spool: f.spool(id), Planned: planned})
		if err != nil {
			return nil, err
		}
		return s.Stop, nil
	}
}

// spool is where WAL lies that is served to that copy.
func (f *Flow) spool(id backup.ID) string {
	return filepath.Join(f.State.Path(), "wal-for-"+string(id))
}

// way chooses the timeline.
func (r Recovery) way(m backup.Manifest, reach WALReach, since *time.Time) (WALWay, error) {
	var known []string
	for _, w := range reach.Ways {
		known = append(known, strconv.FormatUint(uint64(w.Timeline), 10))
	}
	if len(reach.Ways) == 0 {
		hint := "see `cleancut wal list`; --target end needs no shipped WAL"
		if since != nil {
			hint = "every moment since " + since.UTC().Format(time.RFC3339Nano) + " can be recovered; " + hint
		}
		return WALWay{}, backup.Hint(fmt.Errorf("recovery of %s to %s: the catalog does not have the WAL that follows the backup's own, from %s on timeline %d: %w",
			m.ID, r.Target, reach.From, reach.Timeline, backup.ErrNotFound), hint)
	}
	if r.Timeline == 0 {
		return reach.Ways[len(reach.Ways)-1], nil
	}
	i := slices.IndexFunc(reach.Ways, func(w WALWay) bool { return uint32(w.Timeline) == r.Timeline })
	if i < 0 {
		return WALWay{}, backup.Hint(fmt.Errorf("recovery of %s on timeline %d: the WAL in the catalog leads from it along timeline %s: %w", m.ID, r.Timeline, strings.Join(known, ", "), backup.ErrNotFound),
			"without --timeline the newest of these is taken; a backup of another branch may lead there: see `cleancut wal list`")
	}
	return reach.Ways[i], nil
}

// reachable compares the target with where recovery may stop: not before the
// cut, in backup mode not before its end, and not beyond the WAL.
func (f *Flow) reachable(ctx context.Context, m backup.Manifest, r Recovery, list WALList, way WALWay, inst postgres.Installation) error {
	from, until := m.Cut.FlushLSN, way.To
	_, moment := m.Span()
	refuse := func(format string, a ...any) error {
		return backup.Hint(fmt.Errorf("recovery of %s to %s: "+format+": %w", append(append([]any{m.ID, r.Target}, a...), backup.ErrNotFound)...),
			fmt.Sprintf("it can be recovered from %s (%s) to %s on timeline %d; an earlier backup may reach what lies before", from, moment.UTC().Format(time.RFC3339Nano), until, way.Timeline))
	}
	switch r.Target.Kind { // what needs no look into the WAL
	case backup.TargetLatest:
		return nil
	case backup.TargetLSN:
		if r.Target.LSN < from {
			return refuse("recovery is not consistent before %s", from)
		}
		if r.Target.LSN > until {
			return refuse("the WAL in the catalog ends at %s", until)
		}
	case backup.TargetTime:
		if r.Target.Time.Before(moment) {
			return refuse("the backup was cut after that")
		}
	}
	tool, err := inst.Tool(ctx, "pg_waldump")
	if err != nil {
		if r.Target.Kind == backup.TargetTime {
			return err
		}
		f.Log.Warn("the target is not looked for before the copy is made: recovery itself will find it or not", "reason", err)
		return nil
	}
	f.tell("wal", "looking for "+r.Target.String())
	look, err := f.openWALDump(tool, list, way, wal.At(0, from, list.System.SegmentSize).Number)
	if err != nil {
		return err
	}
	defer look.Close()
	switch r.Target.Kind {
	case backup.TargetLSN:
		last, err := look.last(ctx)
		if err == nil && r.Target.LSN > last {
			err = refuse("the last record of the WAL in the catalog begins at %s, and recovery ends behind the first one at or after its target", last)
		}
		return err
	case backup.TargetTime:
		last, err := look.lastEnd(ctx)
		switch {
		case err != nil:
			return err
		case last.IsZero():
			return refuse("the WAL in the catalog holds no commit after the backup")
		case !r.Target.Time.Before(last):
			return refuse("the last commit in the catalog is of %s, so nothing shows that the WAL is complete up to then; --target latest takes all there is", last.Format(time.RFC3339Nano))
		}
		return nil
	}
	found, err := look.find(ctx, r.Target, from)
	if err == nil && !found {
		err = refuse("the WAL in the catalog does not hold it behind the backup")
	}
	return err
}

// shellWord quotes a path for restore_command, which a shell runs after
// PostgreSQL has replaced %f and %p in it.
func shellWord(path string) string {
	return "'" + strings.NewReplacer("'", `'\''`, "%", "%%").Replace(path) + "'"
}

// Nearest chooses the backup from which a moment is reached with the least
// WAL: the latest complete one that was cut before it.
func (f *Flow) Nearest(ctx context.Context, moment time.Time) (backup.ID, error) {
	entries, err := f.Catalog.Backups(ctx)
	if err != nil {
		return "", err
	}
	var best backup.ID
	var latest time.Time
	for _, e := range entries {
		if e.Err != nil || e.Complete.ID == "" || e.Manifest.Cut.Achieved == backup.Torn || e.Manifest.Golden != nil {
			continue
		}
		if _, cut := e.Manifest.Span(); !cut.After(moment) && cut.After(latest) {
			best, latest = e.ID, cut
		}
	}
	if best == "" {
		return "", backup.Hint(fmt.Errorf("no complete backup was cut before %s: %w", moment.UTC().Format(time.RFC3339Nano), backup.ErrNotFound), "see `cleancut list`")
	}
	return best, nil
}
