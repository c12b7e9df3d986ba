package drill

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"cleancut/internal/load"
)

// preset is a load with the server settings that belong to it.
type preset struct {
	name     string
	settings []string
	which    func(seed int64, mounts []string) load.Which
	// warm waits until all of it is at work.
	warm func(ctx context.Context, l *load.Load) error
}

// presets are the loads. Heavy is the lab's case in which a skewed cut does
// the most damage; light is a quiet server with PostgreSQL's own defaults, on
// which careless cuts pass their tests; metadata makes the filesystems work:
// many small tables that come and go, WAL files switched all the time, and
// beside the cluster, on each of its filesystems, files of others.
func presets() []preset {
	small := []string{"max_wal_size=256MB", "autovacuum_naptime=10s"}
	words := func(seed int64, sessions int) *load.WordsOptions {
		return &load.WordsOptions{Seed: seed, Sessions: sessions}
	}
	return []preset{
		{"light", append(slices.Clone(small), "shared_buffers=128MB"), func(seed int64, _ []string) load.Which {
			return load.Which{Words: words(seed, 1), Transfers: &load.TransfersOptions{Seed: seed, Sessions: 1}}
		}, func(ctx context.Context, l *load.Load) error {
			return errors.Join(l.Words.Await(ctx, 50), l.Transfers.Await(ctx, 50))
		}},
		{"heavy", append(slices.Clone(small), load.HeavySettings()...), func(seed int64, _ []string) load.Which {
			return load.Which{Words: words(seed, 1), Transfers: &load.TransfersOptions{Seed: seed}, Bulk: &load.BulkOptions{MaxBytes: 150 << 20},
				Churn: &load.ChurnOptions{CheckpointEvery: load.HeavyCheckpointEvery}}
		}, func(ctx context.Context, l *load.Load) error {
			return errors.Join(l.Words.Await(ctx, 100), l.Transfers.Await(ctx, 50), l.Churn.Await(ctx, 2))
		}},
		{"metadata", append(slices.Clone(small), load.HeavySettings()...), func(seed int64, mounts []string) load.Which {
			files := load.FilesOptions{Seed: seed}
			for _, m := range mounts {
				files.Folders = append(files.Folders, filepath.Join(m, "files"))
			}
			return load.Which{Files: &files, Words: words(seed, 1), Transfers: &load.TransfersOptions{Seed: seed, Sessions: 1},
				Churn: &load.ChurnOptions{Sessions: 4, Rows: 50, Keep: 40, SwitchEvery: 2 * time.Second, CheckpointEvery: load.HeavyCheckpointEvery}}
		}, func(ctx context.Context, l *load.Load) error {
			return errors.Join(l.Words.Await(ctx, 50), l.Churn.Await(ctx, 100), l.Files.Await(ctx, 1000))
		}},
	}
}

func presetOf(name string) (preset, bool) {
	i := slices.IndexFunc(presets(), func(p preset) bool { return p.name == name })
	if i < 0 {
		return preset{}, false
	}
	return presets()[i], true
}
