package flow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
// can. A target that only recovery itself can find (a name, a transaction) is
// not looked for. nil: recovery needs nothing beyond the backup.
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
	way, err := r.way(m, list.reach(m))
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
		Serve: f.serveWAL(*list.System, id),
	}, nil
}

// serveWAL serves the WAL of the catalog to the server of that copy.
func (f *Flow) serveWAL(system wal.System, id backup.ID) func(ctx context.Context, socket string, uid, gid uint32) (stop func() error, err error) {
	return func(ctx context.Context, socket string, uid, gid uint32) (func() error, error) {
		s, err := archive.Serve(ctx, archive.ServeOptions{WAL: f.Catalog.WAL(), System: system, Socket: socket, UID: uid, GID: gid,
			Spool: f.spool(id)})
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
func (r Recovery) way(m backup.Manifest, reach WALReach) (WALWay, error) {
	var known []string
	for _, w := range reach.Ways {
		known = append(known, strconv.FormatUint(uint64(w.Timeline), 10))
	}
	if len(reach.Ways) == 0 {
		return WALWay{}, backup.Hint(fmt.Errorf("recovery of %s to %s: the catalog does not have the WAL that follows the backup's own, from %s on timeline %d: %w",
			m.ID, r.Target, reach.From, reach.Timeline, backup.ErrNotFound), "see `cleancut wal list`; --target end needs no shipped WAL")
	}
	if r.Timeline == 0 {
		return reach.Ways[len(reach.Ways)-1], nil
	}
	i := slices.IndexFunc(reach.Ways, func(w WALWay) bool { return uint32(w.Timeline) == r.Timeline })
	if i < 0 {
		return WALWay{}, fmt.Errorf("recovery of %s on timeline %d: the WAL in the catalog leads from it along timeline %s: %w", m.ID, r.Timeline, strings.Join(known, ", "), backup.ErrNotFound)
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
	switch r.Target.Kind {
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
		last, err := f.lastCommit(ctx, list, way, wal.At(0, from, list.System.SegmentSize).Number, inst)
		if err != nil {
			return err
		}
		if last.IsZero() {
			return refuse("the WAL in the catalog holds no commit after the backup")
		}
		if !r.Target.Time.Before(last) {
			return refuse("the last commit in the catalog is of %s, so nothing shows that the WAL is complete up to then; --target latest takes all there is", last.Format(time.RFC3339Nano))
		}
	}
	return nil
}

var commitTime = regexp.MustCompile(`desc: (?:COMMIT|ABORT)(?:_PREPARED)? .*?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC`)

// lastCommit returns the time of the last commit in the WAL along a way, by
// pg_waldump over the last segments that have one; zero if none has. The first
// segment it may look at is that of recovery's begin.
func (f *Flow) lastCommit(ctx context.Context, list WALList, way WALWay, first uint64, inst postgres.Installation) (time.Time, error) {
	tool, err := inst.Tool(ctx, "pg_waldump")
	if err != nil {
		return time.Time{}, err
	}
	i := slices.IndexFunc(list.histories, func(h wal.History) bool { return h.Timeline == way.Timeline })
	size := list.System.SegmentSize
	dir, err := os.MkdirTemp(f.State.Path(), "waldump-")
	if err != nil {
		return time.Time{}, fmt.Errorf("look for the last commit: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // the state folder's own
	for number := wal.At(0, way.To-1, size).Number; number >= first; number-- {
		file := list.histories[i].Path(number, size).File(size)
		last, err := f.commitIn(ctx, tool, filepath.Join(dir, file.String()), file, *list.System)
		if err != nil || !last.IsZero() {
			return last, err
		}
	}
	return time.Time{}, nil
}

// commitIn returns the time of the last commit in one segment.
func (f *Flow) commitIn(ctx context.Context, tool, path string, file wal.File, system wal.System) (last time.Time, err error) {
	if err := archive.Fetch(ctx, archive.FetchOptions{WAL: f.Catalog.WAL(), System: system, File: file, To: path}); err != nil {
		return last, err
	}
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	cmd := exec.CommandContext(ctx, tool, "--rmgr=Transaction", path)
	cmd.Env = []string{"TZ=UTC", "LC_ALL=C"}
	out, err := cmd.Output() // ends with an error where the WAL does: in the last segment that is normal
	if ctx.Err() != nil {
		return last, context.Cause(ctx)
	}
	found := commitTime.FindAllSubmatch(out, -1)
	if len(found) == 0 {
		return last, nil
	}
	return time.Parse("2006-01-02 15:04:05.999999", string(found[len(found)-1][1]))
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
		if e.Err != nil || e.Complete.ID == "" || e.Manifest.Cut.Achieved == backup.Torn {
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
