package dump

import (
	"io"

	"filippo.io/age"

	"cleancut/internal/backup"
)

// Rows counts and hashes COPY text in pieces.
func Rows(pieces [][]byte) (int64, string) {
	var s rowSum
	for _, p := range pieces {
		_, _ = s.Write(p)
	}
	return s.rows, s.hash()
}

// Unpack is unpack.
func Unpack(r io.Reader, p backup.DumpPart, identities []age.Identity, into io.Writer) error {
	return unpack(r, p, identities, into)
}

// ScanArchive reads an archive of one table.
func ScanArchive(r io.Reader) error {
	return (&tally{}).custom(r, &database{})
}

// ScanSQL reads the output of pg_dumpall of databases without known tables.
func ScanSQL(r io.Reader, databases ...string) error {
	t := &sqlScan{}
	for _, name := range databases {
		t.databases = append(t.databases, &database{DumpedDatabase: backup.DumpedDatabase{Name: name}})
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{t}, struct{ io.Reader }{r}, make([]byte, 7))
	return err
}
