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
)

// retentionConfig is [retention] and [cluster.NAME.retention]; nil: not given.
type retentionConfig struct {
	Last    *int `toml:"last"`
	Daily   *int `toml:"daily"`
	Weekly  *int `toml:"weekly"`
	Monthly *int `toml:"monthly"`
}

// pruneResult is the JSON of prune.
type pruneResult struct {
	Cluster string           `json:"cluster"`
	DryRun  bool             `json:"dry_run"`
	OK      bool             `json:"ok"`
	Rules   backup.Retention `json:"rules"`
	Keep    []backup.Choice  `json:"keep"`
	Remove  []flow.Pruned    `json:"remove"`
}

func (a *app) pruneCommand() *cobra.Command {
	var dry bool
	c := &cobra.Command{
		Use: "prune", GroupID: "care", Args: exactly(0, ""),
		Short: "Delete the backups that no retention rule keeps",
		Long: `Delete the backups that no rule keeps, each as a whole set. The rules come from
the flags, else from [cluster.NAME.retention], else from [retention] in the
configuration, each number for itself; 0 is no rule. A backup stays if any rule
keeps it. Days, weeks (from Monday) and months are UTC's; of each the newest
backup stays, and those without a backup do not count. Without any rule nothing
is deleted (exit status 2).

Only complete backups count. Never deleted: what is held, in use by a copy, of
the future, or unreadable; the newest backup with a good verdict; and while none
has one, the newest 3 and the damaged ones. What is incomplete is left to sweep.
A damaged backup takes no place of a sound one.`,
		Example: "  cleancut prune --keep-last 3 --keep-daily 7 --keep-weekly 4 --dry-run\n  cleancut prune      # by the rules of the configuration",
		RunE: func(c *cobra.Command, _ []string) error {
			rules, err := a.retention(c)
			if err != nil {
				return err
			}
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			facts, err := f.PruneFacts(c.Context())
			if err != nil {
				return err
			}
			keep, remove, err := backup.PlanRetention(facts, rules, time.Now())
			if err != nil {
				return err
			}
			res := pruneResult{Cluster: f.Cluster, DryRun: dry, Rules: rules, Keep: append([]backup.Choice{}, keep...), Remove: []flow.Pruned{}}
			if dry {
				for _, r := range remove {
					res.Remove = append(res.Remove, flow.Pruned{Choice: r})
				}
			} else {
				res.Remove, err = f.Prune(c.Context(), remove)
			}
			res.OK = err == nil
			if perr := a.print(res, func() { a.pruneText(res) }); err == nil {
				err = perr
			}
			return err
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "only show the plan")
	for _, r := range keepFlags() {
		c.Flags().Int(r.flag, 0, r.usage+" [$"+variable(r.flag)+"]")
	}
	return c
}

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
func (a *app) retention(c *cobra.Command) (r backup.Retention, err error) {
	s, err := a.settings()
	if err != nil {
		return r, err
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
				return r, fmt.Errorf("%w: %s=%q is no number", backup.ErrUsage, variable(k.flag), v)
			}
		}
		if c.Flags().Changed(k.flag) {
			if *to, err = c.Flags().GetInt(k.flag); err != nil {
				return r, err
			}
		}
	}
	return r, r.Check()
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
		return
	}
	a.table(rows)
}
