package providertest

import (
	"cleancut/internal/backup"
	"cleancut/internal/provider/faulty"
)

func deleteCases() []testCase {
	return []testCase{
		{"a volume is deleted only by all of the tags named, and by some", func(b *bench) {
			v := b.create(b.blank())
			for _, owner := range b.strangers() {
				b.want(b.Provider.DeleteVolume(b.Context(), v.ID, owner), backup.ErrNotOurs)
			}
			if got := b.list(b.owner).Volumes; len(got) != 1 {
				b.Errorf("got %+v", got)
			}
			b.must(b.Provider.DeleteVolume(b.Context(), v.ID, b.owner))
			if got := b.list(b.owner).Volumes; len(got) != 0 {
				b.Errorf("got %+v", got)
			}
		}},
		{"an attached volume is not deleted", func(b *bench) {
			v, device := b.volume()
			b.want(b.Provider.DeleteVolume(b.Context(), v.ID, b.owner), backup.ErrInUse)
			if got, err := b.Provider.Resolve(b.Context(), device); err != nil || got != v {
				b.Errorf("got %v, %v", got, err)
			}
		}},
		{"a set of snapshots is deleted only by all of the tags named, and by some", func(b *bench) {
			v, w := b.second(), b.second()
			ids := b.snapshots(v, w)
			for _, owner := range b.strangers() {
				b.want(b.Provider.DeleteSnapshots(b.Context(), ids, owner), backup.ErrNotOurs)
			}
			_, err := b.Provider.Snapshots(b.Context(), ids)
			b.must(err)
		}},
		{"a set with one foreign snapshot is refused whole", func(b *bench) {
			v, w := b.second(), b.second()
			ids := b.snapshots(v, w)
			first := b.owner.With(backup.TagMember, "0")
			b.want(b.Provider.DeleteSnapshots(b.Context(), ids, first), backup.ErrNotOurs)
			_, err := b.Provider.Snapshots(b.Context(), ids)
			b.must(err)
		}},
		{"deleting twice is no error, neither is a set of which a part is gone", func(b *bench) {
			v, w := b.second(), b.second()
			ids := b.snapshots(v, w)
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids[:1], b.owner))
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids, b.owner))
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids, b.owner))
			b.must(b.Provider.DeleteSnapshots(b.Context(), nil, b.owner))
			blank := b.create(b.blank())
			b.must(b.Provider.DeleteVolume(b.Context(), blank.ID, b.owner))
			b.must(b.Provider.DeleteVolume(b.Context(), blank.ID, b.owner))
		}},
		{"a lost answer and a repetition: what is deleted is gone", func(b *bench) {
			f := faulty.Wrap(b.Provider, faulty.Rule{Method: "DeleteVolume", Nth: 1, Err: errLost, AfterEffect: true},
				faulty.Rule{Method: "DeleteSnapshots", Nth: 1, Err: errLost, AfterEffect: true})
			blank := b.create(b.blank())
			ids := b.snapshots(b.second())
			b.want(f.DeleteVolume(b.Context(), blank.ID, b.owner), errLost)
			b.want(f.DeleteSnapshots(b.Context(), ids, b.owner), errLost)
			b.must(f.DeleteVolume(b.Context(), blank.ID, b.owner))
			b.must(f.DeleteSnapshots(b.Context(), ids, b.owner))
			if unhit := f.Unhit(); len(unhit) > 0 {
				b.Errorf("not hit: %v", unhit)
			}
		}},
		{"a pending snapshot can be deleted", func(b *bench) {
			b.cut(b.second())
			b.deleteListed()
		}},
		{"a volume outlives the snapshot it was made from, and a snapshot its volume", func(b *bench) {
			v, device := b.volume()
			b.write(device, 2, 0x77)
			ids := b.snapshots(v)
			b.must(b.Provider.Detach(b.Context(), v.ID))
			b.must(b.Provider.DeleteVolume(b.Context(), v.ID, b.owner))
			_, copied := b.restored(ids[0])
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids, b.owner))
			if got := b.read(copied, 2); got != 0x77 {
				b.Errorf("got %#x", got)
			}
		}},
		{"list selects by every tag named", (*bench).selects},
		{"the empty match lists all that is ours", func(b *bench) {
			v := b.second()
			ids := b.snapshots(v)
			inv := b.list(nil)
			volumes, snapshots := 0, 0
			for _, got := range inv.Volumes {
				if got.ID == v.ID {
					volumes++
				}
			}
			for _, got := range inv.Snapshots {
				if got.ID == ids[0] {
					snapshots++
				}
			}
			if volumes != 1 || snapshots != 1 {
				b.Errorf("got %+v", inv)
			}
		}},
	}
}

// strangers are owners that nothing of the case may be deleted by.
func (b *bench) strangers() []backup.Tags {
	return []backup.Tags{
		nil,
		{},
		{backup.TagBackup: "20200101T000000Z-000000"},
		b.owner.With(backup.TagCluster, "other"),
		b.owner.With("cleancut:unknown", ""),
	}
}

func (b *bench) selects() {
	spec := b.blank()
	spec.Tags = b.owner.With(backup.TagCopy, "one")
	first := b.create(spec)
	spec = b.blank()
	spec.Tags = b.owner.With(backup.TagCopy, "two")
	b.create(spec)
	if got := b.list(b.owner).Volumes; len(got) != 2 {
		b.Errorf("got %+v", got)
	}
	if got := b.list(b.owner.With(backup.TagCopy, "one")).Volumes; len(got) != 1 || got[0].ID != first.ID {
		b.Errorf("got %+v, want %s", got, first.ID)
	}
	if got := b.list(b.owner.With(backup.TagHost, "")).Volumes; len(got) != 0 {
		b.Errorf("got %+v", got)
	}
}
