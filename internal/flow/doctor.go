package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow/discover"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// Scope is what doctor looks after.
type Scope string

// The scopes. A host that only restores has no server to look at.
const (
	ForBackup  Scope = "backup"
	ForRestore Scope = "restore" // restore, verify and dump
	ForAll     Scope = "all"
)

// DoctorOptions says what to look at. A machine of the Flow that could not be
// opened is nil there, and its error is here.
type DoctorOptions struct {
	For         Scope
	Local       bool // the volumes are the local provider's
	Backup      BackupOptions
	Store       catalog.Store // what the Flow's catalog lies in
	ProviderErr error
	CatalogErr  error
	StateErr    error
}

// examiner is the optional power of a provider to tell beforehand about a cut.
type examiner interface {
	Examine(ctx context.Context, volumes []backup.VolumeID) (provider.Examination, error)
}

// granter is the optional power of a provider to tell what this host may do.
type granter interface {
	Permissions(ctx context.Context) []provider.Permission
}

// Condition is all that Diagnose decides by. An error in it is a fact.
type Condition struct {
	For      Scope
	Local    bool
	UID      int
	Missing  []string // capabilities that this process lacks
	Kernel   host.Kernel
	Loop     bool              // loop devices can be had
	MD       bool              // and md arrays
	Missed   map[string]string // system tool that is not installed → Debian package
	Deadline time.Duration

	Watchdog     error  // it could not be armed
	WatchdogNote string // what it could not do to protect itself

	State, Provider, Catalog error // why it cannot be opened, read or written
	StatePath                string
	StateBlocked             string // folder on the way to throwaway copies that lets only its owner pass
	CatalogNew               bool   // it is not there at all
	CatalogReadOnly          error
	Backups                  map[backup.ID]BackupState
	Needs                    Needs

	Server      error // why it cannot be asked
	Version     string
	Findings    []postgres.Finding
	Topology    error
	Filesystems int
	Members     int
	KeepAway    error
	Examined    *provider.Examination // nil: the provider cannot tell
	Examination error
	Permissions []provider.Permission

	Majors []MajorFacts
	Frozen []string // mount points that were ever frozen from here
	Sweep  error
	Plan   []Action
}

// Needs is what the clusters to back up or restore ask of a host.
type Needs struct {
	Arrays      bool
	LVM         bool
	Filesystems []string // types: xfs, ext4
}

// MajorFacts is what is installed of one major version of PostgreSQL.
type MajorFacts struct {
	Major   int
	Found   error
	Bin     string
	Missing []string // programs
	Hint    string   // how to get them
}

// examineTime bounds what asks a server or a provider: doctor is run when
// something hangs.
const examineTime = 30 * time.Second

// Examine gathers the facts for Diagnose. It freezes nothing and makes nothing
// that stays: one object is put into the catalog and deleted, one watchdog is
// started and ended. Only ctx makes it fail; whatever else goes wrong is a fact.
func (f *Flow) Examine(ctx context.Context, o DoctorOptions) (Condition, error) {
	x := Condition{For: o.For, Local: o.Local, UID: os.Geteuid(), Deadline: o.Backup.Deadline, State: o.StateErr, Provider: o.ProviderErr, Catalog: o.CatalogErr,
		Missed: map[string]string{}, Backups: map[backup.ID]BackupState{}}
	var err error
	if x.Missing, err = host.MissingCapabilities(wantedCapabilities()); err != nil {
		return x, err
	}
	if x.Kernel, err = host.RunningKernel(); err != nil {
		return x, err
	}
	x.Loop, x.MD = host.HasLoop(), host.HasMD(ctx)
	mounts := []string{"/"}
	majors := map[int]bool{}
	if f.State != nil {
		f.examineState(&x)
		mounts = []string{f.State.Path()}
	}
	if f.Catalog != nil {
		f.examineCatalog(ctx, &x, o.Store, majors)
	}
	if o.For != ForRestore {
		if frozen := f.examineServer(ctx, &x, o, majors); len(frozen) > 0 {
			mounts = frozen
		}
		f.examineWatchdog(ctx, &x, mounts)
	}
	if f.Provider != nil && x.Examined == nil && x.Examination == nil {
		f.examineVolumes(ctx, &x, nil)
	}
	if g, ok := f.Provider.(granter); ok {
		limited, cancel := context.WithTimeout(ctx, examineTime)
		x.Permissions = g.Permissions(limited)
		cancel()
	}
	for _, major := range slices.Sorted(maps.Keys(majors)) {
		x.Majors = append(x.Majors, f.examineMajor(ctx, major))
	}
	for _, tool := range systemTools() {
		if have, pkg := host.HaveTool(tool); !have {
			x.Missed[tool] = pkg
		}
	}
	f.examineLeft(ctx, &x)
	return x, ctx.Err()
}

func (f *Flow) examineState(x *Condition) {
	x.StatePath = f.State.Path()
	if dir, err := filepath.Abs(filepath.Join(x.StatePath, "mnt")); err == nil {
		x.StateBlocked = blocked(dir)
	}
	release, err := f.State.Lock("doctor")
	if err == nil {
		release()
	} else if !errors.Is(err, backup.ErrInUse) { // another doctor: the folder is writable
		x.State = err
	}
	if x.Frozen, err = f.State.Frozen(); err != nil && x.State == nil {
		x.State = err
	}
}

// blocked returns the outermost folder above dir, or dir, that other users
// cannot pass through: the server of a copy below runs as the cluster's owner.
func blocked(dir string) string {
	found := ""
	for ; ; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err != nil || st.Mode()&0o001 == 0 {
			found = dir
		}
		if dir == filepath.Dir(dir) {
			return found
		}
	}
}

// examineCatalog reads every backup's record and writes one object.
func (f *Flow) examineCatalog(ctx context.Context, x *Condition, store catalog.Store, majors map[int]bool) {
	entries, err := f.Catalog.Backups(ctx)
	if errors.Is(err, backup.ErrNotFound) {
		x.CatalogNew, x.Catalog = true, err
		return
	}
	if err != nil {
		x.Catalog = err
		return
	}
	for _, e := range entries {
		x.Backups[e.ID] = stateOf(e)
		if stateOf(e) != Complete {
			continue
		}
		majors[e.Manifest.Server.Major()] = true
		x.Needs.add(e.Manifest.Topology)
	}
	if store != nil {
		x.CatalogReadOnly = probe(ctx, store)
	}
}

// probeFolder holds the objects of probe, apart from every cluster.
const probeFolder = "doctor/"

// probe puts an object, sees that it cannot be overwritten, reads it back and deletes it. What probes that were
// killed have left is deleted too, once it is old.
func probe(ctx context.Context, store catalog.Store) (err error) {
	old, err := store.List(ctx, probeFolder)
	if err != nil {
		return err
	}
	for _, o := range old {
		if time.Since(o.Modified) > time.Hour {
			err = errors.Join(err, store.Delete(ctx, o.Key))
		}
	}
	key, text := probeFolder+string(backup.NewID(time.Now())), "written by `cleancut doctor`; may be deleted\n"
	if err := errors.Join(err, store.Put(ctx, key, strings.NewReader(text))); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Delete(context.WithoutCancel(ctx), key)) }()
	if err := store.Put(ctx, key, strings.NewReader("a second time\n")); !errors.Is(err, backup.ErrExists) {
		return backup.Hint(fmt.Errorf("%s: what was there was overwritten, or was asked to be and nothing said so (%v): %w", key, err, backup.ErrUnsupported),
			"an S3 server must honour If-None-Match on PutObject: take one that does")
	}
	r, err := store.Get(ctx, key)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err == nil && string(got) != text {
		err = fmt.Errorf("%s: what was read is not what was written: %w", key, backup.ErrDamage)
	}
	return err
}

func (n *Needs) add(t backup.Topology) {
	for _, fs := range t.Filesystems {
		if !slices.Contains(n.Filesystems, fs.Type) {
			n.Filesystems = append(n.Filesystems, fs.Type)
		}
		n.Arrays = n.Arrays || has(fs.Device, backup.DeviceArray)
		n.LVM = n.LVM || has(fs.Device, backup.DeviceLogicalVolume)
	}
	slices.Sort(n.Filesystems)
}

func has(d backup.Device, kind backup.DeviceKind) bool {
	return d.Kind == kind || slices.ContainsFunc(d.Members, func(m backup.Device) bool { return has(m, kind) })
}

// examineServer asks the server and looks at what it lies on. It returns the
// mount points that a backup would freeze.
func (f *Flow) examineServer(ctx context.Context, x *Condition, o DoctorOptions, majors map[int]bool) (mounts []string) {
	ctx, cancel := context.WithTimeout(ctx, examineTime)
	defer cancel()
	conn, err := postgres.Connect(ctx, o.Backup.Target)
	if err != nil {
		x.Server = err
		return nil
	}
	defer conn.Close(context.WithoutCancel(ctx))
	running, err := postgres.Inspect(ctx, conn)
	if err != nil {
		x.Server = err
		return nil
	}
	x.Version = running.Server.Version
	x.Findings = postgres.Preflight(running, postgres.Allow{NoFullPageWrites: o.Backup.AllowNoFPW, Standby: o.Backup.Mode == backup.ModeBracketed})
	majors[running.Server.Major()] = true
	if f.Provider == nil {
		return nil
	}
	topology, err := discover.Run(ctx, discover.Options{Server: running, Resolve: f.Provider.Resolve, AllowForeign: o.Backup.AllowForeign})
	if err != nil {
		x.Topology = err
		return nil
	}
	x.Filesystems, x.Members = len(topology.Filesystems), len(topology.Members())
	x.Needs.add(topology)
	if f.State != nil {
		x.KeepAway = f.keepAway(topology, o.Backup.KeepAway)
	}
	var ids []backup.VolumeID
	for _, m := range topology.Members() {
		ids = append(ids, m.Volume.ID)
	}
	f.examineVolumes(ctx, x, ids)
	for _, fs := range topology.Filesystems {
		mounts = append(mounts, fs.Mountpoint)
	}
	return mounts
}

func (f *Flow) examineVolumes(ctx context.Context, x *Condition, ids []backup.VolumeID) {
	e, ok := f.Provider.(examiner)
	if !ok {
		return
	}
	examined, err := e.Examine(ctx, ids)
	x.Examined, x.Examination = &examined, err
}

// examineWatchdog arms the watchdog over mounts and lets it go again without
// a freeze.
func (f *Flow) examineWatchdog(ctx context.Context, x *Condition, mounts []string) {
	freezer, err := host.Arm(ctx, f.Watchdog, mounts, examineTime)
	if err != nil {
		x.Watchdog = err
		return
	}
	x.WatchdogNote = freezer.Note()
	x.Watchdog = freezer.Close()
}

func (f *Flow) examineMajor(ctx context.Context, major int) MajorFacts {
	m := MajorFacts{Major: major}
	inst, err := postgres.FindInstallation(ctx, major, f.BinDirs)
	if err != nil {
		m.Found = err
		return m
	}
	m.Bin = inst.Bin
	programs := []string{"pg_dumpall", "pg_dump", "pg_checksums"}
	if major >= 14 { // where it came
		programs = append(programs, "pg_amcheck")
	}
	for _, name := range programs {
		if _, err := inst.Tool(ctx, name); err != nil {
			m.Missing, m.Hint = append(m.Missing, name), backup.HintOf(err)
		}
	}
	return m
}

func (f *Flow) examineLeft(ctx context.Context, x *Condition) {
	if f.State == nil || f.Catalog == nil || f.Provider == nil {
		x.Sweep = errors.New("state, catalog and provider are needed for it")
		return
	}
	facts, err := f.SweepFacts(ctx)
	if err != nil {
		x.Sweep = err
		return
	}
	x.Plan = PlanSweep(facts)
}
