package local_test

import (
	"log/slog"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/provider/local"
	"cleancut/internal/provider/providertest"
)

// filesystems are those a pool can be on, with the least that mkfs takes.
func filesystems() map[string]backup.Bytes {
	return map[string]backup.Bytes{"xfs": 512 << 20, "btrfs": 512 << 20}
}

func openPool(t testing.TB, fs string, size backup.Bytes, opts ...local.Option) (*local.Pool, string) {
	t.Helper()
	dir := providertest.Mount(t, fs, size)
	if err := local.Init(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	p, err := local.Open(t.Context(), dir, slog.New(slog.DiscardHandler), opts...)
	if err != nil {
		t.Fatal(err)
	}
	return p, dir
}

func TestPoolsKeepTheContract(t *testing.T) {
	for fs, size := range filesystems() {
		t.Run(fs, func(t *testing.T) {
			providertest.Run(t, func(t *testing.T) providertest.Harness {
				p, _ := openPool(t, fs, size)
				return providertest.Harness{Provider: p, Size: 16 << 20, Foreign: providertest.Loop(t, 1<<20)}
			})
		})
	}
}

// digests are the tags that complete a set of n.
func digests(n int) []backup.Tags {
	out := make([]backup.Tags, n)
	for i := range out {
		out[i] = backup.Tags{backup.TagDigest: "5ca1ab1e"}
	}
	return out
}
