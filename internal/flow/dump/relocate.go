package dump

import (
	"bytes"
	"io"
	"slices"
	"strings"
)

// relocate passes a dump on and, in its first part, the globals, gives the
// tablespaces other paths: pg_dumpall writes where the links of the running
// copy lead, and the dump is to have production's. From the first \connect on,
// which begins the databases and so the data, nothing is looked at any more.
type relocate struct {
	w        io.Writer
	original func(inCopy string) string
	omit     []string // lines that are left out
	line     []byte   // begun and not ended yet
	data     bool
}

// Write implements io.Writer. The last, unended line of the globals is held
// back until its end comes; a dump always ends its lines.
func (r *relocate) Write(p []byte) (int, error) {
	if r.data {
		return r.w.Write(p)
	}
	rest := p
	for !r.data {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			r.line = append(r.line, rest...)
			return len(p), nil
		}
		line := string(append(r.line, rest[:i+1]...))
		r.line, rest = nil, rest[i+1:]
		r.data = strings.HasPrefix(line, `\connect `)
		if slices.Contains(r.omit, line) {
			continue
		}
		if _, err := io.WriteString(r.w, r.moved(line)); err != nil {
			return 0, err
		}
	}
	if _, err := r.w.Write(rest); err != nil {
		return 0, err
	}
	return len(p), nil
}

// moved rewrites the line that dumpTablespaces of pg_dumpall.c writes:
// CREATE TABLESPACE name OWNER role LOCATION 'path'; a path with a backslash is
// written as E'path', with backslashes doubled (appendStringLiteral).
func (r *relocate) moved(line string) string {
	if !strings.HasPrefix(line, "CREATE TABLESPACE ") || !strings.HasSuffix(line, "';\n") || r.original == nil {
		return line
	}
	for mark, old := range map[string]*strings.Replacer{" LOCATION '": strings.NewReplacer("''", "'"), " LOCATION  E'": strings.NewReplacer("''", "'", `\\`, `\`)} {
		if i := strings.LastIndex(line, mark); i >= 0 {
			path := r.original(old.Replace(strings.TrimSuffix(line[i+len(mark):], "';\n")))
			if strings.Contains(path, `\`) {
				return line[:i] + " LOCATION  E'" + strings.NewReplacer("'", "''", `\`, `\\`).Replace(path) + "';\n"
			}
			return line[:i] + " LOCATION '" + strings.ReplaceAll(path, "'", "''") + "';\n"
		}
	}
	return line
}
