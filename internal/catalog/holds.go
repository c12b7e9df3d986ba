package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// PutHold stores a hold on a backup under its time to the microsecond. It does
// not look whether the backup is there: that is the caller's, before and after.
func (c *Catalog) PutHold(ctx context.Context, h backup.Hold) error {
	key, err := c.holdKey(h)
	if err != nil {
		return err
	}
	return c.putJSON(ctx, key, h)
}

// WithdrawHold deletes that one hold. Gone already: nil.
func (c *Catalog) WithdrawHold(ctx context.Context, h backup.Hold) error {
	key, err := c.holdKey(h)
	if err != nil {
		return err
	}
	return c.store.Delete(ctx, key)
}

func (c *Catalog) holdKey(h backup.Hold) (string, error) {
	return c.key(h.Backup, "holds", h.Time.UTC().Format("20060102T150405.000000Z")+".json")
}

// Holds returns the holds of a backup, the oldest first, also those that have
// ended. With an error it still returns those it could read; who deletes by
// them must take the backup for held.
func (c *Catalog) Holds(ctx context.Context, id backup.ID) ([]backup.Hold, error) {
	objects, err := c.list(ctx, id, "holds")
	if err != nil {
		return nil, err
	}
	return readAll[backup.Hold](ctx, c, objects)
}

// ReleaseHolds deletes every hold of a backup, also one that cannot be read,
// and returns those that could. Called again it goes on; none: nil.
func (c *Catalog) ReleaseHolds(ctx context.Context, id backup.ID) ([]backup.Hold, error) {
	objects, err := c.list(ctx, id, "holds")
	if err != nil {
		return nil, err
	}
	holds, unread := readAll[backup.Hold](ctx, c, objects)
	if unread != nil && !errors.Is(unread, backup.ErrDamage) {
		return nil, unread
	}
	for _, o := range objects {
		if err := c.store.Delete(ctx, o.Key); err != nil {
			return nil, err
		}
	}
	return holds, nil
}

// Held says by whom and why the backup is held at that time, or "". A hold
// that cannot be read counts as one in force.
func (e Entry) Held(now time.Time) string { return Held(e.Holds, e.HoldErr, now) }

// Held is Entry.Held for the results of Catalog.Holds.
func Held(holds []backup.Hold, unread error, now time.Time) string {
	var why []string
	for _, h := range holds {
		if h.Active(now) {
			why = append(why, h.String())
		}
	}
	if unread != nil {
		why = append(why, fmt.Sprintf("held, as a hold of it cannot be read: %v", unread))
	}
	return strings.Join(why, "; ")
}
