package drill

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab"
	"cleancut/internal/load"
	"cleancut/internal/provider"
	"cleancut/internal/uml"
)

// Judged is what a kept image set turned out to be.
type Judged struct {
	Backup     backup.ID   `json:"backup"`
	Judgements []Judgement `json:"judgements"` // one a way
}

// Judgement is what it turned out to be when it was recovered in one way.
type Judgement struct {
	Recovery string         `json:"recovery"`
	Class    Class          `json:"class"` // "": not judged
	Reason   string         `json:"reason,omitempty"`
	Checks   []backup.Check `json:"checks"`
	Found    *load.Finding  `json:"found,omitempty"`
}

// JudgeKept judges a folder that --keep made once more, in those of the grid's
// recoveries for which it has all, natively or in the guest as its layout
// needs. Nothing in the folder is opened for writing: the
// images are copied into a pool of our own. The error is for what kept them
// from being judged; it wraps backup.ErrUsage where the folder holds no images.
func JudgeKept(ctx context.Context, o Options, dir string) (j Judged, err error) {
	m, ways, err := readKept(dir)
	if err != nil {
		return j, err
	}
	ways = slices.DeleteFunc(ways, func(w Way) bool { return !slices.Contains(o.Grid.Recoveries, w.Recovery) })
	if len(ways) == 0 {
		return j, fmt.Errorf("%w: %s was kept for none of the ways of recovery %q", backup.ErrUsage, dir, o.Grid.Recoveries)
	}
	var needs []string
	for _, fs := range m.Topology.Filesystems {
		needs = append(needs, needsOf(fs.Device)...)
	}
	where, why := place(ctx)(needs)
	if why != "" {
		return j, fmt.Errorf("%w: %s", backup.ErrUsage, why)
	}
	var sizes backup.Bytes
	for _, s := range m.Snapshots {
		info, err := os.Stat(filepath.Join(dir, imageFile(s.Member)))
		if err != nil {
			return j, fmt.Errorf("%w: image: %w", backup.ErrUsage, err)
		}
		sizes += backup.Bytes(info.Size())
	}
	pool := 3*sizes + 4<<30 // the images, what is restored from them, and room
	if where == string(lab.UML) && !uml.Inside() {
		return o.judgeInGuest(ctx, dir, pool)
	}
	err = atSite(ctx, o, &store{dir: dir}, pool, func(s *site) error {
		h, err := s.hosts(filepath.Join(s.work, "run"))
		if err != nil {
			return err
		}
		if m, err = s.take(ctx, h, dir, m); err != nil {
			return err
		}
		j.Backup = m.ID
		for _, w := range ways {
			v, found, jerr := JudgeImage(ctx, h.b, m.ID, w)
			if err = jerr; err != nil {
				break
			}
			one := Judgement{Recovery: w.Recovery, Checks: v.Checks, Found: found}
			one.Class, one.Reason = Judge(v, found)
			j.Judgements = append(j.Judgements, one)
		}
		undoing, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		return errors.Join(err, h.a.DeleteLast(undoing, m.ID))
	})
	return j, err
}

// needsOf is what assembling a device needs of the kernel.
func needsOf(d backup.Device) (out []string) {
	switch d.Kind {
	case backup.DeviceArray:
		out = append(out, needsMD)
	case backup.DeviceLogicalVolume:
		out = append(out, needsDM)
	}
	for _, m := range d.Members {
		out = append(out, needsOf(m)...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (o Options) judgeInGuest(ctx context.Context, dir string, pool backup.Bytes) (j Judged, err error) {
	fmt.Fprintln(o.Progress, "in a user-mode Linux guest: this kernel lacks what the layout needs, or this user is not root")
	var out bytes.Buffer
	code, err := uml.Guest{Args: []string{o.Program, "drill", "--here", "--json", "--recovery", strings.Join(o.Grid.Recoveries, ","), "--judge", dir}, Scratch: int64(pool), Stdout: &out, Stderr: o.Progress, Timeout: time.Hour}.Run(ctx)
	if err != nil {
		return j, fmt.Errorf("user-mode guest: %w", err)
	}
	if err := json.Unmarshal(out.Bytes(), &j); err != nil || j.Backup == "" {
		return j, fmt.Errorf("the guest ended with status %d and no result: %w", code, errors.Join(err, errors.New(strings.TrimSpace(out.String()))))
	}
	return j, nil
}

// take makes volumes of the images, snapshots of those, and a backup of these:
// the same manifest with other snapshots, and the WAL that was kept with it.
func (s *site) take(ctx context.Context, h hosts, dir string, m backup.Manifest) (_ backup.Manifest, err error) {
	if err := takeWAL(ctx, dir, h.a.Catalog, m); err != nil {
		return m, err
	}
	p, owner := s.pa, backup.Tags{backup.TagStorage: "judged", backup.TagHost: productionHost}
	members := m.Topology.Members()
	var set provider.Set
	var volumes []backup.VolumeID
	defer func() {
		undoing, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		for _, id := range volumes {
			err = errors.Join(err, p.Detach(undoing, id), p.DeleteVolume(undoing, id, owner))
		}
	}()
	for i, sn := range m.Snapshots {
		image := filepath.Join(dir, imageFile(sn.Member))
		info, err := os.Stat(image)
		if err != nil {
			return m, fmt.Errorf("image: %w", err)
		}
		v, err := p.CreateVolume(ctx, provider.VolumeSpec{Token: fmt.Sprint("judged-", i), Size: backup.Bytes(info.Size()), Tags: owner})
		if err != nil {
			return m, err
		}
		volumes = append(volumes, v.ID)
		dev, err := p.Attach(ctx, v.ID)
		if err != nil {
			return m, err
		}
		s.tell("copying %s", image)
		if _, err := host.Run(ctx, "dd", "if="+image, "of="+dev, "bs=1M", "conv=sparse,fsync", "status=none"); err != nil {
			return m, err
		}
		set.Members = append(set.Members, provider.Member{Volume: v.ID, Tags: backup.SnapshotTags(m.ID, m.Cluster, members[sn.Member], len(members))})
	}
	cut, err := p.Prepare(ctx, set)
	if err != nil {
		return m, err
	}
	taken, err := cut.Take(ctx)
	if err := errors.Join(err, cut.Close()); err != nil {
		return m, err
	}
	m.Snapshots = slices.Clone(m.Snapshots)
	var ids []backup.SnapshotID
	for i, t := range taken.Members {
		m.Snapshots[i].ID = t.Snapshot
		ids = append(ids, t.Snapshot)
	}
	digest, err := h.a.Catalog.PutManifest(ctx, m)
	if err != nil {
		return m, err
	}
	if err := p.Complete(ctx, ids, slices.Repeat([]backup.Tags{{backup.TagDigest: digest}}, len(ids))); err != nil {
		return m, err
	}
	return m, h.a.Catalog.PutComplete(ctx, backup.Complete{ID: m.ID, Digest: digest, Completed: time.Now().UTC()})
}
