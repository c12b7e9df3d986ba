package flow_test

import (
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// well is a host on which nothing is wrong.
func well(scope flow.Scope) flow.Condition {
	return flow.Condition{
		For: scope, Local: true, Kernel: host.Kernel{Release: "6.1.0", Major: 6, Minor: 1}, Loop: true, MD: true, Deadline: 10 * time.Second,
		StatePath: "/var/lib/cleancut-host", Backups: map[backup.ID]flow.BackupState{"20261122T211704Z-5f3a9c": flow.Complete},
		Needs: flow.Needs{Arrays: true, Filesystems: []string{"xfs"}}, Version: "PostgreSQL 15.18 on x86_64", Filesystems: 2, Members: 4,
		Examined: &provider.Examination{Kind: "pool", Free: 50 << 30, Size: 100 << 30, Need: 10 << 30, Volumes: []provider.ExaminedVolume{
			{ID: "vol-1", Extents: 100, Estimate: 22 * time.Millisecond}}},
		Majors: []flow.MajorFacts{{Major: 15, Bin: "/usr/lib/postgresql/15/bin"}},
	}
}

func find(t *testing.T, findings []flow.Finding, name string) flow.Finding {
	t.Helper()
	for _, f := range findings {
		if f.Name == name && f.Result != flow.Healthy {
			return f
		}
	}
	for _, f := range findings {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("no finding %q in %v", name, findings)
	return flow.Finding{}
}

func TestDiagnoseSaysWhatIsWrongAndHowToMendIt(t *testing.T) {
	gone := errors.New("gone")
	cases := []struct {
		name   string
		scope  flow.Scope
		plant  func(x *flow.Condition)
		line   string
		want   flow.Health
		detail string
		mend   string
	}{
		{"another user than root", flow.ForAll, func(x *flow.Condition) { x.UID = 1000 }, "root", flow.Bad, "uid 1000", "sudo"},
		{"a container without CAP_SYS_ADMIN", flow.ForAll, func(x *flow.Condition) { x.Missing = []string{"CAP_SYS_ADMIN"} }, "capability", flow.Bad, "no freeze", "container"},
		{"memory that cannot be locked", flow.ForBackup, func(x *flow.Condition) { x.Missing, x.Watchdog = []string{"CAP_IPC_LOCK"}, gone }, "capability", flow.Bad, "locked in memory", ""},
		{"no watchdog on a host that only restores", flow.ForRestore, func(x *flow.Condition) { x.Missing = []string{"CAP_IPC_LOCK", "CAP_SYS_RESOURCE"} }, "capabilities", flow.Healthy, "", ""},
		{"a watchdog that the OOM killer may end", flow.ForBackup, func(x *flow.Condition) { x.WatchdogNote = "not exempt" }, "watchdog", flow.Warning, "not exempt", "CAP_SYS_RESOURCE"},
		{"an old kernel on a restore host", flow.ForRestore, func(x *flow.Condition) { x.Kernel = host.Kernel{Release: "5.10.0", Major: 5, Minor: 10} }, "kernel", flow.Bad, "5.12", "newer"},
		{"an old kernel on a host that only backs up", flow.ForBackup, func(x *flow.Condition) { x.Kernel = host.Kernel{Release: "5.10.0", Major: 5, Minor: 10} }, "kernel", flow.Healthy, "5.10.0", ""},
		{"a permission that is denied", flow.ForRestore, func(x *flow.Condition) {
			x.Permissions = []provider.Permission{{Action: "ec2:AttachVolume", Grant: provider.Denied, For: "attach the volumes of copies", Roles: []string{"restore host"}}}
		}, "permission ec2:AttachVolume", flow.Bad, "attach the volumes of copies", "docs/aws.md"},
		{"a permission that nobody answers for", flow.ForBackup, func(x *flow.Condition) {
			x.Permissions = []provider.Permission{{Action: "ec2:CreateSnapshot", Grant: provider.Unasked, For: "cut", Roles: []string{"backup host"}}}
		}, "permission ec2:CreateSnapshot", flow.Unknown, "needed to cut", ""},
		{"another host's permission", flow.ForBackup, func(x *flow.Condition) {
			x.Permissions = []provider.Permission{{Action: "ec2:AttachVolume", Grant: provider.Denied, Roles: []string{"restore host"}}, {Action: "ec2:CreateTags", Grant: provider.Allowed, Roles: []string{"backup host"}}}
		}, "permissions", flow.Healthy, "ec2:CreateTags", ""},
		{"no loop devices", flow.ForRestore, func(x *flow.Condition) { x.Loop = false }, "loop devices", flow.Bad, "loop-control", "modprobe loop"},
		{"no md for a striped backup", flow.ForRestore, func(x *flow.Condition) { x.MD = false }, "md arrays", flow.Bad, "striped", "modprobe md-mod"},
		{"no md and nothing striped", flow.ForRestore, func(x *flow.Condition) { x.MD, x.Needs.Arrays = false, false }, "md arrays", flow.Healthy, "", ""},
		{"mdadm missing for a striped cluster", flow.ForBackup, func(x *flow.Condition) { x.Missed = map[string]string{"mdadm": "mdadm"} }, "tool mdadm", flow.Bad, "", "apt install mdadm"},
		{"lvm missing for a cluster on logical volumes", flow.ForBackup, func(x *flow.Condition) { x.Missed, x.Needs.LVM = map[string]string{"lvm": "lvm2"}, true }, "tool lvm", flow.Bad, "", "apt install lvm2"},
		{"lvm missing and no logical volume", flow.ForAll, func(x *flow.Condition) { x.Missed = map[string]string{"lvm": "lvm2", "dmsetup": "dmsetup"} }, "system tools", flow.Healthy, "", ""},
		{"mdadm missing and nothing striped", flow.ForAll, func(x *flow.Condition) { x.Missed, x.Needs.Arrays = map[string]string{"mdadm": "mdadm"}, false }, "system tools", flow.Healthy, "", ""},
		{"a filesystem checker missing", flow.ForAll, func(x *flow.Condition) { x.Missed = map[string]string{"xfs_repair": "xfsprogs"} }, "tool xfs_repair", flow.Warning, "verify", "apt install xfsprogs"},
		{"a state folder that cannot be made", flow.ForAll, func(x *flow.Condition) { x.State = backup.Hint(gone, "run as root") }, "state folder", flow.Bad, "gone", "run as root"},
		{"a state folder with too long a name", flow.ForAll, func(x *flow.Condition) { x.StatePath = "/" + strings.Repeat("x", 60) }, "state folder", flow.Bad, "107", "shorter"},
		{"a state folder that nobody else may pass through", flow.ForRestore, func(x *flow.Condition) { x.StateBlocked = "/srv/s" }, "state folder", flow.Bad, "cannot pass", "chmod o+x /srv/s"},
		{"no pool", flow.ForRestore, func(x *flow.Condition) { x.Provider, x.Examined = backup.Hint(gone, "mount it"), nil }, "provider", flow.Bad, "gone", "mount it"},
		{"a nearly full pool", flow.ForBackup, func(x *flow.Condition) { x.Examined.Free = 5 << 30 }, "free space", flow.Bad, "5.00 GiB of 100 GiB free, a cut wants at least 10.0 GiB", "delete"},
		{"a nearly full pool on a restore host", flow.ForRestore, func(x *flow.Condition) { x.Examined.Free = 5 << 30 }, "free space", flow.Warning, "5.00 GiB", "delete"},
		{"a volume in too many extents", flow.ForBackup, func(x *flow.Condition) {
			x.Examined.Volumes[0] = provider.ExaminedVolume{ID: "vol-1", Extents: 300000, Estimate: 6 * time.Second}
		}, "volume vol-1", flow.Bad, "300000 extents", "--deadline 13s"},
		{"a volume in many extents", flow.ForBackup, func(x *flow.Condition) {
			x.Examined.Volumes[0] = provider.ExaminedVolume{ID: "vol-1", Extents: 100000, Estimate: 2 * time.Second}
		}, "volume vol-1", flow.Warning, "2s inside the freeze", ""},
		{"a catalog that is not there on a restore host", flow.ForRestore, func(x *flow.Condition) { x.CatalogNew, x.Catalog = true, gone }, "catalog", flow.Bad, "gone", "--catalog"},
		{"a catalog that the first backup will make", flow.ForBackup, func(x *flow.Condition) { x.CatalogNew, x.Catalog = true, gone }, "catalog", flow.Warning, "first backup", "mount"},
		{"a catalog of another cluster", flow.ForRestore, func(x *flow.Condition) { x.Backups = nil }, "catalog", flow.Warning, "no backup to restore", "--cluster"},
		{"an unreadable backup", flow.ForAll, func(x *flow.Condition) { x.Backups["20261122T211704Z-000000"] = flow.Doubtful }, "catalog", flow.Warning, "1 complete, 0 incomplete, 1 unreadable", "cleancut list"},
		{"a read-only catalog", flow.ForBackup, func(x *flow.Condition) { x.CatalogReadOnly = gone }, "catalog writable", flow.Bad, "gone", "disk"},
		{"a read-only catalog on a restore host", flow.ForRestore, func(x *flow.Condition) { x.CatalogReadOnly = gone }, "catalog writable", flow.Warning, "restore works", ""},
		{"a server that is down", flow.ForAll, func(x *flow.Condition) { x.Server = gone }, "server", flow.Bad, "gone", "--for restore"},
		{"a server that is down leaves the topology open", flow.ForAll, func(x *flow.Condition) { x.Server = gone }, "topology", flow.Unknown, "could not be asked", ""},
		{"a setting that is refused", flow.ForBackup, func(x *flow.Condition) {
			x.Findings = []postgres.Finding{{Refuse: true, Text: "fsync is off", Hint: "set fsync = on"}}
		}, "preflight", flow.Bad, "fsync is off", "set fsync = on"},
		{"a setting worth knowing", flow.ForBackup, func(x *flow.Condition) { x.Findings = []postgres.Finding{{Text: "checksums are off"}} }, "preflight", flow.Warning, "checksums", ""},
		{"data on an unknown device", flow.ForBackup, func(x *flow.Condition) { x.Topology = errors.New("one\ntwo") }, "topology", flow.Bad, "one; two", "cleancut topology"},
		{"the state folder on a filesystem to freeze", flow.ForBackup, func(x *flow.Condition) { x.KeepAway = backup.Hint(gone, "move it") }, "own files", flow.Bad, "", "move it"},
		{"PostgreSQL of the backup's version missing", flow.ForRestore, func(x *flow.Condition) { x.Majors[0].Found = backup.Hint(gone, "apt install postgresql-15") }, "PostgreSQL 15 programs", flow.Bad, "gone", "apt install"},
		{"pg_dumpall missing", flow.ForRestore, func(x *flow.Condition) { x.Majors[0].Missing = []string{"pg_dumpall"} }, "PostgreSQL 15 programs", flow.Bad, "dump", ""},
		{"pg_amcheck missing", flow.ForRestore, func(x *flow.Condition) { x.Majors[0].Missing = []string{"pg_amcheck"} }, "PostgreSQL 15 programs", flow.Warning, "verify", ""},
		{"no version known", flow.ForRestore, func(x *flow.Condition) { x.Majors = nil }, "PostgreSQL programs", flow.Unknown, "neither", ""},
		{"an interrupted backup", flow.ForAll, func(x *flow.Condition) { x.Plan = []flow.Action{{Kind: flow.RemoveBackup, Name: "backup X"}} }, "left-overs", flow.Warning, "backup X", "cleancut sweep"},
		{"a copy that is meant to stay", flow.ForAll, func(x *flow.Condition) { x.Plan = []flow.Action{{Kind: flow.OnlyList, Name: "copy X"}} }, "left-overs", flow.Healthy, "1 thing in use", ""},
		{"left-overs that cannot be looked for", flow.ForAll, func(x *flow.Condition) { x.Sweep = gone }, "left-overs", flow.Unknown, "gone", ""},
		{"a host that has frozen before", flow.ForAll, func(x *flow.Condition) { x.Frozen = []string{"/srv/pg"} }, "still frozen?", flow.Unknown, "/srv/pg", "cleancut thaw"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			x := well(c.scope)
			c.plant(&x)
			got := find(t, flow.Diagnose(x), c.line)
			if got.Result != c.want || !strings.Contains(got.Detail, c.detail) || !strings.Contains(got.Mend, c.mend) {
				t.Errorf("got %+v, want %s with %q, to mend by %q", got, c.want, c.detail, c.mend)
			}
		})
	}
}

func TestDiagnoseOfAWellHostIsAllHealthy(t *testing.T) {
	for _, scope := range []flow.Scope{flow.ForBackup, flow.ForRestore, flow.ForAll} {
		names := map[string]bool{}
		for _, f := range flow.Diagnose(well(scope)) {
			names[f.Name] = true
			if f.Result != flow.Healthy || f.Mend != "" {
				t.Errorf("%s: got %+v, want it healthy", scope, f)
			}
		}
		if got, want := names["server"], scope != flow.ForRestore; got != want {
			t.Errorf("%s: looks at a server: got %v, want %v", scope, got, want)
		}
		if got, want := names["PostgreSQL 15 programs"], scope != flow.ForBackup; got != want {
			t.Errorf("%s: looks at programs: got %v, want %v", scope, got, want)
		}
	}
}

// doctored is a real pool with one volume, a server on it, and a flow over it.
func doctored(t *testing.T) (*flow.Flow, flow.DoctorOptions) {
	t.Helper()
	dir := labtest.Folder(t)
	pool := filepath.Join(labtest.Pool(t, "xfs", 4<<30), "pool")
	if err := local.Init(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	p, err := local.Open(t.Context(), pool, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	storage := flow.StorageOptions{Name: "pg", Host: "doctored", Volumes: 1, Size: 512 << 20, Filesystem: "xfs", Mountpoint: filepath.Join(dir, "pg"),
		Fstab: filepath.Join(dir, "fstab"), MdadmConf: filepath.Join(dir, "mdadm.conf")}
	if _, err := flow.CreateStorage(t.Context(), p, storage); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := flow.DestroyStorage(labtest.Context(t), p, storage); err != nil {
			t.Error(err)
		}
	})
	server := pgtest.New(t, pgtest.Options{Data: filepath.Join(storage.Mountpoint, "data"), Sync: true, Checksums: true})
	store := catalog.NewDir(filepath.Join(dir, "catalog"))
	if err := store.Put(t.Context(), "clusters/main/intents/none", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	st, err := state.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	f := &flow.Flow{Provider: p, Catalog: catalog.New(store, "main"), State: st, Cluster: "main", Host: "doctored", Tool: "test",
		Watchdog: labtest.Watchdog(t), Log: slog.New(slog.DiscardHandler)}
	return f, flow.DoctorOptions{For: flow.ForAll, Store: store, Backup: flow.BackupOptions{Target: postgres.Target{DSN: server.DSN("postgres"), DataDirectory: server.DataDirectory},
		Deadline: 10 * time.Second, KeepAway: []string{filepath.Join(dir, "catalog"), pool}}}
}

func TestDoctorLooksAtARealHostAndLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	f, o := doctored(t)
	examine := func(o flow.DoctorOptions) []flow.Finding {
		t.Helper()
		seen, err := f.Examine(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return flow.Diagnose(seen)
	}
	bad := func(findings []flow.Finding) (out []string) {
		for _, f := range findings {
			if f.Result == flow.Bad {
				out = append(out, f.Name+": "+f.Detail)
			}
		}
		return out
	}
	findings := examine(o)
	if got := bad(findings); len(got) > 0 {
		t.Errorf("of a host in order: got %q", got)
	}
	if got, want := find(t, findings, "topology").Detail, "1 filesystem on 1 volume, all covered"; got != want {
		t.Errorf("topology: got %q, want %q", got, want)
	}
	if !slices.ContainsFunc(findings, func(f flow.Finding) bool {
		return strings.HasPrefix(f.Name, "volume vol-") && strings.Contains(f.Detail, "extents")
	}) {
		t.Errorf("no volume was examined: %v", findings)
	}
	if left, err := o.Store.List(t.Context(), "doctor/"); err != nil || len(left) > 0 {
		t.Errorf("left in the catalog: %v, %v", left, err)
	}
	if inv, err := f.Provider.List(t.Context(), nil); err != nil || len(inv.Snapshots) > 0 {
		t.Errorf("left in the pool: %v, %v", inv.Snapshots, err)
	}

	inside := o
	inside.Backup.KeepAway = []string{o.Backup.Target.DataDirectory}
	if got := find(t, examine(inside), "own files"); got.Result != flow.Bad {
		t.Errorf("a catalog on a filesystem to freeze: got %+v", got)
	}
	down := o
	down.Backup.Target = postgres.Target{DSN: "host=" + t.TempDir() + " port=1 user=postgres"}
	if got := bad(examine(down)); len(got) != 1 || !strings.HasPrefix(got[0], "server: ") {
		t.Errorf("without a server: got %q, want the server alone", got)
	}
	down.For = flow.ForRestore
	if got := bad(examine(down)); len(got) > 0 {
		t.Errorf("on a host that only restores: got %q", got)
	}
}
