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
	look := append([]string{}, dirs...)
	look = append(look, fmt.Sprintf("/usr/lib/postgresql/%d/bin", major), fmt.Sprintf("/usr/pgsql-%d/bin", major))
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

// majorOf asks the postgres in dir for its version.
func majorOf(ctx context.Context, dir string) (int, error) {
	path := filepath.Join(dir, "postgres")
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

// Tool returns the path of one of the programs. The error wraps ErrNotFound
// and its hint names the package.
func (i Installation) Tool(name string) (string, error) {
	path := filepath.Join(i.Bin, name)
	if _, err := os.Stat(path); err != nil {
		return "", backup.Hint(fmt.Errorf("%s of PostgreSQL %d: %w in %s", name, i.Major, backup.ErrNotFound, i.Bin),
			fmt.Sprintf("install it (Debian, Ubuntu: apt install postgresql-%d postgresql-client-%d; Red Hat: dnf install postgresql%d postgresql%d-contrib)", i.Major, i.Major, i.Major, i.Major))
	}
	return path, nil
}
