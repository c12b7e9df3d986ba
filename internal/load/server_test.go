package load_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/load"
)

// server is a real PostgreSQL in a temporary folder, on a Unix socket only.
type server struct {
	bin, dir string
	run      *syscall.Credential // nil: as ourselves
}

// startServer makes a cluster and starts it with the settings ("name=value").
// CLEANCUT_PG_BIN chooses another major than 15.
func startServer(t testing.TB, settings ...string) *server {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real server: run `make test`")
	}
	s := &server{bin: os.Getenv("CLEANCUT_PG_BIN")}
	if s.bin == "" {
		s.bin = "/usr/lib/postgresql/15/bin"
	}
	var err error
	// t.TempDir cannot be entered by another user.
	if s.dir, err = os.MkdirTemp("", "load"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.remove(t) })
	if os.Geteuid() == 0 {
		s.run = postgresUser(t)
		if err := os.Chown(s.dir, int(s.run.Uid), int(s.run.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	s.must(t, "initdb", "--no-sync", "-k", "-A", "trust", "-U", "postgres", "-D", s.data())
	conf := fmt.Sprintf("listen_addresses=''\nunix_socket_directories='%s'\nfsync=off\nlog_statement=none\n", s.dir)
	for _, v := range settings {
		conf += v + "\n"
	}
	f, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(conf)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	return s
}

func postgresUser(t testing.TB) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func (s *server) data() string { return filepath.Join(s.dir, "data") }

func (s *server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if s.run != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.run}
	}
	return cmd
}

func (s *server) must(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := s.command(name, args...).CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(s.dir, "log"))
		t.Fatalf("%s: %v\n%s\n%s", name, err, out, log)
	}
}

func (s *server) start(t testing.TB) {
	t.Helper()
	s.must(t, "pg_ctl", "-D", s.data(), "-l", filepath.Join(s.dir, "log"), "-w", "-t", "120", "start")
}

func (s *server) crash(t testing.TB) {
	t.Helper()
	s.must(t, "pg_ctl", "-D", s.data(), "-m", "immediate", "-w", "stop")
}

// remove stops the server and demands that nothing is left.
func (s *server) remove(t testing.TB) {
	if _, err := os.Stat(filepath.Join(s.data(), "postmaster.pid")); err == nil {
		s.must(t, "pg_ctl", "-D", s.data(), "-m", "immediate", "-w", "stop")
	}
	if err := os.RemoveAll(s.dir); err != nil {
		t.Errorf("left behind: %v", err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %s", s.dir)
	}
}

func (s *server) connect(database string) load.Connect {
	return func(ctx context.Context) (*pgx.Conn, error) {
		return pgx.Connect(ctx, fmt.Sprintf("host=%s user=postgres dbname=%s", s.dir, database))
	}
}

// conn opens a connection that is closed with the test.
func (s *server) conn(t testing.TB, database string) *pgx.Conn {
	t.Helper()
	conn, err := s.connect(database)(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = conn.Close(ctx)
	})
	return conn
}

func run(t testing.TB, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}
