package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// Installation is PostgreSQL's programs of one major version.
type Installation struct {
	Major int
	Bin   string // the directory with the programs
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// FindInstallation looks for the programs of that major version: in dirs, then
// where the packages of Debian and of the PGDG for Red Hat put them, then along
// PATH. A copy can only be started by its own major version (PG_VERSION), so no
// other is taken. The error wraps ErrNotFound, says what was looked at and has
// a hint.
func FindInstallation(ctx context.Context, major int, dirs []string) (Installation, error) {
	look := append(append([]string{}, dirs...), packageDirs(major)...)
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if filepath.IsAbs(dir) {
			look = append(look, dir)
		}
	}
	var tried []string
	for _, dir := range look {
		got, err := majorOf(ctx, dir)
		switch {
		case ctx.Err() != nil:
			return Installation{}, fmt.Errorf("look for PostgreSQL %d: %w", major, context.Cause(ctx))
		case errors.Is(err, os.ErrNotExist):
			tried = append(tried, dir)
		case err != nil:
			tried = append(tried, fmt.Sprintf("%s (%v)", dir, err))
		case got != major:
			tried = append(tried, fmt.Sprintf("%s (has %d)", dir, got))
		default:
			return Installation{Major: major, Bin: dir}, nil
		}
	}
	return Installation{}, backup.Hint(fmt.Errorf("PostgreSQL %d: %w in %s", major, backup.ErrNotFound, strings.Join(tried, ", ")),
		fmt.Sprintf("install it (Debian, Ubuntu: apt install postgresql-%d; Red Hat: dnf install postgresql%d-server postgresql%d-contrib) or name its bin directory in the configuration", major, major, major))
}

// packageDirs is where packages put a major version: Debian's and PGDG's for
// Red Hat.
func packageDirs(major int) []string {
	return []string{fmt.Sprintf("/usr/lib/postgresql/%d/bin", major), fmt.Sprintf("/usr/pgsql-%d/bin", major)}
}

// majorOf asks the postgres in dir for its version.
func majorOf(ctx context.Context, dir string) (int, error) {
	return majorOfTool(ctx, filepath.Join(dir, "postgres"))
}

func majorOfTool(ctx context.Context, path string) (int, error) {
	if _, err := os.Stat(path); err != nil {
		return 0, err
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("run %s --version: %w", path, err)
	}
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("%s --version says %q", path, strings.TrimSpace(string(out)))
	}
	return strconv.Atoi(string(m[1]))
}

// Tool returns the path of one of the programs, having asked it for its
// version: a folder may hold client programs of another one, and an older
// pg_amcheck or pg_checksums would judge what it does not know. The error wraps
// ErrNotFound and its hint names the package.
func (i Installation) Tool(ctx context.Context, name string) (string, error) {
	path := filepath.Join(i.Bin, name)
	major, err := majorOfTool(ctx, path)
	if ctx.Err() != nil {
		return "", fmt.Errorf("look for %s: %w", name, context.Cause(ctx))
	}
	if err == nil && major == i.Major {
		return path, nil
	}
	why := fmt.Sprintf("in %s", i.Bin)
	switch {
	case err == nil:
		why += fmt.Sprintf(", where it is of %d", major)
	case !errors.Is(err, os.ErrNotExist):
		why += fmt.Sprintf(" (%v)", err)
	}
	return "", backup.Hint(fmt.Errorf("%s of PostgreSQL %d: %w %s", name, i.Major, backup.ErrNotFound, why),
		fmt.Sprintf("install it (Debian, Ubuntu: apt install postgresql-%d postgresql-client-%d; Red Hat: dnf install postgresql%d postgresql%d-contrib)", i.Major, i.Major, i.Major, i.Major))
}

// Reader returns the installation whose pg_dumpall reads a server of i: i, or
// else the next newer major version on this host that has it, which may be of a
// client package without a server. "pg_dump can also dump from PostgreSQL
// servers older than its own version" (pg_dump.sgml, back to 9.2); what a newer
// one writes need not load into i's version, so it is only good for reading.
// An older one refuses such a server. The error is Tool's of i.
func (i Installation) Reader(ctx context.Context) (Installation, error) {
	_, err := i.Tool(ctx, "pg_dumpall")
	if err == nil {
		return i, nil
	}
	for major := i.Major + 1; major <= i.Major+10; major++ {
		for _, dir := range packageDirs(major) {
			newer := Installation{Major: major, Bin: dir}
			_, err1 := newer.Tool(ctx, "pg_dumpall")
			_, err2 := newer.Tool(ctx, "pg_dump") // which pg_dumpall calls
			if err1 == nil && err2 == nil {
				return newer, nil
			}
		}
	}
	return Installation{}, err
}
