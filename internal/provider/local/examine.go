package local

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

// Examine tells what Prepare would judge by, and makes nothing: the pool's
// free space, and of every volume its extents and the time its clone is
// expected to take now. Errors are Prepare's for a volume that is not there.
func (p *Pool) Examine(ctx context.Context, ids []backup.VolumeID) (provider.Examination, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(p.dir, &st); err != nil {
		return provider.Examination{}, fmt.Errorf("free space of pool %s: %w", p.dir, err)
	}
	x := provider.Examination{
		Kind: fmt.Sprintf("pool %s on %s, clones files", p.dir, p.fs),
		Free: backup.Bytes(int64(st.Bavail) * st.Bsize),
		Size: backup.Bytes(int64(st.Blocks) * st.Bsize),
	}
	x.Need = max(x.Size/100*backup.Bytes(p.opts.headroomPercent), p.opts.headroomMin)
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return x, fmt.Errorf("examine %s: %w", id, err)
		}
		if _, err := p.readVolume(id); err != nil {
			return x, err
		}
		f, err := os.Open(p.volumeFile(id, ".img"))
		if err != nil {
			return x, fmt.Errorf("examine %s: %w", id, err)
		}
		n, err := extents(f)
		_ = f.Close()
		if err != nil {
			return x, fmt.Errorf("examine %s: %w", id, err)
		}
		x.Volumes = append(x.Volumes, provider.ExaminedVolume{ID: id, Extents: n, Estimate: p.estimate(n)})
	}
	if p.fs == fsXFS && p.freedLately() {
		x.Notes = append(x.Notes, fmt.Sprintf("something was deleted from the pool within the last %s, so clones are expected to take %d times as long", p.opts.freedWindow, freeingFactorXFS))
	}
	return x, nil
}
