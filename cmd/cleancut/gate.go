package main

import (
	"os"

	"github.com/spf13/cobra"

	"cleancut/internal/postgres"
)

func (a *app) gateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "gate ROOT UID GID PORT", Hidden: true, Args: cobra.ExactArgs(4),
		Short: "Carry TCP connections into a copy's network (started with --listen; see docs/isolation.md)",
		RunE:  func(c *cobra.Command, args []string) error { return postgres.Gate(c.Context(), os.Stdout, args) },
	}
}
