// Package dump writes the portable SQL of a recovered copy.
//
//	pg_dumpall → zstd → writer
//
// What always holds: the dump is read from the copy, never from production;
// an archive is only ever complete: if pg_dumpall fails or stops short, Run
// returns an error and the stream ends without its last frame.
package dump

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
)

// Options is what to dump and how.
type Options struct {
	Instance *postgres.Instance
	// Original gives the path that a tablespace of the copy has on production.
	Original func(inCopy string) string
	Level    int                                // zstd level 1 to 22
	Progress func(sql, compressed backup.Bytes) // called as bytes pass; may be nil
}

// Result is what was written.
type Result struct {
	SQL        backup.Bytes `json:"sql_bytes"`
	Compressed backup.Bytes `json:"compressed_bytes"`
	Seconds    float64      `json:"seconds"`
}

// The last line that pg_dumpall writes (pg_dumpall.c, main), so that a dump
// cut short is not taken for a whole one.
const lastLine = "-- PostgreSQL database cluster dump complete"

// Run streams the dump to w.
func Run(ctx context.Context, w io.Writer, o Options) (Result, error) {
	start := time.Now()
	out := &meter{w: w}
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(o.Level)), zstd.WithEncoderConcurrency(2), zstd.WithWindowSize(4<<20))
	if err != nil {
		return Result{}, fmt.Errorf("zstd level %d: %w", o.Level, err)
	}
	if _, err := o.Instance.Installation.Tool(ctx, "pg_dumpall"); err != nil {
		return Result{}, err
	}
	in := &meter{w: z}
	in.progress = func() {
		if o.Progress != nil {
			o.Progress(in.n, out.n)
		}
	}
	if err := stream(ctx, o.Instance.Command(ctx, "pg_dumpall"), &relocate{w: in, original: o.Original}); err != nil {
		return Result{}, err
	}
	if !bytes.Contains(in.end, []byte(lastLine)) {
		return Result{}, errors.New("pg_dumpall ended without its last line: the dump is not whole")
	}
	if err := z.Close(); err != nil {
		return Result{}, fmt.Errorf("write the dump: %w", err)
	}
	return Result{SQL: in.n, Compressed: out.n, Seconds: time.Since(start).Seconds()}, nil
}

// pipeSize is how much pg_dumpall may be ahead of the compressor. With the
// default of 64 KiB the two wait for each other all the time.
const pipeSize = 1 << 20

// stream runs the command and copies what it prints to w. It returns when both
// have ended: the first error of the two, with what the command said.
func stream(ctx context.Context, cmd *exec.Cmd, w io.Writer) error {
	pr, pw, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pg_dumpall: %w", err)
	}
	defer pr.Close()
	if conn, err := pr.SyscallConn(); err == nil { // Fd() would make reads uninterruptible
		_ = conn.Control(func(fd uintptr) {
			_, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) // only speed is lost without
		})
	}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = pw, &said
	err = cmd.Start()
	_ = pw.Close() // the child has its own
	if err != nil {
		return fmt.Errorf("pg_dumpall: %w", err)
	}
	// pg_dumpall's own children outlive its end: without a reader they end too.
	stop := context.AfterFunc(ctx, func() { _ = pr.Close() })
	defer stop()
	_, copied := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{pr}, make([]byte, pipeSize))
	_ = pr.Close()
	ran := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("pg_dumpall: %w", ctx.Err())
	case copied != nil:
		return fmt.Errorf("write the dump: %w", copied)
	case ran != nil:
		return fmt.Errorf("pg_dumpall: %w: %s", ran, strings.TrimSpace(said.String()))
	}
	return nil
}

// meter counts bytes and remembers the last few.
type meter struct {
	w        io.Writer
	n        backup.Bytes
	end      []byte
	progress func()
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.n += backup.Bytes(n)
	keep := append(m.end, p[max(0, len(p)-128):]...)
	m.end = append(m.end[:0], keep[max(0, len(keep)-128):]...)
	if m.progress != nil {
		m.progress()
	}
	return n, err
}
