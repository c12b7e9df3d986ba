package drill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
)

// production is one production run: storage, a server on it, a play database,
// a load.
type production struct {
	*site
	hosts
	batch  batch
	server lab.Server
	facts  load.Facts
	load   *load.Load
	mounts []string
	began  time.Time
	ship   *shipment // nil: no image needs WAL of production
	undo   lab.Undo
}

// shot is a cut that is to be judged.
type shot struct {
	cell     Cell // of the cut
	at       time.Time
	manifest backup.Manifest
	ways     []Way
	stall    time.Duration
	err      error // there is no image: the cut failed
}

// produce makes it and puts it under load. On an error nothing is left.
func (s *site) produce(ctx context.Context, b batch) (p *production, err error) {
	p = &production{site: s, batch: b, began: time.Now().UTC()}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.undo.End(ctx))
		}
	}()
	if err := p.makeHosts(); err != nil {
		return p, err
	}
	if err := p.makeServer(ctx); err != nil {
		return p, err
	}
	conn, err := p.server.Connect(ctx)
	if err != nil {
		return p, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	seed := 1 + int64(b.seed%1_000_000_000) // what the play database takes: an int4 that is not 0
	if p.facts, err = load.Create(ctx, conn, load.Options{Rows: s.Rows, Seed: seed}); err != nil {
		return p, err
	}
	if err := errors.Join(p.spread(ctx), p.settle(ctx)); err != nil {
		return p, err
	}
	if err := p.startShipping(ctx); err != nil {
		return p, err
	}
	l, _ := presetOf(b.ground.Load)
	if p.load, err = load.Start(ctx, p.server.Connect, l.which(seed, p.mounts)); err != nil {
		return p, err
	}
	p.undo.Later(func(context.Context) error { _, err := p.load.Stop(); return err })
	return p, l.warm(ctx, p.load)
}

// makeHosts makes the hosts of this run alone, with a catalog that goes with it.
func (p *production) makeHosts() (err error) {
	dir := filepath.Join(p.work, "run")
	p.undo.Later(func(context.Context) error {
		left, err := lab.Left(dir)
		if err != nil || len(left) > 0 { // which atSite tells; never remove through a mount
			return err
		}
		return os.RemoveAll(dir)
	})
	p.hosts, err = p.site.hosts(dir)
	return err
}

// makeServer makes the storage and starts a server on it, its WAL and
// tablespaces where the layout wants them.
func (p *production) makeServer(ctx context.Context) error {
	l, _ := layoutOf(p.batch.ground.Layout)
	load, _ := presetOf(p.batch.ground.Load)
	for _, o := range l.storages(p.batch.ground, p.VolumeSize) {
		o.Host, o.Mountpoint, o.MountOptions = productionHost, filepath.Join(p.work, o.Name), []string{"noatime"}
		o.Fstab, o.MdadmConf = filepath.Join(p.work, "fstab"), filepath.Join(p.work, "mdadm.conf")
		p.undo.Later(func(ctx context.Context) error { return flow.DestroyStorage(ctx, p.pa, o) })
		if _, err := flow.CreateStorage(ctx, p.pa, o); err != nil {
			return err
		}
		p.mounts = append(p.mounts, o.Mountpoint)
	}
	o := lab.ServerOptions{Template: filepath.Join(p.work, "initdb"), Data: filepath.Join(p.mounts[0], "pg"), Socket: filepath.Join(p.work, "s"), Conf: load.settings}
	if len(p.mounts) > 1 {
		o.WAL = filepath.Join(p.mounts[1], "pg")
	}
	var err error
	if p.server, err = lab.NewServer(ctx, o); err != nil {
		return err
	}
	p.undo.Later(p.server.Stop)
	if err := p.server.Start(ctx); err != nil {
		return err
	}
	return p.makeSpaces(ctx)
}

// makeSpaces makes a tablespace on every further volume and lets the database
// put its tables there; then each of the play database's own is moved to one
// of them in turn, so that rows, indexes and WAL lie on different volumes.
func (p *production) makeSpaces(ctx context.Context) error {
	if len(p.mounts) < 3 {
		return nil
	}
	conn, err := p.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for i, m := range p.mounts[2:] {
		dir := filepath.Join(m, "space")
		if err := p.server.Mkdir(dir); err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, fmt.Sprintf("CREATE TABLESPACE space%d LOCATION '%s'", i+1, dir)); err != nil {
			return fmt.Errorf("tablespace: %w", err)
		}
	}
	if _, err := conn.Exec(ctx, "ALTER DATABASE postgres SET default_tablespace = space1"); err != nil {
		return fmt.Errorf("tablespace: %w", err)
	}
	return nil
}

// spread moves tables and indexes of the play database over all tablespaces.
func (p *production) spread(ctx context.Context) error {
	spaces := p.batch.ground.Volumes - 2
	if p.batch.ground.Layout != "separate" || spaces < 2 {
		return nil
	}
	conn, err := p.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// The bank's tables stay apart from their log, the words from their index.
	for i, statement := range []string{
		"ALTER TABLE play.transfers SET TABLESPACE space%d", "ALTER INDEX play.words_said_pkey SET TABLESPACE space%d", "ALTER INDEX play.bulk_family SET TABLESPACE space%d",
		"ALTER TABLE play.tellers SET TABLESPACE space%d", "ALTER INDEX play.accounts_pkey SET TABLESPACE space%d",
	} {
		if _, err := conn.Exec(ctx, fmt.Sprintf(statement, 2+i%(spaces-1))); err != nil {
			return fmt.Errorf("spread tables: %w", err)
		}
	}
	return nil
}

// settle writes everything out once: a cluster that was copied into place a
// moment ago is not yet on its volumes, and a cut without a freeze would be
// blamed for what only the newness of this production is guilty of.
func (p *production) settle(ctx context.Context) error {
	if err := p.checkpoint(ctx); err != nil {
		return err
	}
	for _, m := range p.mounts {
		f, err := os.Open(m)
		if err != nil {
			return fmt.Errorf("settle: %w", err)
		}
		if err := errors.Join(unix.Syncfs(int(f.Fd())), f.Close()); err != nil {
			return fmt.Errorf("settle %s: %w", m, err)
		}
	}
	return nil
}

// shoot takes the run's cuts, one after the other, with the pauses that the
// seed says. What fails to be cut is a shot without an image; the load's own
// end is an error, as the promise would be worth nothing.
func (p *production) shoot(ctx context.Context) (shots []shot, err error) {
	for _, c := range p.batch.cuts {
		if err := wait(ctx, p.batch.pause(c.cell)); err != nil {
			return shots, err
		}
		s := p.cut(ctx, c)
		if err := errors.Join(ctx.Err(), p.load.Err()); err != nil {
			return shots, err
		}
		shots = append(shots, s)
		if errors.Is(s.err, backup.ErrLeft) {
			return shots, s.err
		}
		said := "cut"
		if s.err != nil {
			said = s.err.Error()
		}
		p.tell("%s: %s", c.cell.Conditions(), said)
	}
	return shots, nil
}

// cut takes one, and with it what was promised until then.
func (p *production) cut(ctx context.Context, plan planned) shot {
	c := plan.cell
	s := shot{cell: c, at: time.Now().UTC()}
	for _, r := range plan.recoveries {
		s.ways = append(s.ways, Way{Recovery: r})
	}
	members := time.Duration(c.Volumes)
	s.manifest, s.err = p.a.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: c.Mode, Skew: c.Skew(), Backward: c.Order == Backward, FastCheckpoint: true,
		Deadline: 2*members*c.Skew() + 2*time.Minute, Quick: 5 * time.Second, Rounds: 20, KeepAway: []string{p.pool, p.Out}, AllowForeign: p.load.Files != nil,
		BeforeFreeze: func(ctx context.Context) error {
			if c.Checkpoint != CheckpointBefore {
				return nil
			}
			return p.checkpoint(ctx)
		}})
	if s.err != nil {
		return s
	}
	// Without backup mode the first request and the last answer bound the cut,
	// also where nothing was held: all members hold what was flushed before the
	// first, none what was sent after the last.
	alone := s.manifest
	alone.Bracket = nil
	first, last := alone.Span()
	if s.err = wait(ctx, time.Until(last.Add(time.Second))); s.err != nil {
		return s
	}
	s.stall = p.load.Words.Stall(first.Add(-time.Second), last.Add(time.Second)).Length
	for i := range s.ways {
		w := &s.ways[i]
		switch {
		case w.Recovery == Crash:
		case s.manifest.Bracket != nil:
			first, last = s.manifest.Span()
		default:
			if w.Target, first, last, s.err = p.beyond(ctx); s.err != nil {
				return s
			}
		}
		promise := p.load.PromiseUntil(first, last)
		promise.Facts = &p.facts
		w.Promise = &promise
	}
	return s
}

func (p *production) checkpoint(ctx context.Context) error {
	conn, err := p.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "CHECKPOINT"); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
