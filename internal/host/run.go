package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
)

// Run runs a system tool with an argument list and returns its standard
// output. The error holds the last lines the tool wrote to standard error.
// When ctx ends the tool gets SIGTERM, then, two seconds later, SIGKILL: a
// tool that holds kernel state must have its chance to leave it consistent.
func Run(ctx context.Context, tool string, args ...string) ([]byte, error) {
	return runWith(ctx, nil, tool, args...)
}

// runWith is Run with variables added to the tool's environment.
func runWith(ctx context.Context, env []string, tool string, args ...string) ([]byte, error) {
	point := "host." + tool
	if err := fault.Point(ctx, point); err != nil {
		return nil, err
	}
	path, err := lookTool(tool)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		said := lastLines(errs.String()+out.String(), 3)
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return out.Bytes(), fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, said)
	}
	return out.Bytes(), fault.Point(ctx, point+" done")
}

// lookTool finds a system tool also where cron's PATH does not look.
func lookTool(tool string) (string, error) {
	if p, err := exec.LookPath(tool); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if p, err := exec.LookPath(filepath.Join(dir, tool)); err == nil {
			return p, nil
		}
	}
	return "", backup.Hint(fmt.Errorf("find %s: %w", tool, exec.ErrNotFound), "apt install "+packageOf(tool))
}

// HaveTool reports whether a system tool is installed, and in which Debian
// package it is.
func HaveTool(tool string) (have bool, pkg string) {
	_, err := lookTool(tool)
	return err == nil, packageOf(tool)
}

func packageOf(tool string) string {
	switch {
	case tool == "mdadm":
		return "mdadm"
	case tool == "lvm":
		return "lvm2"
	case tool == "dmsetup":
		return "dmsetup"
	case strings.Contains(tool, "xfs"):
		return "xfsprogs"
	case tool == "e2fsck", tool == "tune2fs", strings.Contains(tool, "ext4"):
		return "e2fsprogs"
	case strings.HasPrefix(tool, "udev"):
		return "udev"
	}
	return "util-linux"
}

// exitCode returns the exit status inside err, or -1.
func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "; ")
}

// parseExport reads the KEY=VALUE lines that mdadm --export and blkid -o
// export write.
func parseExport(b []byte) map[string]string {
	out := map[string]string{}
	for line := range strings.SplitSeq(string(b), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			out[strings.TrimSpace(k)] = strings.TrimSpace(v)
		}
	}
	return out
}
