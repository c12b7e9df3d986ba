package load

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// TransfersOptions says how Transfers works. Zero values mean the defaults.
type TransfersOptions struct {
	Sessions int   // default 2, at most 64
	Seed     int64 // default 1
}

// Transfers is beater C: transactions like pgbench's. Each adds a random
// amount to an account, to a teller and to the branch of both, and writes it
// into play.transfers; so for every branch four sums agree, always. Each
// transaction is one round trip (an implicit transaction of four pipelined
// statements). Its ids are promised as those of Words are.
// Use each Transfers for one Start.
type Transfers struct {
	crew
	options  TransfersOptions
	branches int64
	accounts int64 // of a branch
}

// NewTransfers makes the beater; Start lets it work.
func NewTransfers(o TransfersOptions) *Transfers {
	if o.Sessions <= 0 {
		o.Sessions = 2
	}
	if o.Seed == 0 {
		o.Seed = 1
	}
	return &Transfers{crew: crew{name: transfersName}, options: o}
}

// transferSteps run in this order in every session, so none waits for
// another in a circle.
func transferSteps() []string {
	return []string{
		`insert into play.transfers (stream, id, bid, tid, aid, delta) values ($1, $2, $3, $4, $5, $6)`,
		`update play.accounts set balance = balance + $2 where aid = $1`,
		`update play.tellers set balance = balance + $2 where tid = $1`,
		`update play.branches set balance = balance + $2 where bid = $1`,
	}
}

// Start connects the sessions and sets them going; cancelling ctx ends them
// cleanly. The error is that of connecting, or of an empty bank.
func (t *Transfers) Start(ctx context.Context, connect Connect) error {
	works := make([]work, t.options.Sessions)
	for i := range works {
		works[i] = t.transfer
	}
	return t.launch(ctx, connect, t.measure, works...)
}

func (t *Transfers) measure(ctx context.Context, conn *pgx.Conn) error {
	err := conn.QueryRow(ctx, `select coalesce(max(bid), 0), coalesce((select max(aid) from play.accounts), 0) from play.branches`).Scan(&t.branches, &t.accounts)
	if err != nil {
		return fmt.Errorf("measure the bank: %w", err)
	}
	if t.branches == 0 || t.accounts < t.branches {
		return fmt.Errorf("the bank has %d branches and %d accounts: make the play database first", t.branches, t.accounts)
	}
	t.accounts /= t.branches
	return nil
}

func (t *Transfers) transfer(ctx context.Context, s *session) error {
	pc := s.conn.PgConn()
	names := []string{"log", "account", "teller", "branch"}
	for i, sql := range transferSteps() {
		if _, err := pc.Prepare(ctx, names[i], sql, nil); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	defer s.onCancel(ctx)()
	random := rand.New(rand.NewPCG(uint64(t.options.Seed), uint64(s.n)))
	binaries := []int16{1}
	for !s.quitting() && ctx.Err() == nil {
		bid := 1 + random.Int64N(t.branches)
		tid := (bid-1)*tellersPerBank + 1 + random.Int64N(tellersPerBank)
		aid := (bid-1)*t.accounts + 1 + random.Int64N(t.accounts)
		delta := int8bytes(random.Int64N(10_001) - 5_000)
		id := s.send()
		var b pgconn.Batch
		b.ExecPrepared(names[0], [][]byte{int8bytes(s.stream), int8bytes(id), int4bytes(bid), int4bytes(tid), int8bytes(aid), delta}, binaries, nil)
		b.ExecPrepared(names[1], [][]byte{int8bytes(aid), delta}, binaries, nil)
		b.ExecPrepared(names[2], [][]byte{int4bytes(tid), delta}, binaries, nil)
		b.ExecPrepared(names[3], [][]byte{int4bytes(bid), delta}, binaries, nil)
		if err := pc.ExecBatch(context.Background(), &b).Close(); err != nil {
			return fmt.Errorf("transfer %d: %w", id, err)
		}
		s.ack(time.Now())
	}
	return nil
}

func int8bytes(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
func int4bytes(n int64) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }

// Promise is what the server promised by acknowledging at before or earlier;
// see Words.Promise.
func (t *Transfers) Promise(before time.Time) Promise {
	return Promise{Before: before, Transfers: t.streams(before, time.Time{})}
}

// PromiseUntil is Promise for a copy that holds nothing later than until.
func (t *Transfers) PromiseUntil(before, until time.Time) Promise {
	return Promise{Before: before, Transfers: t.streams(before, until)}
}
