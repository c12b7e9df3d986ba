package drill_test

import (
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/drill"
	"cleancut/internal/load"
)

func check(name string, r backup.CheckResult) backup.Check {
	return backup.Check{Name: name, Result: r, Detail: "detail of " + name}
}

func TestWhatARestoreMeetsFirstNamesTheClass(t *testing.T) {
	const amcheck = "indexes and heap (pg_amcheck)"
	disk := backup.FilesystemCheck("xfs", "/dev/loop7")
	good := []backup.Check{check(backup.CheckRecovered, backup.Passed), check(backup.CheckFlushed, backup.Passed), check(amcheck, backup.Passed), check(disk, backup.Passed)}
	failing := func(names ...string) []backup.Check {
		out := append([]backup.Check{}, good...)
		for _, n := range names {
			out = append(out, check(n, backup.Failed))
		}
		return out
	}
	lost := load.Finding{Words: load.Tally{Acked: 10, Missing: 1}, BulkVisible: 3}
	fewer := load.Finding{Tables: []load.TableCount{{Table: "play.people", Want: 10, Found: 9}}}
	more := load.Finding{Tables: []load.TableCount{{Table: "play.people", Want: 10, Found: 11}}}
	halves := load.Finding{Sums: load.Sums{Off: []int{1}}}
	unreadable := load.Finding{Words: load.Tally{Acked: 10, Missing: 10}, Unreadable: []load.Unreadable{{What: "play.words_said", Message: "invalid page"}}}
	for _, c := range []struct {
		name   string
		checks []backup.Check
		found  *load.Finding
		want   drill.Class
		says   string
	}{
		{"all passed", good, &load.Finding{}, drill.Sound, ""},
		{"not mounted is all there is to say", []backup.Check{check(backup.CheckMounted, backup.Failed)}, nil, drill.NoMount, "detail of mounted"},
		{"not recovered is all there is to say", []backup.Check{check(backup.CheckRecovered, backup.Failed)}, nil, drill.NoStart, "detail of recovered"},
		{"the server's own reason", []backup.Check{{Name: backup.CheckRecovered, Result: backup.Failed, Detail: "its log ends:\n  x LOG:  a\n  x PANIC:  no checkpoint\n  x LOG:  b"}}, nil, drill.NoStart, "PANIC: no checkpoint"},
		{"a filesystem that cannot be read on the way to the start", []backup.Check{check(backup.CheckReadable, backup.Failed)}, nil, drill.FSDamage, "detail"},
		{"a damaged filesystem before lost rows", failing(amcheck, disk), &lost, drill.FSDamage, "xfs check of the filesystem: detail"},
		{"lost rows before phantoms and failed checks", failing(amcheck, backup.CheckOwner), &lost, drill.Lost, "1 of 10 words"},
		{"rows of a table that never changed are lost too", good, &fewer, drill.Lost, "1 of 10 rows of play.people"},
		{"WAL that was not reached is loss", failing(backup.CheckFlushed, amcheck), &load.Finding{}, drill.Lost, "detail of flushed"},
		{"phantoms before failed checks", failing(amcheck, backup.CheckOwner), &load.Finding{BulkVisible: 3}, drill.Phantom, "3 rows"},
		{"rows too many", good, &more, drill.Phantom, "play.people"},
		{"half of a transaction", good, &halves, drill.Phantom, "half of a transaction"},
		{"a failed check alone is silent damage", failing(amcheck), &load.Finding{}, drill.Silent, amcheck},
		{"a table that cannot be read is not lost rows", failing(backup.CheckOwner), &unreadable, drill.Silent, "play.words_said cannot be read"},
		{"a server that died while it was asked", failing(backup.CheckOwner), nil, drill.Silent, "the owner's own look"},
		{"damage is damage though another check could not run", append(failing(amcheck), check("x", backup.CouldNotRun)), &load.Finding{}, drill.Silent, amcheck},
		{"a check that could not run is not a pass", append([]backup.Check{check("x", backup.CouldNotRun)}, good...), &load.Finding{}, "", "x: detail"},
		{"rows that were not looked at are no pass", good, nil, "", "promise"},
		{"no check at all is no pass", nil, &load.Finding{}, "", "promise"},
	} {
		t.Run(c.name, func(t *testing.T) {
			class, reason := drill.Judge(backup.Verdict{Checks: c.checks}, c.found)
			if class != c.want || !strings.Contains(reason, c.says) {
				t.Errorf("got %q (%s), want %q (%s)", class, reason, c.want, c.says)
			}
		})
	}
}

func TestEveryClassHasItsWords(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range drill.Classes() {
		if c.Words() == "" || seen[c.Words()] {
			t.Errorf("%s: %q", c, c.Words())
		}
		seen[c.Words()] = true
	}
	if len(seen) != 7 {
		t.Errorf("%d classes, want 7", len(seen))
	}
}
