package archive

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/fault"
	"cleancut/internal/wal"
)

// A copy's server may not reach the catalog: it has none of the credentials,
// and all outside its folder is closed to it. So whoever restores serves WAL
// on a socket in the copy's folder, and the copy's restore_command asks there.
// One connection is one question: a line with the name, and the answer, a line
// of JSON and after it, where there is one, the file.

// answer is the first line that Serve sends.
type answer struct {
	Size    int64  `json:"size"`
	Missing bool   `json:"missing,omitempty"` // the catalog does not have it
	Error   string `json:"error,omitempty"`
}

// ServeOptions says whose WAL to serve and where.
type ServeOptions struct {
	WAL    catalog.WAL
	System wal.System
	Socket string // where to listen
	Spool  string // folder for files on their way, made and removed by the Server; nobody but root may write there
	UID    uint32 // who may connect, besides root
	GID    uint32
	// Planned reports whether recovery was planned by that file; then it is an
	// error that it is not there any more, and not the end. nil: none was.
	Planned func(wal.File) bool
}

// Server serves WAL to one copy until Stop.
type Server struct {
	options ServeOptions
	listen  net.Listener
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu  sync.Mutex
	err error
}

// Serve begins to serve; the end of ctx ends it, too. The caller calls Stop.
func Serve(ctx context.Context, o ServeOptions) (*Server, error) {
	s := &Server{options: o}
	if err := fault.Point(ctx, "archive.serve"); err != nil {
		return nil, fmt.Errorf("serve WAL: %w", err)
	}
	if err := os.RemoveAll(o.Spool); err != nil {
		return nil, fmt.Errorf("serve WAL: %w", err)
	}
	if err := os.Mkdir(o.Spool, 0o700); err != nil {
		return nil, fmt.Errorf("serve WAL: %w", err)
	}
	if err := os.Remove(o.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("serve WAL: %w", err)
	}
	var err error
	if s.listen, err = new(net.ListenConfig).Listen(ctx, "unix", o.Socket); err != nil {
		return nil, fmt.Errorf("serve WAL: %w", err)
	}
	if err := errors.Join(os.Chmod(o.Socket, 0o600), os.Lchown(o.Socket, int(o.UID), int(o.GID))); err != nil {
		return nil, errors.Join(fmt.Errorf("serve WAL: %w", err), s.listen.Close())
	}
	ctx, s.cancel = context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { _ = s.listen.Close() })
	s.running.Go(func() { s.accept(ctx) })
	if err := fault.Point(ctx, "archive.serve done"); err != nil {
		return nil, errors.Join(fmt.Errorf("serve WAL: %w", err), s.Stop())
	}
	return s, nil
}

// Stop ends the serving, removes what it made and returns the first error, but
// "not there", that a question met: the reason why recovery stopped. Called
// again it returns the same.
func (s *Server) Stop() error {
	s.cancel()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.RemoveAll(s.options.Spool); err != nil && s.err == nil {
		s.err = fmt.Errorf("serve WAL: %w", err)
	}
	return s.err
}

func (s *Server) accept(ctx context.Context) {
	for {
		conn, err := s.listen.Accept()
		if err != nil {
			return // closed
		}
		s.running.Go(func() {
			done := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer done()
			s.reply(ctx, conn)
			_ = conn.Close() // the other side has all it will get
		})
	}
}

// reply answers the one question of a connection. What the other side loses of
// the answer it notices by the size.
func (s *Server) reply(ctx context.Context, conn net.Conn) {
	line, err := bufio.NewReader(io.LimitReader(conn, 128)).ReadString('\n')
	if err != nil {
		return
	}
	file, err := wal.ParseFile(line[:len(line)-1])
	if err != nil {
		s.say(conn, answer{Error: err.Error()})
		return
	}
	to := filepath.Join(s.options.Spool, "serving."+file.String())
	defer func() { _ = os.Remove(to) }()
	o := FetchOptions{WAL: s.options.WAL, System: s.options.System, File: file, To: to}
	o.Ahead = func(context.Context) error {
		s.running.Go(func() { _ = Prefetch(ctx, o) })
		return nil
	}
	err = Fetch(ctx, o)
	if errors.Is(err, backup.ErrNotFound) && s.options.Planned != nil && s.options.Planned(file) {
		err = backup.Hint(fmt.Errorf("%s is gone: it was there when the recovery was planned", file), "see `cleancut wal list` for what can be reached now") // not the end
	}
	switch {
	case errors.Is(err, backup.ErrNotFound):
		s.say(conn, answer{Missing: true})
		return
	case err != nil:
		s.remember(ctx, err)
		s.say(conn, answer{Error: err.Error()})
		return
	}
	f, err := os.Open(to)
	if err != nil {
		s.remember(ctx, err)
		s.say(conn, answer{Error: err.Error()})
		return
	}
	defer func() { _ = f.Close() }() // it is only read
	info, err := f.Stat()
	if err != nil {
		s.say(conn, answer{Error: err.Error()})
		return
	}
	if s.say(conn, answer{Size: info.Size()}) {
		_, _ = io.Copy(conn, f)
	}
}

func (s *Server) say(conn net.Conn, a answer) bool {
	b, err := json.Marshal(a)
	if err == nil {
		_, err = conn.Write(append(b, '\n'))
	}
	return err == nil
}

// remember keeps the first error that is not of the end itself.
func (s *Server) remember(ctx context.Context, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && ctx.Err() == nil {
		s.err = err
	}
}

// Ask is Fetch from the socket of a Server: the file is put at to, whole and
// durable or not at all. backup.ErrNotFound: the catalog does not have it.
// Every other error says nothing about that.
func Ask(ctx context.Context, socket string, file wal.File, to string) (err error) {
	fail := func(err error) error { return fmt.Errorf("fetch %s from %s: %w", file, socket, err) }
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return backup.Hint(fail(err), "whoever restores this copy serves its WAL, and is not running any more: make the copy anew")
	}
	defer func() { _ = conn.Close() }() // it is only read
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if _, err := fmt.Fprintf(conn, "%s\n", file); err != nil {
		return fail(err)
	}
	r := bufio.NewReaderSize(conn, 1<<16)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fail(err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return fail(err)
	}
	switch {
	case a.Missing:
		return fail(backup.ErrNotFound)
	case a.Error != "":
		return fail(errors.New(a.Error))
	}
	f, err := os.OpenFile(to+".cleancut", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fail(err)
	}
	n, err := io.Copy(f, io.LimitReader(r, a.Size))
	if err == nil && n != a.Size {
		err = io.ErrUnexpectedEOF
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), to)
	}
	if err != nil {
		return fail(errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}
