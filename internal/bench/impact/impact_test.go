package main_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cleancut/internal/evidence"
	"cleancut/internal/lab"
	"cleancut/internal/lab/labtest"
)

// listener calls heard once a program has said something.
type listener struct {
	sync.Mutex
	said   bytes.Buffer
	wanted string // "": nothing
	heard  func()
}

func (l *listener) Write(b []byte) (int, error) {
	l.Lock()
	defer l.Unlock()
	n, err := l.said.Write(b)
	if l.wanted != "" && strings.Contains(l.said.String(), l.wanted) {
		l.wanted = ""
		l.heard()
	}
	return n, err
}

// bound lists what limits block devices, and the memory cgroups that are there.
func bound(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob("/sys/fs/cgroup/blkio/blkio.throttle.*_device")
	if err != nil || len(files) == 0 {
		t.Fatalf("no throttling by cgroups of version 1: %v", err)
	}
	var out strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	groups, err := exec.CommandContext(t.Context(), "find", "/sys/fs/cgroup/memory", "-name", "cleancut-impact-*").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, groups)
	}
	return out.String() + string(groups)
}

func TestAMeasurementThatIsInterruptedLeavesNothingAndGoesOn(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real devices and servers: run `make test`")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: loop devices and cgroups")
	}
	bin, work, docs := t.TempDir(), labtest.Folder(t), t.TempDir()
	for _, program := range []string{"./cmd/cleancut", "./internal/bench/impact"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", bin+"/", program)
		cmd.Dir = "../../.."
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	before := bound(t)
	run := func(l *listener) error {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "impact"), "-program", filepath.Join(bin, "cleancut"), "-docs", docs, "-work", work, "-tools", "cleancut-freeze,pg_dumpall",
			"-scale", "1", "-memory", "300M", "-checkpoint", "30s", "-warm-up", "1s", "-alone", "2s", "-after", "2s", "-repeats", "1", "-sizes", "40M", "-extents", "2000", "-backups", "1", "-restores", "1")
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
		cmd.Stdout, cmd.Stderr = l, l
		l.heard = func() { _ = cmd.Process.Signal(syscall.SIGINT) } // one that has ended fails below
		err := cmd.Run()
		if left, lerr := lab.Left(work); lerr != nil || len(left) > 0 {
			t.Fatalf("left: %q, %v\n%s", left, lerr, l.said.String())
		}
		if entries, err := os.ReadDir(work); err != nil || len(entries) > 0 {
			t.Errorf("left in the folder for work: %v, %v", entries, err)
		}
		if after := bound(t); after != before {
			t.Errorf("limits and groups: got %q, before there were %q", after, before)
		}
		return err
	}

	first := &listener{wanted: "pair 2 of 2"}
	if err := run(first); err == nil || !strings.Contains(first.said.String(), "the same command goes on") {
		t.Fatalf("interrupted: %v\n%s", err, first.said.String())
	}
	if _, err := os.Stat(filepath.Join(docs, "evidence.md")); err == nil {
		t.Error("an interrupted measurement wrote the page")
	}
	second := &listener{}
	if err := run(second); err != nil {
		t.Fatalf("%v\n%s", err, second.said.String())
	}
	if !strings.Contains(second.said.String(), "pair 1 of 1") {
		t.Errorf("it did not go on after the first pair:\n%s", second.said.String())
	}
	d, err := evidence.Read(filepath.Join(docs, "evidence"))
	if err != nil || len(d.Impacts) != 1 {
		t.Fatalf("data: %v", err)
	}
	if len(d.Impacts[0].Pairs) != 2 || len(d.Impacts[0].Sizes) != 2 {
		t.Errorf("%d pairs and %d sizes, want 2 and 2", len(d.Impacts[0].Pairs), len(d.Impacts[0].Sizes))
	}
	for _, p := range d.Impacts[0].Pairs {
		if p.Alone.Transactions == 0 || p.With.Transactions == 0 || p.Alone.Written == 0 || (p.Cut != nil) != (p.Tool == "cleancut-freeze") {
			t.Errorf("a pair without figures: %+v", p)
		}
	}
	page, err := os.ReadFile(filepath.Join(docs, "evidence.md"))
	if err != nil || string(page) != evidence.Page(d) {
		t.Errorf("the page is not what the data give: %v", err)
	}
	t.Logf("NOTE %s", strings.ReplaceAll(second.said.String(), "\n", "; "))
}
