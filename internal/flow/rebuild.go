package flow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/provider"
)

// RebuildKind says what becomes of a backup whose snapshots were found.
type RebuildKind string

// The kinds. A backup that cannot be rebuilt was complete once; one that is
// left was not, or somebody is at work on it.
const (
	RebuildPut    RebuildKind = "rebuild"
	RebuildThere  RebuildKind = "there already"
	RebuildLeave  RebuildKind = "leave"
	RebuildCannot RebuildKind = "cannot"
)

// Rebuilding is one line of the plan.
type Rebuilding struct {
	Kind     RebuildKind `json:"action"`
	Backup   backup.ID   `json:"backup"`
	Why      string      `json:"why"`
	Lost     []string    `json:"lost,omitempty"` // side files that the catalog does not have
	Manifest []byte      `json:"-"`              // to put
	Err      error       `json:"-"`              // of RebuildCannot
}

// RebuildFacts is all that PlanRebuild decides by.
type RebuildFacts struct {
	Cluster   string
	Snapshots []provider.Snapshot         // of every cluster
	Entries   map[backup.ID]catalog.Entry // what the catalog holds of each backup
	Intents   map[backup.ID]bool          // being made or deleted
	SideFiles map[backup.ID][]string      // names of those that the catalog holds
}

// RebuildPlan is what a rebuild would do.
type RebuildPlan struct {
	Cluster string       `json:"cluster"`
	Actions []Rebuilding `json:"actions"`        // the oldest backup first
	Others  []string     `json:"other_clusters"` // whose snapshots were found too
}

// Err is nil if every backup that was ever complete is or can be in the
// catalog again. It wraps what stands against each of the others, ErrDamage
// for one.
func (p RebuildPlan) Err() error {
	var errs []error
	for _, a := range p.Actions {
		if a.Kind == RebuildCannot {
			errs = append(errs, fmt.Errorf("backup %s: %w", a.Backup, a.Err))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("cannot be rebuilt: %w", errors.Join(errs...))
}

// PlanRebuild decides which backups of the cluster the catalog can have again.
// It is pure. What is in the catalog already is never replaced.
func PlanRebuild(x RebuildFacts) RebuildPlan {
	plan := RebuildPlan{Cluster: x.Cluster, Actions: []Rebuilding{}, Others: []string{}}
	sets := map[backup.ID][]provider.Snapshot{}
	others := map[string]bool{}
	for _, s := range x.Snapshots {
		if c := s.Tags[backup.TagCluster]; c == x.Cluster {
			id := backup.ID(s.Tags[backup.TagBackup])
			sets[id] = append(sets[id], s)
		} else if c != "" {
			others[c] = true
		}
	}
	plan.Others = slices.AppendSeq(plan.Others, maps.Keys(others))
	slices.Sort(plan.Others)
	for _, id := range slices.Sorted(maps.Keys(sets)) {
		plan.Actions = append(plan.Actions, planSet(x, id, sets[id]))
	}
	return plan
}

func planSet(x RebuildFacts, id backup.ID, set []provider.Snapshot) Rebuilding {
	a := Rebuilding{Kind: RebuildCannot, Backup: id}
	leave := func(why string) Rebuilding {
		a.Kind, a.Why = RebuildLeave, why
		return a
	}
	cannot := func(err error) Rebuilding {
		a.Err, a.Why = err, err.Error()
		return a
	}
	if _, err := backup.ParseID(string(id)); err != nil {
		return leave("its snapshots do not say of which backup they are")
	}
	if x.Intents[id] {
		return leave("it is being made or deleted, or that was interrupted: see `cleancut sweep --dry-run`")
	}
	manifest, m, err := described(x.Cluster, id, set)
	if errors.Is(err, backup.ErrIncomplete) {
		return leave(err.Error())
	}
	if err != nil {
		return cannot(err)
	}
	for _, f := range m.SideFiles {
		if !slices.Contains(x.SideFiles[id], f.Name) {
			a.Lost = append(a.Lost, f.Path)
		}
	}
	e, known := x.Entries[id]
	switch {
	case known && e.Digest != "" && e.Digest != backup.Digest(manifest):
		return cannot(fmt.Errorf("%w: the catalog has another manifest of it (digest %s, its snapshots say %s), which stays", backup.ErrDamage, e.Digest, backup.Digest(manifest)))
	case known && e.Err == nil:
		a.Kind, a.Why = RebuildThere, "the same manifest, and complete"
		return a
	case known && !errors.Is(e.Err, backup.ErrIncomplete):
		return cannot(backup.Hint(fmt.Errorf("what the catalog has of it stays as it is: %w", e.Err), "move the damaged file away and rebuild again"))
	}
	a.Kind, a.Why, a.Manifest = RebuildPut, fmt.Sprintf("%d snapshots, all completed, with one digest", len(set)), manifest
	return a
}

// described returns the manifest that a set of snapshots carries, if the set
// is whole and is the one that the manifest names.
func described(cluster string, id backup.ID, set []provider.Snapshot) ([]byte, backup.Manifest, error) {
	var none backup.Manifest
	var tags []backup.Tags
	for _, s := range set {
		tags = append(tags, s.Tags)
	}
	if err := wholeSet(set); err != nil {
		return nil, none, err
	}
	manifest, err := backup.ManifestFromTags(tags)
	if errors.Is(err, backup.ErrNotFound) {
		err = backup.Hint(err, "it did not fit, or an older cleancut took the backup; only a copy of the catalog helps")
	}
	if err != nil {
		return nil, none, err
	}
	m, err := backup.DecodeManifest(manifest)
	if errors.Is(err, backup.ErrUnsupported) {
		return nil, none, err
	}
	if err == nil && (m.ID != id || m.Cluster != cluster) {
		err = fmt.Errorf("it is of backup %s of cluster %s", m.ID, m.Cluster)
	}
	if err != nil {
		return nil, none, fmt.Errorf("the manifest in the tags: %w: %v", backup.ErrDamage, err)
	}
	there := map[backup.SnapshotID]provider.Snapshot{}
	for _, s := range set {
		there[s.ID] = s
	}
	for _, s := range m.Snapshots {
		got, ok := there[s.ID]
		if !ok || got.Volume != s.Volume.ID || got.Tags[backup.TagMember] != strconv.Itoa(s.Member) {
			return nil, none, fmt.Errorf("%w: its manifest names snapshot %s of volume %s as member %d, and that is not among these", backup.ErrDamage, s.ID, s.Volume.ID, s.Member)
		}
	}
	return manifest, m, nil
}

// wholeSet demands every member once, each completed.
func wholeSet(set []provider.Snapshot) error {
	have := map[string]bool{}
	digests := 0
	for _, s := range set {
		if s.Tags[backup.TagDigest] != "" {
			digests++
		}
	}
	if digests == 0 { // whatever else is missing: it never was a backup
		return fmt.Errorf("%w: its snapshots have no tag %s, which comes last", backup.ErrIncomplete, backup.TagDigest)
	}
	count := set[0].Tags[backup.TagMembers]
	for _, s := range set {
		member, err := strconv.Atoi(s.Tags[backup.TagMember])
		switch {
		case s.Tags[backup.TagMembers] != count:
			return fmt.Errorf("%w: of its snapshots some say %s members, some %s", backup.ErrDamage, count, s.Tags[backup.TagMembers])
		case err != nil || have[strconv.Itoa(member)]:
			return fmt.Errorf("%w: member %s is there twice or is no member", backup.ErrDamage, s.Tags[backup.TagMember])
		case s.State == provider.Broken:
			return fmt.Errorf("%w: snapshot %s (member %d) is in state %s", backup.ErrDamage, s.ID, member, s.State)
		case s.State != provider.Completed:
			return fmt.Errorf("%w: snapshot %s (member %d) is in state %s", backup.ErrIncomplete, s.ID, member, s.State)
		}
		have[strconv.Itoa(member)] = true
	}
	members, err := strconv.Atoi(count)
	if err != nil {
		return fmt.Errorf("%w: tag %s is %q", backup.ErrDamage, backup.TagMembers, count)
	}
	var missing []string
	for i := range members {
		if !have[strconv.Itoa(i)] {
			missing = append(missing, strconv.Itoa(i))
		}
		if len(missing) > 8 {
			break
		}
	}
	if len(missing) > 0 || len(have) != members {
		return fmt.Errorf("%w: %d of %d snapshots are there, missing: member %s", backup.ErrDamage, len(have), members, strings.Join(missing, ", "))
	}
	return nil
}

// RebuildFacts gathers what PlanRebuild needs. A catalog that is not there at
// all is an empty one.
func (f *Flow) RebuildFacts(ctx context.Context) (x RebuildFacts, err error) {
	x = RebuildFacts{Cluster: f.Cluster, Entries: map[backup.ID]catalog.Entry{}, Intents: map[backup.ID]bool{}, SideFiles: map[backup.ID][]string{}}
	inv, err := f.Provider.List(ctx, nil)
	if err != nil {
		return x, err
	}
	x.Snapshots = inv.Snapshots
	entries, err := f.Catalog.Backups(ctx)
	if errors.Is(err, backup.ErrNotFound) {
		return x, nil
	}
	if err != nil {
		return x, err
	}
	// An intent that cannot be read may be a deletion: nothing is rebuilt then.
	intents, err := f.Catalog.Intents(ctx)
	if err != nil {
		return x, err
	}
	for _, i := range intents {
		x.Intents[i.ID] = true
	}
	for _, e := range entries {
		x.Entries[e.ID] = e
		if x.SideFiles[e.ID], err = f.Catalog.SideFiles(ctx, e.ID); err != nil && !errors.Is(err, backup.ErrUsage) { // no backup's folder
			return x, err
		}
	}
	return x, nil
}

// Rebuild puts the planned manifests and then their complete.json into the
// catalog. It may be run again, also after it was interrupted. A backup or
// deletion of the cluster on this host must not be running meanwhile.
func (f *Flow) Rebuild(ctx context.Context, plan RebuildPlan) error {
	release, err := f.State.Lock(lockBackup(f.Cluster))
	if err != nil {
		return backup.Hint(fmt.Errorf("a backup of cluster %s is running: %w", f.Cluster, err), "wait for it")
	}
	defer release()
	intents, err := f.Catalog.Intents(ctx)
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		return err
	}
	for _, a := range plan.Actions {
		if a.Kind != RebuildPut {
			continue
		}
		if slices.ContainsFunc(intents, func(i backup.Intent) bool { return i.ID == a.Backup }) {
			return fmt.Errorf("backup %s: somebody has begun to delete it since the plan was made: %w", a.Backup, backup.ErrInUse)
		}
		f.tell("rebuild", string(a.Backup))
		digest, err := f.Catalog.Reinstate(ctx, a.Manifest)
		if err != nil {
			return err
		}
		// When it was found to be complete; when it became so is not known.
		err = f.Catalog.PutComplete(ctx, backup.Complete{ID: a.Backup, Digest: digest, Completed: time.Now().UTC()})
		if err != nil && !errors.Is(err, backup.ErrExists) {
			return err
		}
	}
	return nil
}

// describe returns what is added to each snapshot of a backup when it is
// complete: the digest of the manifest and, where it fits, the manifest
// itself. A backup is good without the second, so it is only noted.
func (f *Flow) describe(m backup.Manifest, digest string) []backup.Tags {
	stored, err := backup.EncodeManifest(m)
	if err == nil {
		var tags []backup.Tags
		if tags, err = backup.ManifestTags(stored, digest, len(m.Snapshots)); err == nil {
			return tags
		}
	}
	f.Log.Warn("the snapshots do not carry the manifest: `cleancut catalog rebuild` cannot bring this backup back", "backup", m.ID, "why", err)
	var tags []backup.Tags
	for range m.Snapshots {
		tags = append(tags, backup.Tags{backup.TagDigest: digest})
	}
	return tags
}
