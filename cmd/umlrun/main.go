// Command umlrun runs a program as root in a User Mode Linux guest, see package uml. It can be the -exec of go test:
//
//	umlrun [--memory 3G] [--scratch 16G] [--timeout 10m] [--share DIR]... [--] PROGRAM ARGS...
//
// The program gets the host's working directory and environment. umlrun exits with the program's status, or with 125 if there was
// trouble with the guest, and 124 if it timed out.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"cleancut/internal/uml"
)

const (
	exitTimeout = 124 // as timeout(1)
	exitTrouble = 125 // as env(1), timeout(1) and others
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	g, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "umlrun:", err)
		return exitTrouble
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	status, err := g.Run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "umlrun:", err)
		if errors.Is(err, uml.ErrTimeout) {
			return exitTimeout
		}
		return exitTrouble
	}
	return status
}

// parse reads the command line up to the program.
func parse(args []string) (uml.Guest, error) {
	dir, err := os.Getwd()
	if err != nil {
		return uml.Guest{}, err
	}
	g := uml.Guest{Env: guestEnv(os.Environ()), Dir: dir, Stdout: os.Stdout, Stderr: os.Stderr}
	flags := flag.NewFlagSet("umlrun", flag.ContinueOnError)
	flags.Var((*size)(&g.Memory), "memory", "memory of the guest (default 3G)")
	flags.Var((*size)(&g.Scratch), "scratch", "size of the sparse scratch disk /dev/ubda (default none)")
	flags.StringVar(&g.ScratchDir, "scratch-dir", "", "host folder for the scratch disk and exchange files (default $TMPDIR)")
	flags.DurationVar(&g.Timeout, "timeout", 0, "kill the guest after this time (default never)")
	flags.Func("share", "host folder that stays shared and writable; may be repeated", func(s string) error {
		path, err := filepath.Abs(s)
		g.Share = append(g.Share, path)
		return err
	})
	flags.Func("module", "kernel module to load besides the default ones; may be repeated", func(s string) error {
		g.Modules = append(g.Modules, s)
		return nil
	})
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: umlrun [flags] [--] PROGRAM ARGS...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return g, err
	}
	if g.Args = flags.Args(); len(g.Args) == 0 {
		return g, errors.New("no program given")
	}
	return g, nil
}

// guestEnv drops what names files or sockets the guest does not have, or a user it is not: the program is root there.
func guestEnv(env []string) []string {
	out := []string{"HOME=/root", "USER=root", "LOGNAME=root"}
	drop := []string{"HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK", "TMPDIR"}
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		keep := true
		for _, d := range drop {
			keep = keep && name != d
		}
		if keep {
			out = append(out, kv)
		}
	}
	return out
}

// size is a flag value in bytes with an optional suffix K, M, G or T, powers of 1024.
type size int64

func (s *size) String() string { return strconv.FormatInt(int64(*s), 10) }

func (s *size) Set(text string) error {
	digits := strings.TrimRight(text, "KMGT")
	shift := 0
	if suffix := text[len(digits):]; len(suffix) == 1 {
		shift = 10 * (1 + strings.Index("KMGT", suffix))
	} else if suffix != "" {
		return fmt.Errorf("size %q", text)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > (1<<62)>>shift {
		return fmt.Errorf("size %q", text)
	}
	*s = size(n << shift)
	return nil
}
