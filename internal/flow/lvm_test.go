package flow_test

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/state"
)

// TestAClusterOnALogicalVolumeIsBackedUpAndVerified runs a real server on ext4
// on a striped logical volume, and every check of level full on the copy.
func TestAClusterOnALogicalVolumeIsBackedUpAndVerified(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	ctx, p, dir := t.Context(), localPool(t), labtest.Folder(t)
	o := flow.StorageOptions{Name: "pg", Host: "lab", Volumes: 4, Size: 512 << 20, Level: "lvm-striped", Chunk: 64 << 10, Filesystem: "ext4",
		Mountpoint: filepath.Join(dir, "pg"), MountOptions: []string{"noatime"}, Fstab: filepath.Join(dir, "fstab"), MdadmConf: filepath.Join(dir, "mdadm.conf")}
	if _, err := flow.CreateStorage(ctx, p, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := flow.DestroyStorage(labtest.Context(t), p, o); err != nil {
			t.Error(err)
		}
	})
	server := pgtest.New(t, pgtest.Options{Data: filepath.Join(o.Mountpoint, "data"), Sync: true, Checksums: true})
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	f := &flow.Flow{Provider: p, Catalog: catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), "lab"), State: st, Cluster: "lab", Host: "lab", Tool: "test",
		Watchdog: labtest.Watchdog(t), Log: slog.New(slog.DiscardHandler)}
	m, err := f.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: server.DSN("postgres")}, Mode: backup.ModeAuto, Deadline: 5 * time.Minute, Quick: time.Minute, Rounds: 5})
	if err != nil {
		t.Fatal(err)
	}
	if d := m.Topology.Filesystems[0].Device; m.Cut.Achieved != backup.Atomic || d.Kind != backup.DeviceLogicalVolume || len(m.Snapshots) != 4 || m.Topology.Filesystems[0].Type != "ext4" {
		t.Errorf("got %s of %d volumes below a %s", m.Cut.Achieved, len(m.Snapshots), d.Kind)
	}
	v, err := f.Verify(ctx, flow.VerifyOptions{ID: m.ID, Level: backup.LevelFull})
	if err != nil {
		t.Fatal(err)
	}
	checked := false
	for _, c := range v.Checks {
		t.Logf("NOTE %s: %s %s", c.Name, c.Result, c.Detail)
		checked = checked || strings.HasPrefix(c.Name, "ext4 check of /dev/dm-") && c.Result == backup.Passed
	}
	if !v.Good() || !checked {
		t.Errorf("verdict: %+v", v)
	}
}
