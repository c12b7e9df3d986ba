package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
)

// cloneLab is production with one backup, of which clones are made on the same
// host.
type cloneLab struct {
	*production
	id string
}

func newCloneLab(t *testing.T) *cloneLab {
	t.Helper()
	p := newLab(t, "xfs", 8<<30).cluster(t, pgtest.Options{Small: true})
	return &cloneLab{production: p, id: string(p.backup(t))}
}

func cloneRead(t *testing.T, o outcome) (s flow.CloneStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.out), &s); err != nil || o.code != 0 {
		t.Fatalf("exit %d, %v\n%s%s", o.code, err, o.out, o.err)
	}
	return s
}

func (l *cloneLab) create(t *testing.T, name string, more ...string) flow.CloneStatus {
	t.Helper()
	return cloneRead(t, l.run(t, append([]string{"clone", "create", l.id, "--name", name, "--json"}, more...)...))
}

func (l *cloneLab) show(t *testing.T, name string) flow.CloneStatus {
	t.Helper()
	return cloneRead(t, l.run(t, "clone", "show", name, "--json"))
}

// root is where a clone stands that was given no other folder.
func (l *cloneLab) root(name string) string { return filepath.Join(l.state, "clones", name) }

// gone fails the test unless nothing but the named clones stands.
func (l *cloneLab) gone(t *testing.T, stay ...string) {
	t.Helper()
	var roots []string
	for _, name := range stay {
		roots = append(roots, l.root(name))
	}
	for _, left := range l.cloneLeft(t, roots...) {
		t.Errorf("left: %s", left)
	}
}

func (l *cloneLab) cloneLeft(t testing.TB, roots ...string) []string {
	t.Helper()
	out := l.leftovers(t, roots...)
	folders, _ := filepath.Glob(filepath.Join(l.state, "clones", "*"))
	for _, f := range folders {
		if !slices.Contains(roots, f) {
			out = append(out, "folder "+f)
		}
	}
	return out
}

func cloneConnect(t *testing.T, s flow.CloneStatus) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), "host="+s.SocketDir+" user=postgres dbname=postgres")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

func cloneCount(t *testing.T, conn *pgx.Conn, where string) (n int) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM public.ledger WHERE "+where).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestClonesFromCreationToReap(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newCloneLab(t)
	var all sync.WaitGroup
	outs := make([]outcome, 2)
	for i, name := range []string{"one", "two"} { // at once
		cmd, result := l.command(t, []string{"SUDO_USER=ann"}, "clone", "create", l.id, "--name", name, "--purpose", "ticket "+name, "--json")
		all.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			outs[i] = result()
		})
	}
	all.Wait()
	one, two := cloneRead(t, outs[0]), cloneRead(t, outs[1])
	if one.State != flow.CloneReady || one.Owner != "ann" || one.Purpose != "ticket one" || one.Root != l.root("one") || one.Backup != backup.ID(l.id) || one.MadeOf != one.Backup || one.Sessions == nil || one.Sessions.Count != 0 {
		t.Errorf("made: %+v", one)
	}
	if d := one.Expires.Sub(one.Created); d.Hours() < 7.9 || d.Hours() > 8.1 || one.Longest.Sub(one.Created).Hours() < 167.9 {
		t.Errorf("a lease of %s, at most until %s", d, one.Longest)
	}
	in1, in2, inP := cloneConnect(t, one), cloneConnect(t, two), l.server.Connect(t, "postgres")
	for conn, n := range map[*pgx.Conn]int{in1: 1, in2: 2} {
		if _, err := conn.Exec(t.Context(), "INSERT INTO ledger SELECT 1000 + g, 'of a clone' FROM generate_series(1, $1::int) g", n); err != nil {
			t.Fatal(err)
		}
	}
	if a, b, p := cloneCount(t, in1, "n > 1000"), cloneCount(t, in2, "n > 1000"), cloneCount(t, inP, "n > 1000"); a != 1 || b != 2 || p != 0 {
		t.Errorf("%d, %d and %d rows; want 1, 2, and none on production", a, b, p)
	}
	_ = inP.Close(t.Context())
	l.run(t, "clone", "create", l.id, "--name", "one").refused(t, 1, "exists already", l.root("one"))
	l.run(t, "clone", "create", l.id, "--name", "three", "--to", l.root("one")).refused(t, 2, "is not empty")
	if s := l.show(t, "one"); s.Sessions == nil || s.Sessions.Count != 1 || s.Sessions.Newest == nil {
		t.Errorf("sessions: %+v", s.Sessions)
	}
	for _, words := range []string{"one  ", "ann", "ready", "ticket two", l.root("two")} {
		if o := l.must(t, "clone", "list"); !strings.Contains(o.out, words) {
			t.Errorf("the list lacks %q:\n%s", words, o.out)
		}
	}
	if o := l.must(t, "clone", "psql", "two", "--", "-XAt", "-c", "SELECT count(*) FROM ledger WHERE n > 1000"); strings.TrimSpace(o.out) != "2" {
		t.Errorf("psql: %s%s", o.out, o.err)
	}
	if o := l.must(t, "sweep"); strings.Contains(o.out, "remove") {
		t.Errorf("sweep: %s", o.out)
	}
	l.run(t, "clone", "destroy", "one").refused(t, 1, "in use", "1 sessions", "--force")
	l.run(t, "clone", "extend", "one", "--ttl", "8d").refused(t, 2, "latest possible moment")
	if s := cloneRead(t, l.run(t, "clone", "extend", "one", "--ttl", "2d", "--json")); s.Expires.Sub(one.Expires).Hours() < 39 {
		t.Errorf("extended from %s to %s", one.Expires, s.Expires)
	}
	if s := cloneRead(t, l.run(t, "clone", "extend", "one", "--by", "1h", "--json")); s.Expires.Sub(one.Expires).Hours() < 40 {
		t.Errorf("extended from %s to %s", one.Expires, s.Expires)
	}
	_ = in1.Close(t.Context())
	l.must(t, "clone", "destroy", "one")
	if n := cloneCount(t, in2, "n > 1000"); n != 2 {
		t.Errorf("%d rows on the other clone", n)
	}
	l.gone(t, "two")
	l.run(t, "clone", "show", "one").refused(t, 1, "no clone one", "clone list")

	brief := l.create(t, "brief", "--ttl", "1ms")
	conn := cloneConnect(t, brief)
	if s := l.show(t, "brief"); s.State != flow.CloneExpired || s.Down != "" {
		t.Errorf("expired: %+v", s)
	}
	if o := l.must(t, "clone", "reap"); !strings.Contains(o.out, "keep") || !strings.Contains(o.out, "1 sessions") || strings.Contains(o.out, "two") {
		t.Errorf("reap: %s", o.out)
	}
	l.must(t, "clone", "reap", "--yes")
	l.show(t, "brief")
	_ = conn.Close(t.Context())
	eventually(t, "its session ends", func() bool { return l.show(t, "brief").Sessions.Count == 0 })
	if o := l.must(t, "clone", "reap"); !strings.Contains(o.out, "destroy  brief") || !strings.Contains(o.out, "--yes") {
		t.Errorf("reap: %s", o.out)
	}
	l.show(t, "brief")
	if o := l.must(t, "clone", "reap", "--yes"); !strings.Contains(o.out, "destroy: done  brief") {
		t.Errorf("reap: %s", o.out)
	}
	l.gone(t, "two")
	l.must(t, "clone", "destroy", "two", "--force")
	l.gone(t)
	l.clean(t)
}

func TestACloneOneTooManyOrTwiceAtOnceIsRefused(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newCloneLab(t)
	config := filepath.Join(l.dir, "cleancut.toml")
	if err := os.WriteFile(config, []byte("[clone]\nmax = 1\nmax_ttl = \"1h\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.extra = []string{"CLEANCUT_CONFIG=" + config}
	var all sync.WaitGroup
	outs := make([]outcome, 2)
	for i := range outs {
		cmd, result := l.command(t, nil, "clone", "create", l.id, "--name", "same")
		all.Go(func() {
			_ = cmd.Run() // one of them is refused
			outs[i] = result()
		})
	}
	all.Wait()
	slices.SortFunc(outs, func(a, b outcome) int { return a.code - b.code })
	if outs[0].code != 0 {
		t.Fatalf("exit %d\n%s", outs[0].code, outs[0].err)
	}
	outs[1].refused(t, 1, "clone same", "choose another name")
	if s := l.show(t, "same"); s.Expires.Sub(s.Created).Hours() > 1.01 {
		t.Errorf("max_ttl is 1h, it stands until %s", s.Expires)
	}
	l.run(t, "clone", "create", l.id, "--name", "other").refused(t, 1, "1 clones stand on this host, of 1 at most")
	l.must(t, "clone", "destroy", "same")
	l.gone(t)
	bad := filepath.Join(l.dir, "bad.sql")
	if err := os.WriteFile(bad, []byte("SELECT 1/0;\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.run(t, "clone", "create", l.id, "--name", "masked", "--mask", bad).refused(t, 1, "mask clone masked")
	l.gone(t)
	for _, c := range []struct{ args, words string }{ // separated by blanks, and by |
		{"--name QA", "clone name"},
		{"--name qa --ttl 8d", "longer than 1h|max_ttl"},
		{"--name qa --mask /nonexistent.sql", "/nonexistent.sql"},
		{"--name qa --listen here", "ADDRESS:PORT"},
		{"--name qa --to /srv/" + strings.Repeat("long", 25), "107 bytes|shorter folder"},
	} {
		o := l.run(t, append([]string{"clone", "create", l.id}, strings.Fields(c.args)...)...)
		o.refused(t, 2, strings.Split(c.words, "|")...)
		if strings.Contains(o.err, "snapshots  ") {
			t.Errorf("%s: something was begun:\n%s", c.args, o.err)
		}
	}
	l.run(t, "clone", "create", "--latest", "--name", "qa").refused(t, 1, "no backup of cluster main has a good verdict")
	l.gone(t)
	l.must(t, "verify", l.id, "--level", "start")
	if s := cloneRead(t, l.run(t, "clone", "create", "--latest", "--name", "qa", "--json")); string(s.Backup) != l.id {
		t.Errorf("made of %s", s.Backup)
	}
	l.must(t, "clone", "destroy", "qa")
	l.gone(t)
}

// cloneServer returns the clone's postmaster.
func cloneServer(t *testing.T, s flow.CloneStatus) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.DataDirectory, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	var pid int
	if err := json.Unmarshal([]byte(first), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// cloneKilled kills the clone's server as kill -9 does.
func (l *cloneLab) cloneKilled(t *testing.T, s flow.CloneStatus) {
	t.Helper()
	if err := syscall.Kill(cloneServer(t, s), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its server ends", func() bool { return len(l.strayProcesses(nil)) == 0 })
}

func TestACloneWhoseServerWasKilledOrWhoseHostWasRebooted(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newCloneLab(t)
	s := l.create(t, "qa")
	write := func(n int) {
		t.Helper()
		conn := cloneConnect(t, s)
		if _, err := conn.Exec(t.Context(), "INSERT INTO ledger VALUES ($1, 'of a clone')", n); err != nil {
			t.Fatal(err)
		}
		_ = conn.Close(t.Context())
	}
	write(1000)
	l.cloneKilled(t, s)
	if s := l.show(t, "qa"); s.State != flow.CloneDown || s.Down != "its server does not run" {
		t.Errorf("killed: %+v", s)
	}
	l.run(t, "clone", "psql", "qa").refused(t, 1, "clone start qa")
	if s = cloneRead(t, l.run(t, "clone", "start", "qa", "--json")); s.State != flow.CloneReady {
		t.Errorf("started: %+v", s)
	}
	write(1001)
	l.rebooted(t, s)
	if s := l.show(t, "qa"); s.State != flow.CloneDown || s.Down != "its volumes are not attached" || s.Sessions == nil {
		t.Errorf("rebooted: %+v", s)
	}
	if o := l.must(t, "sweep"); strings.Contains(o.out, "remove") {
		t.Errorf("sweep: %s", o.out)
	}
	if s = cloneRead(t, l.run(t, "clone", "start", "qa", "--json")); s.State != flow.CloneReady {
		t.Errorf("started after the reboot: %+v", s)
	}
	if n := cloneCount(t, cloneConnect(t, s), "n IN (1000, 1001)"); n != 2 {
		t.Errorf("%d of 2 rows are there", n)
	}
	l.must(t, "clone", "start", "qa") // once more: it is left alone
	l.must(t, "clone", "destroy", "qa", "--force")
	l.gone(t)

	s = l.create(t, "brief", "--ttl", "1ms")
	l.rebooted(t, s)
	if o := l.must(t, "clone", "reap", "--yes"); !strings.Contains(o.out, "destroy: done  brief") {
		t.Errorf("reap after a reboot: %s", o.out)
	}
	l.gone(t)
	l.clean(t)
}

// rebooted takes away of a clone what a reboot does: its server, its mounts and
// its devices.
func (l *cloneLab) rebooted(t *testing.T, s flow.CloneStatus) {
	t.Helper()
	l.cloneKilled(t, s)
	p := l.provider(t)
	for _, c := range l.copies(t) {
		if c.ID != s.ID {
			continue
		}
		for _, fs := range slices.Backward(c.Filesystems) {
			if out, err := exec.CommandContext(t.Context(), "umount", fs.Mountpoint).CombinedOutput(); err != nil {
				t.Fatalf("umount: %v\n%s", err, out)
			}
		}
		for _, v := range c.Volumes {
			if err := p.Detach(t.Context(), v.Volume); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestACloneWhoseLedgerIsLost(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newCloneLab(t)
	lose := func(s flow.CloneStatus) {
		t.Helper()
		if err := os.Remove(filepath.Join(l.state, "copies", string(s.ID)+".json")); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := filepath.Join(l.dir, "copy", "e")
	s := l.create(t, "far", "--to", elsewhere)
	lose(s)
	if s := l.show(t, "far"); s.State != flow.CloneLedgerLost || s.Root != elsewhere {
		t.Errorf("far: %+v", s)
	}
	conn := cloneConnect(t, s)
	if o := l.must(t, "sweep"); !strings.Contains(o.out, "put ledger back: done") {
		t.Errorf("sweep of a clone in use: %s", o.out)
	}
	if s := l.show(t, "far"); s.State != flow.CloneReady || s.Sessions.Count != 1 {
		t.Errorf("with its ledger back: %+v", s)
	}
	_ = conn.Close(t.Context())
	eventually(t, "its session ends", func() bool { return l.show(t, "far").Sessions.Count == 0 })
	lose(s)

	// What nothing proves is left alone: no record, and one that the clone's
	// server could have written.
	record := filepath.Join(elsewhere, ".cleancut", "copy.json")
	kept, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	left := func(how string) {
		t.Helper()
		if o := l.must(t, "clone", "list"); strings.Contains(o.out, "far") {
			t.Errorf("%s: the list: %s", how, o.out)
		}
		if o := l.must(t, "sweep"); !strings.Contains(o.out, "leave") || strings.Contains(o.out, "done") {
			t.Errorf("%s: sweep: %s", how, o.out)
		}
	}
	put := func(content []byte, uid int) {
		t.Helper()
		if err := os.WriteFile(record, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(record, uid, -1); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	left("no record")
	put(kept, 1)
	left("a record of another owner")
	put(bytes.ReplaceAll(kept, []byte(s.ID), []byte("20260101T000000Z-000001")), 0)
	left("a record of another copy")
	put(bytes.Replace(kept, []byte(`"root": "`+elsewhere), []byte(`"root": "`+l.dir), 1), 0)
	left("a record of another folder")
	put(bytes.Replace(kept, []byte(`"state": "`+l.state), []byte(`"state": "`+l.dir), 1), 0)
	if err := os.MkdirAll(filepath.Join(l.dir, "copies"), 0o700); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(l.dir, "copies", string(s.ID)+".json")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left("a record whose ledger is in another state folder")
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	put(kept, 0)
	if o := l.must(t, "sweep"); !strings.Contains(o.out, "remove copy: done") || !strings.Contains(o.out, "clone far") {
		t.Errorf("sweep: %s", o.out)
	}
	l.gone(t)

	s = l.create(t, "near") // lost, and rebooted since: nothing is mounted
	c := l.copies(t)
	l.rebooted(t, s)
	if len(c) != 1 || c[0].ID != s.ID {
		t.Fatalf("copies %+v", c)
	}
	lose(s)
	if s := l.show(t, "near"); s.State != flow.CloneLedgerLost || s.Down != "its volumes are not attached" {
		t.Errorf("near: %+v", s)
	}
	l.must(t, "sweep")
	l.gone(t)
	l.clean(t)
}

func TestACloneStoppedAnywhereLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newCloneLab(t)
	root := filepath.Join(p.dir, "copy", "c") // where leftovers looks
	mask := filepath.Join(p.dir, "mask.sql")
	if err := os.WriteFile(mask, []byte("DELETE FROM ledger;\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	create := []string{"clone", "create", p.id, "--name", "c", "--to", root, "--mask", mask, "--listen", cloneAddress(t)}
	drop := func(t *testing.T, _ outcome) {
		t.Helper()
		p.must(t, "clone", "destroy", "c")
	}
	t.Run("create", func(t *testing.T) {
		args := func(*testing.T) []string { return create }
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: drop, args: args})
		// The restore's own points have their sweep, with errors and cancels.
		p.underFaults(t, flowUnderFault{of: []string{"clone.", "postgres.mask", "postgres.gate"}, removes: drop, args: args})
	})
	t.Run("destroy", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{killsOnce: true, removes: func(*testing.T, outcome) {}, args: func(t *testing.T) []string {
			if o := p.run(t, create...); o.code != 0 {
				t.Fatalf("exit %d\n%s", o.code, o.err)
			}
			return []string{"clone", "destroy", "c"}
		}})
	})
	t.Run("start after a reboot", func(t *testing.T) {
		made := p.create(t, "c", "--to", root)
		p.rebooted(t, made)
		o := p.must(t, "clone", "start", "c")
		t.Logf("%d points", len(o.points))
		for _, fault := range (flowUnderFault{of: []string{""}, killsOnce: true}).faults(o.points) {
			t.Run(fault, func(t *testing.T) {
				p.rebooted(t, p.show(t, "c"))
				if o := p.runWith(t, []string{"CLEANCUT_FAULT=" + fault}, "clone", "start", "c"); o.code != -1 {
					t.Errorf("exit %d, want it killed\n%s", o.code, o.err)
				}
				if o := p.must(t, "sweep"); strings.Contains(o.out, "remove") {
					t.Errorf("sweep: %s", o.out)
				}
				if s := cloneRead(t, p.run(t, "clone", "start", "c", "--json")); s.State != flow.CloneReady {
					t.Errorf("started: %+v", s)
				}
			})
		}
		drop(t, outcome{})
	})
	p.clean(t)
}
