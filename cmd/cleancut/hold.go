package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
)

func (a *app) holdCommand() *cobra.Command {
	var reason, until string
	var release bool
	c := &cobra.Command{
		Use: "hold ID", GroupID: "care", Args: exactly(1, "the id of a backup"),
		Short: "Keep a backup whatever retention says, until a time or until it is released",
		Long: `Keep a backup: prune passes it over, delete refuses it. Who, when and why is kept
in the catalog and shown by list and show. A backup may have several holds; it
is held while any of them lasts. --release ends all of them and says what they
were. It needs the catalog only.

--until takes a date (to the end of that day in UTC), a time as in RFC 3339, or
a duration from now: 2026-12-31, 2026-12-31T18:00:00Z, 30d, 12h.`,
		Example: "  cleancut hold 20261122T211704Z-5f3a9c --reason \"before the migration\" --until 30d\n  cleancut hold --release 20261122T211704Z-5f3a9c",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			if release && (reason != "" || until != "") {
				return fmt.Errorf("%w: --release ends every hold; it takes no --reason and no --until", backup.ErrUsage)
			}
			h := backup.Hold{Backup: id, By: whoami(), Tool: version, Time: time.Now().UTC(), Reason: reason}
			if until != "" {
				end, err := backup.ParseUntil(until, h.Time)
				if err != nil {
					return err
				}
				h.Until = &end
			}
			cat, s, err := a.catalog()
			if err != nil {
				return err
			}
			f := &flow.Flow{Catalog: cat, Cluster: s.name, Host: s.Host, Tool: version, Log: a.log, Progress: a.progress}
			if release {
				return a.release(c.Context(), f, id)
			}
			h.Host = s.Host
			if err := f.Hold(c.Context(), h); err != nil {
				return err
			}
			return a.print(h, func() { a.line("backup %s is %s", id, h) })
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for whoever finds it")
	c.Flags().StringVar(&until, "until", "", "end of the hold: a date, a time or a duration (default: until it is released)")
	c.Flags().BoolVar(&release, "release", false, "end every hold of the backup")
	return c
}

func (a *app) release(ctx context.Context, f *flow.Flow, id backup.ID) error {
	were, err := f.Release(ctx, id)
	if err != nil {
		return err
	}
	return a.print(map[string]any{"id": id, "released": shownHolds(were)}, func() {
		if len(were) == 0 {
			a.line("backup %s was not held", id)
			return
		}
		a.line("backup %s is released. It was:", id)
		for _, h := range were {
			a.line("  %s", h)
		}
	})
}

// whoami names the person: behind sudo the one who called it.
func whoami() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}

// shownHold is a hold in the JSON of show and of hold --release.
type shownHold struct {
	backup.Hold
	Active bool `json:"active"`
}

func shownHolds(holds []backup.Hold) []shownHold {
	out := []shownHold{}
	for _, h := range holds {
		out = append(out, shownHold{Hold: h, Active: h.Active(time.Now())})
	}
	return out
}

func (a *app) holdsText(e catalog.Entry) {
	for _, h := range e.Holds {
		if h.Active(time.Now()) {
			a.line("%s", h)
		} else {
			a.line("not held any more (it has ended): %s", h)
		}
	}
	if e.HoldErr != nil {
		a.line("held, as a hold of it cannot be read: %v", e.HoldErr)
	}
}
