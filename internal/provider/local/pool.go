package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/provider"
)

// Name is what backup.Volume.Provider says of volumes of this provider.
const Name = "local"

// BlockSize is the logical block size of every attached volume; sizes are
// multiples of it. Left to itself a loop device with direct I/O takes it from
// the file: 512 for a sparse one, 4096 for a reflinked one, and then XFS made
// on the first does not mount on the second (lab.md).
const BlockSize = 4096

const poolVersion = 1

const (
	keyVolume   = "volume"
	keySnapshot = "snapshot"
	keyDevice   = "device"
	keyError    = "error"
)

// Pool is a folder of volumes and snapshots.
type Pool struct {
	dir  string
	fs   fsType
	log  *slog.Logger
	opts options
}

var _ provider.Provider = (*Pool)(nil)

type options struct {
	preallocate     bool
	headroomPercent int64
	headroomMin     backup.Bytes
	freedWindow     time.Duration
}

// Option changes a default of Open.
type Option func(*options)

// Preallocate gives blank volumes all their blocks at once (fallocate(2)), so
// that they stay in few extents and production cannot run out of space before
// its first snapshot. Default: sparse.
func Preallocate() Option { return func(o *options) { o.preallocate = true } }

// Headroom makes Prepare refuse when the pool has less free than percent of
// its size, or less than least. Default: 10 % and 64 MiB. After a cut every
// overwritten block needs a new one, and a full pool gives production ENOSPC.
func Headroom(percent int, least backup.Bytes) Option {
	return func(o *options) { o.headroomPercent, o.headroomMin = int64(percent), least }
}

type poolFile struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// Init makes the folder pool a pool; a missing last folder is made. It refuses
// a filesystem without reflinks, and with ErrExists a folder that is a pool
// already. Interrupted, it can be called again.
func Init(ctx context.Context, pool string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("make pool %s: %w", pool, err)
	}
	dir, err := filepath.Abs(pool)
	if err != nil {
		return fmt.Errorf("make pool %s: %w", pool, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return backup.Hint(fmt.Errorf("make pool: %w", err), "mount the filesystem of the pool first; only the last folder is made")
	}
	if _, err := proveReflink(ctx, dir); err != nil {
		return err
	}
	for _, sub := range []string{"volumes", "snapshots"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make pool: %w", err)
		}
	}
	id := make([]byte, 8)
	_, _ = rand.Read(id) // never returns an error (Go 1.24)
	text, err := json.MarshalIndent(poolFile{Version: poolVersion, ID: hex.EncodeToString(id), Created: time.Now().UTC()}, "", "  ")
	if err != nil {
		return fmt.Errorf("make pool: %w", err)
	}
	return effect(ctx, "local.init", func() error {
		held, err := putFile(filepath.Join(dir, "pool.json"), append(text, '\n'))
		if errors.Is(err, backup.ErrExists) {
			return backup.Hint(fmt.Errorf("%s is a pool already: %w", dir, err), "use it as it is")
		}
		if err != nil {
			return fmt.Errorf("make pool: %w", err)
		}
		held.release()
		return syncDir(dir)
	})
}

// Open opens a pool that Init made. It refuses a folder without pool.json and
// a filesystem without reflinks, which it proves by cloning a small file.
func Open(ctx context.Context, pool string, log *slog.Logger, opts ...Option) (*Pool, error) {
	dir, err := filepath.Abs(pool)
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", pool, err)
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, backup.Hint(fmt.Errorf("open pool: %w", err), "name the folder of the pool in [provider.local] pool, and see that it is mounted")
	}
	kind, err := proveReflink(ctx, dir)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "pool.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, backup.Hint(fmt.Errorf("%s is no pool, it has no pool.json: %w", dir, backup.ErrNotFound),
			"make it one with `cleancut storage create`, or see that the right filesystem is mounted there")
	}
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	var head poolFile
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, fmt.Errorf("open pool: %s/pool.json: %w", dir, err)
	}
	if head.Version != poolVersion {
		return nil, backup.Hint(fmt.Errorf("pool %s has format %d, this cleancut knows %d: %w", dir, head.Version, poolVersion, backup.ErrUnsupported),
			"use the cleancut that made it, or a newer one")
	}
	p := &Pool{dir: dir, fs: kind, log: log, opts: options{headroomPercent: 10, headroomMin: 64 << 20, freedWindow: 3 * time.Minute}}
	for _, set := range opts {
		set(&p.opts)
	}
	return p, nil
}

// proveReflink clones a small file in dir and says what filesystem it is.
func proveReflink(ctx context.Context, dir string) (fsType, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("try a reflink in %s: %w", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("open pool %s: %w", dir, err)
	}
	kind := fsType(st.Type)
	source, err := tempFile(dir)
	if err != nil {
		return 0, noReflink(dir, kind, err)
	}
	defer func() { _ = source.Close() }() // nameless, so closing removes it
	if _, err := source.Write(make([]byte, BlockSize)); err != nil {
		return 0, fmt.Errorf("try a reflink in %s: %w", dir, err)
	}
	target, err := tempFile(dir)
	if err != nil {
		return 0, noReflink(dir, kind, err)
	}
	defer func() { _ = target.Close() }()
	if err := unix.IoctlFileClone(int(target.Fd()), int(source.Fd())); err != nil {
		return 0, noReflink(dir, kind, err)
	}
	return kind, nil
}

func noReflink(dir string, kind fsType, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("try a reflink in %s: %w", dir, err)
	}
	return backup.Hint(fmt.Errorf("pool %s is on %s, which cannot clone files (FICLONE: %w): %w", dir, kind, err, backup.ErrUnsupported),
		"put the pool on a filesystem with reflinks: `mkfs.xfs -m reflink=1 DEVICE` or `mkfs.btrfs DEVICE`")
}

// fsType is the f_type of statfs(2).
type fsType int64

const (
	fsXFS   fsType = unix.XFS_SUPER_MAGIC
	fsBtrfs fsType = unix.BTRFS_SUPER_MAGIC
)

func (t fsType) String() string {
	names := map[fsType]string{
		fsXFS: "xfs", fsBtrfs: "btrfs", unix.EXT4_SUPER_MAGIC: "ext4", unix.TMPFS_MAGIC: "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse",
		unix.F2FS_SUPER_MAGIC: "f2fs", unix.HOSTFS_SUPER_MAGIC: "hostfs", 0x2fc12fc1: "zfs",
	}
	if name, ok := names[t]; ok {
		return name
	}
	return fmt.Sprintf("a filesystem of type %#x", int64(t))
}

// effect does something outside, between two fault points.
func effect(ctx context.Context, point string, do func() error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", point, err)
	}
	if err := fault.Point(ctx, point); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return fault.Point(ctx, point+".done")
}

func (p *Pool) volumeFile(id backup.VolumeID, ext string) string {
	return filepath.Join(p.dir, "volumes", string(id)+ext)
}

func (p *Pool) snapshotFile(id backup.SnapshotID, ext string) string {
	return filepath.Join(p.dir, "snapshots", string(id)+ext)
}

// newTail returns the 17 hexadecimal digits of a fresh id.
func newTail() string {
	b := make([]byte, 9)
	_, _ = rand.Read(b) // never returns an error (Go 1.24)
	return hex.EncodeToString(b)[:17]
}
