// Package uml runs a program as root in a User Mode Linux guest: a Linux kernel of its own (with md, device mapper, loop, XFS, ext4
// and btrfs) that is an ordinary process on the host and needs neither root nor KVM there. The guest's root is the host's own file
// tree under an overlay in the guest's memory, so every program of the host is there and nothing written in the guest reaches the
// host, but for the folders in [Guest.Share].
//
// Flow: Guest → exchange folder (init, argument lists, scratch disk) → linux.uml → init.sh → program → exit status.
//
// What always holds: no argument passes a shell parser; the guest and all its processes end with Run and with the process that
// called it, also by SIGKILL; all that Run made is removed, in the last case by a guard process. Guests do not know of each other;
// any number may run at a time.
//
// What a guest cannot do: run programs built with Go's race detector (no room for its shadow memory), more than one thing at a time
// (one CPU), O_DIRECT, reflinks or O_TMPFILE on the overlay (use the scratch disk), time namespaces. Starting a program costs it 15
// to 50 ms.
package uml

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// ErrTimeout says that the program did not end within [Guest.Timeout] and the guest was killed.
var ErrTimeout = errors.New("guest timed out")

// ErrHung says that the guest's kernel stood still for minutes, whatever runs in it, and was killed. It is trouble of the runner, not
// of the program: running it again is fair.
var ErrHung = errors.New("guest hung")

const (
	defaultMemory = 3 << 30
	leastMemory   = 64 << 20 // below that the kernel does not come to its init
	bootLimit     = 3 * time.Minute
	pollEvery     = 50 * time.Millisecond
	wakeAfter     = 30 * time.Second // without a sign of life, which comes every two seconds
	hungAfter     = 5 * time.Minute
	lookEvery     = 5 * time.Second
	lastQuestion  = 10 * time.Second // for the guest to say which tasks are blocked
)

// Guest describes one run of one program. Its zero value but for Args can be run.
type Guest struct {
	// Args are the program and its arguments. A program without a slash is looked up in the guest's PATH, a relative one in Dir.
	Args []string
	// Env is the whole environment of the program, KEY=VALUE; nil means PATH, HOME=/root and LANG=C.UTF-8. The sbin folders are
	// added to its PATH if missing, and CLEANCUT_GUEST=1 is added.
	Env []string
	// Dir is the working directory in the guest, absolute; default /.
	Dir string
	// Memory of the guest in bytes, default 3 GiB. The overlay over the host's files takes at most 80 % of it. On the host it is a
	// sparse, unlinked file in /dev/shm, or in ScratchDir where /dev/shm is too small.
	Memory int64
	// Scratch is the size in bytes of a sparse scratch disk, /dev/ubda in the guest; 0 means none.
	Scratch int64
	// ScratchDir is the host's folder for the scratch disk and the exchange folder; default [os.TempDir].
	ScratchDir string
	// Share lists folders of the host that stay the host's own in the guest, writable, at the same path.
	Share []string
	// Stdout and Stderr get the program's output while it runs; nil discards. The same writer may be given twice.
	Stdout, Stderr io.Writer
	// Timeout for the whole run, boot included; 0 means none.
	Timeout time.Duration
	// Modules are loaded besides overlay, loop, md-mod, raid0, linear and dm-mod, by name, with what they depend on. Others can
	// be loaded in the guest with modprobe, or are loaded by the guest's kernel when asked for.
	Modules []string
}

// Run boots a guest, runs the program and returns its exit status, 128+N if signal N killed it, 127 if it was not found and 126 if it
// could not be started, all as a shell does. err speaks of the run itself, never of the program: the guest did not boot (with the end of
// its console), it ended without a status, a writer failed, ctx ended (wrapped ctx.Err()), Timeout passed ([ErrTimeout], with the tasks
// that were blocked) or its kernel stood still ([ErrHung]).
// Whatever happens, when Run returns the guest is gone and the host is as before.
func (g Guest) Run(ctx context.Context) (exit int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("run guest: %w", err)
	}
	if missing := Missing(); len(missing) > 0 {
		return 0, fmt.Errorf("run guest: this host lacks %s", strings.Join(missing, ", "))
	}
	if g, err = g.complete(); err != nil {
		return 0, fmt.Errorf("run guest: %w", err)
	}
	release, err := kernelRelease(ctx)
	if err != nil {
		return 0, err
	}
	x, err := newExchange(g, release)
	if err != nil {
		return 0, fmt.Errorf("prepare guest: %w", err)
	}
	defer func() { err = errors.Join(err, x.remove()) }()
	limited, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if g.Timeout > 0 {
		limit := time.AfterFunc(g.Timeout, func() { stop(fmt.Errorf("%w after %v%s", ErrTimeout, g.Timeout, x.blocked(limited))) })
		defer limit.Stop()
	}
	exit, err = x.run(limited, g)
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) { // a cause of the caller's own
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return exit, err
}

// run starts the kernel on a filled exchange folder and stays with it to its end.
func (x *exchange) run(ctx context.Context, g Guest) (int, error) {
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	out, err := x.follow(g.Stdout, g.Stderr)
	if err != nil {
		return 0, err
	}
	k, err := startKernel(ctx, x, g)
	if err != nil {
		return 0, errors.Join(err, out.stop())
	}
	booting := time.AfterFunc(bootLimit, func() {
		if !x.started() {
			abort(fmt.Errorf("boot guest: program not started after %v%s", bootLimit, x.consoleTail()))
		}
	})
	defer booting.Stop()
	go x.watch(ctx, k, abort)
	out.start(func(err error) { abort(fmt.Errorf("pass on output: %w", err)) })
	end := k.wait(ctx)
	if err := out.stop(); err != nil {
		return 0, fmt.Errorf("pass on output: %w", err)
	}
	status, err := x.exitStatus()
	if err == nil {
		return status, nil
	}
	if ctx.Err() != nil {
		return 0, fmt.Errorf("run guest: %w", context.Cause(ctx))
	}
	if end == nil {
		end = errors.New("powered off")
	}
	return 0, fmt.Errorf("%w (%w)%s", err, end, x.consoleTail())
}

// watch looks for the guest's sign of life, wakes a guest that stands still and ends one that cannot be woken.
//
// A guest's kernel lives by the SIGALRM of a one-shot timer, which each of them sets anew (arch/um/os-Linux/time.c): if one is lost, as
// on a busy host, its clock and with it all that waits for a time stands still for ever. One more from outside is as good as the lost one.
func (x *exchange) watch(ctx context.Context, k *kernel, abort func(error)) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var seen, since time.Time
	var found string // what the kernel did when it was first woken
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			info, err := os.Stat(x.path("alive"))
			if err != nil || !info.ModTime().Equal(seen) || since.IsZero() { // not there before the program is started
				if found != "" {
					x.note(fmt.Sprintf("the guest's kernel stood still for %v (%s) and was woken", now.Sub(since).Round(time.Second), found))
				}
				since, found = now, ""
				if err == nil {
					seen = info.ModTime()
				}
			}
			silent := now.Sub(since)
			if silent <= wakeAfter || !x.started() {
				continue
			}
			if silent > hungAfter {
				abort(fmt.Errorf("%w: no sign of life for %v, it was %s%s", ErrHung, hungAfter, found, x.consoleTail()))
				return
			}
			if found == "" {
				found = k.doing()
			}
			k.wake()
		}
	}
}

// note tells whoever reads the program's standard error.
func (x *exchange) note(text string) {
	f, err := os.OpenFile(x.path("stderr"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintln(f, "umlrun: "+text)
}

// blocked asks the guest which of its tasks are blocked and returns the end of its console.
func (x *exchange) blocked(ctx context.Context) string {
	if !x.started() || os.WriteFile(x.path("stuck"), nil, 0o600) != nil {
		return x.consoleTail()
	}
	limit := time.After(lastQuestion)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if _, err := os.Stat(x.path("told")); err == nil {
			return x.consoleTail()
		}
		select {
		case <-ctx.Done():
			return ""
		case <-limit:
			return " (the guest does not say which tasks are blocked)" + x.consoleTail()
		case <-tick.C:
		}
	}
}

// complete fills in the defaults and refuses what cannot be run.
func (g Guest) complete() (Guest, error) {
	if len(g.Args) == 0 || g.Args[0] == "" {
		return g, errors.New("no program given")
	}
	if g.Memory == 0 {
		g.Memory = defaultMemory
	}
	if g.Memory < leastMemory {
		return g, fmt.Errorf("memory of %d bytes is below %d", g.Memory, int64(leastMemory))
	}
	if g.Scratch < 0 {
		return g, fmt.Errorf("scratch disk of %d bytes", g.Scratch)
	}
	if g.Dir == "" {
		g.Dir = "/"
	}
	if !strings.HasPrefix(g.Dir, "/") {
		return g, fmt.Errorf("working directory %q is not absolute", g.Dir)
	}
	if g.ScratchDir == "" {
		g.ScratchDir = os.TempDir()
	}
	if g.Env == nil {
		g.Env = []string{"HOME=/root", "LANG=C.UTF-8"}
	}
	g.Env = guestEnv(g.Env)
	return g, nil
}

// guestEnv returns env with the last value of each name, a PATH that includes the sbin folders, and the guest's marker.
func guestEnv(env []string) []string {
	path := ""
	last := map[string]int{}
	for i, kv := range env {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || name == "" {
			continue // execve takes it, but no getenv finds it
		}
		if name == "PATH" {
			path = value
		}
		last[name] = i
	}
	var out []string
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if at, ok := last[name]; ok && at == i && name != "PATH" && name != "CLEANCUT_GUEST" {
			out = append(out, kv)
		}
	}
	dirs := strings.Split(path, ":")
	if path == "" {
		dirs = []string{"/usr/local/sbin", "/usr/local/bin"}
	}
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return append(out, "PATH="+strings.Join(dirs, ":"), "CLEANCUT_GUEST=1")
}
