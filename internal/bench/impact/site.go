package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
)

// site is production: a server on one filesystem on one volume of a pool, and
// a folder on another disk for what tools write.
type site struct {
	options
	dir      string
	pool     string
	other    string // what tools write to
	mount    string
	device   string // of the volume
	image    string // the file behind it
	provider provider.Provider
	server   lab.Server
	made     []backup.ID // with cleancut, not deleted yet
	undo     lab.Undo
}

// newSite makes it; the server is not started. On an error nothing is left.
func (o options) newSite(ctx context.Context, size backup.Bytes, conf []string) (s *site, err error) {
	s = &site{options: o}
	if s.dir, err = os.MkdirTemp(o.work, "cci-"); err != nil { // short: a socket's path has 107 bytes
		return nil, err
	}
	s.undo.Later(func(context.Context) error {
		left, err := lab.Left(s.dir)
		if err != nil || len(left) > 0 { // never remove through a mount
			return errors.Join(err, fmt.Errorf("%s: %w", strings.Join(left, "; "), backup.ErrLeft))
		}
		return os.RemoveAll(s.dir)
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo.End(ctx))
		}
	}()
	s.pool, s.other, s.mount = filepath.Join(s.dir, "pool"), filepath.Join(s.dir, "other"), filepath.Join(s.dir, "data")
	if err := os.Chmod(s.dir, 0o755); err != nil {
		return s, err
	}
	if err := s.makeVolume(ctx, size); err != nil {
		return s, err
	}
	conf = append([]string{"shared_buffers = 128MB", "max_wal_size = 4GB", "log_checkpoints = on"}, conf...)
	s.server, err = lab.NewServer(ctx, lab.ServerOptions{Template: filepath.Join(s.dir, "initdb"), Data: filepath.Join(s.mount, "pg"), Socket: filepath.Join(s.dir, "s"), Conf: conf})
	if err != nil {
		return s, err
	}
	return s, s.server.Mkdir(s.other)
}

func (s *site) makeVolume(ctx context.Context, size backup.Bytes) error {
	undo, err := lab.Pool(ctx, s.pool, "xfs", 6*size)
	if err != nil {
		return err
	}
	s.undo.Later(func(context.Context) error { return undo() })
	if err := local.Init(ctx, s.pool); err != nil {
		return err
	}
	if s.provider, err = local.Open(ctx, s.pool, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	o := flow.StorageOptions{Name: "data", Host: "production", Volumes: 1, Size: size, Filesystem: "xfs", Mountpoint: s.mount, MountOptions: []string{"noatime"},
		Fstab: filepath.Join(s.dir, "fstab"), MdadmConf: filepath.Join(s.dir, "mdadm.conf")}
	s.undo.Later(func(ctx context.Context) error { return flow.DestroyStorage(ctx, s.provider, o) })
	made, err := flow.CreateStorage(ctx, s.provider, o)
	if err != nil {
		return err
	}
	s.device, s.image = made.Devices[0], filepath.Join(s.pool, "volumes", string(made.Volumes[0])+".img")
	return nil
}

// exec runs statements one by one.
func (s *site) exec(ctx context.Context, statements ...string) error {
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, q := range statements {
		if _, err := conn.Exec(ctx, q); err != nil {
			return fmt.Errorf("%s: %w", q, err)
		}
	}
	return nil
}

// databases is the size of all of them.
func (s *site) databases(ctx context.Context) (size backup.Bytes, err error) {
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return size, conn.QueryRow(ctx, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database").Scan(&size)
}

// sync writes out all that is dirty on production's filesystem.
func (s *site) sync() error {
	f, err := os.Open(s.mount)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// cleancut prepares a run of the real program.
func (s *site) cleancut(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.program, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root", "LANG=C.UTF-8", "CLEANCUT_CONFIG=", "CLEANCUT_POOL=" + s.pool, "CLEANCUT_CATALOG=file://" + filepath.Join(s.dir, "catalog"),
		"CLEANCUT_STATE=" + filepath.Join(s.dir, "state"), "CLEANCUT_HOST_NAME=production", "CLEANCUT_DSN=" + s.server.DSN("postgres"), "CLEANCUT_BIN_DIRS="}
	return cmd
}

// answer runs cleancut and reads what it answers, unless into is nil.
func (s *site) answer(ctx context.Context, into any, args ...string) error {
	out, err := output(s.cleancut(ctx, append(args, "--json")...))
	if err != nil || into == nil {
		return err
	}
	return json.Unmarshal(out, into)
}

// output runs a program to its end. When its context ends it is interrupted as
// by ^C on a terminal, with all that it started, and waited for.
func output(cmd *exec.Cmd) ([]byte, error) {
	out := &strings.Builder{}
	said := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = out, said
	if err := begin(cmd); err != nil {
		return nil, err
	}
	err := ended(cmd, said, cmd.Wait())
	return []byte(out.String()), err
}

// begin starts a program in a process group of its own.
func begin(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	return cmd.Start()
}

// ended says what a program said that did not end well.
func ended(cmd *exec.Cmd, said fmt.Stringer, err error) error {
	if err == nil {
		return nil
	}
	text := strings.Join(strings.Fields(said.String()), " ")
	if len(text) > 500 {
		text = text[len(text)-500:]
	}
	return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, text)
}

// wait is over after a time, or when ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
