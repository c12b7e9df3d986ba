package flow_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
)

// cloneClock is a clock that a test sets.
type cloneClock struct{ at time.Time }

func (c *cloneClock) now() time.Time { return c.at }

func (c *cloneClock) pass(d time.Duration) { c.at = c.at.Add(d) }

func TestPlanReap(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	ago := 2.5
	expired := func(name string, hours int, sessions *postgres.Sessions) flow.CloneStatus {
		return flow.CloneStatus{Name: name, State: flow.CloneExpired, Expires: now.Add(-time.Duration(hours) * time.Hour), Sessions: sessions}
	}
	none, some := &postgres.Sessions{}, &postgres.Sessions{Count: 2, Newest: &ago}
	deaf := expired("deaf", 5, nil)
	deaf.Down = "its server runs and does not answer: x"
	standing := flow.CloneStatus{Name: "standing", State: flow.CloneReady, Expires: now.Add(time.Second), Sessions: none}
	half := flow.CloneStatus{Name: "half", State: flow.CloneHalfRemoved, Expires: now.Add(-time.Hour)}
	lost := flow.CloneStatus{Name: "lost", State: flow.CloneLedgerLost, Expires: now.Add(-time.Hour), Sessions: none}
	all := []flow.CloneStatus{expired("young", 1, none), standing, expired("used", 9, some), half, expired("old", 7, none), deaf, expired("middle", 3, none), lost}
	for _, c := range []struct {
		name   string
		clones []flow.CloneStatus
		most   int
		force  bool
		want   string
	}{
		{"nothing at all", nil, 5, false, ""},
		{"nothing expired", []flow.CloneStatus{standing, half, lost}, 5, true, ""},
		{"the one that ended first first, and those in use are kept", all, 5, false,
			"keep used: expired 9h0m0s ago; 2 sessions, the newest query 3s ago | destroy old: expired 7h0m0s ago | keep deaf: expired 5h0m0s ago; its server runs and does not answer: x | destroy middle: expired 3h0m0s ago | destroy young: expired 1h0m0s ago"},
		{"so many in a run; one that is kept does not count", all, 2, false,
			"keep used: expired 9h0m0s ago; 2 sessions, the newest query 3s ago | destroy old: expired 7h0m0s ago | keep deaf: expired 5h0m0s ago; its server runs and does not answer: x | destroy middle: expired 3h0m0s ago | keep young: expired 1h0m0s ago; 2 a run"},
		{"by force", all, 2, true, "destroy used: expired 9h0m0s ago | destroy old: expired 7h0m0s ago | keep deaf: expired 5h0m0s ago; 2 a run | keep middle: expired 3h0m0s ago; 2 a run | keep young: expired 1h0m0s ago; 2 a run"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, a := range flow.PlanReap(now, c.clones, c.most, c.force) {
				did := "keep"
				if a.Destroy {
					did = "destroy"
				}
				got = append(got, fmt.Sprintf("%s %s: %s", did, a.Name, a.Why))
			}
			if strings.Join(got, " | ") != c.want {
				t.Errorf("%s\nwant %s", strings.Join(got, " | "), c.want)
			}
		})
	}
}

// cloned makes a clone and destroys it in the end, if it is there still.
func (p *production) cloned(o flow.CloneOptions) flow.CloneStatus {
	p.t.Helper()
	if o.Root == "" { // a short path: the socket's is limited
		o.Root = filepath.Join(labtest.Folder(p.t), "c")
	}
	p.t.Cleanup(func() {
		if _, err := p.flow.DestroyClone(labtest.Context(p.t), o.Name, true); err != nil && !errors.Is(err, backup.ErrNotFound) {
			p.t.Error(err)
		}
	})
	s, err := p.flow.CreateClone(p.t.Context(), o)
	if err != nil {
		p.t.Fatalf("%v (%s)", err, backup.HintOf(err))
	}
	return s
}

// stateOfClone returns "" for one that is not there.
func (p *production) stateOfClone(name string) string {
	p.t.Helper()
	s, err := p.flow.Clone(p.t.Context(), name)
	if err != nil && !errors.Is(err, backup.ErrNotFound) {
		p.t.Fatal(err)
	}
	return s.State
}

// reaped reaps and says what became of whom.
func (p *production) reaped(most int, force bool) string {
	p.t.Helper()
	plan, err := p.flow.PlanReap(p.t.Context(), most, force)
	if err != nil {
		p.t.Fatal(err)
	}
	done, err := p.flow.Reap(p.t.Context(), plan, force)
	if err != nil {
		p.t.Fatal(err)
	}
	var out []string
	for _, r := range done {
		out = append(out, fmt.Sprintf("%s %v", r.Name, r.Done))
	}
	return strings.Join(out, ", ")
}

func TestTheLeaseOfAClone(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := followed(t, localPool(t), pgtest.Options{}, nil)
	clock := &cloneClock{at: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	p.flow.Now = clock.now
	m := p.take(backup.ModeFreeze)
	day := backup.Span(24 * time.Hour)
	o := flow.CloneOptions{ID: m.ID, Name: "qa", TTL: backup.Span(8 * time.Hour), MaxTTL: day, Most: 2}
	s := p.cloned(o)
	if !s.Expires.Equal(clock.at.Add(8*time.Hour)) || !s.Longest.Equal(clock.at.Add(24*time.Hour)) || s.State != flow.CloneReady {
		t.Errorf("made: %+v", s)
	}
	clock.pass(8*time.Hour - time.Second)
	if got := p.stateOfClone("qa"); got != flow.CloneReady {
		t.Errorf("a second before its end: %s", got)
	}
	if got := p.reaped(5, false); got != "" {
		t.Errorf("a second before its end reap did %s", got)
	}
	clock.pass(time.Second)
	if got := p.stateOfClone("qa"); got != flow.CloneExpired {
		t.Errorf("at its end: %s", got)
	}
	plan, err := p.flow.PlanReap(t.Context(), 5, false)
	if err != nil || len(plan) != 1 || !plan[0].Destroy {
		t.Fatalf("plan %+v, %v", plan, err)
	}
	if s, err = p.flow.ExtendClone(t.Context(), "qa", backup.Span(4*time.Hour), false); err != nil || !s.Expires.Equal(clock.at.Add(4*time.Hour)) || s.State != flow.CloneReady {
		t.Errorf("extended: %+v, %v", s, err)
	}
	if done, err := p.flow.Reap(t.Context(), plan, false); err != nil || done[0].Done || done[0].Kept == "" {
		t.Errorf("reap by a plan from before the extension: %+v, %v", done, err)
	}
	if _, err := p.flow.ExtendClone(t.Context(), "qa", day, false); !errors.Is(err, backup.ErrUsage) || !strings.Contains(err.Error(), s.Longest.Format(time.RFC3339)) {
		t.Errorf("beyond the longest: %v", err)
	}
	if s, err = p.flow.ExtendClone(t.Context(), "qa", backup.Span(12*time.Hour), true); err != nil || !s.Expires.Equal(s.Longest) {
		t.Errorf("extended to its longest: %+v, %v", s, err)
	}
	clock.pass(2 * time.Hour)
	p.cloned(flow.CloneOptions{ID: m.ID, Name: "later", TTL: backup.Span(20 * time.Hour), MaxTTL: day, Most: 2})
	if _, err := p.flow.CreateClone(t.Context(), flow.CloneOptions{ID: m.ID, Name: "third", Most: 2}); !errors.Is(err, backup.ErrInUse) {
		t.Errorf("a third of two: %v", err)
	}
	clock.pass(21 * time.Hour)
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s user=postgres dbname=postgres", s.SocketDir))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.reaped(1, false); got != "qa false, later true" { // qa, which ended first, is in use
		t.Errorf("reap did %s", got)
	}
	if p.stateOfClone("qa") != flow.CloneExpired || p.stateOfClone("later") != "" {
		t.Errorf("qa is %q, later %q", p.stateOfClone("qa"), p.stateOfClone("later"))
	}
	// Its server stands still: it can tell nobody whether it is used.
	pid := cloneServerOf(t, s)
	_ = conn.Close(t.Context())
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	kept := p.reaped(1, false)
	deaf, deafErr := p.flow.Clone(t.Context(), "qa")
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if kept != "qa false" || deafErr != nil || deaf.Sessions != nil || !strings.Contains(deaf.Down, "does not answer") {
		t.Errorf("a server that stands still: reap did %s; %+v, %v", kept, deaf, deafErr)
	}
	if got := p.reaped(1, true); got != "qa true" {
		t.Errorf("reap by force did %s", got)
	}
}

// cloneServerOf returns the pid of the clone's postmaster.
func cloneServerOf(t *testing.T, s flow.CloneStatus) int {
	t.Helper()
	i, err := postgres.Open(t.Context(), s.Root)
	if err != nil {
		t.Fatal(err)
	}
	return i.PID
}

func TestAClonesHostIsRebootedWithMDAndLVM(t *testing.T) {
	if !labtest.Here(t, labtest.MD) {
		return
	}
	pool := localPool(t)
	dir := labtest.Folder(t)
	data := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 4, Level: "raid0", Chunk: 64 << 10})
	wal := storage(t, pool, dir, flow.StorageOptions{Name: "wal", Volumes: 2, Level: "lvm-striped", Chunk: 64 << 10})
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(data, "pg"), WALDir: filepath.Join(wal, "pg"), Small: true})
	p.flow.BinDirs = []string{p.server.Installation.Bin}
	m := p.take(backup.ModeFreeze)
	ask := func(s flow.CloneStatus, sql string, before ...string) (out string) {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s user=postgres dbname=postgres", s.SocketDir))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close(t.Context()) }()
		for _, q := range before {
			if _, err := conn.Exec(t.Context(), q); err != nil {
				t.Fatal(err)
			}
		}
		if err := conn.QueryRow(t.Context(), sql).Scan(&out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	one, two := p.cloned(flow.CloneOptions{ID: m.ID, Name: "one"}), p.cloned(flow.CloneOptions{ID: m.ID, Name: "two"})
	for _, s := range []flow.CloneStatus{one, two} {
		ask(s, "SELECT name FROM whose", "CREATE TABLE whose AS SELECT '"+s.Name+"' AS name")
	}
	for range 2 { // and once more
		p.rebootedClone(one)
		if s, err := p.flow.Clone(t.Context(), "one"); err != nil || s.State != flow.CloneDown || s.Down != "its volumes are not attached" {
			t.Errorf("rebooted: %+v, %v", s, err)
		}
		s, err := p.flow.StartClone(t.Context(), "one")
		if err != nil || s.State != flow.CloneReady {
			t.Fatalf("started: %+v, %v", s, err)
		}
		if got := ask(s, "SELECT name FROM whose") + ask(two, "SELECT name FROM whose"); got != "onetwo" {
			t.Errorf("they hold %s", got)
		}
	}
	p.rebootedClone(two)
	for _, name := range []string{"one", "two"} {
		if _, err := p.flow.DestroyClone(t.Context(), name, false); err != nil {
			t.Error(err)
		}
	}
	inv, err := pool.List(t.Context(), nil)
	if err != nil || slices.ContainsFunc(inv.Volumes, func(v provider.Volume) bool { return v.Tags[backup.TagCopy] != "" }) {
		t.Errorf("left: %+v, %v", inv.Volumes, err)
	}
	if got := p.value("SELECT count(*) FROM pg_tables WHERE tablename = 'whose'"); got != "0" {
		t.Errorf("production has %s of the clones' tables", got)
	}
}

// rebootedClone takes away of a clone what a reboot does: its server, its
// mounts, its arrays and volumes' devices.
func (p *production) rebootedClone(s flow.CloneStatus) {
	p.t.Helper()
	if err := syscall.Kill(cloneServerOf(p.t, s), syscall.SIGKILL); err != nil {
		p.t.Fatal(err)
	}
	p.until("its server ends", func() bool {
		runs, err := postgres.Runs(s.Root)
		return err == nil && !runs
	})
	inv, err := p.flow.Provider.List(p.t.Context(), backup.Tags{backup.TagCopy: string(s.ID)})
	if err != nil || len(inv.Volumes) == 0 {
		p.t.Fatalf("volumes %+v, %v", inv.Volumes, err)
	}
	var devices []string
	for _, v := range inv.Volumes {
		devices = append(devices, v.Attached)
	}
	err = host.Release(context.WithoutCancel(p.t.Context()), devices)
	for _, v := range inv.Volumes {
		err = errors.Join(err, p.flow.Provider.Detach(p.t.Context(), v.ID))
	}
	if err != nil {
		p.t.Fatal(err)
	}
}
