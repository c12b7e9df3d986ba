package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"cleancut/internal/backup"
)

// AddLine appends a line to a system table such as /etc/fstab, between two
// comments that mark it as ours under that name. A line of ours with the same
// name is replaced. The file is replaced whole (rename), keeping its mode and
// owner; a link to it stays one; a missing file is made. A name or line that
// is not one line: ErrUsage.
func AddLine(file, name, line string) error {
	if strings.ContainsAny(name+line, "\n\r") {
		return fmt.Errorf("line %q of %q for %s: %w: not one line", line, name, file, backup.ErrUsage)
	}
	return editTable(file, name, []string{marker(name), line, endMarker(name)})
}

// FstabLine is a line that mounts a filesystem by its UUID. Blanks in the mount
// point are written as fstab(5) and getmntent(3) have it.
func FstabLine(uuid, mountpoint, fstype string, options []string) string {
	field := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "#", `\043`)
	return fmt.Sprintf("UUID=%s %s %s %s 0 0", uuid, field.Replace(mountpoint), fstype, strings.Join(options, ","))
}

// RemoveLine removes what AddLine wrote under that name. Not there: nil. It
// never takes more than what stands between the two comments; where the second
// is gone, only the first comment goes.
func RemoveLine(file, name string) error { return editTable(file, name, nil) }

// LineOf returns the line that AddLine wrote under that name, ErrNotFound if
// there is none.
func LineOf(file, name string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read %s: %w", file, err)
	}
	lines := strings.Split(string(b), "\n")
	if i := slices.Index(lines, marker(name)); i >= 0 && i+2 < len(lines) && lines[i+2] == endMarker(name) {
		return lines[i+1], nil
	}
	return "", fmt.Errorf("line of storage %s in %s: %w", name, file, backup.ErrNotFound)
}

func marker(name string) string    { return "# cleancut storage " + name }
func endMarker(name string) string { return "# end of cleancut storage " + name }

func editTable(file, name string, add []string) error {
	if real, err := filepath.EvalSymlinks(file); err == nil {
		file = real
	}
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("edit %s: %w", file, err)
	}
	text := editLines(string(old), name, add)
	if text == string(old) {
		return nil
	}
	if err := replaceFile(file, text); err != nil {
		return fmt.Errorf("edit %s: %w", file, err)
	}
	return nil
}

// editLines takes our lines out and appends the new ones. All others stay as
// they are, but for a newline that the last one may lack.
func editLines(old, name string, add []string) string {
	var keep []string
	lines := slices.Collect(strings.Lines(old))
	is := func(line, text string) bool { return strings.TrimSuffix(line, "\n") == text }
	for i := 0; i < len(lines); i++ {
		if !is(lines[i], marker(name)) {
			keep = append(keep, lines[i])
			continue
		}
		// One line is between the comments, or none if somebody deleted it.
		for n := 1; n <= 2; n++ {
			if i+n < len(lines) && is(lines[i+n], endMarker(name)) {
				i += n
				break
			}
		}
	}
	text := strings.Join(keep, "")
	if len(add) == 0 {
		return text
	}
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + strings.Join(add, "\n") + "\n"
}

// replaceFile writes a file so that a crash leaves the old one or the new.
func replaceFile(file, text string) error {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".cleancut-*")
	if err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if st, serr := os.Stat(file); serr == nil {
		mode = st.Mode().Perm()
		if s, ok := st.Sys().(*syscall.Stat_t); ok {
			err = tmp.Chown(int(s.Uid), int(s.Gid))
		}
	}
	if err == nil {
		_, err = tmp.WriteString(text)
	}
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
