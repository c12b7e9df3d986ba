package catalog_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/wal"
)

const mega = 1 << 20

// segment makes the bytes of a segment of 1 MiB.
func segment(f wal.File, system uint64, seed uint64) []byte {
	b := make([]byte, mega)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := wal.HeaderSize; i < len(b)/2; i += 8 { // the second half stays zero, as after pg_switch_wal
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	le := binary.LittleEndian
	le.PutUint16(b, 0xD110)
	le.PutUint16(b[2:], 2)
	le.PutUint32(b[4:], uint32(f.Timeline))
	le.PutUint64(b[8:], uint64(f.Low)*mega)
	le.PutUint64(b[24:], system)
	le.PutUint32(b[32:], mega)
	le.PutUint32(b[36:], 8192)
	return b
}

func walFile(t testing.TB, name string) wal.File {
	t.Helper()
	f, err := wal.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func keep(t testing.TB, w catalog.WAL, f wal.File, content []byte) error {
	t.Helper()
	return w.Put(t.Context(), f, bytes.NewReader(content), int64(len(content)))
}

func TestWALIsKeptOnceAndProvedOnReading(t *testing.T) {
	dir := t.TempDir()
	c := catalog.New(catalog.NewDir(dir), "main")
	ours := wal.System{Identifier: 7, SegmentSize: mega}
	for folder, w := range map[string]catalog.WAL{"clusters/main/wal/00000001": c.WAL(), "clusters/main/backups/" + string(id) + "/wal": c.BackupWAL(id)} {
		f := walFile(t, "000000010000000000000005")
		content := segment(f, 7, 1)
		get := func(system wal.System) ([]byte, error) {
			var b bytes.Buffer
			err := w.Get(t.Context(), f, system, &b)
			return b.Bytes(), err
		}
		if _, err := get(ours); !errors.Is(err, backup.ErrNotFound) {
			t.Errorf("before: got %v", err)
		}
		for range 2 {
			if err := keep(t, w, f, content); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := get(ours); err != nil || !bytes.Equal(got, content) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		if _, err := get(wal.System{Identifier: 8, SegmentSize: mega}); !errors.Is(err, backup.ErrNotOurs) {
			t.Errorf("for another system: got %v", err)
		}
		other := slices.Clone(content)
		other[mega-1] = 1
		for _, b := range [][]byte{other, content[:mega-1], append(slices.Clone(content), 0), nil} {
			if err := keep(t, w, f, b); !errors.Is(err, backup.ErrExists) || backup.HintOf(err) == "" {
				t.Errorf("other content of %d bytes: got %v", len(b), err)
			}
		}
		if got, err := get(ours); err != nil || !bytes.Equal(got, content) {
			t.Errorf("after all that: got %d bytes, %v", len(got), err)
		}
		path := filepath.Join(dir, filepath.FromSlash(folder), f.String()+".zst")
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for n, bad := range map[string][]byte{"empty": nil, "cut short": whole[:len(whole)/2], "without its last byte": whole[:len(whole)-1], "no zstd": []byte("rubbish rubbish")} {
			replace(t, path, bad)
			if _, err := get(ours); !errors.Is(err, backup.ErrDamage) {
				t.Errorf("%s: got %v", n, err)
			}
			if err := keep(t, w, f, content); !errors.Is(err, backup.ErrDamage) && !errors.Is(err, backup.ErrExists) {
				t.Errorf("put over what is %s: got %v", n, err)
			}
		}
		for i := 0; i < len(whole); i += 20011 {
			bad := slices.Clone(whole)
			bad[i] ^= 0x10
			replace(t, path, bad)
			if got, err := get(ours); err == nil && !bytes.Equal(got, content) {
				t.Errorf("a flipped bit in byte %d of %d is not seen", i, len(whole))
			} else if err != nil && !errors.Is(err, backup.ErrDamage) && !errors.Is(err, backup.ErrNotOurs) {
				t.Errorf("a flipped bit in byte %d: got %v", i, err)
			}
		}
		replace(t, path, whole)
		if err := w.Delete(t.Context(), f); err != nil {
			t.Error(err)
		}
		if err := w.Delete(t.Context(), f); err != nil {
			t.Errorf("again: %v", err)
		}
	}
}

func replace(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheNameOfASegmentIsProved(t *testing.T) {
	w := catalog.New(catalog.NewDir(t.TempDir()), "main").WAL()
	five, six := walFile(t, "000000010000000000000005"), walFile(t, "000000010000000000000006")
	for what, content := range map[string][]byte{"another segment": segment(five, 7, 1), "half of it": segment(six, 7, 1)[:mega/2], "more": append(segment(six, 7, 1), 0)} {
		if err := keep(t, w, six, content); err != nil {
			t.Fatal(err)
		}
		if err := w.Get(t.Context(), six, wal.System{}, io.Discard); !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%s: got %v", what, err)
		}
		if err := w.Delete(t.Context(), six); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWALOfTwoSystemsIsNotMixed(t *testing.T) {
	w := catalog.New(catalog.NewDir(t.TempDir()), "main").WAL()
	if _, err := w.System(t.Context()); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("before: got %v", err)
	}
	for range 2 {
		if err := w.Claim(t.Context(), wal.System{Identifier: 7, SegmentSize: mega}); err != nil {
			t.Fatal(err)
		}
	}
	for _, other := range []wal.System{{Identifier: 8, SegmentSize: mega}, {Identifier: 7, SegmentSize: 2 * mega}} {
		if err := w.Claim(t.Context(), other); !errors.Is(err, backup.ErrNotOurs) || backup.HintOf(err) == "" {
			t.Errorf("%+v: got %v", other, err)
		}
	}
}

func TestWALIsListedByTimeline(t *testing.T) {
	dir := t.TempDir()
	w := catalog.New(catalog.NewDir(dir), "main").WAL()
	names := []string{"000000010000000000000005.00000028.backup", "000000010000000000000005", "000000010000000000000006.partial", "000000010000000000000006", "00000002.history", "000000020000000000000006"}
	for _, n := range slices.Backward(names) {
		content := []byte("1\t0/680000\tno recovery target specified\n")
		if f := walFile(t, n); f.Kind == wal.Whole || f.Kind == wal.Partial {
			content = segment(f, 7, 1)
		}
		if err := keep(t, w, walFile(t, n), content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Claim(t.Context(), wal.System{Identifier: 7, SegmentSize: mega}); err != nil {
		t.Fatal(err)
	}
	replace(t, filepath.Join(dir, "clusters/main/wal/00000002/000000030000000000000001.zst"), nil) // in a folder that is not its own
	replace(t, filepath.Join(dir, "clusters/main/wal/00000002/README"), nil)
	list, err := w.List(t.Context())
	var got []string
	for _, s := range list {
		got = append(got, s.File.String())
	}
	if err != nil || !slices.Equal(got, names) {
		t.Errorf("got %v, %v, want %v", got, err, names)
	}
	h, err := w.History(t.Context(), 2)
	if err != nil || h.Holder(0x67FFFF) != 1 || h.Holder(0x680000) != 2 {
		t.Errorf("history: got %+v, %v", h, err)
	}
	if h, err := w.History(t.Context(), 1); err != nil || len(h.Forks) != 0 {
		t.Errorf("timeline 1 needs no file: got %+v, %v", h, err)
	}
	if _, err := w.History(t.Context(), 3); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("no history: got %v", err)
	}
}
