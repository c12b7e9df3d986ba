package drill

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/postgres"
)

// slot is that of the stream.
const slot = "cleancut_drill"

// further is how many words are to be acknowledged after a cut before the
// moment to which its image is recovered.
const further = 50

// shipment is the stream of a production's WAL into the run's catalog.
type shipment struct {
	ended chan struct{} // closed with err set
	err   error
	last  backup.LSN // the last target
}

func (p *production) target() postgres.Target {
	return postgres.Target{DSN: p.server.DSN("postgres")}
}

// startShipping streams production's WAL, if an image needs it, until the run
// ends. It returns when the server keeps all WAL from here on for the stream.
func (p *production) startShipping(ctx context.Context) error {
	if !p.batch.ships() {
		return nil
	}
	s := &shipment{ended: make(chan struct{})}
	streaming, stop := context.WithCancel(ctx)
	go func() {
		defer close(s.ended)
		s.err = p.a.StreamWAL(streaming, flow.StreamWALOptions{Target: p.target(), Slot: slot})
	}()
	p.ship = s
	p.undo.Later(func(context.Context) error { // the slot goes with the server
		stop()
		<-s.ended
		return nil
	})
	return p.until(ctx, func() (bool, error) {
		var active bool
		err := p.ask(ctx, "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE active AND restart_lsn IS NOT NULL AND slot_name = '"+slot+"')", &active)
		return active, err
	})
}

// beyond chooses the end of recovery by shipped WAL, some commits from now. What
// was acknowledged until before must be there then, and nothing that was sent
// after until: recovery stops behind the first record from the target on.
func (p *production) beyond(ctx context.Context) (target string, before, until time.Time, err error) {
	if err := p.load.Words.Await(ctx, p.load.Words.Count()+further); err != nil {
		return "", before, until, err
	}
	before = time.Now()
	var position string
	if err := p.ask(ctx, "SELECT pg_current_wal_insert_lsn()::text", &position); err != nil {
		return "", before, until, err
	}
	if p.ship.last, err = backup.ParseLSN(position); err != nil {
		return "", before, until, err
	}
	// The second word from now on is one that was sent from now on.
	err = p.load.Words.Await(ctx, p.load.Words.Count()+2)
	return backup.Target{Kind: backup.TargetLSN, LSN: p.ship.last}.String(), before, time.Now(), err
}

// shipped waits until the catalog has the WAL of all targets. The load is over.
func (p *production) shipped(ctx context.Context) error {
	if p.ship == nil || p.ship.last == 0 {
		return nil
	}
	var ended string
	if err := p.ask(ctx, "SELECT pg_switch_wal()::text", &ended); err != nil {
		return err
	}
	return p.until(ctx, func() (bool, error) {
		list, err := p.a.ListWAL(ctx)
		if err != nil {
			return false, err
		}
		for _, t := range list.Timelines {
			for _, r := range t.Ranges {
				if r.Start <= p.ship.last && p.ship.last < r.End {
					return true, nil
				}
			}
		}
		return false, nil
	})
}

// until asks again and again. It ends with the stream, too.
func (p *production) until(ctx context.Context, ok func() (bool, error)) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := ok(); done || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-p.ship.ended:
			return errors.Join(ctx.Err(), fmt.Errorf("ship production's WAL: %w", p.ship.err))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (p *production) ask(ctx context.Context, sql string, into any) error {
	conn, err := p.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := conn.QueryRow(ctx, sql).Scan(into); err != nil {
		return fmt.Errorf("ask production: %w", err)
	}
	return nil
}
