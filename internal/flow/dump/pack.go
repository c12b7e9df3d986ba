package dump

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"

	"filippo.io/age"
	"github.com/cespare/xxhash/v2"
	"github.com/klauspost/compress/zstd"

	"cleancut/internal/backup"
)

// meter counts the bytes that pass, and hashes them.
type meter struct {
	w     io.Writer
	n     backup.Bytes
	sum   hash.Hash
	moved func(n int) // may be nil
}

func newMeter(w io.Writer, sum hash.Hash, moved func(int)) *meter {
	return &meter{w: w, sum: sum, moved: moved}
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.n += backup.Bytes(n)
	_, _ = m.sum.Write(p[:n])
	if m.moved != nil {
		m.moved(n)
	}
	return n, err
}

func (m *meter) digest() string { return hex.EncodeToString(m.sum.Sum(nil)) }

// window is the largest of zstd. With several encoders at once each has a
// smaller one, so that the memory of all stays bounded.
const window = 4 << 20

// windowOf is the window of each of so many encoders, a power of two.
func windowOf(jobs int) int {
	size := window
	for n := 1; n < jobs && size > 256<<10; n *= 2 {
		size /= 2
	}
	return size
}

// pack compresses what produce writes, and encrypts it where there are
// recipients, into w. Where produce fails nothing that was written is of use:
// no last frame follows.
func pack(w io.Writer, o Options, threads int, moved func(plain, stored int), produce func(io.Writer) error) (p backup.DumpPart, err error) {
	stored := newMeter(w, sha256.New(), func(n int) { moved(0, n) })
	var into io.Writer = stored
	finish := func() error { return nil }
	if len(o.Recipients) > 0 {
		sealed, err := age.Encrypt(stored, o.Recipients...)
		if err != nil {
			return p, fmt.Errorf("encrypt: %w", err)
		}
		into, finish = sealed, sealed.Close
	}
	z, err := zstd.NewWriter(into, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(o.Level)), zstd.WithEncoderConcurrency(threads), zstd.WithWindowSize(windowOf(o.Jobs)))
	if err != nil {
		return p, fmt.Errorf("zstd level %d: %w", o.Level, err)
	}
	plain := newMeter(z, xxhash.New(), func(n int) { moved(n, 0) })
	if err := produce(plain); err != nil {
		// Its goroutines end; what it writes thereby goes nowhere.
		z.Reset(io.Discard)
		return p, errors.Join(err, z.Close())
	}
	if err := errors.Join(z.Close(), finish()); err != nil {
		return p, fmt.Errorf("%w: %w", errStore, err)
	}
	return backup.DumpPart{Size: stored.n, SHA256: stored.digest(), PlainSize: plain.n, PlainHash: plain.digest()}, nil
}

// ext is how the names of parts end.
func ext(o Options) string {
	if len(o.Recipients) > 0 {
		return ".zst.age"
	}
	return ".zst"
}

// errSealed: no identity opens the part.
var errSealed = errors.New("no identity opens it")

// unpack gives what PostgreSQL's program wrote of a stored part to into, and
// proves both by the sizes and hashes of the manifest. An error of into is
// returned as it is; backup.ErrDamage: the bytes are not what was stored.
func unpack(r io.Reader, p backup.DumpPart, identities []age.Identity, into io.Writer) error {
	damage := func(format string, args ...any) error {
		return fmt.Errorf("part %s: %w: "+format, append([]any{p.Name, backup.ErrDamage}, args...)...)
	}
	stored := sha256.New()
	n := &counted{r: io.TeeReader(r, stored)}
	var source io.Reader = n
	if strings.HasSuffix(p.Name, ".age") {
		if len(identities) == 0 {
			return fmt.Errorf("part %s: %w", p.Name, errSealed)
		}
		opened, err := age.Decrypt(n, identities...)
		var none *age.NoIdentityMatchError
		if errors.As(err, &none) {
			return fmt.Errorf("part %s: %w", p.Name, errSealed)
		}
		if err != nil {
			return damage("%v", err)
		}
		source = opened
	}
	z, err := zstd.NewReader(source, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return damage("%v", err)
	}
	defer z.Close()
	plain := newMeter(into, xxhash.New(), nil)
	write := &failing{w: plain}
	if _, err := io.CopyBuffer(struct{ io.Writer }{write}, struct{ io.Reader }{z}, make([]byte, pipeSize)); err != nil {
		switch {
		case write.err != nil:
			return write.err
		case n.err != nil: // of the store, not of the bytes
			return fmt.Errorf("part %s: %w", p.Name, n.err)
		}
		return damage("%v", err)
	}
	if _, err := io.Copy(io.Discard, n); err != nil { // behind the last frame nothing may be
		return fmt.Errorf("part %s: %w", p.Name, err)
	}
	if sum := hex.EncodeToString(stored.Sum(nil)); n.n != p.Size || sum != p.SHA256 {
		return damage("%d bytes with SHA-256 %s are stored, the manifest says %d with %s", n.n, sum, p.Size, p.SHA256)
	}
	if plain.n != p.PlainSize || plain.digest() != p.PlainHash {
		return damage("unpacked it has %d bytes with XXH64 %s, the manifest says %d with %s", plain.n, plain.digest(), p.PlainSize, p.PlainHash)
	}
	return nil
}

// counted counts what is read and keeps the source's error.
type counted struct {
	r   io.Reader
	n   backup.Bytes
	err error
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += backup.Bytes(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

// failing keeps the error of a writer.
type failing struct {
	w   io.Writer
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		f.err = err
	}
	return n, err
}

// CheckStored reads a part through and compares it, as it is stored, with the
// manifest. backup.ErrDamage: it differs.
func CheckStored(ctx context.Context, p backup.DumpPart, open func(ctx context.Context, part string) (io.ReadCloser, error)) error {
	r, err := open(ctx, p.Name)
	if errors.Is(err, backup.ErrNotFound) {
		return fmt.Errorf("part %s: %w: %w", p.Name, backup.ErrDamage, err)
	}
	if err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.Copy(sum, r)
	if err := errors.Join(err, r.Close()); err != nil {
		return fmt.Errorf("part %s: %w", p.Name, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != p.SHA256 || backup.Bytes(n) != p.Size {
		return fmt.Errorf("part %s: %w: %d bytes with SHA-256 %s are stored, the manifest says %d with %s", p.Name, backup.ErrDamage, n, got, p.Size, p.SHA256)
	}
	return nil
}

// ParseRecipients reads age recipients: the words themselves and the lines of
// files. It also returns each as text, for the manifest.
func ParseRecipients(words, files []string) (out []age.Recipient, text []string, err error) {
	for _, w := range words {
		r, err := age.ParseX25519Recipient(w)
		if err != nil {
			return nil, nil, backup.Hint(fmt.Errorf("%w: recipient %q: %w", backup.ErrUsage, w, err), "age-keygen prints it: age1…")
		}
		out, text = append(out, r), append(text, r.String())
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: recipients: %w", backup.ErrUsage, err)
		}
		all, err := age.ParseRecipients(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, nil, fmt.Errorf("%w: recipients in %s: %w", backup.ErrUsage, name, err)
		}
		for _, r := range all {
			named, ok := r.(fmt.Stringer)
			if !ok {
				return nil, nil, fmt.Errorf("%w: a recipient in %s is of a kind without a name", backup.ErrUsage, name)
			}
			out, text = append(out, r), append(text, named.String())
		}
	}
	return out, text, nil
}

// ReadIdentities reads files as age-keygen writes them.
func ReadIdentities(files []string) (out []age.Identity, err error) {
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("%w: identity: %w", backup.ErrUsage, err)
		}
		all, err := age.ParseIdentities(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("%w: identities in %s: %w", backup.ErrUsage, name, err)
		}
		out = append(out, all...)
	}
	return out, nil
}
