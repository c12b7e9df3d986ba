package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", GroupID: "look", Args: exactly(0, ""),
		Short: "Check everything a backup, a restore and a dump need, and say how to mend each",
		RunE:  func(c *cobra.Command, _ []string) error { return fmt.Errorf("doctor: not there yet") },
	}
}
