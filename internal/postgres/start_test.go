package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func TestEverySettingOfTheIsolationHoldsWhateverTheFilesSay(t *testing.T) {
	t.Parallel()
	archive := pgtest.Folder(t)
	c := newCluster(t, map[string]string{
		"archive_mode": "on", "archive_command": "cp %p " + archive + "/%f", "archive_cleanup_command": "false", "recovery_end_command": "false",
		"primary_conninfo": "host=/nonexistent", "primary_slot_name": "standby1", "synchronous_standby_names": "",
		"max_logical_replication_workers": "4", "logging_collector": "on", "log_directory": archive,
		"cluster_name": "production", "external_pid_file": "", "max_connections": "77", "max_prepared_transactions": "7", "max_wal_senders": "12",
		"max_worker_processes": "11", "max_locks_per_transaction": "99", "shared_preload_libraries": "pg_stat_statements,pg_prewarm",
		"DateStyle": "German", "log_destination": "stderr",
	})
	c.Exec(t, "ALTER SYSTEM SET listen_addresses = '127.0.0.1'", "ALTER SYSTEM SET synchronous_standby_names = '*'", "ALTER SYSTEM SET max_connections = 200")
	c.Exec(t, "SELECT pg_sleep(2.1)", "CHECKPOINT", "SELECT pg_switch_wal()") // the tablespace is no longer fresh; something to archive
	c.Crash(t)
	p := c.copyFiles(t)
	before := snapshotOf(t, archive)
	// Unconfined: the settings alone have to hold.
	inst := start(t, p, func(c *postgres.Copy) { c.Unconfined = true })
	conn, err := inst.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	control, err := postgres.ReadControl(filepath.Join(p.Data, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	settings := postgres.Isolation(startable(t, p), control)
	got := map[string][2]string{}
	rows, err := conn.Query(t.Context(), `SELECT name, current_setting(name), source FROM pg_settings`)
	if err != nil {
		t.Fatal(err)
	}
	var name, value, source string
	if _, err := pgx.ForEachRow(rows, []any{&name, &value, &source}, func() error { got[name] = [2]string{value, source}; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, s := range settings {
		g, known := got[s.Name]
		if s.Name == "archive_command" && g[0] == "(disabled)" { // how it shows while archive_mode is off
			continue
		}
		if !known || g[0] != s.Value {
			t.Errorf("%s = %q, want %q against: %s", s.Name, g[0], s.Value, s.Danger)
		}
		if s.Danger == "" || s.Source == "" {
			t.Errorf("%s has no reason in the table", s.Name)
		}
	}
	for name, want := range map[string]string{
		"max_connections": "77", "max_prepared_transactions": "7", "max_wal_senders": "12", "max_worker_processes": "11", "max_locks_per_transaction": "99",
		"shared_preload_libraries": `"pg_stat_statements"`, "DateStyle": "German, DMY", "fsync": "on", "hba_file": filepath.Join(p.Root, ".cleancut", "pg_hba.conf"),
	} {
		if got[name][0] != want {
			t.Errorf("%s = %q, want %q", name, got[name][0], want)
		}
	}
	// ALTER SYSTEM on the copy cannot undo it either.
	for _, q := range []string{"ALTER SYSTEM SET archive_command = 'cp %p " + archive + "/%f'", "ALTER SYSTEM SET primary_conninfo = 'host=production'", "SELECT pg_reload_conf()", "SELECT pg_switch_wal()", "CHECKPOINT"} {
		if _, err := conn.Exec(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if got := query(t, conn, `SELECT current_setting('archive_command') || current_setting('primary_conninfo')`); got != "(disabled)" && got != "" {
		t.Errorf("after ALTER SYSTEM: %q", got)
	}
	if after := snapshotOf(t, archive); after != before {
		t.Errorf("the copy archived or logged where production does:\n%s", after)
	}
}

func TestLibrariesThatActByThemselvesAreNotPreloaded(t *testing.T) {
	keep, dropped := postgres.PreloadLibraries(`pg_stat_statements, "pg_cron", $libdir/timescaledb ,/usr/lib/x/pg_net.so,,citus`)
	if want := []string{"pg_stat_statements", "$libdir/timescaledb", "citus"}; !slices.Equal(keep, want) {
		t.Errorf("got %q, want %q", keep, want)
	}
	if want := []string{"pg_cron", "/usr/lib/x/pg_net.so"}; !slices.Equal(dropped, want) {
		t.Errorf("dropped %q, want %q", dropped, want)
	}
}

func TestTheIsolationKnowsWhichVersionHasWhichSetting(t *testing.T) {
	names := func(major int) []string {
		var out []string
		for _, s := range postgres.Isolation(postgres.Copy{Root: "/x", Server: backup.Server{VersionNum: major * 10000}}, postgres.Control{}) {
			out = append(out, s.Name)
		}
		return out
	}
	for _, k := range []struct {
		major int
		name  string
		want  bool
	}{
		{13, "recovery_init_sync_method", false}, {14, "recovery_init_sync_method", true},
		{14, "archive_library", false}, {15, "archive_library", true},
		{15, "promote_trigger_file", true}, {16, "promote_trigger_file", false},
		{16, "event_triggers", false}, {17, "event_triggers", true}, {18, "sync_replication_slots", true},
		{13, "archive_mode", true}, {18, "archive_mode", true},
	} {
		if got := slices.Contains(names(k.major), k.name); got != k.want {
			t.Errorf("%s in version %d: got %v, want %v", k.name, k.major, got, k.want)
		}
	}
}

// startFails prepares p, starts it after change and returns the error, having
// checked that nothing is left running.
func startFails(t *testing.T, p postgres.Plan, change func(*postgres.Copy)) error {
	t.Helper()
	if err := postgres.Prepare(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	c := startable(t, p)
	change(&c)
	inst, err := postgres.Start(t.Context(), c)
	if err == nil {
		_ = inst.Stop(t.Context())
		t.Fatal("it started")
	}
	leftBelow(t, p.Root)
	return err
}

func leftBelow(t *testing.T, root string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd")); err == nil && strings.HasPrefix(cwd, root+"/") {
			t.Errorf("process %s is left in %s", e.Name(), cwd)
		}
	}
}

func TestACopyThatDoesNotStartShowsItsLogAndAHint(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	cases := []struct {
		name   string
		plan   func(*testing.T, postgres.Plan)
		change func(*postgres.Copy)
		text   string
		hint   string
	}{
		{"a preloaded library that this host lacks", nil, func(c *postgres.Copy) { c.Settings = map[string]string{"shared_preload_libraries": "exotic_ext"} },
			`could not access file "exotic_ext"`, `production preloads the library "exotic_ext"`},
		{"a setting that this build does not know", nil, func(c *postgres.Copy) { c.Settings = map[string]string{"no_such_setting": "1"} },
			"no_such_setting", "does not know no_such_setting"},
		{"a locale that this host lacks", nil, func(c *postgres.Copy) { c.Settings = map[string]string{"lc_monetary": "xx_XX.UTF-8"} },
			"lc_monetary", "lacks a locale"},
		{"WAL that is missing", func(t *testing.T, p postgres.Plan) {
			segments, _ := filepath.Glob(filepath.Join(p.Root, "wal", "0*"))
			for _, s := range segments {
				if err := os.Remove(s); err != nil {
					t.Fatal(err)
				}
			}
		}, nil, "could not locate a valid checkpoint record", "pg_wal does not hold the WAL"},
		{"a data directory that is open to others", func(t *testing.T, p postgres.Plan) {
			if err := os.Chmod(p.Data, 0o777); err != nil {
				t.Fatal(err)
			}
		}, nil, "has invalid permissions", "closed to others"},
		{"a folder above that the server may not pass", func(t *testing.T, p postgres.Plan) {
			needRoot(t)
			if err := errors.Join(os.Chmod(p.Root, 0o700), os.Chown(p.Root, 0, 0)); err != nil {
				t.Fatal(err)
			}
		}, nil, "Permission denied", "let the copy's uid pass"},
	}
	for _, k := range cases {
		t.Run(k.name, func(t *testing.T) {
			p := c.copyFiles(t)
			if k.plan != nil {
				k.plan(t, p)
			}
			if k.change == nil {
				k.change = func(*postgres.Copy) {}
			}
			err := startFails(t, p, k.change)
			if !strings.Contains(err.Error(), k.text) || !strings.Contains(backup.HintOf(err), k.hint) {
				t.Errorf("got %v\nhint %q\nwant %q and hint %q", err, backup.HintOf(err), k.text, k.hint)
			}
		})
	}
}

func TestAFreshTablespaceIsRecoveredOnAnyHostButNeverUnconfinedBesideItsOriginal(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	err := startFails(t, p, func(c *postgres.Copy) { c.Unconfined = true })
	if !errors.Is(err, backup.ErrUnsupported) || !strings.Contains(backup.HintOf(err), "confined") {
		t.Errorf("unconfined beside the original: got %v, hint %q", err, backup.HintOf(err))
	}
	// On another host the folder is missing: it is made up for the server.
	if err := os.Rename(filepath.Join(c.Dir, "space"), filepath.Join(c.Dir, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	inst := start(t, p)
	if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
		t.Errorf("got %d rows, want 1000", got)
	}
	if exists(filepath.Join(c.Dir, "space")) {
		t.Errorf("the folder was made on the host")
	}
}

func TestAFreshTablespaceDirectlyBelowTheHostsRootNeedsItsFolder(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil)
	top, err := os.MkdirTemp("/", "pgt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(top) })
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	c.Exec(t, "CREATE TABLESPACE top LOCATION '"+pgtest.Mkdir(t, filepath.Join(top, "space"))+"'")
	c.Crash(t)
	p := c.copyFiles(t)
	inside := p.Map
	p.Map = func(path string) (string, bool) {
		if strings.HasPrefix(path, top) {
			return filepath.Join(p.Root, "top"), true
		}
		return inside(path)
	}
	if out, err := exec.CommandContext(t.Context(), "mv", filepath.Join(top, "space"), filepath.Join(p.Root, "top")).CombinedOutput(); err != nil {
		t.Fatalf("mv: %v\n%s", err, out)
	}
	if err := os.Remove(top); err != nil {
		t.Fatal(err)
	}
	err = startFails(t, p, func(*postgres.Copy) {})
	if want := "create " + filepath.Join(top, "space") + ", empty, on this host"; !strings.Contains(backup.HintOf(err), want) {
		t.Errorf("got %v, hint %q, want %q", err, backup.HintOf(err), want)
	}
	pgtest.Mkdir(t, filepath.Join(top, "space"))
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	inst := start(t, p)
	if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
		t.Errorf("after the hint was followed: got %d rows, want 1000", got)
	}
}

// disk makes a small ext4 filesystem on a loop device and mounts it.
func disk(t *testing.T, mountpoint string) (device string) {
	t.Helper()
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	file := filepath.Join(pgtest.Folder(t), "disk")
	run("truncate", "-s", "200M", file)
	device = run("losetup", "--find", "--show", file)
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", device).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v\n%s", device, err, out)
		}
	})
	run("mkfs.ext4", "-q", device)
	run("mount", device, mountpoint)
	return device
}

// umount demands that nothing holds the device afterwards.
func umount(t *testing.T, mountpoint, device string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "umount", mountpoint).CombinedOutput(); err != nil {
		t.Errorf("umount: %v\n%s", err, out)
		return
	}
	f, err := os.OpenFile(device, os.O_RDONLY|syscall.O_EXCL, 0) // EBUSY while mounted anywhere
	if err != nil {
		t.Errorf("%s was unmounted but is held: %v", mountpoint, err)
		return
	}
	_ = f.Close()
}

// A running copy must not keep production's filesystems busy, nor its own ones
// once it has stopped.
func TestACopyHoldsNoFilesystemOfTheHost(t *testing.T) {
	needRoot(t)
	c := newCluster(t, nil)
	c.Stop(t)
	p := c.copyFiles(t)
	foreign, own := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "foreign")), pgtest.Mkdir(t, filepath.Join(p.Root, "fs"))
	foreignDevice, ownDevice := disk(t, foreign), disk(t, own)
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", p.Data, own).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	p.Data = filepath.Join(own, "data")
	for _, end := range []func(*postgres.Instance) error{
		func(i *postgres.Instance) error { return i.Stop(t.Context()) },
		func(*postgres.Instance) error { return postgres.Kill(t.Context(), p.Root) },
	} {
		inst := start(t, p)
		conn, err := inst.Connect(t.Context(), "postgres")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), "CREATE TABLE public.new AS SELECT 1; DROP TABLE public.new"); err != nil {
			t.Error(err)
		}
		_ = conn.Close(t.Context())
		if foreignDevice != "" {
			umount(t, foreign, foreignDevice)
			foreignDevice = ""
		}
		if err := end(inst); err != nil {
			t.Error(err)
		}
		umount(t, own, ownDevice)
		if out, err := exec.CommandContext(t.Context(), "mount", ownDevice, own).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v\n%s", err, out)
		}
	}
	umount(t, own, ownDevice)
}

func TestAServerThatLetsNobodyInIsAnError(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	p := c.copyFiles(t)
	p.Server.Superuser = "nobody_of_that_name"
	err := startFails(t, p, func(*postgres.Copy) {})
	if !strings.Contains(err.Error(), "lets nobody in") {
		t.Errorf("got %v", err)
	}
}

func TestACopyIsStartedOnlyByItsOwnMajorVersion(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	err := startFails(t, c.copyFiles(t), func(c *postgres.Copy) { c.Installation.Major = 16 })
	if !errors.Is(err, backup.ErrUnsupported) || !strings.Contains(backup.HintOf(err), "15") {
		t.Errorf("got %v, hint %q", err, backup.HintOf(err))
	}
}

func TestAFolderTooLongForASocketIsRefusedBeforeTheStart(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	p := c.copyFiles(t)
	long := filepath.Join(filepath.Dir(p.Root), strings.Repeat("x", 80))
	if err := os.Rename(p.Root, long); err != nil {
		t.Fatal(err)
	}
	p.Root, p.Data = long, filepath.Join(long, "data")
	p.Map = func(path string) (string, bool) { return filepath.Join(long, filepath.Base(path)), true }
	if err := startFails(t, p, func(*postgres.Copy) {}); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("got %v, want ErrUsage", err)
	}
}

func TestACopyRunsAsAnotherUidThatNoPasswdEntryHas(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	const uid = 54321
	if out, err := exec.CommandContext(t.Context(), "chown", "-R", fmt.Sprintf("%d:%d", uid, uid), p.Root).CombinedOutput(); err != nil {
		t.Fatalf("chown: %v\n%s", err, out)
	}
	inst := start(t, p)
	if inst.UID != uid || inst.GID != uid {
		t.Errorf("got uid %d gid %d, want %d", inst.UID, inst.GID, uid)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", inst.PID))
	if err != nil || !strings.Contains(string(status), "Uid:\t54321\t54321\t54321\t54321") || !strings.Contains(string(status), "Groups:\t \n") {
		t.Errorf("the server runs as\n%s", status)
	}
	out, err := inst.Command(t.Context(), "pg_dumpall", "--schema-only").Output()
	if err != nil || !strings.Contains(string(out), "CREATE TABLE public.far_away") {
		t.Errorf("pg_dumpall: %v\n%s", err, out)
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestARunningCopyIsFoundAgainAndStopsOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	if _, err := postgres.Open(t.Context(), p.Root); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("before the start: got %v, want ErrNotFound", err)
	}
	first := start(t, p)
	if _, err := postgres.Start(t.Context(), startable(t, p)); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("a second start: got %v, want ErrInUse", err)
	}
	again, err := postgres.Open(t.Context(), p.Root)
	if err != nil {
		t.Fatal(err)
	}
	first.FirstQuery = 0
	if *again != *first {
		t.Errorf("got %+v, want %+v", *again, *first)
	}
	if got := ask[string](t, again, `SELECT current_setting('application_name')`); got != "cleancut" {
		t.Errorf("got %q", got)
	}
	for range 2 {
		if err := again.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := first.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	control, err := postgres.ReadControl(filepath.Join(p.Data, "global", "pg_control"))
	if err != nil || control.State != postgres.ControlShutDown {
		t.Errorf("got state %v, %v", control.State, err)
	}
	leftBelow(t, p.Root)
	if _, err := postgres.Open(t.Context(), p.Root); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("after the stop: got %v, want ErrNotFound", err)
	}
	// A clean image has nothing to replay; the next start says where it ends.
	next := start(t, p)
	if next.EndOfRecovery <= first.EndOfRecovery {
		t.Errorf("got %s, want it behind %s", next.EndOfRecovery, first.EndOfRecovery)
	}
}

func TestStopDoesNotSignalAProcessThatGotTheServersNumber(t *testing.T) {
	t.Parallel()
	other := exec.CommandContext(t.Context(), "tail", "-f", "/dev/null")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	inst := &postgres.Instance{PID: other.Process.Pid, Root: "/nonexistent", DataDirectory: "/nonexistent/data"}
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if exists(fmt.Sprintf("/proc/%d/exe", other.Process.Pid)) == false {
		t.Errorf("it is gone")
	}
	_ = other.Process.Kill()
	_ = other.Wait()
}

func TestAStartThatIsCancelledLeavesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	if err := postgres.Prepare(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	count := &fault.Injector{}
	inst, err := postgres.Start(fault.With(t.Context(), count), startable(t, p))
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for at, name := range count.Passed() {
		broken := fault.With(t.Context(), &fault.Injector{Action: "error", At: at + 1})
		if _, err := postgres.Start(broken, startable(t, p)); !errors.Is(err, fault.ErrInjected) {
			t.Errorf("at %s: got %v", name, err)
		}
		leftBelow(t, p.Root)
	}
	for _, d := range []time.Duration{0, time.Millisecond, 20 * time.Millisecond, 60 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		if inst, err := postgres.Start(ctx, startable(t, p)); err == nil {
			_ = inst.Stop(t.Context())
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %s: got %v", d, err)
		}
		cancel()
		leftBelow(t, p.Root)
	}
	inst, err = postgres.Start(t.Context(), startable(t, p))
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAStopWhoseTimeIsUpEndsTheServerAtOnceAndSaysSo(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	inst := start(t, p)
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := inst.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	cancel()
	if err := inst.Stop(ctx); err == nil {
		t.Error("got no error from a stop without time")
	}
	leftBelow(t, p.Root)
	if err := inst.Stop(t.Context()); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}

func TestKillLeavesNoProcessAndNoSharedMemory(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Crash(t)
	p := c.copyFiles(t)
	if err := postgres.Kill(t.Context(), p.Root); err != nil {
		t.Errorf("where nothing runs: %v", err)
	}
	inst := start(t, p)
	b, err := os.ReadFile(filepath.Join(p.Data, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	id := strings.Fields(strings.Split(string(b), "\n")[6])[1]
	segment := func() bool {
		out, err := os.ReadFile("/proc/sysvipc/shm")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) > 1 && f[1] == id {
				return true
			}
		}
		return false
	}
	if !segment() {
		t.Fatalf("the server has no segment %s", id)
	}
	// The postmaster dies the hard way: nobody cleans up behind it.
	if p, err := os.FindProcess(inst.PID); err != nil || p.Kill() != nil {
		t.Fatal(err)
	}
	if err := postgres.Kill(t.Context(), p.Root); err != nil {
		t.Fatal(err)
	}
	leftBelow(t, p.Root)
	if segment() {
		t.Errorf("segment %s is left", id)
	}
}

func TestOptionsReachTheServer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	c.Stop(t)
	inst := start(t, c.copyFiles(t), func(c *postgres.Copy) {
		c.NoFsync, c.NoAutovacuum, c.Unconfined = true, true, true
		c.Settings = map[string]string{"work_mem": "9MB", "cluster_name": "clone of the day"}
	})
	if got := ask[string](t, inst, `SELECT concat_ws(' ', current_setting('fsync'), current_setting('autovacuum'), current_setting('work_mem'), current_setting('cluster_name'))`); got != "off off 9MB clone of the day" {
		t.Errorf("got %q", got)
	}
}

func TestAnInstallationIsFoundByItsMajorVersionOnly(t *testing.T) {
	t.Parallel()
	odd := t.TempDir()
	if err := os.WriteFile(filepath.Join(odd, "postgres"), []byte("#!/bin/sh\necho 'postgres (PostgreSQL) 16beta1'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	i, err := postgres.FindInstallation(t.Context(), 15, []string{"/nonexistent", odd})
	if err != nil || i.Major != 15 {
		t.Fatalf("got %+v, %v", i, err)
	}
	if path, err := i.Tool("pg_dump"); err != nil || filepath.Dir(path) != i.Bin {
		t.Errorf("got %s, %v", path, err)
	}
	if _, err := i.Tool("pg_nothing"); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "postgresql-client-15") {
		t.Errorf("got %v, hint %q", err, backup.HintOf(err))
	}
	if i, err := postgres.FindInstallation(t.Context(), 16, []string{odd}); err != nil || i.Bin != odd {
		t.Errorf("got %+v, %v", i, err)
	}
	_, err = postgres.FindInstallation(t.Context(), 14, []string{odd})
	if !errors.Is(err, backup.ErrNotFound) || !strings.Contains(err.Error(), odd+" (has 16)") || !strings.Contains(err.Error(), "/usr/lib/postgresql/14/bin") || !strings.Contains(backup.HintOf(err), "apt install postgresql-14") {
		t.Errorf("got %v, hint %q", err, backup.HintOf(err))
	}
}
