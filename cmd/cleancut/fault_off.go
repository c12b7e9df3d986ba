//go:build !fault

package main

import "context"

// withFaults does nothing in the program that is shipped.
func withFaults(ctx context.Context) context.Context { return ctx }
