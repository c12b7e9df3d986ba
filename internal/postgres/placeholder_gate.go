package postgres

import (
	"context"
	"fmt"

	"cleancut/internal/backup"
)

// CheckListen is a placeholder of the same kind.
func CheckListen(listen string) error { return Standby{Listen: listen}.Check() }

// OpenGate is a placeholder that opens nothing: the part "isolation" has the
// real one, and the merge removes this file.
func (i *Instance) OpenGate(_ context.Context, listen string) error {
	if listen != "" {
		return fmt.Errorf("TCP for a clone: %w", backup.ErrNotThere)
	}
	return nil
}
