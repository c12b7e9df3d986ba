// Command cleancut backs up a running PostgreSQL cluster by snapshotting all
// its volumes at one instant, and proves the backups by restoring them.
//
//	flags → configuration → machines → one flow → text or JSON
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the Makefile.
var version = "dev"

func main() { os.Exit(run()) }

// run keeps the deferred calls of everything below it alive until the exit
// status is known.
func run() int {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			fmt.Fprintf(os.Stderr, "cleancut: %s: stopping and undoing what was begun; please wait\n", s)
			stop()
		}
	}()
	return execute(withFaults(ctx), os.Args[1:], os.Stdout, os.Stderr)
}
