package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
)

// walSlot keeps what the stream has not stored yet.
const walSlot = "cleancut_demo"

// streamWAL ships WAL into the catalog from here on, beside the archive_command
// that ships it to the inbox.
func (s *story) streamWAL(ctx context.Context) error {
	f, err := s.flow(ctx)
	if err != nil {
		return err
	}
	f.Log = slog.New(slog.DiscardHandler) // production is restarted, which it waits for
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() {
		ended <- f.StreamWAL(ctx, flow.StreamWALOptions{Target: postgres.Target{DSN: s.server.DSN("postgres")}, Slot: walSlot})
	}()
	s.later("WAL stream", func(context.Context) error {
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	return nil
}

// Step 20. The load has ended, so that what was committed before and after the
// moment is known.
func (s *story) shippedWAL(ctx context.Context, facts map[string]any) error {
	end, err := s.awaitShipped(ctx)
	if err != nil {
		return err
	}
	root := filepath.Join(s.work, "later")
	var c backup.Copy
	if err := s.cleancut(ctx, &c, "restore", string(s.manifest.ID), "--to", root, "--target", "time="+s.moment.UTC().Format(time.RFC3339Nano)); err != nil {
		return err
	}
	s.later("later copy", func(ctx context.Context) error { return s.cleancut(ctx, nil, "restore", "--undo", root) })
	conn, err := connectTo(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	found, err := load.Judge(ctx, conn, s.shipped)
	if err != nil {
		return err
	}
	w, before := found.Words, s.finding.Words
	facts["target_time"], facts["shipped_up_to"], facts["end_of_recovery"] = s.moment.UTC(), end, c.EndOfRecovery
	facts["b_acknowledged_by_then"], facts["b_found"], facts["b_found_at_the_cut"], facts["b_sent_in_all"] = w.Acked, w.Found, before.Found, s.load.Words.Sent()
	facts["seconds"] = c.Answered
	if p := found.Problems(); len(p) > 0 {
		return errStep("%s", strings.Join(p, "; "))
	}
	if w.Found <= before.Found || w.Found >= s.load.Words.Sent() {
		return errStep("the copy holds %d rows of beater B: that is not between the cut (%d) and the end (%d)", w.Found, before.Found, s.load.Words.Sent())
	}
	facts["marker_3"] = true // else it was a problem
	return s.promoteStandby(ctx, facts)
}

// awaitShipped ends production's segment and waits until the catalog has all
// WAL up to there.
func (s *story) awaitShipped(ctx context.Context) (backup.LSN, error) {
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(ctx)
	var at string
	if err := conn.QueryRow(ctx, "SELECT pg_switch_wal()::text").Scan(&at); err != nil {
		return 0, err
	}
	end, err := backup.ParseLSN(at)
	if err != nil {
		return 0, err
	}
	f, err := s.flow(ctx)
	if err != nil {
		return 0, err
	}
	for {
		list, err := f.ListWAL(ctx)
		if err != nil {
			return 0, err
		}
		if list.Stream != nil && list.Stream.State == "stopped" {
			return 0, errStep("the WAL stream has ended: %s", list.Stream.Error)
		}
		for _, b := range list.Backups {
			if n := len(b.Ways); b.ID == s.manifest.ID && n > 0 && b.Ways[n-1].To >= end {
				return b.Ways[n-1].To, nil
			}
		}
		if err := pause(ctx); err != nil {
			return 0, fmt.Errorf("the catalog does not have the WAL up to %s: %w", end, err)
		}
	}
}
