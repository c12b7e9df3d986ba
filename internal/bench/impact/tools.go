package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/evidence"
)

// tool is one way to make a backup.
type tool struct {
	evidence.Tool
	needs []string // programs that must be installed
	// prepare makes what must stand before a backup, also while production is
	// measured alone. The release ends it; one that is returned beside an
	// error must be called, too.
	prepare func(ctx context.Context, s *site) (release func(ctx context.Context) error, err error)
	// backup makes one, from the call to its end.
	backup func(ctx context.Context, s *site) (*evidence.Cut, error)
	after  bool // the window goes on after the backup
}

// allTools lists them. Those that are not installed say so.
func allTools(ctx context.Context) []tool {
	nothing := func(context.Context, *site) (func(context.Context) error, error) {
		return func(context.Context) error { return nil }, nil
	}
	tools := []tool{
		{evidence.Tool{Key: "cleancut-freeze", Name: "cleancut, freeze", Version: version, Command: "`cleancut backup --mode freeze`, local provider"},
			nil, prepareCleancut, backupCleancut("--mode", "freeze"), true},
		{evidence.Tool{Key: evidence.Bracketed, Name: "cleancut, bracketed", Version: version, Command: "`cleancut backup --mode bracketed`, local provider, its checkpoint spread"},
			nil, prepareCleancut, backupCleancut("--mode", "bracketed", "--checkpoint", "spread"), true},
		{evidence.Tool{Key: "pg_dumpall", Name: "pg_dumpall", Command: "`pg_dumpall | zstd -1 -T2` into a file"},
			[]string{"zstd"}, nothing, dumpAll, false},
		{evidence.Tool{Key: "pg_basebackup", Name: "pg_basebackup", Command: "`pg_basebackup -X stream -c fast`, plain, uncompressed"},
			nil, nothing, baseBackup, false},
		{evidence.Tool{Key: "pgbackrest", Name: "pgBackRest", Command: "`pgbackrest backup --type=full --start-fast`, zstd; WAL is pushed in both windows"},
			[]string{"pgbackrest"}, prepareBackRest, backupBackRest, false},
		{evidence.Tool{Key: "barman", Name: "Barman", Command: "`barman backup`, `backup_method = postgres`, immediate checkpoint; WAL is streamed in both windows"},
			[]string{"barman"}, prepareBarman, backupBarman, false},
	}
	for i := range tools {
		for _, program := range tools[i].needs {
			if _, err := exec.LookPath(program); err != nil {
				tools[i].Missing = program + " is not installed here"
			}
		}
		if tools[i].Missing == "" && tools[i].Version == "" {
			tools[i].Version = versionOf(ctx, tools[i].Key)
		}
	}
	return tools
}

// wantedTools is allTools, of which those that were not asked for say so.
func (o options) wantedTools(ctx context.Context) ([]tool, error) {
	all := allTools(ctx)
	if o.tools == "" {
		return all, nil
	}
	asked := strings.Split(o.tools, ",")
	for i := range all {
		if at := slices.Index(asked, all[i].Key); at >= 0 {
			asked = slices.Delete(asked, at, at+1)
		} else {
			all[i].Missing = "not measured"
		}
	}
	if len(asked) > 0 {
		return nil, fmt.Errorf("%w: -tools: there is no %q", backup.ErrUsage, asked)
	}
	return all, nil
}

// versionOf is what a tool says about itself; PostgreSQL's own are told with
// the machine.
func versionOf(ctx context.Context, key string) string {
	args, ok := map[string][]string{"pgbackrest": {"version"}, "barman": {"--version"}}[key]
	if !ok {
		return ""
	}
	out, err := output(exec.CommandContext(ctx, key, args...))
	for _, word := range strings.Fields(string(out)) {
		if err == nil && word[0] >= '0' && word[0] <= '9' {
			return word
		}
	}
	return ""
}

// prepareCleancut removes the backup when its pair is over: the next pair's
// volume shares no blocks with it.
func prepareCleancut(_ context.Context, s *site) (func(context.Context) error, error) {
	return func(ctx context.Context) error {
		var errs []error
		for _, id := range s.made {
			errs = append(errs, s.answer(ctx, nil, "delete", string(id), "--yes", "--force-last"))
		}
		s.made = nil
		return errors.Join(errs...)
	}, nil
}

func backupCleancut(args ...string) func(ctx context.Context, s *site) (*evidence.Cut, error) {
	return func(ctx context.Context, s *site) (*evidence.Cut, error) {
		var m backup.Manifest
		if err := s.answer(ctx, &m, append([]string{"backup"}, args...)...); err != nil {
			return nil, err
		}
		s.made = append(s.made, m.ID)
		return &evidence.Cut{FreezeMS: m.Cut.FreezeMS, Rounds: m.Cut.SyncRounds}, nil
	}
}

// folder makes an empty one for what a tool writes.
func (s *site) folder(name string) (string, error) {
	dir := filepath.Join(s.other, name)
	return dir, errors.Join(os.RemoveAll(dir), s.server.Mkdir(dir))
}

func dumpAll(ctx context.Context, s *site) (*evidence.Cut, error) {
	dir, err := s.folder("dump")
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	to, err := os.Create(filepath.Join(dir, "all.sql.zst"))
	if err != nil {
		return nil, err
	}
	var said [2]strings.Builder
	dump, pack := s.server.Command(ctx, "pg_dumpall"), exec.CommandContext(ctx, "zstd", "-q", "-c", "-1", "-T2")
	dump.Stdout, dump.Stderr, pack.Stdin, pack.Stdout, pack.Stderr = w, &said[0], r, to, &said[1]
	started := begin(dump)
	if started == nil {
		started = begin(pack)
	}
	err = errors.Join(started, r.Close(), w.Close())
	for i, cmd := range []*exec.Cmd{dump, pack} {
		if cmd.Process != nil {
			err = errors.Join(err, ended(cmd, &said[i], cmd.Wait()))
		}
	}
	return nil, errors.Join(err, to.Close())
}

func baseBackup(ctx context.Context, s *site) (*evidence.Cut, error) {
	dir, err := s.folder("base")
	if err != nil {
		return nil, err
	}
	_, err = output(s.server.Command(ctx, "pg_basebackup", "-D", dir, "-X", "stream", "-c", "fast"))
	return nil, err
}

// asServer runs a program as the user of the server. It is no program of
// PostgreSQL, so it is found along PATH.
func (s *site) asServer(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := s.server.Command(ctx, "psql", args...)
	path, err := exec.LookPath(program)
	cmd.Path, cmd.Args[0] = cmp.Or(path, program), program
	if err != nil {
		cmd.Err = err
	}
	return cmd
}

func backRest(ctx context.Context, s *site, args ...string) error {
	conf := filepath.Join(s.other, "pgbackrest", "pgbackrest.conf")
	_, err := output(s.asServer(ctx, "pgbackrest", append([]string{"--config=" + conf, "--stanza=main"}, args...)...))
	return err
}

// prepareBackRest makes a new repository, and has the server push its WAL
// there.
func prepareBackRest(ctx context.Context, s *site) (func(context.Context) error, error) {
	dir, err := s.folder("pgbackrest")
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "pgbackrest.conf")
	text := fmt.Sprintf(`[global]
repo1-path=%[1]s/repo
log-path=%[1]s
lock-path=%[1]s/lock
spool-path=%[1]s/spool
log-level-console=error
log-level-file=off
compress-type=zst
repo1-retention-full=1
start-fast=y
[main]
pg1-path=%[2]s
pg1-socket-path=%[3]s
pg1-user=postgres
`, dir, s.server.Data, s.server.Socket)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := backRest(ctx, s, "stanza-create"); err != nil {
		return nil, err
	}
	push := fmt.Sprintf("pgbackrest --config=%s --stanza=main archive-push %%p", conf)
	if err := s.exec(ctx, "ALTER SYSTEM SET archive_command = '"+push+"'", "SELECT pg_reload_conf()"); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		return s.exec(ctx, "ALTER SYSTEM RESET archive_command", "SELECT pg_reload_conf()")
	}, backRest(ctx, s, "check")
}

func backupBackRest(ctx context.Context, s *site) (*evidence.Cut, error) {
	return nil, backRest(ctx, s, "backup", "--type=full")
}

func (s *site) barman(ctx context.Context, args ...string) *exec.Cmd {
	cmd := s.asServer(ctx, "barman", append([]string{"-q", "-c", filepath.Join(s.other, "barman", "barman.conf")}, args...)...)
	cmd.Env = append(cmd.Env, "HOME="+filepath.Join(s.other, "barman"))
	return cmd
}

// prepareBarman has Barman stream the server's WAL, as `barman cron` would
// start it.
func prepareBarman(ctx context.Context, s *site) (release func(context.Context) error, err error) {
	dir, err := s.folder("barman")
	if err != nil {
		return nil, err
	}
	if err := s.server.Mkdir(filepath.Join(dir, "conf.d")); err != nil {
		return nil, err
	}
	text := fmt.Sprintf(`[barman]
barman_user = postgres
barman_home = %[1]s
configuration_files_directory = %[1]s/conf.d
log_file = %[1]s/barman.log
[main]
description = main
conninfo = host=%[2]s user=postgres dbname=postgres
streaming_conninfo = host=%[2]s user=postgres dbname=postgres
backup_method = postgres
streaming_archiver = on
slot_name = barman
path_prefix = %[3]s
immediate_checkpoint = true
`, dir, s.server.Socket, s.server.Installation.Bin)
	if err := os.WriteFile(filepath.Join(dir, "barman.conf"), []byte(text), 0o644); err != nil {
		return nil, err
	}
	var undo []func(context.Context) error
	release = func(ctx context.Context) error {
		var errs []error
		for _, u := range slices.Backward(undo) {
			errs = append(errs, u(ctx))
		}
		return errors.Join(errs...)
	}
	if _, err := output(s.barman(ctx, "receive-wal", "--create-slot", "main")); err != nil {
		return nil, err
	}
	undo = append(undo, func(ctx context.Context) error {
		return s.until(ctx, "SELECT pg_drop_replication_slot('barman')") // it is active for a moment longer
	})
	receiver := s.barman(context.WithoutCancel(ctx), "receive-wal", "main")
	if err := begin(receiver); err != nil {
		return release, err
	}
	undo = append(undo, func(context.Context) error {
		err := syscall.Kill(-receiver.Process.Pid, syscall.SIGINT)
		_ = receiver.Wait() // interrupted: its status says so
		return err
	})
	if err := s.until(ctx, "SELECT 1 / count(*) FROM pg_replication_slots WHERE slot_name = 'barman' AND active"); err != nil {
		return release, fmt.Errorf("barman receive-wal does not stream: %w", err)
	}
	_, err = output(s.barman(ctx, "switch-wal", "--force", "--archive", "--archive-timeout", "120", "main"))
	return release, err
}

// until repeats a statement until it succeeds, for a minute.
func (s *site) until(ctx context.Context, statement string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := s.exec(ctx, statement)
		if err == nil || wait(ctx, 200*time.Millisecond) != nil {
			return err
		}
	}
}

func backupBarman(ctx context.Context, s *site) (*evidence.Cut, error) {
	_, err := output(s.barman(ctx, "backup", "main"))
	return nil, err
}
