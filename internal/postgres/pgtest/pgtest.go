// Package pgtest starts real, throwaway PostgreSQL servers for tests.
//
//	New → Server → Exec, Crash, Start, Stop
//
// A server lives in a folder of its own directly below /tmp, talks only over
// its socket there, and runs as postgres when the test runs as root. When the
// test ends it is stopped, its folder removed, and the test fails if a process
// is left.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/postgres"
)

// Majors returns the programs of every supported major version, oldest first,
// from the system's packages or from the cache that scripts/install-deps fills.
// The latter hold the server without client tools. Where one is missing the
// test is skipped, which CI does not forgive.
func Majors(t testing.TB) []postgres.Installation {
	t.Helper()
	if testing.Short() {
		t.Skip("needs real servers: run `make test`")
	}
	var out []postgres.Installation
	for major := 13; major <= 18; major++ {
		i, err := find(t, major)
		if err != nil {
			t.Skipf("run scripts/install-deps: %v", err)
		}
		out = append(out, i)
	}
	return out
}

// Installation returns the programs of one major version, and fails the test
// where they are missing.
func Installation(t testing.TB, major int) postgres.Installation {
	t.Helper()
	i, err := find(t, major)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// find looks where install-deps puts servers: root's lie where the user that
// they run as can read them.
func find(t testing.TB, major int) (postgres.Installation, error) {
	t.Helper()
	dirs := []string{fmt.Sprintf("/var/cache/cleancut/postgresql/%d/native/bin", major)}
	if cache, err := os.UserCacheDir(); err == nil && os.Geteuid() != 0 {
		dirs = []string{fmt.Sprintf("%s/cleancut/postgresql/%d/native/bin", cache, major)}
	}
	return postgres.FindInstallation(t.Context(), major, dirs)
}

// Options of a server. The zero value is a server of version 15.
type Options struct {
	Major     int               // 0: 15
	Dir       string            // folder to use; "": a new one below /tmp
	Data      string            // the data directory; "": Dir/data
	WALDir    string            // puts pg_wal there, behind a link; must be empty or absent
	Settings  map[string]string // appended to postgresql.conf
	HBA       string            // content of pg_hba.conf; "": trust over the socket
	Sync      bool              // fsync on and initdb syncs; by default it is off: tests kill processes, not machines
	Checksums bool
	Small     bool // WAL in files of 1 MiB instead of 16, so that copying the cluster is quick
	NoStart   bool // only initdb
}

// Server is a running server.
type Server struct {
	Dir           string // everything of it
	DataDirectory string
	SocketDir     string
	Port          int
	Installation  postgres.Installation
	UID, GID      uint32
	cmd           *exec.Cmd
	ended         chan error
}

// Owner returns the user that throwaway servers run as.
func Owner(t testing.TB) (uid, gid uint32) {
	t.Helper()
	if os.Geteuid() != 0 {
		return uint32(os.Geteuid()), uint32(os.Getegid())
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatalf("as root, tests run servers as postgres: %v", err)
	}
	n, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	g, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n), uint32(g)
}

// Folder makes a folder with a short name (a socket's path holds 107 bytes)
// that belongs to the owner of servers and goes away with the test.
func Folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgt")
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove %s: %v", dir, err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	chown(t, dir)
	return dir
}

func chown(t testing.TB, path string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	uid, gid := Owner(t)
	if err := os.Lchown(path, int(uid), int(gid)); err != nil {
		t.Fatal(err)
	}
}

// Mkdir makes a directory that the server may use, for a tablespace.
func Mkdir(t testing.TB, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	chown(t, path)
	return path
}

// New makes a cluster and starts it.
func New(t testing.TB, o Options) *Server {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real server: run `make test`")
	}
	if o.Major == 0 {
		o.Major = 15
	}
	s := &Server{Dir: o.Dir, DataDirectory: o.Data, Port: 5432, Installation: Installation(t, o.Major)}
	s.UID, s.GID = Owner(t)
	if s.Dir == "" {
		s.Dir = Folder(t)
	}
	if s.DataDirectory == "" {
		s.DataDirectory = filepath.Join(s.Dir, "data")
	}
	s.SocketDir = Mkdir(t, filepath.Join(s.Dir, "s"))
	Mkdir(t, s.DataDirectory)
	args := []string{"-D", s.DataDirectory, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"}
	if o.Sync {
		args = args[:len(args)-1]
	}
	if o.Small {
		args = append(args, "--wal-segsize=1")
	}
	if o.Checksums {
		args = append(args, "-k")
	}
	if o.WALDir != "" {
		args = append(args, "-X", Mkdir(t, o.WALDir))
	}
	if out, err := s.Command(t.Context(), "initdb", args...).CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	s.configure(t, o)
	t.Cleanup(func() { s.cleanUp(t) })
	if !o.NoStart {
		s.Start(t)
	}
	return s
}

// Standby makes a hot standby of the running server and starts it: a copy of
// its files in backup mode that streams from it. It needs no client tool. It
// takes over s's settings; these beat them.
func (s *Server) Standby(t testing.TB, settings map[string]string) *Server {
	t.Helper()
	dir := Folder(t)
	c := &Server{Dir: dir, DataDirectory: filepath.Join(dir, "data"), SocketDir: Mkdir(t, filepath.Join(dir, "s")), Port: s.Port,
		Installation: s.Installation, UID: s.UID, GID: s.GID}
	mode, err := postgres.StartBackup(t.Context(), postgres.Target{DSN: s.DSN("postgres"), DataDirectory: s.DataDirectory},
		postgres.BackupModeOptions{Label: "standby", Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	// Files may vanish under a copy, which is what backup mode is for.
	out, err := exec.CommandContext(t.Context(), "cp", "-a", s.DataDirectory, c.DataDirectory).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if err != nil && !strings.Contains(line, "No such file or directory") {
			t.Fatalf("cp: %v: %s", err, line)
		}
	}
	stop, err := mode.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(c.DataDirectory, "postmaster.pid")); err != nil {
		t.Fatal(err)
	}
	Append(t, filepath.Join(c.DataDirectory, "backup_label"), string(stop.LabelFile))
	Append(t, filepath.Join(c.DataDirectory, "standby.signal"), "")
	conf := fmt.Sprintf("unix_socket_directories = '%s'\nprimary_conninfo = 'host=%s port=%d user=postgres'\n", c.SocketDir, s.SocketDir, s.Port)
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		conf += fmt.Sprintf("%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	Append(t, filepath.Join(c.DataDirectory, "postgresql.conf"), conf)
	t.Cleanup(func() { c.cleanUp(t) })
	c.Start(t)
	return c
}

func (s *Server) configure(t testing.TB, o Options) {
	t.Helper()
	settings := map[string]string{
		"listen_addresses": "", "unix_socket_directories": s.SocketDir, "port": strconv.Itoa(s.Port),
		"shared_buffers": "16MB", "max_connections": "30",
	}
	if !o.Sync {
		settings["fsync"] = "off"
	}
	maps.Copy(settings, o.Settings)
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	Append(t, filepath.Join(s.DataDirectory, "postgresql.conf"), b.String())
	if o.HBA != "" {
		if err := os.WriteFile(filepath.Join(s.DataDirectory, "pg_hba.conf"), []byte(o.HBA), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// Append adds text to a file, which keeps its owner; a new one belongs to the
// owner of servers.
func Append(t testing.TB, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	chown(t, path)
}

// Command prepares one of the installation's programs, run as the server's
// owner and aimed at it.
func (s *Server) Command(ctx context.Context, tool string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.Installation.Bin, tool), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "PGHOST=" + s.SocketDir, "PGPORT=" + strconv.Itoa(s.Port), "PGUSER=postgres", "PGDATABASE=postgres"}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.UID, Gid: s.GID}}
	}
	return cmd
}

// DSN is the connection string of a database.
func (s *Server) DSN(database string) string {
	return fmt.Sprintf("host=%s port=%d user=postgres dbname=%s", s.SocketDir, s.Port, database)
}

// Connect opens a session that ends with the test, as postgres.Connect does
// (so with its search_path).
func (s *Server) Connect(t testing.TB, database string) *pgx.Conn {
	t.Helper()
	conn, err := postgres.Connect(t.Context(), postgres.Target{DSN: s.DSN(database), DataDirectory: s.DataDirectory})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

// Exec runs statements one by one in database postgres, search_path public.
func (s *Server) Exec(t testing.TB, statements ...string) {
	t.Helper()
	conn := s.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	for _, q := range append([]string{"RESET search_path"}, statements...) {
		if _, err := conn.Exec(t.Context(), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
}

// Promote promotes a standby and returns when it is out of recovery. It holds no
// snapshot meanwhile, for which recovery might have to wait first.
func (s *Server) Promote(ctx context.Context) error {
	conn, err := postgres.Connect(ctx, postgres.Target{DSN: s.DSN("postgres"), DataDirectory: s.DataDirectory})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	if _, err := conn.Exec(ctx, "SELECT pg_promote(false)"); err != nil {
		return err
	}
	for {
		in := false
		if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&in); err != nil || !in {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Start starts the server and waits until it is out of crash recovery.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(s.Log(), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := s.Command(context.Background(), "postgres", "-D", s.DataDirectory)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.cmd, s.ended = cmd, make(chan error, 1)
	go func() { s.ended <- cmd.Wait() }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-s.ended:
			s.cmd = nil
			b, _ := os.ReadFile(s.Log())
			t.Fatalf("the test server ended: %v\n%s", err, b)
		case <-t.Context().Done():
			t.Fatal("the test ended before its server had started")
		case <-tick.C:
		}
		// "ready", or "standby" for a hot standby
		b, err := os.ReadFile(filepath.Join(s.DataDirectory, "postmaster.pid"))
		lines := strings.Split(string(b), "\n")
		if err == nil && len(lines) > 7 && lines[0] == strconv.Itoa(cmd.Process.Pid) {
			if status := strings.TrimSpace(lines[7]); status == "ready" || status == "standby" {
				return
			}
		}
	}
}

// Log is the path of the server's log.
func (s *Server) Log() string { return filepath.Join(s.Dir, "server.log") }

// PID returns the postmaster's process id, 0 when the server is down.
func (s *Server) PID() int {
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// Stop shuts the server down cleanly; one that is down already is no error.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Signal(syscall.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	<-s.ended
	s.cmd = nil
}

// Crash kills every process of the server with SIGKILL, the postmaster first,
// and returns when they are gone.
func (s *Server) Crash(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	<-s.ended
	s.cmd = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := postgres.Kill(ctx, s.DataDirectory); err != nil {
		t.Fatal(err)
	}
}

// cleanUp runs after the test and fails it if a process is left.
func (s *Server) cleanUp(t testing.TB) {
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(syscall.SIGQUIT)
		<-s.ended
		s.cmd = nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd")); err == nil && cwd == s.DataDirectory {
			t.Errorf("process %s is left in %s", e.Name(), cwd)
		}
	}
}
