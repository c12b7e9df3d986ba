package flow

import (
	"context"

	"cleancut/internal/backup"
)

// PruneFacts is what backup.PlanRetention decides by.
func (f *Flow) PruneFacts(ctx context.Context) ([]backup.Candidate, error) {
	backups, _, err := f.backupFacts(ctx)
	return candidates(backups), err
}
