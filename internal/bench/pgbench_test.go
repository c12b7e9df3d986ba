package bench_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"cleancut/internal/evidence"
	"cleancut/internal/postgres/pgtest"
)

// client is a running pgbench that writes down every transaction.
type client struct {
	cmd    *exec.Cmd
	out    *bytes.Buffer
	prefix string
	began  time.Time
	ended  chan error
}

// pgbench starts PostgreSQL's own load, four sessions as fast as they can.
func (p *production) pgbench(b *testing.B) *client {
	b.Helper()
	dir := pgtest.Mkdir(b, filepath.Join(p.dir, "pgbench"))
	c := &client{out: &bytes.Buffer{}, prefix: filepath.Join(dir, fmt.Sprint(time.Now().UnixNano())), ended: make(chan error, 1), began: time.Now()}
	c.cmd = p.server.Command(b.Context(), "pgbench", "-n", "-c", "4", "-j", "2", "-T", "3600", "--log", "--log-prefix="+c.prefix, "postgres")
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	if err := c.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	go func() { c.ended <- c.cmd.Wait() }()
	b.Cleanup(func() { _ = c.cmd.Process.Kill() })
	return c
}

// stop ends it and returns every transaction but the last few, which it had
// not written out yet.
func (c *client) stop(b *testing.B) (all []evidence.Transaction, perSecond float64) {
	b.Helper()
	select {
	case err := <-c.ended:
		b.Fatalf("pgbench ended: %v\n%s", err, c.out)
	default:
	}
	took := time.Since(c.began)
	_ = c.cmd.Process.Kill()
	<-c.ended
	files, err := filepath.Glob(c.prefix + ".*")
	if err != nil || len(files) == 0 {
		b.Fatalf("no log of pgbench: %v", err)
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			b.Fatal(err)
		}
		some, err := evidence.Transactions(f)
		if err := errors.Join(err, f.Close()); err != nil {
			b.Fatal(err)
		}
		all = append(all, some...)
	}
	return all, float64(len(all)) / took.Seconds()
}

// slowest returns the longest transaction that was under way in an interval.
func slowest(all []evidence.Transaction, from, to time.Time) time.Duration {
	var out time.Duration
	for _, t := range all {
		if t.To.After(from) && t.From.Before(to) {
			out = max(out, t.To.Sub(t.From))
		}
	}
	return out
}

func TestTheSlowestTransactionIsOfThoseUnderWay(t *testing.T) {
	at := func(from, to int64) evidence.Transaction {
		return evidence.Transaction{From: time.Unix(from, 0), To: time.Unix(to, 0)}
	}
	all := []evidence.Transaction{at(99, 100), at(101, 103), at(103, 104)}
	for _, c := range []struct {
		name     string
		from, to int64
		want     time.Duration
	}{
		{"one began before and ended inside", 102, 105, 2 * time.Second},
		{"one was under way all the time", 102, 102, 2 * time.Second},
		{"none was", 105, 106, 0},
	} {
		if got := slowest(all, time.Unix(c.from, 0), time.Unix(c.to, 0)); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}
