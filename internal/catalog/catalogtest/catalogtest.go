// Package catalogtest checks that a store fulfils the contract written at
// catalog.Store.
//
//	open → put, get, list, delete, in every order and at the same time → t
//
// What always holds: it uses nothing but the interface.
package catalogtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
)

// Run checks the store that open returns: a new and empty one at every call,
// which open removes by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) catalog.Store) {
	for name, test := range map[string]func(*testing.T, catalog.Store){
		"what was put is got, listed and deleted":                        lifeOfAnObject,
		"a key that is taken is refused and what is there stays":         taken,
		"of many puts at the same time exactly one wins":                 race,
		"a reader that fails leaves nothing under the key":               brokenReader,
		"a context that ends in the middle of a put leaves nothing":      cancelledPut,
		"a context that is done is refused by every method":              deadContext,
		"an object that is being written is invisible":                   unfinished,
		"a context that ends while an object is read ends the reading":   cancelledGet,
		"a list is sorted, takes any prefix and stops at its border":     listing,
		"a malformed key is refused by every method and touches nothing": malformed,
		"what is missing is not found, and deleting it is no error":      missing,
		"a deleted key can be put again":                                 reborn,
		"puts and deletes beside each other disturb nobody":              neighbours,
		"a large object comes back byte for byte":                        large,
		"an empty object is an object":                                   empty,
		"an object of any size around that of a part comes back":         sizes,
		"of large puts at the same time exactly one wins":                largeRace,
		"a large put where something is leaves it":                       largeTaken,
		"a reader that breaks late leaves nothing":                       lateBreak,
		"a reader cut short is no end":                                   shortReader,
		"a context that ends late in a large put leaves nothing":         lateCancel,
		"a get under way survives the object's deletion or fails":        deletedGet,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

// Part is the size of a part that a store should have while it is tested, if
// it sends large objects in parts: several of them are put and held in memory.
func Part() int {
	if testing.Short() {
		return 100 << 10
	}
	return 8 << 20
}

func lifeOfAnObject(t *testing.T, s catalog.Store) {
	before := time.Now().Add(-time.Hour) // the store's clock may differ a little
	put(t, s, "a/b/c.json", "content")
	if got := get(t, s, "a/b/c.json"); got != "content" {
		t.Errorf("got %q, want %q", got, "content")
	}
	objects, err := s.List(t.Context(), "")
	if err != nil || len(objects) != 1 || objects[0].Key != "a/b/c.json" || objects[0].Size != 7 {
		t.Fatalf("list: got %v, %v, want a/b/c.json of 7 bytes", objects, err)
	}
	if m := objects[0].Modified; m.Before(before) || m.After(before.Add(2*time.Hour)) {
		t.Errorf("modified: got %v, want about now", m)
	}
	if err := s.Delete(t.Context(), "a/b/c.json"); err != nil {
		t.Fatal(err)
	}
	absent(t, s, "a/b/c.json")
}

func taken(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", "first")
	err := s.Put(t.Context(), "a/k", strings.NewReader("second, and longer"))
	if !errors.Is(err, backup.ErrExists) {
		t.Errorf("got %v, want %v", err, backup.ErrExists)
	}
	if got := get(t, s, "a/k"); got != "first" {
		t.Errorf("got %q, want %q", got, "first")
	}
	want(t, s, "", "a/k")
}

func race(t *testing.T, s catalog.Store) {
	const n = 16
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = s.Put(t.Context(), "race/k", strings.NewReader(strings.Repeat(fmt.Sprintf("%04d", i), 10000)))
		})
	}
	close(start)
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("both %d and %d won", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, backup.ErrExists):
			t.Errorf("loser %d: got %v, want %v", i, err, backup.ErrExists)
		}
	}
	if got, want := get(t, s, "race/k"), strings.Repeat(fmt.Sprintf("%04d", winner), 10000); got != want {
		t.Errorf("the object is not the winner's (%d): %.20q of %d bytes", winner, got, len(got))
	}
	want(t, s, "", "race/k")
}

func brokenReader(t *testing.T, s catalog.Store) {
	broken := errors.New("the pipe broke")
	r := io.MultiReader(bytes.NewReader(make([]byte, 100_000)), failing{broken})
	if err := s.Put(t.Context(), "a/k", r); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
	absent(t, s, "a/k")
	put(t, s, "a/k", "whole")
}

func cancelledPut(t *testing.T, s catalog.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	endless := reads(func(p []byte) (int, error) {
		cancel()
		return len(p), nil
	})
	if err := s.Put(ctx, "a/k", endless); !errors.Is(err, context.Canceled) {
		t.Errorf("endless reader: got %v, want %v", err, context.Canceled)
	}
	absent(t, s, "a/k")

	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	last := reads(func(p []byte) (int, error) {
		cancel()
		return copy(p, "all of it"), io.EOF
	})
	if err := s.Put(ctx, "a/l", last); !errors.Is(err, context.Canceled) {
		t.Errorf("with the last byte: got %v, want %v", err, context.Canceled)
	}
	absent(t, s, "a/l")
}

func deadContext(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", "content")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, errGet := s.Get(ctx, "a/k")
	_, errList := s.List(ctx, "")
	for method, err := range map[string]error{
		"put": s.Put(ctx, "a/l", strings.NewReader("x")), "get": errGet, "list": errList, "delete": s.Delete(ctx, "a/k"),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want %v", method, err, context.Canceled)
		}
	}
	want(t, s, "", "a/k")
}

func unfinished(t *testing.T, s catalog.Store) {
	put(t, s, "a/j", "so that the store is there")
	r, w := io.Pipe()
	done := make(chan error)
	go func() { done <- s.Put(t.Context(), "a/k", r) }()
	if _, err := w.Write(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "a/k"); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("get in the middle: got %v, want %v", err, backup.ErrNotFound)
	}
	want(t, s, "", "a/j")
	_ = w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := len(get(t, s, "a/k")); got != 100_000 {
		t.Errorf("got %d bytes, want %d", got, 100_000)
	}
}

func cancelledGet(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", strings.Repeat("x", 1<<20))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := s.Get(ctx, "a/k")
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, r)
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if n, err := io.Copy(io.Discard, r); !errors.Is(err, context.Canceled) {
		t.Errorf("got %d bytes and %v, want %v", n, err, context.Canceled)
	}
}

func listing(t *testing.T, s catalog.Store) {
	keys := []string{"a-b/x", "a/b/c", "a/b-c", "a/b.c", "a/b/d/e", "ab", "a/ü", "b/lost+found"}
	for _, k := range keys {
		put(t, s, k, k)
	}
	slices.Sort(keys)
	for _, prefix := range []string{"", "a", "a/", "a/b", "a/b/", "a/b/c", "a/b/c/", "a-", "b", "c", "c/d/", "a/b/d/e/f", "ab/"} {
		var match []string
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				match = append(match, k)
			}
		}
		want(t, s, prefix, match...)
	}
}

func malformed(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", "content")
	keys := []string{
		"", "/", "/a/k", "a//k", "a/k/", "..", "../k", "a/../a/k", "a/..", ".", "./a/k", "a/./k", "a/.hidden",
		"a/k\n", "a\x00k", "a/\x7f", "a/\xff", "a/\u0085", strings.Repeat("x", 256), strings.Repeat("x/", 600) + "x",
	}
	for _, key := range keys {
		_, errGet := s.Get(t.Context(), key)
		for method, err := range map[string]error{
			"put": s.Put(t.Context(), key, strings.NewReader("x")), "get": errGet, "delete": s.Delete(t.Context(), key),
		} {
			if !errors.Is(err, backup.ErrUsage) {
				t.Errorf("%s %q: got %v, want %v", method, key, err, backup.ErrUsage)
			}
		}
	}
	for _, prefix := range []string{"/", "/a", "../", "a//", "a/../", "a\n"} {
		if got, err := s.List(t.Context(), prefix); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("list %q: got %v, %v, want %v", prefix, got, err, backup.ErrUsage)
		}
	}
	want(t, s, "", "a/k")
}

func missing(t *testing.T, s catalog.Store) {
	put(t, s, "a/b/c", "content")
	for _, key := range []string{"x", "x/y", "a/b/d", "a", "a/b"} {
		if _, err := s.Get(t.Context(), key); !errors.Is(err, backup.ErrNotFound) {
			t.Errorf("get %s: got %v, want %v", key, err, backup.ErrNotFound)
		}
		if err := s.Delete(t.Context(), key); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	want(t, s, "", "a/b/c")
}

func reborn(t *testing.T, s catalog.Store) {
	for _, content := range []string{"one", "two", "three"} {
		put(t, s, "a/b/c/d", content)
		if got := get(t, s, "a/b/c/d"); got != content {
			t.Errorf("got %q, want %q", got, content)
		}
		for range 2 {
			if err := s.Delete(t.Context(), "a/b/c/d"); err != nil {
				t.Fatal(err)
			}
		}
		want(t, s, "")
	}
}

func neighbours(t *testing.T, s catalog.Store) {
	put(t, s, "stays", "content")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			key := fmt.Sprintf("folder/shared/%d", i)
			for range 25 {
				if err := s.Put(t.Context(), key, strings.NewReader(key)); err != nil {
					t.Errorf("put: %v", err)
				}
				objects, err := s.List(t.Context(), key)
				if err != nil || len(objects) != 1 {
					t.Errorf("list %s: got %v, %v", key, objects, err)
				}
				if err := s.Delete(t.Context(), key); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
		})
	}
	wg.Wait()
	want(t, s, "", "stays")
}

func large(t *testing.T, s catalog.Store) {
	content := make([]byte, 9*Part()/8+17)
	for i := range content {
		content[i] = byte(i * i >> 8)
	}
	// Short reads, as a pipe gives them.
	if err := s.Put(t.Context(), "a/k", &chunked{content}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, "a/k"); got != string(content) {
		t.Errorf("got %d other bytes, want %d", len(got), len(content))
	}
}

func empty(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", "")
	if got := get(t, s, "a/k"); got != "" {
		t.Errorf("got %q, want nothing", got)
	}
	want(t, s, "", "a/k")
}

// A store that sends objects in parts has its own code at these sizes.
func sizes(t *testing.T, s catalog.Store) {
	for _, size := range []int{1, 64<<10 - 1, 64 << 10, 64<<10 + 1, Part() - 1, Part(), Part() + 1, 2 * Part(), 2*Part() + 1, 3*Part() + 3} {
		key := fmt.Sprintf("sizes/%d", size)
		sent, got := sha256.New(), sha256.New()
		if err := s.Put(t.Context(), key, io.TeeReader(noise(size), sent)); err != nil {
			t.Fatalf("put %d bytes: %v", size, err)
		}
		r, err := s.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(got, r)
		if err := errors.Join(err, r.Close()); err != nil || n != int64(size) || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
			t.Errorf("%d bytes: got %d other bytes, %v", size, n, err)
		}
		objects, err := s.List(t.Context(), key)
		if err != nil || len(objects) == 0 || objects[0].Size != backup.Bytes(size) {
			t.Errorf("list %s: got %v, %v", key, objects, err)
		}
	}
}

func largeRace(t *testing.T, s catalog.Store) {
	const n = 4
	size := Part() + Part()/8
	errs := make([]error, n)
	var wg sync.WaitGroup
	var read sync.WaitGroup // all are in the middle before any can end
	read.Add(n)
	for i := range n {
		wg.Go(func() {
			half := io.LimitReader(letter('a'+i), int64(size)/2)
			meet := reads(func([]byte) (int, error) {
				read.Done()
				read.Wait()
				return 0, io.EOF
			})
			errs[i] = s.Put(t.Context(), "race/k", io.MultiReader(half, meet, io.LimitReader(letter('a'+i), int64(size)/2)))
		})
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("both %d and %d won", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, backup.ErrExists):
			t.Errorf("loser %d: got %v, want %v", i, err, backup.ErrExists)
		}
	}
	if got, want := get(t, s, "race/k"), strings.Repeat(string(rune('a'+winner)), size); got != want {
		t.Errorf("the object is not the winner's (%d): %.20q of %d bytes", winner, got, len(got))
	}
	want(t, s, "", "race/k")
}

func largeTaken(t *testing.T, s catalog.Store) {
	put(t, s, "a/k", "first")
	if err := s.Put(t.Context(), "a/k", io.LimitReader(letter('x'), 5*int64(Part())/2)); !errors.Is(err, backup.ErrExists) {
		t.Errorf("got %v, want %v", err, backup.ErrExists)
	}
	if got := get(t, s, "a/k"); got != "first" {
		t.Errorf("got %.20q, want %q", got, "first")
	}
}

func lateBreak(t *testing.T, s catalog.Store) {
	broken := errors.New("the pipe broke")
	for _, size := range []int{Part() - 1, Part(), 5 * Part() / 2} {
		if err := s.Put(t.Context(), "a/k", io.MultiReader(io.LimitReader(letter('x'), int64(size)), failing{broken})); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: got %v, want %v", size, err, broken)
		}
		absent(t, s, "a/k")
	}
	put(t, s, "a/k", "whole")
}

// io.ReadFull says the same of a good end and of a source that was cut short.
func shortReader(t *testing.T, s catalog.Store) {
	for _, size := range []int{0, 10, 9 * Part() / 8} {
		err := s.Put(t.Context(), "a/k", io.MultiReader(io.LimitReader(letter('x'), int64(size)), failing{io.ErrUnexpectedEOF}))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d bytes: got %v, want %v", size, err, io.ErrUnexpectedEOF)
		}
		absent(t, s, "a/k")
	}
}

func lateCancel(t *testing.T, s catalog.Store) {
	for _, size := range []int{Part(), 5 * Part() / 2} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		last := reads(func(p []byte) (int, error) {
			cancel()
			return copy(p, "and this"), io.EOF
		})
		if err := s.Put(ctx, "a/k", io.MultiReader(io.LimitReader(letter('x'), int64(size)), last)); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d bytes: got %v, want %v", size, err, context.Canceled)
		}
		absent(t, s, "a/k")
	}
	put(t, s, "a/k", "whole")
}

func deletedGet(t *testing.T, s catalog.Store) {
	size := 5 * Part() / 2
	if err := s.Put(t.Context(), "a/k", io.LimitReader(letter('x'), int64(size))); err != nil {
		t.Fatal(err)
	}
	r, err := s.Get(t.Context(), "a/k")
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, r)
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), "a/k"); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); err == nil && n != int64(size)-10 {
		t.Errorf("got %d bytes and no error, want %d", n, size-10)
	}
}

func put(t *testing.T, s catalog.Store, key, content string) {
	t.Helper()
	if err := s.Put(t.Context(), key, strings.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s catalog.Store, key string) string {
	t.Helper()
	r, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, r)
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func closed(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// absent demands that no method shows anything of key.
func absent(t *testing.T, s catalog.Store, key string) {
	t.Helper()
	if _, err := s.Get(t.Context(), key); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("get %s: got %v, want %v", key, err, backup.ErrNotFound)
	}
	want(t, s, key)
}

func want(t *testing.T, s catalog.Store, prefix string, keys ...string) {
	t.Helper()
	objects, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatalf("list %q: %v", prefix, err)
	}
	var got []string
	for _, o := range objects {
		got = append(got, o.Key)
	}
	if !slices.Equal(got, keys) {
		t.Errorf("list %q: got %q, want %q", prefix, got, keys)
	}
}

// letter is without end.
func letter(c int) io.Reader {
	return reads(func(p []byte) (int, error) {
		for i := range p {
			p[i] = byte(c)
		}
		return len(p), nil
	})
}

// noise is size bytes of which no two parts are alike.
func noise(size int) io.Reader {
	r := rand.NewChaCha8([32]byte{1})
	return io.LimitReader(r, int64(size))
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type reads func([]byte) (int, error)

func (r reads) Read(p []byte) (int, error) { return r(p) }

type chunked struct{ rest []byte }

func (c *chunked) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.rest[:min(len(c.rest), 4093)])
	c.rest = c.rest[n:]
	return n, nil
}
