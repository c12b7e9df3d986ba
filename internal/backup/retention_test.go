package backup_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
)

// made names a backup made at that UTC time.
func made(t *testing.T, when string) backup.ID {
	t.Helper()
	moment, err := time.Parse("2006-01-02 15:04", when)
	if err != nil {
		t.Fatal(err)
	}
	return backup.ID(moment.Format("20060102T150405Z") + "-00000a")
}

func clock(t *testing.T, when string) time.Time {
	t.Helper()
	return made(t, when).Time()
}

// plan runs PlanRetention and returns the kept ids with their reasons and the
// removed ones.
func plan(t *testing.T, all []backup.Candidate, rules backup.Retention, now time.Time) (keep map[backup.ID]string, remove map[backup.ID]bool) {
	t.Helper()
	kept, removed, err := backup.PlanRetention(all, rules, now)
	if err != nil {
		t.Fatal(err)
	}
	keep, remove = map[backup.ID]string{}, map[backup.ID]bool{}
	for _, k := range kept {
		keep[k.ID] = strings.Join(k.Why, "; ")
	}
	for _, r := range removed {
		remove[r.ID] = true
	}
	return keep, remove
}

func TestPlanRetention(t *testing.T) {
	nights := func(n int, set func(i int, c *backup.Candidate)) []backup.Candidate { // i = 0 is the newest
		var out []backup.Candidate
		for i := range n {
			c := backup.Candidate{ID: backup.ID(clock(t, "2026-11-22 02:15").AddDate(0, 0, -i).Format("20060102T150405Z") + "-00000a"), Verdict: backup.Good}
			if set != nil {
				set(i, &c)
			}
			out = append(out, c)
		}
		return out
	}
	verdict := func(w backup.Word) func(int, *backup.Candidate) {
		return func(_ int, c *backup.Candidate) { c.Verdict = w }
	}
	only := func(n int, change func(*backup.Candidate)) func(int, *backup.Candidate) {
		return func(i int, c *backup.Candidate) {
			if i == n {
				change(c)
			}
		}
	}
	for _, c := range []struct {
		name  string
		all   []backup.Candidate
		rules backup.Retention
		keep  []int  // which of all, by index
		why   string // of the last of keep
	}{
		{"the newest three", nights(6, nil), backup.Retention{Last: 3}, []int{0, 1, 2}, "last 3 of 3"},
		{"more places than backups", nights(2, nil), backup.Retention{Last: 9}, []int{0, 1}, "last 2 of 9"},
		{"seven days of ten", nights(10, nil), backup.Retention{Daily: 7}, []int{0, 1, 2, 3, 4, 5, 6}, "daily 2026-11-16"},
		{"two ISO weeks: from Sunday the 22nd and Sunday the 15th", nights(20, nil), backup.Retention{Weekly: 2}, []int{0, 7}, "weekly 2026-W46"},
		{"two months", nights(40, nil), backup.Retention{Monthly: 2}, []int{0, 22}, "monthly 2026-10"},
		{"the newest with a good verdict stays beside the rules", nights(5, func(i int, c *backup.Candidate) {
			if i < 3 {
				c.Verdict = backup.Unproven
			}
		}), backup.Retention{Last: 1}, []int{0, 3}, "the newest with a good verdict"},
		{"nothing is proven: the newest three stay", nights(6, verdict(backup.Unproven)), backup.Retention{Last: 1}, []int{0, 1, 2}, "no backup has a good verdict"},
		{"everything is damaged: all stay", nights(4, verdict(backup.Damaged)), backup.Retention{Last: 1}, []int{0, 1, 2, 3}, "damaged, but no backup has a good verdict"},
		{"a damaged one takes no place", nights(6, only(0, func(c *backup.Candidate) { c.Verdict = backup.Damaged })), backup.Retention{Last: 2}, []int{0, 1, 2}, "last 2 of 2"},
		{"a damaged one goes when the rules would let it go", nights(6, only(2, func(c *backup.Candidate) { c.Verdict = backup.Damaged })), backup.Retention{Last: 2}, []int{0, 1}, "last 2 of 2"},
		{"a damaged one is no proof", nights(4, func(i int, c *backup.Candidate) {
			c.Verdict = []backup.Word{backup.Damaged, backup.Unproven, backup.Good, backup.Good}[i]
		}), backup.Retention{Last: 1}, []int{0, 1, 2}, "the newest with a good verdict"},
		{"an incomplete one is neither counted nor removed", nights(4, only(0, func(c *backup.Candidate) { c.Incomplete = true })), backup.Retention{Last: 2}, []int{0, 1, 2}, "last 2 of 2"},
		{"an old incomplete one is left to sweep", nights(4, only(3, func(c *backup.Candidate) { c.Incomplete = true })), backup.Retention{Last: 1}, []int{0, 3}, "sweep"},
		{"a torn one", nights(4, only(3, func(c *backup.Candidate) { c.Torn = true })), backup.Retention{Last: 1}, []int{0, 3}, "torn"},
		{"a torn one is no proof", nights(5, func(i int, c *backup.Candidate) {
			c.Torn, c.Verdict = i == 0, map[bool]backup.Word{true: backup.Good}[i == 0 || i == 4]
		}), backup.Retention{Last: 1}, []int{0, 1, 4}, "the newest with a good verdict"},
		{"one whose records cannot be read", nights(4, only(2, func(c *backup.Candidate) { c.Unreadable = "cut short" })), backup.Retention{Last: 1}, []int{0, 2}, "cut short"},
		{"one that is being deleted does not count", nights(4, only(0, func(c *backup.Candidate) { c.Begun = "its deletion" })), backup.Retention{Last: 1}, []int{0, 1}, "last 1 of 1"},
		{"a held one", nights(5, only(4, func(c *backup.Candidate) { c.Held = "held by root" })), backup.Retention{Last: 1}, []int{0, 4}, "held by root"},
		{"one in use", nights(5, only(3, func(c *backup.Candidate) { c.InUse = "copy x" })), backup.Retention{Last: 1}, []int{0, 3}, "in use: copy x"},
		{"one from the future is named and takes no place", nights(5, only(0, func(c *backup.Candidate) { c.ID = made(t, "2027-01-01 00:00") })), backup.Retention{Last: 1}, []int{0, 1}, "last 1 of 1"},
		{"two of one day: the later stays", []backup.Candidate{{ID: made(t, "2026-11-21 23:59"), Verdict: backup.Good}, {ID: made(t, "2026-11-21 00:00"), Verdict: backup.Good}}, backup.Retention{Daily: 5}, []int{0}, "daily 2026-11-21"},
		{"a minute on either side of midnight are two days", []backup.Candidate{{ID: made(t, "2026-11-21 00:00"), Verdict: backup.Good}, {ID: made(t, "2026-11-20 23:59"), Verdict: backup.Good}}, backup.Retention{Daily: 5}, []int{0, 1}, "daily 2026-11-20"},
		{"New Year lies within one ISO week", []backup.Candidate{{ID: made(t, "2026-01-01 12:00"), Verdict: backup.Good}, {ID: made(t, "2025-12-31 12:00"), Verdict: backup.Good}}, backup.Retention{Weekly: 5}, []int{0}, "weekly 2026-W01"},
		{"days without a backup do not count", []backup.Candidate{{ID: made(t, "2026-11-21 12:00"), Verdict: backup.Good}, {ID: made(t, "2026-03-01 12:00"), Verdict: backup.Good}}, backup.Retention{Daily: 2}, []int{0, 1}, "daily 2026-03-01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			keep, remove := plan(t, c.all, c.rules, clock(t, "2026-11-22 12:00"))
			want := map[backup.ID]bool{}
			for _, i := range c.keep {
				want[c.all[i].ID] = true
			}
			for _, b := range c.all {
				if _, kept := keep[b.ID]; kept != want[b.ID] || remove[b.ID] == kept {
					t.Errorf("%s: kept %v, want %v", b.ID, kept, want[b.ID])
				}
			}
			if last := c.all[c.keep[len(c.keep)-1]].ID; !strings.Contains(keep[last], c.why) {
				t.Errorf("%s is kept because %q, want %q", last, keep[last], c.why)
			}
		})
	}
}

func TestAFutureBackupIsNamed(t *testing.T) {
	keep, _ := plan(t, []backup.Candidate{{ID: made(t, "2026-11-22 15:00")}}, backup.Retention{Last: 1}, clock(t, "2026-11-22 12:00"))
	if why := keep[made(t, "2026-11-22 15:00")]; !strings.Contains(why, "from the future (3h0m0s ahead): check the clocks") {
		t.Errorf("got %q", why)
	}
}

func TestTwoOfOneSecondAreOrderedByTheirManifests(t *testing.T) {
	now := clock(t, "2026-11-22 12:00")
	early := backup.Candidate{ID: "20261122T110000Z-ffffff", Created: now.Add(-time.Hour + 100*time.Millisecond), Verdict: backup.Good}
	late := backup.Candidate{ID: "20261122T110000Z-000000", Created: now.Add(-time.Hour + 200*time.Millisecond), Verdict: backup.Good}
	keep, remove := plan(t, []backup.Candidate{early, late}, backup.Retention{Last: 1}, now)
	if keep[late.ID] == "" || !remove[early.ID] {
		t.Errorf("kept %v, removed %v", keep, remove)
	}
}

func TestNoRuleIsNeverTheWishToDeleteEverything(t *testing.T) {
	for _, r := range []backup.Retention{{}, {Last: -1}, {Last: 3, Monthly: -2}} {
		keep, remove, err := backup.PlanRetention([]backup.Candidate{{ID: made(t, "2026-11-22 15:00")}}, r, time.Now())
		if !errors.Is(err, backup.ErrUsage) || len(keep)+len(remove) > 0 {
			t.Errorf("%+v: got %v, %v, %v", r, keep, remove, err)
		}
	}
}

// world makes backups and rules at random, out of few days, so that they meet.
func world(r *rand.Rand) (all []backup.Candidate, rules backup.Retention, now time.Time) {
	now = time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC).AddDate(0, 0, r.IntN(60))
	maybe := func(n int, s string) string {
		if r.IntN(n) == 0 {
			return s
		}
		return ""
	}
	seen := map[backup.ID]bool{}
	for range r.IntN(25) {
		when := now.Add(-time.Duration(r.IntN(90*24)) * time.Hour / time.Duration(1+r.IntN(4)))
		if r.IntN(12) == 0 {
			when = now.Add(time.Duration(1+r.IntN(100)) * time.Hour)
		}
		id := backup.ID(fmt.Sprintf("%s-%06x", when.Format("20060102T150405Z"), r.IntN(3)))
		if seen[id] {
			continue
		}
		seen[id] = true
		all = append(all, backup.Candidate{ID: id, Incomplete: r.IntN(9) == 0, Torn: r.IntN(12) == 0, Unreadable: maybe(12, "cut short"), Begun: maybe(12, "being made"),
			Verdict: []backup.Word{backup.Unproven, backup.Unproven, backup.Good, backup.Damaged}[r.IntN(4)], Held: maybe(9, "held"), InUse: maybe(9, "a copy")})
	}
	if r.IntN(4) == 0 { // a catalog where nothing was ever verified
		for i := range all {
			all[i].Verdict = backup.Unproven
		}
	}
	for rules == (backup.Retention{}) {
		rules = backup.Retention{Last: r.IntN(4), Daily: r.IntN(4), Weekly: r.IntN(3), Monthly: r.IntN(3)}
	}
	return all, rules, now
}

// counts: a backup that retention may choose.
func counts(c backup.Candidate, now time.Time) bool {
	return !c.Incomplete && !c.Torn && c.Unreadable == "" && c.Begun == "" && !c.ID.Time().After(now.Add(time.Minute))
}

// wrong says which promise of PlanRetention a plan breaks, or "".
func wrong(all []backup.Candidate, rules backup.Retention, now time.Time) string {
	keep, remove, err := backup.PlanRetention(all, rules, now)
	if err != nil {
		return err.Error()
	}
	kept, removed := map[backup.ID]bool{}, map[backup.ID]bool{}
	for _, k := range keep {
		kept[k.ID] = true
		if len(k.Why) == 0 {
			return "no reason for " + string(k.ID)
		}
	}
	for _, r := range remove {
		removed[r.ID] = true
	}
	if len(kept)+len(removed) != len(all) {
		return "not every backup is in the plan, or one is twice"
	}
	good, goodKept, sound, soundKept, unproven := 0, 0, 0, 0, true
	for _, c := range all {
		switch {
		case kept[c.ID] == removed[c.ID]:
			return "both or neither: " + string(c.ID)
		case removed[c.ID] && (c.Held != "" || c.InUse != "" || !counts(c, now)):
			return fmt.Sprintf("removed %+v", c)
		}
		if counts(c, now) && c.Verdict != backup.Damaged {
			sound++
			if kept[c.ID] {
				soundKept++
			}
		}
		if counts(c, now) && c.Verdict == backup.Good {
			unproven = false
			good++
			if kept[c.ID] {
				goodKept++
			}
		}
	}
	switch {
	case good > 0 && goodKept == 0:
		return "no backup with a good verdict is kept"
	case soundKept < min(sound, rules.Last):
		return fmt.Sprintf("%d of %d sound ones kept, rule last %d", soundKept, sound, rules.Last)
	case unproven && soundKept < min(sound, backup.KeptUnproven):
		return fmt.Sprintf("nothing is proven, and only %d of %d sound ones are kept", soundKept, sound)
	case soundKept == 0 && sound > 0:
		return "no sound one is kept"
	}
	for _, c := range all { // damage is no reason to lose what is worse off
		if unproven && c.Verdict == backup.Damaged && removed[c.ID] {
			return "a damaged one is removed though nothing is proven"
		}
	}
	return wrongAfter(all, rules, now, keep, kept)
}

// wrongAfter looks at the plan after this one, and at plans with more rules.
func wrongAfter(all []backup.Candidate, rules backup.Retention, now time.Time, keep []backup.Choice, kept map[backup.ID]bool) string {
	left := slices.DeleteFunc(slices.Clone(all), func(c backup.Candidate) bool { return !kept[c.ID] })
	if _, again, err := backup.PlanRetention(left, rules, now); err != nil || len(again) > 0 {
		return fmt.Sprintf("planned again it removes %v (%v)", again, err)
	}
	shuffled := slices.Clone(all)
	slices.Reverse(shuffled)
	if other, _, err := backup.PlanRetention(shuffled, rules, now); err != nil || !reflect.DeepEqual(other, keep) {
		return "the order of the facts matters"
	}
	more := backup.Retention{Last: rules.Last + 1, Daily: rules.Daily + 1, Weekly: rules.Weekly + 1, Monthly: rules.Monthly + 1}
	_, fewer, err := backup.PlanRetention(all, more, now)
	if err != nil {
		return err.Error()
	}
	for _, r := range fewer {
		if kept[r.ID] {
			return "a wider rule removes what a narrower one keeps: " + string(r.ID)
		}
	}
	return ""
}

func TestWhateverThereIsRetentionKeepsItsPromises(t *testing.T) {
	kinds := map[bool]int{}
	for seed := range uint64(20_000) {
		all, rules, now := world(rand.New(rand.NewPCG(seed, 0)))
		if complaint := wrong(all, rules, now); complaint != "" {
			t.Fatalf("seed %d: %s\n%+v at %s\n%+v", seed, complaint, rules, now, all)
		}
		_, remove, _ := backup.PlanRetention(all, rules, now)
		kinds[len(remove) > 0]++
	}
	if kinds[true] < 5_000 {
		t.Errorf("only %d worlds had something to remove", kinds[true])
	}
}

func FuzzRetention(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		all, rules, now := world(rand.New(rand.NewPCG(a, b)))
		if complaint := wrong(all, rules, now); complaint != "" {
			t.Fatalf("%s\n%+v at %s\n%+v", complaint, rules, now, all)
		}
	})
}

func TestHoldsEnd(t *testing.T) {
	now := clock(t, "2026-11-22 12:00")
	for text, want := range map[string]string{"2026-12-31": "2027-01-01T00:00:00Z", "2026-11-22": "2026-11-23T00:00:00Z", "2026-12-31T18:00:00+01:00": "2026-12-31T17:00:00Z", "30d": "2026-12-22T12:00:00Z", "12h": "2026-11-23T00:00:00Z"} {
		got, err := backup.ParseUntil(text, now)
		if err != nil || got.Format(time.RFC3339) != want {
			t.Errorf("%s: got %v, %v, want %s", text, got, err, want)
		}
		if h := (backup.Hold{Until: &got}); !h.Active(now) || h.Active(got) {
			t.Errorf("%s: in force at its end, or not before", text)
		}
	}
	for _, text := range []string{"", "soon", "2026-11-21", "0d", "-3d", "-12h", "99999999999999d", "2026-13-01", "2020-01-01T00:00:00Z"} {
		if got, err := backup.ParseUntil(text, now); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: got %v, %v, want a usage error", text, got, err)
		}
	}
	if !(backup.Hold{}).Active(now.AddDate(100, 0, 0)) {
		t.Error("a hold without an end has ended")
	}
}

func TestAHoldSaysWhoWhenAndWhy(t *testing.T) {
	until := clock(t, "2026-12-31 00:00")
	h := backup.Hold{By: "ann", Host: "db1", Time: clock(t, "2026-11-22 12:00"), Until: &until, Reason: "before the migration"}
	want := "held by ann on db1 since 2026-11-22T12:00:00Z until 2026-12-31T00:00:00Z: before the migration"
	if got := h.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
