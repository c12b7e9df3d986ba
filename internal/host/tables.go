package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// AddLine appends a line to a system table such as /etc/fstab, behind a
// comment that marks it as ours under that name. A line of ours with the same
// name is replaced. The file is replaced whole (rename), keeping its mode; a
// missing file is made.
func AddLine(file, name, line string) error {
	return editTable(file, name, []string{marker(name), line})
}

// RemoveLine removes the line that AddLine wrote under that name. Not there:
// nil.
func RemoveLine(file, name string) error { return editTable(file, name, nil) }

func marker(name string) string { return "# cleancut storage " + name }

func editTable(file, name string, add []string) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("edit %s: %w", file, err)
	}
	if errors.Is(err, os.ErrNotExist) && add == nil {
		return nil
	}
	mode := os.FileMode(0o644)
	if st, err := os.Stat(file); err == nil {
		mode = st.Mode().Perm()
	}
	var keep []string
	lines := strings.Split(strings.TrimSuffix(string(old), "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		if lines[i] == marker(name) {
			i++ // and the line behind it
			continue
		}
		keep = append(keep, lines[i])
	}
	if len(keep) == 1 && keep[0] == "" {
		keep = nil
	}
	text := strings.Join(append(keep, add...), "\n") + "\n"
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("edit %s: %w", file, err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".cleancut-*")
	if err != nil {
		return fmt.Errorf("edit %s: %w", file, err)
	}
	_, err = tmp.WriteString(text)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("edit %s: %w", file, err)
	}
	return nil
}
