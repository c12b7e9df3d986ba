package main_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
)

// tool runs a program of the system.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(detached{t}.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loop attaches a file as a loop device.
func loop(t testing.TB, file string) (device string, undo func()) {
	t.Helper()
	device = tool(t, "losetup", "--find", "--show", "--sector-size", "4096", file)
	return device, func() { tool(t, "losetup", "--detach", device) }
}

// inside changes what a snapshot holds, behind cleancut's back.
func (p *production) inside(t *testing.T, m backup.Manifest, mountpoint string, change func(dir string)) {
	t.Helper()
	for _, s := range m.Snapshots {
		if m.Topology.Filesystems[m.Topology.Members()[s.Member].Filesystem].Mountpoint != mountpoint {
			continue
		}
		device, detach := loop(t, filepath.Join(p.pool, "snapshots", string(s.ID)+".img"))
		dir := filepath.Join(t.TempDir(), "inside")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		tool(t, "mount", "-t", "xfs", "-o", "nouuid", device, dir)
		change(dir)
		tool(t, "umount", dir)
		detach()
		return
	}
	t.Fatalf("no snapshot of %s", mountpoint)
}

// overwrite replaces part of a file by n bytes of value b.
func overwrite(t *testing.T, file string, offset int64, n int, b byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt([]byte(strings.Repeat(string([]byte{b}), n)), offset); err != nil {
		t.Fatal(err)
	}
}

// verdicts returns what the catalog holds on a backup.
func (p *production) verdicts(t *testing.T, id backup.ID) []backup.Verdict {
	t.Helper()
	var shown struct{ Verdicts []backup.Verdict }
	if err := json.Unmarshal([]byte(p.must(t, "show", "--json", string(id)).out), &shown); err != nil {
		t.Fatal(err)
	}
	return shown.Verdicts
}

// damaged verifies a backup that was damaged: exit 4, a recorded verdict that
// names the check, nothing left.
func (p *production) damaged(t *testing.T, id backup.ID, level, check string, words ...string) {
	t.Helper()
	o := p.run(t, "verify", "--level", level, string(id))
	if o.code != 4 || !strings.Contains(o.out, "DAMAGED") {
		t.Errorf("exit %d, want 4 and a verdict\n%s%s", o.code, o.out, o.err)
	}
	for _, w := range words {
		if !strings.Contains(o.out+o.err, w) {
			t.Errorf("nothing says %q:\n%s%s", w, o.out, o.err)
		}
	}
	got := p.verdicts(t, id)
	if len(got) != 1 || got[0].Good() {
		t.Fatalf("verdicts %+v, want one that is bad", got)
	}
	failed := map[string]bool{}
	for _, c := range got[0].Checks {
		failed[c.Name] = c.Result == backup.Failed
	}
	if !failed[check] {
		t.Errorf("check %q did not fail: %+v", check, got[0].Checks)
	}
	p.clean(t)
}

func TestVerifyTellsDamageFromAHostThatCannotRunTheCopy(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	p.server.Exec(t, "CREATE TABLE victim AS SELECT g AS n, repeat('v', 100) AS filler FROM generate_series(1, 5000) g",
		"VACUUM (FREEZE) victim", "CHECKPOINT")
	conn := p.server.Connect(t, "postgres")
	var path string
	if err := conn.QueryRow(t.Context(), "SELECT pg_relation_filepath('public.victim')").Scan(&path); err != nil {
		t.Fatal(err)
	}
	fresh := func(t *testing.T) backup.Manifest {
		t.Helper()
		m := p.manifestOf(t, p.must(t, "backup", "--json"))
		t.Cleanup(func() { p.must(detached{t}, "delete", string(m.ID)) })
		return m
	}
	for _, level := range []string{"rows", "full"} {
		t.Run("a heap page that is overwritten, level "+level, func(t *testing.T) {
			m := fresh(t)
			p.inside(t, m, p.mounts[0], func(dir string) { overwrite(t, filepath.Join(dir, "pg", path), 8192, 8192, 0xA5) })
			p.damaged(t, m.ID, level, "every row read (pg_dumpall)", "invalid page in block 1")
		})
	}
	t.Run("pg_wal that is empty", func(t *testing.T) {
		m := fresh(t)
		p.inside(t, m, p.mounts[1], func(dir string) { emptyWAL(t, filepath.Join(dir, "pg"), "") })
		p.damaged(t, m.ID, "start", "recovered", "its log", "could not locate a valid checkpoint record", "PANIC")
	})
	t.Run("pg_wal with a hole before what was flushed", func(t *testing.T) {
		p.server.Exec(t, "CHECKPOINT", "SELECT pg_switch_wal()", "INSERT INTO victim SELECT g, 'late' FROM generate_series(1, 100) g")
		m := fresh(t)
		// The last segment goes: redo ends before it, without any error.
		p.inside(t, m, p.mounts[1], func(dir string) { emptyWAL(t, filepath.Join(dir, "pg"), walFile(m)) })
		p.damaged(t, m.ID, "start", "flushed WAL reached", "acknowledged commits are lost")
	})
	t.Run("a control file that is damaged", func(t *testing.T) {
		m := fresh(t)
		p.inside(t, m, p.mounts[0], func(dir string) { overwrite(t, filepath.Join(dir, "pg/global/pg_control"), 0, 100, 0) })
		p.damaged(t, m.ID, "start", "recovered", "pg_control")
	})
	t.Run("a library that this host lacks is no damage", func(t *testing.T) {
		m := p.withLostLibrary(t, fresh)
		o := p.run(t, "verify", "--level", "start", string(m.ID))
		o.refused(t, 1, "could not access file", "lost.so", "its log", "what to do", "install the extension's package")
		o = p.run(t, "restore", string(m.ID), "--to", filepath.Join(p.dir, "copy", "a"))
		o.refused(t, 1, "could not access file", "lost.so", "what to do")
		if got := p.verdicts(t, m.ID); len(got) > 0 {
			t.Errorf("verdicts %+v, want none: the backup was not judged", got)
		}
		p.clean(t)
	})
}

// withLostLibrary takes a backup while production preloads a library of its
// own, which is gone afterwards.
func (p *production) withLostLibrary(t *testing.T, fresh func(*testing.T) backup.Manifest) backup.Manifest {
	t.Helper()
	libraries, err := exec.CommandContext(t.Context(), filepath.Join(p.server.Installation.Bin, "pg_config"), "--pkglibdir").Output()
	if err != nil {
		libraries = []byte(filepath.Join(filepath.Dir(p.server.Installation.Bin), "lib"))
	}
	b, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(libraries)), "auto_explain.so"))
	if err != nil {
		t.Fatal(err)
	}
	library := filepath.Join(p.dir, "lost.so")
	if err := os.WriteFile(library, b, 0o755); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(p.server.DataDirectory, "postgresql.auto.conf")
	before, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	p.server.Stop(t)
	pgtest.Append(t, conf, "shared_preload_libraries = '"+library+"'\n")
	p.server.Start(t)
	m := fresh(t)
	p.server.Stop(t)
	if err := os.WriteFile(conf, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(library); err != nil {
		t.Fatal(err)
	}
	p.server.Start(t)
	return m
}

// emptyWAL zeroes the segments from the one named first on, all for "".
func emptyWAL(t *testing.T, dir, first string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if len(e.Name()) == 24 && e.Name() >= first {
			overwrite(t, filepath.Join(dir, e.Name()), 0, 16<<20, 0)
			n++
		}
	}
	if n == 0 {
		t.Fatalf("no segment from %q on in %s", first, dir)
	}
}

// walFile names the segment of 16 MiB that holds the last flushed byte.
func walFile(m backup.Manifest) string {
	segment := (uint64(m.Cut.FlushLSN) - 1) / (16 << 20)
	hex := func(n uint64) string {
		s := strings.ToUpper(strconv.FormatUint(n, 16))
		return strings.Repeat("0", 8-len(s)) + s
	}
	return hex(uint64(m.Server.Timeline)) + hex(segment/256) + hex(segment%256)
}
