package main_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// fithaw is FITHAW of Linux include/uapi/linux/fs.h.
const fithaw = 0xC0045878

// patience is how long anything here may take that must not hang.
const patience = 6 * time.Minute

// program is the cleancut program under test, built once.
var program struct {
	sync.Once
	path string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "cleancut-cmd-")
	if err == nil {
		err = os.Chmod(dir, 0o755) // a copy's server runs it, too
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = os.Chmod(dir, 0o755) // a copy's server runs it; where it cannot, that test says so
	program.path = filepath.Join(dir, "cleancut")
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// binary returns the program. labtest removes its own at the end of the test
// that first asks for it, so it is kept under another name.
func binary(t testing.TB) string {
	t.Helper()
	program.Do(func() {
		b, err := os.ReadFile(labtest.Binary(t))
		if err == nil {
			err = os.WriteFile(program.path, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	return program.path
}

// outcome is what one run of the program gave.
type outcome struct {
	code     int // -1: ended by a signal
	out, err string
	points   []string // fault points that were passed
}

// lab is storage and a configuration, without a server.
type lab struct {
	dir     string // everything but the pool and the copies' folder is below
	pool    string
	catalog string
	state   string
	host    string
	dsn     string
	base    []string // more environment, always there
	extra   []string // more environment, beats the rest

	cloud provider.Provider // who owns the volumes, if that is not the pool itself
}

// newLab mounts a pool and makes it one.
func newLab(t testing.TB, fstype string, size backup.Bytes) *lab {
	t.Helper()
	l := &lab{dir: labtest.Folder(t), host: "prod"}
	l.pool = labtest.Pool(t, fstype, size)
	l.catalog, l.state = filepath.Join(l.dir, "catalog"), filepath.Join(l.dir, "state")
	return l
}

func (l *lab) environment(more ...string) []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=/root", "LANG=C.UTF-8", "CLEANCUT_CONFIG=", "CLEANCUT_POOL=" + l.pool, "CLEANCUT_CATALOG=file://" + l.catalog,
		"CLEANCUT_STATE=" + l.state, "CLEANCUT_HOST_NAME=" + l.host, "CLEANCUT_DSN=" + l.dsn, "CLEANCUT_BIN_DIRS="}
	return slices.Concat(env, l.base, l.extra, more)
}

// command prepares a run whose output goes to files: no child that survives
// it keeps the caller waiting.
func (l *lab) command(t testing.TB, env []string, args ...string) (cmd *exec.Cmd, result func() outcome) {
	t.Helper()
	base := filepath.Join(t.TempDir(), "run")
	open := func(name string) *os.File {
		f, err := os.Create(base + name)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	out, errs := open(".out"), open(".err")
	cmd = exec.Command(binary(t), args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, errs
	cmd.Env = l.environment(append([]string{"CLEANCUT_FAULT_LOG=" + base + ".log"}, env...)...)
	return cmd, func() outcome {
		read := func(name string) string { b, _ := os.ReadFile(base + name); return string(b) }
		_, _ = out.Close(), errs.Close()
		return outcome{code: cmd.ProcessState.ExitCode(), out: read(".out"), err: read(".err"), points: pointsIn(read(".log"))}
	}
}

// pointsIn returns the points of the run itself: the watchdog's process logs
// none of its own.
func pointsIn(log string) []string {
	return strings.FieldsFunc(strings.TrimSpace(log), func(r rune) bool { return r == '\n' })
}

// run runs the program to its end.
func (l *lab) run(t testing.TB, args ...string) outcome {
	t.Helper()
	return l.runWith(t, nil, args...)
}

func (l *lab) runWith(t testing.TB, env []string, args ...string) outcome {
	t.Helper()
	cmd, result := l.command(t, env, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, cmd)
	return result()
}

// wait waits for a process that must end by itself.
func wait(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	_ = cmd.Wait() // the exit status is looked at by the caller
	if !late.Stop() {
		t.Fatalf("%s did not end within %s", strings.Join(cmd.Args, " "), patience)
	}
}

// must runs the program and fails the test unless it exits with 0.
func (l *lab) must(t testing.TB, args ...string) outcome {
	t.Helper()
	o := l.run(t, args...)
	if o.code != 0 {
		t.Fatalf("cleancut %s: exit %d\n%s%s", strings.Join(args, " "), o.code, o.out, o.err)
	}
	return o
}

// storage makes one volume with a filesystem on it, mounted at dir/name.
func (l *lab) storage(t testing.TB, name string, more ...string) (mountpoint string) {
	t.Helper()
	mountpoint = filepath.Join(l.dir, name)
	l.must(t, append([]string{"storage", "create", name, "--mount", mountpoint, "--volumes", "1", "--size", "400M",
		"--fstab", filepath.Join(l.dir, "fstab"), "--mdadm-conf", filepath.Join(l.dir, "mdadm.conf")}, more...)...)
	t.Cleanup(func() { l.destroy(t, name) })
	return mountpoint
}

func (l *lab) destroy(t testing.TB, name string) {
	t.Helper()
	o := (&lab{dir: l.dir, pool: l.pool, catalog: l.catalog, state: l.state, host: l.host, base: l.base}).run(detached{t}, "storage", "destroy", name,
		"--fstab", filepath.Join(l.dir, "fstab"), "--mdadm-conf", filepath.Join(l.dir, "mdadm.conf"))
	if o.code != 0 {
		t.Errorf("storage destroy %s: exit %d\n%s", name, o.code, o.err)
	}
}

// detached is a test whose context is still usable in its cleanup.
type detached struct{ testing.TB }

func (d detached) Context() context.Context { return context.WithoutCancel(d.TB.Context()) }

// provider opens the pool beside the program, to see what is really there.
func (l *lab) provider(t testing.TB) provider.Provider {
	t.Helper()
	if l.cloud != nil {
		return l.cloud
	}
	p, err := local.Open(detached{t}.Context(), l.pool, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (l *lab) inventory(t testing.TB) provider.Inventory {
	t.Helper()
	inv, err := l.provider(t).List(detached{t}.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

// production is a lab with a server on three filesystems of one volume each.
type production struct {
	*lab
	server *pgtest.Server
	mounts []string // data, wal, ts
}

// newProduction starts a cluster with its data, its WAL and one tablespace on
// filesystems of their own.
func newProduction(t testing.TB) *production {
	t.Helper()
	l := newLab(t, "xfs", 8<<30)
	return l.cluster(t, pgtest.Options{})
}

// cluster makes the storage of a cluster and starts it there.
func (l *lab) cluster(t testing.TB, o pgtest.Options) *production {
	t.Helper()
	p := &production{lab: l}
	for _, name := range []string{"data", "wal", "ts"} {
		p.mounts = append(p.mounts, l.storage(t, name))
	}
	t.Cleanup(func() { // what a failed test left must not keep the storage in use
		for _, c := range p.copies(detached{t}) {
			p.run(detached{t}, "restore", "--undo", c.Root)
		}
	})
	o.Dir, o.Data, o.WALDir, o.Sync = filepath.Join(l.dir, "run"), filepath.Join(p.mounts[0], "pg"), filepath.Join(p.mounts[1], "pg"), true
	pgtest.Mkdir(t, o.Dir)
	settings := map[string]string{"max_wal_size": "64MB", "min_wal_size": "32MB", "checkpoint_timeout": "30s"}
	for k, v := range o.Settings {
		settings[k] = v
	}
	o.Settings = settings
	p.server = pgtest.New(t, o)
	p.dsn = p.server.DSN("postgres")
	p.server.Exec(t, "CREATE TABLESPACE aside LOCATION '"+pgtest.Mkdir(t, filepath.Join(p.mounts[2], "space"))+"'",
		"CREATE TABLE ledger (n bigint PRIMARY KEY, filler text)",
		"CREATE TABLE mirror (n bigint PRIMARY KEY, filler text) TABLESPACE aside",
		"INSERT INTO ledger SELECT g, repeat('x', 200) FROM generate_series(-2000, -1) g", "CHECKPOINT")
	return p
}

// writer inserts rows one by one, each into both tables in one transaction,
// until the returned stop is called, which tells how many were acknowledged.
func (p *production) writer(t testing.TB) (stop func() int64) {
	t.Helper()
	conn := p.server.Connect(t, "postgres")
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	acked := make(chan int64, 1)
	go func() {
		n := int64(0)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			_, err := conn.Exec(ctx, "WITH a AS (INSERT INTO public.ledger VALUES ($1, 'w') RETURNING n) INSERT INTO public.mirror SELECT n, 'w' FROM a", n)
			if err != nil {
				break
			}
			n++
			<-tick.C
		}
		acked <- n
	}()
	var once sync.Once
	var got int64
	stop = func() int64 {
		once.Do(func() { cancel(); got = <-acked })
		return got
	}
	t.Cleanup(func() { stop() })
	return stop
}

// backup takes a backup and returns its id.
func (p *production) backup(t testing.TB) backup.ID {
	t.Helper()
	return p.manifestOf(t, p.must(t, "backup", "--json")).ID
}

func (p *production) manifestOf(t testing.TB, o outcome) backup.Manifest {
	t.Helper()
	var m backup.Manifest
	if err := json.Unmarshal([]byte(o.out), &m); err != nil {
		t.Fatalf("backup --json: %v\n%s", err, o.out)
	}
	return m
}

// answers fails the test unless production answers and holds every row that
// it acknowledged before the call.
func (p *production) answers(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn := p.server.Connect(t, "postgres")
	defer func() { _ = conn.Close(ctx) }()
	var old, ledger, mirror int64
	err := conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM public.ledger WHERE n < 0),
		(SELECT count(*) - coalesce(max(n), -1) - 1 FROM public.ledger WHERE n >= 0), (SELECT count(*) - coalesce(max(n), -1) - 1 FROM public.mirror)`).Scan(&old, &ledger, &mirror)
	if err != nil {
		t.Fatalf("production does not answer: %v", err)
	}
	if old != 2000 || ledger != 0 || mirror != 0 {
		t.Errorf("production has %d of 2000 old rows, gaps of %d and %d in the new ones", old, ledger, mirror)
	}
}

// flows fails the test if anything is frozen or guarded still: every
// filesystem takes a durable write, FITHAW says EINVAL, no watchdog is left.
func (p *production) flows(t testing.TB) {
	t.Helper()
	for _, m := range p.mounts {
		done := make(chan error, 1)
		go func() { done <- writeDurably(filepath.Join(m, ".probe")) }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("write to %s: %v", m, err)
			}
		case <-time.After(30 * time.Second):
			_ = thaw(m)
			t.Fatalf("a write to %s hangs: it is frozen", m)
		}
		if err := thaw(m); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: FITHAW said %v, want %v: it was frozen still", m, err, unix.EINVAL)
		}
	}
	eventually(t, "the watchdog ends", func() bool { return len(processes(p.dir, "watchdog")) == 0 })
}

func writeDurably(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.WriteString("probe\n")
	return errors.Join(err, f.Sync(), f.Close())
}

func thaw(mountpoint string) error {
	d, err := os.Open(mountpoint)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return unix.IoctlSetInt(int(d.Fd()), fithaw, 0)
}

// eventually waits for what comes by itself.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(30 * time.Second)
	for !is() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s", what)
		}
	}
}

// processes lists the processes whose command line holds every word.
func processes(words ...string) []int {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var out []int
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err == nil && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(string(b), w) }) {
			pid, _ := strconv.Atoi(strings.Split(e, "/")[2])
			out = append(out, pid)
		}
	}
	return out
}

// leftovers says what stands beyond production and the complete backups; nil
// is clean. Copies that are meant to stay are given by their folders.
func (p *production) leftovers(t testing.TB, stay ...string) []string {
	t.Helper()
	var out []string
	say := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	ctx := detached{t}.Context()
	store, err := catalog.Open("file://" + p.catalog)
	if err != nil {
		t.Fatal(err)
	}
	cat := catalog.New(store, "main")
	complete := map[string]bool{}
	entries, err := cat.Backups(ctx)
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Err != nil {
			say("backup %s is not complete: %v", e.ID, e.Err)
			continue
		}
		for _, s := range e.Manifest.Snapshots {
			complete[string(s.ID)] = true
		}
		for _, d := range e.Dumps {
			if !d.Complete {
				say("dump %s is not complete", d.Name)
			}
		}
	}
	for _, prefix := range []string{"check-", "spool-"} {
		work, _ := filepath.Glob(filepath.Join(p.state, prefix+"*"))
		for _, path := range work {
			say("work folder %s", path)
		}
	}
	intents, err := cat.Intents(ctx)
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		t.Fatal(err)
	}
	for _, i := range intents {
		say("intent %s", i.ID)
	}
	standing := p.copies(t)
	for _, c := range standing {
		if !slices.Contains(stay, c.Root) {
			say("ledger of copy %s (%s, ready %v)", c.ID, c.Purpose, c.Ready)
		}
	}
	kept := func(id string) bool {
		return slices.ContainsFunc(standing, func(c backup.Copy) bool { return string(c.ID) == id && slices.Contains(stay, c.Root) })
	}
	out = append(out, p.strayInPool(t, complete, kept)...)
	return append(out, p.strayOnHost(t, stay)...)
}

func (p *production) copies(t testing.TB) []backup.Copy {
	t.Helper()
	if _, err := os.Stat(p.state); err != nil {
		return nil
	}
	st, err := state.Open(p.state)
	if err != nil {
		t.Fatal(err)
	}
	copies, err := st.Copies()
	if err != nil {
		t.Fatal(err)
	}
	return copies
}

// strayInPool compares the pool's files, not only what List shows, with what
// belongs there.
func (p *production) strayInPool(t testing.TB, complete map[string]bool, kept func(copyID string) bool) []string {
	t.Helper()
	var out []string
	known := map[string]bool{}
	inv := p.inventory(t)
	for _, v := range inv.Volumes {
		known[string(v.ID)] = true
		if v.Tags[backup.TagStorage] == "" && !kept(v.Tags[backup.TagCopy]) {
			out = append(out, fmt.Sprintf("volume %s %v", v.ID, v.Tags))
		}
		if v.Attached == "" {
			out = append(out, fmt.Sprintf("volume %s is not attached", v.ID))
		}
	}
	for _, s := range inv.Snapshots {
		known[string(s.ID)] = true
		if !complete[string(s.ID)] {
			out = append(out, fmt.Sprintf("snapshot %s %v", s.ID, s.Tags))
		}
	}
	for id := range complete {
		if !known[id] {
			out = append(out, "snapshot "+id+" of a complete backup is gone")
		}
	}
	if p.cloud != nil { // the files are the test server's business
		return out
	}
	for _, sub := range []string{"volumes", "snapshots"} {
		files, err := os.ReadDir(filepath.Join(p.pool, sub))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if name, ext, _ := strings.Cut(f.Name(), "."); !known[name] || ext != "img" && ext != "json" {
				out = append(out, "file "+sub+"/"+f.Name()+" in the pool")
			}
		}
	}
	return out
}

// strayOnHost looks at loop devices, mounts, folders and processes.
func (p *production) strayOnHost(t testing.TB, stay []string) []string {
	t.Helper()
	var out []string
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	n := 0
	for _, f := range loops {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), p.pool+"/") {
			n++
		}
	}
	if volumes := len(p.inventory(t).Volumes); n != volumes {
		out = append(out, fmt.Sprintf("%d loop devices for %d volumes", n, volumes))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	stays := func(path string) bool {
		return slices.ContainsFunc(append(stay, p.mounts...), func(s string) bool { return path == s || strings.HasPrefix(path, s+"/") })
	}
	for line := range strings.SplitSeq(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], p.dir+"/") && !stays(f[4]) {
			out = append(out, "mount "+f[4])
		}
	}
	for _, pattern := range []string{"capture-*", "wal-for-*", "waldump-*"} { // WAL on its way
		found, _ := filepath.Glob(filepath.Join(p.state, pattern))
		out = append(out, found...)
	}
	for _, dir := range []string{filepath.Join(p.state, "mnt"), filepath.Join(p.dir, "copy")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if path := filepath.Join(dir, e.Name()); !stays(path) {
				out = append(out, "folder "+path)
			}
		}
	}
	return append(out, p.strayProcesses(stay)...)
}

func (p *production) strayProcesses(stay []string) []string {
	var out []string
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, c := range cwds {
		cwd, err := os.Readlink(c)
		if err != nil || !strings.HasPrefix(cwd, p.dir+"/") || strings.HasPrefix(cwd, p.server.DataDirectory) {
			continue
		}
		if !slices.ContainsFunc(stay, func(s string) bool { return strings.HasPrefix(cwd, s+"/") }) {
			out = append(out, "process "+strings.Split(c, "/")[2]+" in "+cwd)
		}
	}
	return out
}

// clean fails the test unless nothing is frozen, production is whole and
// nothing is left, without any help of sweep.
func (p *production) clean(t testing.TB, stay ...string) {
	t.Helper()
	p.flows(t)
	p.answers(t)
	for _, l := range p.leftovers(t, stay...) {
		t.Errorf("left: %s", l)
	}
}

// swept fails the test unless sweep ends with 0 and nothing is left then.
func (p *production) swept(t testing.TB, stay ...string) {
	t.Helper()
	if o := p.run(t, "sweep"); o.code != 0 {
		t.Errorf("sweep: exit %d\n%s%s", o.code, o.out, o.err)
	}
	for _, l := range p.leftovers(t, stay...) {
		t.Errorf("left after sweep: %s", l)
	}
}

// refused fails the test unless the outcome has the exit code and its message
// holds every word.
func (o outcome) refused(t testing.TB, code int, words ...string) {
	t.Helper()
	if o.code != code {
		t.Errorf("exit %d, want %d\n%s%s", o.code, code, o.out, o.err)
	}
	for _, w := range words {
		if !strings.Contains(o.err, w) {
			t.Errorf("the message lacks %q:\n%s", w, o.err)
		}
	}
}

// kill ends a process that the test started.
func kill(cmd *exec.Cmd) { _ = syscall.Kill(cmd.Process.Pid, syscall.SIGKILL) }
