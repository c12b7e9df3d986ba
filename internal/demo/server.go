package demo

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// server is a PostgreSQL server that the demo itself runs: production, and
// the empty one that the dump is restored into.
type server struct {
	bin    string
	data   string
	socket string
	uid    uint32
	gid    uint32
}

// newServer makes a cluster in data, with its socket in a folder of its own.
// initdb, which takes long in the guest, runs once: its result stays in
// template and is copied.
func newServer(ctx context.Context, template, data, socket string, conf []string) (server, error) {
	inst, err := newestInstallation(ctx)
	if err != nil {
		return server{}, err
	}
	srv := server{bin: inst.Bin, data: data, socket: socket}
	if srv.uid, srv.gid, err = postgresUser(); err != nil {
		return srv, err
	}
	for _, dir := range []string{template, data, socket} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return srv, err
		}
		if err := os.Chown(dir, int(srv.uid), int(srv.gid)); err != nil {
			return srv, err
		}
	}
	if _, err := os.Stat(filepath.Join(template, "PG_VERSION")); err != nil {
		if _, err := srv.run(ctx, "initdb", "-D", template, "-U", "postgres", "-A", "trust", "--locale=C.UTF-8", "--no-instructions", "--no-sync", "--data-checksums"); err != nil {
			return srv, err
		}
	}
	if _, err := host.Run(ctx, "cp", "-a", template+"/.", data); err != nil {
		return srv, err
	}
	conf = append(conf, "listen_addresses = ''", fmt.Sprintf("unix_socket_directories = '%s'", socket))
	f, err := os.OpenFile(filepath.Join(data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return srv, err
	}
	_, err = f.WriteString("\n" + strings.Join(conf, "\n") + "\n")
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return srv, err
}

// newestInstallation takes the newest PostgreSQL that is installed here.
func newestInstallation(ctx context.Context) (postgres.Installation, error) {
	var last error
	for major := 18; major >= 13; major-- {
		inst, err := postgres.FindInstallation(ctx, major, nil)
		if err == nil {
			return inst, nil
		}
		last = err
	}
	return postgres.Installation{}, fmt.Errorf("find PostgreSQL 13 to 18: %w", last)
}

// postgresUser is the user that servers run as: postgres, as Debian's package
// makes it.
func postgresUser() (uid, gid uint32, err error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		return 0, 0, err
	}
	n, err1 := strconv.ParseUint(u.Uid, 10, 32)
	g, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err1 != nil || err2 != nil {
		return 0, 0, fmt.Errorf("user postgres has uid %q and gid %q", u.Uid, u.Gid)
	}
	return uint32(n), uint32(g), nil
}

// command prepares one of PostgreSQL's programs as the server's user.
func (s server) command(ctx context.Context, tool string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, tool), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + s.bin + ":/usr/bin:/bin", "LC_ALL=C", "PGHOST=" + s.socket, "PGUSER=postgres", "PGDATABASE=postgres"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.uid, Gid: s.gid}}
	return cmd
}

func (s server) run(ctx context.Context, tool string, args ...string) (string, error) {
	cmd := s.command(ctx, tool, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", tool, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

func (s server) start(ctx context.Context) error {
	_, err := s.run(ctx, "pg_ctl", "-D", s.data, "-w", "-t", "300", "-s", "-l", filepath.Join(s.socket, "log"), "start")
	return err
}

// stop stops the server; not running: nil.
func (s server) stop(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.data, "postmaster.pid")); err != nil {
		return nil
	}
	_, err := s.run(ctx, "pg_ctl", "-D", s.data, "-w", "-t", "300", "-s", "-m", "fast", "stop")
	return err
}

func (s server) dsn(database string) string {
	return fmt.Sprintf("host=%s user=postgres dbname=%s application_name=demo", s.socket, database)
}

func (s server) connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, s.dsn("postgres"))
}
