// Package demo runs the whole story on this machine, with real storage, a real
// server and a real load, and checks every step of it.
//
//	storage → cluster → load → markers → backup → other host: restore → judge → verify → dump → nothing left
//
// What always holds: what a step takes is undone at the end or when a step
// fails, by its own name; the restoring half gets nothing of the production
// half but the catalog and the provider.
package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/lab"
)

// Options scales the story.
type Options struct {
	Program    string // path of the cleancut program
	Version    string
	Provider   string        // local or ec2, the latter over a test server
	Mode       backup.Mode   // auto, freeze, bracketed, or group with ec2
	Latency    time.Duration // of every call to EC2
	Skew       time.Duration // between the snapshots that EC2 makes of calls sent at once
	Rows       int64         // of the play database; 0 means what load.Create takes by itself
	VolumeSize backup.Bytes  // of each of the four volumes
	Report     string        // file for the report; its data goes beside it
	Out        io.Writer     // told of every step as it ends
	Log        *slog.Logger
}

// Result is what `cleancut demo --json` prints.
type Result struct {
	OK       bool    `json:"ok"`
	Where    string  `json:"where"`
	Provider string  `json:"provider"`
	Mode     string  `json:"mode"`
	Seconds  float64 `json:"seconds"`
	Steps    []Step  `json:"steps"`
	// Calls counts what the provider's service was asked, by action.
	Calls  map[string]int `json:"calls,omitempty"`
	Report string         `json:"report,omitempty"`
	Data   string         `json:"data,omitempty"` // the report's, with manifest, verdict and throughput
}

// Step is one step of the story (shared/scenario.md counts them).
type Step struct {
	N       int            `json:"n"`
	Name    string         `json:"name"`
	OK      bool           `json:"ok"`
	Seconds float64        `json:"seconds"`
	Facts   map[string]any `json:"facts"`
	Error   string         `json:"error,omitempty"`
}

// Run tells the story in this process, which must be root on a kernel with md
// arrays. The error is only for what kept it from beginning; a step that fails
// is in the result.
func Run(ctx context.Context, o Options) (res Result, err error) {
	if err := checkGround(o); err != nil {
		return res, err
	}
	res = Result{Where: string(lab.Where(ctx)), Provider: o.Provider, Mode: string(o.Mode), Report: o.Report, Data: dataBeside(o.Report)}
	if os.Getenv("CLEANCUT_GUEST") != "" {
		res.Where = string(lab.UML)
	}
	start := time.Now()
	s, err := newStory(ctx, o)
	if err != nil {
		return res, err
	}
	for _, ch := range s.chapters() {
		step := s.play(ctx, ch)
		res.Steps = append(res.Steps, step)
		tell(o.Out, step)
		if step.Error != "" {
			break
		}
	}
	if s.manifest.Cut.How != "" {
		res.Mode = string(s.manifest.Cut.How)
	}
	res.Calls = s.ground.calls()
	// Whatever is still there after the last step, or after a failed one.
	if err := s.cleanUp(ctx); err != nil {
		last := &res.Steps[len(res.Steps)-1]
		last.OK, last.Error = false, last.Error+" clean-up: "+err.Error()
	}
	res.OK = true
	for _, step := range res.Steps {
		res.OK = res.OK && step.OK
	}
	res.OK = res.OK && len(res.Steps) == len(s.chapters())
	res.Seconds = time.Since(start).Seconds()
	return res, s.writeReport(&res)
}

// play runs one step.
func (s *story) play(ctx context.Context, ch chapter) Step {
	step := Step{N: ch.n, Name: ch.name, Facts: map[string]any{}}
	start := time.Now()
	err := ctx.Err()
	if err == nil {
		err = ch.run(ctx, step.Facts)
	}
	step.Seconds = time.Since(start).Seconds()
	if step.OK = err == nil; err != nil {
		step.Error = err.Error()
		if hint := backup.HintOf(err); hint != "" {
			step.Error += " (" + hint + ")"
		}
	}
	return step
}

// tell prints one step for a person.
func tell(w io.Writer, s Step) {
	state := "ok"
	if !s.OK {
		state = "FAILED: " + s.Error
	}
	fmt.Fprintf(w, "%3d  %-58s %6.1f s  %s\n", s.N, s.Name, s.Seconds, state)
	for _, k := range sortedKeys(s.Facts) {
		b, err := json.Marshal(s.Facts[k])
		if err != nil {
			b = []byte(err.Error())
		}
		fmt.Fprintf(w, "       %s: %s\n", k, b)
	}
}

// Said is what was proven and what was not, in plain words.
func (r Result) Said() []string {
	if !r.OK {
		for _, s := range r.Steps {
			if s.Error != "" {
				return []string{fmt.Sprintf("The story stopped at step %d (%s): %s", s.N, s.Name, s.Error)}
			}
		}
		return []string{"The story did not end."}
	}
	other := "or volumes of a cloud provider"
	if r.Provider == "ec2" {
		other = "or EC2 itself: every call went through the AWS SDK, but to a test server with real block devices behind it"
	}
	return []string{
		"Proven in this run: four volumes striped by md RAID 0 were snapshotted at one instant under load; a host that had only the catalog and the provider assembled them beside the original, PostgreSQL recovered, every acknowledged row was there and nothing uncommitted was, every check of level full passed, the portable dump restored into an empty server with the same counts and hashes, two clones (one of them masked) were written to and destroyed without a trace in anything else, and a copy recovered with shipped WAL to a moment after the cut held exactly what had been committed by then; a standby seeded from the backup followed production and, promoted, agreed with it.",
		"Not proven: anything about another machine, a power loss, other layouts than this one, " + other + ".",
	}
}

// errStep makes a failed check of a step.
func errStep(format string, args ...any) error { return fmt.Errorf(format, args...) }
