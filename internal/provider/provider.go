// Package provider is the contract between cleancut and whoever owns the block
// volumes. local and ec2 fulfil it, faulty wraps it, providertest checks it.
//
//	Resolve → Prepare → Cut.Take → Complete        (backup)
//	Snapshots → CreateVolume → Attach … Detach → DeleteVolume   (restore)
//
// What always holds: nothing is deleted that does not carry the tags the
// caller names; a call that is repeated after a lost answer finds what the
// first one made; ids never change their meaning.
package provider

import (
	"context"
	"time"

	"cleancut/internal/backup"
)

// Provider owns block volumes and their snapshots. All methods may be called
// at the same time from several goroutines. All return ctx's error (wrapped)
// if ctx ends first; what was begun then may have happened and is found by
// List. Errors wrap backup.ErrNotFound, ErrInUse, ErrNotOurs, ErrUnsupported
// or ErrExists where those apply.
type Provider interface {
	// Resolve tells which volume is behind a whole block device of this host
	// ("/dev/loop3"; not a partition). It proves the identity (the same inode,
	// the same serial), never guesses by name. ErrNotFound: the device is not
	// of this provider. No side effect.
	Resolve(ctx context.Context, device string) (backup.Volume, error)

	// Prepare does everything of a cut that can be done before production is
	// stopped: checks every volume, limits, permissions and headroom, opens
	// descriptors and connections. ErrUnsupported, ErrNotFound or a hinted
	// error when the cut could not be taken. Snapshots that it announces
	// already carry their tags and are found by List.
	Prepare(ctx context.Context, set Set) (Cut, error)

	// Complete waits until every snapshot is durable and restorable elsewhere,
	// then adds tags[i] to snapshot ids[i]. It may be called again, also by
	// another process after a crash. ErrNotFound if one is gone; an error if
	// one can never complete.
	Complete(ctx context.Context, ids []backup.SnapshotID, tags []backup.Tags) error

	// Snapshots describes snapshots by id, in the order of ids. If any is
	// missing it returns those it found and an error that wraps ErrNotFound
	// and names the missing.
	Snapshots(ctx context.Context, ids []backup.SnapshotID) ([]Snapshot, error)

	// CreateVolume makes a volume, empty or from a completed snapshot, not yet
	// attached. Called again with the same Token it returns the first volume;
	// with the same Token and another Spec, ErrExists.
	CreateVolume(ctx context.Context, spec VolumeSpec) (backup.Volume, error)

	// Attach connects a volume to this host and returns its whole block
	// device, verified to be that volume and ready for use. Attached here
	// already: the same device again. ErrInUse: attached elsewhere.
	Attach(ctx context.Context, id backup.VolumeID) (device string, err error)

	// Detach disconnects a volume from this host and returns when the device
	// is gone. Not attached: nil. ErrInUse: the device is open (mounted, in an
	// array). The caller has unmounted and stopped arrays before.
	Detach(ctx context.Context, id backup.VolumeID) error

	// DeleteVolume deletes a volume that carries every tag of owner. Gone
	// already: nil. ErrInUse: still attached. ErrNotOurs: tags differ (or
	// owner is empty); nothing is deleted.
	DeleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error

	// DeleteSnapshots deletes a whole set. Every snapshot must carry every tag
	// of owner, else ErrNotOurs and none is deleted. Those that are gone
	// already are passed over.
	DeleteSnapshots(ctx context.Context, ids []backup.SnapshotID, owner backup.Tags) error

	// List returns the volumes and snapshots that carry a tag of cleancut and
	// every tag of match; an empty match means all that carry one.
	List(ctx context.Context, match backup.Tags) (Inventory, error)
}

// Cut is a prepared cut: everything is open, nothing is taken.
type Cut interface {
	// Estimate is how long Take will need at most, as far as can be told
	// beforehand. Zero: not known.
	Estimate() time.Duration

	// Take asks for all snapshots at once, each exactly once, and returns when
	// every point in time is certain to lie in the past: only then may writers
	// go on. It touches no filesystem of the volumes. On an error (also of
	// ctx) some may have been taken; the caller removes them by their tags.
	// Called twice: an error.
	Take(ctx context.Context) (Taken, error)

	// Close releases what Prepare opened. It deletes nothing. May be called
	// twice.
	Close() error
}

// Set is what to cut: the members and the tags for each of them.
type Set struct {
	Members []Member
	// Group asks that the provider itself cuts all members at one instant
	// (Taken.Atomic), with nobody frozen. Prepare answers ErrUnsupported
	// where it cannot, and says why.
	Group bool
	// Skew makes Take wait so long between two members. It is for the drill,
	// which shows what that does; zero otherwise.
	Skew time.Duration
}

// Member is one volume to snapshot.
type Member struct {
	Volume backup.VolumeID
	Tags   backup.Tags // at least one of cleancut's
}

// Taken is the result of a cut.
type Taken struct {
	// Atomic: the provider vouches for one instant over all members. False:
	// each member on its own is a point in time within its interval.
	Atomic  bool
	Members []TakenMember // in the order of Set.Members
}

// TakenMember is one snapshot and the interval that holds its point in time.
type TakenMember struct {
	Snapshot  backup.SnapshotID
	Volume    backup.Volume
	Requested time.Time
	Responded time.Time
}

// State is how far a snapshot has come.
type State string

// The states of a snapshot. Only a completed one can be restored.
const (
	Pending   State = "pending"
	Completed State = "completed"
	Broken    State = "error"
)

// Snapshot is a described snapshot.
type Snapshot struct {
	ID      backup.SnapshotID `json:"id"`
	Volume  backup.VolumeID   `json:"volume"` // it was cut from
	Size    backup.Bytes      `json:"size"`   // of that volume
	State   State             `json:"state"`
	Started time.Time         `json:"started"`
	Tags    backup.Tags       `json:"tags"`
}

// VolumeSpec describes a volume to make.
type VolumeSpec struct {
	Token string            // needed: names the request, so that a repetition finds the first result
	Size  backup.Bytes      // needed when From is empty; else 0 or at least the snapshot's
	From  backup.SnapshotID // empty: a blank volume
	Tags  backup.Tags       // at least one of cleancut's, else List would never show it
}

// Volume is a described volume.
type Volume struct {
	ID       backup.VolumeID   `json:"id"`
	Size     backup.Bytes      `json:"size"`
	From     backup.SnapshotID `json:"from,omitempty"`
	Attached string            `json:"attached,omitempty"` // device on this host, or the name of another
	Created  time.Time         `json:"created"`
	Tags     backup.Tags       `json:"tags"`
}

// Inventory is what carries our tags.
type Inventory struct {
	Volumes   []Volume   `json:"volumes"`
	Snapshots []Snapshot `json:"snapshots"`
}
