package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// extentHint is what the first write to a place allocates on XFS, in bytes.
const extentHint = 1 << 20

// CreateVolume makes a volume. Sizes must be multiples of BlockSize, and spec
// must have a token and a tag of cleancut (else ErrUsage): without them a
// repetition would make a second one, and List would never show it.
func (p *Pool) CreateVolume(ctx context.Context, spec provider.VolumeSpec) (backup.Volume, error) {
	if err := checkSpec(spec); err != nil {
		return backup.Volume{}, err
	}
	v, lock, err := p.reserve(ctx, spec)
	if err != nil {
		return backup.Volume{}, fmt.Errorf("create volume: %w", err)
	}
	if lock == nil { // another call made it, perhaps not to the end
		if lock, err = lockFile(ctx, p.volumeFile(v.ID, ".json")); err != nil {
			return backup.Volume{}, fmt.Errorf("create volume: %w", err)
		}
		if v, err = p.readVolume(v.ID); err != nil {
			lock.release()
			return backup.Volume{}, fmt.Errorf("create volume: %w", err)
		}
	}
	defer lock.release()
	if !v.Ready {
		if err := p.fill(ctx, v); err != nil {
			return backup.Volume{}, fmt.Errorf("create volume %s: %w", v.ID, err)
		}
		p.log.DebugContext(ctx, "volume created", slog.String(keyVolume, string(v.ID)), slog.String(keySnapshot, string(v.From)))
	}
	return v.volume(), nil
}

func (v volumeInfo) volume() backup.Volume {
	return backup.Volume{ID: v.ID, Provider: Name, Size: v.Size}
}

func checkSpec(spec provider.VolumeSpec) error {
	switch {
	case spec.Token == "":
		return fmt.Errorf("create volume: %w: no token", backup.ErrUsage)
	case !ours(spec.Tags):
		return fmt.Errorf("create volume: %w: no tag of cleancut", backup.ErrUsage)
	case spec.Size < 0 || spec.Size == 0 && spec.From == "":
		return fmt.Errorf("create volume: %w: size %d", backup.ErrUsage, spec.Size)
	case spec.Size%BlockSize != 0:
		return fmt.Errorf("create volume: %w: size %d is no multiple of %d", backup.ErrUsage, spec.Size, BlockSize)
	}
	return nil
}

// reserve finds the volume of spec.Token, or writes the sidecar of a new one
// and returns that locked. The pool's lock keeps two calls with one token
// apart only until then, not while blocks are cloned.
func (p *Pool) reserve(ctx context.Context, spec provider.VolumeSpec) (volumeInfo, *held, error) {
	pool, err := p.lockPool(ctx)
	if err != nil {
		return volumeInfo{}, nil, err
	}
	defer pool.release()
	all, err := p.allVolumes(ctx)
	if err != nil {
		return volumeInfo{}, nil, err
	}
	for _, v := range all {
		if v.Token != spec.Token {
			continue
		}
		if v.Asked != spec.Size || v.From != spec.From || !maps.Equal(v.Tags, spec.Tags) {
			return volumeInfo{}, nil, fmt.Errorf("token %q made volume %s, which differs: %w", spec.Token, v.ID, backup.ErrExists)
		}
		return v, nil, nil
	}
	v := volumeInfo{Version: sidecarVersion, ID: backup.VolumeID("vol-" + newTail()), Size: spec.Size, Token: spec.Token,
		Asked: spec.Size, From: spec.From, Created: time.Now().UTC(), Tags: spec.Tags}
	if spec.From != "" {
		s, err := p.restorable(spec.From)
		if err != nil {
			return volumeInfo{}, nil, err
		}
		if spec.Size != 0 && spec.Size < s.Size {
			return volumeInfo{}, nil, fmt.Errorf("%w: size %d is less than the %d of %s", backup.ErrUsage, spec.Size, s.Size, s.ID)
		}
		v.Size = max(spec.Size, s.Size)
	}
	text, err := encode(v)
	if err != nil {
		return volumeInfo{}, nil, err
	}
	var lock *held
	err = effect(ctx, "local.volume.sidecar", func() error {
		if lock, err = putFile(p.volumeFile(v.ID, ".json"), text); err != nil {
			return err
		}
		return syncDir(filepath.Join(p.dir, "volumes"))
	})
	if err != nil && lock != nil {
		lock.release()
	}
	return v, lock, err
}

func (p *Pool) lockPool(ctx context.Context) (*held, error) {
	name := filepath.Join(p.dir, "lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	return lockFile(ctx, name)
}

// restorable returns a completed snapshot.
func (p *Pool) restorable(id backup.SnapshotID) (snapshotInfo, error) {
	s, err := p.readSnapshot(id)
	if err != nil {
		return snapshotInfo{}, err
	}
	if s.State != provider.Completed {
		return snapshotInfo{}, backup.Hint(fmt.Errorf("snapshot %s is %s, not completed", id, s.State), "restore a complete backup; see `cleancut list`")
	}
	return s, nil
}

// fill makes the image of a volume whose sidecar is there, and then marks it
// ready. What an earlier attempt left of the image is made anew.
func (p *Pool) fill(ctx context.Context, v volumeInfo) error {
	name := p.volumeFile(v.ID, ".img")
	err := effect(ctx, "local.volume.image", func() error {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		if v.From == "" && p.fs == fsXFS {
			// Best effort: without the hint the volume only gets into more
			// extents, and Prepare counts those.
			if err := hintExtents(f, extentHint); err != nil {
				p.log.DebugContext(ctx, "no extent size hint", slog.String(keyVolume, string(v.ID)), slog.Any(keyError, err))
			}
		}
		if err := p.fillFile(f, v); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		return syncDir(filepath.Dir(name))
	})
	if err != nil {
		return err
	}
	v.Ready = true
	text, err := encode(v)
	if err != nil {
		return err
	}
	return effect(ctx, "local.volume.ready", func() error { return replaceFile(p.volumeFile(v.ID, ".json"), text) })
}

func (p *Pool) fillFile(f *os.File, v volumeInfo) error {
	if v.From == "" {
		if p.opts.preallocate {
			if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(v.Size)); err != nil {
				return fmt.Errorf("preallocate %s: %w", v.Size, err)
			}
		}
		return f.Truncate(int64(v.Size))
	}
	if _, err := p.restorable(v.From); err != nil {
		return err
	}
	source, err := os.Open(p.snapshotFile(v.From, ".img"))
	if err != nil {
		return err
	}
	defer func() { _ = source.Close() }()
	if err := clone(f, source); err != nil {
		return err
	}
	return f.Truncate(int64(v.Size))
}

// DeleteVolume deletes a volume. The contract is provider.Provider's.
func (p *Pool) DeleteVolume(ctx context.Context, id backup.VolumeID, owner backup.Tags) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	v, err := p.readVolume(id)
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	if !carries(v.Tags, owner) {
		return fmt.Errorf("delete volume %s: %w", id, backup.ErrNotOurs)
	}
	lock, err := lockFile(ctx, p.volumeFile(id, ".json"))
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	defer lock.release()
	device, err := p.attached(id)
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	if device != nil {
		return fmt.Errorf("delete volume %s: attached as %s: %w", id, device.node(), backup.ErrInUse)
	}
	if err := p.removePair(ctx, p.volumeFile(id, ".img"), p.volumeFile(id, ".json")); err != nil {
		return fmt.Errorf("delete volume %s: %w", id, err)
	}
	p.log.DebugContext(ctx, "volume deleted", slog.String(keyVolume, string(id)))
	return nil
}
