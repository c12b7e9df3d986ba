package demo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab"
	"cleancut/internal/load"
)

// chapter is one step to play.
type chapter struct {
	n    int
	name string
	run  func(ctx context.Context, facts map[string]any) error
}

func (s *story) chapters() []chapter {
	return []chapter{
		{1, "make 4 volumes, attach them, resolve them back", s.makeStorage},
		{2, "md RAID 0, XFS, fstab and mdadm.conf lines; reboot", s.checkStorage},
		{3, "a cluster like production: checksums, WAL archived", s.makeCluster},
		{4, "load the play database", s.loadDatabase},
		{5, "re-mount and restart everything once", s.rebootAll},
		{6, "beater A: one long transaction that never commits", s.startBulk},
		{7, "beater B: single-row inserts, every id written down", s.startWords},
		{8, "beaters C and D: transfers and file churn", s.startRest},
		{9, "marker 1, before the backup", s.markerBefore},
		{10, "the backup begins; marker 2 before the cut", s.backupBegins},
		{11, "the cut", s.theCut},
		{12, "marker 3, after the cut", s.markerAfter},
		{13, "other host: volumes, array, mount beside the original", s.otherHostRestores},
		{14, "PostgreSQL recovered on the copy; a standby follows", s.recovered},
		{15, "markers 1 and 2 are there, marker 3 is not", s.markers},
		{16, "every acknowledged row, nothing uncommitted, sums agree", s.judge},
		{17, "verify at level full", s.verify},
		{18, "dump from the copy; it loads, every row's hash agrees", s.dump},
		{19, "two throwaway clones, one of them masked", s.clones},
		{20, "shipped WAL applied up to marker 3; standby promoted", s.shippedWAL},
		{21, "production's figures over the whole run", s.figures},
		{22, "everything removed, nothing left behind", s.removeAll},
	}
}

// story is what the steps share.
type story struct {
	Options
	work string // everything of the run is below it
	pool string
	mnt  string // where production's filesystem is mounted

	ground ground

	before  machine // what the machine had when the story began
	undo    []undo
	storage flow.StorageResult
	options flow.StorageOptions
	server  lab.Server // production

	facts load.Facts
	load  *load.Load
	began time.Time

	manifest    backup.Manifest
	backupBegan time.Time
	backupRun   chan error
	cutReady    chan struct{}
	cutGo       chan struct{}
	promise     load.Promise // at the cut, or in bracketed mode at the end of backup mode
	moment      time.Time    // after marker 3, by the server's clock
	shipped     load.Promise // at that moment
	stall       load.Stall

	host    otherHost
	copy    backup.Copy
	standby standby
	verdict backup.Verdict
	finding load.Finding
	phases  []phase  // for the plot
	checked []string // what was looked for at the end and is not there
}

type phase struct {
	name     string
	from, to time.Time
}

type undo struct {
	name string
	run  func(ctx context.Context) error
}

func newStory(ctx context.Context, o Options) (*story, error) {
	work, err := os.MkdirTemp("/tmp", "ccd-") // short: a socket's path has 107 bytes
	if err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	s := &story{Options: o, work: work, pool: filepath.Join(work, "pool"), mnt: filepath.Join(work, "pg"),
		cutReady: make(chan struct{}), cutGo: make(chan struct{}), backupRun: make(chan error, 1)}
	if s.before, err = lookAround(); err != nil {
		return nil, err
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	s.later("work folder", func(context.Context) error { return os.RemoveAll(work) })
	s.later("check that nothing is left", func(context.Context) error { return s.nothingLeft() })
	if err := s.newGround(ctx); err != nil {
		return nil, errors.Join(err, s.cleanUp(ctx))
	}
	return s, nil
}

func (s *story) template() string  { return filepath.Join(s.work, "initdb") }
func (s *story) fstab() string     { return filepath.Join(s.work, "fstab") }
func (s *story) mdadmConf() string { return filepath.Join(s.work, "mdadm.conf") }

// later pushes an undo; cleanUp runs them, the last first.
func (s *story) later(name string, run func(ctx context.Context) error) {
	s.undo = append(s.undo, undo{name, run})
}

func (s *story) cleanUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	var errs []error
	for len(s.undo) > 0 {
		u := s.undo[len(s.undo)-1]
		s.undo = s.undo[:len(s.undo)-1]
		if err := u.run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", u.name, err))
			if u.name == "pool" || u.name == "storage" {
				// Never remove the folder through something that is still mounted.
				s.undo = slices.DeleteFunc(s.undo, func(u undo) bool { return u.name == "work folder" })
			}
		}
	}
	return errors.Join(errs...)
}

// machine is what a clean machine must not have more of afterwards.
type machine struct{ arrays int }

func lookAround() (machine, error) {
	arrays, err := filepath.Glob("/sys/block/md*/md/array_state")
	running := 0
	for _, a := range arrays {
		if b, err := os.ReadFile(a); err == nil && strings.TrimSpace(string(b)) != "clear" {
			running++
		}
	}
	return machine{arrays: running}, err
}

// nothingLeft compares the machine with what it was.
func (s *story) nothingLeft() error {
	now, err := lookAround()
	if err != nil {
		return err
	}
	left, err := lab.Left(s.work)
	if err != nil {
		return err
	}
	if now.arrays > s.before.arrays {
		left = append(left, fmt.Sprintf("%d md arrays more than before", now.arrays-s.before.arrays))
	}
	if len(left) > 0 {
		return errStep("left behind: %s", strings.Join(left, "; "))
	}
	s.checked = append(s.checked, "no mount, loop device or process in "+s.work, fmt.Sprintf("%d md arrays, as before", now.arrays))
	return nil
}

func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }
