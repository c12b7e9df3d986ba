package flow_test

import (
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

func TestOnlyADumpOfThisHostThatNobodyMakesIsSwept(t *testing.T) {
	begun := func(host string) backup.DumpBegun { return backup.DumpBegun{Backup: first, Name: "d", Host: host} }
	for name, c := range map[string]struct {
		dump backup.DumpBegun
		busy bool
		want flow.ActionKind
	}{
		"left":           {begun("prod"), false, flow.RemoveDump},
		"being made":     {begun("prod"), true, flow.OnlyList},
		"another host's": {begun("far"), false, flow.OnlyList},
	} {
		plan := flow.PlanSweep(flow.Facts{Host: "prod", Cluster: "main", Dumps: []backup.DumpBegun{c.dump}, Busy: map[string]bool{"dump-" + string(first) + "-d": c.busy}})
		if len(plan) != 1 || plan[0].Kind != c.want || plan[0].Dump != c.dump {
			t.Errorf("%s: %+v", name, plan)
		}
	}
}
