package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

// WAL is a folder of WAL files: the cluster's, or that of one backup. Each
// file is an object NAME.zst: zstd with the checksum of its content. Like all
// of the catalog it may be used at the same time by several processes.
type WAL struct {
	c      *Catalog
	backup backup.ID // "": the cluster's
}

// WAL returns the WAL of the cluster. It touches nothing yet.
func (c *Catalog) WAL() WAL { return WAL{c: c} }

// BackupWAL returns the WAL that was captured with one backup.
func (c *Catalog) BackupWAL(id backup.ID) WAL { return WAL{c: c, backup: id} }

// folder returns the prefix of all keys, with a slash at its end.
func (w WAL) folder() (string, error) {
	if err := backup.CheckClusterName(w.c.cluster); err != nil {
		return "", err
	}
	if w.backup == "" {
		return "clusters/" + w.c.cluster + "/wal/", nil
	}
	key, err := w.c.key(w.backup, "wal", "x")
	return strings.TrimSuffix(key, "x"), err
}

func (w WAL) key(f wal.File) (string, error) {
	folder, err := w.folder()
	if w.backup == "" {
		folder += f.Timeline.String() + "/"
	}
	return folder + f.String() + ".zst", err
}

// Claim records whose WAL is kept here, once: the first who comes decides. It
// returns nil if the record is the same already, and backup.ErrNotOurs if it
// is another's.
func (w WAL) Claim(ctx context.Context, s wal.System) error {
	if err := wal.CheckSize(s.SegmentSize); err != nil {
		return err
	}
	folder, err := w.folder()
	if err != nil {
		return err
	}
	have, err := w.System(ctx)
	if errors.Is(err, backup.ErrNotFound) {
		err = w.c.putJSON(ctx, folder+"system.json", s)
		if errors.Is(err, backup.ErrExists) { // another came first
			have, err = w.System(ctx)
		} else if err == nil {
			return nil
		}
	}
	if err != nil {
		return err
	}
	if have != s {
		return backup.Hint(fmt.Errorf("the catalog keeps WAL of system %d with segments of %s under the name %s, this is system %d with %s: %w",
			have.Identifier, have.SegmentSize, w.c.cluster, s.Identifier, s.SegmentSize, backup.ErrNotOurs),
			"another cluster uses the same name: give this one a name of its own (--cluster)")
	}
	return nil
}

// System reads that record; backup.ErrNotFound before the first Claim.
func (w WAL) System(ctx context.Context) (s wal.System, err error) {
	folder, err := w.folder()
	if err != nil {
		return s, err
	}
	if err := w.c.readJSON(ctx, folder+"system.json", &s); err != nil {
		return s, err
	}
	return s, wal.CheckSize(s.SegmentSize)
}

// Put stores a file of WAL, size bytes of content. It is there already with
// the same content, compared uncompressed: nil. With other content:
// backup.ErrExists, and it stays as it was. What is there is damaged:
// backup.ErrDamage.
func (w WAL) Put(ctx context.Context, f wal.File, content io.ReaderAt, size int64) error {
	key, err := w.key(f)
	if err != nil {
		return err
	}
	r := compress(io.NewSectionReader(content, 0, size))
	err = errors.Join(w.c.store.Put(ctx, key, r), r.Close())
	if !errors.Is(err, backup.ErrExists) {
		return err
	}
	same := &comparison{with: io.NewSectionReader(content, 0, size)}
	if err := w.read(ctx, key, same); err != nil {
		return err
	}
	if !same.end() {
		return backup.Hint(fmt.Errorf("%s: %w with other content", key, backup.ErrExists),
			"two servers write the same timeline: a copy that archives, or an old primary that came back; find it and give it a place of its own. What is stored stays")
	}
	return nil
}

// compress returns what r yields as zstd. Close ends it early.
func compress(r io.Reader) io.ReadCloser {
	out, in := io.Pipe()
	go func() {
		// One goroutine and a window of 1 MiB: few megabytes of memory.
		enc, err := zstd.NewWriter(in, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithEncoderCRC(true))
		if err == nil {
			_, err = io.Copy(enc, r)
			err = errors.Join(err, enc.Close())
		}
		_ = in.CloseWithError(err) // always nil
	}()
	return out
}

// comparison is a Writer that compares with what it reads.
type comparison struct {
	with  io.Reader
	buf   []byte
	other bool
}

func (c *comparison) Write(p []byte) (int, error) {
	if len(c.buf) < len(p) {
		c.buf = make([]byte, len(p))
	}
	n, err := io.ReadFull(c.with, c.buf[:len(p)])
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		c.other, err = true, nil
	}
	c.other = c.other || !bytes.Equal(p[:n], c.buf[:n])
	return len(p), err
}

// end reports whether all was equal and nothing is left.
func (c *comparison) end() bool {
	n, err := c.with.Read(make([]byte, 1))
	return !c.other && n == 0 && err == io.EOF
}

// Get writes a file of WAL to to. A segment, whole or partial, is proved
// first by its header to be the one of that name, and in the end by its
// length; all files by the checksum of their content. system may be zero: of
// any system. backup.ErrNotFound: it is not there. backup.ErrDamage: it is
// not what was stored. backup.ErrNotOurs: it is of another system. After an
// error what was written to to is worth nothing.
func (w WAL) Get(ctx context.Context, f wal.File, system wal.System, to io.Writer) error {
	key, err := w.key(f)
	if err != nil {
		return err
	}
	if f.Kind == wal.Journal || f.Kind == wal.Label {
		return w.read(ctx, key, to)
	}
	p := &proof{file: f, system: system, to: to}
	if err := w.read(ctx, key, p); err != nil {
		return err
	}
	if err := p.whole(); err != nil {
		return backup.Hint(fmt.Errorf("%s: %w", key, err), hintWAL)
	}
	return nil
}

const hintWAL = "put that file back from a copy of the catalog, or delete it there and push the segment again if the server or a standby still has it"

// read writes the content of an object to to.
func (w WAL) read(ctx context.Context, key string, to io.Writer) error {
	r, err := w.c.store.Get(ctx, key)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }() // it was read
	from := &source{r: r}
	dec, err := zstd.NewReader(from, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
	if err != nil {
		return fmt.Errorf("get %s: %w", key, err)
	}
	defer dec.Close()
	sink := &sink{w: to}
	_, err = io.Copy(sink, dec)
	switch {
	case err == nil:
		return nil
	case from.err != nil: // the store's, not the content's
		return fmt.Errorf("get %s: %w", key, from.err)
	case sink.err != nil:
		if errors.Is(sink.err, backup.ErrDamage) {
			return backup.Hint(fmt.Errorf("%s: %w", key, sink.err), hintWAL)
		}
		return fmt.Errorf("get %s: %w", key, sink.err)
	}
	return backup.Hint(fmt.Errorf("%s: %w: %w", key, backup.ErrDamage, err), hintWAL)
}

// source and sink remember whose error ended a copy.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

type sink struct {
	w   io.Writer
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.err = err
	return n, err
}

// proof passes a segment on once its header has proved it.
type proof struct {
	file   wal.File
	system wal.System
	to     io.Writer
	head   []byte
	header wal.Header
	size   int64
}

func (p *proof) Write(b []byte) (int, error) {
	n := len(b)
	p.size += int64(n)
	if p.header.Major == 0 {
		p.head = append(p.head, b...)
		if len(p.head) < wal.HeaderSize {
			return n, nil
		}
		h, err := wal.ParseHeader(p.head)
		if err == nil {
			err = h.Proves(p.file, p.system)
		}
		if err != nil {
			return 0, err
		}
		p.header, b, p.head = h, p.head, nil
	}
	if p.size > int64(p.header.System.SegmentSize) {
		return 0, p.whole()
	}
	if _, err := p.to.Write(b); err != nil {
		return 0, err
	}
	return n, nil
}

// whole demands that all of the segment has come.
func (p *proof) whole() error {
	if p.header.Major == 0 {
		return fmt.Errorf("%w: %d bytes are no segment", backup.ErrDamage, p.size)
	}
	if want := int64(p.header.System.SegmentSize); p.size != want {
		return fmt.Errorf("%w: a segment of %d bytes instead of %d", backup.ErrDamage, p.size, want)
	}
	return nil
}

// History reads where timeline t comes from; timeline 1 has no file and no
// ancestors. The errors of Get.
func (w WAL) History(ctx context.Context, t wal.Timeline) (wal.History, error) {
	if t == 1 {
		return wal.History{Timeline: 1}, nil
	}
	var b bytes.Buffer
	if err := w.Get(ctx, wal.HistoryOf(t), wal.System{}, &b); err != nil {
		return wal.History{}, err
	}
	return wal.ParseHistory(t, b.Bytes())
}

// List returns the files that are there, by timeline and position. What has no
// name of a WAL file does not count.
func (w WAL) List(ctx context.Context) ([]wal.Stored, error) {
	folder, err := w.folder()
	if err != nil {
		return nil, err
	}
	objects, err := w.c.store.List(ctx, folder)
	if err != nil {
		return nil, err
	}
	var out []wal.Stored
	for _, o := range objects {
		name, ok := strings.CutSuffix(o.Key[strings.LastIndexByte(o.Key, '/')+1:], ".zst")
		f, err := wal.ParseFile(name)
		if key, _ := w.key(f); ok && err == nil && key == o.Key {
			out = append(out, wal.Stored{File: f, Size: o.Size, Stored: o.Modified})
		}
	}
	return out, nil
}

// Behind returns the next segment of f's timeline that is there, up to 4 GiB
// of WAL behind it at least; backup.ErrNotFound: there is none.
func (w WAL) Behind(ctx context.Context, f wal.File) (wal.File, error) {
	own, err := w.key(f)
	if err != nil {
		return wal.File{}, err
	}
	folder := own[:strings.LastIndexByte(own, '/')+1]
	for _, high := range []uint32{f.High, f.High + 1} {
		objects, err := w.c.store.List(ctx, fmt.Sprintf("%s%s%08X", folder, f.Timeline, high))
		if err != nil {
			return wal.File{}, err
		}
		for _, o := range objects {
			g, err := wal.ParseFile(strings.TrimSuffix(strings.TrimPrefix(o.Key, folder), ".zst"))
			if err == nil && g.Kind == wal.Whole && o.Key > own {
				return g, nil
			}
		}
	}
	return wal.File{}, fmt.Errorf("WAL behind %s: %w", f, backup.ErrNotFound)
}

// Delete removes one file; nil if it is not there.
func (w WAL) Delete(ctx context.Context, f wal.File) error {
	key, err := w.key(f)
	if err != nil {
		return err
	}
	return w.c.store.Delete(ctx, key)
}
