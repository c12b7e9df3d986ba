package local_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
	"cleancut/internal/provider/providertest"
)

func owner() backup.Tags { return backup.Tags{backup.TagBackup: "20261122T211704Z-5f3a9c"} }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused fails unless err wraps the sentinel (if any), says each of the words
// and has a hint.
func refused(t *testing.T, err, sentinel error, words ...string) {
	t.Helper()
	if err == nil || sentinel != nil && !errors.Is(err, sentinel) || backup.HintOf(err) == "" {
		t.Fatalf("got %v (hint %q), want %v with a hint", err, backup.HintOf(err), sentinel)
	}
	for _, w := range words {
		if !strings.Contains(err.Error()+" "+backup.HintOf(err), w) {
			t.Errorf("%q does not say %q (hint %q)", err, w, backup.HintOf(err))
		}
	}
}

func TestAPoolOnAFilesystemWithoutReflinksIsRefusedByName(t *testing.T) {
	dir := providertest.Mount(t, "ext4", 64<<20)
	refused(t, local.Init(t.Context(), dir), backup.ErrUnsupported, "ext4", "mkfs.xfs -m reflink=1", "mkfs.btrfs")
	_, err := local.Open(t.Context(), dir, quiet())
	refused(t, err, backup.ErrUnsupported, "ext4", dir)
}

func TestAFolderThatIsNoPoolIsNotMadeOne(t *testing.T) {
	dir := providertest.Mount(t, "xfs", 320<<20)
	_, err := local.Open(t.Context(), dir, quiet())
	refused(t, err, backup.ErrNotFound, "pool.json", "cleancut storage create")
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
	_, err = local.Open(t.Context(), filepath.Join(dir, "nothing"), quiet())
	refused(t, err, os.ErrNotExist)
}

func TestAPoolIsMadeOnce(t *testing.T) {
	dir := filepath.Join(providertest.Mount(t, "xfs", 320<<20), "pool")
	refused(t, local.Init(t.Context(), filepath.Join(dir, "deeper")), os.ErrNotExist)
	must(t, local.Init(t.Context(), dir))
	before, err := os.ReadFile(filepath.Join(dir, "pool.json"))
	must(t, err)
	refused(t, local.Init(t.Context(), dir), backup.ErrExists)
	after, err := os.ReadFile(filepath.Join(dir, "pool.json"))
	must(t, err)
	if string(before) != string(after) {
		t.Errorf("got %s, want %s", after, before)
	}
	must(t, os.WriteFile(filepath.Join(dir, "pool.json"), []byte(`{"version": 2, "id": "0123456789abcdef"}`), 0o600))
	_, err = local.Open(t.Context(), dir, quiet())
	refused(t, err, backup.ErrUnsupported, "format 2")
}

func TestANearlyFullPoolIsRefusedBeforeTheCut(t *testing.T) {
	p, dir := openPool(t, "xfs", 512<<20)
	v, _ := volume(t, p, "one", 16<<20)
	filler, err := os.Create(filepath.Join(dir, "filler"))
	must(t, err)
	defer func() { must(t, filler.Close()) }()
	must(t, unix.Fallocate(int(filler.Fd()), 0, 0, int64(free(t, dir))-60<<20))
	_, err = p.Prepare(t.Context(), set(v))
	refused(t, err, nil, "free", "cleancut delete")
	if inv := list(t, p); len(inv.Snapshots) > 0 {
		t.Errorf("left: %+v", inv.Snapshots)
	}
	generous, err := local.Open(t.Context(), dir, quiet(), local.Headroom(1, 1<<20))
	must(t, err)
	c, err := generous.Prepare(t.Context(), set(v))
	must(t, err)
	must(t, c.Close())
}

func free(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	return st.Bavail * uint64(st.Bsize)
}

func TestAPreallocatedVolumeHasItsBlocks(t *testing.T) {
	for fs, size := range filesystems() {
		t.Run(fs, func(t *testing.T) {
			for want, opts := range map[bool][]local.Option{false: nil, true: {local.Preallocate()}} {
				p, dir := openPool(t, fs, size, opts...)
				v, _ := volume(t, p, "one", 16<<20)
				var st unix.Stat_t
				must(t, unix.Stat(image(dir, v), &st))
				if got := st.Blocks*512 >= 16<<20; got != want {
					t.Errorf("%d bytes are there, preallocated %v", st.Blocks*512, want)
				}
			}
		})
	}
}

func image(dir string, v backup.Volume) string {
	return filepath.Join(dir, "volumes", string(v.ID)+".img")
}

// volume makes a blank volume and attaches it until the test ends.
func volume(t testing.TB, p *local.Pool, token string, size backup.Bytes) (backup.Volume, string) {
	t.Helper()
	v, err := p.CreateVolume(t.Context(), provider.VolumeSpec{Token: token, Size: size, Tags: owner()})
	must(t, err)
	device, err := p.Attach(t.Context(), v.ID)
	must(t, err)
	detachAtEnd(t, p, v.ID)
	return v, device
}

func set(volumes ...backup.Volume) provider.Set {
	var s provider.Set
	for _, v := range volumes {
		s.Members = append(s.Members, provider.Member{Volume: v.ID, Tags: owner()})
	}
	return s
}

func list(t testing.TB, p *local.Pool) provider.Inventory {
	t.Helper()
	inv, err := p.List(t.Context(), owner())
	must(t, err)
	return inv
}
