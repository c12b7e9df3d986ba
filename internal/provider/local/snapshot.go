package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// Complete fsyncs the clones and their folder, without which a power cut takes
// them away (lab.md), and marks them completed. The contract is
// provider.Provider's.
func (p *Pool) Complete(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("complete: %w", err)
	}
	if len(tags) != len(ids) {
		return fmt.Errorf("complete: tags for %d of %d snapshots: %w", len(tags), len(ids), backup.ErrUsage)
	}
	for _, id := range ids {
		if err := p.persist(ctx, id); err != nil {
			return fmt.Errorf("complete %s: %w", id, err)
		}
	}
	err := effect(ctx, "local.complete.folder", func() error { return syncDir(filepath.Join(p.dir, "snapshots")) })
	if err != nil {
		return fmt.Errorf("complete: %w", err)
	}
	for i, id := range ids {
		if err := p.markComplete(ctx, id, tags[i]); err != nil {
			return fmt.Errorf("complete %s: %w", id, err)
		}
	}
	return nil
}

// persist fsyncs one clone and proves that it is whole: FICLONE grows its
// target to the full size with the last extent only.
func (p *Pool) persist(ctx context.Context, id backup.SnapshotID) error {
	s, err := p.readSnapshot(id)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(p.snapshotFile(id, ".img"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("its file is gone: %w", backup.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != int64(s.Size) {
		return backup.Hint(fmt.Errorf("it was not taken to its end: %d of %d bytes", st.Size(), s.Size), "delete the backup and take another one")
	}
	return effect(ctx, "local.complete.fsync", f.Sync)
}

func (p *Pool) markComplete(ctx context.Context, id backup.SnapshotID, tags backup.Tags) error {
	name := p.snapshotFile(id, ".json")
	lock, err := lockFile(ctx, name)
	if err != nil {
		return err
	}
	defer lock.release()
	s, err := p.readSnapshot(id)
	if err != nil {
		return err
	}
	if s.State == provider.Broken {
		return fmt.Errorf("its file is gone: %w", backup.ErrNotFound)
	}
	if s.State == provider.Completed && (len(tags) == 0 || s.Tags.Match(tags)) {
		return nil
	}
	s.State = provider.Completed
	for k, v := range tags {
		s.Tags = s.Tags.With(k, v)
	}
	text, err := encode(s)
	if err != nil {
		return err
	}
	return effect(ctx, "local.complete.sidecar", func() error { return replaceFile(name, text) })
}

// Snapshots describes snapshots. The contract is provider.Provider's.
func (p *Pool) Snapshots(ctx context.Context, ids []backup.SnapshotID) ([]provider.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("describe snapshots: %w", err)
	}
	var found []provider.Snapshot
	var missing []string
	for _, id := range ids {
		s, err := p.readSnapshot(id)
		switch {
		case errors.Is(err, backup.ErrNotFound):
			missing = append(missing, string(id))
		case err != nil:
			return found, fmt.Errorf("describe snapshots: %w", err)
		default:
			found = append(found, s.Snapshot)
		}
	}
	if len(missing) > 0 {
		return found, fmt.Errorf("describe snapshots: %s: %w", strings.Join(missing, ", "), backup.ErrNotFound)
	}
	return found, nil
}

// DeleteSnapshots deletes a set. The contract is provider.Provider's.
func (p *Pool) DeleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete snapshots: %w", err)
	}
	var there []backup.SnapshotID
	for _, id := range ids {
		s, err := p.readSnapshot(id)
		if errors.Is(err, backup.ErrNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("delete snapshots: %w", err)
		}
		if !carries(s.Tags, owner) {
			return fmt.Errorf("delete snapshots: %s: %w", id, backup.ErrNotOurs)
		}
		there = append(there, id)
	}
	for _, id := range there {
		if err := p.deleteSnapshot(ctx, id); err != nil {
			return fmt.Errorf("delete snapshot %s: %w", id, err)
		}
		p.log.DebugContext(ctx, "snapshot deleted", slog.String(keySnapshot, string(id)))
	}
	return nil
}

func (p *Pool) deleteSnapshot(ctx context.Context, id backup.SnapshotID) error {
	lock, err := lockFile(ctx, p.snapshotFile(id, ".json"))
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.release()
	return p.removePair(ctx, p.snapshotFile(id, ".img"), p.snapshotFile(id, ".json"))
}

// List returns what carries our tags, the oldest first. The contract is
// provider.Provider's.
func (p *Pool) List(ctx context.Context, match backup.Tags) (provider.Inventory, error) {
	if err := ctx.Err(); err != nil {
		return provider.Inventory{}, fmt.Errorf("list pool: %w", err)
	}
	volumes, err := p.allVolumes(ctx)
	if err != nil {
		return provider.Inventory{}, fmt.Errorf("list pool: %w", err)
	}
	snapshots, err := p.allSnapshots(ctx)
	if err != nil {
		return provider.Inventory{}, fmt.Errorf("list pool: %w", err)
	}
	wanted := func(t backup.Tags) bool { return ours(t) && (len(match) == 0 || carries(t, match)) }
	var inv provider.Inventory
	for _, v := range volumes {
		if !wanted(v.Tags) {
			continue
		}
		l, err := p.attached(v.ID)
		if err != nil {
			return provider.Inventory{}, fmt.Errorf("list pool: %w", err)
		}
		listed := provider.Volume{ID: v.ID, Size: v.Size, From: v.From, Created: v.Created, Tags: v.Tags}
		if l != nil {
			listed.Attached = l.node()
		}
		inv.Volumes = append(inv.Volumes, listed)
	}
	for _, s := range snapshots {
		if wanted(s.Tags) {
			inv.Snapshots = append(inv.Snapshots, s.Snapshot)
		}
	}
	slices.SortFunc(inv.Volumes, func(a, b provider.Volume) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(string(a.ID), string(b.ID)))
	})
	slices.SortFunc(inv.Snapshots, func(a, b provider.Snapshot) int {
		return cmp.Or(a.Started.Compare(b.Started), strings.Compare(string(a.ID), string(b.ID)))
	})
	return inv, nil
}

// carries reports whether all tags of want are among those of a thing, and
// want is not empty. backup.Tags.Match alone takes a tag with an empty value
// for one that is not there, and nothing is to be deleted by that.
func carries(t, want backup.Tags) bool {
	for key := range want {
		if _, ok := t[key]; !ok {
			return false
		}
	}
	return t.Match(want)
}

// ours reports whether a tag of cleancut is there.
func ours(t backup.Tags) bool {
	for key := range t {
		if strings.HasPrefix(key, "cleancut:") {
			return true
		}
	}
	return false
}
