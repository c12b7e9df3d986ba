// Package labtest runs tests where what they need is real: on this machine, or
// the same test again in the user-mode guest.
//
//	Here → (native: go on) | (guest: the same test binary, the same test) → result
package labtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/lab"
	"cleancut/internal/uml"
)

// Need is what a test needs of its kernel.
type Need int

// The needs.
const (
	Root  Need = iota // loop devices, mounts, freezes
	MD                // and md arrays
	Guest             // all of it, and a machine of its own: the test writes to /etc
)

// What is handed to the test in the guest: the program built on the host, and
// the folder of PostgreSQL servers (scripts/install-deps) of whoever started it.
const (
	binaryVariable  = "CLEANCUT_TEST_BINARY"
	serversVariable = "CLEANCUT_TEST_SERVERS"
)

// guestLimit is when a guest is given up, and lastWords how much earlier the
// test in it ends, at most, with the stacks of its goroutines. A test gets
// there only if something hangs; go test's own limit is for all of a package.
const (
	guestLimit = 40 * time.Minute
	lastWords  = time.Minute
)

// Here reports whether the test goes on in this process. Where this kernel
// lacks what it needs, Here runs the same test in a guest, passes its result on,
// and returns false: the caller returns. It must be called first in a
// top-level test. Under -short the test is skipped.
//
//	func TestRAID0(t *testing.T) {
//		if !labtest.Here(t, labtest.MD) {
//			return
//		}
func Here(t *testing.T, need Need) bool {
	t.Helper()
	if testing.Short() {
		t.Skip("needs real devices: run `make test`")
	}
	if os.Geteuid() == 0 && (need == Root || host.HasMD(t.Context())) && (need != Guest || uml.Inside()) {
		showServers(t)
		return true
	}
	if uml.Inside() {
		t.Fatal("the guest lacks what this test needs")
	}
	if missing := uml.Missing(); len(missing) > 0 {
		t.Fatalf("no guest can run here, missing: %s (run `make deps`)", strings.Join(missing, ", "))
	}
	runInGuest(t)
	return false
}

// showServers makes the user's PostgreSQL servers appear where root's are, in
// the guest that this user started: a home may be closed to the server's user.
func showServers(t *testing.T) {
	t.Helper()
	from := os.Getenv(serversVariable)
	if from == "" || !uml.Inside() {
		return
	}
	const to = "/var/cache/cleancut/postgresql"
	err := os.MkdirAll(to, 0o755)
	if err == nil {
		_, err = host.Run(t.Context(), "mount", "--bind", from, to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func runInGuest(t *testing.T) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	timeout := guestLimit
	if d, ok := t.Deadline(); ok {
		timeout = min(timeout, time.Until(d)-5*time.Second)
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=/root", "LANG=C.UTF-8", binaryVariable + "=" + Binary(t)}
	if cache, err := os.UserCacheDir(); err == nil && os.Geteuid() != 0 {
		env = append(env, serversVariable+"="+filepath.Join(cache, "cleancut", "postgresql"))
	}
	var out bytes.Buffer
	guest := uml.Guest{Args: []string{exe, "-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=" + (timeout - min(lastWords, timeout/10)).String()},
		Env: env, Dir: dir, Scratch: 24 << 30, Stdout: &out, Stderr: &out, Timeout: timeout}
	code, err := guest.Run(t.Context())
	if errors.Is(err, uml.ErrHung) { // the runner's trouble, not the test's; a second time it is reported
		t.Logf("NOTE the guest hung and is run again: %v\n%s", err, out.String())
		out.Reset()
		code, err = guest.Run(t.Context())
	}
	t.Logf("in the user-mode guest:\n%s", out.String())
	if err != nil {
		t.Fatal(err)
	}
	if code != 0 || strings.Contains(out.String(), "--- SKIP") || strings.Contains(out.String(), "no tests to run") {
		t.Fatalf("the test failed in the guest (exit status %d)", code)
	}
}

// Binary returns a cleancut program with fault points, built once per test
// process. In the guest it is the one that the host built.
func Binary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv(binaryVariable); path != "" {
		return path
	}
	dir, err := os.MkdirTemp("", "cleancut-test-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "cleancut")
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	build := exec.CommandContext(t.Context(), "go", "build", "-tags", "fault", "-o", path, "cleancut/cmd/cleancut")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build cleancut: %v\n%s", err, out)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// Pool mounts a pool filesystem on a folder of the test until its end, and
// fails the test if anything of it is left then.
func Pool(t testing.TB, fstype string, size backup.Bytes) (dir string) {
	t.Helper()
	dir = filepath.Join(Folder(t), "pool")
	undo, err := lab.Pool(t.Context(), dir, fstype, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Folder returns a folder that every user may pass through, removed at the
// end of the test. Whatever of the machine still points into it then fails the
// test.
func Folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cct-") // short: socket paths have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := lab.Left(dir)
		if err != nil {
			t.Error(err)
		}
		for _, l := range left {
			t.Errorf("left behind: %s", l)
		}
		if len(left) == 0 { // never remove through a mount
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		}
	})
	return dir
}

// Watchdog is the command line of the watchdog for host.Arm.
func Watchdog(t testing.TB) []string { return []string{Binary(t), "watchdog"} }

// Context is the test's context, usable in its cleanup too.
func Context(t testing.TB) context.Context { return context.WithoutCancel(t.Context()) }
