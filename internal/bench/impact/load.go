package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/evidence"
)

// client is a running pgbench that writes down every transaction.
type client struct {
	cmd   *exec.Cmd
	said  *strings.Builder
	dir   string
	ended chan error
}

// startLoad starts pgbench. The context that it returns ends, with the cause,
// when pgbench does.
func (s *site) startLoad(ctx context.Context) (*client, context.Context, error) {
	c := &client{said: &strings.Builder{}, dir: filepath.Join(s.dir, "log"), ended: make(chan error, 1)}
	if err := errors.Join(os.RemoveAll(c.dir), s.server.Mkdir(c.dir)); err != nil {
		return nil, ctx, err
	}
	args := []string{"-n", "-c", strconv.Itoa(s.Clients), "-j", "2", "-T", "86400", "--log", "--log-prefix=" + filepath.Join(c.dir, "log"), "postgres"}
	if s.Rate > 0 {
		args = append([]string{"--rate=" + strconv.Itoa(s.Rate)}, args...)
	}
	c.cmd = s.server.Command(context.WithoutCancel(ctx), "pgbench", args...)
	c.cmd.Stdout, c.cmd.Stderr = c.said, c.said
	if err := begin(c.cmd); err != nil {
		return nil, ctx, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		err := c.cmd.Wait()
		cancel(fmt.Errorf("pgbench ended: %w", ended(c.cmd, c.said, err)))
		c.ended <- err
	}()
	return c, ctx, nil
}

// stop ends it and returns all transactions. pgbench ends by itself at the
// alarm that its -T sets, with everything written: this is that alarm.
func (c *client) stop() ([]evidence.Transaction, error) {
	_ = c.cmd.Process.Signal(syscall.SIGALRM) // it may have ended: then its error says so
	var err error
	select {
	case err = <-c.ended:
	case <-time.After(5 * time.Minute): // transactions under way end first
		err = errors.Join(errors.New("pgbench did not end"), c.cmd.Process.Kill(), <-c.ended)
	}
	if err != nil {
		return nil, ended(c.cmd, c.said, err)
	}
	files, err := filepath.Glob(filepath.Join(c.dir, "log.*"))
	if err != nil || len(files) == 0 {
		return nil, errors.Join(err, errors.New("pgbench wrote no log"))
	}
	var all []evidence.Transaction
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		some, err := evidence.Transactions(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, os.RemoveAll(c.dir)
}

// mark is a moment: the time and what the volume has read and written by then.
type mark struct {
	at            time.Time
	read, written backup.Bytes
	busy          int // requests that are under way
}

// mark reads the volume's counters (Documentation/block/stat.rst: sectors of
// 512 bytes).
func (s *site) mark() (mark, error) {
	m := mark{at: time.Now()}
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(s.device), "stat"))
	if err != nil {
		return m, err
	}
	f := strings.Fields(string(text))
	if len(f) < 9 {
		return m, fmt.Errorf("statistics of %s: %q", s.device, text)
	}
	read, err1 := strconv.ParseInt(f[2], 10, 64)
	written, err2 := strconv.ParseInt(f[6], 10, 64)
	busy, err3 := strconv.Atoi(f[8])
	m.read, m.written, m.busy = backup.Bytes(512*read), backup.Bytes(512*written), busy
	return m, errors.Join(err1, err2, err3)
}

// between is the window from one mark to the next.
func between(all []evidence.Transaction, from, to mark) evidence.Window {
	w := evidence.Look(all, from.at, to.at)
	w.Read, w.Written = to.read-from.read, to.written-from.written
	return w
}

const (
	quiet     = 3 * time.Second
	settleMax = 3 * time.Minute
)

// settle brings production, without a limit, to where each pair begins: a
// checkpoint was made, the page cache is full of the database whatever the
// last tool read or wrote, and the volume has had no request for a while.
func (s *site) settle(ctx context.Context, group memoryGroup) error {
	if err := errors.Join(s.exec(ctx, "CHECKPOINT"), s.sync()); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(s.server.Data, "base", "*", "[0-9]*"))
	if err != nil {
		return err
	}
	if err := group.run(func() error { return exec.CommandContext(ctx, "cat", files...).Run() }); err != nil {
		return fmt.Errorf("read the database: %w", err)
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	last, err := s.mark()
	for err == nil && time.Since(last.at) < quiet {
		if time.Since(began) > settleMax {
			return fmt.Errorf("the volume is still busy after %s without load", settleMax)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		var now mark
		if now, err = s.mark(); now.busy > 0 || now.read != last.read || now.written != last.written {
			last = now
		}
	}
	return err
}
