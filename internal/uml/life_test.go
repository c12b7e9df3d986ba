package uml_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cleancut/internal/uml"
)

func TestTimeoutAndCancelKillTheGuest(t *testing.T) {
	t.Parallel()
	_, err := try(t, t.Context(), uml.Guest{Args: sh("sleep 1000 & sleep 1000"), Scratch: 1 << 30, Timeout: 4 * time.Second})
	if !errors.Is(err, uml.ErrTimeout) {
		t.Errorf("got error %v, want ErrTimeout", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // in the middle of the boot
	defer cancel()
	_, err = try(t, ctx, uml.Guest{Args: sh("sleep 1000")})
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, uml.ErrTimeout) {
		t.Errorf("got error %v, want the context's deadline", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err = try(t, ctx, uml.Guest{Args: sh("true")}); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want the context's", err)
	}
}

func TestABootThatFailsShowsTheConsole(t *testing.T) {
	t.Parallel()
	_, err := try(t, t.Context(), uml.Guest{Args: sh("true"), Modules: []string{"no-such-module"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-module") || !strings.Contains(err.Error(), "Linux version") && !strings.Contains(err.Error(), "init") {
		t.Errorf("got error %v, want the console with the module's name", err)
	}
}

func TestAGuestThatDiesIsTroubleNotAStatus(t *testing.T) {
	t.Parallel()
	for _, script := range []string{"echo c >/proc/sysrq-trigger; sleep 100", "echo b >/proc/sysrq-trigger; sleep 100"} {
		r, err := try(t, t.Context(), uml.Guest{Args: sh(script), Timeout: time.Minute})
		if err == nil || errors.Is(err, uml.ErrTimeout) {
			t.Errorf("%s: got status %d, error %v, want one that says the guest ended", script, r.status, err)
		}
	}
}

func TestWhatTheProgramLeavesRunningDoesNotHoldTheGuest(t *testing.T) {
	t.Parallel()
	r := run(t, uml.Guest{Args: sh("sleep 1000 & echo done"), Timeout: time.Minute})
	if r.status != 0 || r.stdout != "done\n" {
		t.Errorf("got status %d, output %q", r.status, r.stdout)
	}
}

func TestSeveralGuestsRunAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() {
			var out bytes.Buffer
			g := uml.Guest{Args: sh("echo $1 >/etc/mine; sleep 1; cat /etc/mine; exit $1", fmt.Sprint(i)),
				Memory: 512 << 20, Stdout: &out, Stderr: io.Discard, ScratchDir: dir, Timeout: 5 * time.Minute}
			status, err := g.Run(t.Context())
			if want := fmt.Sprintln(i); err != nil || status != i || out.String() != want {
				t.Errorf("guest %d: got status %d, output %q, error %v", i, status, out.String(), err)
			}
		})
	}
	all.Wait()
	nothingLeft(t, dir)
}

func TestAKilledRunnerLeavesNoGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	if dir := os.Getenv("UML_TEST_RUNNER"); dir != "" {
		g := uml.Guest{Args: sh("echo up; sleep 1000 & sleep 1000"), Scratch: 1 << 30, ScratchDir: dir, Stdout: os.Stdout}
		t.Log(g.Run(t.Context()))
		return
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestAKilledRunnerLeavesNoGuest$")
	cmd.Env = append(os.Environ(), "UML_TEST_RUNNER="+dir)
	first := &firstLine{at: make(chan struct{})}
	cmd.Stdout = first
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-first.at
	if len(processes(dir)) == 0 {
		t.Fatal("no guest seen: this test looks for the wrong processes")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 500 { // the guard needs a moment
		if left, _ := filepath.Glob(dir + "/*"); len(left) == 0 && len(processes(dir)) == 0 {
			break
		}
		<-tick.C
	}
	nothingLeft(t, dir)
}

func TestAFolderWhoseGuardWasKilledTooIsSweptUp(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	t.Parallel()
	dir := t.TempDir()
	folder := filepath.Join(dir, "cleancut-guest-1")
	if err := os.MkdirAll(folder+"/guest", 0o700); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(folder, old, old); err != nil {
		t.Fatal(err)
	}
	run(t, uml.Guest{Args: sh("true"), ScratchDir: dir})
}

func TestAnOrdinaryUserOfTheHostIsRootInTheGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	if dir := os.Getenv("UML_TEST_ORDINARY"); dir != "" {
		r := run(t, uml.Guest{Scratch: 1 << 30, ScratchDir: dir, Args: sh(`set -e
			id -u; mkfs.xfs -q /dev/ubda; mount /dev/ubda /mnt; touch /etc/made-in-guest; ls /etc/made-in-guest`)})
		if want := "0\n/etc/made-in-guest\n"; r.status != 0 || r.stdout != want {
			t.Errorf("got status %d, output %q, error %q, want %q", r.status, r.stdout, r.stderr, want)
		}
		return
	}
	if os.Getuid() != 0 { // then all tests here ran as an ordinary user
		return
	}
	dir, err := os.MkdirTemp("", "uml-ordinary-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const nobody = 65534
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "test") // go test's own folder is closed to others
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run=^TestAnOrdinaryUserOfTheHostIsRootInTheGuest$")
	cmd.Dir = dir
	cmd.Env = []string{"UML_TEST_ORDINARY=" + dir, "HOME=" + dir, "TMPDIR=" + dir, "PATH=/usr/bin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

func TestATimerInterruptTooManyDoesNoHarm(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest: run `make test`")
	}
	t.Parallel()
	dir := t.TempDir()
	out := &firstLine{at: make(chan struct{})}
	ended := make(chan error, 1)
	go func() {
		_, err := uml.Guest{Args: sh("echo up; sleep 2; echo slept"), ScratchDir: dir, Stdout: out, Stderr: io.Discard, Timeout: 5 * time.Minute}.Run(t.Context())
		ended <- err
	}()
	<-out.at
	kernel := ofOurs(t, dir)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for sent := 0; ; {
		select {
		case err := <-ended:
			if err != nil || sent < 100 {
				t.Errorf("got error %v after %d interrupts", err, sent)
			}
			return
		case <-tick.C:
			if syscall.Kill(kernel, syscall.SIGALRM) == nil {
				sent++
			}
		}
	}
}

// ofOurs returns the process of the one kernel that this process started in dir.
func ofOurs(t *testing.T, dir string) int {
	t.Helper()
	for _, p := range processes(dir) {
		var pid, parent int
		if _, err := fmt.Sscanf(p, "/proc/%d/", &pid); err != nil {
			t.Fatal(err)
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		if _, err := fmt.Sscanf(string(rest), "%1s %d", new(string), &parent); err == nil && parent == os.Getpid() && strings.Contains(p, "linux.uml") {
			return pid
		}
	}
	t.Fatalf("no kernel of ours among %q", processes(dir))
	return 0
}
