package load

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// ChurnOptions says how Churn works. Zero values mean the defaults.
type ChurnOptions struct {
	Sessions        int           // default 1, at most 63
	Rows            int           // of each table; default 2,000
	Keep            int           // tables of a session that live at the same time; default 4
	SwitchEvery     time.Duration // pg_switch_wal; default 10 s, negative is never
	CheckpointEvery time.Duration // CHECKPOINT; default never. See HeavySettings
}

// Churn is beater D: it creates tables, fills and indexes them, empties,
// vacuums, truncates and drops them, so that files come and go all the time,
// and lets the server end WAL segments early. It needs a superuser (for
// pg_switch_wal and CHECKPOINT). Its operations are tables made. When it ends
// cleanly its tables are gone; Start drops what is left of an earlier one, so
// run one Churn at a time. Use each Churn for one Start.
type Churn struct {
	crew
	options ChurnOptions
}

// NewChurn makes the beater; Start lets it work.
func NewChurn(o ChurnOptions) *Churn {
	if o.Sessions <= 0 {
		o.Sessions = 1
	}
	if o.Rows <= 0 {
		o.Rows = 2_000
	}
	if o.Keep <= 0 {
		o.Keep = 4
	}
	if o.SwitchEvery == 0 {
		o.SwitchEvery = 10 * time.Second
	}
	return &Churn{crew: crew{name: "churn"}, options: o}
}

// Start connects the sessions and sets them going; cancelling ctx ends them
// cleanly, but for their tables. The error is that of connecting.
func (c *Churn) Start(ctx context.Context, connect Connect) error {
	works := make([]work, c.options.Sessions)
	for i := range works {
		works[i] = c.churn
	}
	if c.options.CheckpointEvery > 0 {
		works = append(works, c.checkpoint)
	}
	return c.launch(ctx, connect, dropChurn, works...)
}

func dropChurn(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'play' and tablename ~ '^churn_[0-9]+_[0-9]+$'`)
	if err != nil {
		return fmt.Errorf("list churn tables: %w", err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list churn tables: %w", err)
	}
	for _, name := range names {
		if _, err := conn.Exec(ctx, `drop table `+name); err != nil {
			return fmt.Errorf("drop %s: %w", name, err)
		}
	}
	return nil
}

func (c *Churn) churn(ctx context.Context, s *session) error {
	switched := time.Now()
	name := func(i int64) string { return fmt.Sprintf("play.churn_%d_%d", s.n, i) }
	var made, dropped int64
	run := func(what, sql string) error {
		if _, err := s.conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
	for !s.quitting() && ctx.Err() == nil {
		n := s.send()
		if err := c.make(run, name(n)); err != nil {
			return err
		}
		s.ack(time.Now())
		made = n
		if made-dropped > int64(c.options.Keep) {
			dropped++
			if err := unmake(run, name(dropped), dropped); err != nil {
				return err
			}
		}
		if c.options.SwitchEvery > 0 && time.Since(switched) >= c.options.SwitchEvery {
			switched = time.Now()
			if err := run("switch WAL", `select pg_switch_wal()`); err != nil {
				return err
			}
		}
	}
	for ctx.Err() == nil && dropped < made {
		dropped++
		if err := run("drop "+name(dropped), `drop table `+name(dropped)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Churn) make(run func(what, sql string) error, table string) error {
	err := run("create "+table, fmt.Sprintf(`create table %s (id int, word text)`, table))
	if err == nil {
		err = run("fill "+table, fmt.Sprintf(`insert into %s select i, md5(i::text) from generate_series(1, %d) i`, table, c.options.Rows))
	}
	if err == nil {
		err = run("index "+table, fmt.Sprintf(`create index on %s (word)`, table))
	}
	return err
}

// unmake ends a table in one of three ways in turn: emptied and vacuumed (the
// files are cut short), truncated (new files), or as it is; then dropped.
func unmake(run func(what, sql string) error, table string, n int64) error {
	var err error
	switch n % 3 {
	case 0:
		if err = run("empty "+table, `delete from `+table); err == nil {
			err = run("vacuum "+table, `vacuum `+table)
		}
	case 1:
		err = run("truncate "+table, `truncate `+table)
	}
	if err == nil {
		err = run("drop "+table, `drop table `+table)
	}
	return err
}

// checkpoint orders checkpoints; the journal does not count them.
func (c *Churn) checkpoint(ctx context.Context, s *session) error {
	for !s.quitting() && ctx.Err() == nil {
		s.pause(ctx, c.options.CheckpointEvery)
		if s.quitting() || ctx.Err() != nil {
			break
		}
		if _, err := s.conn.Exec(ctx, `checkpoint`); err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
	}
	return nil
}
