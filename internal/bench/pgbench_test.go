package bench_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

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

// transaction is one line of pgbench's log.
type transaction struct{ from, to time.Time }

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
func (c *client) stop(b *testing.B) (all []transaction, perSecond float64) {
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
		text, err := os.ReadFile(file)
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, transactions(text)...)
	}
	return all, float64(len(all)) / took.Seconds()
}

// transactions reads pgbench's log (pgbench(1), "Per-Transaction Logging"):
// client, number, microseconds, script, and the end's seconds and microseconds.
func transactions(log []byte) []transaction {
	var out []transaction
	for s := bufio.NewScanner(bytes.NewReader(log)); s.Scan(); {
		var client, number, took, script, seconds, micro int64
		if n, _ := fmt.Sscan(s.Text(), &client, &number, &took, &script, &seconds, &micro); n < 6 {
			continue // the last line may be cut short
		}
		end := time.Unix(seconds, micro*1000)
		out = append(out, transaction{end.Add(-time.Duration(took) * time.Microsecond), end})
	}
	return out
}

// slowest returns the longest transaction that was under way in an interval.
func slowest(all []transaction, from, to time.Time) time.Duration {
	var out time.Duration
	for _, t := range all {
		if t.to.After(from) && t.from.Before(to) {
			out = max(out, t.to.Sub(t.from))
		}
	}
	return out
}

func TestTheSlowestTransactionIsOfThoseUnderWay(t *testing.T) {
	all := transactions([]byte("0 1 500000 0 100 0\n1 1 2000000 0 103 0\n0 2 1000 0 103 500000\n0 3 10"))
	if got, want := len(all), 3; got != want {
		t.Fatalf("read %d transactions, want %d", got, want)
	}
	for _, c := range []struct {
		name     string
		from, to int64
		want     time.Duration
	}{
		{"one began before and ended inside", 102, 104, 2 * time.Second},
		{"one was under way all the time", 102, 102, 2 * time.Second},
		{"none was", 105, 106, 0},
	} {
		if got := slowest(all, time.Unix(c.from, 0), time.Unix(c.to, 0)); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}
