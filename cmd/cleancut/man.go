package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"cleancut/internal/backup"
)

// manCommand is for packagers: the manual pages are made from the same texts
// as --help.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Hidden: true, Args: exactly(1, "a folder"),
		Short: "Write the manual pages, one for every command",
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("%w: manual pages: %w", backup.ErrUsage, err)
			}
			root := c.Root()
			root.DisableAutoGenTag = true // the date: builds are to be the same again
			header := &doc.GenManHeader{Section: "8", Source: "cleancut " + version, Manual: "cleancut"}
			if err := doc.GenManTree(root, header, args[0]); err != nil {
				return fmt.Errorf("manual pages: %w", err)
			}
			return a.print(map[string]any{"written": args[0]}, func() { a.line("manual pages are in %s", args[0]) })
		},
	}
}
