package dump_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/flow/dump"
	"cleancut/internal/postgres/pgtest"
)

func TestRowsAreCountedAlikeInWhateverPiecesAndOrder(t *testing.T) {
	const text = "1\ta\n2\t\\N\n\n\\.x\n\\\\.\nlast of the rows\n"
	const behind = "\\.\n\n\n-- not a row\n"
	rows, hash := dump.Rows([][]byte{[]byte(text)})
	if rows != 6 {
		t.Errorf("%d rows, want 6", rows)
	}
	if n, h := dump.Rows([][]byte{[]byte(text + behind)}); n != rows || h != hash {
		t.Errorf("with what follows: %d rows with %s, want %d with %s", n, h, rows, hash)
	}
	for size := 1; size < len(text); size++ {
		var pieces [][]byte
		for rest := []byte(text + behind); len(rest) > 0; rest = rest[min(size, len(rest)):] {
			pieces = append(pieces, rest[:min(size, len(rest))])
		}
		if n, h := dump.Rows(pieces); n != rows || h != hash {
			t.Fatalf("in pieces of %d: %d rows with %s, want %d with %s", size, n, h, rows, hash)
		}
	}
	lines := strings.SplitAfter(text, "\n")
	lines[0], lines[5] = lines[5], lines[0]
	if n, h := dump.Rows([][]byte{[]byte(strings.Join(lines, ""))}); n != rows || h != hash {
		t.Errorf("in another order: %d rows with %s, want %d with %s", n, h, rows, hash)
	}
	for _, other := range []string{strings.Replace(text, "a", "b", 1), strings.Replace(text, "1\ta\n2\t\\N", "1\t\\N\n2\ta", 1)} {
		if n, h := dump.Rows([][]byte{[]byte(other)}); n != rows || h == hash {
			t.Errorf("%q: %d rows with %s, want another hash", other, n, h)
		}
	}
}

// archiveOf lets pg_dump make an archive.
func archiveOf(t testing.TB) []byte {
	t.Helper()
	s := pgtest.New(t, pgtest.Options{})
	s.Exec(t, "CREATE TABLE t (a int)", "INSERT INTO t SELECT generate_series(1, 50)", "SELECT lo_from_bytea(0, 'large')")
	b, err := s.Command(t.Context(), "pg_dump", "-Fc", "-Z0").Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAnArchiveThatIsCutShortOrUnknownIsNotCounted(t *testing.T) {
	b := archiveOf(t)
	if err := dump.ScanArchive(bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	newer := bytes.Clone(b)
	newer[6] = 17 // the archive's minor version
	for name, b := range map[string][]byte{"empty": nil, "newer": newer, "short": b[:len(b)-1], "compressed": append(append(bytes.Clone(b[:11]), 0, 6), b[13:]...), "SQL": []byte("-- PostgreSQL database dump\n")} {
		if err := dump.ScanArchive(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzScanArchive(f *testing.F) {
	b, err := os.ReadFile("testdata/small.dump")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Fuzz(func(_ *testing.T, b []byte) { _ = dump.ScanArchive(bytes.NewReader(b)) })
}

func FuzzScanSQL(f *testing.F) {
	f.Add("-- Database \"x\" dump\n-- Data for Name: t; Type: TABLE DATA; Schema: public; Owner: o\nCOPY public.t (a) FROM stdin;\n1\n\\.\n")
	f.Fuzz(func(_ *testing.T, s string) { _ = dump.ScanSQL(strings.NewReader(s), "x", "y") })
}

func FuzzPartName(f *testing.F) {
	f.Add("postgres", "Postgres")
	f.Add("a/b", "a%2Fb")
	f.Add("..", ".")
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := backup.PartName(a), backup.PartName(b)
		if (x == y) != (a == b) {
			t.Errorf("%q and %q have the names %q and %q", a, b, x, y)
		}
		if strings.ContainsAny(x, "/. \x00\n") {
			t.Errorf("%q has the name %q", a, x)
		}
	})
}
