package dump

import (
	"bytes"
	"io"
	"strings"
)

// relocate passes a dump on and, in its first part, the globals, gives the
// tablespaces the paths they have on production: pg_dumpall writes where the
// links of the running copy lead. From the first \connect on, which begins the
// databases and so the data, nothing is looked at any more.
type relocate struct {
	w        io.Writer
	original func(inCopy string) string
	line     []byte // begun and not ended yet
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
// CREATE TABLESPACE name OWNER role LOCATION 'path';
func (r *relocate) moved(line string) string {
	const location = " LOCATION '"
	i := strings.LastIndex(line, location)
	if !strings.HasPrefix(line, "CREATE TABLESPACE ") || i < 0 || !strings.HasSuffix(line, "';\n") || r.original == nil {
		return line
	}
	i += len(location)
	path := strings.ReplaceAll(strings.TrimSuffix(line[i:], "';\n"), "''", "'")
	return line[:i] + strings.ReplaceAll(r.original(path), "'", "''") + "';\n"
}
