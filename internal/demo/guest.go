package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/uml"
)

// RunInGuest tells the story in the user-mode kernel: the same program, the
// same command, as root of a guest whose files are this host's under a
// throwaway overlay.
func RunInGuest(ctx context.Context, o Options) (Result, error) {
	var res Result
	if missing := uml.Missing(); len(missing) > 0 {
		return res, backup.Hint(fmt.Errorf("this kernel has no md arrays (or this user is not root), and no user-mode kernel can run: missing %s", strings.Join(missing, ", ")),
			"apt install what is missing, or run `make demo` as root")
	}
	share, err := os.MkdirTemp("", "cleancut-demo-")
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(share)
	var out bytes.Buffer
	args := []string{o.Program, "demo", "--here", "--json", "--report", filepath.Join(share, "report.html"),
		"--provider", o.Provider, "--mode", string(o.Mode), "--latency", o.Latency.String(), "--skew", o.Skew.String(),
		"--rows", strconv.FormatInt(o.Rows, 10), "--size", strconv.FormatInt(int64(o.VolumeSize), 10)}
	code, err := uml.Guest{Args: args, Scratch: int64(8*o.VolumeSize + 8<<30), Share: []string{share}, Stdout: &out, Stderr: o.Out, Timeout: time.Hour}.Run(ctx)
	if err != nil {
		return res, fmt.Errorf("user-mode guest: %w", err)
	}
	if err := json.Unmarshal(out.Bytes(), &res); err != nil || len(res.Steps) == 0 {
		return res, fmt.Errorf("the story in the guest ended with status %d and no result: %w", code, errors.Join(err, errors.New(out.String())))
	}
	res.Report, res.Data = o.Report, dataBeside(o.Report)
	return res, errors.Join(copyFile(filepath.Join(share, "report.html"), res.Report), copyFile(filepath.Join(share, "report.json"), res.Data))
}

// copyFile copies across filesystems.
func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
