package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/host"
	"cleancut/internal/load"
)

// otherHost plays the restore host: namespaces of its own for mounts, host
// name, network and IPC, an empty state folder, and neither production's
// filesystem nor its socket in sight. A holder process keeps the namespaces;
// every command is the real program, run in them.
type otherHost struct {
	holder *exec.Cmd
	state  string
}

// BeOtherHost is the body of the holder: it runs in the new namespaces, takes
// the other host's name, hides production's folders and unmounts production's
// filesystem there, says "ready" and waits for the end of its input.
func BeOtherHost(hide []string, unmount string, in io.Reader, out io.Writer) error {
	if err := unix.Sethostname([]byte("restore-host")); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, dir := range hide {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	if err := unix.Unmount(unmount, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", unmount, err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, in)
	return err
}

// loopbackUp brings up the loopback interface of a new network namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("bring up the loopback interface: %w", err)
	}
	return nil
}

func (s *story) startOtherHost(ctx context.Context) error {
	s.host.state = filepath.Join(s.work, "b")
	args := append([]string{"demo-host", filepath.Join(s.work, "a"), s.server.Socket}, s.ground.hide()...)
	cmd := exec.CommandContext(context.WithoutCancel(ctx), s.Program, append(args, s.mnt)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("namespaces of the other host: %w", err)
	}
	s.host.holder = cmd
	s.later("other host", func(context.Context) error { return errors.Join(in.Close(), cmd.Wait()) })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return errStep("namespaces of the other host: %v: %s", err, said.String())
	}
	return s.ground.admit(ctx, cmd.Process.Pid)
}

// cleancut runs a command of the program on the other host and decodes its
// JSON into v.
func (s *story) cleancut(ctx context.Context, v any, args ...string) error {
	args = append([]string{"--target", strconv.Itoa(s.host.holder.Process.Pid), "--mount", "--uts", "--net", "--ipc", "--", s.Program, "--json",
		"--cluster", "demo", "--state", s.host.state}, append(s.ground.arguments(), args...)...)
	return s.answer(exec.CommandContext(ctx, "nsenter", args...), "the other host", v)
}

// answer runs the program on a host and decodes its JSON into v, unless that is
// nil.
func (s *story) answer(cmd *exec.Cmd, host string, v any) error {
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Env = append(s.ground.environment(), "PATH="+os.Getenv("PATH"))
	cmd.Dir = "/"
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("cleancut %s on %s: %w: %s", cmd.Args[len(cmd.Args)-1], host, err, strings.TrimSpace(said.String()))
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(out.Bytes(), v)
}

func (s *story) copyRoot() string { return filepath.Join(s.work, "copy") }

// Step 13.
func (s *story) otherHostRestores(ctx context.Context, facts map[string]any) error {
	if err := s.startOtherHost(ctx); err != nil {
		return err
	}
	// The other host sees no server to ask.
	if err := s.cleancut(ctx, nil, "--data-directory", s.server.Data, "topology"); err == nil {
		return errStep("the other host can reach the original's server")
	}
	began := time.Now()
	if err := s.cleancut(ctx, &s.copy, "restore", string(s.manifest.ID), "--to", s.copyRoot()); err != nil {
		return err
	}
	s.later("copy", func(ctx context.Context) error { return s.cleancut(ctx, nil, "restore", "--undo", s.copyRoot()) })
	s.phases = append(s.phases, phase{"restore", began, time.Now()})
	if s.copy.Host != "restore-host" || len(s.copy.Volumes) != 4 || len(s.copy.Filesystems) != 1 {
		return errStep("the copy is on %q with %d volumes", s.copy.Host, len(s.copy.Volumes))
	}
	array := s.copy.Filesystems[0].Device
	uuid, err := host.ArrayUUID(ctx, array)
	if err != nil {
		return err
	}
	if uuid == s.storage.ArrayUUID {
		return errStep("the copy's array has the original's identity %s", uuid)
	}
	facts["host"], facts["array"], facts["array_uuid"], facts["original_uuid"] = s.copy.Host, array, uuid, s.storage.ArrayUUID
	had := s.load.Words.Count()
	if err := s.load.Words.Await(ctx, had+1); err != nil {
		return fmt.Errorf("the original stopped serving: %w", err)
	}
	facts["original_still_serving"] = true
	return s.load.Err()
}

// Step 14.
func (s *story) recovered(ctx context.Context, facts map[string]any) error {
	conn, err := s.copyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var in bool
	var archive, listen string
	err = conn.QueryRow(ctx, "SELECT pg_is_in_recovery(), current_setting('archive_mode'), current_setting('listen_addresses')").Scan(&in, &archive, &listen)
	if err != nil {
		return err
	}
	facts["seconds_to_first_query"], facts["end_of_recovery"], facts["flush_lsn"] = s.copy.FirstQuery, s.copy.EndOfRecovery, s.manifest.Cut.FlushLSN
	facts["archive_mode"], facts["listen_addresses"] = archive, listen
	switch {
	case in:
		return errStep("the copy is still in recovery")
	case archive != "off" || listen != "":
		return errStep("the copy is not isolated: archive_mode %s, listen_addresses %q", archive, listen)
	case s.copy.EndOfRecovery < s.manifest.Cut.FlushLSN:
		return errStep("recovery ended at %s, before the flushed %s", s.copy.EndOfRecovery, s.manifest.Cut.FlushLSN)
	}
	if err := s.seedStandby(ctx, facts); err != nil {
		return err
	}
	// Production was seen serving beside its copies; its load ends here.
	_, err = s.load.Stop()
	return err
}

// copyConn connects to the copy through its private socket.
func (s *story) copyConn(ctx context.Context) (*pgx.Conn, error) { return connectTo(ctx, s.copy) }

func connectTo(ctx context.Context, c backup.Copy) (*pgx.Conn, error) {
	return pgx.Connect(ctx, fmt.Sprintf("host=%s port=%d user=%s dbname=postgres", c.SocketDir, c.Port, c.Superuser))
}

// Step 15.
func (s *story) markers(ctx context.Context, facts map[string]any) error {
	conn, err := s.copyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for n, want := range map[int]bool{1: true, 2: true, 3: false} {
		row, view, err := load.Marker(ctx, conn, n)
		if err != nil {
			return err
		}
		facts[fmt.Sprintf("marker_%d", n)] = map[string]bool{"row": row, "view": view, "expected": want}
		if row != want || view != want {
			return errStep("marker %d: row %v, view %v, expected %v", n, row, view, want)
		}
	}
	return nil
}

// Step 16.
func (s *story) judge(ctx context.Context, facts map[string]any) error {
	conn, err := s.copyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if s.finding, err = load.Judge(ctx, conn, s.promise); err != nil {
		return err
	}
	w, t := s.finding.Words, s.finding.Transfers
	facts["b_acknowledged_before_cut"], facts["b_found"], facts["b_sent_in_all"], facts["b_missing"], facts["b_phantom"] = w.Acked, w.Found, s.load.Words.Sent(), w.Missing, w.Phantom
	facts["c_acknowledged_before_cut"], facts["c_found"] = t.Acked, t.Found
	facts["a_rows_visible"] = s.finding.BulkVisible
	facts["sums"] = s.finding.Sums
	if p := s.finding.Problems(); len(p) > 0 {
		return errStep("%s", strings.Join(p, "; "))
	}
	if w.Acked == 0 {
		return errStep("no row of beater B was acknowledged before the cut: nothing was proven")
	}
	return nil
}

// Step 17.
func (s *story) verify(ctx context.Context, facts map[string]any) error {
	if err := s.cleancut(ctx, &s.verdict, "verify", string(s.manifest.ID), "--level", "full"); err != nil {
		return err
	}
	checks := map[string]backup.CheckResult{}
	for _, c := range s.verdict.Checks {
		checks[c.Name] = c.Result
		if c.Result != backup.Passed {
			return errStep("check %q: %s (%s)", c.Name, c.Result, c.Detail)
		}
	}
	facts["verdict"], facts["checks"], facts["verify_seconds"] = s.verdict.Word(), checks, s.verdict.Seconds
	return nil
}

// Step 18. The dump goes into the catalog; the check of it makes an empty
// server, loads the dump and compares every row's hash. That the dump's own
// counts are those of the copy is looked up here.
func (s *story) dump(ctx context.Context, facts map[string]any) error {
	var got struct {
		Name     string              `json:"name"`
		Manifest backup.DumpManifest `json:"manifest"`
	}
	if err := s.cleancut(ctx, &got, "dump", string(s.manifest.ID)); err != nil {
		return err
	}
	plain, stored := got.Manifest.Sizes()
	facts["dump_bytes"], facts["sql_bytes"], facts["dump_seconds"] = stored, plain, got.Manifest.Seconds
	var check backup.DumpCheck
	if err := s.cleancut(ctx, &check, "dump", "check", string(s.manifest.ID), got.Name); err != nil {
		return err
	}
	results := map[string]backup.CheckResult{}
	for _, c := range check.Checks {
		results[c.Name] = c.Result
		if c.Result != backup.Passed {
			return errStep("check %q: %s (%s)", c.Name, c.Result, c.Detail)
		}
	}
	conn, err := s.copyConn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	want, err := rowCounts(ctx, conn)
	if err != nil {
		return err
	}
	counts, hashed := map[string]int64{}, 0
	for _, d := range got.Manifest.Databases {
		for _, t := range d.Tables {
			if d.Name == "postgres" {
				counts[t.Schema+"."+t.Name] = t.Rows
			}
			if t.Hash != "" {
				hashed++
			}
		}
	}
	facts["counts"], facts["checks"], facts["check_seconds"], facts["rows_compared"], facts["tables_hashed"] = counts, results, check.Seconds, check.Rows, hashed
	if len(want) == 0 || fmt.Sprint(want) != fmt.Sprint(counts) {
		return errStep("row counts differ: copy %v, dump %v", want, counts)
	}
	if check.Tables < len(want) || check.Rows == 0 || hashed < len(want) {
		return errStep("the check compared %d tables with %d rows, %d of them hashed", check.Tables, check.Rows, hashed)
	}
	return nil
}

// rowCounts counts every user table of the database.
func rowCounts(ctx context.Context, conn *pgx.Conn) (map[string]int64, error) {
	rows, err := conn.Query(ctx, `SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1`)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	out := map[string]int64{}
	for _, name := range names {
		var n int64
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM "+name).Scan(&n); err != nil {
			return nil, fmt.Errorf("count %s: %w", name, err)
		}
		out[name] = n
	}
	return out, nil
}
