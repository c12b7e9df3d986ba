package backup_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
)

var update = flag.Bool("update", false, "write the golden files of the present manifest version anew")

// TestManifestsLookAsTheyAlwaysDid pins the bytes that the present version
// writes. When ManifestVersion rises, its golden files are added beside those
// of the versions before, which nothing writes any more.
func TestManifestsLookAsTheyAlwaysDid(t *testing.T) {
	for name, m := range map[string]backup.Manifest{"raid0": raid0(), "separate": separate(), "lvm": lvm(), "bracketed": bracketed(), "golden": golden()} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("testdata", fmt.Sprintf("manifest-v%d-%s.json", backup.ManifestVersion, name))
			got, err := backup.EncodeManifest(m)
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s differs; got\n%s", path, got)
			}
			back, err := backup.DecodeManifest(want)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(back, m) {
				t.Errorf("decoded: got\n%+v\nwant\n%+v", back, m)
			}
		})
	}
}

func TestEveryManifestEverWrittenIsReadable(t *testing.T) {
	paths, err := filepath.Glob("testdata/manifest-v*.json")
	if err != nil || len(paths) < 18 {
		t.Fatalf("golden files: got %v, %v", paths, err)
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m, err := backup.DecodeManifest(b)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if m.ID == "" || len(m.Snapshots) == 0 || m.Cut.FlushLSN == 0 || m.Server.SystemIdentifier == 0 {
			t.Errorf("%s: decoded to %+v", path, m)
		}
	}
}

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		panic(err)
	}
	return t
}

func volume(id string, size backup.Bytes) *backup.Volume {
	return &backup.Volume{ID: backup.VolumeID(id), Provider: "local", Size: size}
}

// raid0 is the cluster of the story: four local volumes under one md RAID 0
// with XFS, cut by a freeze.
func raid0() backup.Manifest {
	const size = 16 << 30
	var members []backup.Device
	var snaps []backup.Snapshot
	for i := range 4 {
		v := volume(fmt.Sprintf("v-7c1e%04d", i), size)
		members = append(members, backup.Device{Kind: backup.DeviceVolume, Name: fmt.Sprintf("loop%d", i), Size: size, Volume: v})
		snaps = append(snaps, backup.Snapshot{
			ID: backup.SnapshotID(fmt.Sprintf("s-90ab%04d", i)), Volume: *v, Member: i,
			Requested: at("2026-11-22T21:17:04.412018311Z").Add(time.Duration(i) * 250 * time.Microsecond),
			Responded: at("2026-11-22T21:17:04.420553902Z").Add(time.Duration(i) * 410 * time.Microsecond),
		})
	}
	return backup.Manifest{
		Version: backup.ManifestVersion, ID: "20261122T211704Z-5f3a9c", Cluster: "main", Tool: "0.1.0", Host: "db1.example.org", Created: at("2026-11-22T21:17:04.46002Z"),
		Server: backup.Server{
			SystemIdentifier: 7442618403113921842, VersionNum: 150018, Version: "15.18 (Debian 15.18-0+deb12u1)", Timeline: 1,
			BlockSize: 8192, WALBlockSize: 8192, WALSegmentSize: 16 << 20, DataChecksums: true,
			DataDirectory: "/srv/pg/15/main", UID: 105, GID: 113, User: "postgres", Superuser: "postgres",
			Settings: map[string]string{
				"archive_mode": "on", "archive_command": "test ! -f /srv/inbox/%f && cp %p /srv/inbox/%f",
				"max_wal_size": "4096", "shared_buffers": "262144", "config_file": "/etc/postgresql/15/main/postgresql.conf",
			},
			Databases: []backup.Database{{Name: "play", Size: 131847983}, {Name: "postgres", Size: 7705379}},
			Unlogged:  []string{"play.public.scratch"},
			Notes:     []string{"full_page_writes is off"},
		},
		Topology: backup.Topology{
			Filesystems: []backup.Filesystem{{
				Type: "xfs", UUID: "0f3b2a9e-6a2e-4c5b-9d0e-0d7c3c6b1a55", Label: "pgdata", Mountpoint: "/srv/pg",
				Options: []string{"rw", "noatime", "attr2", "inode64", "logbufs=8", "logbsize=32k", "sunit=1024", "swidth=4096", "noquota"},
				Size:    4 * (size - 8<<20),
				Device: backup.Device{
					Kind: backup.DeviceArray, Name: "md0", Size: 4 * (size - 8<<20),
					Array:   &backup.Array{UUID: "a36c8f53:8f1a0d02:6f2b9c55:0e9d7b11", Name: "db1:pgdata", Level: "raid0", Metadata: "1.2", ChunkBytes: 512 << 10},
					Members: members,
				},
			}},
			Places: []backup.Place{
				{Kind: backup.PlaceData, Path: "/srv/pg/15/main", Filesystem: 0, Rel: "15/main"},
				{Kind: backup.PlaceWAL, Path: "/srv/pg/15/main/pg_wal", Filesystem: 0, Rel: "15/main/pg_wal"},
			},
			NotCovered: []string{"/etc/postgresql/15/main/postgresql.conf", "/etc/postgresql/15/main/pg_hba.conf"},
		},
		Cut: backup.Cut{
			Achieved: backup.Atomic, How: backup.ModeFreeze, FlushLSN: 0x3_A91C_07F8, Deadline: 10 * time.Second, SyncRounds: []float64{1843.2, 212.75, 61.5},
			Frozen: []backup.Frozen{{
				Mountpoint: "/srv/pg", Called: at("2026-11-22T21:17:04.3800012Z"), Held: at("2026-11-22T21:17:04.4119007Z"), Thawed: at("2026-11-22T21:17:04.4220019Z"),
			}},
			FreezeMS: 42.0007, SpreadMS: 0.75,
		},
		Snapshots: snaps,
		SideFiles: []backup.SideFile{
			{Path: "/etc/postgresql/15/main/postgresql.conf", Name: "0", SHA256: strings.Repeat("3b7e", 16), Mode: "0644", UID: 105, GID: 113},
			{Path: "/etc/postgresql/15/main/pg_hba.conf", Name: "1", SHA256: strings.Repeat("90c4", 16)},
		},
	}
}

// separate has data, WAL and two tablespaces on volumes of their own; the data
// and one tablespace are partitions of one volume. An EC2 group cut it.
func separate() backup.Manifest {
	vols := []*backup.Volume{
		{ID: "vol-0a1b2c3d4e5f60718", Provider: "ec2", Size: 500 << 30},
		{ID: "vol-0b1b2c3d4e5f60719", Provider: "ec2", Size: 50 << 30},
		{ID: "vol-0c1b2c3d4e5f6071a", Provider: "ec2", Size: 2 << 40},
	}
	disk := []backup.Device{
		{Kind: backup.DeviceVolume, Name: "nvme1n1", Size: vols[0].Size, Volume: vols[0]},
		{Kind: backup.DeviceVolume, Name: "nvme2n1", Size: vols[1].Size, Volume: vols[1]},
		{Kind: backup.DeviceVolume, Name: "nvme3n1", Size: vols[2].Size, Volume: vols[2]},
	}
	part := func(n int, start, size backup.Bytes) backup.Device {
		return backup.Device{
			Kind: backup.DevicePartition, Name: fmt.Sprintf("nvme1n1p%d", n), Size: size,
			Partition: &backup.Partition{Number: n, Start: start, Size: size}, Members: disk[:1:1],
		}
	}
	var snaps []backup.Snapshot
	for i, v := range vols {
		snaps = append(snaps, backup.Snapshot{
			ID: backup.SnapshotID(fmt.Sprintf("snap-0f00000000000000%d", i)), Volume: *v, Member: i,
			Requested: at("2026-11-23T02:00:11.1Z"), Responded: at("2026-11-23T02:00:12.31Z"),
		})
	}
	opts := []string{"rw", "relatime"}
	return backup.Manifest{
		Version: backup.ManifestVersion, ID: "20261123T020009Z-00c0de", Cluster: "shop-eu.prod_1", Tool: "0.1.0+dirty", Host: "ip-10-0-3-17", Created: at("2026-11-23T02:00:12.9Z"),
		Server: backup.Server{
			SystemIdentifier: 18446744073709551615, VersionNum: 180001, Version: "18.1", Timeline: 7,
			BlockSize: 8192, WALBlockSize: 8192, WALSegmentSize: 64 << 20,
			DataDirectory: "/data/pg", UID: 26, GID: 26, Superuser: "backup operator",
			Settings:  map[string]string{"wal_level": "logical"},
			Databases: []backup.Database{{Name: "Größe \"42\"", Size: 3 << 40}},
		},
		Topology: backup.Topology{
			Filesystems: []backup.Filesystem{
				{Type: "ext4", UUID: "11111111-2222-4333-8444-555555555555", Mountpoint: "/data", Options: opts, Size: 400 << 30, Device: part(1, 1<<20, 400<<30)},
				{Type: "xfs", UUID: "21111111-2222-4333-8444-555555555555", Mountpoint: "/wal", Options: opts, Size: 50 << 30, Device: disk[1]},
				{Type: "ext4", UUID: "31111111-2222-4333-8444-555555555555", Mountpoint: "/data/fast", Options: opts, Size: 99 << 30, Device: part(2, 400<<30+1<<20, 99<<30)},
				{Type: "xfs", UUID: "41111111-2222-4333-8444-555555555555", Label: "cold", Mountpoint: "/mnt/cold store", Options: opts, Size: 2 << 40, Device: disk[2]},
			},
			Places: []backup.Place{
				{Kind: backup.PlaceData, Path: "/data/pg", Filesystem: 0, Rel: "pg"},
				{Kind: backup.PlaceWAL, Path: "/wal", Link: "pg_wal", Filesystem: 1, Rel: "."},
				{Kind: backup.PlaceTablespace, OID: 16385, Path: "/data/fast/ts", Link: "pg_tblspc/16385", Filesystem: 2, Rel: "ts"},
				{Kind: backup.PlaceTablespace, OID: 16386, Path: "/mnt/cold store/ts", Link: "pg_tblspc/16386", Filesystem: 3, Rel: "ts"},
			},
		},
		Cut: backup.Cut{
			Achieved: backup.Atomic, How: backup.ModeGroup, FlushLSN: 0x1A2B_0000_0060, Deadline: 30 * time.Second, SyncRounds: []float64{12.5},
		},
		Snapshots: snaps,
	}
}

// lvm has its data striped over two md arrays of two volumes, and its WAL in two
// linear segments of the same volume group, which has a fifth volume that
// neither lies on.
func lvm() backup.Manifest {
	const size = 16 << 30
	m := raid0()
	m.ID, m.SideFiles, m.Topology.NotCovered = "20261201T021500Z-a10c4e", nil, nil
	m.Snapshots = nil
	disks := make([]backup.Device, 5)
	for i := range disks {
		v := volume(fmt.Sprintf("v-3d9a%04d", i), size)
		disks[i] = backup.Device{Kind: backup.DeviceVolume, Name: fmt.Sprintf("loop%d", i), Size: size, Volume: v}
		m.Snapshots = append(m.Snapshots, backup.Snapshot{ID: backup.SnapshotID(fmt.Sprintf("s-77f0%04d", i)), Volume: *v, Member: i,
			Requested: at("2026-11-22T21:17:04.412018311Z"), Responded: at("2026-11-22T21:17:04.420553902Z")})
	}
	pair := func(n int) backup.Device {
		return backup.Device{Kind: backup.DeviceArray, Name: fmt.Sprintf("md%d", 126+n), Size: 2 * (size - 8<<20), Members: disks[2*n : 2*n+2 : 2*n+2],
			Array: &backup.Array{UUID: fmt.Sprintf("b36c8f53:8f1a0d02:6f2b9c55:0e9d7b1%d", n), Name: fmt.Sprintf("db1:pair%d", n), Level: "raid0", Metadata: "1.2", ChunkBytes: 64 << 10}}
	}
	lv := func(uuid, name string, segments ...backup.Segment) *backup.LogicalVolume {
		return &backup.LogicalVolume{UUID: uuid, Name: name, Segments: segments,
			Group:           backup.VolumeGroup{UUID: "nBltJz-pdG8-exz1-t4SU-VOtx-sw3C-EsvfDb", Name: "vg-pg"},
			PhysicalVolumes: []string{"ay9XqV-w0Dm-fiRs-w5Ba-JQ5a-7np1-EUalxW", "0dE6GZ-1Hkm-6pJT-IS3u-A3mu-VAkh-Wvoo9Z", "pbKA4D-Xh2O-HexR-0TFh-jKuk-41Xv-CyGRhc"}}
	}
	on := func(member int, start backup.Bytes) backup.Stripe { return backup.Stripe{Member: member, Start: start} }
	device := func(name string, lv *backup.LogicalVolume, size backup.Bytes) backup.Device {
		return backup.Device{Kind: backup.DeviceLogicalVolume, Name: name, Size: size, LogicalVolume: lv, Members: []backup.Device{pair(0), pair(1), disks[4]}}
	}
	m.Topology.Filesystems = []backup.Filesystem{
		{Type: "ext4", UUID: "51111111-2222-4333-8444-555555555555", Label: "pgdata", Mountpoint: "/srv/pg", Options: []string{"noatime", "stripe=32"}, Size: 40 << 30,
			Device: device("dm-0", lv("l5w4iz-yx16-f7P0-WXce-glZr-CZR7-avDu2u", "data",
				backup.Segment{Type: backup.SegmentStriped, Size: 40 << 30, StripeBytes: 128 << 10, Stripes: []backup.Stripe{on(0, 1<<20), on(1, 1<<20)}}), 40<<30)},
		{Type: "xfs", UUID: "61111111-2222-4333-8444-555555555555", Mountpoint: "/srv/wal", Options: []string{"relatime", "inode64"}, Size: 6 << 30,
			Device: device("dm-1", lv("h46F6X-NTzq-UE67-JYYH-uFLR-9Xx7-97Ttcn", "wal",
				backup.Segment{Type: backup.SegmentLinear, Size: 4 << 30, Stripes: []backup.Stripe{on(0, 20<<30+1<<20)}},
				backup.Segment{Type: backup.SegmentLinear, Start: 4 << 30, Size: 2 << 30, Stripes: []backup.Stripe{on(1, 20<<30+1<<20)}}), 6<<30)},
	}
	m.Topology.Places = []backup.Place{
		{Kind: backup.PlaceData, Path: "/srv/pg/15/main", Filesystem: 0, Rel: "15/main"},
		{Kind: backup.PlaceWAL, Path: "/srv/wal/main", Link: "pg_wal", Filesystem: 1, Rel: "main"},
	}
	return m
}

// bracketed is separate, cut filesystem by filesystem on a standby.
func bracketed() backup.Manifest {
	m := separate()
	m.Cut.Achieved, m.Cut.How, m.Cut.FlushLSN = backup.Bracketed, backup.ModeBracketed, 0x1A2B_04C0_0028
	m.Bracket = &backup.Bracket{StartLSN: 0x1A2B_0000_0028, StopLSN: 0x1A2B_0400_0100, End: 0x1A2B_04C0_0028, Timeline: 7,
		Started: at("2026-11-23T02:00:10.2Z"), Stopping: at("2026-11-23T02:00:12.4Z"), Stopped: at("2026-11-23T02:00:12.5Z"),
		Label: []byte("START WAL LOCATION: 1A2B/28 (file 000000070001A2B00000000)\nLABEL: Größe\n"), Map: []byte("16385 /data/fast/ts\n16386 /mnt/cold store/ts\n"),
		Control: bytes.Repeat([]byte{0, 1, 254, 255}, 8), WAL: []string{"0000000700001A2B00000000", "0000000700001A2B00000001"}}
	return m
}

// golden is the golden image of raid0: the same places on an array of its own.
func golden() backup.Manifest {
	m := raid0()
	m.Golden = &backup.Golden{Of: m.ID, Digest: strings.Repeat("5a1e", 16), Checks: []backup.Check{
		{Name: backup.CheckRecovered, Result: backup.Passed, Detail: "first query after 1.2 s", Seconds: 0.01},
		{Name: "page checksums (pg_checksums)", Result: backup.CouldNotRun, Detail: "could not run: data_checksums is off", Seconds: 0},
	}}
	m.ID, m.Tool, m.Host, m.SideFiles = backup.GoldenID(m.ID, m.Golden.Digest), "0.2.0", "qa1.example.org", nil
	m.Topology.Filesystems[0].Device.Array.UUID = "c71b0f2a:41d6e3b8:9a5c7d10:66e2f834"
	m.Cut = backup.Cut{Achieved: backup.Atomic, How: backup.ModeStill, FlushLSN: 0x3_A91D_0028, SpreadMS: 0.75}
	return m
}

func TestPlanGolden(t *testing.T) {
	const stays, goes = "20260101T000000Z-00000a", "20260102T000000Z-00000a"
	for _, c := range []struct {
		name string
		g    backup.GoldenCandidate
		keep bool
		why  string
	}{
		{"its backup stays", backup.GoldenCandidate{Of: stays}, true, "golden image of backup " + stays},
		{"its backup goes", backup.GoldenCandidate{Of: goes}, false, "which does not stay"},
		{"held", backup.GoldenCandidate{Of: goes, Held: "held by ada"}, true, "held by ada"},
		{"in use", backup.GoldenCandidate{Of: goes, InUse: "copy x"}, true, "in use: copy x"},
		{"being made", backup.GoldenCandidate{Of: goes, Begun: "it is being made"}, true, "left alone: it is being made"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.g.ID = backup.GoldenID(c.g.Of, "digest")
			keep, remove := backup.PlanGolden([]backup.GoldenCandidate{c.g}, func(id backup.ID) bool { return id == stays })
			got := append(keep, remove...)
			if len(got) != 1 || got[0].ID != c.g.ID || (len(keep) == 1) != c.keep || !strings.Contains(strings.Join(got[0].Why, "; "), c.why) {
				t.Errorf("keep %+v, remove %+v; want it kept: %t, %q", keep, remove, c.keep, c.why)
			}
		})
	}
}

func TestAGoldenImageHasOneIDOfItsBackupsSecond(t *testing.T) {
	of := raid0().ID
	id := backup.GoldenID(of, "a")
	if _, err := backup.ParseID(string(id)); err != nil || !id.Time().Equal(of.Time()) || id == of || id != backup.GoldenID(of, "a") || id == backup.GoldenID(of, "b") {
		t.Errorf("got %s for %s, %v", id, of, err)
	}
}
