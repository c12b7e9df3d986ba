package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

const (
	stopPatience = 5 * time.Minute  // for the checkpoint of a fast shutdown
	quitPatience = 10 * time.Second // an immediate shutdown kills its children after 5 s
	killPatience = 30 * time.Second
)

// Open finds the server that Start left running below root, for a process
// that was started later, and waits until it is out of recovery, unless it is a
// standby. ErrNotFound
// when none runs. FirstQuery is not known any more, nor is EndOfRecovery where
// nothing was replayed because the image had been shut down cleanly: both are 0.
func Open(ctx context.Context, root string) (*Instance, error) {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, fmt.Errorf("open the copy in %s: %w", root, orNotFound(err))
	}
	f, err := readInstance(root)
	if err != nil {
		return nil, fmt.Errorf("open the copy in %s: %w", root, err)
	}
	pid := serverPID(f.Data)
	if pid == 0 {
		return nil, fmt.Errorf("a server running in %s: %w", root, backup.ErrNotFound)
	}
	i := &Instance{
		PID: pid, Root: root, DataDirectory: f.Data, SocketDir: filepath.Join(root, Private), Port: cmp.Or(f.Port, copyPort), standby: f.Standby,
		Superuser: f.Superuser, Installation: Installation{Major: f.Major, Bin: f.Bin},
	}
	if i.UID, i.GID, err = owner(f.Data); err != nil {
		return nil, fmt.Errorf("open the copy in %s: %w", root, err)
	}
	i.NetworkIsolated = apart(pid)
	if err := i.await(ctx, nil, f.LogOffset); err != nil {
		return nil, fmt.Errorf("open the copy in %s: %w", root, err)
	}
	if err := i.relink(); err != nil {
		return nil, fmt.Errorf("open the copy in %s: %w", root, err)
	}
	i.RecoveryTook = recoveryTook(i.readLog(f.LogOffset))
	return i, nil
}

// Stop ends the server as `pg_ctl stop -m fast` does and returns when it is
// gone. A server that is gone already is no error, so Stop may be called again.
// After five minutes, or when ctx ends, an immediate shutdown follows; that,
// and a control file that does not say "shut down" afterwards, are errors,
// because what verification does next needs a clean stop. The gate of the copy
// ends first: a client that connects and says nothing would hold up the
// server's end for authentication_timeout (PM_WAIT_DEAD_END).
func (i *Instance) Stop(ctx context.Context) error {
	if err := endGates(ctx, i.Root); err != nil {
		return fmt.Errorf("stop the copy in %s: %w", i.Root, err)
	}
	h, err := hold(i.PID)
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop the copy in %s: %w", i.Root, err)
	}
	defer h.close()
	if !worksIn(i.PID, i.DataDirectory) { // the number belongs to another process now
		return nil
	}
	var gone bool
	err = effect(ctx, "stop", func() error {
		if err := h.signal(unix.SIGINT); err != nil {
			return err
		}
		gone, err = h.wait(ctx, stopPatience)
		return err
	})
	if !gone {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), killPatience)
		defer cancel()
		return errors.Join(fmt.Errorf("stop the copy in %s: it did not end by itself and was ended at once", i.Root), err, Kill(undo, i.Root))
	}
	if err != nil {
		return fmt.Errorf("stop the copy in %s: %w", i.Root, err)
	}
	control, err := ReadControl(filepath.Join(i.DataDirectory, "global", "pg_control"))
	if err != nil {
		return fmt.Errorf("stop the copy in %s: %w", i.Root, err)
	}
	if control.State != ControlShutDown && control.State != ControlShutDownInRecovery {
		return fmt.Errorf("stop the copy in %s: the server ended, but its control file says %q", i.Root, control.State)
	}
	return nil
}

// Kill ends the gate of the copy in root and every postgres that works below it, without a checkpoint, and
// returns when all of them are gone: first by an immediate shutdown, then by
// SIGKILL. For undoing; it needs no instance and none need be there. System V
// memory of a killed server is removed, which otherwise stays for ever.
func Kill(ctx context.Context, root string) error {
	root, err := filepath.EvalSymlinks(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill the copy: %w", err)
	}
	if err := endGates(ctx, root); err != nil {
		return err
	}
	shared := map[int]uint32{}
	noteShared(shared, root)
	if f, err := readInstance(root); err == nil {
		noteShared(shared, f.Data)
	}
	for sig, until := unix.SIGQUIT, time.Now().Add(quitPatience); ; {
		pids, err := postgresBelow(root)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return removeShared(shared)
		}
		for _, pid := range pids {
			if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil {
				noteShared(shared, cwd)
			}
			if err := endOne(ctx, root, pid, sig); err != nil {
				return fmt.Errorf("kill the copy in %s: %w", root, err)
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("kill the copy in %s: processes %v are still there: %w", root, pids, context.Cause(ctx))
		}
		if time.Now().After(until) {
			sig = unix.SIGKILL
		}
	}
}

// endOne signals pid if it still is what it was listed as, and waits a moment.
func endOne(ctx context.Context, root string, pid int, sig unix.Signal) error {
	h, err := hold(pid)
	if errors.Is(err, backup.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.close()
	if isPostgres(pid) && concerns(pid, root) {
		if err := h.signal(sig); err != nil {
			return err
		}
	}
	_, _ = h.wait(ctx, 200*time.Millisecond) // the caller looks again
	return nil
}

// noteShared adds the segment that the server of data directory dir made, with
// the owner it must have.
func noteShared(ids map[int]uint32, dir string) {
	uid, _, err := owner(dir)
	l, err2 := readLock(dir)
	if err == nil && err2 == nil && l.SharedID >= 0 && uid != 0 {
		ids[l.SharedID] = uid
	}
}

// readInstance reads what Start recorded below root, a real path.
func readInstance(root string) (instanceFile, error) {
	b, err := os.ReadFile(filepath.Join(root, Private, "instance.json"))
	if err != nil {
		return instanceFile{}, orNotFound(err)
	}
	var f instanceFile
	if err := json.Unmarshal(b, &f); err != nil {
		return instanceFile{}, err
	}
	if !below(root, filepath.Clean(f.Data)) {
		return instanceFile{}, fmt.Errorf("%s/instance.json names %s, outside of the copy", Private, f.Data)
	}
	return f, nil
}

// removeShared removes segments of those owners that nobody is attached to.
func removeShared(ids map[int]uint32) error {
	for id, uid := range ids {
		var d unix.SysvShmDesc
		if _, err := unix.SysvShmCtl(id, unix.IPC_STAT, &d); err != nil || d.Nattch != 0 || d.Perm.Uid != uid {
			continue // gone already, or somebody else's by now
		}
		if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("remove shared memory %d: %w", id, err)
		}
	}
	return nil
}

// Command prepares one of the client programs of the same major version to
// talk to this server, run as the copy's uid. ctx kills it. A program that is
// not installed shows when the command is run: use Installation.Tool to ask
// before.
func (i *Instance) Command(ctx context.Context, tool string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(i.Installation.Bin, tool), args...)
	cmd.Dir = "/"
	cmd.Env = append(i.environment(),
		"PGHOST="+i.SocketDir, "PGPORT="+strconv.Itoa(i.Port), "PGUSER="+i.Superuser, "PGDATABASE=postgres",
		"PGAPPNAME=cleancut", "PGSSLMODE=disable")
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = childAttributes(i.credential())
	return cmd
}
