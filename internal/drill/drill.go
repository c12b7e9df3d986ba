package drill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
	"cleancut/internal/uml"
)

// What becomes of the image sets.
const (
	KeepNone    = "none"
	KeepDamaged = "damaged"
	KeepAll     = "all"
)

// Options says what to repeat and how often.
type Options struct {
	Program    string // path of the cleancut program
	Version    string
	Grid       Grid
	Trials     int // of each cell
	Seed       int64
	Out        string       // folder of the results, absolute
	Keep       string       // none, damaged or all
	Report     string       // file for the report, absolute
	Rows       int64        // of the play database
	VolumeSize backup.Bytes // of each volume
	Progress   io.Writer    // told of every cut and every judgement
	Log        *slog.Logger
}

const (
	productionHost = "production"
	undoTime       = 5 * time.Minute
	// judgeTime ends the judgement of an image on which a check never ends.
	judgeTime = 15 * time.Minute
)

// site is what all production runs of a process share: a pool, and a provider
// for each of two hosts.
type site struct {
	Options
	store  *store
	work   string
	pool   string
	cloud  *cloud            // with the provider ec2
	pa, pb provider.Provider // of the host that makes backups, and of the one that judges them
}

// hosts are both hosts with a catalog of their own.
type hosts struct{ a, b *flow.Flow }

func (s *site) tell(format string, args ...any) {
	fmt.Fprintf(s.Progress, "%s  %s\n", time.Now().UTC().Format("15:04:05"), fmt.Sprintf(format, args...))
}

// here runs batches in this process, which must be root. It returns with
// nothing left but the lines in the output folder.
func here(ctx context.Context, o Options, st *store, batches []batch) error {
	return atSite(ctx, o, st, poolSize(o), func(s *site) error {
		for i, b := range batches {
			s.tell("production run %d of %d: %s, trial %d, %d cuts", i+1, len(batches), b.ground.Ground(), b.n, len(b.cuts))
			if err := s.run(ctx, b); err != nil {
				return err
			}
		}
		return nil
	})
}

// atSite makes a site, has it used, and takes it away again. An error that
// wraps backup.ErrLeft names what stands.
func atSite(ctx context.Context, o Options, st *store, pool backup.Bytes, use func(s *site) error) (err error) {
	s := &site{Options: o, store: st}
	if s.work, err = os.MkdirTemp("/tmp", "ccx-"); err != nil { // short: a socket's path has 107 bytes
		return fmt.Errorf("drill: %w", err)
	}
	if err := os.Chmod(s.work, 0o755); err != nil {
		return fmt.Errorf("drill: %w", err)
	}
	s.pool = filepath.Join(s.work, "pool")
	undo, err := lab.Pool(ctx, s.pool, "xfs", pool)
	if err != nil {
		return errors.Join(err, os.RemoveAll(s.work))
	}
	defer func() {
		err = errors.Join(err, s.close(), undo())
		left, lerr := lab.Left(s.work)
		if lerr != nil || len(left) > 0 { // never remove through a mount
			err = errors.Join(err, lerr, fmt.Errorf("%s: %w", strings.Join(left, "; "), backup.ErrLeft))
			return
		}
		err = errors.Join(err, os.RemoveAll(s.work))
	}()
	if err := s.open(ctx); err != nil {
		return err
	}
	return use(s)
}

// poolSize leaves room for production and for the images of the largest run;
// the file behind it is sparse.
func poolSize(o Options) backup.Bytes {
	volumes := 0
	for _, v := range o.Grid.Volumes {
		volumes = max(volumes, v)
	}
	cuts := len(o.Grid.Modes) * len(o.Grid.Skews) * len(o.Grid.Checkpoints)
	return backup.Bytes(volumes)*o.VolumeSize*backup.Bytes(2+min(cuts, 8)) + 4<<30
}

func (s *site) open(ctx context.Context) error {
	if err := local.Init(ctx, s.pool); err != nil {
		return err
	}
	var err error
	s.pa, s.pb, err = s.providers(ctx)
	return err
}

// hosts makes both with all they write below dir, which is made: each
// production run ships WAL of the same cluster.
func (s *site) hosts(dir string) (h hosts, err error) {
	shared := catalog.New(catalog.NewDir(filepath.Join(dir, "catalog")), "drill")
	host := func(name string, p provider.Provider) (*flow.Flow, error) {
		st, err := state.Open(filepath.Join(dir, name))
		return &flow.Flow{Provider: p, Catalog: shared, State: st, Cluster: "drill", Host: name, Tool: s.Version,
			Watchdog: []string{s.Program, "watchdog"}, Program: s.Program, Log: s.Log}, err
	}
	if h.a, err = host("a", s.pa); err != nil {
		return h, err
	}
	h.b, err = host("b", s.pb)
	return h, err
}

// providers are production's and the judging host's.
func (s *site) providers(ctx context.Context) (a, b provider.Provider, err error) {
	if s.Grid.Provider == EC2 {
		if s.cloud, err = newCloud(ctx, s.pool, filepath.Join(s.work, "ec2"), s.Log); err != nil {
			return nil, nil, err
		}
		return s.cloud.a, s.cloud.b, nil
	}
	p, err := local.Open(ctx, s.pool, s.Log)
	return p, p, err
}

func (s *site) close() error {
	if s.cloud == nil {
		return nil
	}
	return s.cloud.close()
}

// run makes one production run, takes its cuts, and judges the images when the
// load is over.
func (s *site) run(ctx context.Context, b batch) (err error) {
	p, err := s.produce(ctx, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.undo.End(ctx)) }()
	shots, shootErr := p.shoot(ctx)
	_, loadErr := p.load.Stop()
	shipErr := p.shipped(ctx)
	id := backup.NewID(p.began)
	if len(shots) > 0 {
		if err := s.store.addRun(p.line(string(id), shots)); err != nil {
			return err
		}
	}
	for _, shot := range shots {
		var trials []Trial
		for _, w := range shot.ways {
			t := p.judge(ctx, shot, w)
			t.Seed, t.N, t.Run = s.Seed, b.n, string(id)
			trials = append(trials, t)
		}
		err := p.finish(ctx, shot, trials)
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(shootErr, loadErr, shipErr)
}

// line is what is kept of the run itself.
func (p *production) line(id string, shots []shot) ProductionRun {
	r := ProductionRun{ID: id, Ground: p.batch.ground, Seed: p.Seed, N: p.batch.n, Began: p.began, Throughput: p.load.Series(), Machine: machine(p.Version)}
	for _, s := range shots {
		if s.manifest.Server.Version != "" {
			r.Machine.PostgreSQL = s.manifest.Server.Version
		}
	}
	return r
}

func machine(version string) Machine {
	m := Machine{Kernel: "unknown", Processors: runtime.NumCPU(), Cleancut: version}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
		m.Host = unix.ByteSliceToString(u.Nodename[:])
	}
	return m
}

// judge looks at one image in one way: at the snapshots, the manifest, the WAL
// if the way has it, and the promise.
func (p *production) judge(ctx context.Context, shot shot, w Way) Trial {
	t := Trial{Cell: shot.cell, Target: w.Target, At: shot.at, StallMS: float64(shot.stall.Microseconds()) / 1000}
	t.Recovery = w.Recovery
	if shot.err != nil {
		t.Reason = shot.err.Error()
		return t
	}
	t.Backup, t.Cut = shot.manifest.ID, shot.manifest.Cut
	for _, m := range shot.manifest.Snapshots {
		t.Members = append(t.Members, MemberTime{m.Member, m.Requested, m.Responded})
	}
	ctx, cancel := context.WithTimeout(ctx, judgeTime)
	defer cancel()
	start := time.Now()
	v, found, err := JudgeImage(ctx, p.b, shot.manifest.ID, w)
	t.Seconds, t.Checks, t.Found, t.Answered = time.Since(start).Seconds(), v.Checks, found, v.FirstSec
	if err != nil {
		t.Reason = err.Error()
		return t
	}
	t.Class, t.Reason = Judge(v, found)
	return t
}

// finish keeps the image set if that is wanted, removes it from the pool, and
// writes the lines of its trials, in this order: a line says where its images
// are. An image whose judgement was interrupted leaves no line.
func (p *production) finish(ctx context.Context, shot shot, trials []Trial) error {
	interrupted := ctx.Err() != nil
	id := shot.manifest.ID
	var kept string
	var err error
	if shot.err == nil {
		damaged := slices.ContainsFunc(trials, func(t Trial) bool { return t.Class != Sound })
		if !interrupted && (p.Keep == KeepAll || p.Keep == KeepDamaged && damaged) {
			kept, err = p.keep(ctx, shot)
		}
		undoing, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		err = errors.Join(err, p.a.DeleteLast(undoing, id))
	}
	if interrupted {
		return err
	}
	for _, t := range trials {
		t.Kept = kept
		word := string(t.Class)
		if t.Class == "" {
			word = "NOT JUDGED"
		}
		p.tell("%-10s %s, in %.1f s%s", word, t.Conditions(), t.Seconds, shorten(t.Reason))
		err = errors.Join(err, p.store.addTrial(t))
	}
	return err
}

func shorten(reason string) string {
	reason = strings.Join(strings.Fields(reason), " ")
	if len(reason) > 160 {
		reason = reason[:160] + " …"
	}
	if reason != "" {
		reason = ": " + reason
	}
	return reason
}

// keep copies the images, sparse, with all else that JudgeKept needs, out of
// the pool.
func (p *production) keep(ctx context.Context, shot shot) (string, error) {
	m := shot.manifest
	rel := filepath.Join("images", string(m.ID))
	dir := filepath.Join(p.Out, rel)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("keep images: %w", err)
	}
	if err := keepWays(ctx, p.a.Catalog, m, shot.ways, dir); err != nil {
		return "", err
	}
	for _, sn := range m.Snapshots {
		to := filepath.Join(dir, imageFile(sn.Member))
		id := sn.ID
		if p.cloud != nil {
			id = p.cloud.sim.InPool(id)
		}
		if _, err := host.Run(ctx, "cp", "--sparse=always", filepath.Join(p.pool, "snapshots", string(id)+".img"), to); err != nil {
			return "", err
		}
	}
	return rel, nil
}

// place says where what a cell needs can be had: here, in the guest, or why
// not.
func place(ctx context.Context) func(needs []string) (where, why string) {
	has := map[string]bool{needsMD: host.HasMD(ctx), needsDM: hasDM()}
	return func(needs []string) (string, string) {
		lacks := slices.DeleteFunc(slices.Clone(needs), func(n string) bool { return has[n] })
		if os.Geteuid() != 0 {
			lacks = append(lacks, "root")
		}
		switch {
		case uml.Inside():
			return string(lab.UML), ""
		case len(lacks) == 0:
			return string(lab.Native), ""
		}
		if missing := uml.Missing(); len(missing) > 0 {
			return "", fmt.Sprintf("there is no %s here, and no user-mode kernel can run: missing %s", strings.Join(lacks, " and no "), strings.Join(missing, ", "))
		}
		return string(lab.UML), ""
	}
}

// hasDM: the control node may stand there without its driver, and then does
// not open.
func hasDM() bool {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close() // nothing was asked of it
	return true
}
