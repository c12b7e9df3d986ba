package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/catalog/s3test"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

// network leads to a server's socket from a folder of its own, until it is cut
// or stops to carry.
type network struct {
	t    *testing.T
	to   string
	from string

	mu     sync.Mutex
	listen net.Listener
	conns  []net.Conn
	stop   chan struct{} // closed: bytes flow
	tries  int           // connections that were asked for
}

func newNetwork(t *testing.T, s *pgtest.Server) (n *network, dsn string) {
	t.Helper()
	name := fmt.Sprintf(".s.PGSQL.%d", s.Port)
	dir := pgtest.Mkdir(t, filepath.Join(pgtest.Folder(t), "n"))
	n = &network{t: t, to: filepath.Join(s.SocketDir, name), from: filepath.Join(dir, name), stop: make(chan struct{})}
	close(n.stop)
	n.mend()
	t.Cleanup(n.cut)
	return n, strings.Replace(s.DSN("postgres"), s.SocketDir, dir, 1)
}

// mend lets connections through again.
func (n *network) mend() {
	n.mu.Lock()
	defer n.mu.Unlock()
	var err error
	if n.listen, err = net.Listen("unix", n.from); err != nil {
		n.t.Fatal(err)
	}
	go n.accept(n.listen)
}

// cut ends all connections and refuses new ones.
func (n *network) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listen == nil {
		return
	}
	_ = n.listen.Close()
	n.listen = nil
	for _, c := range n.conns {
		_ = c.Close()
	}
	n.conns = nil
}

// hold lets no byte through, and says nothing; flow lets all go on.
func (n *network) hold() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stop = make(chan struct{})
}

func (n *network) flow() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.stop)
}

func (n *network) accept(l net.Listener) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		n.mu.Lock()
		if n.listen != l { // cut, just after it was accepted
			_ = in.Close()
			n.mu.Unlock()
			return
		}
		n.tries++
		out, err := net.Dial("unix", n.to)
		if err != nil {
			_ = in.Close()
		} else {
			n.conns = append(n.conns, in, out)
			go n.carry(in, out)
			go n.carry(out, in)
		}
		n.mu.Unlock()
	}
}

func (n *network) carry(to, from net.Conn) {
	b := make([]byte, 1<<16)
	for {
		k, err := from.Read(b)
		n.mu.Lock()
		gate := n.stop
		n.mu.Unlock()
		<-gate
		if k > 0 {
			_, _ = to.Write(b[:k]) // whose end the other direction sees
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}

// long is eventually for what the program itself waits a minute for.
func long(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !is() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s", what)
		}
	}
}

func TestWALStreamOutlivesAServerThatIsOutOfReach(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, map[string]string{"wal_sender_timeout": "2s"})
	n, dsn := newNetwork(t, w.server)
	w.dsn = dsn
	running := w.stream(t, nil)
	eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
	begin := w.lsn(t, w.server, "SELECT restart_lsn FROM pg_replication_slots")
	waits := func() bool {
		st := w.status(t)
		return st.State == "waiting" && st.Failing != nil && st.Error != ""
	}
	t.Run("connections are refused, until it has tried often", func(t *testing.T) {
		w.write(t, 2)
		n.cut()
		eventually(t, "it waits", waits)
		w.write(t, 3)
		since := w.status(t).Failing
		before := w.status(t).Updated
		long(t, "it goes on trying, and still tells since when", func() bool {
			st := w.status(t)
			return st.Updated.Sub(before) > 10*time.Second && st.Failing != nil && st.Failing.Equal(*since)
		})
		n.mend()
		w.contiguous(t, w.server, 1, begin, w.stored(t, w.server, 1))
		eventually(t, "it is content", func() bool { return w.status(t).Error == "" && w.status(t).State == "receiving" })
	})
	t.Run("nothing comes, and nobody says why", func(t *testing.T) {
		n.hold()
		w.write(t, 3)
		long(t, "it gives the connection up", waits)
		w.until(t, w.server, "SELECT count(*)::text FROM pg_stat_replication", "0")
		w.write(t, 1)
		n.flow()
		w.contiguous(t, w.server, 1, begin, w.stored(t, w.server, 1))
	})
	if o := running.stop(t, syscall.SIGTERM); o.code != 0 {
		t.Errorf("exit %d\n%s", o.code, o.err)
	}
}

// TestTwoHostsMayReceiveIntoOneCatalog: each with a slot of its own.
func TestTwoHostsMayReceiveIntoOneCatalog(t *testing.T) {
	t.Parallel()
	w := newWALLab(t, nil)
	far := *w
	far.host, far.state = "far", filepath.Join(t.TempDir(), "state")
	here, there := w.stream(t, nil), far.stream(t, nil, "--slot", "far")
	for _, h := range []*walLab{w, &far} {
		eventually(t, h.host+" receives", func() bool { return h.status(t).State == "receiving" })
	}
	begin := w.lsn(t, w.server, "SELECT max(restart_lsn) FROM pg_replication_slots")
	w.write(t, 4)
	end := w.stored(t, w.server, 1)
	w.contiguous(t, w.server, 1, begin, end)
	for _, h := range []*walLab{w, &far} {
		eventually(t, h.host+" has stored all and met no error", func() bool {
			st := h.status(t)
			return st.Pending == 0 && st.Error == "" && st.Stored >= end
		})
	}
	here.stop(t, syscall.SIGKILL)
	w.write(t, 3)
	end = w.stored(t, w.server, 1)
	w.contiguous(t, w.server, 1, begin, end)
	here = w.stream(t, nil)
	eventually(t, "the one that was killed has come up", func() bool {
		st := w.status(t)
		return st.State == "receiving" && st.Pending == 0 && st.Error == "" && st.Stored >= end
	})
	for _, s := range []*streaming{here, there} {
		if o := s.stop(t, syscall.SIGTERM); o.code != 0 {
			t.Errorf("exit %d\n%s", o.code, o.err)
		}
	}
	var l listedWAL
	o := w.must(t, "wal", "list", "--json")
	if err := json.Unmarshal([]byte(o.out), &l); err != nil || len(l.Timelines) != 1 || len(l.Timelines[0].Ranges) != 1 {
		t.Errorf("%v\n%s", err, o.out)
	}
}

func TestWALOfAReadOnlyCatalogIsReadAndNothingIsLost(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	for _, way := range []string{"wal stream", "archive_command"} {
		t.Run(way, func(t *testing.T) { readOnly(t, way == "wal stream") })
	}
}

func readOnly(t *testing.T, streamed bool) {
	settings := map[string]string{}
	if !streamed {
		settings = map[string]string{"archive_mode": "on", "archive_command": "CLEANCUT wal push %p"}
	}
	w := newWALLab(t, settings)
	tmpfs(t, w.catalog, "200M")
	mount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("cleancut-test", w.catalog, "tmpfs", unix.MS_REMOUNT|flags, "size=200M"); err != nil {
			t.Fatal(err)
		}
	}
	begin := w.lsn(t, w.server, "SELECT pg_current_wal_flush_lsn()")
	if streamed {
		running := w.stream(t, nil)
		defer running.stop(t, syscall.SIGTERM)
		eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
		begin = w.lsn(t, w.server, "SELECT restart_lsn FROM pg_replication_slots")
	}
	w.write(t, 2)
	end := w.stored(t, w.server, 1)
	mount(unix.MS_RDONLY)
	w.write(t, 3)
	if streamed {
		eventually(t, "the stream says so", func() bool { return strings.Contains(w.status(t).Error, "read-only file system") })
	} else {
		w.until(t, w.server, "SELECT (failed_count > 0)::text FROM pg_stat_archiver", "true")
		if log, err := os.ReadFile(w.server.Log()); err != nil || !bytes.Contains(log, []byte("read-only file system")) {
			t.Errorf("the server's log does not tell why: %v\n%s", err, log)
		}
	}
	own := func(lsn backup.LSN) string {
		return filepath.Join(w.server.DataDirectory, "pg_wal", wal.At(1, lsn, mega).File(mega).String())
	}
	w.must(t, "wal", "fetch", "--prefetch=false", filepath.Base(own(begin)), filepath.Join(t.TempDir(), "x"))
	w.must(t, "wal", "list")
	w.run(t, "wal", "push", own(end)).refused(t, 1, "read-only file system")
	w.must(t, "wal", "push", own(begin)) // it is there already
	mount(0)
	w.contiguous(t, w.server, 1, begin, w.stored(t, w.server, 1))
}

// TestWALGoesThroughS3: received, pushed, listed, fetched, recovered by, and a
// gap noticed.
func TestWALGoesThroughS3(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a real server: run `make test`")
	}
	h, err := s3test.Fake()
	if err != nil {
		t.Fatal(err)
	}
	endpoint, stop, err := s3test.Serve(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	location := s3test.Location(endpoint, "of/production")
	env := []string{"CLEANCUT_CATALOG=" + location}
	shell := `CLEANCUT_CONFIG= CLEANCUT_CATALOG="` + location + `"`
	for k, v := range s3test.Environment() {
		t.Setenv(k, v)
		env = append(env, k+"="+v)
		shell += " " + k + "=" + v
	}
	store, err := catalog.Open(location)
	if err != nil {
		t.Fatal(err)
	}
	kept := catalog.New(store, "main").WAL()
	w := newWALLab(t, nil)
	w.extra = env
	call := func(args string) string { return shell + " " + w.program + " " + args }
	running := w.stream(t, nil)
	eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
	base := w.base(t)
	w.write(t, 4)
	w.server.Exec(t, "SELECT pg_switch_wal()")
	end := w.lsn(t, w.server, "SELECT pg_current_wal_insert_lsn()") / mega * mega
	eventually(t, "all is stored", func() bool { st := w.status(t); return st.Stored >= end && st.Error == "" })
	rows := w.one(t, w.server, "SELECT count(*)::text FROM public.t")
	files, err := kept.List(t.Context())
	if err != nil || len(files) < 4 {
		t.Fatalf("got %v, %v", files, err)
	}
	for _, f := range files {
		own := filepath.Join(w.server.DataDirectory, "pg_wal", f.File.String())
		w.must(t, "wal", "push", own) // the same
		want, err := os.ReadFile(own)
		var got bytes.Buffer
		if err := errors.Join(err, kept.Get(t.Context(), f.File, wal.System{}, &got)); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s: %d bytes, %v", f.File, got.Len(), err)
		}
	}
	var l listedWAL
	o := w.must(t, "wal", "list", "--json")
	if err := json.Unmarshal([]byte(o.out), &l); err != nil || len(l.Timelines) != 1 || len(l.Timelines[0].Ranges) != 1 {
		t.Errorf("%v\n%s", err, o.out)
	}
	good := w.recovering(t, base, "good", call("wal fetch %f %p"))
	good.Start(t)
	w.until(t, good, "SELECT pg_is_in_recovery()::text", "false")
	if got := w.one(t, good, "SELECT count(*)::text FROM public.t"); got != rows {
		t.Errorf("got %s rows, want %s", got, rows)
	}
	good.Stop(t)
	gap := files[len(files)-2].File
	if err := kept.Delete(t.Context(), gap); err != nil {
		t.Fatal(err)
	}
	if log := refusesToStart(t, w.recovering(t, base, "gap", call("wal fetch %f %p"))); !strings.Contains(log, "this is a gap") || !strings.Contains(log, "exit code 200") {
		t.Errorf("over a gap:\n%s", log)
	}
	if err := kept.Get(t.Context(), gap, wal.System{}, io.Discard); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	w.must(t, "wal", "push", filepath.Join(w.server.DataDirectory, "pg_wal", gap.String()))
	if err := kept.Get(t.Context(), gap, wal.System{}, io.Discard); err != nil {
		t.Errorf("pushed again: %v", err)
	}
	running.stop(t, syscall.SIGTERM)
}
