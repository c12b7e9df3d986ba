package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// lockFile is what a running server writes to postmaster.pid
// (src/include/utils/pidfile.h).
type lockFile struct {
	PID       int
	Started   time.Time // of the postmaster, to the second
	Port      int
	SocketDir string // the first of them, "" for none
	Listen    string // the first address, "" for none
	SharedID  int    // of its System V segment, -1 when not there yet
	Status    string // starting, stopping, ready, standby
}

// readLock reads postmaster.pid below dir. A server that just starts has
// written the first lines only.
func readLock(dir string) (lockFile, error) {
	b, err := os.ReadFile(filepath.Join(dir, "postmaster.pid"))
	if err != nil {
		return lockFile{}, err
	}
	lines := strings.Split(string(b), "\n")
	line := func(i int) string {
		if i < len(lines) {
			return strings.TrimSpace(lines[i])
		}
		return ""
	}
	l := lockFile{SocketDir: line(4), Listen: line(5), Status: line(7), SharedID: -1}
	// A standalone backend (--single) writes its pid negated.
	if l.PID, err = strconv.Atoi(strings.TrimPrefix(line(0), "-")); err != nil || l.PID <= 0 {
		return lockFile{}, fmt.Errorf("%s/postmaster.pid holds no process id", dir)
	}
	if s, err := strconv.ParseInt(line(2), 10, 64); err == nil {
		l.Started = time.Unix(s, 0)
	}
	l.Port, _ = strconv.Atoi(line(3))
	if f := strings.Fields(line(6)); len(f) == 2 {
		if id, err := strconv.Atoi(f[1]); err == nil {
			l.SharedID = id
		}
	}
	return l, nil
}

// host is what a client connects to.
func (l lockFile) host() string {
	switch {
	case l.SocketDir != "":
		return l.SocketDir
	case l.Listen == "" || l.Listen == "*" || l.Listen == "0.0.0.0" || l.Listen == "::":
		return "localhost"
	}
	return l.Listen
}

func orNotFound(err error) error {
	if err == nil {
		return backup.ErrNotFound
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", backup.ErrNotFound, err)
	}
	return err
}

// alive reports whether a process with that id exists.
func alive(pid int) bool {
	return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// worksIn reports whether process pid is a postgres whose working directory
// is dir, a real path. Every process of a server keeps the data directory as
// its working directory (ChangeToDataDir).
func worksIn(pid int, dir string) bool {
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	return err == nil && cwd == dir && isPostgres(pid)
}

// isPostgres looks at the program file. After an upgrade of the package the
// kernel appends " (deleted)" to its name.
func isPostgres(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	name := strings.TrimSuffix(filepath.Base(exe), " (deleted)")
	return err == nil && (name == "postgres" || name == "postmaster")
}

// serverPID returns the postmaster that runs in dir, a real path, and 0 when
// none does.
func serverPID(dir string) int {
	l, err := readLock(dir)
	if err != nil || !worksIn(l.PID, dir) {
		return 0
	}
	return l.PID
}

// postgresBelow lists the postgres processes whose working directory, or
// whose -D argument while they have not changed to it yet, is root or lies
// below it. A process that is ending has no program any more but still holds
// its directory and files: it is listed too.
func postgresBelow(root string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && (isPostgres(pid) || isEnding(pid)) && concerns(pid, root) {
			out = append(out, pid)
		}
	}
	return out, nil
}

// concerns reports whether pid works below root or is about to.
func concerns(pid int, root string) bool {
	cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	return below(root, strings.TrimSuffix(cwd, " (deleted)")) || below(root, dataArgument(pid))
}

// isEnding reports whether pid has given up its memory and program (exit_mm)
// but perhaps not its files (exit_files).
func isEnding(pid int) bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return errors.Is(err, os.ErrNotExist)
}

// dataArgument returns what follows -D on the command line of pid.
func dataArgument(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	args := strings.Split(string(b), "\x00")
	for i, a := range args {
		if a == "-D" && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}

// below reports whether path is root or lies in it. Both are clean and
// absolute; no link is looked at.
func below(root, path string) bool {
	return path == root || (path != "" && strings.HasPrefix(path, strings.TrimSuffix(root, "/")+"/"))
}

// handle holds on to one process, so that its number cannot come to mean
// another one (pidfd_open(2)).
type handle struct {
	fd  int
	pid int
}

// hold opens a handle; a process that is gone already gives ErrNotFound.
func hold(pid int) (*handle, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", pid, backup.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	return &handle{fd: fd, pid: pid}, nil
}

func (h *handle) close() { _ = unix.Close(h.fd) }

// signal sends s; a process that is gone is no error.
func (h *handle) signal(s unix.Signal) error {
	err := unix.PidfdSendSignal(h.fd, s, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %d to process %d: %w", s, h.pid, err)
	}
	return nil
}

// wait returns true once the process has ended, false when patience is over,
// and an error when ctx is.
func (h *handle) wait(ctx context.Context, patience time.Duration) (bool, error) {
	end := time.Now().Add(patience)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("wait for process %d: %w", h.pid, err)
		}
		if n > 0 {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, fmt.Errorf("wait for process %d: %w", h.pid, context.Cause(ctx))
		}
		if time.Now().After(end) {
			return false, nil
		}
	}
}
