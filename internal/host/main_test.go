package host_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/provider/providertest"
)

// Linux include/uapi/linux/fs.h.
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// TestMain makes the test binary play the processes that the tests kill: the
// freezer and its watchdog.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case "watchdog":
			os.Exit(playWatchdog(os.Args[2:]))
		case "freezer":
			os.Exit(playFreezer(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

// playWatchdog: DEADLINE -- MOUNTPOINT...
func playWatchdog(args []string) int {
	deadline, err := time.ParseDuration(args[0])
	if err == nil {
		err = host.Watch(os.Stdin, os.Stdout, deadline, args[2:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "watchdog:", err)
		return 1
	}
	return 0
}

// playFreezer: DEADLINE MOUNTPOINT... It does what it is told on standard
// input, a word a line, and answers each with a line.
func playFreezer(args []string) int {
	deadline, err := time.ParseDuration(args[0])
	if err != nil {
		return 1
	}
	var f *host.Freezer
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch in.Text() {
		case "arm":
			f, err = host.Arm(context.Background(), watchdogCommand(), args[1:], deadline)
		case "freeze":
			err = f.Freeze(context.Background())
		case "thaw":
			_, err = f.Thaw()
		case "close":
			err = f.Close()
		}
		switch {
		case err == nil:
			fmt.Println("ok")
		case errors.Is(err, backup.ErrVoid):
			fmt.Println("void", strings.ReplaceAll(err.Error(), "\n", "; "))
		default:
			fmt.Println("error", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	return 0
}

func watchdogCommand() []string {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return []string{exe, "watchdog"}
}

// child is a freezer in a process and a process group of its own.
type child struct {
	cmd      *exec.Cmd
	in       io.WriteCloser
	out      *bufio.Reader
	watchdog int
}

func startFreezer(t *testing.T, deadline time.Duration, mountpoints ...string) *child {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: exec.Command(exe, append([]string{"freezer", deadline.String()}, mountpoints...)...)}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.cmd.Stderr = os.Stderr
	in, err1 := c.cmd.StdinPipe()
	out, err2 := c.cmd.StdoutPipe()
	if err := errors.Join(err1, err2, c.cmd.Start()); err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewReader(out)
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	})
	return c
}

func (c *child) tell(t *testing.T, word string) {
	t.Helper()
	if _, err := fmt.Fprintln(c.in, word); err != nil {
		t.Fatal(err)
	}
}

func (c *child) answer(t *testing.T) string {
	t.Helper()
	line := within(t, "the freezer's answer", func() string {
		s, err := c.out.ReadString('\n')
		if err != nil {
			return "no answer: " + err.Error()
		}
		return s
	})
	return strings.TrimSpace(line)
}

// does tells the freezer a word and demands an answer that begins with want.
func (c *child) does(t *testing.T, word, want string) {
	t.Helper()
	c.tell(t, word)
	if got := c.answer(t); !strings.HasPrefix(got, want) {
		t.Fatalf("%s: got %q, want %q", word, got, want)
	}
}

// armed starts a freezer that has armed its watchdog.
func armed(t *testing.T, deadline time.Duration, mountpoints ...string) *child {
	t.Helper()
	c := startFreezer(t, deadline, mountpoints...)
	c.arm(t, mountpoints[0])
	return c
}

func (c *child) arm(t *testing.T, mountpoint string) {
	t.Helper()
	c.does(t, "arm", "ok")
	dogs := watchdogs(t, mountpoint)
	if len(dogs) != 1 {
		t.Fatalf("watchdogs: got %v, want one", dogs)
	}
	c.watchdog = dogs[0]
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// within returns what wait returns, and ends the test if that takes a minute.
func within[T any](t *testing.T, what string, wait func() T) T {
	t.Helper()
	got := make(chan T, 1)
	go func() { got <- wait() }()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	select {
	case v := <-got:
		return v
	case <-limit.C:
		t.Fatalf("%s did not come within a minute", what)
	}
	panic("unreachable")
}

// eventually waits until cond holds, for a minute at most.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); !cond(); <-tick.C {
		if time.Since(begun) > time.Minute {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// volumes mounts n small filesystems; one that is frozen at the end fails the
// test.
func volumes(t *testing.T, n int) []string {
	t.Helper()
	var dirs []string
	for range n {
		dir := providertest.Mount(t, "xfs", 300<<20)
		staysThawed(t, dir)
		dirs = append(dirs, dir)
	}
	return dirs
}

// staysThawed fails the test if any of the filesystems is frozen at its end.
func staysThawed(t *testing.T, dirs ...string) {
	t.Helper()
	t.Cleanup(func() {
		for _, dir := range dirs {
			if err := ioctl(t, dir, fiThaw); !errors.Is(err, unix.EINVAL) {
				t.Errorf("left frozen: %s (FITHAW says %v, want EINVAL)", dir, err)
			}
		}
		for _, dir := range dirs {
			eventually(t, "no watchdog is left", func() bool { return len(watchdogs(t, dir)) == 0 })
		}
	})
}

func ioctl(t testing.TB, dir string, request uint) error {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}

// isFrozen asks by a second freeze, which a frozen filesystem refuses.
func isFrozen(t testing.TB, dir string) bool {
	t.Helper()
	err := ioctl(t, dir, fiFreeze)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	if err != nil {
		t.Fatalf("FIFREEZE %s: %v", dir, err)
	}
	if err := ioctl(t, dir, fiThaw); err != nil {
		t.Errorf("FITHAW %s: %v", dir, err)
	}
	return false
}

// becomesThawed demands that a durable write completes, and that then nothing
// is frozen any more.
func becomesThawed(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		err := within(t, "a durable write on "+dir, func() error { return writeDurably(filepath.Join(dir, "probe"), 4096) })
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range dirs {
		eventually(t, "no watchdog is left", func() bool { return len(watchdogs(t, dir)) == 0 })
		if err := ioctl(t, dir, fiThaw); !errors.Is(err, unix.EINVAL) {
			t.Errorf("FITHAW %s: got %v, want EINVAL", dir, err)
		}
	}
}

func writeDurably(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Sync(), f.Close())
}

// watchdogs returns the processes that guard that mount point.
func watchdogs(t testing.TB, mountpoint string) []int {
	t.Helper()
	var out []int
	for pid, args := range processes(t) {
		if len(args) > 4 && args[1] == "watchdog" && strings.Contains(strings.Join(args, "\x00")+"\x00", "\x00"+mountpoint+"\x00") {
			out = append(out, pid)
		}
	}
	return out
}

// processes returns the command line of every process that still has one.
func processes(t testing.TB) map[int][]string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	out := map[int][]string{}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil || len(b) == 0 {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(p, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		out[pid] = strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	}
	return out
}

// threadStates returns the states of a process's threads, as in "SSD".
func threadStates(pid int) string {
	paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	var out strings.Builder
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		if _, rest, ok := strings.Cut(string(b), ") "); ok {
			out.WriteByte(rest[0])
		}
	}
	return out.String()
}

func run(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}
