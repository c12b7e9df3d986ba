package postgres_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// Redo of CREATE TABLESPACE uses production's path literally: on production's
// host it would set permissions there and, before 15, empty it.
func TestRecoveryOfAFreshTablespaceDoesNotTouchTheOriginal(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil) // its tablespace is newer than the last checkpoint
	c.Crash(t)
	p := c.copyFiles(t)
	before := snapshotOf(t, c.Dir)
	inst := start(t, p)
	if got := ask[int](t, inst, "SELECT count(*)::int FROM far_away"); got != 1000 {
		t.Errorf("got %d rows, want 1000", got)
	}
	link := filepath.Join(p.Data, c.running.Tablespaces[0].Link)
	if got, err := os.Readlink(link); err != nil || got != filepath.Join(p.Root, "space") {
		t.Errorf("the copy's tablespace leads to %s (%v), want %s/space", got, err, p.Root)
	}
	ask[string](t, inst, "SELECT 'writes go to the copy' FROM pg_switch_wal()")
	conn, err := inst.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "INSERT INTO far_away SELECT generate_series(1, 50000); CHECKPOINT"); err != nil {
		t.Error(err)
	}
	_ = conn.Close(t.Context())
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if after := snapshotOf(t, c.Dir); after != before {
		t.Errorf("the original was changed from\n%sto\n%s", before, after)
	}
}

func TestACopysServerCannotWriteToTheHost(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil)
	c.Stop(t)
	victim := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "victim"))
	inst := start(t, c.copyFiles(t))
	conn, err := inst.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	if _, err := conn.Exec(t.Context(), "COPY (SELECT 1) TO '"+victim+"/x'"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
		t.Errorf("got %v, want a read-only filesystem", err)
	}
	if _, err := conn.Exec(t.Context(), "COPY (SELECT 1) TO '"+inst.Root+"/data/inside'"); err != nil {
		t.Errorf("inside the copy: %v", err)
	}
	if err := os.WriteFile(filepath.Join(victim, "y"), nil, 0o600); err != nil {
		t.Errorf("this process: %v", err)
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
