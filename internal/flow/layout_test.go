package flow_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/flow"
	"cleancut/internal/flow/cut"
	"cleancut/internal/flow/discover"
	"cleancut/internal/flow/restore"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// layout is storage of a cluster in some shape, with files in place of a
// cluster.
type layout struct {
	t       *testing.T
	p       provider.Provider
	dir     string // of the test
	mnt     string
	volumes []backup.VolumeID
	devices []string
}

// TestEveryLayoutIsCutAndRestoredBesideItsOriginal goes from `storage create`
// to a mounted copy in the same kernel and back to nothing.
func TestEveryLayoutIsCutAndRestoredBesideItsOriginal(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	p := localPool(t)
	for _, c := range []struct {
		name, level, fs string
		volumes         int
		chunk           backup.Bytes
		want            string
	}{
		{"RAID 0 of 2, chunks of 16 KiB, XFS", "raid0", "xfs", 2, 16 << 10, "xfs raid0 16 KiB [v0 v1]"},
		{"RAID 0 of 8, chunks of 1 MiB, ext4", "raid0", "ext4", 8, 1 << 20, "ext4 raid0 1024 KiB [v0 v1 v2 v3 v4 v5 v6 v7]"},
		{"RAID 0 of 16", "raid0", "xfs", 16, 64 << 10, "xfs raid0 64 KiB [v0 v1 v2 v3 v4 v5 v6 v7 v8 v9 v10 v11 v12 v13 v14 v15]"},
		{"md linear of 2, XFS", "linear", "xfs", 2, 64 << 10, "xfs linear [v0 v1]"},
		{"LVM linear of 2, ext4", "lvm", "ext4", 2, 0, "ext4 lv [linear 0; linear 1] of [v0 v1]"},
		{"LVM striped over 4, stripes of 1 MiB, XFS", "lvm-striped", "xfs", 4, 1 << 20, "xfs lv [striped 1024 KiB 0 1 2 3] of [v0 v1 v2 v3]"},
		{"LVM striped over 16, stripes of 16 KiB, ext4", "lvm-striped", "ext4", 16, 16 << 10,
			"ext4 lv [striped 16 KiB 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] of [v0 v1 v2 v3 v4 v5 v6 v7 v8 v9 v10 v11 v12 v13 v14 v15]"},
		{"LVM on one volume", "lvm", "xfs", 1, 0, "xfs lv [linear 0] of [v0]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := labtest.Folder(t)
			o := flow.StorageOptions{Name: "pg-1.x", Host: "lab", Volumes: c.volumes, Size: 320 << 20, Level: c.level, Chunk: c.chunk, Filesystem: c.fs,
				Mountpoint: filepath.Join(dir, "pg"), MountOptions: []string{"noatime"}, Fstab: filepath.Join(dir, "fstab"), MdadmConf: filepath.Join(dir, "mdadm.conf")}
			made, err := flow.CreateStorage(t.Context(), p, o)
			if err != nil {
				t.Fatal(err)
			}
			l := &layout{t: t, p: p, dir: dir, mnt: o.Mountpoint, volumes: made.Volumes, devices: made.Devices}
			t.Cleanup(func() {
				if err := flow.DestroyStorage(labtest.Context(t), p, o); err != nil {
					t.Error(err)
				}
				l.nothingStands()
			})
			l.cutAndRestore(c.want)
			l.reboot(o, made)
		})
	}
	t.Run("LVM striped over two md arrays of two, ext4, a fault at every call of a tool", func(t *testing.T) {
		l := nested(t, p)
		m, digest, sums := l.cutAndRestore("ext4 lv [striped 64 KiB 0 1] of [raid0 64 KiB [v0 v1] raid0 64 KiB [v2 v3]]")
		l.faults(m, digest, sums)
	})
}

// nested makes what `storage create` does not.
func nested(t *testing.T, p provider.Provider) *layout {
	t.Helper()
	l := &layout{t: t, p: p, dir: labtest.Folder(t)}
	l.mnt = filepath.Join(l.dir, "pg")
	tags := backup.Tags{backup.TagStorage: "nested", backup.TagHost: "lab"}
	t.Cleanup(func() {
		ctx := labtest.Context(t)
		err := host.Release(ctx, l.devices)
		for _, v := range l.volumes {
			err = errors.Join(err, p.Detach(ctx, v), p.DeleteVolume(ctx, v, tags))
		}
		if err != nil {
			t.Error(err)
		}
		l.nothingStands()
	})
	for i := range 4 {
		v, err := p.CreateVolume(t.Context(), provider.VolumeSpec{Token: fmt.Sprint("nested", i), Size: 320 << 20, Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := p.Attach(t.Context(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		l.volumes, l.devices = append(l.volumes, v.ID), append(l.devices, dev)
	}
	var pairs []string
	for i := range 2 {
		dev, err := host.CreateArray(t.Context(), host.ArraySpec{Name: fmt.Sprint("pair", i), Level: "raid0", Chunk: 64 << 10, Members: l.devices[2*i : 2*i+2]})
		if err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, dev)
	}
	dev, err := host.CreateGroup(t.Context(), host.GroupSpec{Group: "nested", Volume: "data", Striped: true, Stripe: 64 << 10, Devices: pairs})
	if err == nil {
		err = host.MakeFilesystem(t.Context(), "ext4", dev, "nested")
	}
	if err == nil {
		err = host.MountDevice(t.Context(), dev, l.mnt, "ext4", []string{"noatime"})
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// cutAndRestore makes a backup of files and a copy of them, and removes the
// copy.
func (l *layout) cutAndRestore(want string) (m backup.Manifest, digest string, sums map[string]string) {
	l.t.Helper()
	before := l.discover()
	if got := l.shape(before); got != want {
		l.t.Fatalf("topology: got  %s\nwant %s", got, want)
	}
	l.write("first")
	sums = l.sums(l.mnt)
	m, digest = l.cut(before)
	l.write("second")
	all := l.sums(l.mnt)
	c := l.restore(m, digest)
	if got := l.sums(c.Path(l.mnt)); !reflect.DeepEqual(got, sums) {
		l.t.Errorf("the copy holds %d files, want the %d that were there, or their contents differ", len(got), len(sums))
	}
	l.identitiesDiffer(before, c)
	if after := l.discover(); !reflect.DeepEqual(after, before) {
		l.t.Errorf("the original is now\n%+v\nwas\n%+v", after, before)
	}
	if err := os.WriteFile(filepath.Join(c.Path(l.mnt), "data", "of the copy"), nil, 0o600); err != nil {
		l.t.Error(err)
	}
	if err := host.Unmount(l.t.Context(), c.Filesystems[0].Mountpoint); err != nil {
		l.t.Error(err)
	}
	if said, err := host.CheckFilesystem(l.t.Context(), c.Filesystems[0].Type, c.Filesystems[0].Device); err != nil {
		l.t.Errorf("the copy's filesystem: %v: %s", err, said)
	}
	l.undo(c)
	if got := l.sums(l.mnt); !reflect.DeepEqual(got, all) {
		l.t.Errorf("the original's files have changed")
	}
	return m, digest, sums
}

func (l *layout) discover() backup.Topology {
	l.t.Helper()
	data := filepath.Join(l.mnt, "data")
	if err := os.MkdirAll(filepath.Join(data, "pg_wal"), 0o755); err != nil {
		l.t.Fatal(err)
	}
	topology, err := discover.Run(l.t.Context(), discover.Options{Resolve: l.p.Resolve,
		Server: postgres.Running{DataDirectory: data, WALDirectory: filepath.Join(data, "pg_wal")}})
	if err != nil {
		l.t.Fatal(err)
	}
	return topology
}

// shape writes a topology of one filesystem in a line.
func (l *layout) shape(t backup.Topology) string {
	var of func(backup.Device) string
	of = func(d backup.Device) string {
		var members []string
		for _, m := range d.Members {
			members = append(members, of(m))
		}
		in := "[" + strings.Join(members, " ") + "]"
		switch d.Kind {
		case backup.DeviceArray:
			return fmt.Sprintf("%s %s%s", d.Array.Level, kib(d.Array.ChunkBytes), in)
		case backup.DeviceLogicalVolume:
			var segments []string
			for _, s := range d.LogicalVolume.Segments {
				text := string(s.Type)
				if s.Type == backup.SegmentStriped {
					text += " " + strings.TrimSpace(kib(s.StripeBytes))
				}
				for _, st := range s.Stripes {
					text += fmt.Sprint(" ", st.Member)
				}
				segments = append(segments, text)
			}
			return "lv [" + strings.Join(segments, "; ") + "] of " + in
		case backup.DeviceVolume:
			return fmt.Sprint("v", slices.Index(l.volumes, d.Volume.ID))
		}
		return string(d.Kind) + in
	}
	return t.Filesystems[0].Type + " " + of(t.Filesystems[0].Device)
}

// kib leaves out what is zero.
func kib(b backup.Bytes) string {
	if b == 0 {
		return ""
	}
	return fmt.Sprintf("%d KiB ", b>>10)
}

// write makes files of many sizes, in all a few times what a stripe holds.
func (l *layout) write(name string) {
	l.t.Helper()
	dir := filepath.Join(l.mnt, "data", name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte([]byte(strings.Repeat(name, 32)[:32])))
	for i := range 60 {
		b := make([]byte, i*i*500)
		_, _ = random.Read(b) // never fails
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), b, 0o644); err != nil {
			l.t.Fatal(err)
		}
	}
}

// sums returns what every file below dir holds.
func (l *layout) sums(dir string) map[string]string {
	l.t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = fmt.Sprintf("%d %x", len(b), sha256.Sum256(b))
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// cut freezes and cuts, and completes the snapshots.
func (l *layout) cut(t backup.Topology) (backup.Manifest, string) {
	l.t.Helper()
	ctx := l.t.Context()
	m := backup.Manifest{Version: backup.ManifestVersion, ID: backup.NewID(time.Now()), Cluster: "lab", Created: time.Now().UTC(), Topology: t,
		Server: backup.Server{DataDirectory: filepath.Join(l.mnt, "data"), VersionNum: 150000, SystemIdentifier: 1}}
	res, err := cut.Run(ctx, l.p, cut.Options{ID: m.ID, Cluster: m.Cluster, Topology: t, Mode: backup.ModeFreeze, Deadline: 2 * time.Minute, Quick: time.Minute, Rounds: 3,
		Watchdog: labtest.Watchdog(l.t), FlushedLSN: func(context.Context) (backup.LSN, error) { return 1, nil }})
	if err != nil {
		l.t.Fatal(err)
	}
	m.Cut, m.Snapshots = res.Cut, res.Snapshots
	stored, err := backup.EncodeManifest(m)
	if err != nil {
		l.t.Fatal(err)
	}
	var ids []backup.SnapshotID
	var tags []backup.Tags
	for _, s := range m.Snapshots {
		ids, tags = append(ids, s.ID), append(tags, backup.Tags{backup.TagDigest: backup.Digest(stored)})
	}
	if err := l.p.Complete(ctx, ids, tags); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := l.p.DeleteSnapshots(labtest.Context(l.t), ids, backup.Tags{backup.TagBackup: string(m.ID)}); err != nil {
			l.t.Error(err)
		}
	})
	back, err := backup.DecodeManifest(stored)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Logf("NOTE %s: %d members within %.1f ms, frozen %.0f ms", l.t.Name(), len(m.Snapshots), m.Cut.SpreadMS, m.Cut.FreezeMS)
	return back, backup.Digest(stored)
}

// restore goes as far as there is something to restore: there is no cluster in
// the image, which ends the run when the copy is mounted.
func (l *layout) restore(m backup.Manifest, digest string) backup.Copy {
	l.t.Helper()
	c, err := l.run(l.t.Context(), m, digest)
	if err == nil || len(c.Filesystems) == 0 || !strings.Contains(err.Error(), "prepare the copy") {
		l.t.Fatal(errors.Join(err, restore.Undo(l.t.Context(), l.p, c)))
	}
	return c
}

func (l *layout) run(ctx context.Context, m backup.Manifest, digest string) (backup.Copy, error) {
	c := backup.Copy{ID: backup.NewID(time.Now()), Backup: m.ID, Cluster: m.Cluster, Host: "lab", Purpose: backup.ForRestore,
		Root: filepath.Join(l.dir, "copy"), Created: time.Now().UTC()}
	if err := os.Mkdir(c.Root, 0o711); err != nil {
		return c, err
	}
	c, _, err := restore.Run(ctx, l.p, restore.Options{Manifest: m, Digest: digest, Copy: c,
		Save: func(backup.Copy) error { return nil }, Progress: func(string, string) {}})
	return c, err
}

// undo removes a copy twice and demands that only the original stands.
func (l *layout) undo(c backup.Copy) {
	l.t.Helper()
	for range 2 {
		if err := restore.Undo(l.t.Context(), l.p, c); err != nil {
			l.t.Fatal(err)
		}
	}
	inv, err := l.p.List(l.t.Context(), c.Tags())
	if err != nil || len(inv.Volumes) > 0 {
		l.t.Errorf("volumes of the copy: %v, %v", inv.Volumes, err)
	}
	names, err := filepath.Glob("/dev/*cleancut_copy*")
	nodes, err2 := filepath.Glob("/dev/mapper/*cleancut_copy*")
	if err := errors.Join(err, err2); err != nil || len(names)+len(nodes) > 0 {
		l.t.Errorf("left: %v %v, %v", names, nodes, err)
	}
	if _, err := os.Stat(c.Root); !errors.Is(err, os.ErrNotExist) {
		l.t.Errorf("the copy's folder: %v", err)
	}
}

// identitiesDiffer demands that nothing of the copy but its filesystems and
// logical volumes bears an identity of the original.
func (l *layout) identitiesDiffer(original backup.Topology, c backup.Copy) {
	l.t.Helper()
	ids := func(device string) map[string]bool {
		m, err := host.MountOf(device)
		if err != nil {
			l.t.Fatal(err)
		}
		d, err := host.Tree(l.t.Context(), m.Major, m.Minor, l.p.Resolve)
		if err != nil {
			l.t.Fatal(err)
		}
		out := map[string]bool{}
		var walk func(backup.Device)
		walk = func(d backup.Device) {
			switch d.Kind {
			case backup.DeviceArray:
				out[d.Array.UUID] = true
			case backup.DeviceLogicalVolume:
				out[d.LogicalVolume.Group.UUID], out[d.LogicalVolume.Group.Name] = true, true
				for _, pv := range d.LogicalVolume.PhysicalVolumes {
					out[pv] = true
				}
			case backup.DeviceVolume:
				out[string(d.Volume.ID)] = true
			}
			for _, m := range d.Members {
				walk(m)
			}
		}
		walk(d)
		return out
	}
	theirs, ours := ids(original.Filesystems[0].Mountpoint), ids(c.Path(original.Filesystems[0].Mountpoint))
	if len(theirs) != len(ours) {
		l.t.Errorf("identities of the copy: got %v, the original has %v", ours, theirs)
	}
	for id := range ours {
		if theirs[id] {
			l.t.Errorf("original and copy share the identity %s", id)
		}
	}
}

// reboot takes the storage down and brings it back.
func (l *layout) reboot(o flow.StorageOptions, made flow.StorageResult) {
	l.t.Helper()
	ctx := l.t.Context()
	want := l.sums(l.mnt)
	if err := host.Release(ctx, l.devices); err != nil {
		l.t.Fatal(err)
	}
	for _, v := range l.volumes {
		if err := l.p.Detach(ctx, v); err != nil {
			l.t.Fatal(err)
		}
	}
	for range 2 { // brought back already: left as it is
		res, err := flow.AttachStorage(ctx, l.p, o)
		if err != nil {
			l.t.Fatal(err)
		}
		if res.Filesystem != made.Filesystem || res.Group != made.Group || res.ArrayUUID != made.ArrayUUID || (res.LogicalVolume == "") != (made.LogicalVolume == "") || !slices.Equal(res.Volumes, made.Volumes) {
			l.t.Errorf("attached: got %+v, created was %+v", res, made)
		}
	}
	if got := l.sums(l.mnt); !reflect.DeepEqual(got, want) {
		l.t.Error("the files differ after a reboot")
	}
}

// faults lets a restore fail before and after every call of a tool; undo must
// find everything.
func (l *layout) faults(m backup.Manifest, digest string, sums map[string]string) {
	l.t.Helper()
	count := &fault.Injector{}
	c, err := l.run(fault.With(l.t.Context(), count), m, digest)
	if err == nil {
		l.t.Error("restored what is no cluster")
	}
	l.undo(c)
	tried := 0
	for i, name := range count.Passed() {
		if tool, ok := strings.CutPrefix(name, "host."); !ok || !slices.Contains([]string{"mdadm", "lvm", "dmsetup"}, strings.TrimSuffix(tool, " done")) {
			continue
		}
		tried++
		c, err := l.run(fault.With(l.t.Context(), &fault.Injector{Action: "error", At: i + 1}), m, digest)
		if !errors.Is(err, fault.ErrInjected) {
			l.t.Errorf("%s at %d: got %v", name, i+1, err)
		}
		l.undo(c)
	}
	if tried < 16 {
		l.t.Errorf("%d calls of tools in %v", tried, count.Passed())
	}
	l.t.Logf("NOTE a fault at %d points of the assembly", tried)
	c = l.restore(m, digest)
	if got := l.sums(c.Path(l.mnt)); !reflect.DeepEqual(got, sums) {
		l.t.Error("after all that, the copy differs")
	}
	l.undo(c)
}

// nothingStands demands that no array and no device mapper device is left.
func (l *layout) nothingStands() {
	l.t.Helper()
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/md*/md/array_state"} {
		left, err := filepath.Glob(pattern)
		for _, path := range left {
			if b, _ := os.ReadFile(path); strings.TrimSpace(string(b)) != "clear" {
				l.t.Errorf("left behind: %s %s", path, b)
			}
		}
		if err != nil {
			l.t.Error(err)
		}
	}
}
