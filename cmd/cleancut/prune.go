package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/wal"
)

// retentionConfig is [retention] and [cluster.NAME.retention]; nil: not given.
type retentionConfig struct {
	Last    *int `toml:"last"`
	Daily   *int `toml:"daily"`
	Weekly  *int `toml:"weekly"`
	Monthly *int `toml:"monthly"`

	WALWindow *backup.Span `toml:"wal_window"`
}

// pruneResult is the JSON of prune.
type pruneResult struct {
	Cluster string           `json:"cluster"`
	DryRun  bool             `json:"dry_run"`
	OK      bool             `json:"ok"`
	Rules   backup.Retention `json:"rules"`
	flow.PruneResult
}

func (a *app) pruneCommand() *cobra.Command {
	var dry bool
	c := &cobra.Command{
		Use: "prune", GroupID: "care", Args: exactly(0, ""),
		Short: "Delete the backups that no retention rule keeps, and the WAL that none needs",
		Long: `Delete the backups that no rule keeps, each as a whole set. The rules come from
the flags, else from [cluster.NAME.retention], else from [retention] in the
configuration, each number for itself; 0 is no rule. A backup stays if any rule
keeps it. Days, weeks (from Monday) and months are UTC's; of each the newest
backup stays, and those without a backup do not count. Without any rule nothing
is deleted (exit status 2).

Only complete backups count. Never deleted: what is held, in use by a copy, of
the future, or unreadable; the newest backup with a good verdict; and while none
has one, the newest 3 and the damaged ones. What is incomplete is left to sweep.
A damaged backup takes no place of a sound one. Golden images count for nothing
and go with their backup, or after it, unless they are held or in use.

The WAL in the catalog follows. Without --wal-window all stays that a kept
backup can be recovered by. With it every moment of that window stays
recoverable: the latest backup before the window stays, whatever the rules say,
and the WAL from it on; older backups then recover to their own end only. What
cannot be told keeps WAL, and the plan says why.`,
		Example: "  cleancut prune --keep-last 3 --keep-daily 7 --keep-weekly 4 --wal-window 14d --dry-run\n  cleancut prune      # by the rules of the configuration",
		RunE: func(c *cobra.Command, _ []string) error {
			rules, window, err := a.retention(c)
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			done, err := f.PruneByRules(c.Context(), rules, window, dry)
			if done.Keep == nil { // there is not even a plan
				return err
			}
			res := pruneResult{Cluster: f.Cluster, DryRun: dry, Rules: rules, PruneResult: done}
			res.OK = err == nil
			if perr := a.print(res, func() { a.pruneText(res) }); err == nil {
				err = perr
			}
			return err
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "only show the plan")
	c.Flags().String(windowFlag, "", "keep the WAL and the backup by which every moment of this window can be recovered: 7d, 36h [$"+variable(windowFlag)+"]")
	for _, r := range keepFlags() {
		c.Flags().Int(r.flag, 0, r.usage+" [$"+variable(r.flag)+"]")
	}
	return c
}

const windowFlag = "wal-window"

// keepFlag is one rule of retention and where it may be given.
type keepFlag struct {
	flag, usage string
	key         func(retentionConfig) *int
	to          func(*backup.Retention) *int
}

func keepFlags() []keepFlag {
	return []keepFlag{
		{"keep-last", "keep the newest N backups", func(c retentionConfig) *int { return c.Last }, func(r *backup.Retention) *int { return &r.Last }},
		{"keep-daily", "keep the newest backup of each of the last N days that have one", func(c retentionConfig) *int { return c.Daily }, func(r *backup.Retention) *int { return &r.Daily }},
		{"keep-weekly", "keep the newest backup of each of the last N weeks that have one", func(c retentionConfig) *int { return c.Weekly }, func(r *backup.Retention) *int { return &r.Weekly }},
		{"keep-monthly", "keep the newest backup of each of the last N months that have one", func(c retentionConfig) *int { return c.Monthly }, func(r *backup.Retention) *int { return &r.Monthly }},
	}
}

// retention puts the rules together: flag, variable, the cluster's section,
// the general one.
func (a *app) retention(c *cobra.Command) (r backup.Retention, window backup.Span, err error) {
	s, err := a.settings()
	if err != nil {
		return r, window, err
	}
	for _, k := range keepFlags() {
		to := k.to(&r)
		if n := k.key(s.Retention); n != nil {
			*to = *n
		}
		if n := k.key(s.cluster.Retention); n != nil {
			*to = *n
		}
		if v := os.Getenv(variable(k.flag)); v != "" {
			if *to, err = strconv.Atoi(v); err != nil {
				return r, window, fmt.Errorf("%w: %s=%q is no number", backup.ErrUsage, variable(k.flag), v)
			}
		}
		if c.Flags().Changed(k.flag) {
			if *to, err = c.Flags().GetInt(k.flag); err != nil {
				return r, window, err
			}
		}
	}
	if window, err = promised(c, s); err != nil {
		return r, window, err
	}
	return r, window, r.Check()
}

// promised puts the window of WAL together in the same way.
func promised(c *cobra.Command, s settings) (window backup.Span, err error) {
	for _, w := range []*backup.Span{s.Retention.WALWindow, s.cluster.Retention.WALWindow} {
		if w != nil {
			window = *w
		}
	}
	if v := os.Getenv(variable(windowFlag)); v != "" {
		if window, err = backup.ParseSpan(v); err != nil {
			return 0, fmt.Errorf("%s: %w", variable(windowFlag), err)
		}
	}
	if c.Flags().Changed(windowFlag) {
		if window, err = backup.ParseSpan(c.Flags().Lookup(windowFlag).Value.String()); err != nil {
			return 0, fmt.Errorf("--%s: %w", windowFlag, err)
		}
	}
	return window, nil
}

func (a *app) pruneText(res pruneResult) {
	rows := [][]string{}
	for _, k := range res.Keep {
		rows = append(rows, []string{"keep", string(k.ID), strings.Join(k.Why, "; ")})
	}
	for _, r := range res.Remove {
		did := "delete: done"
		switch {
		case res.DryRun:
			did = "delete"
		case r.Kept != "":
			did, r.Why = "keep", []string{r.Kept}
		case r.Error != "":
			did, r.Why = "delete: FAILED", []string{strings.ReplaceAll(r.Error, "\n", "; ")}
		}
		rows = append(rows, []string{did, string(r.ID), strings.Join(r.Why, "; ")})
	}
	if len(rows) == 0 {
		a.line("no backups of cluster %s", res.Cluster)
	} else {
		a.table(rows)
	}
	if res.WAL != nil {
		a.pruneWALText(res.DryRun, *res.WAL)
	}
}

func (a *app) pruneWALText(dry bool, w flow.PrunedWAL) {
	did := "delete: done"
	switch {
	case dry:
		did = "delete"
	case !w.Done:
		did = "delete: NOT ALL"
	}
	rows := [][]string{{"\nWAL", "FIRST", "LAST", "FILES", "SIZE", ""}}
	add := func(what string, parts []wal.Part) {
		for _, p := range parts {
			rows = append(rows, []string{what, p.First.String(), p.Last.String(), strconv.Itoa(p.Files), p.Bytes.String(), p.Why})
		}
	}
	add("keep", w.Keep)
	add(did, w.Remove)
	a.table(rows)
	if w.Doubt != "" {
		a.line("\nno WAL is deleted: %s", w.Doubt)
	}
	for _, b := range w.Backups {
		if len(b.Before) > 0 && len(b.After) == 0 {
			a.line("backup %s recovers to its own end only: it is older than the promised window of %s", b.ID, w.Window)
		}
	}
	a.line("%s", sinceText(w.Since))
}

// sinceText says from when on the cluster can be recovered to any moment.
func sinceText(since *time.Time) string {
	if since == nil {
		return "no WAL leads on from the newest backup"
	}
	return "every moment since " + since.UTC().Format(time.RFC3339) + " can be recovered, up to the end of the WAL"
}
