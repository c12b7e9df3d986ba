package load

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Connect opens one connection to the server under load.
type Connect func(ctx context.Context) (*pgx.Conn, error)

const (
	// stopGrace is how long Stop waits for the operations under way, before
	// it breaks the connections. A frozen filesystem blocks them for long.
	stopGrace    = 10 * time.Second
	closeTimeout = 2 * time.Second
	awaitEvery   = 5 * time.Millisecond
	maxSessions  = 64

	wordsName     = "words"
	transfersName = "transfers"
)

// crew is the sessions of one beater: their start, their end and their
// journals. Its methods are those of every beater. All may be called at any
// time and at the same time, also before Start and after Stop.
type crew struct {
	name string

	mu       sync.Mutex
	started  time.Time
	ended    time.Time
	journals []*journal
	quit     chan struct{} // closed: finish what is under way, begin nothing
	kill     context.CancelFunc
	done     chan struct{}
	err      error
}

// session is one connection of a beater, used by one goroutine.
type session struct {
	n    int       // 0 for the first of its beater
	conn *pgx.Conn // nil: the beater has none to the server
	*journal
	quit <-chan struct{}
}

// quitting tells a session to begin nothing more.
func (s *session) quitting() bool {
	select {
	case <-s.quit:
		return true
	default:
		return false
	}
}

// pause waits for d, or until the session has to end.
func (s *session) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.quit:
	case <-ctx.Done():
	case <-t.C:
	}
}

// work is what a session does until it is quitting or its ctx is done.
type work func(ctx context.Context, s *session) error

// launch connects one session for each work, unless connect is nil, and sets
// them going. It returns when all are connected, or closes those that are.
func (c *crew) launch(ctx context.Context, connect Connect, prepare func(context.Context, *pgx.Conn) error, works ...work) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done != nil {
		return fmt.Errorf("start %s: it was started before", c.name)
	}
	if len(works) > maxSessions {
		return fmt.Errorf("start %s: %d sessions, at most %d", c.name, len(works), maxSessions)
	}
	conns, err := connectAll(ctx, connect, len(works))
	if err == nil && prepare != nil {
		err = prepare(ctx, conns[0])
	}
	if err != nil {
		closeAll(ctx, conns)
		return fmt.Errorf("start %s: %w", c.name, err)
	}
	c.started = time.Now()
	c.quit, c.done = make(chan struct{}), make(chan struct{})
	ctx, c.kill = context.WithCancel(ctx)
	// Streams of several runs on one database must differ. Should two runs
	// begin in the same millisecond, the primary key refuses the second.
	first := c.started.UnixMilli() * maxSessions
	var group sync.WaitGroup
	for i, conn := range conns {
		s := &session{n: i, conn: conn, quit: c.quit, journal: &journal{stream: first + int64(i), base: c.started}}
		c.journals = append(c.journals, s.journal)
		group.Go(func() { c.run(ctx, s, works[i]) })
	}
	go func() {
		group.Wait()
		c.kill()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended = time.Now()
		close(c.done)
	}()
	return nil
}

func (c *crew) run(ctx context.Context, s *session, do work) {
	err := do(ctx, s)
	if err != nil && ctx.Err() == nil {
		c.mu.Lock()
		c.err = errors.Join(c.err, fmt.Errorf("%s, session %d: %w", c.name, s.n+1, err))
		c.mu.Unlock()
		c.kill()
	}
	closeAll(ctx, []*pgx.Conn{s.conn})
}

func connectAll(ctx context.Context, connect Connect, n int) ([]*pgx.Conn, error) {
	if connect == nil {
		return make([]*pgx.Conn, n), nil
	}
	var conns []*pgx.Conn
	for range n {
		conn, err := connect(ctx)
		if err != nil {
			return conns, fmt.Errorf("connect: %w", err)
		}
		conns = append(conns, conn)
		// A freeze blocks statements for long; a time limit of the server's
		// must not end them. A promise needs synchronous commits.
		_, err = conn.Exec(ctx, `set statement_timeout = 0; set lock_timeout = 0;
			set idle_in_transaction_session_timeout = 0; set synchronous_commit = on`)
		if err != nil {
			return conns, fmt.Errorf("set up session: %w", err)
		}
	}
	return conns, nil
}

func closeAll(ctx context.Context, conns []*pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	for _, conn := range conns {
		if conn != nil {
			_ = conn.Close(ctx) // of a connection whose fate is known already
		}
	}
}

// onCancel breaks the connection when ctx is done, so that the statements on
// it can run under context.Background, which spares pgconn its watcher (a
// goroutine for each statement; dear in a slow guest). Call the result when
// the session ends.
func (s *session) onCancel(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() { _ = s.conn.PgConn().Conn().SetDeadline(time.Unix(1, 0)) })
}

// Stop lets the operations under way end, begins no more and waits. After ten
// seconds it breaks the connections instead. It returns Err.
func (c *crew) Stop() error {
	c.mu.Lock()
	quit, done, kill := c.quit, c.done, c.kill
	if quit != nil {
		select {
		case <-quit:
		default:
			close(quit)
		}
	}
	c.mu.Unlock()
	if quit == nil {
		return nil
	}
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-done:
	case <-grace.C:
		kill()
		<-done
	}
	return c.Err()
}

// Err returns what ended the sessions, if it was not Stop or the context.
func (c *crew) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Done is closed when all sessions have ended. It is nil, so never ready,
// before Start.
func (c *crew) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done
}

// Count is the number of operations acknowledged by the server.
func (c *crew) Count() int64 {
	var n int64
	for _, j := range c.list() {
		_, acked := j.counts()
		n += acked
	}
	return n
}

// Sent is the number of operations sent to the server, acknowledged or not.
func (c *crew) Sent() int64 {
	var n int64
	for _, j := range c.list() {
		sent, _ := j.counts()
		n += sent
	}
	return n
}

// AckedBefore is the number of operations acknowledged at t or before. It
// costs microseconds. Take t from time.Now in this process: only then does
// the monotonic clock decide.
func (c *crew) AckedBefore(t time.Time) int64 {
	var n int64
	for _, j := range c.list() {
		n += j.ackedBefore(t)
	}
	return n
}

// Await returns when at least n operations were acknowledged. It fails when
// the beater ends before that, or with ctx.
func (c *crew) Await(ctx context.Context, n int64) error {
	tick := time.NewTicker(awaitEvery)
	defer tick.Stop()
	for c.Count() < n {
		select {
		case <-ctx.Done():
			return fmt.Errorf("await %d of %s, have %d: %w", n, c.name, c.Count(), context.Cause(ctx))
		case <-c.Done():
			if c.Count() >= n {
				return nil
			}
			return errors.Join(fmt.Errorf("%s ended after %d of %d", c.name, c.Count(), n), c.Err())
		case <-tick.C:
		}
	}
	return nil
}

func (c *crew) list() []*journal {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.journals)
}

// span is the time from Start to the end, or to now.
func (c *crew) span() (from, to time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	from, to = c.started, c.ended
	if to.IsZero() && !from.IsZero() {
		to = time.Now()
	}
	return from, to
}
