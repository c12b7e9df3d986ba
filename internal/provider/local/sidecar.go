package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
)

const sidecarVersion = 1

var (
	volumePattern   = regexp.MustCompile(`^vol-[0-9a-f]{17}$`)
	snapshotPattern = regexp.MustCompile(`^snap-[0-9a-f]{17}$`)
)

// volumeInfo is the sidecar of a volume.
type volumeInfo struct {
	Version int               `json:"version"`
	ID      backup.VolumeID   `json:"id"`
	Size    backup.Bytes      `json:"size"`
	Token   string            `json:"token"`
	Asked   backup.Bytes      `json:"asked,omitempty"` // VolumeSpec.Size, to compare repetitions with
	From    backup.SnapshotID `json:"from,omitempty"`
	Ready   bool              `json:"ready"` // false: its file is still being made
	Created time.Time         `json:"created"`
	Tags    backup.Tags       `json:"tags"`
}

// snapshotInfo is the sidecar of a snapshot.
type snapshotInfo struct {
	Version int `json:"version"`
	provider.Snapshot
}

func decode(b []byte, into any) error {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fmt.Errorf("cut short or no JSON: %w", err)
	}
	if head.Version > sidecarVersion {
		return backup.Hint(fmt.Errorf("version %d, this cleancut reads up to %d: %w", head.Version, sidecarVersion, backup.ErrUnsupported),
			"use the cleancut that wrote it, or a newer one")
	}
	if head.Version < 1 {
		return errors.New("no version")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if dec.More() {
		return errors.New("more than one JSON value")
	}
	return nil
}

func decodeVolume(b []byte) (volumeInfo, error) {
	var v volumeInfo
	if err := decode(b, &v); err != nil {
		return volumeInfo{}, err
	}
	switch {
	case !volumePattern.MatchString(string(v.ID)):
		return volumeInfo{}, fmt.Errorf("volume id %q", v.ID)
	case v.From != "" && !snapshotPattern.MatchString(string(v.From)):
		return volumeInfo{}, fmt.Errorf("snapshot id %q", v.From)
	case v.Size <= 0 || v.Size%BlockSize != 0 || v.Asked < 0 || v.Asked > v.Size:
		return volumeInfo{}, fmt.Errorf("size %d, asked for %d", v.Size, v.Asked)
	}
	return v, nil
}

func decodeSnapshot(b []byte) (snapshotInfo, error) {
	var s snapshotInfo
	if err := decode(b, &s); err != nil {
		return snapshotInfo{}, err
	}
	switch {
	case !snapshotPattern.MatchString(string(s.ID)):
		return snapshotInfo{}, fmt.Errorf("snapshot id %q", s.ID)
	case !volumePattern.MatchString(string(s.Volume)):
		return snapshotInfo{}, fmt.Errorf("volume id %q", s.Volume)
	case s.Size <= 0 || s.Size%BlockSize != 0:
		return snapshotInfo{}, fmt.Errorf("size %d", s.Size)
	case s.State != provider.Pending && s.State != provider.Completed:
		return snapshotInfo{}, fmt.Errorf("state %q", s.State)
	}
	return s, nil
}

func encode(info any) ([]byte, error) {
	b, err := json.MarshalIndent(info, "", "  ")
	return append(b, '\n'), err
}

// readVolume returns the sidecar of one volume, or ErrNotFound.
func (p *Pool) readVolume(id backup.VolumeID) (volumeInfo, error) {
	if !volumePattern.MatchString(string(id)) {
		return volumeInfo{}, fmt.Errorf("volume %q: %w", id, backup.ErrNotFound)
	}
	name := p.volumeFile(id, ".json")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return volumeInfo{}, fmt.Errorf("volume %s: %w", id, backup.ErrNotFound)
	}
	if err != nil {
		return volumeInfo{}, err
	}
	v, err := decodeVolume(b)
	if err == nil && v.ID != id {
		err = fmt.Errorf("describes %s", v.ID)
	}
	if err != nil {
		return volumeInfo{}, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

// readSnapshot returns the sidecar of one snapshot, or ErrNotFound. Its state
// is Broken if the file it describes is gone or has the wrong size.
func (p *Pool) readSnapshot(id backup.SnapshotID) (snapshotInfo, error) {
	if !snapshotPattern.MatchString(string(id)) {
		return snapshotInfo{}, fmt.Errorf("snapshot %q: %w", id, backup.ErrNotFound)
	}
	name := p.snapshotFile(id, ".json")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return snapshotInfo{}, fmt.Errorf("snapshot %s: %w", id, backup.ErrNotFound)
	}
	if err != nil {
		return snapshotInfo{}, err
	}
	s, err := decodeSnapshot(b)
	if err == nil && s.ID != id {
		err = fmt.Errorf("describes %s", s.ID)
	}
	if err != nil {
		return snapshotInfo{}, fmt.Errorf("%s: %w", name, err)
	}
	st, err := os.Stat(p.snapshotFile(id, ".img"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return snapshotInfo{}, err
	}
	if err != nil || s.State == provider.Completed && st.Size() != int64(s.Size) {
		s.State = provider.Broken
	}
	return s, nil
}

// names returns the ids in a folder of the pool whose sidecars are there.
func (p *Pool) names(ctx context.Context, folder string, pattern *regexp.Regexp) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(p.dir, folder))
	if err != nil {
		return nil, fmt.Errorf("list pool: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && pattern.MatchString(id) {
			ids = append(ids, id)
		}
	}
	return ids, ctx.Err()
}

func (p *Pool) allVolumes(ctx context.Context) ([]volumeInfo, error) {
	ids, err := p.names(ctx, "volumes", volumePattern)
	if err != nil {
		return nil, err
	}
	all := make([]volumeInfo, 0, len(ids))
	for _, id := range ids {
		v, err := p.readVolume(backup.VolumeID(id))
		if errors.Is(err, backup.ErrNotFound) {
			continue // deleted since the folder was read
		}
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

func (p *Pool) allSnapshots(ctx context.Context) ([]snapshotInfo, error) {
	ids, err := p.names(ctx, "snapshots", snapshotPattern)
	if err != nil {
		return nil, err
	}
	all := make([]snapshotInfo, 0, len(ids))
	for _, id := range ids {
		s, err := p.readSnapshot(backup.SnapshotID(id))
		if errors.Is(err, backup.ErrNotFound) {
			continue // deleted since the folder was read
		}
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}
