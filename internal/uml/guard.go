package uml

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
)

// guardScript kills the group whose number it reads and removes the folder given to it when its input ends, that is when the runner
// is gone. Pdeathsig alone does not do: it reaches linux.uml itself, whose I/O helpers then live on and hold the guest's memory.
const guardScript = `read -r group; read -r end; [ -n "$group" ] && kill -s KILL -- "-$group"; rm -rf -- "$1"`

// guard is a shell in a session of its own that cleans up after a runner that was killed.
type guard struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

// startGuard starts the guard of an exchange folder.
func startGuard(ctx context.Context, dir string) (*guard, error) {
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "/bin/sh", "-c", guardScript, "cleancut-guard", dir)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + searchPath}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start guard: %w", errors.Join(err, pipe.Close()))
	}
	return &guard{cmd: cmd, pipe: pipe}, nil
}

// watch tells the guard which process group to kill.
func (g *guard) watch(group int) error {
	if _, err := fmt.Fprintln(g.pipe, group); err != nil {
		return fmt.Errorf("tell guard: %w", err)
	}
	return nil
}

// stop ends the guard without its deed. It is killed before its input is closed, and waited for.
func (g *guard) stop() error {
	if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop guard: %w", err)
	}
	_ = g.cmd.Wait() // its end is the kill; closes the pipe
	return nil
}
