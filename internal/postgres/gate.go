package postgres

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

const (
	gateLimit    = 256 // connections at once; further ones wait to be accepted
	gateWord     = "gate"
	gateReady    = "ready\n"
	gatePatience = 30 * time.Second // for the gate's first word, and for its end
	gateRest     = time.Second      // for the server's last words to clients once it has ended
)

// CheckListen refuses an address that a copy cannot be listened for on. It
// wants ADDRESS:PORT, the address in numbers (in brackets if it is IPv6) or
// localhost: a name could come to mean another host's. 0.0.0.0 and [::] are
// every address of this host. The error wraps backup.ErrUsage.
func CheckListen(listen string) error {
	host, port, err := Standby{Listen: listen}.address()
	if err != nil {
		return err
	}
	ip, err := netip.ParseAddr(host)
	if err != nil && host != "localhost" || net.JoinHostPort(host, strconv.Itoa(port)) != listen {
		return backup.Hint(fmt.Errorf("%w: %q is no ADDRESS:PORT with an address in numbers", backup.ErrUsage, listen), "for example 127.0.0.1:5433; 0.0.0.0:5433 for every address of this host")
	}
	if ip.IsMulticast() {
		return fmt.Errorf("%w: %q is a multicast address", backup.ErrUsage, listen)
	}
	return nil
}

// OpenGate lets clients reach the copy over TCP, at that ADDRESS:PORT of this
// host and with a password only. The server must have been started with
// Copy.Listen.
//
// Until then nobody is let in over TCP: the server listens within its own
// network namespace, and its pg_hba.conf has no line for it. OpenGate adds the
// line, for every role but without replication, and starts a process that
// takes connections of the host and hands them to the server. That gate
// survives this process and ends with the server. A server that shares the
// host's network listens on the address itself; there the line is all.
//
// The method is scram-sha-256, which refuses a role whose password is stored as
// an MD5 hash; where the copy has such a role, or makes such hashes, it is md5,
// which asks all others for SCRAM all the same (documentation, "Password
// Authentication"). There is no TLS.
//
// An address that is taken is an error before anything is changed. On a later
// error or when ctx ends there is no gate; the line may be there. Calling it
// again ends the gate that is there and opens one at the new address.
func (i *Instance) OpenGate(ctx context.Context, listen string) error {
	if err := CheckListen(listen); err != nil {
		return err
	}
	if err := i.openGate(ctx, listen); err != nil {
		return fmt.Errorf("let clients reach the copy in %s at %s: %w", i.Root, listen, err)
	}
	return nil
}

func (i *Instance) openGate(ctx context.Context, listen string) error {
	server, err := hold(i.PID)
	if err != nil {
		return err
	}
	defer server.close()
	lock, err := readLock(i.DataDirectory)
	if err != nil || !worksIn(i.PID, i.DataDirectory) {
		return errors.Join(fmt.Errorf("its server is not there: %w", backup.ErrNotFound), err)
	}
	host, port, err := Standby{Listen: listen}.address()
	if err != nil {
		return err
	}
	if lock.Listen == "" || !i.NetworkIsolated && (lock.Listen != host || lock.Port != port) {
		return backup.Hint(fmt.Errorf("%w: its server does not listen for it", backup.ErrUsage), "an address is given when the copy is made")
	}
	if err := endGates(ctx, i.Root); err != nil {
		return err
	}
	if !i.NetworkIsolated {
		return effect(ctx, "gate.admit", func() error { return i.admit(ctx, "all") })
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if errors.Is(err, unix.EADDRINUSE) {
		err = backup.Hint(fmt.Errorf("%w: %w", backup.ErrInUse, err), "choose another port")
	}
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if err := effect(ctx, "gate.admit", func() error { return i.admit(ctx, "127.0.0.1/32") }); err != nil {
		return err
	}
	return effect(ctx, "gate.start", func() error { return i.startGate(ctx, server, l.(*net.TCPListener)) })
}

// admit lets in who comes over TCP from there and knows a password, and returns
// when the postmaster has read that.
func (i *Instance) admit(ctx context.Context, from string) error {
	loaded := func(query string) (at, method string, err error) {
		conn, err := i.connectAnywhere(ctx) // a new session: it has what the postmaster has
		if err != nil {
			return "", "", err
		}
		defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
		err = conn.QueryRow(ctx, query).Scan(&at, &method)
		return at, method, err
	}
	const query = `SELECT pg_conf_load_time()::text, CASE WHEN current_setting('password_encryption') = 'md5'
		OR EXISTS (SELECT FROM pg_authid WHERE rolpassword LIKE 'md5%') THEN 'md5' ELSE 'scram-sha-256' END`
	before, method, err := loaded(query)
	if err != nil {
		return err
	}
	private, err := os.OpenRoot(i.SocketDir)
	if err != nil {
		return err
	}
	err = writeOwned(private, "pg_hba.conf", hbaFile+"host all all "+from+" "+method+"\n", int(i.UID), int(i.GID))
	if err := errors.Join(err, private.Close()); err != nil {
		return err
	}
	if _, _, err := loaded(`SELECT '', pg_reload_conf()::text`); err != nil {
		return err
	}
	tick := time.NewTicker(startPause)
	defer tick.Stop()
	for {
		if now, _, err := loaded(query); err != nil || now != before {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// startGate starts the gate's process within the server's network namespace,
// with the listening socket of this one, and returns when it serves.
func (i *Instance) startGate(ctx context.Context, server *handle, l *net.TCPListener) (err error) {
	socket, err := l.File()
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	fd, err := unix.FcntlInt(uintptr(server.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	postmaster := os.NewFile(uintptr(fd), "pidfd")
	defer func() { _ = postmaster.Close() }()
	says, says2, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = says.Close() }()
	cmd := exec.CommandContext(context.WithoutCancel(ctx), cmp.Or(i.Program, "/proc/self/exe"),
		gateWord, i.Root, strconv.Itoa(int(i.UID)), strconv.Itoa(int(i.GID)), strconv.Itoa(i.Port))
	cmd.Args[0], cmd.Dir, cmd.Env = "cleancut", "/", []string{}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = says2, says2, []*os.File{socket, postmaster}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = onThread(func() error {
		if err := unix.Setns(server.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network of process %d: %w", server.pid, err)
		}
		return cmd.Start()
	})
	if err := errors.Join(err, says2.Close()); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // reaps it, also long after this returned
	stop := context.AfterFunc(ctx, func() { _ = says.SetReadDeadline(time.Now()) })
	defer stop()
	_ = says.SetReadDeadline(time.Now().Add(gatePatience))
	heard, err := io.ReadAll(io.LimitReader(says, 4<<10))
	if string(heard) == gateReady {
		return nil
	}
	_ = cmd.Process.Kill()
	return errors.Join(fmt.Errorf("the gate did not begin: %s", bytes.TrimSpace(heard)), err, context.Cause(ctx))
}

// Gate is the body of the gate's process. It was started by OpenGate in the
// server's network namespace; descriptor 3 is the listening socket of the
// host's, 4 a pidfd of the postmaster. args are the copy's root, by which the
// process is known (see endGates), uid and gid to run as, and the server's port.
// out, its standard output, gets one line when it serves.
//
// It gives up root first. At most 256 connections are open at once. It returns
// when the postmaster has ended, once its last words have reached the clients
// or a second has passed, and at once when ctx ends.
func Gate(ctx context.Context, out io.Writer, args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("%w: the gate is started by cleancut itself", backup.ErrUsage)
	}
	var n [3]int
	for k := range n {
		var err error
		if n[k], err = strconv.Atoi(args[k+1]); err != nil || n[k] < 0 {
			return fmt.Errorf("%w: %q", backup.ErrUsage, args[k+1])
		}
	}
	if os.Geteuid() == 0 { // of all threads; capabilities go with it
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(n[1], n[1], n[1]), syscall.Setresuid(n[0], n[0], n[0])); err != nil {
			return fmt.Errorf("give up root: %w", err)
		}
	}
	file := os.NewFile(3, "listener")
	l, err := net.FileListener(file)
	if err != nil {
		return fmt.Errorf("the listening socket: %w", err)
	}
	defer func() { _ = l.Close() }()
	_ = file.Close()
	ended := make(chan error, 1)
	go func() { ended <- waitFor(4) }()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(out, gateReady); err != nil {
		return err
	}
	for fd := range 3 { // nobody listens to what is said from here on
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	_ = null.Close()
	return serveGate(ctx, l, "127.0.0.1:"+args[3], ended)
}

// waitFor returns when the process of that pidfd has ended.
func waitFor(pidfd int32) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: pidfd, Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// serveGate hands connections of l to the server until that has ended or ctx has.
func serveGate(ctx context.Context, l net.Listener, server string, ended <-chan error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	room := make(chan struct{}, gateLimit)
	var open sync.WaitGroup
	go func() {
		defer cancel()
		for {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return
			}
			client, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // of that client, or descriptors have run out
				<-room
				select {
				case <-time.After(startPause):
				case <-ctx.Done():
				}
				continue
			}
			open.Go(func() {
				defer func() { <-room }()
				handOver(ctx, client.(*net.TCPConn), server)
			})
		}
	}()
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		_ = l.Close()
		rest := make(chan struct{})
		go func() { open.Wait(); close(rest) }()
		select {
		case <-rest:
		case <-time.After(gateRest):
		case <-ctx.Done():
		}
		return err
	}
}

// handOver carries bytes both ways until both sides have ended theirs. One
// that ends well is passed on as such (a client may still read); one that
// breaks ends both.
func handOver(ctx context.Context, client *net.TCPConn, address string) {
	defer func() { _ = client.Close() }()
	conn, err := (&net.Dialer{Timeout: gatePatience}).DialContext(ctx, "tcp", address)
	if err != nil {
		return
	}
	server := conn.(*net.TCPConn)
	defer func() { _ = server.Close() }()
	carry := func(to, from *net.TCPConn) {
		_, err := io.Copy(to, from)
		if err := errors.Join(err, to.CloseWrite()); err != nil {
			_ = to.Close()
			_ = from.Close()
		}
	}
	var both sync.WaitGroup
	both.Go(func() { carry(server, client) })
	both.Go(func() { carry(client, server) })
	both.Wait()
}

// gatesOf lists the gates of the copy in root, a real path: processes with the
// command line that startGate gives them, of root or of the owner of the data.
// It needs no record, which could be lost or name another process by now.
func gatesOf(root string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && isGate(pid, root) {
			out = append(out, pid)
		}
	}
	return out, nil
}

func isGate(pid int, root string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(b), "\x00")
	if err != nil || len(args) != 7 || args[0] != "cleancut" || args[1] != gateWord || args[2] != root {
		return false
	}
	uid, known := uidOf(pid)
	return known && (uid == 0 || strconv.Itoa(uid) == args[3])
}

// uidOf returns the real uid of a process.
func uidOf(pid int) (uid int, known bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Uid:" {
			uid, err := strconv.Atoi(f[1])
			return uid, err == nil
		}
	}
	return 0, false
}

// endGates ends the gates of the copy in root and returns when they are gone,
// also when ctx has ended: it takes 20 seconds at most.
func endGates(ctx context.Context, root string) error {
	pids, err := gatesOf(root)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := endGate(ctx, pid, root); err != nil {
			return fmt.Errorf("end the gate of the copy in %s: %w", root, err)
		}
	}
	return nil
}

func endGate(ctx context.Context, pid int, root string) error {
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		h, err := hold(pid)
		if errors.Is(err, backup.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		defer h.close()
		if !isGate(pid, root) {
			return nil
		}
		if err := h.signal(sig); err != nil {
			return err
		}
		if gone, err := h.wait(context.WithoutCancel(ctx), quitPatience); gone || err != nil {
			return err
		}
	}
	return fmt.Errorf("process %d does not end: %w", pid, backup.ErrLeft)
}
