package replication_test

import (
	"errors"
	"fmt"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

func TestASlotIsHeldWhereTheServerStillHasTheWAL(t *testing.T) {
	t.Parallel()
	for _, i := range pgtest.Majors(t) {
		t.Run(fmt.Sprint(i.Major), func(t *testing.T) {
			s := pgtest.New(t, pgtest.Options{Major: i.Major, Small: true, Settings: map[string]string{"wal_keep_size": "20MB", "max_wal_size": "4MB", "min_wal_size": "2MB", "autovacuum": "off"}})
			first := query(t, s, "SELECT pg_current_wal_flush_lsn()")
			write(t, s, 8)
			s.Exec(t, "CHECKPOINT", "SELECT pg_switch_wal()")
			p, err := replication.Look(t.Context(), target(s))
			if err != nil {
				t.Fatal(err)
			}
			from := wal.At(p.History.Timeline, first, mega)
			if p.Kept <= from.End(mega) || p.Flushed < p.Kept || p.Version/10000 != i.Major || p.Settings["max_connections"] != "30" || p.Standby || p.System.SegmentSize != mega {
				t.Errorf("looked: %+v", p)
			}
			if err := replication.Has(t.Context(), target(s), from, mega); err != nil {
				t.Errorf("what wal_keep_size keeps: %v", err)
			}
			if err := replication.Hold(t.Context(), target(s), "held", from, mega); err != nil {
				t.Fatal(err)
			}
			if err := replication.Hold(t.Context(), target(s), "held", from, mega); !errors.Is(err, backup.ErrExists) {
				t.Errorf("held twice: got %v", err)
			}
			slot, err := replication.LookAtSlot(t.Context(), target(s), "held", "")
			if err != nil || slot.Kept != from.Start(mega) || slot.Behind < 8*mega || slot.Active {
				t.Errorf("got %+v, %v, want %s kept", slot, err, from.Start(mega))
			}
			// Beyond wal_keep_size only the slot keeps it, also after a restart.
			write(t, s, 30)
			s.Exec(t, "CHECKPOINT")
			s.Stop(t)
			s.Start(t)
			write(t, s, 4)
			s.Exec(t, "CHECKPOINT")
			if err := replication.Has(t.Context(), target(s), from, mega); err != nil {
				t.Errorf("what the slot keeps: %v", err)
			}
			if err := replication.Release(t.Context(), target(s), "held", p.System.Identifier+1); !errors.Is(err, backup.ErrNotOurs) {
				t.Errorf("released as of another system: got %v", err)
			}
			for range 2 {
				if err := replication.Release(t.Context(), target(s), "held", p.System.Identifier); err != nil {
					t.Errorf("released: %v", err)
				}
			}
			s.Exec(t, "CHECKPOINT")
			write(t, s, 4)
			s.Exec(t, "CHECKPOINT")
			if err := replication.Has(t.Context(), target(s), from, mega); !errors.Is(err, replication.ErrLost) {
				t.Errorf("what nobody keeps: got %v", err)
			}
			if err := replication.Hold(t.Context(), target(s), "late", from, mega); !errors.Is(err, replication.ErrLost) {
				t.Errorf("held too late: got %v", err)
			}
		})
	}
}

func TestAnotherReceiverKeepsItsSlot(t *testing.T) {
	t.Parallel()
	s := pgtest.New(t, pgtest.Options{Small: true})
	s.Exec(t, "SELECT pg_create_physical_replication_slot('theirs')")
	standby := s.Standby(t, map[string]string{"primary_slot_name": "theirs"})
	slot := func() (out replication.Slot) {
		var err error
		if out, err = replication.LookAtSlot(t.Context(), target(s), "theirs", "walreceiver"); err != nil {
			t.Fatal(err)
		}
		return out
	}
	standby.Exec(t, `DO $$ BEGIN
		WHILE NOT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming') LOOP PERFORM pg_sleep(0.01); END LOOP;
	END $$`)
	if x := slot(); x.Sync != "async" {
		t.Errorf("got %+v", x)
	}
	if err := replication.Release(t.Context(), target(s), "theirs", slot().System); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("got %v", err)
	}
	if !slot().Active {
		t.Error("it is gone")
	}
	if _, err := replication.LookAtSlot(t.Context(), postgres.Target{DSN: s.DSN("postgres")}, "nobody", ""); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("a slot that is not there: %v", err)
	}
}
