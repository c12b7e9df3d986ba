package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func (a *app) catalogCommand() *cobra.Command {
	hint := "it is `cleancut catalog rebuild`"
	c := &cobra.Command{Use: "catalog", GroupID: "care", Short: "Rebuild a lost catalog from the snapshots", Args: known(hint),
		RunE: func(*cobra.Command, []string) error {
			return backup.Hint(fmt.Errorf("%w: catalog wants to know what to do", backup.ErrUsage), hint)
		}}
	c.AddCommand(a.rebuildCommand())
	return c
}

// rebuilt is what catalog rebuild prints as JSON.
type rebuilt struct {
	OK     bool `json:"ok"`
	DryRun bool `json:"dry_run"`
	flow.RebuildPlan
}

func (a *app) rebuildCommand() *cobra.Command {
	var dry bool
	c := &cobra.Command{
		Use: "rebuild", Args: exactly(0, ""),
		Short: "Bring a lost catalog back from the tags of the snapshots",
		Long: `Look at all snapshots that the provider has of this cluster and bring back into
the catalog the records of every backup whose set is whole, completed and
carries its manifest, proved by its digest. What is in the catalog already is
left as it is, so this may be run on a catalog of which a part is lost.

Not in the tags, so lost with the catalog: side files, verdicts, dumps and
holds. Verify and hold again before you prune.

Exit status 0 when every backup that was complete is there; 1 or 4 (something
is damaged) when one of them is not, after the others were brought back.`,
		Example: "  cleancut catalog rebuild --dry-run\n  cleancut catalog rebuild --catalog s3://bucket/prefix",
		RunE: func(c *cobra.Command, _ []string) error {
			f, _, err := a.flow(c.Context())
			if err != nil {
				return err
			}
			facts, err := f.RebuildFacts(c.Context())
			if err != nil {
				return err
			}
			plan := flow.PlanRebuild(facts)
			if !dry {
				if err := f.Rebuild(c.Context(), plan); err != nil {
					return err
				}
			}
			lost := plan.Err()
			if err := a.print(rebuilt{OK: lost == nil, DryRun: dry, RebuildPlan: plan}, func() { a.rebuildText(plan, dry) }); err != nil {
				return err
			}
			return lost
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "only show the plan")
	return c
}

func (a *app) rebuildText(plan flow.RebuildPlan, dry bool) {
	if len(plan.Actions) == 0 {
		a.line("the provider has no snapshots of cluster %s", plan.Cluster)
	}
	rows := [][]string{}
	put := 0
	for _, p := range plan.Actions {
		did := string(p.Kind)
		if p.Kind == flow.RebuildPut {
			put++
			if !dry {
				did += ": done"
			}
		}
		name := string(p.Backup)
		if name == "" {
			name = "(none)"
		}
		rows = append(rows, []string{did, name, strings.ReplaceAll(p.Why, "\n", "; ")})
	}
	a.table(rows)
	for _, p := range plan.Actions {
		for _, path := range p.Lost {
			a.line("%s: the side file %s is lost", p.Backup, path)
		}
	}
	if len(plan.Others) > 0 {
		a.line("\nThere are snapshots of other clusters too: %s. Rebuild each with --cluster NAME.", strings.Join(plan.Others, ", "))
	}
	if put > 0 {
		a.line("\nVerdicts, dumps and holds are not in the tags: verify and hold again before you prune.")
	}
}
