package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
)

// Watchdog is this process's end of the pipe to the process that thaws when we
// do not.
type Watchdog struct {
	cmd   *exec.Cmd
	pipe  io.WriteCloser
	says  chan string // lines from the watchdog; closed at its end
	fired bool
	note  string // what the watchdog could not do to protect itself
}

// What goes over the pipes. The freezer's end of the first pipe is in nobody
// else's hands: when it is at its end, no FIFREEZE of the freezer is running
// any more, because the kernel closes a process's files only after its last
// system call has returned.
const (
	wordBegin = "freeze"
	wordDone  = "thawed"
	wordArmed = "armed"
	wordFired = "fired"
	wordQuiet = "quiet"
)

func startWatchdog(ctx context.Context, argv, mountpoints []string, deadline time.Duration) (*Watchdog, error) {
	args := append(append([]string{}, argv[1:]...), deadline.String(), "--")
	// No CommandContext on purpose: the end of ctx must not kill the watchdog.
	cmd := &exec.Cmd{Path: argv[0], Args: append([]string{argv[0]}, append(args, mountpoints...)...), Dir: "/", Stderr: os.Stderr,
		Env: os.Environ(), SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	w := &Watchdog{cmd: cmd, pipe: in, says: make(chan string, 4)}
	go func() {
		defer close(w.says)
		for s := bufio.NewScanner(out); s.Scan(); {
			w.says <- s.Text()
		}
	}()
	select {
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), w.stop())
	case word := <-w.says:
		armed, note, _ := strings.Cut(word, " ")
		w.note = note
		if armed != wordArmed {
			return nil, errors.Join(fmt.Errorf("the watchdog said %q instead of %q (its error is above)", word, wordArmed), w.stop())
		}
	}
	return w, nil
}

func (w *Watchdog) begin() error {
	if _, err := fmt.Fprintln(w.pipe, wordBegin); err != nil {
		return fmt.Errorf("the watchdog is gone: %w", err)
	}
	return nil
}

// done tells the watchdog that all is thawed and asks whether it had to act.
func (w *Watchdog) done() error {
	_, err := fmt.Fprintln(w.pipe, wordDone)
	for word := range w.says {
		switch word {
		case wordFired:
			w.fired = true
		case wordQuiet:
			if !w.fired {
				return nil
			}
		}
	}
	if w.fired {
		return fmt.Errorf("the watchdog thawed production at its deadline: %w", backup.ErrVoid)
	}
	return fmt.Errorf("the watchdog died inside the window (%w): %w", errors.Join(err, errors.New("no answer")), backup.ErrVoid)
}

// stop closes the pipe, which sets a watchdog free that was never needed, and
// waits for its end.
func (w *Watchdog) stop() error {
	_ = w.pipe.Close()
	for range w.says { // until its end
	}
	if err := w.cmd.Wait(); err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	return nil
}

// Watch is the body of the watchdog process: arguments are the deadline and
// the mount points, standard input is the freezer's pipe, standard output its
// answers. It returns when all is certainly thawed.
//
// It locks its memory, exempts itself from the OOM killer and leaves the
// cgroup it was started in before it says "armed"; if any of these cannot be
// done it returns an error instead. From "freeze" on, when the deadline passes
// or the pipe ends without "thawed", it repeats FITHAW on every filesystem
// until the pipe is at its end and a full later pass found none frozen: a
// single EINVAL proves nothing while a FIFREEZE is still flushing.
func Watch(in io.Reader, out io.Writer, deadline time.Duration, mountpoints []string) error {
	thawers, err := openThawers(mountpoints)
	if err != nil {
		return err
	}
	leave, err := leaveCgroup()
	if err != nil {
		return fmt.Errorf("leave the cgroup: %w", err)
	}
	defer leave()
	note, err := harden()
	if err != nil {
		return err
	}
	words := make(chan string)
	go func() {
		defer close(words)
		for s := bufio.NewScanner(in); s.Scan(); {
			words <- s.Text()
		}
	}()
	fmt.Fprintln(out, strings.TrimSpace(wordArmed+" "+note))
	if word, ok := <-words; !ok || word != wordBegin {
		return nil // nothing was ever frozen
	}
	clock := time.NewTimer(deadline)
	defer clock.Stop()
	select {
	case word, ok := <-words:
		if ok && word == wordDone {
			fmt.Fprintln(out, wordQuiet)
			return nil
		}
		tellKernelLog("cleancut watchdog: the backup died while it froze " + strings.Join(mountpoints, " ") + ": thawing")
	case <-clock.C:
		tellKernelLog("cleancut watchdog: deadline of " + deadline.String() + " passed: thawing " + strings.Join(mountpoints, " "))
	}
	fmt.Fprintln(out, wordFired) // SIGPIPE is ignored: the reader may be dead
	thawUntil(thawers, func() {
		for range words { // until the freezer's pipe is at its end
		}
	})
	tellKernelLog("cleancut watchdog: thawed " + strings.Join(mountpoints, " "))
	return nil
}
