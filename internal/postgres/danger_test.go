package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// Every test of a danger plants it on a real production, and makes two copies
// of the image of its crash: as they are made, on which nothing may happen, and
// without the layers that the list names for the danger, on which it must.
// What may happen is waited for only where it must; that it does not is judged
// when it can no longer: after a clean stop, which archives all that is to be
// archived, or with the process missing that would do it.

// dangerTry makes a copy without layers and reports whether it did the harm.
type dangerTry func(t *testing.T, without ...postgres.Layer) bool

// dangerCheck runs both halves.
func dangerCheck(t *testing.T, danger string, try dangerTry) {
	t.Helper()
	i := slices.IndexFunc(postgres.Dangers(), func(d postgres.Danger) bool { return d.Name == danger })
	if i < 0 {
		t.Fatalf("the list has no danger %q", danger)
	}
	layers := postgres.Dangers()[i].Layers
	t.Run(danger+"/as it is", func(t *testing.T) {
		if try(t) {
			t.Error("the copy did it")
		}
	})
	t.Run(danger+"/without its layers", func(t *testing.T) {
		if !try(t, layers...) {
			t.Errorf("without %q it does not happen either: the test, or the list, is wrong", layers)
		}
	})
}

// dangerTested names the dangers that each test checks. A list in code, and not
// a register, because tests may be run one by one.
func dangerTested() []string {
	return slices.Concat(slices.Sorted(maps.Keys(dangerLocal())), []string{
		"replication slots", "prepared transactions", "preloaded workers",
		"primary_conninfo and primary_slot_name", "archive_cleanup_command", "sync_replication_slots",
		"logical subscriptions", "subscriptions that somebody starts", "absolute links", "event triggers",
	})
}

func TestEveryDangerOfTheListIsTested(t *testing.T) {
	var names []string
	for _, d := range postgres.Dangers() {
		names = append(names, d.Name)
		if d.Does == "" || d.Source == "" || len(d.Layers) == 0 {
			t.Errorf("%s: %+v is not complete", d.Name, d)
		}
	}
	tested := dangerTested()
	slices.Sort(names)
	slices.Sort(tested)
	if !slices.Equal(names, tested) {
		t.Errorf("the list has\n%q\nthere are tests of\n%q", names, tested)
	}
}

// The page for operators says what the list says, in its order.
func TestThePageOnIsolationHasEveryDanger(t *testing.T) {
	page, err := os.ReadFile("../../docs/isolation.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, d := range postgres.Dangers() {
		name := d.Name
		if d.Since > 0 {
			name += fmt.Sprintf(" (%d and later)", d.Since)
		}
		var layers []string
		for _, l := range d.Layers {
			layers = append(layers, string(l))
		}
		fmt.Fprintf(&want, "| %s | %s | %s | %s |\n", name, d.Does, strings.Join(layers, "; "), d.Source)
	}
	if !strings.Contains(string(page), want.String()) {
		t.Errorf("docs/isolation.md lacks this table:\n%s", want.String())
	}
}

// dangerPlan crashes s, copies its data directory and starts it again. The
// copies of one server may be many.
func dangerPlan(t *testing.T, s *pgtest.Server) postgres.Plan {
	t.Helper()
	server := inspect(t, s).Server
	s.Crash(t)
	defer s.Start(t)
	return dangerImage(t, s, server)
}

// dangerImage copies the data directory of a server that is down.
func dangerImage(t *testing.T, s *pgtest.Server, server backup.Server) postgres.Plan {
	t.Helper()
	root := filepath.Join(pgtest.Folder(t), "copy")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", s.DataDirectory, root).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	return postgres.Plan{
		Root: root, Data: filepath.Join(root, filepath.Base(s.DataDirectory)), Server: server,
		Map: func(path string) (string, bool) {
			rel, ok := strings.CutPrefix(path, filepath.Dir(s.DataDirectory)+"/")
			return filepath.Join(root, rel), ok
		},
	}
}

// dangerStart prepares p and starts it without layers, until ctx ends.
func dangerStart(ctx context.Context, t *testing.T, p postgres.Plan, layers []postgres.Layer, change ...func(*postgres.Copy)) (*postgres.Instance, error) {
	t.Helper()
	p.Without(layers...)
	if err := postgres.Prepare(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	c := startable(t, p)
	c.Without(layers...)
	c.Standby, c.NoFsync = p.Standby, true
	for _, f := range change {
		f(&c)
	}
	t.Cleanup(func() {
		if err := postgres.Kill(context.WithoutCancel(t.Context()), p.Root); err != nil {
			t.Error(err)
		}
	})
	return postgres.Start(ctx, c)
}

// dangerUp is dangerStart where it must come up.
func dangerUp(t *testing.T, p postgres.Plan, layers []postgres.Layer, change ...func(*postgres.Copy)) *postgres.Instance {
	t.Helper()
	i, err := dangerStart(t.Context(), t, p, layers, change...)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// dangerUntil starts a copy that perhaps does not come up, and returns what
// happened() is when it has come up, or true as soon as that is.
func dangerUntil(t *testing.T, p postgres.Plan, layers []postgres.Layer, happened func() bool, change ...func(*postgres.Copy)) bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := dangerStart(ctx, t, p, layers, change...)
		ended <- err
	}()
	var up bool
	var err error
	until(t, "the copy is up, or did it", func() bool {
		select {
		case err = <-ended:
			up = true
		default:
		}
		return up || happened()
	})
	if up && err != nil {
		t.Fatal(err)
	}
	did := happened()
	cancel()
	if !up {
		<-ended
	}
	return did
}

// dangerExec runs statements on a copy.
func dangerExec(t *testing.T, i *postgres.Instance, statements ...string) {
	t.Helper()
	if err := dangerTryExec(t, i, statements...); err != nil {
		t.Fatal(err)
	}
}

func dangerTryExec(t *testing.T, i *postgres.Instance, statements ...string) error {
	t.Helper()
	conn, err := i.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	for _, s := range statements {
		if _, err := conn.Exec(t.Context(), s); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return nil
}

// dangerHost is a production whose configuration has every danger that a
// configuration can have; it is down, crashed.
type dangerHost struct {
	*pgtest.Server
	server   backup.Server
	out      string // a folder of production's, outside of its data directory
	address  string // production's, ADDRESS:PORT
	listener net.Listener
	reached  chan struct{} // somebody connected to listener
}

const dangerCron = "/usr/lib/postgresql/15/lib/pg_cron.so"

func newDangerHost(t *testing.T) *dangerHost {
	t.Helper()
	h := &dangerHost{out: pgtest.Folder(t), reached: make(chan struct{}, 100)}
	// An address of its own: copies have port 5432, like others here perhaps.
	ip := fmt.Sprintf("127.%d.%d.2", 1+os.Getpid()>>8%250, os.Getpid()%250)
	h.address = ip + ":5432"
	settings := map[string]string{
		"archive_mode": "on", "archive_command": "cp %p " + h.out + "/archive/%f",
		"restore_command": "touch " + h.out + "/restored; cp " + h.out + "/archive/%f %p", "recovery_end_command": "touch " + h.out + "/recovered",
		"listen_addresses": ip, "external_pid_file": h.out + "/production.pid", "log_directory": h.out + "/log",
		"cluster_name": "production", "max_prepared_transactions": "5", "max_wal_senders": "5", "restart_after_crash": "off",
	}
	if exists(dangerCron) {
		settings["shared_preload_libraries"], settings["cron.use_background_workers"] = "pg_cron", "on"
	}
	h.Server = pgtest.New(t, pgtest.Options{Small: true, Settings: settings, NoStart: true})
	h.reset(t)
	// Production itself logs where the test sees it; the collector is planted for the copy.
	h.Start(t)
	if exists(dangerCron) {
		h.Exec(t, "CREATE EXTENSION pg_cron", "SELECT cron.schedule('@reboot', 'CREATE TABLE public.cron_ran()')")
	}
	h.Exec(t, "CREATE EXTENSION dblink", "CREATE TABLE public.paid(n int)", "SELECT pg_create_physical_replication_slot('standby1', true)",
		"BEGIN", "LOCK TABLE public.paid", "INSERT INTO public.paid VALUES (1)", "PREPARE TRANSACTION 'it''s \\ in doubt'",
		"ALTER SYSTEM SET synchronous_standby_names = '*'", "ALTER SYSTEM SET log_statement = 'all'")
	h.server = inspect(t, h.Server).Server
	h.Crash(t)
	pgtest.Append(t, filepath.Join(h.DataDirectory, "postgresql.conf"), "logging_collector = on\ninclude '"+h.out+"/more.conf'\n")
	pgtest.Append(t, filepath.Join(h.DataDirectory, "recovery.signal"), "")
	var err error
	if h.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.listener.Close() })
	go func() {
		for {
			c, err := h.listener.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
			h.reached <- struct{}{}
		}
	}()
	return h
}

// reset makes the folder outside what production has there.
func (h *dangerHost) reset(t *testing.T) {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(h.out, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(e); err != nil {
			t.Fatal(err)
		}
	}
	pgtest.Mkdir(t, filepath.Join(h.out, "log"))
	pgtest.Mkdir(t, filepath.Join(h.out, "archive"))
	pgtest.Append(t, filepath.Join(h.out, "archive", "00000002.history"), "1\tF/0\tplanted\n")
	pgtest.Append(t, filepath.Join(h.out, "more.conf"), "work_mem = '7MB'\n")
}

// files lists what lies in a folder outside, besides what reset put there.
func (h *dangerHost) files(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(h.out, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(found, func(f string) bool { return filepath.Base(f) == "00000002.history" })
}

// stopped reports whether files that fit are there after the copy wrote,
// switched to another WAL file, and was stopped cleanly.
func (h *dangerHost) stopped(t *testing.T, i *postgres.Instance, pattern string) bool {
	t.Helper()
	dangerExec(t, i, "SET synchronous_commit = local", "CREATE TABLE public.more(n int)", "SELECT pg_switch_wal()", "CHECKPOINT")
	if err := i.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	return len(h.files(t, pattern)) > 0
}

// dangerLocal are the dangers of the configuration and of the host, each with
// what a copy of h does.
func dangerLocal() map[string]func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
	return map[string]func(*testing.T, *dangerHost, postgres.Plan, []postgres.Layer) bool{
		"archive_command": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			return h.stopped(t, dangerUp(t, p, without), "archive/*")
		},
		"archive_library": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			pgtest.Append(t, filepath.Join(p.Data, "postgresql.conf"), "archive_command = ''\narchive_library = 'basic_archive'\nbasic_archive.archive_directory = '"+h.out+"/archive'\n")
			return h.stopped(t, dangerUp(t, p, without), "archive/*")
		},
		"restore_command and recovery_end_command": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			dangerUp(t, p, without)
			restored, recovered := len(h.files(t, "restored")) > 0, len(h.files(t, "recovered")) > 0
			if restored != recovered {
				t.Errorf("restore_command ran: %v, recovery_end_command: %v", restored, recovered)
			}
			return restored || recovered
		},
		"timelines": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			i := dangerUp(t, p, without)
			picked := ask[int](t, i, "SELECT timeline_id FROM pg_control_checkpoint()") != 1
			pushed := h.stopped(t, i, "archive/*.history")
			if picked != pushed {
				t.Errorf("picked another's timeline up: %v, pushed its own: %v", picked, pushed)
			}
			return picked || pushed
		},
		"synchronous_standby_names": func(t *testing.T, _ *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			i := dangerUp(t, p, without)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			conn, err := i.Connect(t.Context(), "postgres")
			if err != nil {
				t.Fatal(err)
			}
			committed := make(chan error, 1)
			go func() {
				_, err := conn.Exec(ctx, "CREATE TABLE public.waits(n int)")
				committed <- err
			}()
			waits, done := false, false
			until(t, "the commit is through, or waits for a standby", func() bool {
				select {
				case err := <-committed:
					if done = true; err != nil {
						t.Error(err)
					}
				default:
					waits = ask[bool](t, i, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')")
				}
				return done || waits
			})
			if !done {
				cancel()
				<-committed
			}
			_ = conn.Close(context.WithoutCancel(t.Context()))
			return waits
		},
		"listen_addresses": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			dangerUp(t, p, without)
			c, err := net.Dial("tcp", h.address)
			if err != nil {
				return false
			}
			return c.Close() == nil
		},
		"connections to other hosts": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			i := dangerUp(t, p, without)
			host, port, _ := net.SplitHostPort(h.listener.Addr().String())
			err := dangerTryExec(t, i, fmt.Sprintf("SELECT dblink_connect('host=%s port=%s user=x password=y dbname=z')", host, port))
			var pg *pgconn.PgError
			if !errors.As(err, &pg) || pg.Code != "08001" { // sqlclient_unable_to_establish_sqlconnection, either way
				t.Fatalf("got %v", err)
			}
			select {
			case <-h.reached:
				return true
			default:
			}
			if !strings.Contains(pg.Detail, "Connection refused") { // its own loopback has no such listener
				t.Errorf("got %v, %s", pg, pg.Detail)
			}
			return false
		},
		"unix sockets": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			socket := filepath.Join(h.SocketDir, ".s.PGSQL.5432")
			for _, f := range []string{socket, socket + ".lock"} { // of the server that crashed
				if err := os.RemoveAll(f); err != nil {
					t.Fatal(err)
				}
			}
			return dangerUntil(t, p, without, func() bool { return exists(socket) })
		},
		"other users of the host": func(t *testing.T, _ *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			i := dangerUp(t, p, without)
			cfg, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres sslmode=disable", i.SocketDir, i.Port))
			if err != nil {
				t.Fatal(err)
			}
			cfg.DialFunc = postgres.DialAs(65534, 65534)
			conn, err := pgx.ConnectConfig(t.Context(), cfg)
			if err != nil {
				return false
			}
			return conn.Close(t.Context()) == nil
		},
		"log and pid files outside": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			dangerUp(t, p, without)
			logged, pid := len(h.files(t, "log/*")) > 0, len(h.files(t, "production.pid")) > 0
			if logged != pid {
				t.Errorf("logged: %v, wrote a pid file: %v", logged, pid)
			}
			return logged || pid
		},
		"configuration outside and includes": func(t *testing.T, _ *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			return ask[string](t, dangerUp(t, p, without), "SHOW work_mem") == "7MB"
		},
		"ALTER SYSTEM": func(t *testing.T, _ *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			return ask[string](t, dangerUp(t, p, without), "SHOW log_statement") == "all"
		},
		"production's name": func(t *testing.T, _ *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			i := dangerUp(t, p, without)
			title, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", ask[int](t, i, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")))
			if err != nil {
				t.Fatal(err)
			}
			return strings.HasPrefix(string(title), "postgres: production: ")
		},
		"writes to the host": func(t *testing.T, h *dangerHost, p postgres.Plan, without []postgres.Layer) bool {
			err := dangerTryExec(t, dangerUp(t, p, without), "COPY (SELECT 1) TO PROGRAM 'cat >"+h.out+"/written'")
			if written := len(h.files(t, "written")) > 0; written != (err == nil) {
				t.Errorf("got %v, written: %v", err, written)
			}
			return err == nil
		},
	}
}

func TestEveryDangerOfProductionsConfigurationAndHost(t *testing.T) {
	t.Parallel()
	needRoot(t)
	h := newDangerHost(t)
	cases := dangerLocal()
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		dangerCheck(t, name, func(t *testing.T, without ...postgres.Layer) bool {
			h.reset(t)
			return cases[name](t, h, dangerImage(t, h.Server, h.server), without)
		})
	}
	dangerCheck(t, "replication slots", func(t *testing.T, without ...postgres.Layer) bool {
		return ask[int](t, dangerUp(t, dangerImage(t, h.Server, h.server), without), "SELECT count(*)::int FROM pg_replication_slots WHERE restart_lsn IS NOT NULL") > 0
	})
	dangerCheck(t, "prepared transactions", func(t *testing.T, without ...postgres.Layer) bool {
		i := dangerUp(t, dangerImage(t, h.Server, h.server), without)
		if !slices.Contains(without, postgres.LayerDisarm) {
			done, err := i.Disarm(t.Context())
			if want := []string{`prepared transaction "it's \\ in doubt" of database postgres is rolled back`}; err != nil || !slices.Equal(done, want) {
				t.Errorf("got %q, %v, want %q", done, err, want)
			}
			if again, err := i.Disarm(t.Context()); err != nil || len(again) != 0 {
				t.Errorf("again: got %q, %v", again, err)
			}
		}
		all, err := i.ListPrepared(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		locked := dangerTryExec(t, i, "BEGIN", "LOCK TABLE public.paid NOWAIT") != nil
		if locked != (len(all) == 1 && all[0].GID == `it's \ in doubt` && all[0].Database == "postgres" && all[0].Owner == "postgres") {
			t.Errorf("the table is locked: %v, prepared: %+v", locked, all)
		}
		return locked
	})
	dangerCheck(t, "preloaded workers", func(t *testing.T, without ...postgres.Layer) bool {
		if !exists(dangerCron) {
			t.Skip("run scripts/install-deps: postgresql-15-cron")
		}
		i := dangerUp(t, dangerImage(t, h.Server, h.server), without, func(c *postgres.Copy) {
			c.Settings = map[string]string{"cron.use_background_workers": "on", "cron.launch_active_jobs": "on"} // it has no TCP to reach itself
		})
		if ask[int](t, i, "SELECT count(*)::int FROM pg_stat_activity WHERE backend_type = 'pg_cron launcher'") == 0 {
			return ask[bool](t, i, "SELECT to_regclass('public.cron_ran') IS NOT NULL")
		}
		until(t, "the job has run", func() bool { return ask[bool](t, i, "SELECT to_regclass('public.cron_ran') IS NOT NULL") })
		return true
	})
}
