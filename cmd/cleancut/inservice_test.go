package main_test

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// lost is a cluster that archives, whose client authentication and a part of
// whose configuration lie outside of its volumes.
type lost struct {
	*production
	etc, inbox, fresh string
	rows              int64
}

func newLost(t *testing.T) *lost {
	t.Helper()
	if err := os.Chmod(filepath.Dir(binary(t)), 0o755); err != nil { // restore_command runs it as the server's user
		t.Fatal(err)
	}
	l := newLab(t, "xfs", 8<<30)
	x := &lost{etc: filepath.Join(l.dir, "etc"), inbox: pgtest.Mkdir(t, filepath.Join(l.dir, "inbox")), fresh: pgtest.Mkdir(t, filepath.Join(l.dir, "fresh"))}
	pgtest.Mkdir(t, x.etc)
	x.production = l.cluster(t, pgtest.Options{Settings: map[string]string{"archive_mode": "on", "archive_command": "cp %p " + x.inbox + "/%f",
		"track_commit_timestamp": "on", "synchronous_standby_names": ""}})
	x.server.Stop(t)
	pgtest.Append(t, filepath.Join(x.etc, "extra.conf"), "work_mem = '7MB'\n")
	pgtest.Append(t, filepath.Join(x.etc, "pg_hba.conf"), "local all all trust\nlocal replication all trust\n")
	if err := os.Chmod(filepath.Join(x.etc, "pg_hba.conf"), 0o640); err != nil {
		t.Fatal(err)
	}
	pgtest.Append(t, filepath.Join(x.server.DataDirectory, "postgresql.conf"), "include '"+x.etc+"/extra.conf'\nhba_file = '"+x.etc+"/pg_hba.conf'\n")
	x.server.Start(t)
	return x
}

// lose takes server, volumes and configuration away.
func (x *lost) lose(t *testing.T) {
	t.Helper()
	x.server.Stop(t)
	for _, name := range []string{"data", "wal", "ts"} {
		x.destroy(t, name)
	}
	for _, path := range append(slices.Clone(x.mounts), x.etc) {
		if err := os.RemoveAll(path); err != nil { // nothing is mounted there any more
			t.Fatal(err)
		}
	}
}

func (x *lost) args(id backup.ID, more ...string) []string {
	return append([]string{"restore", string(id), "--production", "--json", "--fstab", filepath.Join(x.dir, "fstab"), "--mdadm-conf", filepath.Join(x.dir, "mdadm.conf")}, more...)
}

func (x *lost) newPlace() []string {
	return []string{"--archive-command", "cp %p " + x.fresh + "/%f"}
}

// nothing fails the test if anything of a restore stands.
func (x *lost) nothing(t *testing.T) {
	t.Helper()
	for _, c := range x.copies(t) {
		t.Errorf("left: ledger of copy %s (%s)", c.ID, c.Purpose)
	}
	for _, v := range x.inventory(t).Volumes {
		t.Errorf("left: volume %s %v", v.ID, v.Tags)
	}
	for _, path := range append(slices.Clone(x.mounts), x.etc) {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("left: %s", path)
		}
	}
	for _, f := range []string{"fstab", "mdadm.conf"} {
		if b, err := os.ReadFile(filepath.Join(x.dir, f)); err == nil && len(b) > 0 {
			t.Errorf("left in %s: %s", f, b)
		}
	}
}

// produced reads the result, and takes it away when the test ends.
func (x *lost) produced(t *testing.T, o outcome) flow.Produced {
	t.Helper()
	if o.code != 0 {
		t.Fatalf("restore --production: exit %d\n%s%s", o.code, o.out, o.err)
	}
	var p flow.Produced
	if err := json.Unmarshal([]byte(o.out), &p); err != nil {
		t.Fatalf("%v\n%s", err, o.out)
	}
	t.Cleanup(func() { x.takeAway(t, p) })
	return p
}

func (x *lost) takeAway(t *testing.T, p flow.Produced) {
	t.Helper()
	x.stopServer(detached{t})
	for _, name := range p.Copy.Production.Storages {
		x.destroy(t, name)
	}
}

// stopServer stops whatever runs in production's data directory.
func (x *lost) stopServer(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(x.server.DataDirectory, "postmaster.pid")); err != nil {
		return
	}
	if out, err := x.server.Command(t.Context(), "pg_ctl", "-D", x.server.DataDirectory, "-m", "fast", "-w", "stop").CombinedOutput(); err != nil {
		t.Errorf("pg_ctl stop: %v\n%s", err, out)
	}
}

// ask returns the answer of the server in production's place, as text.
func (x *lost) ask(t *testing.T, query string) string {
	t.Helper()
	conn, err := postgres.Connect(t.Context(), postgres.Target{DSN: x.dsn})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	var s string
	if err := conn.QueryRow(t.Context(), query).Scan(&s); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return s
}

// write writes n rows and returns how many are there.
func (x *lost) write(t *testing.T, n int) {
	t.Helper()
	for range n {
		x.server.Exec(t, "INSERT INTO ledger VALUES ("+strconv.FormatInt(x.rows, 10)+", 'x')", "INSERT INTO mirror VALUES ("+strconv.FormatInt(x.rows, 10)+", 'x')")
		x.rows++
	}
}

const newRows = `SELECT count(*)::text || ' ' || (SELECT count(*) FROM public.mirror)::text FROM public.ledger WHERE n >= 0`

// TestProductionComesBack: the story of a loss with data, WAL and a tablespace
// on volumes of their own.
func TestProductionComesBack(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	x := newLost(t)
	x.write(t, 20)
	x.server.Exec(t, "SELECT pg_create_physical_replication_slot('one')", "SELECT pg_create_physical_replication_slot('two')")
	id := x.backup(t)
	x.write(t, 5)

	before := len(x.inventory(t).Volumes)
	x.run(t, x.args(id, x.newPlace()...)...).refused(t, 1, "the original answers at "+x.server.SocketDir)
	if got := len(x.inventory(t).Volumes); got != before || len(x.copies(t)) != 0 {
		t.Errorf("the refused restore made volumes: %d, before %d", got, before)
	}
	x.lose(t)
	x.refusals(t, id)

	p := x.produced(t, x.run(t, x.args(id, x.newPlace()...)...))
	if p.Timeline != 2 || !p.Started || strings.Join(p.Slots, " ") != "one two" {
		t.Errorf("got %+v", p)
	}
	if got := x.ask(t, newRows); got != "20 20" {
		t.Errorf("rows: got %s, want 20 20", got)
	}
	for query, want := range map[string]string{
		"SHOW archive_command": "cp %p " + x.fresh + "/%f", "SHOW archive_mode": "on", "SHOW work_mem": "7MB", "SHOW track_commit_timestamp": "on",
		"SHOW hba_file": x.etc + "/pg_hba.conf",
		"SELECT (pg_xact_commit_timestamp(xmin) IS NOT NULL)::text FROM public.ledger WHERE n = 3":         "true",
		"SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'aside'":                    filepath.Join(x.mounts[2], "space"),
		"SELECT count(*)::text FROM pg_replication_slots":                                                  "0",
		"SELECT system_identifier::text FROM pg_control_system()":                                          strconv.FormatUint(uint64(x.manifest(t, id).Server.SystemIdentifier), 10),
		"SELECT string_agg(name, ' ') FROM pg_settings WHERE setting LIKE '%cleancut%' AND name !~ 'file'": "application_name",
	} {
		if got := x.ask(t, query); got != want {
			t.Errorf("%s: got %s, want %s", query, got, want)
		}
	}
	if info, err := os.Stat(x.etc + "/pg_hba.conf"); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("pg_hba.conf: %v %v", info, err)
	}
	x.neverRemoved(t, p)
	x.archives(t)
	x.reboots(t, p)
	x.goesOn(t)
}

func (x *lost) manifest(t *testing.T, id backup.ID) backup.Manifest {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(x.catalog, "clusters", "main", "backups", string(id), "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := backup.DecodeManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// refusals: each names its reason and leaves nothing.
func (x *lost) refusals(t *testing.T, id backup.ID) {
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { f(t); x.nothing(t) })
	}
	refused := func(t *testing.T, words []string, args ...string) {
		t.Helper()
		code := 1
		if slices.Contains(words, "usage") {
			code = 2
		}
		x.run(t, x.args(id, args...)...).refused(t, code, words...)
	}
	run("no word on archiving", func(t *testing.T) { refused(t, []string{"usage", "wants --archive-command"}) })
	run("the original's own archive", func(t *testing.T) {
		// It is in the data directory: only the restored one tells.
		refused(t, []string{"usage", "the original's own", "new place"}, "--archive-command", "cp  %p "+x.inbox+"/%f")
	})
	for _, command := range []string{"cleancut wal push %p", "/usr/bin/cleancut wal push --cluster=main %p", "cleancut --catalog file://" + x.catalog + " wal push %p"} {
		run("the original's place in the catalog: "+command, func(t *testing.T) {
			refused(t, []string{"usage", "where the original's WAL is"}, "--archive-command", command)
		})
	}
	run("a mount point is not empty", func(t *testing.T) {
		file := filepath.Join(x.mounts[1], "mine")
		if err := errors.Join(os.Mkdir(x.mounts[1], 0o755), os.WriteFile(file, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(x.mounts[1]) }()
		refused(t, []string{x.mounts[1] + " holds mine", "not free"}, x.newPlace()...)
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(x.mounts[1])
	})
	run("something is mounted there", func(t *testing.T) {
		if err := os.Mkdir(x.mounts[0], 0o755); err != nil {
			t.Fatal(err)
		}
		tool(t, "mount", "-t", "tmpfs", "none", x.mounts[0])
		refused(t, []string{"is mounted on " + x.mounts[0]}, x.newPlace()...)
		tool(t, "umount", x.mounts[0])
		_ = os.Remove(x.mounts[0])
	})
	run("its port is taken by something else", func(t *testing.T) {
		l, err := net.Listen("unix", filepath.Join(x.server.SocketDir, ".s.PGSQL.5432"))
		if err != nil {
			t.Fatal(err)
		}
		go hangUp(l)
		refused(t, []string{"port is taken on this host"}, append(x.newPlace(), "--original-is-gone")...)
		_ = l.Close()
	})
	run("who listens where the original was cannot be told", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go hangUp(l)
		_, port, _ := net.SplitHostPort(l.Addr().String())
		x.with("CLEANCUT_DSN=host=127.0.0.1 user=postgres port="+port).run(t, x.args(id, x.newPlace()...)...).refused(t, 1, "cannot be told", "127.0.0.1:"+port, "--original-is-gone")
		_ = l.Close()
	})
}

// hangUp is a port that is open and no PostgreSQL.
func hangUp(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = c.Close()
	}
}

// neverRemoved: nothing that cleans up takes production away.
func (x *lost) neverRemoved(t *testing.T, p flow.Produced) {
	t.Helper()
	if o := x.must(t, "sweep"); !strings.Contains(o.out, "never removed") {
		t.Errorf("sweep says\n%s", o.out)
	}
	x.run(t, "restore", "--undo", p.Copy.Root).refused(t, 1, "is production")
	x.run(t, x.args(p.Copy.Backup, x.newPlace()...)...).refused(t, 1, "the original answers")
	ledger := filepath.Join(x.state, "copies", string(p.Copy.ID)+".json")
	if err := os.Rename(ledger, ledger+".lost"); err != nil {
		t.Fatal(err)
	}
	if o := x.must(t, "sweep"); !strings.Contains(o.out, "production's place") {
		t.Errorf("sweep without the ledger says\n%s", o.out)
	}
	if err := os.Rename(ledger+".lost", ledger); err != nil {
		t.Fatal(err)
	}
	if got := x.ask(t, newRows); got != "20 20" {
		t.Errorf("rows after all that: %s", got)
	}
}

// archives: what is written goes to the new place, and nothing to the old.
func (x *lost) archives(t *testing.T) {
	t.Helper()
	old, err := os.ReadDir(x.inbox)
	if err != nil {
		t.Fatal(err)
	}
	segment := x.ask(t, "SELECT pg_walfile_name(pg_switch_wal())")
	for _, name := range []string{"00000002.history", segment} {
		eventually(t, name+" is archived", func() bool { _, err := os.Stat(filepath.Join(x.fresh, name)); return err == nil })
	}
	entries, err := os.ReadDir(x.fresh)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "00000001") {
			t.Errorf("%s of the old timeline is in the new place", e.Name())
		}
	}
	if now, err := os.ReadDir(x.inbox); err != nil || len(now) != len(old) {
		t.Errorf("the old place has %d files, had %d (%v)", len(now), len(old), err)
	}
}

// reboots: the server stopped, everything unmounted and detached, then only the
// lines and the tags bring it back.
func (x *lost) reboots(t *testing.T, p flow.Produced) {
	t.Helper()
	x.stopServer(t)
	x.detach(t, p)
	for _, name := range p.Copy.Production.Storages {
		x.must(t, "storage", "attach", name, "--fstab", filepath.Join(x.dir, "fstab"), "--mdadm-conf", filepath.Join(x.dir, "mdadm.conf"))
	}
	if out, err := exec.CommandContext(t.Context(), p.StartCommand[0], p.StartCommand[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", p.StartCommand, err, out)
	}
	if got := x.ask(t, newRows); got != "20 20" {
		t.Errorf("rows after the reboot: %s", got)
	}
}

// detach takes everything below production away, as a reboot does.
func (x *lost) detach(t *testing.T, p flow.Produced) {
	t.Helper()
	inv, err := x.provider(t).List(t.Context(), p.Copy.Tags())
	if err != nil || len(inv.Volumes) != len(p.Copy.Volumes) {
		t.Fatalf("%d volumes, %v", len(inv.Volumes), err)
	}
	var devices []string
	for _, v := range inv.Volumes {
		devices = append(devices, v.Attached)
	}
	if err := host.Release(t.Context(), devices); err != nil {
		t.Fatal(err)
	}
	for _, v := range inv.Volumes {
		if err := x.provider(t).Detach(t.Context(), v.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// goesOn: a backup of it is sound, and is restored.
func (x *lost) goesOn(t *testing.T) {
	t.Helper()
	x.write(t, 3)
	m := x.manifestOf(t, x.must(t, "backup", "--json"))
	if m.Server.Timeline != 2 {
		t.Errorf("the new backup is of timeline %d", m.Server.Timeline)
	}
	x.must(t, "verify", string(m.ID), "--level", "rows")
}

// standing is the ledger of what took production's place, if any did.
func (x *lost) standing(t testing.TB) *backup.Copy {
	t.Helper()
	for _, c := range x.copies(t) {
		if c.InService() {
			return &c
		}
	}
	return nil
}

// destroyed takes away what is in production's place, as an operator would.
func (x *lost) destroyed(t *testing.T, c backup.Copy) {
	t.Helper()
	x.stopServer(t)
	for _, name := range c.Production.Storages {
		x.destroy(t, name)
	}
	if err := os.Remove(filepath.Join(x.state, "copies", string(c.ID)+".json")); err != nil {
		t.Fatal(err)
	}
	for _, path := range x.mounts {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	kept, _ := filepath.Glob(x.etc + "/*.before-*")
	if len(kept) != 1 {
		t.Errorf("kept beside what was placed: %q, want one", kept)
	}
	if err := os.RemoveAll(x.etc); err != nil {
		t.Fatal(err)
	}
}

// TestProductionStoppedAnywhereIsNothingOrInService: a host whose pg_hba.conf
// is another one, and the restore stopped at every outside call behind the
// copy's recovery.
func TestProductionStoppedAnywhereIsNothingOrInService(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	x := newLost(t)
	x.write(t, 5)
	id := x.backup(t)
	x.lose(t)
	t.Cleanup(func() {
		if c := x.standing(detached{t}); c != nil {
			x.takeAway(t, flow.Produced{Copy: *c})
		}
	})
	const mine = "# of this host\n"
	hba := filepath.Join(x.etc, "pg_hba.conf")
	prepare := func(t *testing.T) {
		t.Helper()
		pgtest.Mkdir(t, x.etc)
		if err := os.WriteFile(hba, []byte(mine), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unmade := func(t *testing.T) { // what was there is there again, and nothing else
		t.Helper()
		entries, _ := os.ReadDir(x.etc)
		if b, err := os.ReadFile(hba); err != nil || string(b) != mine || len(entries) != 1 {
			t.Errorf("etc holds %v, pg_hba.conf %q, %v", entries, b, err)
		}
		if err := os.RemoveAll(x.etc); err != nil {
			t.Fatal(err)
		}
		x.nothing(t)
	}
	args := x.args(id, x.newPlace()...)
	prepare(t)
	o := x.must(t, args...)
	if got := x.ask(t, newRows); got != "5 5" {
		t.Errorf("rows: got %s, want 5 5", got)
	}
	x.destroyed(t, *x.standing(t))
	f := flowUnderFault{from: "postgres.start.done"}
	faults := f.faults(o.points)
	t.Logf("NOTE %d points, %d faults", len(o.points), len(faults))
	service := slices.Index(o.points, "production.service") + 1
	for _, fault := range faults {
		action, at, _ := strings.Cut(fault, "@")
		n, _ := strconv.Atoi(at)
		t.Run(fault+" "+o.points[n-1], func(t *testing.T) {
			prepare(t)
			got := x.runWith(t, []string{"CLEANCUT_FAULT=" + fault}, args...)
			c := x.standing(t)
			// A signal may reach the program one step late.
			if either := action == "cancel" && (n == service || n == service-1); !either && (c != nil) != (n > service) {
				t.Errorf("in service: %v, stopped at %d, service at %d", c != nil, n, service)
			}
			if action == "kill" && got.code != -1 || action == "error" && got.code != 1 && !(got.code == 4 && strings.HasPrefix(o.points[n-1], "postgres.stop")) { // the clean stop is a check
				t.Errorf("exit %d", got.code)
			}
			if c == nil {
				if action == "kill" {
					x.must(t, "sweep")
				}
				unmade(t)
			} else {
				x.must(t, "sweep")
				x.inService(t, *c)
			}
			if t.Failed() {
				t.Logf("exit %d\n%s%s", got.code, got.out, got.err)
			}
		})
	}
}

// inService: it stands, serves once it is started, and no second one is made.
func (x *lost) inService(t *testing.T, c backup.Copy) {
	t.Helper()
	if o := x.run(t, x.args(c.Backup, x.newPlace()...)...); o.code != 1 || !strings.Contains(o.err, "place on this host already") && !strings.Contains(o.err, "the original answers") {
		t.Errorf("a second one: exit %d\n%s", o.code, o.err)
	}
	if _, err := os.Stat(filepath.Join(x.server.DataDirectory, "postmaster.pid")); err != nil {
		i := postgres.Site{Data: x.server.DataDirectory, Installation: x.server.Installation}
		start, err := i.StartCommand()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), start[0], start[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", start, err, out)
		}
	}
	eventually(t, "it takes connections", func() bool {
		conn, err := postgres.Connect(t.Context(), postgres.Target{DSN: x.dsn})
		return err == nil && conn.Close(t.Context()) == nil
	})
	if got := x.ask(t, newRows); got != "5 5" {
		t.Errorf("rows: got %s, want 5 5", got)
	}
	x.destroyed(t, c)
}

// push puts the finished WAL of the running server into the catalog.
func (x *lost) push(t *testing.T) {
	t.Helper()
	x.server.Exec(t, "SELECT pg_switch_wal()", "CHECKPOINT")
	eventually(t, "the archiver has no backlog", func() bool {
		ready, _ := filepath.Glob(filepath.Join(x.server.DataDirectory, "pg_wal", "archive_status", "*.ready"))
		return len(ready) == 0
	})
	files, err := filepath.Glob(x.inbox + "/0*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		x.must(t, "wal", "push", f)
	}
}

// TestProductionComesBackWithShippedWAL: what was committed after the backup
// is there, up to the target.
func TestProductionComesBackWithShippedWAL(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	x := newLost(t)
	x.write(t, 10)
	atomic := x.backup(t)
	bracketed := x.manifestOf(t, x.must(t, "backup", "--json", "--mode", "bracketed", "--checkpoint", "fast")).ID
	x.write(t, 5)
	at := x.ask(t, "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
	x.write(t, 7)
	x.push(t)
	x.write(t, 2) // in no place that is left
	x.lose(t)
	for _, c := range []struct {
		name, want string
		args       []string
	}{
		{"an atomic backup and all WAL", "22 22", x.args(atomic, "--target", "latest")},
		{"an atomic backup and a moment", "15 15", x.args(atomic, "--target", "time="+at)},
		{"the nearest backup to a moment", "15 15", slices.DeleteFunc(x.args(atomic, "--target", "time="+at), func(a string) bool { return a == string(atomic) })},
		{"a bracketed backup alone", "10 10", x.args(bracketed, "--level", "rows")},
		{"a bracketed backup and all WAL", "22 22", x.args(bracketed, "--target", "latest")},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := x.run(t, append(c.args, "--archive-command", "")...)
			if o.code != 0 {
				t.Fatalf("exit %d\n%s%s", o.code, o.out, o.err)
			}
			var p flow.Produced
			if err := json.Unmarshal([]byte(o.out), &p); err != nil {
				t.Fatal(err)
			}
			if got := x.ask(t, newRows); got != c.want || p.Timeline != 2 {
				t.Errorf("rows %s, want %s, on timeline %d", got, c.want, p.Timeline)
			}
			if got := x.ask(t, "SHOW archive_mode"); got != "off" {
				t.Errorf("archive_mode is %s", got)
			}
			x.must(t, "verify", "--level", "start", string(x.backup(t)))
			x.takeAway(t, p)
			if err := os.Remove(filepath.Join(x.state, "copies", string(p.Copy.ID)+".json")); err != nil {
				t.Fatal(err)
			}
			for _, path := range append(slices.Clone(x.mounts), x.etc) {
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestProductionComesBackOnLVM: a striped logical volume with ext4, under a new
// group and a new filesystem UUID, also after a reboot.
func TestProductionComesBackOnLVM(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	l := newLab(t, "xfs", 8<<30)
	mnt := l.storage(t, "data", "--volumes", "2", "--level", "lvm-striped", "--fs", "ext4")
	x := &lost{production: &production{lab: l, mounts: []string{mnt}}, etc: filepath.Join(l.dir, "etc"), inbox: pgtest.Mkdir(t, filepath.Join(l.dir, "inbox")), fresh: pgtest.Mkdir(t, filepath.Join(l.dir, "fresh"))}
	x.server = pgtest.New(t, pgtest.Options{Dir: pgtest.Mkdir(t, filepath.Join(l.dir, "run")), Data: filepath.Join(mnt, "pg"), Sync: true})
	x.dsn = x.server.DSN("postgres")
	x.server.Exec(t, "CREATE TABLE ledger (n bigint)", "CREATE TABLE mirror (n bigint)", "INSERT INTO ledger SELECT generate_series(0, 999)", "INSERT INTO mirror SELECT generate_series(0, 999)")
	m := x.manifestOf(t, x.must(t, "backup", "--json"))
	x.server.Stop(t)
	x.destroy(t, "data")
	if err := os.RemoveAll(mnt); err != nil {
		t.Fatal(err)
	}
	p := x.produced(t, x.run(t, x.args(m.ID, x.newPlace()...)...))
	for range 2 {
		if got := x.ask(t, newRows); got != "1000 1000" {
			t.Errorf("rows: got %s, want 1000 1000", got)
		}
		x.stopServer(t)
		x.detach(t, p)
		x.must(t, "storage", "attach", "main", "--fstab", filepath.Join(x.dir, "fstab"), "--mdadm-conf", filepath.Join(x.dir, "mdadm.conf"))
		if out, err := exec.CommandContext(t.Context(), p.StartCommand[0], p.StartCommand[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", p.StartCommand, err, out)
		}
	}
	now := x.manifestOf(t, x.must(t, "backup", "--json")).Topology.Filesystems[0]
	was := m.Topology.Filesystems[0]
	if now.UUID == was.UUID || now.Device.LogicalVolume.Group.UUID == was.Device.LogicalVolume.Group.UUID {
		t.Errorf("identity: now %s %+v, was %s %+v", now.UUID, now.Device.LogicalVolume.Group, was.UUID, was.Device.LogicalVolume.Group)
	}
}
