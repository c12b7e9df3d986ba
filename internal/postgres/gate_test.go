package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// TestMain makes the test binary play the gate.
func TestMain(m *testing.M) {
	if len(os.Args) == 6 && os.Args[1] == "gate" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := postgres.Gate(ctx, os.Stdout, os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// freeAddress returns an ADDRESS:PORT that nobody listened on a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// gateLab is a copy that is started with Listen.
func gateLab(t *testing.T, settings map[string]string, change ...func(*postgres.Copy)) (*postgres.Instance, string) {
	t.Helper()
	s := pgtest.New(t, pgtest.Options{Small: true, Settings: settings})
	s.Exec(t, "CREATE ROLE scram LOGIN PASSWORD 'right'", "CREATE ROLE bare LOGIN",
		"SET password_encryption = 'md5'", "CREATE ROLE postgres_too SUPERUSER LOGIN")
	listen := freeAddress(t)
	inst := start(t, dangerPlan(t, s), append([]func(*postgres.Copy){func(c *postgres.Copy) { c.Listen = listen }}, change...)...)
	return inst, listen
}

func login(ctx context.Context, listen, user, password string) error {
	host, port, _ := net.SplitHostPort(listen)
	cfg, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=%s user=%s dbname=postgres sslmode=disable connect_timeout=20", host, port, user))
	if err != nil {
		return err
	}
	cfg.Password = password
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, "SELECT 1")
	return errors.Join(err, conn.Close(ctx))
}

func sqlState(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return fmt.Sprint(err)
}

func TestTheGateLetsInWhoKnowsAPasswordAndNobodyElse(t *testing.T) {
	t.Parallel()
	needRoot(t)
	inst, listen := gateLab(t, nil, func(c *postgres.Copy) { c.Program = labtest.Binary(t) }) // cleancut itself, as it is installed
	if !inst.NetworkIsolated || inst.NetworkNote != "" {
		t.Fatalf("got %v, %q, want a network of its own", inst.NetworkIsolated, inst.NetworkNote)
	}
	if err := login(t.Context(), listen, "scram", "right"); err == nil || sqlState(err) != fmt.Sprint(err) {
		t.Errorf("before the gate is opened: got %v, want no connection", err)
	}
	if err := inst.OpenGate(t.Context(), listen); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ user, password, want string }{
		{"scram", "right", "<nil>"}, {"scram", "wrong", "28P01"}, {"bare", "right", "28P01"},
		{"postgres", "any", "28P01"}, {"postgres_too", "any", "28P01"}, {"nobody", "any", "28P01"},
	} {
		if got := sqlState(login(t.Context(), listen, c.user, c.password)); got != c.want {
			t.Errorf("%s with password %q: got %s, want %s", c.user, c.password, got, c.want)
		}
	}
	// The socket is as it was: private, and without a password for its owner.
	if got := ask[string](t, inst, "SELECT current_user::text"); got != "postgres" {
		t.Errorf("over the socket: got %s", got)
	}
	socket := filepath.Join(inst.SocketDir, fmt.Sprintf(".s.PGSQL.%d", inst.Port))
	if c, err := postgres.DialAs(65534, 65534)(t.Context(), "unix", socket); !errors.Is(err, syscall.EACCES) {
		t.Errorf("another user at the socket: got %v, %v", c, err)
	}
	rules := ask[string](t, inst, "SELECT string_agg(concat_ws(' ', type, database::text, user_name::text, address, netmask, auth_method), '; ' ORDER BY line_number) FROM pg_hba_file_rules")
	if want := "local {all} {all} trust; host {all} {all} 127.0.0.1 255.255.255.255 scram-sha-256"; rules != want {
		t.Errorf("got %s, want %s", rules, want)
	}
}

func TestARoleWithAnMD5PasswordGetsInAndOthersStillByScram(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := pgtest.New(t, pgtest.Options{Small: true})
	s.Exec(t, "CREATE ROLE scram LOGIN PASSWORD 'right'", "SET password_encryption = 'md5'", "CREATE ROLE old LOGIN PASSWORD 'right'")
	listen := freeAddress(t)
	inst := start(t, dangerPlan(t, s), func(c *postgres.Copy) { c.Listen = listen })
	if err := inst.OpenGate(t.Context(), listen); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ user, password, want string }{
		{"scram", "right", "<nil>"}, {"old", "right", "<nil>"}, {"old", "wrong", "28P01"}, {"postgres", "", "28P01"},
	} {
		if got := sqlState(login(t.Context(), listen, c.user, c.password)); got != c.want {
			t.Errorf("%s with password %q: got %s, want %s", c.user, c.password, got, c.want)
		}
	}
}

func TestAGateRunsAsTheOwnerOfTheDataAndEndsWithTheServer(t *testing.T) {
	t.Parallel()
	needRoot(t)
	inst, listen := gateLab(t, nil)
	gates := func() []int {
		pids, err := postgres.GatesOf(inst.Root)
		if err != nil {
			t.Fatal(err)
		}
		return pids
	}
	open := func() int {
		t.Helper()
		if err := inst.OpenGate(t.Context(), listen); err != nil {
			t.Fatal(err)
		}
		pids := gates()
		if len(pids) != 1 {
			t.Fatalf("got gates %v, want one", pids)
		}
		return pids[0]
	}
	first := open()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", first))
	if err != nil {
		t.Fatal(err)
	}
	status := regexp.MustCompile(`[ \t]+`).ReplaceAllString(string(b), " ")
	for _, want := range []string{fmt.Sprintf("Uid: %d %[1]d %[1]d %[1]d\n", inst.UID), fmt.Sprintf("Gid: %d %[1]d %[1]d %[1]d\n", inst.GID), "CapEff: 0000000000000000\n", "Groups: \n"} {
		if !strings.Contains(status, want) {
			t.Errorf("its status has no %q:\n%s", want, status)
		}
	}
	// Again: one gate, another one.
	second := open()
	if second == first {
		t.Errorf("process %d is still there", first)
	}
	if err := login(t.Context(), listen, "scram", "right"); err != nil {
		t.Error(err)
	}
	// A gate that is killed leaves the server alone, and its port is free.
	if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	free := func() bool { // its memory, and so its command line, goes before its descriptors
		l, err := net.Listen("tcp", listen)
		return err == nil && l.Close() == nil
	}
	until(t, "the killed gate is gone", func() bool { return len(gates()) == 0 && free() })
	open()
	// The postmaster is killed: nobody signals the gate.
	if err := syscall.Kill(inst.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the gate ended by itself", func() bool { return len(gates()) == 0 && free() })
}

func TestStopAndKillEndTheGate(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := pgtest.New(t, pgtest.Options{Small: true})
	p := dangerPlan(t, s)
	for name, end := range map[string]func(*postgres.Instance) error{
		"Stop": func(i *postgres.Instance) error { return i.Stop(t.Context()) },
		"Kill": func(*postgres.Instance) error { return postgres.Kill(t.Context(), p.Root) },
	} {
		listen := freeAddress(t)
		inst := start(t, p, func(c *postgres.Copy) { c.Listen = listen })
		if err := inst.OpenGate(t.Context(), listen); err != nil {
			t.Fatal(err)
		}
		found, err := postgres.Open(t.Context(), p.Root)
		if err != nil || !found.NetworkIsolated {
			t.Fatalf("got %+v, %v, want a network of its own", found, err)
		}
		client, err := net.Dial("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		if err := end(found); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if pids, err := postgres.GatesOf(p.Root); err != nil || len(pids) != 0 {
			t.Errorf("%s left gates %v, %v", name, pids, err)
		}
		if _, err := io.Copy(io.Discard, client); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the client got %v", name, err)
		}
		_ = client.Close()
	}
}

func TestAPortInUseIsAnErrorAndNobodyIsLetIn(t *testing.T) {
	t.Parallel()
	needRoot(t)
	inst, listen := gateLab(t, nil)
	l, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.OpenGate(t.Context(), listen); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("got %v, want %v", err, backup.ErrInUse)
	}
	_ = l.Close()
	b, err := os.ReadFile(filepath.Join(inst.SocketDir, "pg_hba.conf"))
	if err != nil || strings.Contains(string(b), "\nhost") {
		t.Errorf("got %s, %v", b, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := inst.OpenGate(ctx, listen); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if pids, err := postgres.GatesOf(inst.Root); err != nil || len(pids) != 0 {
		t.Errorf("got gates %v, %v", pids, err)
	}
}

func TestWithoutANetworkOfItsOwnTheServerListensAndLetsNobodyInBeforeTheGate(t *testing.T) {
	t.Parallel()
	inst, listen := gateLab(t, nil, func(c *postgres.Copy) { c.Without(postgres.LayerNetwork) })
	if inst.NetworkIsolated {
		t.Fatal("it has a network of its own")
	}
	if got := sqlState(login(t.Context(), listen, "scram", "right")); got != "28000" { // no pg_hba.conf entry
		t.Errorf("before: got %s, want 28000", got)
	}
	if err := inst.OpenGate(t.Context(), freeAddress(t)); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("at another address: got %v", err)
	}
	if err := inst.OpenGate(t.Context(), listen); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ user, password, want string }{{"scram", "right", "<nil>"}, {"bare", "any", "28P01"}, {"postgres", "any", "28P01"}} {
		if got := sqlState(login(t.Context(), listen, c.user, c.password)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.user, got, c.want)
		}
	}
}

func TestACopyThatWasNotToldToListenGetsNoGate(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Small: true})
	inst := start(t, dangerPlan(t, s))
	if err := inst.OpenGate(t.Context(), "127.0.0.1:5499"); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("got %v, want %v", err, backup.ErrUsage)
	}
}

// More than a splice's buffer goes through in both directions, also after the
// client has ended its half, and many at once do not leave anything behind.
func TestTheGateCarriesMuchAndMany(t *testing.T) {
	t.Parallel()
	needRoot(t)
	inst, listen := gateLab(t, nil)
	if err := inst.OpenGate(t.Context(), listen); err != nil {
		t.Fatal(err)
	}
	pid, err := postgres.GatesOf(inst.Root)
	if err != nil || len(pid) != 1 {
		t.Fatal(pid, err)
	}
	sockets := func() (n int) { // the pipes of splice(2) are kept for later connections
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid[0]))
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		return n
	}
	before := sockets()
	errs := make(chan error)
	for range 12 {
		go func() {
			host, port, _ := net.SplitHostPort(listen)
			conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=%s user=scram password=right dbname=postgres sslmode=disable", host, port))
			if err == nil {
				var n int
				big := strings.Repeat("x", 1<<20)
				err = conn.QueryRow(t.Context(), "SELECT length($1 || repeat('y', 3000000))", big).Scan(&n)
				if err == nil && n != 3000000+len(big) {
					err = fmt.Errorf("got %d bytes", n)
				}
				var back string
				err = errors.Join(err, conn.QueryRow(t.Context(), "SELECT repeat('y', 3000000)").Scan(&back), conn.Close(t.Context()))
				if len(back) != 3000000 {
					err = errors.Join(err, fmt.Errorf("got %d bytes back", len(back)))
				}
			}
			errs <- err
		}()
	}
	for range 12 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	// An SSLRequest is answered after the client has ended its half.
	c, err := net.Dial("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "N" || err != nil {
		t.Errorf("got %q, %v, want N: no TLS", got, err)
	}
	_ = c.Close()
	until(t, "no connection is left", func() bool { return sockets() <= before })
}

func TestWhichAddressesMayBeListenedAt(t *testing.T) {
	for _, good := range []string{"127.0.0.1:5433", "localhost:1", "[::1]:65535", "0.0.0.0:5433", "[::]:5433", "[fe80::1%eth0]:5433"} {
		if err := postgres.CheckListen(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "5433", ":5433", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", "db.example:5433", "*:5433", "::1:5433", "[127.0.0.1]:5433", "127.0.0.1:05433", "1.2.3.4, 5.6.7.8:5433", "224.0.0.1:5433", "127.1:5433"} {
		if err := postgres.CheckListen(bad); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: got %v, want %v", bad, err, backup.ErrUsage)
		}
	}
}

// What is let through can be listened at, and is one address.
func FuzzCheckListen(f *testing.F) {
	for _, s := range []string{"127.0.0.1:5433", "[::1]:1", "localhost:5433", "*:1", "a'b:1", "1.2.3.4,5.6.7.8:1", "[::1]:1\nx"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if postgres.CheckListen(s) != nil {
			return
		}
		host, port, err := net.SplitHostPort(s)
		if err != nil || net.JoinHostPort(host, port) != s || strings.ContainsAny(host, ",*'\"\\ \n\x00") {
			t.Errorf("%q was let through", s)
		}
		if _, err := net.LookupPort("tcp", port); err != nil || slices.Contains([]string{"0", ""}, port) {
			t.Errorf("%q was let through: %v", s, err)
		}
	})
}
