package postgres

import (
	"context"
	"fmt"
	"log/slog"

	"cleancut/internal/backup"
)

// MaskOptions is a placeholder: the part "nightly" has the real one, and the
// merge removes this file.
type MaskOptions struct {
	Files         []string
	KeepPasswords bool
	Log           *slog.Logger
}

// Mask is a placeholder that refuses files and resets nothing.
func (i *Instance) Mask(_ context.Context, o MaskOptions) error {
	if len(o.Files) > 0 {
		return fmt.Errorf("mask files: %w", backup.ErrNotThere)
	}
	return nil
}
