package main_test

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
)

func (o outcome) copied(t *testing.T) (c backup.Copy) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(o.out))
	if err := dec.Decode(&c); err != nil || dec.More() {
		t.Fatalf("%v: exit %d\n%s%s", err, o.code, o.out, o.err)
	}
	return c
}

// serves fails the test unless the copy answers.
func serves(t *testing.T, c backup.Copy) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "psql", "-XAtq", "-h", c.SocketDir, "-p", "5432", "-U", c.Superuser, "-c", "SELECT count(*) FROM ledger WHERE n < 0", "postgres").CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "2000" {
		t.Errorf("the copy: %v\n%s", err, out)
	}
}

func TestHydration(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	id := string(p.backup(t))
	root := filepath.Join(p.dir, "copy", "a")
	t.Run("without it both are told apart", func(t *testing.T) {
		o := p.must(t, "restore", id, "--to", root, "--json")
		c := o.copied(t)
		if !strings.Contains(o.out, `"hydrated": null`) || c.Answered <= c.FirstQuery || c.FirstQuery <= 0 {
			t.Errorf("got %s", o.out)
		}
		p.must(t, "restore", "--undo", root)
	})
	t.Run("with it every volume is read and both times are kept", func(t *testing.T) {
		o := p.must(t, "restore", id, "--to", root, "--hydrate", "--json")
		c := o.copied(t)
		golden(t, "json/restore-hydrate.txt", shape(t, o.out))
		h := c.Hydrated
		if h == nil || !h.Complete || len(h.Volumes) != 3 || h.Size != 3*400<<20 || h.Bytes != h.Size || h.Seconds <= 0 || h.SinceRestore < c.Answered+h.Seconds {
			t.Errorf("got %s", o.out)
		}
		if kept := p.copies(t); len(kept) != 1 || kept[0].Hydrated == nil || kept[0].Hydrated.SinceRestore != h.SinceRestore || kept[0].Answered != c.Answered {
			t.Errorf("the copy's record says %+v", kept)
		}
		serves(t, c)
		p.must(t, "restore", "--undo", root)
	})
	t.Run("as text", func(t *testing.T) {
		o := p.must(t, "restore", id, "--to", root, "--hydrate", "--hydrate-rate", "2G")
		for _, want := range []string{`first query [0-9.]+ s after the start of its server, [0-9.]+ s after that of the restore`, `hydrated [0-9.]+ s after the start of the restore: 1.17 GiB of 3 volumes read in [0-9.]+ s`} {
			if !regexp.MustCompile(want).MatchString(o.out) {
				t.Errorf("nothing says %q:\n%s", want, o.out)
			}
		}
		p.must(t, "restore", "--undo", root)
	})
	t.Run("interrupted, the copy stays and can be read on", func(t *testing.T) { p.interruptedHydration(t, id, root) })
	t.Run("killed, the copy stays", func(t *testing.T) {
		o := p.runWith(t, []string{"CLEANCUT_FAULT=" + p.atHydration(t, id, root, "kill")}, "restore", id, "--to", root, "--hydrate")
		if o.code != -1 {
			t.Fatalf("exit %d, want it killed\n%s", o.code, o.err)
		}
		p.must(t, "sweep")
		c := p.copies(t)
		if len(c) != 1 {
			t.Fatalf("ledgers %+v", c)
		}
		serves(t, c[0])
		p.must(t, "restore", "--undo", root)
	})
	t.Run("a volume that cannot be read", func(t *testing.T) {
		o := p.runWith(t, []string{"CLEANCUT_FAULT=" + p.atHydration(t, id, root, "error")}, "restore", id, "--to", root, "--hydrate", "--json")
		o.refused(t, 1, "the copy at "+root+" is up and stays", "hydrate.read", "restore --hydrate --to "+root)
		c := o.copied(t)
		if c.Hydrated == nil || c.Hydrated.Complete || c.Hydrated.Bytes != 2*400<<20 || c.Hydrated.SinceRestore != 0 {
			t.Errorf("got %s", o.out)
		}
		serves(t, c)
		p.must(t, "restore", "--undo", root)
	})
	p.run(t, "restore", "--hydrate", "--to", root).refused(t, 1, "no copy at "+root)
	p.clean(t)
}

// atHydration finds the first point of a hydration.
func (p *production) atHydration(t *testing.T, id, root, action string) string {
	t.Helper()
	points := p.must(t, "restore", id, "--to", root, "--hydrate").points
	p.must(t, "restore", "--undo", root)
	for i, name := range points {
		if name == "hydrate.read" {
			return action + "@" + strconv.Itoa(i+1)
		}
	}
	t.Fatalf("no such point in %q", points)
	return ""
}

// interruptedHydration ends the command while it reads, slowly.
func (p *production) interruptedHydration(t *testing.T, id, root string) {
	o, reached := p.stopped(t, "hydrate.read", nil, func(cmd *exec.Cmd) { _ = cmd.Process.Signal(syscall.SIGINT) }, "restore", id, "--to", root, "--hydrate", "--hydrate-rate", "1M", "--json")
	if !reached {
		t.Fatalf("it ended before\n%s", o.err)
	}
	o.refused(t, 1, "the copy at "+root+" is up and stays", "of 1.17 GiB were read", "restore --hydrate --to "+root, "restore --undo "+root)
	c := o.copied(t)
	if h := c.Hydrated; h == nil || h.Complete || h.Bytes >= h.Size {
		t.Errorf("got %s", o.out)
	}
	serves(t, c)
	if o := p.must(t, "sweep", "--dry-run"); !strings.Contains(o.out, "meant to stay") {
		t.Errorf("sweep says\n%s", o.out)
	}
	again := p.must(t, "restore", "--hydrate", "--to", root, "--json").copied(t)
	if again.ID != c.ID || again.Hydrated == nil || !again.Hydrated.Complete {
		t.Errorf("read on: %+v", again)
	}
	p.must(t, "restore", "--undo", root)
}
