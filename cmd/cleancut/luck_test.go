package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/state"
)

// fifreeze is FIFREEZE of Linux include/uapi/linux/fs.h.
const fifreeze = 0xC0045877

func freeze(t *testing.T, mountpoint string) {
	t.Helper()
	d, err := os.Open(mountpoint)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	if err := unix.IoctlSetInt(int(d.Fd()), fifreeze, 0); err != nil {
		t.Fatal(err)
	}
}

// with is the lab with more environment.
func (p *production) with(env ...string) *lab {
	l := *p.lab
	l.extra = env
	return &l
}

func TestAPoolWithoutReflinksIsRefused(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newLab(t, "ext4", 1<<30)
	for _, args := range [][]string{{"storage", "create", "data", "--mount", filepath.Join(l.dir, "data"), "--fstab", filepath.Join(l.dir, "fstab"), "--mdadm-conf", filepath.Join(l.dir, "m")}, {"backup"}, {"sweep"}} {
		l.run(t, args...).refused(t, 1, l.pool, "ext4, which cannot clone files", "mkfs.xfs -m reflink=1")
	}
	entries, err := os.ReadDir(l.pool)
	if err != nil || len(entries) > 1 { // lost+found
		t.Errorf("left in the pool: %v %v", entries, err)
	}
	for _, f := range []string{"fstab", "data", "catalog"} {
		if _, err := os.Stat(filepath.Join(l.dir, f)); err == nil {
			t.Errorf("%s was made", f)
		}
	}
}

// TestBadLuckOfABackup: each case is refused by name, with its exit code and
// what to do, and leaves nothing.
func TestBadLuckOfABackup(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { f(t); p.clean(t) })
	}
	run("the pool is nearly full", p.nearlyFull)
	run("the server is down", func(t *testing.T) {
		p.server.Stop(t)
		p.run(t, "backup").refused(t, 1, p.server.SocketDir, "what to do")
		p.server.Start(t)
	})
	run("the server is a standby", func(t *testing.T) {
		s := pgtest.New(t, pgtest.Options{NoStart: true, Sync: true, Settings: map[string]string{"max_connections": "100"}})
		pgtest.Append(t, filepath.Join(s.DataDirectory, "standby.signal"), "")
		s.Start(t)
		p.with("CLEANCUT_DSN="+s.DSN("postgres")).run(t, "backup").refused(t, 1, "standby", "take the backup of the primary")
	})
	run("a tablespace lies on a device of nobody", p.unknownDevice)
	run("the cluster is on tmpfs", func(t *testing.T) {
		dir := filepath.Join(labtest.Folder(t), "m")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("none", dir, "tmpfs", 0, "size=200m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(dir, 0) })
		s := pgtest.New(t, pgtest.Options{Dir: pgtest.Mkdir(t, filepath.Join(dir, "s")), Sync: true})
		p.with("CLEANCUT_DSN="+s.DSN("postgres")).run(t, "backup").refused(t, 1, s.DataDirectory, "tmpfs", "not supported")
	})
	run("other data lies beside the cluster", p.foreign)
	run("catalog or state lie on what is frozen", p.keptAway)
	run("somebody else has frozen one filesystem", p.frozenByOthers)
	run("two backups at once", p.twoAtOnce)
	run("a volume is badly fragmented", p.fragmented)
}

func (p *production) nearlyFull(t *testing.T) {
	var st unix.Statfs_t
	if err := unix.Statfs(p.pool, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(p.pool, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Remove(f.Name()) }()
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-int64(st.Blocks)*st.Bsize/20), f.Close()); err != nil {
		t.Fatal(err)
	}
	p.run(t, "backup").refused(t, 1, "pool "+p.pool, "free", "delete old backups")
}

// fragmented gives one volume some 25,000 extents: every other block of a file
// on it is written, each by itself.
func (p *production) fragmented(t *testing.T) {
	file := filepath.Join(p.mounts[2], ".fragments")
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close(); _ = os.Remove(file) }()
	const blocks = 50_000
	if err := unix.Fallocate(int(f.Fd()), 0, 0, blocks*4096); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
			if err != nil {
				t.Error(err)
				return
			}
			for b := 2 * w; b < blocks && err == nil; b += 16 {
				_, err = unix.Pwrite(int(f.Fd()), page, int64(b)*4096)
			}
			if err := errors.Join(err, unix.Munmap(page)); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	p.run(t, "backup", "--deadline", "500ms").refused(t, 1, "more than half of the deadline of 500ms", "badly fragmented", "--deadline")
	m := p.manifestOf(t, p.must(t, "backup", "--json", "--deadline", "30s"))
	p.must(t, "delete", string(m.ID))
}

func (p *production) unknownDevice(t *testing.T) {
	image := filepath.Join(p.dir, "plain.img")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(400<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	device, detach := loop(t, image)
	defer detach()
	tool(t, "mkfs.xfs", "-q", device)
	dir := filepath.Join(p.dir, "plain")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", device, dir)
	defer func() { tool(t, "umount", dir); _ = os.Remove(dir) }()
	space := pgtest.Mkdir(t, filepath.Join(dir, "space"))
	p.server.Exec(t, "CREATE TABLESPACE plain LOCATION '"+space+"'")
	for _, command := range []string{"backup", "topology"} {
		p.run(t, command).refused(t, 1, "tablespace "+space, device, "not")
	}
	p.server.Exec(t, "DROP TABLESPACE plain")
}

func (p *production) foreign(t *testing.T) {
	other := filepath.Join(p.mounts[0], "accounts")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Remove(other) }()
	p.run(t, "backup").refused(t, 1, p.mounts[0], other, "frozen along with the cluster", "--allow-foreign")
	m := p.manifestOf(t, p.must(t, "backup", "--json", "--allow-foreign"))
	p.must(t, "delete", string(m.ID))
}

func (p *production) keptAway(t *testing.T) {
	catalogThere, stateThere := filepath.Join(p.mounts[1], ".c", "catalog"), filepath.Join(p.mounts[2], ".s")
	for _, e := range []string{"CLEANCUT_CATALOG=file://" + catalogThere, "CLEANCUT_STATE=" + stateThere, "TMPDIR=" + p.mounts[0]} {
		_, path, _ := strings.Cut(e, "=")
		p.with(e).run(t, "backup").refused(t, 2, strings.TrimPrefix(path, "file://"), "going to be frozen", "put catalog, state and pool on another filesystem")
	}
	if _, err := os.Stat(filepath.Dir(catalogThere)); err == nil {
		t.Errorf("%s was made", catalogThere)
	}
	_ = os.RemoveAll(stateThere)
}

func (p *production) frozenByOthers(t *testing.T) {
	freeze(t, p.mounts[2])
	p.run(t, "backup").refused(t, 1, p.mounts[2], "frozen already", "cleancut thaw")
	if err := thaw(p.mounts[2]); err != nil {
		t.Errorf("the other's freeze was taken away: FITHAW said %v", err)
	}
	p.clean(t)
	freeze(t, p.mounts[2])
	o := p.run(t, "thaw")
	if want := p.mounts[2] + ": WAS FROZEN, thawed now"; o.code != 0 || !strings.Contains(o.out, want) || !strings.Contains(o.out, p.mounts[0]+": not frozen") {
		_ = thaw(p.mounts[2])
		t.Errorf("thaw: exit %d, want %q\n%s%s", o.code, want, o.out, o.err)
	}
	o = p.run(t, "thaw", "--json", p.mounts[0])
	var got struct {
		Found []struct {
			Mountpoint string
			WasFrozen  bool `json:"was_frozen"`
		}
	}
	if err := json.Unmarshal([]byte(o.out), &got); err != nil || len(got.Found) < 3 || got.Found[0].WasFrozen {
		t.Errorf("thaw --json: %v %s", err, o.out)
	}
}

func (p *production) twoAtOnce(t *testing.T) {
	o, reached := p.stopped(t, "  discover ", nil, func(cmd *exec.Cmd) {
		_ = cmd.Process.Signal(syscall.SIGSTOP)
		p.run(t, "backup").refused(t, 1, "another backup of cluster main is running", "wait for it")
		p.run(t, "delete", string(backup.ID("20261122T211704Z-5f3a9c"))).refused(t, 1, "a backup of cluster main is running", "wait for it")
		if o := p.run(t, "sweep"); o.code != 0 {
			t.Errorf("sweep beside a backup: exit %d\n%s", o.code, o.err)
		}
		_ = cmd.Process.Signal(syscall.SIGCONT)
	}, "backup")
	if !reached || o.code != 0 {
		t.Fatalf("the first backup: exit %d\n%s", o.code, o.err)
	}
	p.must(t, "delete", strings.TrimSuffix(strings.Fields(o.out)[1], ":"))
}

// TestBadLuckOfARestore: what a restore meets in catalog, pool and host.
func TestBadLuckOfARestore(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	m := p.manifestOf(t, p.must(t, "backup", "--json"))
	id, root := string(m.ID), filepath.Join(p.dir, "copy", "a")
	restore := func(t *testing.T, l *lab) outcome {
		t.Helper()
		return l.run(t, "restore", id, "--to", root)
	}
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { f(t); p.clean(t) })
	}
	run("a second copy beside the first", func(t *testing.T) { p.twoCopies(t, id, root) })
	run("a folder that is not empty", func(t *testing.T) {
		full := filepath.Join(p.dir, "full")
		if err := errors.Join(os.Mkdir(full, 0o755), os.WriteFile(filepath.Join(full, "precious"), []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
		p.run(t, "restore", id, "--to", full).refused(t, 2, full, "is not empty", "choose a new folder")
		if b, err := os.ReadFile(filepath.Join(full, "precious")); err != nil || string(b) != "x" {
			t.Errorf("what was there: %q, %v", b, err)
		}
	})
	run("ids that nobody has", func(t *testing.T) {
		const nobody = "20200101T000000Z-000000"
		for _, args := range [][]string{{"delete", nobody}, {"show", nobody}, {"restore", nobody, "--to", root}, {"verify", nobody}, {"dump", nobody}} {
			p.run(t, args...).refused(t, 1, nobody, "not found", "cleancut list")
		}
		p.run(t, "restore", "--undo", root).refused(t, 1, root, "no copy at", "cleancut sweep --dry-run")
	})
	run("a dump whose file exists", func(t *testing.T) { p.dumps(t, id) })
	run("the manifest is cut short", func(t *testing.T) {
		p.edited(t, id, "manifest.json", func(b []byte) []byte { return b[:len(b)/2] }, func() {
			o := restore(t, p.lab)
			o.refused(t, 4, "manifest.json", "cut short", "put that file back from a copy of the catalog")
			p.leavesAlone(t, id, "unreadable", "cut short")
		})
	})
	run("the manifest is of a newer version", func(t *testing.T) {
		mine, newer := fmt.Sprintf(`"version": %d`, backup.ManifestVersion), fmt.Sprint(backup.ManifestVersion+1)
		p.edited(t, id, "manifest.json", func(b []byte) []byte {
			return []byte(strings.Replace(string(b), mine, `"version": `+newer+`, "new": true`, 1))
		}, func() {
			restore(t, p.lab).refused(t, 1, "manifest version "+newer, fmt.Sprintf("reads up to %d", backup.ManifestVersion), "or a newer one")
			p.leavesAlone(t, id, "unreadable", "manifest version "+newer)
		})
	})
	run("another manifest than the one that was completed", func(t *testing.T) {
		p.edited(t, id, "manifest.json", func(b []byte) []byte { return append(b, '\n') }, func() {
			restore(t, p.lab).refused(t, 4, "complete.json", "it was written for manifest", "put that file back")
		})
	})
	run("complete.json is not there", func(t *testing.T) {
		p.edited(t, id, "complete.json", nil, func() {
			restore(t, p.lab).refused(t, 1, id, "incomplete", "complete.json", "cleancut sweep")
			p.leavesAlone(t, id, "incomplete", "complete.json")
		})
	})
	run("the host lacks that major version", func(t *testing.T) { p.otherMajor(t, m, root) })
	run("a restore on another host, which knows nothing", func(t *testing.T) { p.elsewhere(t, id) })
	run("a snapshot lacks its file", func(t *testing.T) {
		file := filepath.Join(p.pool, "snapshots", string(m.Snapshots[1].ID)+".img")
		p.hidden(t, func() { restore(t, p.lab).refused(t, 1, string(m.Snapshots[1].ID)) }, file)
	})
	run("a snapshot was deleted behind our back", func(t *testing.T) {
		base := filepath.Join(p.pool, "snapshots", string(m.Snapshots[1].ID))
		p.hidden(t, func() {
			restore(t, p.lab).refused(t, 1, string(m.Snapshots[1].ID), "behind cleancut's back", "choose another backup")
			p.run(t, "verify", id).refused(t, 1, string(m.Snapshots[1].ID), "choose another backup")
			if v := p.verdicts(t, m.ID); len(v) > 0 {
				t.Errorf("verdicts %+v, want none", v)
			}
		}, base+".img", base+".json")
	})
	t.Run("list and show have the shape of their golden files", func(t *testing.T) {
		p.must(t, "verify", "--level", "start", id)
		p.must(t, "dump", id)
		golden(t, "json/list.txt", shape(t, p.must(t, "list", "--json").out))
		golden(t, "json/show.txt", shape(t, p.must(t, "show", "--json", id).out))
	})
}

func (p *production) twoCopies(t *testing.T, id, root string) {
	second := filepath.Join(p.dir, "copy", "b")
	sockets := map[string]string{}
	for _, to := range []string{root, second} {
		var c backup.Copy
		if err := json.Unmarshal([]byte(p.must(t, "restore", id, "--to", to, "--json").out), &c); err != nil {
			t.Fatal(err)
		}
		sockets[to] = c.SocketDir
	}
	for to, socket := range sockets {
		got := tool(t, filepath.Join(p.server.Installation.Bin, "psql"), "-h", socket, "-U", "postgres", "-Atc", "SELECT count(*) FROM ledger WHERE n < 0")
		if got != "2000" {
			t.Errorf("the copy in %s has %s rows, want 2000", to, got)
		}
	}
	p.clean(t, root, second)
	p.run(t, "restore", id, "--to", root).refused(t, 2, "is not empty")
	if o := p.run(t, "sweep"); o.code != 0 || !strings.Contains(o.out, "meant to stay") {
		t.Errorf("sweep: exit %d\n%s%s", o.code, o.out, o.err)
	}
	p.must(t, "restore", "--undo", root)
	p.clean(t, second)
	p.run(t, "restore", "--undo", root).refused(t, 1, "no copy at", "sweep --dry-run")
	p.must(t, "restore", "--undo", second)
}

func (p *production) dumps(t *testing.T, id string) {
	file := filepath.Join(p.dir, "dump.zst")
	p.must(t, "dump", id, "--to", file)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var sql strings.Builder
	if _, err := z.WriteTo(&sql); err != nil || !strings.Contains(sql.String(), "database cluster dump complete") || !strings.Contains(sql.String(), "CREATE TABLE public.mirror") {
		t.Errorf("the dump of %d bytes is not whole: %v", sql.Len(), err)
	}
	before, _ := os.Stat(file)
	p.run(t, "dump", id, "--to", file).refused(t, 2, file, "exists already")
	if after, err := os.Stat(file); err != nil || !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		t.Errorf("the dump that was there: %v", err)
	}
	p.run(t, "dump", id, "--to", "/nonexistent/dump.zst").refused(t, 2, "/nonexistent")
}

// edited changes a record of a backup, or takes it away, for the time of f.
func (p *production) edited(t *testing.T, id, name string, change func([]byte) []byte, f func()) {
	t.Helper()
	file := filepath.Join(p.catalog, "clusters", "main", "backups", id, name)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if change == nil {
		err = os.Remove(file)
	} else {
		err = os.WriteFile(file, change(before), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	f()
	if err := os.WriteFile(file, before, 0o600); err != nil {
		t.Fatal(err)
	}
}

// leavesAlone: list shows the backup in that state and says why, and sweep
// takes nothing of it.
func (p *production) leavesAlone(t *testing.T, id, state, why string) {
	t.Helper()
	var got struct {
		Backups []struct{ ID, State, Error string }
	}
	if err := json.Unmarshal([]byte(p.must(t, "list", "--json").out), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Backups) != 1 || got.Backups[0].ID != id || got.Backups[0].State != state || !strings.Contains(got.Backups[0].Error, why) {
		t.Errorf("list says %+v, want %s with %q", got.Backups, state, why)
	}
	before := len(p.inventory(t).Snapshots)
	p.must(t, "sweep")
	if after := len(p.inventory(t).Snapshots); after != before {
		t.Errorf("sweep left %d of %d snapshots", after, before)
	}
}

// hidden moves files away for the time of f.
func (p *production) hidden(t *testing.T, f func(), files ...string) {
	t.Helper()
	for _, file := range files {
		if err := os.Rename(file, file+".away"); err != nil {
			t.Fatal(err)
		}
	}
	f()
	for _, file := range files {
		if err := os.Rename(file+".away", file); err != nil {
			t.Fatal(err)
		}
	}
}

// otherMajor rewrites the records as if production had run a version that
// this host lacks, consistently.
func (p *production) otherMajor(t *testing.T, m backup.Manifest, root string) {
	m.Server.VersionNum = 990001
	b, err := backup.EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(p.dir, "bin14")
	if err := errors.Join(os.Mkdir(bin, 0o755), os.WriteFile(filepath.Join(bin, "postgres"), []byte("#!/bin/sh\necho 'postgres (PostgreSQL) 14.1'\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	p.edited(t, string(m.ID), "manifest.json", func([]byte) []byte { return b }, func() {
		complete := func(old []byte) []byte {
			var c backup.Complete
			if err := json.Unmarshal(old, &c); err != nil {
				t.Fatal(err)
			}
			c.Digest = backup.Digest(b)
			text, _ := json.Marshal(c)
			return text
		}
		p.edited(t, string(m.ID), "complete.json", complete, func() {
			for _, args := range [][]string{{"restore", string(m.ID), "--to", root}, {"verify", string(m.ID)}, {"dump", string(m.ID)}} {
				p.with("CLEANCUT_BIN_DIRS="+bin).run(t, args...).refused(t, 1, "PostgreSQL 99", bin+" (has 14)", "apt install postgresql-99")
			}
		})
	})
}

// elsewhere: another host name and an empty state; production's server is not
// reachable.
func (p *production) elsewhere(t *testing.T, id string) {
	other := *p.lab
	other.host, other.state, other.dsn = "elsewhere", filepath.Join(p.dir, "state2"), "host=/nonexistent"
	root := filepath.Join(p.dir, "copy", "far")
	other.must(t, "restore", id, "--to", root)
	if o := p.run(t, "sweep"); o.code != 0 || strings.Contains(o.out, "remove copy") {
		t.Errorf("sweep of production's host: exit %d, it wants the other's copy\n%s", o.code, o.out)
	}
	other.must(t, "restore", "--undo", root)
	entries, err := os.ReadDir(filepath.Join(other.state, "copies"))
	if err != nil || len(entries) > 0 {
		t.Errorf("ledgers left: %v %v", entries, err)
	}
	_ = os.RemoveAll(other.state)
}

// TestACopyRunsAsItsOwnerByNumber: production's server ran as a uid for which
// this host has no passwd entry.
func TestACopyRunsAsItsOwnerByNumber(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	const uid = 12345
	p := newProduction(t)
	p.server.Stop(t)
	for _, dir := range append([]string{p.server.Dir}, p.mounts...) {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || path == dir && dir != p.server.Dir {
				return err
			}
			return os.Lchown(path, uid, uid)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	p.server.UID, p.server.GID = uid, uid
	p.server.Start(t)
	m := p.manifestOf(t, p.must(t, "backup", "--json"))
	if m.Server.UID != uid || m.Server.GID != uid {
		t.Errorf("the manifest says uid %d gid %d, want %d", m.Server.UID, m.Server.GID, uid)
	}
	root := filepath.Join(p.dir, "copy", "a")
	var c backup.Copy
	if err := json.Unmarshal([]byte(p.must(t, "restore", "--json", string(m.ID), "--to", root).out), &c); err != nil {
		t.Fatal(err)
	}
	pid, err := os.ReadFile(filepath.Join(c.DataDirectory, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	number, _ := strconv.Atoi(strings.SplitN(string(pid), "\n", 2)[0])
	st, err := os.Stat("/proc/" + strconv.Itoa(number))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != uid {
		t.Errorf("the copy's server: %v %v, want it to run as %d", st, err, uid)
	}
	p.must(t, "restore", "--undo", root)
	p.must(t, "verify", "--level", "full", string(m.ID))
	p.must(t, "dump", string(m.ID))
	p.clean(t)
}

// TestSweepLeavesWhatIsWorkedOn holds a lock that a running cleancut would.
func TestSweepLeavesWhatIsWorkedOn(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	o := p.runWith(t, []string{"CLEANCUT_FAULT=kill@25"}, "backup")
	if o.code != -1 {
		t.Fatalf("exit %d, want it killed", o.code)
	}
	before := p.leftovers(t)
	if len(before) == 0 {
		t.Fatal("the killed backup left nothing: choose another point")
	}
	st, err := state.Open(p.state)
	if err != nil {
		t.Fatal(err)
	}
	release, err := st.Lock("backup-main")
	if err != nil {
		t.Fatal(err)
	}
	if o := p.run(t, "sweep"); o.code != 0 || !strings.Contains(o.out, "a backup of this cluster is running") {
		t.Errorf("sweep beside a backup: exit %d\n%s", o.code, o.out)
	}
	elsewhere := *p.lab
	elsewhere.host, elsewhere.state = "elsewhere", filepath.Join(p.dir, "state2")
	if o := elsewhere.run(t, "sweep"); o.code != 0 || !strings.Contains(o.out, "belongs to host prod: run sweep there") {
		t.Errorf("sweep on another host: exit %d\n%s", o.code, o.out)
	}
	wrong := *p.lab
	wrong.catalog = filepath.Join(p.dir, "wrong")
	release()
	if o := wrong.run(t, "sweep"); o.code != 0 || !strings.Contains(o.out, "that this catalog does not know") {
		t.Errorf("sweep with another catalog: exit %d\n%s", o.code, o.out)
	}
	if after := p.leftovers(t); len(after) != len(before) {
		t.Errorf("something was removed: before %q, after %q", before, after)
	}
	dry := p.must(t, "sweep", "--dry-run")
	if !strings.Contains(dry.out, "remove backup") || len(p.leftovers(t)) != len(before) {
		t.Errorf("a dry run is only a plan:\n%s", dry.out)
	}
	p.swept(t)
	if o := p.must(t, "sweep"); !strings.Contains(o.out, "nothing was left behind") {
		t.Errorf("a second sweep: %s", o.out)
	}
}
