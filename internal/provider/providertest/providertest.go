// Package providertest is the contract of provider.Provider as tests: every
// provider passes Run. It also mounts filesystems for such tests.
//
//	open → Harness → one sub-test for each sentence of the contract → nothing left
//
// What always holds: each case has a provider of its own, and cleans up what
// it made; what is then left fails the case.
package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// Harness is a provider to test and what the tests cannot do by themselves.
type Harness struct {
	Provider provider.Provider
	// Size of the volumes to make; one more is made twice as large.
	Size backup.Bytes
	// Foreign is a whole block device that is not the provider's.
	Foreign string
	// Hold makes the device one that is in use until the release is called;
	// nil: it is opened.
	Hold func(t *testing.T, device string) (release func())
}

// Run checks the whole contract. open is called for each case and cleans up
// behind itself with t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	for _, c := range cases() {
		t.Run(c.sentence, func(t *testing.T) {
			h := open(t)
			b := &bench{Harness: h, T: t, owner: backup.Tags{
				backup.TagBackup: string(backup.NewID(now())), backup.TagCluster: "providertest"}}
			t.Cleanup(b.tidy)
			c.run(b)
		})
	}
}

type testCase struct {
	sentence string
	run      func(b *bench)
}

func cases() []testCase {
	all := volumeCases()
	all = append(all, cutCases()...)
	return append(all, deleteCases()...)
}

// bench is one case with the deeds that cases share. owner are the tags that
// everything of the case carries.
type bench struct {
	Harness
	*testing.T
	owner  backup.Tags
	tokens int
}

// tidy removes what the case made and fails for what is left.
func (b *bench) tidy() {
	b.Helper()
	ctx := context.WithoutCancel(b.Context())
	inv, err := b.Provider.List(ctx, b.owner)
	if err != nil {
		b.Errorf("clean up: %v", err)
	}
	for _, v := range inv.Volumes {
		if err := b.Provider.Detach(ctx, v.ID); err != nil {
			b.Errorf("clean up: %v", err)
		}
		if err := b.Provider.DeleteVolume(ctx, v.ID, b.owner); err != nil {
			b.Errorf("clean up: %v", err)
		}
	}
	var ids []backup.SnapshotID
	for _, s := range inv.Snapshots {
		ids = append(ids, s.ID)
	}
	if err := b.Provider.DeleteSnapshots(ctx, ids, b.owner); err != nil {
		b.Errorf("clean up: %v", err)
	}
	inv, err = b.Provider.List(ctx, b.owner)
	if err != nil || len(inv.Volumes)+len(inv.Snapshots) > 0 {
		b.Errorf("left behind: %v, %v", inv, err)
	}
}

// want fails the case if err does not wrap the sentinel (nil: if err is not nil).
func (b *bench) want(err, sentinel error) {
	b.Helper()
	if !errors.Is(err, sentinel) {
		b.Errorf("got %v, want %v", err, sentinel)
	}
}

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) token() string {
	b.tokens++
	return fmt.Sprintf("%s-%d", b.owner[backup.TagBackup], b.tokens)
}

func (b *bench) blank() provider.VolumeSpec {
	return provider.VolumeSpec{Token: b.token(), Size: b.Size, Tags: b.owner}
}

func (b *bench) create(spec provider.VolumeSpec) backup.Volume {
	b.Helper()
	v, err := b.Provider.CreateVolume(b.Context(), spec)
	b.must(err)
	return v
}

func (b *bench) attach(id backup.VolumeID) string {
	b.Helper()
	device, err := b.Provider.Attach(b.Context(), id)
	b.must(err)
	return device
}

// volume makes a blank volume and attaches it.
func (b *bench) volume() (backup.Volume, string) {
	b.Helper()
	v := b.create(b.blank())
	return v, b.attach(v.ID)
}

// set names volumes with the tags of the case and a member number.
func (b *bench) set(volumes ...backup.Volume) provider.Set {
	var set provider.Set
	for i, v := range volumes {
		set.Members = append(set.Members, provider.Member{Volume: v.ID, Tags: b.owner.With(backup.TagMember, fmt.Sprint(i))})
	}
	return set
}

// cut takes snapshots of volumes, which are pending or completed afterwards.
func (b *bench) cut(volumes ...backup.Volume) provider.Taken {
	b.Helper()
	c, err := b.Provider.Prepare(b.Context(), b.set(volumes...))
	b.must(err)
	taken, err := c.Take(b.Context())
	b.must(err)
	b.must(c.Close())
	if len(taken.Members) != len(volumes) {
		b.Fatalf("%d snapshots of %d volumes", len(taken.Members), len(volumes))
	}
	return taken
}

const digest = "5ca1ab1e"

// digests are the tags that complete a set of n.
func digests(n int) []backup.Tags {
	out := make([]backup.Tags, n)
	for i := range out {
		out[i] = backup.Tags{backup.TagDigest: digest}
	}
	return out
}

// snapshots takes and completes.
func (b *bench) snapshots(volumes ...backup.Volume) []backup.SnapshotID {
	b.Helper()
	ids := idsOf(b.cut(volumes...))
	b.must(b.Provider.Complete(b.Context(), ids, digests(len(ids))))
	return ids
}

func idsOf(taken provider.Taken) []backup.SnapshotID {
	var ids []backup.SnapshotID
	for _, m := range taken.Members {
		ids = append(ids, m.Snapshot)
	}
	return ids
}

func (b *bench) list(match backup.Tags) provider.Inventory {
	b.Helper()
	inv, err := b.Provider.List(b.Context(), match)
	b.must(err)
	return inv
}

// write fills a block of the device and makes that durable.
func (b *bench) write(device string, block int64, fill byte) {
	b.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	b.must(err)
	_, err = f.WriteAt(bytes.Repeat([]byte{fill}, 4096), block*4096)
	b.must(errors.Join(err, f.Sync(), f.Close()))
}

// read returns what a block of the device is filled with, or fails if it is
// not all the same.
func (b *bench) read(device string, block int64) byte {
	b.Helper()
	f, err := os.Open(device)
	b.must(err)
	defer func() { b.must(f.Close()) }()
	got := make([]byte, 4096)
	_, err = f.ReadAt(got, block*4096)
	b.must(err)
	if !bytes.Equal(got, bytes.Repeat(got[:1], 4096)) {
		b.Errorf("%s: block %d is torn", device, block)
	}
	return got[0]
}

func (b *bench) sizeOf(device string) backup.Bytes {
	b.Helper()
	f, err := os.Open(device)
	b.must(err)
	defer func() { b.must(f.Close()) }()
	n, err := f.Seek(0, io.SeekEnd)
	b.must(err)
	return backup.Bytes(n)
}

// hold keeps the device in use.
func (b *bench) hold(device string) (release func()) {
	b.Helper()
	if b.Hold != nil {
		return b.Hold(b.T, device)
	}
	f, err := os.Open(device)
	b.must(err)
	return func() { b.must(f.Close()) }
}
