package demo

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/load"
)

// standby is what the story reads of `cleancut standby`.
type standby struct {
	Root      string        `json:"root"`
	SocketDir string        `json:"socket_dir"`
	Port      int           `json:"port"`
	Superuser string        `json:"superuser"`
	Slot      string        `json:"slot"`
	Streaming bool          `json:"streaming"`
	Timeline  uint32        `json:"timeline"`
	Replayed  backup.LSN    `json:"replayed_lsn"`
	Lag       *backup.Bytes `json:"lag_bytes"`
}

// onStandbyHost runs a command of the program where the standby stands: with a
// state folder of its own, and, unlike the other host, in reach of production's
// server.
func (s *story) onStandbyHost(ctx context.Context, v any, args ...string) error {
	args = append(append([]string{"--json", "--cluster", "demo", "--state", filepath.Join(s.work, "c"), "--host-name", "standby-host"}, s.ground.arguments()...), args...)
	return s.answer(exec.CommandContext(ctx, s.Program, args...), "the standby's host", v)
}

// seedStandby makes a standby of the backup while production is under load, and
// waits until it shows what production has acknowledged since.
func (s *story) seedStandby(ctx context.Context, facts map[string]any) error {
	root := filepath.Join(s.work, "standby")
	if err := s.onStandbyHost(ctx, &s.standby, "standby", string(s.manifest.ID), "--to", root, "--primary", s.server.DSN("postgres")); err != nil {
		return err
	}
	s.later("standby", func(ctx context.Context) error { return s.onStandbyHost(ctx, nil, "standby", "remove", root) })
	conn, err := s.standbyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if err := s.load.Words.Await(ctx, s.load.Words.Count()+1); err != nil {
		return fmt.Errorf("the original stopped serving: %w", err)
	}
	acked := s.load.Words.Count()
	for seen := int64(0); seen < acked; {
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM play.words_said").Scan(&seen); err != nil {
			return err
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("the standby shows %d of %d acknowledged rows: %w", seen, acked, err)
		}
	}
	if err := s.onStandbyHost(ctx, &s.standby, "standby", "status", root); err != nil {
		return err
	}
	facts["standby_streaming"], facts["standby_lag_bytes"], facts["standby_slot"], facts["standby_shows"] = s.standby.Streaming, s.standby.Lag, s.standby.Slot, acked
	if !s.standby.Streaming {
		return errStep("the standby does not stream")
	}
	return s.load.Err()
}

// promoteStandby waits until the standby has all that production wrote, promotes
// it and compares the two. The load has ended.
func (s *story) promoteStandby(ctx context.Context, facts map[string]any) error {
	production, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer production.Close(ctx)
	var end string
	if err := production.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn()::text").Scan(&end); err != nil {
		return err
	}
	conn, err := s.standbyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for caughtUp := false; !caughtUp; {
		if err := conn.QueryRow(ctx, "SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn", end).Scan(&caughtUp); err != nil {
			return err
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("the standby has not replayed up to %s: %w", end, err)
		}
	}
	var promoted standby
	if err := s.onStandbyHost(ctx, &promoted, "standby", "promote", s.standby.Root); err != nil {
		return err
	}
	there, err1 := rowCounts(ctx, production)
	here, err2 := rowCounts(ctx, conn)
	promise := s.load.Promise(time.Now())
	promise.Facts, promise.Present = &s.facts, []int{1, 2, 3}
	found, err3 := load.Judge(ctx, conn, promise)
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return err
		}
	}
	facts["standby_promoted_on_timeline"], facts["standby_tables"], facts["standby_words"] = promoted.Timeline, len(here), found.Words.Found
	if len(here) == 0 || fmt.Sprint(here) != fmt.Sprint(there) {
		return errStep("row counts differ: production %v, promoted standby %v", there, here)
	}
	if p := found.Problems(); len(p) > 0 {
		return errStep("the promoted standby: %s", strings.Join(p, "; "))
	}
	return nil
}

func (s *story) standbyConn(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, fmt.Sprintf("host=%s port=%d user=%s dbname=postgres", s.standby.SocketDir, s.standby.Port, s.standby.Superuser))
}

// pause is a fraction of a second between two looks; an error of ctx ends the
// looking.
func pause(ctx context.Context) error {
	select {
	case <-time.After(100 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
