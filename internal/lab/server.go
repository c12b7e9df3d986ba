package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/host"
	"cleancut/internal/postgres"
)

// Server is a PostgreSQL server of our own: production of the demo and the
// drill, and the empty one that a dump is restored into.
type Server struct {
	Installation postgres.Installation
	Data         string // data directory
	Socket       string // folder of the socket and the log
	uid, gid     uint32
}

// ServerOptions says where a server's cluster lies. All folders are made.
type ServerOptions struct {
	Template string // what initdb made, kept and copied: it takes long in the guest
	Data     string
	WAL      string // pg_wal behind a link; "": in the data directory
	Socket   string // short: a socket's path has 107 bytes
	Conf     []string
}

// NewServer makes a cluster with checksums, with the newest PostgreSQL that is
// installed here; it is not started.
func NewServer(ctx context.Context, o ServerOptions) (Server, error) {
	inst, err := NewestInstallation(ctx)
	if err != nil {
		return Server{}, err
	}
	srv := Server{Installation: inst, Data: o.Data, Socket: o.Socket}
	if srv.uid, srv.gid, err = PostgresUser(); err != nil {
		return srv, err
	}
	for _, dir := range []string{o.Template, o.Data, o.Socket} {
		if err := srv.Mkdir(dir); err != nil {
			return srv, err
		}
	}
	if _, err := os.Stat(filepath.Join(o.Template, "PG_VERSION")); err != nil {
		if _, err := srv.run(ctx, "initdb", "-D", o.Template, "-U", "postgres", "-A", "trust", "--locale=C.UTF-8", "--no-instructions", "--no-sync", "--data-checksums"); err != nil {
			return srv, err
		}
	}
	if _, err := host.Run(ctx, "cp", "-a", o.Template+"/.", o.Data); err != nil {
		return srv, err
	}
	if err := srv.moveWAL(ctx, o.WAL); err != nil {
		return srv, err
	}
	conf := append(slices.Clone(o.Conf), "listen_addresses = ''", fmt.Sprintf("unix_socket_directories = '%s'", o.Socket))
	f, err := os.OpenFile(filepath.Join(o.Data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return srv, err
	}
	_, err = f.WriteString("\n" + strings.Join(conf, "\n") + "\n")
	return srv, errors.Join(err, f.Close())
}

func (s Server) moveWAL(ctx context.Context, to string) error {
	if to == "" {
		return nil
	}
	if err := s.Mkdir(to); err != nil {
		return err
	}
	from := filepath.Join(s.Data, "pg_wal")
	if _, err := host.Run(ctx, "cp", "-a", from+"/.", to); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(from), os.Symlink(to, from))
}

// Mkdir makes a folder that belongs to the server's user.
func (s Server) Mkdir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chown(dir, int(s.uid), int(s.gid))
}

// NewestInstallation is the newest PostgreSQL that is installed here.
func NewestInstallation(ctx context.Context) (postgres.Installation, error) {
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

// PostgresUser is the user that servers run as: postgres, as Debian's package
// makes it.
func PostgresUser() (uid, gid uint32, err error) {
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

// Command prepares one of PostgreSQL's programs as the server's user.
func (s Server) Command(ctx context.Context, tool string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.Installation.Bin, tool), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + s.Installation.Bin + ":/usr/bin:/bin", "LC_ALL=C", "PGHOST=" + s.Socket, "PGUSER=postgres", "PGDATABASE=postgres"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.uid, Gid: s.gid}}
	return cmd
}

func (s Server) run(ctx context.Context, tool string, args ...string) (string, error) {
	cmd := s.Command(ctx, tool, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", tool, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// Start starts the server and waits until it answers.
func (s Server) Start(ctx context.Context) error {
	_, err := s.run(ctx, "pg_ctl", "-D", s.Data, "-w", "-t", "300", "-s", "-l", filepath.Join(s.Socket, "log"), "start")
	return err
}

// Stop stops the server; not running: nil.
func (s Server) Stop(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.Data, "postmaster.pid")); err != nil {
		return nil
	}
	_, err := s.run(ctx, "pg_ctl", "-D", s.Data, "-w", "-t", "300", "-s", "-m", "fast", "stop")
	return err
}

// DSN is how to reach a database of it.
func (s Server) DSN(database string) string {
	return fmt.Sprintf("host=%s user=postgres dbname=%s application_name=cleancut-lab", s.Socket, database)
}

// Connect opens a connection to the database postgres.
func (s Server) Connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, s.DSN("postgres"))
}
