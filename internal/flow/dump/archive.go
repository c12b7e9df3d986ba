package dump

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
)

// What pg_backup_archiver.h and pg_backup_custom.c define.
const (
	formatCustom = 1
	formatTar    = 3 // what pg_dump -Fd writes into toc.dat (pg_backup_directory.c, _CloseArchive)
	blockData    = 1
	blockBlobs   = 3
)

// errArchive is what a scan of an archive ends with that this program does not
// understand. The archive may be fine: its tables are then read again from the
// copy.
var errArchive = errors.New("unknown archive")

// archive reads what pg_dump wrote with -Fc or, of toc.dat, -Fd: the table of
// contents (ReadHead and ReadToc of pg_backup_archiver.c, versions 1.14 to
// 1.16, which are PostgreSQL 12 to 18), and the data (pg_backup_custom.c).
type archive struct {
	r       *bufio.Reader
	err     error
	version int // 14 for 1.14
	intSize int
	offSize int
	format  byte
	tables  map[int]uint32    // entry of a table's data → the table's oid
	files   map[string]uint32 // of -Fd: its file
}

func (a *archive) fail(format string, args ...any) {
	if a.err == nil {
		a.err = fmt.Errorf("%w: "+format, append([]any{errArchive}, args...)...)
	}
}

func (a *archive) byte() byte {
	if a.err != nil {
		return 0
	}
	b, err := a.r.ReadByte()
	if err != nil {
		a.fail("%w", err)
	}
	return b
}

// int is ReadInt: a sign and intSize bytes, the least first.
func (a *archive) int() int {
	sign, v := a.byte(), 0
	for i := range a.intSize {
		v |= int(a.byte()) << (8 * i)
	}
	if sign > 1 {
		a.fail("sign %d", sign)
	}
	if sign == 1 {
		return -v
	}
	return v
}

// maxString is above any definition that PostgreSQL keeps: a value holds 1 GB.
const maxString = 1 << 30

// str is ReadStr. Only what is at most 64 bytes is returned: all that is
// needed here; false stands for NULL.
func (a *archive) str() (string, bool) {
	n := a.int()
	if a.err != nil || n < 0 {
		return "", false
	}
	if n > maxString {
		a.fail("a string of %d bytes", n)
		return "", false
	}
	if n > 64 {
		if _, err := io.CopyN(io.Discard, a.r, int64(n)); err != nil {
			a.fail("%w", err)
		}
		return "", true
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(a.r, b); err != nil {
		a.fail("%w", err)
	}
	return string(b), true
}

// open reads the head and the table of contents.
func (a *archive) open() error {
	var magic [5]byte
	for i := range magic {
		magic[i] = a.byte()
	}
	major, minor, _ := a.byte(), a.byte(), a.byte()
	a.intSize, a.offSize, a.format = int(a.byte()), int(a.byte()), a.byte()
	a.version = int(minor)
	if string(magic[:]) != "PGDMP" || major != 1 || a.version < 14 || a.version > 16 || a.intSize != 4 || a.offSize != 8 ||
		a.format != formatCustom && a.format != formatTar {
		a.fail("head %q %d.%d, integers of %d, offsets of %d, format %d", magic, major, minor, a.intSize, a.offSize, a.format)
		return a.err
	}
	compression := 0
	if a.version >= 15 { // an algorithm; 0 is none
		compression = int(a.byte())
	} else {
		compression = a.int()
	}
	if compression != 0 {
		a.fail("it is compressed")
	}
	for range 7 { // when it was made
		a.int()
	}
	for range 3 { // database, versions of server and pg_dump
		a.str()
	}
	a.tables, a.files = map[int]uint32{}, map[string]uint32{}
	for range a.int() {
		if a.entry(); a.err != nil {
			break
		}
	}
	return a.err
}

// entry reads one entry of the table of contents.
func (a *archive) entry() {
	id := a.int()
	a.int() // has it data
	a.str() // oid of its catalog
	oid, _ := a.str()
	a.str() // tag
	kind, _ := a.str()
	a.int() // section
	for range 3 {
		a.str() // definition, drop, COPY statement
	}
	for range 3 {
		a.str() // namespace, tablespace, access method
	}
	if a.version >= 16 {
		a.int() // relkind
	}
	a.str() // owner
	a.str() // WITH OIDS, "false"
	for a.err == nil {
		if _, ok := a.str(); !ok { // dependencies, a NULL at the end
			break
		}
	}
	file := ""
	if a.format == formatCustom {
		a.byte()
		for range a.offSize {
			a.byte()
		}
	} else {
		file, _ = a.str()
	}
	if kind != "TABLE DATA" {
		return
	}
	var n uint32
	if _, err := fmt.Sscan(oid, &n); err != nil {
		a.fail("oid %q", oid)
	}
	a.tables[id] = n
	if file != "" {
		a.files[file] = n
	}
}

// custom reads the data of an archive of -Fc up to its end.
func (t *tally) custom(r io.Reader, db *database) error {
	a := &archive{r: bufio.NewReaderSize(r, pipeSize)}
	if err := a.open(); err != nil {
		return err
	}
	for {
		kind, err := a.r.ReadByte()
		if errors.Is(err, io.EOF) {
			return nil
		}
		id := a.int()
		switch {
		case err != nil || a.err != nil:
			return errors.Join(err, a.err)
		case kind == blockData:
			var s rowSum
			a.chunks(&s)
			if oid, ok := a.tables[id]; ok {
				t.take(db.oids[oid], &s)
			}
		case kind == blockBlobs:
			for a.err == nil && a.int() != 0 { // each large object's oid, then its chunks
				a.chunks(io.Discard)
			}
		default:
			a.fail("block of kind %d", kind)
		}
		if a.err != nil {
			return a.err
		}
	}
}

// chunks reads one piece of data: lengths and bytes, a length of 0 at the end.
func (a *archive) chunks(w io.Writer) {
	for a.err == nil {
		n := a.int()
		if n == 0 {
			return
		}
		if n < 0 || n > maxString {
			a.fail("a chunk of %d bytes", n)
		}
		for n > 0 && a.err == nil {
			b, err := a.r.Peek(min(n, a.r.Size()))
			if err != nil {
				a.fail("%w", err)
				return
			}
			_, _ = w.Write(b) // a rowSum or nothing
			n -= len(b)
			_, _ = a.r.Discard(len(b)) // it was peeked at
		}
	}
}

// readTOC returns the files of an archive of -Fd that hold a table's rows, each
// with the table's oid. Of one that this program does not understand: none.
func readTOC(root *os.Root) map[string]uint32 {
	f, err := root.Open("toc.dat")
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	a := &archive{r: bufio.NewReader(f)}
	if err := a.open(); err != nil {
		return nil
	}
	return a.files
}
