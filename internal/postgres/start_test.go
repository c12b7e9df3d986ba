package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

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
	if path, err := i.Tool(t.Context(), "pg_dump"); err != nil || filepath.Dir(path) != i.Bin {
		t.Errorf("got %s, %v", path, err)
	}
	if _, err := i.Tool(t.Context(), "pg_nothing"); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "postgresql-client-15") {
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

func TestAProgramOfAnotherMajorIsNotTakenForTheServers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"postgres", "pg_amcheck"} {
		major := map[string]int{"postgres": 14, "pg_amcheck": 13}[name]
		script := fmt.Sprintf("#!/bin/sh\necho '%s (PostgreSQL) %d.1'\n", name, major)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	i, err := postgres.FindInstallation(t.Context(), 14, []string{dir})
	if err != nil || i.Bin != dir {
		t.Fatalf("got %+v, %v", i, err)
	}
	if path, err := i.Tool(t.Context(), "pg_amcheck"); !errors.Is(err, backup.ErrNotFound) || !strings.Contains(err.Error(), "where it is of 13") {
		t.Errorf("an older pg_amcheck: got %q, %v", path, err)
	}
}

func TestANewerPgDumpallReadsAnOlderServerAndNeverTheOtherWayRound(t *testing.T) {
	for _, i := range pgtest.Majors(t) {
		r, err := i.Reader(t.Context())
		switch {
		case err == nil && r.Major < i.Major:
			t.Errorf("pg_dumpall of %d would read %d", r.Major, i.Major)
		case err != nil && (i.Major <= 15 || !errors.Is(err, backup.ErrNotFound)):
			t.Errorf("PostgreSQL %d: %v", i.Major, err) // 15's is installed
		}
	}
}
