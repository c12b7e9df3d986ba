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
)

// Watchdog is this process's end of the pipe to the process that thaws when we
// do not.
type Watchdog struct {
	cmd   *exec.Cmd
	pipe  io.WriteCloser
	says  chan string // lines from the watchdog; closed at its end
	begun bool        // "freeze" was sent
	note  string      // what the watchdog could not do to protect itself
}

// patience is how long a watchdog may take for an answer or for its end. A
// healthy one needs milliseconds; one that is stopped or starved must not hang
// the freezer for ever.
const patience = 30 * time.Second

// What goes over the pipes. The freezer's end of the first pipe is in nobody
// else's hands: when it is at its end, no FIFREEZE of the freezer is running
// any more, because the kernel closes a process's files only after its last
// system call has returned.
const (
	wordBegin = "freeze" // to the watchdog: start the clock
	wordDone  = "thawed" // to the watchdog: all is thawed
	wordArmed = "armed"  // from the watchdog: ready, with a note perhaps
	wordRuns  = "runs"   // from the watchdog: the clock runs
	wordFired = "fired"  // from the watchdog: it begins to thaw
	wordQuiet = "quiet"  // from the watchdog: it never had to
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
	word, err := w.hear(ctx)
	if err != nil {
		return nil, errors.Join(err, w.stop())
	}
	armed, note, _ := strings.Cut(word, " ")
	if w.note = note; armed != wordArmed {
		return nil, errors.Join(fmt.Errorf("the watchdog said %q instead of %q (its error is above)", word, wordArmed), w.stop())
	}
	return w, nil
}

// hear returns the next line of the watchdog, "" at its end.
func (w *Watchdog) hear(ctx context.Context) (string, error) {
	limit := time.NewTimer(patience)
	defer limit.Stop()
	select {
	case word := <-w.says:
		return word, nil
	case <-ctx.Done():
		return "", ctx.Err()
	case <-limit.C:
		return "", fmt.Errorf("no answer from the watchdog within %s", patience)
	}
}

// begin starts the watchdog's clock. It returns when the watchdog has said
// that it runs: a word written into a pipe alone says nothing of the reader,
// which may be stopped or on its way out.
func (w *Watchdog) begin(ctx context.Context) error {
	if _, err := fmt.Fprintln(w.pipe, wordBegin); err != nil {
		return fmt.Errorf("the watchdog is gone: %w", err)
	}
	w.begun = true
	word, err := w.hear(ctx)
	if err == nil && word != wordRuns {
		err = fmt.Errorf("the watchdog said %q instead of %q: it is gone", word, wordRuns)
	}
	return err
}

// done tells the watchdog that all is thawed and asks whether it had to act.
// The pipe is closed with it: a watchdog that fired waits for its end. Any
// error means that the window was not guarded to its end.
func (w *Watchdog) done() error {
	_, err := fmt.Fprintln(w.pipe, wordDone)
	_ = w.pipe.Close()
	word, err2 := w.hear(context.Background())
	if word == wordRuns { // begin did not wait for it
		word, err2 = w.hear(context.Background())
	}
	switch word {
	case wordQuiet:
		return nil
	case wordFired:
		return errors.New("the watchdog thawed production at its deadline")
	}
	return errors.Join(errors.New("the watchdog died inside the window"), err, err2)
}

// stop closes the pipe, which sets a watchdog free that was never needed, and
// waits for its end. One that does not end is killed if nothing was ever
// frozen under its eyes, and else left to its work.
func (w *Watchdog) stop() error {
	_ = w.pipe.Close()
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for open := true; open; {
		select {
		case _, open = <-w.says:
		case <-limit.C:
			if w.begun {
				return fmt.Errorf("the watchdog (process %d) does not end: it still thaws, or hangs", w.cmd.Process.Pid)
			}
			_ = w.cmd.Process.Kill() // Wait tells
			open = false
		}
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
	defer leave()
	if err != nil {
		return fmt.Errorf("leave the cgroup: %w", err)
	}
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
	fmt.Fprintln(out, wordRuns)
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
