package main_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	disks "cleancut/internal/lab"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/local"
)

// block is what a page lets an operator type, and what it shows as printed.
type block struct {
	line          int
	typed, output string
	reboot        bool // the machine is rebooted before it
}

// blocks takes from a page what stands below "<!-- run: -->", and the output
// right below it, if it is shown.
func blocks(page string) []block {
	var out []block
	var b block
	var text []string
	run, reboot, typed := false, false, false // typed: b has its commands, and its output may follow
	within := ""
	for i, line := range strings.Split(page, "\n") {
		switch {
		case within != "" && line != "```":
			text = append(text, line)
		case within == "output":
			b.output = strings.Join(text, "\n")
			out, typed, within = append(out, b), false, ""
		case within == "typed":
			b.typed = strings.Join(text, "\n")
			typed, within = true, ""
		case within != "":
			within = ""
		case line == "```text" && typed:
			within, text = "output", nil
		case line != "" && typed:
			out, typed = append(out, b), false
			fallthrough
		default:
			run = run || strings.HasPrefix(line, "<!-- run:")
			reboot = reboot || strings.HasPrefix(line, "<!-- reboot")
			if line == "```sh" && run {
				b, within, text, run, reboot = block{line: i + 1, reboot: reboot}, "typed", nil, false, false
			} else if strings.HasPrefix(line, "```") {
				within, text = "shown", nil
			}
		}
	}
	return out
}

// words is a text without what differs from run to run: all that has a digit,
// and doctor's warning about what was deleted in the last minutes.
func words(text string) string {
	var out []string
	for line := range strings.Lines(text) {
		var keep []string
		for _, w := range strings.Fields(line) {
			if !strings.ContainsAny(w, "0123456789") && strings.Trim(w, "-+|") != "" {
				keep = append(keep, w)
			}
		}
		if len(keep) > 0 && keep[0] != "warn" {
			out = append(out, strings.Join(keep, " "))
		}
	}
	return strings.Join(out, "\n")
}

// machine is the guest as an operator's host.
type machine struct{ env string }

// sh runs what is typed in a shell as root; what it exports stays for the next.
func (m machine) sh(t testing.TB, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/bash", "-c", "set -e; test ! -f "+m.env+" || . "+m.env+"\n"+script+"\nexport -p > "+m.env)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%s%v", script, out, err)
	}
	return string(out)
}

// original builds the cluster of the page with backups and shipped WAL, and
// loses it.
const original = `
install -m 0755 BINARY /usr/local/bin/cleancut
rm -rf /etc/postgresql/15/main
install -d -o postgres -g postgres /var/run/postgresql /var/log/postgresql /srv/cleancut/catalog
install -d /srv/cleancut/pool
cat > /etc/cleancut.toml <<'END'
catalog = "file:///srv/cleancut/catalog"
state = "/var/lib/cleancut-db1"
host = "db1"
[provider.local]
pool = "/srv/cleancut/pool"
END
cleancut storage create pg --mount /srv/pg --volumes 4 --size 400M
install -d -o postgres -g postgres -m 0700 /srv/pg/15
pg_createcluster 15 main -d /srv/pg/15/main -- --data-checksums
cat >> /etc/postgresql/15/main/postgresql.conf <<'END'
listen_addresses = 'localhost'
archive_mode = on
archive_command = 'cleancut wal push %p'
wal_keep_size = 0
END
pg_ctlcluster 15 main start
runuser -u postgres -- psql -X -c "CREATE DATABASE play"
runuser -u postgres -- psql -X -d play -c "CREATE TABLE heartbeat (at timestamptz DEFAULT now())" -c "INSERT INTO heartbeat SELECT now() FROM generate_series(1, 1000)" \
  -c "SELECT pg_create_physical_replication_slot('standby1')" -c "SELECT pg_switch_wal()"
cleancut backup
runuser -u postgres -- psql -X -d play -c "INSERT INTO heartbeat SELECT now() FROM generate_series(1, 234)" -c "SELECT pg_switch_wal()" -c "CHECKPOINT"
until ! ls /srv/pg/15/main/pg_wal/archive_status | grep -q ready; do :; done
pg_ctlcluster 15 main stop -m immediate || true
cleancut storage destroy pg
rm -r /etc/postgresql/15/main /etc/cleancut.toml /var/lib/cleancut-db1 /srv/pg /var/lib/postgresql/15/main
pg_createcluster 15 main --start
`

// TestTheRunbookWordForWord follows docs/runbook.md on a Debian machine that
// lost its cluster, and compares what is printed with what the page shows.
func TestTheRunbookWordForWord(t *testing.T) {
	if !labtest.Here(t, labtest.Guest) {
		return
	}
	page, err := os.ReadFile("../../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	todo := blocks(string(page))
	if len(todo) < 9 {
		t.Fatalf("the page has %d blocks to run", len(todo))
	}
	if err := os.MkdirAll("/srv", 0o755); err != nil {
		t.Fatal(err)
	}
	undo, err := disks.Pool(t.Context(), "/srv/cleancut", "xfs", 8<<30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	m := machine{env: filepath.Join(t.TempDir(), "environment")}
	t.Cleanup(func() { // of a run that failed
		d := detached{t}
		out, err := exec.CommandContext(d.Context(), "/bin/bash", "-c", "pg_ctlcluster 15 main stop -m immediate; cleancut --cluster main storage destroy main; true").CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	m.sh(t, strings.ReplaceAll(original, "BINARY", binary(t)))
	for _, b := range todo {
		if b.reboot {
			m.reboot(t)
		}
		got := m.sh(t, b.typed)
		t.Logf("NOTE line %d\n$ %s\n%s", b.line, b.typed, got)
		if b.output != "" && words(got) != words(b.output) {
			t.Errorf("line %d of docs/runbook.md printed\n%s\nthe page says\n%s", b.line, words(got), words(b.output))
		}
	}
}

// reboot takes everything away that a reboot does, and then does what the
// machine does at boot.
func (m machine) reboot(t *testing.T) {
	t.Helper()
	m.sh(t, "pg_ctlcluster 15 main stop\numount /srv/pg\nmdadm --stop --scan")
	p, err := local.Open(t.Context(), "/srv/cleancut/pool", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	inv, err := p.List(t.Context(), backup.Tags{backup.TagStorage: "main"})
	if err != nil || len(inv.Volumes) != 4 {
		t.Fatalf("%d volumes of storage main, %v", len(inv.Volumes), err)
	}
	var devices []string
	for _, v := range inv.Volumes {
		devices = append(devices, v.Attached)
	}
	err = host.Release(t.Context(), devices)
	for _, v := range inv.Volumes {
		err = errors.Join(err, p.Detach(t.Context(), v.ID))
	}
	if err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("/etc/systemd/system/cleancut-storage-main.service")
	if err != nil {
		t.Fatal(err)
	}
	start := regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindSubmatch(unit)
	environment := regexp.MustCompile(`(?m)^Environment=(.*)$`).FindSubmatch(unit)
	m.sh(t, "env "+string(environment[1])+" "+string(start[1])+"\nmountpoint -q /srv/pg\npg_ctlcluster 15 main start")
}
