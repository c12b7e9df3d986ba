package postgres_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// dangerAsk asks a production.
func dangerAsk[T any](t *testing.T, s *pgtest.Server, query string) T {
	t.Helper()
	conn := s.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	rows, err := conn.Query(t.Context(), query)
	if err != nil {
		t.Fatal(err)
	}
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

func TestACopyOfAStandbyDoesNotConnectToItsPrimary(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Options{Small: true})
	primary.Exec(t, "SELECT pg_create_physical_replication_slot('standby1', true)")
	standby := primary.Standby(t, map[string]string{"primary_slot_name": "standby1"})
	taken := func() bool {
		return dangerAsk[bool](t, primary, "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE active) OR EXISTS (SELECT FROM pg_stat_replication)")
	}
	until(t, "the real standby follows", taken)
	server := inspect(t, standby).Server
	standby.Crash(t)
	until(t, "the real standby is away", func() bool { return !taken() })
	dangerCheck(t, "primary_conninfo and primary_slot_name", func(t *testing.T, without ...postgres.Layer) bool {
		p := dangerImage(t, standby, server)
		did := dangerUntil(t, p, without, taken)
		if err := postgres.Kill(t.Context(), p.Root); err != nil {
			t.Fatal(err)
		}
		until(t, "it is away", func() bool { return !taken() })
		return did
	})
}

// dangerStandby makes a standby copy of a running primary that has replayed a
// checkpoint which its image has not.
func dangerStandby(t *testing.T, primary *pgtest.Server, dbname string, without []postgres.Layer, change ...func(*postgres.Copy)) *postgres.Instance {
	t.Helper()
	p := dangerPlan(t, primary)
	p.Standby = &postgres.Standby{Primary: fmt.Sprintf("host=%s port=%d user=postgres dbname=%s", primary.SocketDir, primary.Port, dbname), Name: "copy", Restore: "false"}
	i := dangerUp(t, p, without, change...)
	primary.Exec(t, "CREATE TABLE IF NOT EXISTS public.more(n int)", "INSERT INTO public.more VALUES (1)", "CHECKPOINT")
	end := dangerAsk[string](t, primary, "SELECT pg_current_wal_lsn()::text")
	until(t, "the standby has replayed it", func() bool { return ask[bool](t, i, "SELECT pg_last_wal_replay_lsn() >= '"+end+"'") })
	return i
}

func TestAStandbyCopyDoesNotCleanUpProductionsArchive(t *testing.T) {
	t.Parallel()
	needRoot(t)
	archive := pgtest.Folder(t)
	file := filepath.Join(archive, "cleaned")
	primary := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"archive_cleanup_command": "touch " + file}})
	dangerCheck(t, "archive_cleanup_command", func(t *testing.T, without ...postgres.Layer) bool {
		i := dangerStandby(t, primary, "postgres", without)
		const redo = "SELECT redo_lsn::text FROM pg_control_checkpoint()"
		before := ask[string](t, i, redo)
		dangerExec(t, i, "CHECKPOINT") // returns when the command has
		if after := ask[string](t, i, redo); after == before {
			t.Fatalf("there was no restart point after %s", before)
		}
		return exists(file)
	})
}

func TestAStandbyCopyDoesNotCopyProductionsSlots(t *testing.T) {
	t.Parallel()
	primary := pgtest.New(t, pgtest.Options{Major: 17, Small: true, Settings: map[string]string{"wal_level": "logical", "sync_replication_slots": "on"}})
	primary.Exec(t, "SELECT pg_create_physical_replication_slot('copy', true)",
		"SELECT pg_create_logical_replication_slot('subscriber', 'pgoutput', false, false, true)")
	dangerCheck(t, "sync_replication_slots", func(t *testing.T, without ...postgres.Layer) bool {
		i := dangerStandby(t, primary, "postgres", without, func(c *postgres.Copy) {
			c.Standby.Slot = "copy"
			c.Settings = map[string]string{"hot_standby_feedback": "on", "wal_level": "logical"}
		})
		const worker = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'slotsync worker')"
		if ask[string](t, i, "SHOW sync_replication_slots") == "off" {
			return ask[bool](t, i, worker) || ask[bool](t, i, "SELECT EXISTS (SELECT FROM pg_replication_slots)")
		}
		until(t, "the worker runs", func() bool { return ask[bool](t, i, worker) })
		return true
	})
}

// A subscriber is copied while it is away; its publisher has changes for it.
func TestACopyOfASubscriberConsumesNothing(t *testing.T) {
	t.Parallel()
	publisher := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"wal_level": "logical"}})
	publisher.Exec(t, "CREATE TABLE public.paid(n int PRIMARY KEY)", "CREATE PUBLICATION pub FOR TABLE public.paid")
	subscriber := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"max_prepared_transactions": "5"}})
	subscriber.Exec(t, "CREATE TABLE public.paid(n int PRIMARY KEY)",
		fmt.Sprintf("CREATE SUBSCRIPTION \"a \"\"sub\"\"\" CONNECTION 'host=%s port=%d user=postgres dbname=postgres' PUBLICATION pub WITH (slot_name = sub)", publisher.SocketDir, publisher.Port),
		"CREATE DATABASE closed")
	until(t, "the table is copied", func() bool {
		return dangerAsk[bool](t, subscriber, "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel")
	})
	dangerExecIn(t, subscriber, "closed", "CREATE TABLE public.paid(n int PRIMARY KEY)")
	dangerExecIn(t, subscriber, "closed", fmt.Sprintf("CREATE SUBSCRIPTION shut CONNECTION 'host=%s port=%d user=postgres dbname=postgres' PUBLICATION pub WITH (slot_name = shut, create_slot = false, enabled = false)", publisher.SocketDir, publisher.Port))
	subscriber.Exec(t, "ALTER DATABASE closed ALLOW_CONNECTIONS false")
	server := inspect(t, subscriber).Server
	subscriber.Crash(t)
	active := func() bool {
		return dangerAsk[bool](t, publisher, "SELECT active FROM pg_replication_slots WHERE slot_name = 'sub'")
	}
	until(t, "the real subscriber is away", func() bool { return !active() })
	publisher.Exec(t, "INSERT INTO public.paid SELECT generate_series(1, 100)")
	const slot = "SELECT coalesce(confirmed_flush_lsn::text, '') FROM pg_replication_slots WHERE slot_name = 'sub'"
	consumed := func(t *testing.T, i *postgres.Instance, before string) bool {
		t.Helper()
		if !ask[bool](t, i, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'logical replication launcher')") ||
			!ask[bool](t, i, "SELECT EXISTS (SELECT FROM pg_subscription WHERE subenabled)") { // who would do it is not there
			return active() || dangerAsk[string](t, publisher, slot) != before
		}
		until(t, "it has production's rows", func() bool { return ask[int](t, i, "SELECT count(*)::int FROM paid") == 100 })
		return true
	}
	dangerCheck(t, "subscriptions that somebody starts", func(t *testing.T, without ...postgres.Layer) bool {
		before := dangerAsk[string](t, publisher, slot)
		p := dangerImage(t, subscriber, server)
		i := dangerUp(t, p, nil)
		if !slices.Contains(without, postgres.LayerDisarm) {
			for _, want := range [][]string{{
				`subscription "shut" of database closed is left: the database takes no connections, and so none of its workers'`,
				`subscription "a \"sub\"" of database postgres is dropped`,
			}, {
				`subscription "shut" of database closed is left: the database takes no connections, and so none of its workers'`,
			}} {
				if done, err := i.Disarm(t.Context()); err != nil || !slices.Equal(done, want) {
					t.Errorf("got %q, %v, want %q", done, err, want)
				}
			}
		}
		if err := i.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		c := startable(t, p)
		c.Settings = map[string]string{"max_logical_replication_workers": "4"} // somebody starts it so
		i, err := postgres.Start(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		until(t, "the launcher runs", func() bool {
			return ask[bool](t, i, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'logical replication launcher')")
		})
		did := consumed(t, i, before)
		if err := postgres.Kill(t.Context(), p.Root); err != nil {
			t.Fatal(err)
		}
		until(t, "it is away", func() bool { return !active() })
		publisher.Exec(t, "DELETE FROM public.paid", "INSERT INTO public.paid SELECT generate_series(1, 100)")
		return did
	})
	dangerCheck(t, "logical subscriptions", func(t *testing.T, without ...postgres.Layer) bool {
		before := dangerAsk[string](t, publisher, slot)
		i := dangerUp(t, dangerImage(t, subscriber, server), without)
		return consumed(t, i, before)
	})
}

// dangerExecIn runs a statement in another database of a production.
func dangerExecIn(t *testing.T, s *pgtest.Server, database, statement string) {
	t.Helper()
	conn := s.Connect(t, database)
	defer func() { _ = conn.Close(t.Context()) }()
	if _, err := conn.Exec(t.Context(), statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// Dropping a subscription whose tables are still being copied would drop slots
// on the publisher that bear its name (DropSubscription).
func TestDisarmDoesNotSpeakToThePublisher(t *testing.T) {
	t.Parallel()
	publisher := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"wal_level": "logical", "log_connections": "on"}})
	subscriber := pgtest.New(t, pgtest.Options{Small: true, Settings: map[string]string{"max_logical_replication_workers": "0"}})
	publisher.Exec(t, "CREATE TABLE public.paid(n int PRIMARY KEY)", "CREATE PUBLICATION pub FOR TABLE public.paid")
	subscriber.Exec(t, "CREATE TABLE public.paid(n int PRIMARY KEY)",
		fmt.Sprintf("CREATE SUBSCRIPTION sub CONNECTION 'host=%s port=%d user=postgres dbname=postgres application_name=a_subscriber' PUBLICATION pub", publisher.SocketDir, publisher.Port),
		"UPDATE pg_subscription_rel SET srsubstate = 'd'") // as a worker does that copies the table
	slot := dangerAsk[string](t, subscriber, "SELECT format('pg_%s_sync_%s_%s', s.oid, srrelid, system_identifier) FROM pg_subscription s JOIN pg_subscription_rel ON srsubid = s.oid, pg_control_system()")
	publisher.Exec(t, "SELECT pg_create_logical_replication_slot('"+slot+"', 'pgoutput')")
	i := dangerUp(t, dangerPlan(t, subscriber), nil)
	heard := func() int {
		b, err := os.ReadFile(publisher.Log())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "a_subscriber")
	}
	before := heard()
	if done, err := i.Disarm(t.Context()); err != nil || len(done) != 1 {
		t.Errorf("got %q, %v", done, err)
	}
	if after := heard(); after != before {
		t.Errorf("it connected to the publisher")
	}
	if got := dangerAsk[int](t, publisher, "SELECT count(*)::int FROM pg_replication_slots"); got != 2 {
		t.Errorf("the publisher has %d slots, want 2", got)
	}
}

func TestACopyDoesNotRecoverInProductionsFolders(t *testing.T) {
	t.Parallel()
	needRoot(t)
	c := newCluster(t, nil)
	c.Exec(t, "SELECT pg_sleep(2.1)", "CHECKPOINT", "INSERT INTO far_away SELECT generate_series(1, 1000)") // the tablespace is no longer fresh
	c.Crash(t)
	dangerCheck(t, "absolute links", func(t *testing.T, without ...postgres.Layer) bool {
		p := c.copyFiles(t)
		before := snapshotOf(t, filepath.Join(c.Dir, "wal")) + snapshotOf(t, filepath.Join(c.Dir, "space"))
		i := dangerUp(t, p, without)
		dangerExec(t, i, "INSERT INTO far_away SELECT generate_series(1, 1000)", "CHECKPOINT")
		if err := i.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		return snapshotOf(t, filepath.Join(c.Dir, "wal"))+snapshotOf(t, filepath.Join(c.Dir, "space")) != before
	})
}

func TestNoEventTriggerActsOnACopy(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Major: 17, Small: true})
	s.Exec(t, "CREATE TABLE public.seen(who text)", "GRANT ALL ON public.seen TO public",
		"CREATE FUNCTION public.act() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN IF NOT pg_is_in_recovery() THEN INSERT INTO public.seen VALUES (session_user); END IF; END $$",
		"CREATE EVENT TRIGGER on_login ON login EXECUTE FUNCTION public.act()", "ALTER EVENT TRIGGER on_login ENABLE ALWAYS")
	server := inspect(t, s).Server
	s.Crash(t)
	dangerCheck(t, "event triggers", func(t *testing.T, without ...postgres.Layer) bool {
		i := dangerUp(t, dangerImage(t, s, server), without)
		first := ask[int](t, i, "SELECT count(*)::int FROM public.seen")
		return ask[int](t, i, "SELECT count(*)::int FROM public.seen") > first // by the second login
	})
}
