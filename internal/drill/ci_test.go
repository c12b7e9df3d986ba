package drill_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTheStandingDrillSaysWhichOfTheTwoWentWrong gives scripts/drill-ci a
// program that only prints summaries.
func TestTheStandingDrillSaysWhichOfTheTwoWentWrong(t *testing.T) {
	if testing.Short() {
		t.Skip("needs bash and jq")
	}
	const sound, damaged, unjudged = `"sound":1,"damaged":0`, `"sound":0,"damaged":1`, `"sound":0,"damaged":0`
	for _, c := range []struct {
		name                            string
		frozen, skewed, crash, archived string // the cells of freeze, and those of bracketed
		torn                            string // $n is how often the program was called
		status                          string
		good                            bool
		says                            string
		calls                           int
		kept                            bool
	}{
		{"held ones sound, others damaged", sound, sound, damaged, sound, damaged, "0", true, "", 1, false},
		{"a frozen cut is damaged", sound, damaged, damaged, sound, damaged, "4", false, "a held cut was damaged (freeze, 5000 ms apart, crash recovery)", 1, true},
		{"a bracketed cut is damaged", sound, sound, damaged, damaged, damaged, "4", false, "a held cut was damaged (bracketed, 5000 ms apart, archive recovery)", 1, true},
		{"a frozen cut could not be judged", unjudged, sound, damaged, sound, damaged, "0", false, "could not be judged (freeze, 0 ms", 1, true},
		{"torn cuts are never damaged", sound, sound, damaged, sound, sound, "0", false, "cuts of mode none was found damaged", 4, true},
		{"images of bracketed cuts are never damaged", sound, sound, sound, sound, damaged, "0", false, "cuts of mode bracketed was found damaged", 4, true},
		{"a torn cut is damaged at the third trial", sound, sound, damaged, sound, `"sound":2,"damaged":$((n > 2))`, "0", true, "", 3, false},
		{"the drill does not run", sound, sound, damaged, sound, damaged, "2", false, "failed with status 2", 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			program := filepath.Join(dir, "cleancut")
			cell := func(mode, skew, recovery, counts string) string {
				return `{\"mode\":\"` + mode + `\",\"recovery\":\"` + recovery + `\",\"skew_ms\":` + skew + `,\"trials\":1,` + strings.ReplaceAll(counts, `"`, `\"`) + `,\"said\":\"said\"}`
			}
			text := "#!/bin/bash\necho x >>" + dir + "/calls\nn=$(wc -l <" + dir + "/calls)\necho \"{\\\"cells\\\":[" +
				strings.Join([]string{cell("freeze", "0", "crash", c.frozen), cell("freeze", "0", "archive", sound), cell("freeze", "5000", "crash", c.skewed), cell("freeze", "5000", "archive", sound),
					cell("bracketed", "0", "crash", sound), cell("bracketed", "0", "archive", sound), cell("bracketed", "5000", "crash", c.crash), cell("bracketed", "5000", "archive", c.archived),
					cell("none", "0", "crash", sound), cell("none", "5000", "crash", c.torn), cell("none", "5000", "archive", damaged)}, ",") + "]}\"\nexit " + c.status + "\n"
			if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "../../scripts/drill-ci", program)
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			out, err := cmd.CombinedOutput()
			if (err == nil) != c.good || !strings.Contains(string(out), c.says) {
				t.Errorf("got %v and %s, want %q", err, out, c.says)
			}
			calls, err := os.ReadFile(filepath.Join(dir, "calls"))
			if err != nil || len(calls)/2 != c.calls {
				t.Errorf("the drill ran %d times (%v), want %d", len(calls)/2, err, c.calls)
			}
			left, err := filepath.Glob(filepath.Join(dir, "cleancut-drill-ci-*"))
			if err != nil || (len(left) == 1) != c.kept {
				t.Errorf("results left: %v (%v)", left, err)
			}
		})
	}
}
