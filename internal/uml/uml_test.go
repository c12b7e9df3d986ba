package uml_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/uml"
)

// result is what a guest run came to.
type result struct {
	status         int
	stdout, stderr string
}

// run runs a guest in a folder of its own and fails the test on runner trouble and on anything left behind.
func run(t *testing.T, g uml.Guest) result {
	t.Helper()
	r, err := try(t, t.Context(), g)
	if err != nil {
		t.Fatalf("run %q: %v\nstdout: %s\nstderr: %s", g.Args, err, r.stdout, r.stderr)
	}
	return r
}

// try is run for those who want the error.
func try(t *testing.T, ctx context.Context, g uml.Guest) (result, error) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	if missing := uml.Missing(); len(missing) > 0 {
		t.Fatalf("this host cannot run guests, it lacks: %s", strings.Join(missing, ", "))
	}
	if g.ScratchDir == "" {
		g.ScratchDir = t.TempDir()
	}
	if g.Timeout == 0 {
		g.Timeout = 5 * time.Minute
	}
	var stdout, stderr bytes.Buffer
	if g.Stdout == nil {
		g.Stdout = &stdout
	}
	if g.Stderr == nil {
		g.Stderr = &stderr
	}
	status, err := g.Run(ctx)
	nothingLeft(t, g.ScratchDir)
	return result{status, stdout.String(), stderr.String()}, err
}

// nothingLeft fails the test if a folder or a process of a guest under dir is still there. The kernel's helpers were killed, but may
// take a moment to be gone.
func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(dir, "cleancut-guest-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	deadline := time.Now().Add(5 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		left := processes(dir)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("processes left behind: %q", left)
			return
		}
		<-tick.C
	}
}

// processes lists the live processes whose command line names dir: all of a guest's do.
func processes(dir string) []string {
	var found []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		line, _ := os.ReadFile(file)
		if (bytes.Contains(line, []byte("linux.uml")) || bytes.Contains(line, []byte("cleancut-guard"))) && bytes.Contains(line, []byte(dir)) {
			found = append(found, strings.ReplaceAll(file+": "+string(line), "\x00", " "))
		}
	}
	return found
}

func sh(script string, args ...string) []string {
	return append([]string{"bash", "-c", script, "bash"}, args...)
}

func TestExitStatusIsTheProgramsOwn(t *testing.T) {
	t.Parallel()
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -KILL $$": 128 + 9, "kill -SEGV $$": 128 + 11} {
		t.Run(script, func(t *testing.T) {
			if got := run(t, uml.Guest{Args: sh(script)}).status; got != want {
				t.Errorf("got status %d, want %d", got, want)
			}
		})
	}
	t.Run("a program that is not there", func(t *testing.T) {
		if got := run(t, uml.Guest{Args: []string{"/no/such/program"}}).status; got != 127 {
			t.Errorf("got status %d, want 127", got)
		}
	})
}

func TestOutputIsSeparateAndComplete(t *testing.T) {
	t.Parallel()
	r := run(t, uml.Guest{Args: sh(`
		for i in {1..20000}; do echo "line $i of the output, fifty or so bytes long ........"; done
		for i in {1..3000}; do echo "error $i" >&2; done
		echo 'opened anew' >/dev/stderr; echo -n 'no newline'`)})
	var out, err strings.Builder
	for i := range 20000 {
		fmt.Fprintf(&out, "line %d of the output, fifty or so bytes long ........\n", i+1)
	}
	for i := range 3000 {
		fmt.Fprintf(&err, "error %d\n", i+1)
	}
	if want := out.String() + "no newline"; r.stdout != want {
		t.Errorf("got %d bytes on stdout, want %d", len(r.stdout), len(want))
	}
	if want := err.String() + "opened anew\n"; r.stderr != want {
		t.Errorf("got %d bytes on stderr, want %d", len(r.stderr), len(want))
	}
}

// firstLine reports when the first byte was written.
type firstLine struct {
	once sync.Once
	at   chan struct{}
}

func (f *firstLine) Write(p []byte) (int, error) {
	f.once.Do(func() { close(f.at) })
	return len(p), nil
}

func TestOutputComesWhileTheProgramRuns(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first := &firstLine{at: make(chan struct{})}
	go func() {
		<-first.at
		cancel()
	}()
	_, err := try(t, ctx, uml.Guest{Args: sh("echo now; sleep 1000"), Stdout: first, Timeout: time.Minute})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want one of the cancel that follows the first line", err)
	}
}

type brokenWriter struct{}

var errBroken = errors.New("broken writer")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestAWriterThatFailsEndsTheGuest(t *testing.T) {
	t.Parallel()
	_, err := try(t, t.Context(), uml.Guest{Args: sh("echo now; sleep 1000"), Stdout: brokenWriter{}, Timeout: time.Minute})
	if !errors.Is(err, errBroken) {
		t.Errorf("got error %v, want the writer's", err)
	}
}

func TestArgumentsAndEnvironmentArriveUnchanged(t *testing.T) {
	t.Parallel()
	args := []string{"", "a b", "'", `"`, "new\nline", `\`, "$HOME", "`id`", "*", "--", "-e", "ä€\xff", "X=1", strings.Repeat("l", 100000)}
	env := []string{"FIRST=1", "SPACE=a b'\"\n$HOME`id`", "EMPTY=", "odd name%=x", "FIRST=2", "PATH=/nowhere"}
	g := uml.Guest{Args: append([]string{"bash", "-c", `printf '%s\0' "$@"; cat /proc/self/environ >&2`, "bash"}, args...), Env: env, Dir: "/usr/share"}
	r := run(t, g)
	if want := strings.Join(args, "\x00") + "\x00"; r.stdout != want {
		t.Errorf("got arguments %.300q, want %.300q", r.stdout, want)
	}
	got := strings.Split(r.stderr, "\x00")
	for _, want := range []string{"FIRST=2", env[1], "EMPTY=", "CLEANCUT_GUEST=1", "PATH=/nowhere:/usr/sbin:/usr/bin:/sbin:/bin", "PWD=/usr/share"} {
		found := false
		for _, kv := range got {
			found = found || kv == want
		}
		if !found {
			t.Errorf("environment %q lacks %q", got, want)
		}
	}
}

func TestAProgramWithAnEqualsSignInItsPathRuns(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a=b, c:d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "prog ram")
	if err := os.WriteFile(program, []byte("#!/bin/sh\npwd\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := run(t, uml.Guest{Args: []string{program}, Dir: dir, ScratchDir: dir, Share: []string{dir}})
	if want := dir + "\n"; r.status != 0 || r.stdout != want {
		t.Errorf("got status %d, output %q, error %q, want %q", r.status, r.stdout, r.stderr, want)
	}
}

func TestOnlySharedFoldersAreWrittenThrough(t *testing.T) {
	t.Parallel()
	private, shared := t.TempDir(), t.TempDir()
	old := filepath.Join(private, "old")
	if err := os.WriteFile(old, []byte("host"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := run(t, uml.Guest{Share: []string{shared}, Args: sh(`set -e
		cd "$1"; cat old; echo guest >old; echo guest >new; mkdir sub; cat old
		cd "$2"; echo guest >new; mkdir sub; echo deep >sub/file; mv new renamed
		touch /etc/made-in-guest /usr/made-in-guest`, private, shared)})
	if r.status != 0 || r.stdout != "hostguest\n" {
		t.Fatalf("got status %d, %q, %q", r.status, r.stdout, r.stderr)
	}
	if got, _ := os.ReadFile(old); string(got) != "host" {
		t.Errorf("got %q in a file outside the share, want it untouched", got)
	}
	for _, path := range []string{private + "/new", private + "/sub", "/etc/made-in-guest", "/usr/made-in-guest", "/run/cleancut"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s came through to the host", path)
		}
	}
	for path, want := range map[string]string{"renamed": "guest\n", "sub/file": "deep\n"} {
		if got, err := os.ReadFile(filepath.Join(shared, path)); string(got) != want {
			t.Errorf("shared %s: got %q, %v, want %q", path, got, err, want)
		}
	}
}

func TestWhatCannotBeRunIsRefused(t *testing.T) {
	t.Parallel()
	cases := map[string]uml.Guest{
		"no program":           {},
		"a NUL in an argument": {Args: []string{"a\x00b"}},
		"a relative folder":    {Args: []string{"true"}, Dir: "tmp"},
		"little memory":        {Args: []string{"true"}, Memory: 1 << 20},
		"a share not there":    {Args: []string{"true"}, Share: []string{"/no/such/folder"}},
		"a share not a folder": {Args: []string{"true"}, Share: []string{"/etc/passwd"}},
	}
	for name, g := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := try(t, t.Context(), g); err == nil {
				t.Error("got no error")
			}
		})
	}
}

func TestInsideIsTrueOnlyInAGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	t.Parallel()
	if uml.Inside() {
		t.Error("the host is said to be a guest")
	}
	// Not this test binary: one built with -race finds no room for its shadow memory in a guest's address space.
	program := filepath.Join(t.TempDir(), "inside")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-race=false", "-o", program, "./testdata/inside").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	r := run(t, uml.Guest{Args: []string{program}})
	if r.stdout != "inside=true uid=0\n" {
		t.Errorf("got %q, %q, want inside=true", r.stdout, r.stderr)
	}
}

// TestAKilledRunnerLeavesNoGuest starts this test binary as the runner and kills it as no defer can see.
