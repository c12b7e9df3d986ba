package dump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// pipeSize is how much PostgreSQL's program may be ahead of the compressor. With
// the default of 64 KiB the two wait for each other all the time.
const pipeSize = 1 << 20

const (
	pipeBatch = pipeSize / 4          // a read waits for so much
	pipePause = time.Millisecond      // between two looks at how much there is
	pipeLooks = 20                    // then it takes what there is
	pipeIdle  = 50 * time.Millisecond // between two looks at ctx while nothing comes
)

// pipe is the reading end of a pipe that is filled 4 KiB at a time: so large is
// the buffer of stdio for one. It reads in batches. Left to Go's poller every
// one of those writes would wake a thread, which costs more than to compress
// what was written.
type pipe struct {
	ended func() error // why no more is wanted, of a context
	fd    int
}

// newPipe returns both ends. The writing one is for a child; the reading one
// ends with ctx and must be closed.
func newPipe(ctx context.Context) (*pipe, *os.File, error) {
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(fd[0]), unix.F_SETPIPE_SZ, pipeSize) // only speed is lost without
	return &pipe{ended: ctx.Err, fd: fd[0]}, os.NewFile(uintptr(fd[1]), "pipe"), nil
}

// Close closes the reading end. It must not be called during a Read.
func (p *pipe) Close() error { return unix.Close(p.fd) }

// Read implements io.Reader. It returns ctx's error once that has ended.
func (p *pipe) Read(b []byte) (int, error) {
	for looks := 0; ; looks++ {
		if err := p.ended(); err != nil {
			return 0, err
		}
		ready := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, int(pipeIdle.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("pipe: %w", err)
		}
		if ready[0].Revents == 0 {
			continue
		}
		there, err := unix.IoctlGetInt(p.fd, unix.TIOCINQ) // FIONREAD, by its other name
		if err != nil {
			return 0, fmt.Errorf("pipe: %w", err)
		}
		if there < min(pipeBatch, len(b)) && looks < pipeLooks && ready[0].Revents&unix.POLLHUP == 0 {
			time.Sleep(pipePause)
			continue
		}
		n, err := unix.Read(p.fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, fmt.Errorf("pipe: %w", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}
