package flow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"cleancut/internal/backup"
)

// NightlyPart is a part of the nightly job.
type NightlyPart string

// The parts.
const (
	NightlyBackup NightlyPart = "backup"
	NightlyDump   NightlyPart = "dump" // and its check
	NightlyVerify NightlyPart = "verify"
	NightlyPrune  NightlyPart = "prune"
)

// NightlyParts lists the parts in their order.
func NightlyParts() []NightlyPart {
	return []NightlyPart{NightlyBackup, NightlyDump, NightlyVerify, NightlyPrune}
}

// NightlyOptions says what the night is made of.
type NightlyOptions struct {
	Skip   []NightlyPart
	Backup BackupOptions
	Dump   DumpOptions // ID is set here
	// Identities open a dump that was encrypted, for its check. Without any an
	// encrypted dump is not checked.
	Identities []string
	Level      backup.Level // of the verification
	Rules      backup.Retention
	Window     backup.Span
}

// StepState is how a part of the night ended.
type StepState string

// The states.
const (
	StepDone    StepState = "done"
	StepFailed  StepState = "failed"
	StepSkipped StepState = "skipped" // as it was asked for
	StepNotRun  StepState = "not run" // because of what came before
)

// NightlyStep is what became of one part.
type NightlyStep struct {
	Part    NightlyPart `json:"part"`
	State   StepState   `json:"state"`
	Why     string      `json:"why,omitempty"` // of StepNotRun
	Started time.Time   `json:"started,omitzero"`
	Seconds float64     `json:"seconds"`
	Error   string      `json:"error,omitempty"`
	Hint    string      `json:"hint,omitempty"`
	Exit    int         `json:"exit"` // the exit status of the part; whoever prints it sets it
	Err     error       `json:"-"`    // of StepFailed
}

// NightlyCut is what the summary tells of the backup.
type NightlyCut struct {
	ID       backup.ID          `json:"id"`
	Cut      time.Time          `json:"cut"` // the moment that it holds
	Achieved backup.Consistency `json:"achieved"`
	Bytes    backup.Bytes       `json:"bytes"` // of its volumes together
	FreezeMS float64            `json:"freeze_ms"`
}

// NightlyDumped is what the summary tells of the dump.
type NightlyDumped struct {
	Name       string            `json:"name"`
	SQL        backup.Bytes      `json:"sql_bytes"`
	Compressed backup.Bytes      `json:"compressed_bytes"`
	Check      *backup.DumpCheck `json:"check"`               // null: not checked
	Unchecked  string            `json:"unchecked,omitempty"` // why it was not, though nothing failed
}

// Good reports whether the dump was checked and nothing was found.
func (d NightlyDumped) Good() bool { return d.Check != nil && d.Check.Result() == backup.Passed }

// Nightly is the summary of one night. What a part did is there as far as it
// came, also where it failed.
type Nightly struct {
	Cluster string          `json:"cluster"`
	Host    string          `json:"host"`
	Started time.Time       `json:"started"`
	Seconds float64         `json:"seconds"`
	Steps   []NightlyStep   `json:"parts"`
	Backup  *NightlyCut     `json:"backup"` // null: none was made or found
	Dump    *NightlyDumped  `json:"dump"`
	Verdict *backup.Verdict `json:"verdict"`
	Pruned  *PruneResult    `json:"prune"`
}

// step returns what became of a part so far; nil: it has not had its turn.
func (n *Nightly) step(p NightlyPart) *NightlyStep {
	if i := slices.IndexFunc(n.Steps, func(s NightlyStep) bool { return s.Part == p }); i >= 0 {
		return &n.Steps[i]
	}
	return nil
}

// failed reports whether a part was tried in vain.
func (n *Nightly) failed(p NightlyPart) bool {
	s := n.step(p)
	return s != nil && s.State == StepFailed
}

// obstacle says why the next part must not run after what came before; "" if
// nothing speaks against it. Nothing is deleted in a night without a new
// backup, nor after any sign of damage, nor where the proof that was asked for
// is not there.
func (n *Nightly) obstacle(p NightlyPart) string {
	if p == NightlyPrune {
		for _, s := range n.Steps {
			if errors.Is(s.Err, backup.ErrDamage) {
				return "damage was found (" + string(s.Part) + "): nothing is deleted before somebody has looked"
			}
		}
	}
	switch {
	case p != NightlyBackup && n.failed(NightlyBackup):
		return "there is no backup of this night"
	case p == NightlyPrune && n.failed(NightlyVerify):
		return "the backup of this night is not proven"
	}
	return ""
}

// Nightly makes a backup, dumps it and checks the dump, verifies it, and prunes,
// one after the other. A part that fails does not keep those from running that
// still make sense, see obstacle; each failure is in its step, and only what
// kept the night from beginning is an error: ErrInUse while another one of the
// cluster runs on this host. Where the backup is skipped the newest complete one
// in the catalog takes its place. When ctx ends, the part under way undoes what
// it must, and the others are not run.
func (f *Flow) Nightly(ctx context.Context, o NightlyOptions) (n Nightly, err error) {
	release, err := f.State.Lock("nightly-" + f.Cluster)
	if err != nil {
		return n, backup.Hint(fmt.Errorf("another nightly job of cluster %s is running on this host: %w", f.Cluster, err), "wait for it, or look for it with `ps`")
	}
	defer release()
	n = Nightly{Cluster: f.Cluster, Host: f.Host, Started: time.Now().UTC()}
	for _, p := range NightlyParts() {
		n.Steps = append(n.Steps, f.nightlyStep(ctx, &n, p, o))
	}
	n.Seconds = time.Since(n.Started).Seconds()
	return n, nil
}

func (f *Flow) nightlyStep(ctx context.Context, n *Nightly, p NightlyPart, o NightlyOptions) NightlyStep {
	s := NightlyStep{Part: p, State: StepDone}
	skip := slices.Contains(o.Skip, p)
	do := map[NightlyPart]func(context.Context, *Nightly, NightlyOptions) error{
		NightlyBackup: f.nightlyBackup, NightlyDump: f.nightlyDump, NightlyVerify: f.nightlyVerify, NightlyPrune: f.nightlyPrune}[p]
	if p == NightlyBackup && skip && !(slices.Contains(o.Skip, NightlyDump) && slices.Contains(o.Skip, NightlyVerify)) {
		skip, do = false, f.nightlyNewest // the others need one
		s.State = StepSkipped
	}
	switch {
	case skip:
		s.State = StepSkipped
		return s
	case ctx.Err() != nil:
		s.State, s.Why = StepNotRun, "interrupted"
		return s
	}
	if s.Why = n.obstacle(p); s.Why != "" {
		s.State = StepNotRun
		return s
	}
	s.Started = time.Now().UTC()
	f.tell("nightly", string(p))
	if s.Err = do(ctx, n, o); s.Err != nil {
		s.State, s.Error, s.Hint = StepFailed, s.Err.Error(), backup.HintOf(s.Err)
	}
	s.Seconds = time.Since(s.Started).Seconds()
	return s
}

func (f *Flow) nightlyBackup(ctx context.Context, n *Nightly, o NightlyOptions) error {
	m, err := f.Backup(ctx, o.Backup)
	if err == nil {
		n.Backup = nightlyCut(m)
	}
	return err
}

// nightlyNewest takes the newest backup, also of a host whose clock is a little ahead.
func (f *Flow) nightlyNewest(ctx context.Context, n *Nightly, _ NightlyOptions) error {
	id, err := f.Nearest(ctx, time.Now().Add(time.Minute))
	if err != nil {
		return err
	}
	e, err := f.Catalog.Backup(ctx, id)
	if err == nil {
		n.Backup = nightlyCut(e.Manifest)
	}
	return err
}

func nightlyCut(m backup.Manifest) *NightlyCut {
	_, cut := m.Span()
	out := &NightlyCut{ID: m.ID, Cut: cut.UTC(), Achieved: m.Cut.Achieved, FreezeMS: m.Cut.FreezeMS}
	for _, v := range m.Topology.Members() {
		out.Bytes += v.Volume.Size
	}
	return out
}

func (f *Flow) nightlyDump(ctx context.Context, n *Nightly, o NightlyOptions) error {
	d := o.Dump
	d.ID = n.Backup.ID
	res, failed := f.Dump(ctx, d)
	if failed != nil && !errors.Is(failed, ErrPartialDump) { // what lacks databases is stored, and checked
		return failed
	}
	plain, stored := res.Manifest.Sizes()
	n.Dump = &NightlyDumped{Name: res.Manifest.Name, SQL: plain, Compressed: stored}
	if len(res.Manifest.Recipients) > 0 && len(o.Identities) == 0 {
		n.Dump.Unchecked = "it is encrypted, and no identity was given to open it"
		return failed
	}
	f.tell("nightly", "check of the dump")
	check, err := f.CheckDump(ctx, CheckDumpOptions{ID: d.ID, Name: n.Dump.Name, Identities: o.Identities, Jobs: d.Jobs})
	if len(check.Checks) > 0 {
		n.Dump.Check = &check
	}
	return errors.Join(failed, err)
}

func (f *Flow) nightlyVerify(ctx context.Context, n *Nightly, o NightlyOptions) error {
	v, err := f.Verify(ctx, VerifyOptions{ID: n.Backup.ID, Level: o.Level})
	if len(v.Checks) > 0 {
		n.Verdict = &v
	}
	return err
}

func (f *Flow) nightlyPrune(ctx context.Context, n *Nightly, o NightlyOptions) error {
	res, err := f.PruneByRules(ctx, o.Rules, o.Window, false)
	if res.Keep != nil {
		n.Pruned = &res
	}
	return err
}
