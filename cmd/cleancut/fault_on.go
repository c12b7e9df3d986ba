//go:build fault

package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"cleancut/internal/fault"
)

// withFaults arms the injector of the fault sweep: CLEANCUT_FAULT=kill@7. The
// points that are passed are appended to the file CLEANCUT_FAULT_LOG.
func withFaults(ctx context.Context) context.Context {
	i, err := fault.Parse(os.Getenv("CLEANCUT_FAULT"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(exitUsage)
	}
	if file := os.Getenv("CLEANCUT_FAULT_LOG"); file != "" {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitUsage)
		}
		i.Log = func(name string) { _, _ = f.WriteString(strings.TrimSpace(name) + "\n") }
	}
	return fault.With(ctx, i)
}
