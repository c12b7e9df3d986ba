package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

const (
	copyPort    = 5432 // names the socket only
	socketLimit = 107  // bytes of a unix socket's path (sun_path, unix(7))
	startPause  = 20 * time.Millisecond
)

// Copy is a prepared copy, ready to start.
type Copy struct {
	Root         string // as in Plan
	Data         string // as in Plan
	Server       backup.Server
	Installation Installation
	Settings     map[string]string // beat the isolation: for recovery targets, not to undo it
	NoFsync      bool              // for a copy that is thrown away in any case
	NoAutovacuum bool
	Standby      *Standby // nil: none. Its server is up when it answers, in recovery
	// Unconfined lets the server see the host's folders writable. By default
	// a root process starts it in a mount namespace of its own in which all but
	// Root, /dev and /proc is read-only, see confine; a process that is not root
	// cannot.
	Unconfined bool
	// Networked leaves the server in the host's network: for a standby, and for
	// what takes production's place. By default it has a network namespace of its
	// own, with nothing but a loopback interface, where the kernel allows one;
	// Instance.NetworkIsolated tells.
	Networked bool
	// Listen is the ADDRESS:PORT at which clients are to reach the copy, see
	// CheckListen; "": only the socket. Nobody is let in there before OpenGate.
	// A Standby has its own.
	Listen  string
	Program string // cleancut itself, for OpenGate; "": the running program

	network *os.File // its namespace, nil for the host's
	without without
}

func (c Copy) privateDir() string { return filepath.Join(c.Root, Private) }

// address is what the server itself listens on for Listen: in a namespace of
// its own nobody else can reach that.
func (c Copy) address() string {
	host, _, err := Standby{Listen: c.Listen}.address()
	switch {
	case c.Listen == "" || err != nil:
		return ""
	case c.network != nil:
		return "127.0.0.1"
	}
	return host
}

// port is what the server's socket is named by.
func (c Copy) port() int {
	if c.Listen != "" && c.network == nil {
		return (&Standby{Listen: c.Listen}).port()
	}
	return c.Standby.port()
}

// Instance is a copy's server, running as the owner of its data directory.
// Whoever reaches the socket (that owner and root) is let in as any role.
type Instance struct {
	PID           int // of the postmaster
	Root          string
	DataDirectory string
	SocketDir     string
	Port          int
	Superuser     string // role to connect as
	Installation  Installation
	UID, GID      uint32
	// NetworkIsolated: the server has a network namespace of its own.
	// NetworkNote says why not, where it was meant to; Open does not know that.
	NetworkIsolated bool
	NetworkNote     string
	Program         string // see Copy
	cold            bool   // it takes no connections during recovery (hot_standby is off)

	// EndOfRecovery is the end of the last WAL record that was replayed: what
	// lies before it is in the copy. It is pg_last_wal_replay_lsn(), which keeps
	// its value after recovery. The redo position of the checkpoint that ends
	// recovery is the same in most cases, but behind a record that continues
	// over a missing page of WAL it is larger (CreateOverwriteContrecordRecord),
	// and would then promise a record that was lost. Of an image that was shut
	// down cleanly, where nothing is replayed, it is the checkpoint's position.
	EndOfRecovery backup.LSN
	standby       bool          // it is up also in recovery
	FirstQuery    time.Duration // from the start of the program to the first answer out of recovery
	RecoveryTook  time.Duration // as the server logged it (14+), 0 if it did not
}

// instanceFile is what Start leaves in Root/.cleancut/instance.json for Open.
type instanceFile struct {
	Data      string `json:"data"`
	Bin       string `json:"bin"`
	Major     int    `json:"major"`
	Superuser string `json:"superuser"`
	LogOffset int64  `json:"log_offset"`
	Port      int    `json:"port,omitempty"` // where it is not copyPort
	Standby   bool   `json:"standby,omitempty"`
}

// Start runs postgres on a prepared copy and returns once it answers queries
// and, if it is no standby, is out of recovery. The server leads a session of its own and survives
// this process. Its output goes to Root/.cleancut/postgres.log.
//
// If the server ends first, the error holds the last lines of its log and, for
// well-known ones, a hint. On any error, also when ctx ends, the server is
// killed and gone before Start returns. A server already running in the data
// directory gives ErrInUse; another major version than the data's ErrUnsupported.
func Start(ctx context.Context, c Copy) (_ *Instance, err error) {
	note, err := c.isolateNetwork()
	if err != nil {
		return nil, fmt.Errorf("start the copy in %s: %w", c.Root, err)
	}
	defer func() { _ = c.network.Close() }() // of nil: an error that nobody needs
	inst, settings, err := c.instance()
	if err != nil {
		return nil, fmt.Errorf("start the copy in %s: %w", c.Root, err)
	}
	inst.NetworkNote = note
	log, offset, err := inst.openLog()
	if err != nil {
		return nil, fmt.Errorf("start the copy in %s: %w", c.Root, err)
	}
	err = effect(ctx, "start.record", func() error { return inst.record(offset) })
	if err == nil {
		err = fault.Point(ctx, "postgres.start")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the copy in %s: %w", c.Root, err), log.Close())
	}
	began := time.Now()
	died, err := inst.launch(ctx, c, settings, log)
	if err != nil {
		return nil, fmt.Errorf("start the copy in %s: %w", c.Root, err)
	}
	if err = fault.Point(ctx, "postgres.start.done"); err == nil {
		err = inst.await(ctx, died, offset)
	}
	if err == nil {
		err = inst.relink()
	}
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), killPatience)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("start the copy in %s: %w", c.Root, err), Kill(undo, c.Root))
	}
	inst.FirstQuery = time.Since(began)
	inst.RecoveryTook = recoveryTook(inst.readLog(offset))
	return inst, nil
}

// isolateNetwork makes the copy's network namespace, unless it is to have none.
func (c *Copy) isolateNetwork() (whyNot string, err error) {
	if c.Listen != "" {
		if err := CheckListen(c.Listen); err != nil {
			return "", err
		}
	}
	if c.Networked || c.without.has(layerNetwork) {
		return "", nil
	}
	c.network, whyNot, err = newNetwork()
	return whyNot, err
}

// instance checks what can be checked before the program runs.
func (c *Copy) instance() (*Instance, []Setting, error) {
	var err error
	if c.Root, err = filepath.EvalSymlinks(c.Root); err != nil {
		return nil, nil, err
	}
	if c.Data, err = filepath.EvalSymlinks(c.Data); err != nil {
		return nil, nil, err
	}
	if c.Root == c.Data || !below(c.Root, c.Data) {
		return nil, nil, fmt.Errorf("%w: %s is not below %s", backup.ErrUsage, c.Data, c.Root)
	}
	if pid := serverPID(c.Data); pid != 0 {
		return nil, nil, fmt.Errorf("process %d runs in %s: %w", pid, c.Data, backup.ErrInUse)
	}
	version, err := os.ReadFile(filepath.Join(c.Data, "PG_VERSION"))
	if err != nil {
		return nil, nil, err
	}
	if got, want := strings.TrimSpace(string(version)), c.Installation.Major; got != fmt.Sprint(want) {
		return nil, nil, backup.Hint(fmt.Errorf("the data is of PostgreSQL %s, the programs in %s of %d: %w", got, c.Installation.Bin, want, backup.ErrUnsupported),
			"install PostgreSQL "+got+" on this host")
	}
	if _, err := os.Stat(filepath.Join(c.privateDir(), "pg_hba.conf")); err != nil {
		return nil, nil, fmt.Errorf("the copy was not prepared: %w", err)
	}
	socket := filepath.Join(c.privateDir(), fmt.Sprintf(".s.PGSQL.%d", c.port()))
	if len(socket) > socketLimit {
		return nil, nil, backup.Hint(fmt.Errorf("%w: the socket's path %s is longer than %d bytes", backup.ErrUsage, socket, socketLimit), "choose a shorter folder for the copy")
	}
	control, err := ReadControl(filepath.Join(c.Data, "global", "pg_control"))
	if err != nil {
		return nil, nil, err
	}
	uid, gid, err := owner(c.Data)
	if err != nil {
		return nil, nil, err
	}
	if me := os.Geteuid(); me != 0 && me != int(uid) {
		return nil, nil, backup.Hint(fmt.Errorf("%s belongs to uid %d, this process runs as %d", c.Data, uid, me), "run cleancut as root")
	}
	if uid == 0 {
		return nil, nil, fmt.Errorf("%s belongs to root, as whom PostgreSQL does not run: %w", c.Data, backup.ErrUnsupported)
	}
	inst := &Instance{
		Root: c.Root, DataDirectory: c.Data, SocketDir: c.privateDir(), Port: c.port(), Program: c.Program, standby: c.Standby != nil, cold: c.Settings["hot_standby"] == "off",
		Superuser: c.Server.Superuser, Installation: c.Installation, UID: uid, GID: gid,
	}
	if inst.Superuser == "" {
		inst.Superuser = "postgres"
	}
	if control.State == ControlShutDown {
		inst.EndOfRecovery = backup.LSN(control.CheckpointLSN)
	}
	return inst, Isolation(*c, control), nil
}

// relink sets links right that redo of CREATE TABLESPACE made lead to
// production's path.
func (i *Instance) relink() error {
	moves, err := readMoves(i.Root)
	if err != nil {
		return err
	}
	data, err := os.OpenRoot(i.DataDirectory)
	if err != nil {
		return err
	}
	defer func() { _ = data.Close() }()
	for _, m := range moves {
		if _, err := data.Lstat(m.Link); errors.Is(err, fs.ErrNotExist) {
			continue // the tablespace was dropped
		}
		if err := relink(data, m, int(i.UID), int(i.GID)); err != nil {
			return err
		}
	}
	return nil
}

// openLog opens the log to append to and returns its length.
func (i *Instance) openLog() (*os.File, int64, error) {
	r, err := os.OpenRoot(i.SocketDir)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = r.Close() }()
	f, err := r.OpenFile("postgres.log", os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err := errors.Join(err, f.Chown(int(i.UID), int(i.GID))); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

func (i *Instance) record(offset int64) error {
	b, err := json.Marshal(instanceFile{
		Data: i.DataDirectory, Bin: i.Installation.Bin, Major: i.Installation.Major, Superuser: i.Superuser, LogOffset: offset, Port: i.Port, Standby: i.standby,
	})
	if err != nil {
		return err
	}
	r, err := os.OpenRoot(i.SocketDir)
	if err != nil {
		return err
	}
	return errors.Join(writeOwned(r, "instance.json", string(b)+"\n", int(i.UID), int(i.GID)), r.Close())
}

// launch runs the program and closes log here. died gets the program's end.
func (i *Instance) launch(ctx context.Context, c Copy, settings []Setting, log *os.File) (died <-chan error, err error) {
	defer func() { err = errors.Join(err, log.Close()) }()
	path, err := i.Installation.Tool(ctx, "postgres")
	if err != nil {
		return nil, err
	}
	args := []string{"-D", i.DataDirectory}
	for _, s := range settings {
		args = append(args, "-c", s.Name+"="+s.Value)
	}
	// The server outlives the call; the end of ctx ends it through Kill.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.Env = i.environment()
	cmd.SysProcAttr = childAttributes(i.credential())
	cmd.SysProcAttr.Setsid = true
	moves, err := readMoves(i.Root)
	if err != nil {
		return nil, err
	}
	err = onThread(func() error {
		guard := mayRunUnconfined
		if !c.Unconfined && !c.without.has(layerMounts) && os.Geteuid() == 0 {
			guard = confine
		}
		if err := errors.Join(enterNetwork(c.network), guard(i, moves)); err != nil {
			return err
		}
		return cmd.Start() // the child inherits this thread's namespaces
	})
	if err != nil {
		return nil, err
	}
	i.PID = cmd.Process.Pid
	i.NetworkIsolated = c.network != nil
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // reaps it, also long after Start returned
	return ended, nil
}

func childAttributes(c *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: c}
}

// credential makes children run as the copy's owner, by number: there need not
// be a passwd entry for it.
func (i *Instance) credential() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: i.UID, Gid: i.GID}
}

// environment holds nothing of ours: a PGOPTIONS or PGDATA of the caller must
// not reach the copy.
func (i *Instance) environment() []string {
	return []string{
		"PATH=" + i.Installation.Bin + ":/usr/bin:/bin", "LC_ALL=C",
		"HOME=" + filepath.Join(i.SocketDir, "tmp"), "TMPDIR=" + filepath.Join(i.SocketDir, "tmp"),
	}
}
