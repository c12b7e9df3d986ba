package providertest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/faulty"
)

var errLost = errors.New("the answer was lost")

func now() time.Time { return time.Now() }

func volumeCases() []testCase {
	return []testCase{
		{"a volume has the size that was asked for, and so has its device", (*bench).sizes},
		{"a blank volume reads as zeros", func(b *bench) {
			_, device := b.volume()
			if got := b.read(device, 3); got != 0 {
				b.Errorf("got %#x", got)
			}
		}},
		{"the same token and spec find the first volume", func(b *bench) {
			spec := b.blank()
			first, again := b.create(spec), b.create(spec)
			if first != again {
				b.Errorf("got %v, want %v", again, first)
			}
			if got := len(b.list(b.owner).Volumes); got != 1 {
				b.Errorf("%d volumes", got)
			}
		}},
		{"the same token with another spec is refused", (*bench).otherSpec},
		{"calls with one token at the same time make one volume", (*bench).raceToken},
		{"a volume from a snapshot that is not there is refused", func(b *bench) {
			v, _ := b.volume()
			ids := b.snapshots(v)
			b.must(b.Provider.DeleteSnapshots(b.Context(), ids, b.owner))
			_, err := b.Provider.CreateVolume(b.Context(), provider.VolumeSpec{Token: b.token(), From: ids[0], Tags: b.owner})
			b.want(err, backup.ErrNotFound)
		}},
		{"attached twice it is the same device", func(b *bench) {
			v, device := b.volume()
			if again := b.attach(v.ID); again != device {
				b.Errorf("got %s, want %s", again, device)
			}
		}},
		{"a volume that is not there cannot be attached", func(b *bench) {
			v := b.create(b.blank())
			b.must(b.Provider.DeleteVolume(b.Context(), v.ID, b.owner))
			_, err := b.Provider.Attach(b.Context(), v.ID)
			b.want(err, backup.ErrNotFound)
		}},
		{"eight volumes attached at the same time get eight devices, each its own", (*bench).manyAttach},
		{"data stays over detach and attach", func(b *bench) {
			v, device := b.volume()
			b.write(device, 5, 0xa5)
			b.must(b.Provider.Detach(b.Context(), v.ID))
			if got := b.read(b.attach(v.ID), 5); got != 0xa5 {
				b.Errorf("got %#x", got)
			}
		}},
		{"a device that is open is not detached, and stays as it is", (*bench).detachOpen},
		{"detaching what is not attached, or not there, is no error", func(b *bench) {
			v, _ := b.volume()
			b.must(b.Provider.Detach(b.Context(), v.ID))
			b.must(b.Provider.Detach(b.Context(), v.ID))
			b.must(b.Provider.DeleteVolume(b.Context(), v.ID, b.owner))
			b.must(b.Provider.Detach(b.Context(), v.ID))
		}},
		{"a device resolves to its volume, and no longer when detached", func(b *bench) {
			v, device := b.volume()
			got, err := b.Provider.Resolve(b.Context(), device)
			b.must(err)
			if got != v {
				b.Errorf("got %v, want %v", got, v)
			}
			b.must(b.Provider.Detach(b.Context(), v.ID))
			_, err = b.Provider.Resolve(b.Context(), device)
			b.want(err, backup.ErrNotFound)
		}},
		{"a foreign device, and what is no device, resolve to nothing", func(b *bench) {
			for _, device := range []string{b.Foreign, "/dev/null", "/dev/cleancut-is-not-here", b.TempDir()} {
				_, err := b.Provider.Resolve(b.Context(), device)
				b.want(err, backup.ErrNotFound)
			}
		}},
		{"an attached volume is listed with its device", func(b *bench) {
			v, device := b.volume()
			got := b.list(b.owner).Volumes
			if len(got) != 1 || got[0].ID != v.ID || got[0].Size != v.Size || got[0].Attached != device || got[0].Created.IsZero() || !got[0].Tags.Match(b.owner) {
				b.Errorf("got %+v", got)
			}
		}},
		{"a lost answer and a repetition: the volume is found, not made again", (*bench).lostVolume},
		{"a lost answer and a repetition: attach and detach", (*bench).lostAttach},
		{"an ended context is refused by every call, without an effect", (*bench).deadContext},
	}
}

func (b *bench) sizes() {
	spec := b.blank()
	v, device := b.create(spec), ""
	if device = b.attach(v.ID); v.Size != b.Size || b.sizeOf(device) != b.Size {
		b.Errorf("got %d and %d, want %d", v.Size, b.sizeOf(device), b.Size)
	}
	ids := b.snapshots(v)
	for _, c := range []struct{ ask, want backup.Bytes }{{0, b.Size}, {b.Size, b.Size}, {2 * b.Size, 2 * b.Size}} {
		v := b.create(provider.VolumeSpec{Token: b.token(), Size: c.ask, From: ids[0], Tags: b.owner})
		if got := b.sizeOf(b.attach(v.ID)); v.Size != c.want || got != c.want {
			b.Errorf("asked for %d: got %d and %d, want %d", c.ask, v.Size, got, c.want)
		}
	}
	for _, bad := range []provider.VolumeSpec{
		{Token: b.token(), Tags: b.owner},
		{Token: b.token(), Size: -4096, Tags: b.owner},
		{Token: b.token(), Size: b.Size / 2, From: ids[0], Tags: b.owner},
	} {
		if _, err := b.Provider.CreateVolume(b.Context(), bad); err == nil {
			b.Errorf("size %d from %q was made", bad.Size, bad.From)
		}
	}
}

func (b *bench) otherSpec() {
	spec := b.blank()
	b.create(spec)
	size, tags := spec, spec
	size.Size *= 2
	tags.Tags = b.owner.With(backup.TagHost, "elsewhere")
	for _, other := range []provider.VolumeSpec{size, tags} {
		_, err := b.Provider.CreateVolume(b.Context(), other)
		b.want(err, backup.ErrExists)
	}
	if got := len(b.list(b.owner).Volumes); got != 1 {
		b.Errorf("%d volumes", got)
	}
}

func (b *bench) raceToken() {
	spec := b.blank()
	made := make([]backup.Volume, 8)
	b.parallel(len(made), func(i int) (err error) {
		made[i], err = b.Provider.CreateVolume(b.Context(), spec)
		return err
	})
	for _, v := range made {
		if v != made[0] {
			b.Errorf("got %v and %v", v, made[0])
		}
	}
	if got := len(b.list(b.owner).Volumes); got != 1 {
		b.Errorf("%d volumes", got)
	}
}

// parallel runs n calls at the same time.
func (b *bench) parallel(n int, do func(i int) error) {
	b.Helper()
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	b.must(errors.Join(errs...))
}

func (b *bench) manyAttach() {
	volumes, devices := make([]backup.Volume, 8), make([]string, 8)
	for i := range volumes {
		volumes[i] = b.create(b.blank())
	}
	// Each twice, so that two calls for one volume meet as well.
	again := make([]string, 8)
	b.parallel(16, func(i int) (err error) {
		to := devices
		if i >= 8 {
			to = again
		}
		to[i%8], err = b.Provider.Attach(b.Context(), volumes[i%8].ID)
		return err
	})
	for i, v := range volumes {
		got, err := b.Provider.Resolve(b.Context(), devices[i])
		b.must(err)
		if got != v || again[i] != devices[i] {
			b.Errorf("volume %d: %v on %s and %s, want %v", i, got, devices[i], again[i], v)
		}
	}
	b.parallel(16, func(i int) error { return b.Provider.Detach(b.Context(), volumes[i%8].ID) })
	for i, device := range devices {
		_, err := b.Provider.Resolve(b.Context(), device)
		if !errors.Is(err, backup.ErrNotFound) {
			b.Errorf("volume %d on %s: %v", i, device, err)
		}
	}
}

func (b *bench) detachOpen() {
	v, device := b.volume()
	b.write(device, 1, 0x11)
	release := b.hold(device)
	b.want(b.Provider.Detach(b.Context(), v.ID), backup.ErrInUse)
	release()
	// Letting go of it must not finish what was refused.
	if got, err := b.Provider.Resolve(b.Context(), device); err != nil || got != v {
		b.Errorf("after the refusal: %v, %v", got, err)
	}
	if got := b.read(device, 1); got != 0x11 {
		b.Errorf("got %#x", got)
	}
	b.must(b.Provider.Detach(b.Context(), v.ID))
}

func (b *bench) lostVolume() {
	f := faulty.Wrap(b.Provider, faulty.Rule{Method: "CreateVolume", Nth: 1, Err: errLost, AfterEffect: true})
	spec := b.blank()
	_, err := f.CreateVolume(b.Context(), spec)
	b.want(err, errLost)
	listed := b.list(b.owner).Volumes
	v, err := f.CreateVolume(b.Context(), spec)
	b.must(err)
	if len(listed) != 1 || listed[0].ID != v.ID || len(b.list(b.owner).Volumes) != 1 || len(f.Unhit()) > 0 {
		b.Errorf("got %v, listed %v", v, listed)
	}
}

func (b *bench) lostAttach() {
	f := faulty.Wrap(b.Provider, faulty.Rule{Method: "Attach", Nth: 1, Err: errLost, AfterEffect: true},
		faulty.Rule{Method: "Detach", Nth: 1, Err: errLost, AfterEffect: true})
	v := b.create(b.blank())
	_, err := f.Attach(b.Context(), v.ID)
	b.want(err, errLost)
	listed := b.list(b.owner).Volumes
	device, err := f.Attach(b.Context(), v.ID)
	b.must(err)
	if len(listed) != 1 || listed[0].Attached != device {
		b.Errorf("got %s, listed %v", device, listed)
	}
	b.want(f.Detach(b.Context(), v.ID), errLost)
	b.must(f.Detach(b.Context(), v.ID))
	if got := b.list(b.owner).Volumes; len(got) != 1 || got[0].Attached != "" || len(f.Unhit()) > 0 {
		b.Errorf("got %v", got)
	}
}

func (b *bench) deadContext() {
	v, device := b.volume()
	ids := b.snapshots(v)
	prepared, err := b.Provider.Prepare(b.Context(), b.set(v))
	b.must(err)
	defer func() { b.must(prepared.Close()) }()
	before := describe(b.list(b.owner))
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	p := b.Provider
	calls := map[string]func() error{
		"Resolve":         func() error { _, err := p.Resolve(ctx, device); return err },
		"Prepare":         func() error { _, err := p.Prepare(ctx, b.set(v)); return err },
		"Take":            func() error { _, err := prepared.Take(ctx); return err },
		"Complete":        func() error { return p.Complete(ctx, ids, []backup.Tags{{backup.TagDigest: "other"}}) },
		"Snapshots":       func() error { _, err := p.Snapshots(ctx, ids); return err },
		"CreateVolume":    func() error { _, err := p.CreateVolume(ctx, b.blank()); return err },
		"Attach":          func() error { _, err := p.Attach(ctx, v.ID); return err },
		"Detach":          func() error { return p.Detach(ctx, v.ID) },
		"DeleteVolume":    func() error { return p.DeleteVolume(ctx, v.ID, b.owner) },
		"DeleteSnapshots": func() error { return p.DeleteSnapshots(ctx, ids, b.owner) },
		"List":            func() error { _, err := p.List(ctx, b.owner); return err },
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, context.Canceled) {
			b.Errorf("%s: got %v, want %v", name, err, context.Canceled)
		}
	}
	if after := describe(b.list(b.owner)); after != before {
		b.Errorf("got %s, want %s", after, before)
	}
}

// describe puts an inventory in words that can be compared.
func describe(inv provider.Inventory) string {
	var out strings.Builder
	for _, v := range inv.Volumes {
		out.WriteString(string(v.ID) + " on " + v.Attached + "; ")
	}
	for _, s := range inv.Snapshots {
		out.WriteString(string(s.ID) + " " + string(s.State) + " " + s.Tags[backup.TagDigest] + "; ")
	}
	return out.String()
}
