package providertest

import (
	"context"
	"fmt"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/faulty"
)

func cutCases() []testCase {
	return []testCase{
		{"what was written before the cut is in the restored volume, and nothing later", (*bench).pointInTime},
		{"a set gives one snapshot for each member, in order, each within its interval", (*bench).inOrder},
		{"a prepared cut that is not taken is found by its tags or leaves nothing", func(b *bench) {
			v, _ := b.volume()
			c, err := b.Provider.Prepare(b.Context(), b.set(v))
			b.must(err)
			b.must(c.Close())
			for _, s := range b.list(b.owner).Snapshots {
				if s.State == provider.Completed || s.Volume != v.ID {
					b.Errorf("got %+v", s)
				}
			}
		}},
		{"snapshots carry their tags and are listed from the moment of the cut", func(b *bench) {
			v, _ := b.volume()
			ids := idsOf(b.cut(v))
			got := b.list(b.owner.With(backup.TagMember, "0")).Snapshots
			if len(got) != 1 || got[0].ID != ids[0] || got[0].Volume != v.ID || got[0].Size != v.Size || got[0].Started.IsZero() || got[0].Tags[backup.TagDigest] != "" {
				b.Errorf("got %+v", got)
			}
		}},
		{"a snapshot that is not completed cannot be made a volume", (*bench).pendingVolume},
		{"a set with a volume that is not there is refused and nothing is left", (*bench).missingMember},
		{"an empty set is refused", func(b *bench) {
			if _, err := b.Provider.Prepare(b.Context(), provider.Set{}); err == nil {
				b.Error("no error")
			}
		}},
		{"a volume that is twice in a set is refused", func(b *bench) {
			v, _ := b.volume()
			if _, err := b.Provider.Prepare(b.Context(), b.set(v, v)); err == nil {
				b.Error("no error")
			}
		}},
		{"a cut is taken once", func(b *bench) {
			v, _ := b.volume()
			c, err := b.Provider.Prepare(b.Context(), b.set(v))
			b.must(err)
			_, err = c.Take(b.Context())
			b.must(err)
			if _, err := c.Take(b.Context()); err == nil {
				b.Error("no error")
			}
			b.must(c.Close())
			if got := len(b.list(b.owner).Snapshots); got != 1 {
				b.Errorf("%d snapshots", got)
			}
		}},
		{"close deletes nothing, may be called twice, and a closed cut is not taken", (*bench).closeCut},
		{"two cuts prepared at the same time are two sets", (*bench).twoCuts},
		{"a set with skew is cut one after the other", (*bench).skewed},
		{"a cut that is cancelled between two members is an error and found by its tags", (*bench).cancelled},
		{"complete marks every snapshot with the digest, and may be repeated", (*bench).complete},
		{"completing a snapshot that is gone says so", func(b *bench) {
			v, _ := b.volume()
			ids := idsOf(b.cut(v, b.second()))
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids[:1], b.owner))
			b.want(b.Provider.Complete(b.Context(), ids, digests(len(ids))), backup.ErrNotFound)
		}},
		{"snapshots are described in the order asked for", func(b *bench) {
			v, _ := b.volume()
			ids := b.snapshots(v, b.second())
			got, err := b.Provider.Snapshots(b.Context(), []backup.SnapshotID{ids[1], ids[0]})
			b.must(err)
			if len(got) != 2 || got[0].ID != ids[1] || got[1].ID != ids[0] {
				b.Errorf("got %+v, want %v turned round", got, ids)
			}
		}},
		{"a missing snapshot is named, and the others are described", func(b *bench) {
			v, _ := b.volume()
			ids := b.snapshots(v, b.second())
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids[:1], b.owner))
			got, err := b.Provider.Snapshots(b.Context(), ids)
			b.want(err, backup.ErrNotFound)
			if len(got) != 1 || got[0].ID != ids[1] || !strings.Contains(fmt.Sprint(err), string(ids[0])) || strings.Contains(fmt.Sprint(err), string(ids[1])) {
				b.Errorf("got %+v, %v", got, err)
			}
		}},
		{"a lost answer of the cut: its snapshots are found by their tags and deleted", (*bench).lostCut},
		{"a lost answer of complete: the repetition succeeds", func(b *bench) {
			f := faulty.Wrap(b.Provider, faulty.Rule{Method: "Complete", Nth: 1, Err: errLost, AfterEffect: true})
			v, _ := b.volume()
			ids := idsOf(b.cut(v))
			b.want(f.Complete(b.Context(), ids, digests(len(ids))), errLost)
			b.must(f.Complete(b.Context(), ids, digests(len(ids))))
		}},
		{"a restored volume is a volume like any other: it can be cut and restored", (*bench).generations},
	}
}

// second makes and attaches one more volume.
func (b *bench) second() backup.Volume {
	b.Helper()
	v, _ := b.volume()
	return v
}

// restored makes a volume from a snapshot and attaches it.
func (b *bench) restored(id backup.SnapshotID) (backup.Volume, string) {
	b.Helper()
	v := b.create(provider.VolumeSpec{Token: b.token(), From: id, Tags: b.owner})
	return v, b.attach(v.ID)
}

func (b *bench) pointInTime() {
	v, device := b.volume()
	b.write(device, 0, 0x01)
	b.write(device, 9, 0x02)
	taken := b.cut(v)
	b.write(device, 0, 0x03)
	b.write(device, 10, 0x04)
	b.must(b.Provider.Complete(b.Context(), idsOf(taken), digests(len(taken.Members))))
	_, copied := b.restored(taken.Members[0].Snapshot)
	for block, want := range map[int64]byte{0: 0x01, 9: 0x02, 10: 0x00} {
		if got := b.read(copied, block); got != want {
			b.Errorf("block %d of the copy: got %#x, want %#x", block, got, want)
		}
	}
	b.write(copied, 9, 0x05)
	for block, want := range map[int64]byte{0: 0x03, 9: 0x02, 10: 0x04} {
		if got := b.read(device, block); got != want {
			b.Errorf("block %d of the original: got %#x, want %#x", block, got, want)
		}
	}
}

func (b *bench) inOrder() {
	var volumes []backup.Volume
	for i := range 4 {
		v, device := b.volume()
		b.write(device, 0, byte(0x10+i))
		volumes = append(volumes, v)
	}
	before := now()
	taken := b.cut(volumes...)
	after := now()
	b.must(b.Provider.Complete(b.Context(), idsOf(taken), digests(len(taken.Members))))
	described, err := b.Provider.Snapshots(b.Context(), idsOf(taken))
	b.must(err)
	seen := map[backup.SnapshotID]bool{}
	for i, m := range taken.Members {
		if m.Volume != volumes[i] || described[i].Volume != volumes[i].ID || described[i].Tags[backup.TagMember] != fmt.Sprint(i) || seen[m.Snapshot] {
			b.Errorf("member %d: got %v and %+v", i, m, described[i])
		}
		seen[m.Snapshot] = true
		if m.Requested.Before(before) || m.Responded.Before(m.Requested) || after.Before(m.Responded) {
			b.Errorf("member %d: %v to %v is not within %v to %v", i, m.Requested, m.Responded, before, after)
		}
		_, device := b.restored(m.Snapshot)
		if got := b.read(device, 0); got != byte(0x10+i) {
			b.Errorf("member %d: got %#x", i, got)
		}
	}
}

func (b *bench) pendingVolume() {
	v, _ := b.volume()
	c, err := b.Provider.Prepare(b.Context(), b.set(v))
	b.must(err)
	taken, err := c.Take(b.Context())
	b.must(err)
	b.must(c.Close())
	made, refused := b.Provider.CreateVolume(b.Context(), provider.VolumeSpec{Token: b.token(), From: taken.Members[0].Snapshot, Tags: b.owner})
	// Described after the call: it may have been completed meanwhile.
	described, err := b.Provider.Snapshots(b.Context(), idsOf(taken))
	b.must(err)
	if described[0].State == provider.Pending && refused == nil {
		b.Errorf("got %v", made)
	}
}

func (b *bench) missingMember() {
	v, gone := b.second(), b.create(b.blank())
	b.must(b.Provider.DeleteVolume(b.Context(), gone.ID, b.owner))
	_, err := b.Provider.Prepare(b.Context(), b.set(v, gone))
	b.want(err, backup.ErrNotFound)
	if got := b.list(b.owner).Snapshots; len(got) != 0 {
		b.Errorf("left: %+v", got)
	}
}

func (b *bench) closeCut() {
	v, _ := b.volume()
	ids := idsOf(b.cut(v))
	c, err := b.Provider.Prepare(b.Context(), b.set(v))
	b.must(err)
	b.must(c.Close())
	b.must(c.Close())
	if _, err := c.Take(b.Context()); err == nil {
		b.Error("a closed cut was taken")
	}
	_, err = b.Provider.Snapshots(b.Context(), ids)
	b.must(err)
}

func (b *bench) twoCuts() {
	v, device := b.volume()
	first, err := b.Provider.Prepare(b.Context(), b.set(v))
	b.must(err)
	second, err := b.Provider.Prepare(b.Context(), b.set(v))
	b.must(err)
	b.write(device, 0, 0x01)
	one, err := first.Take(b.Context())
	b.must(err)
	b.write(device, 0, 0x02)
	two, err := second.Take(b.Context())
	b.must(err)
	b.must(first.Close())
	b.must(second.Close())
	for want, taken := range map[byte]provider.Taken{1: one, 2: two} {
		b.must(b.Provider.Complete(b.Context(), idsOf(taken), digests(len(taken.Members))))
		_, copied := b.restored(taken.Members[0].Snapshot)
		if got := b.read(copied, 0); got != want {
			b.Errorf("got %#x, want %#x", got, want)
		}
	}
}

func (b *bench) skewed() {
	v, w := b.second(), b.second()
	set := b.set(v, w)
	set.Skew = 20 * time.Millisecond
	c, err := b.Provider.Prepare(b.Context(), set)
	b.must(err)
	defer func() { b.must(c.Close()) }()
	taken, err := c.Take(b.Context())
	b.must(err)
	if gap := taken.Members[1].Requested.Sub(taken.Members[0].Responded); gap < set.Skew || taken.Atomic {
		b.Errorf("gap %v, want %v; atomic %v", gap, set.Skew, taken.Atomic)
	}
}

func (b *bench) cancelled() {
	v, w := b.second(), b.second()
	set := b.set(v, w)
	set.Skew = time.Hour
	c, err := b.Provider.Prepare(b.Context(), set)
	b.must(err)
	ctx, cancel := context.WithTimeout(b.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = c.Take(ctx)
	b.want(err, context.DeadlineExceeded)
	b.must(c.Close())
	b.deleteListed()
}

// deleteListed deletes all snapshots that carry the tags of the case.
func (b *bench) deleteListed() {
	b.Helper()
	var ids []backup.SnapshotID
	for _, s := range b.list(b.owner).Snapshots {
		ids = append(ids, s.ID)
	}
	b.must(b.Provider.DeleteSnapshots(b.Context(), ids, b.owner))
	if got := b.list(b.owner).Snapshots; len(got) > 0 {
		b.Errorf("left: %+v", got)
	}
}

func (b *bench) complete() {
	v, w := b.second(), b.second()
	ids := idsOf(b.cut(v, w))
	for range 2 {
		b.must(b.Provider.Complete(b.Context(), ids, digests(len(ids))))
		got, err := b.Provider.Snapshots(b.Context(), ids)
		b.must(err)
		for _, s := range got {
			if s.State != provider.Completed || s.Tags[backup.TagDigest] != digest || !s.Tags.Match(b.owner) {
				b.Errorf("got %+v", s)
			}
		}
	}
}

func (b *bench) lostCut() {
	f := faulty.Wrap(b.Provider, faulty.Rule{Method: "Take", Nth: 1, Err: errLost, AfterEffect: true})
	v, w := b.second(), b.second()
	c, err := f.Prepare(b.Context(), b.set(v, w))
	b.must(err)
	_, err = c.Take(b.Context())
	b.want(err, errLost)
	b.must(c.Close())
	if got := b.list(b.owner).Snapshots; len(got) != 2 {
		b.Errorf("got %+v", got)
	}
	b.deleteListed()
}

func (b *bench) generations() {
	v, device := b.volume()
	for want := byte(1); want <= 3; want++ {
		b.write(device, 0, want)
		id := b.snapshots(v)[0]
		v, device = b.restored(id)
		if got := b.read(device, 0); got != want {
			b.Errorf("got %#x, want %#x", got, want)
		}
	}
}
