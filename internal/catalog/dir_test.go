package catalog_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/catalog/catalogtest"
)

// TestMain is the program itself when a test runs the binary again as the
// child that gets killed.
func TestMain(m *testing.M) {
	switch root := os.Getenv("CATALOG_ROOT"); os.Getenv("CATALOG_CHILD") {
	case "":
		code := m.Run()
		if built.dir != "" {
			_ = os.RemoveAll(built.dir)
		}
		os.Exit(code)
	case "s3 put":
		putMuch()
	case "s3 get":
		getMuch()
	case "stall":
		stall(catalog.NewDir(root))
	case "stall by link":
		stall(catalog.NewDirByLink(root))
	case "full":
		full(catalog.NewDir(root))
	case "many":
		many(catalog.NewDir(root))
	}
}

func TestDirIsAStore(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, func(t *testing.T) catalog.Store { return catalog.NewDir(filepath.Join(t.TempDir(), "new", "catalog")) })
}

func TestDirWithoutRenameNoReplaceIsAStore(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, func(t *testing.T) catalog.Store { return catalog.NewDirByLink(t.TempDir()) })
}

func TestDirBehindASymbolicLinkIsAStore(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, func(t *testing.T) catalog.Store {
		link := filepath.Join(t.TempDir(), ".link")
		if err := os.Symlink(t.TempDir(), link); err != nil {
			t.Fatal(err)
		}
		return catalog.NewDir(link)
	})
}

func TestFilesAndFoldersAreTheOwnersOnly(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "catalog")
	put(t, catalog.NewDir(root), "x/y/z", "content")
	for path, want := range map[string]fs.FileMode{"": 0o700, "../": 0o700, "x": 0o700, "x/y": 0o700, "x/y/z": 0o600} {
		info, err := os.Stat(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%q: got %o, want %o", path, got, want)
		}
	}
}

func TestADirThatIsNotThereIsNeitherEmptyNorCleared(t *testing.T) {
	root := filepath.Join(t.TempDir(), "not-mounted")
	s := catalog.NewDir(root)
	_, errList := s.List(t.Context(), "clusters/")
	_, errTidy := s.Tidy(t.Context(), 0)
	for method, err := range map[string]error{"list": errList, "tidy": errTidy, "delete": s.Delete(t.Context(), "clusters/x")} {
		if !errors.Is(err, backup.ErrNotFound) || !strings.Contains(backup.HintOf(err), "mounted") {
			t.Errorf("%s: got %v (hint %q), want not found and a hint", method, err, backup.HintOf(err))
		}
	}
	if _, err := os.Stat(root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s was made: %v", root, err)
	}
}

func TestASymbolicLinkInsideIsAnErrorAndNotPassedOver(t *testing.T) {
	root := t.TempDir()
	s := catalog.NewDir(root)
	put(t, s, "a/k", "content")
	if err := os.Symlink("k", filepath.Join(root, "a", "l")); err != nil {
		t.Fatal(err)
	}
	if got, err := s.List(t.Context(), "a/"); !errors.Is(err, backup.ErrUnsupported) {
		t.Errorf("got %v, %v, want %v", got, err, backup.ErrUnsupported)
	}
}

func TestFoldersOfOtherProgramsAndForeignNamesAreInvisible(t *testing.T) {
	root := t.TempDir()
	s := catalog.NewDir(root)
	put(t, s, "a/k", "content")
	put(t, s, "b", "content")
	for _, path := range []string{".snapshot/hourly/a/k", "a/.nfs0001", "a/bad\nname"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := keys(t, s); got != "a/k b" {
		t.Errorf("got %q, want %q", got, "a/k b")
	}
}

func TestDeleteTakesTheEmptyFoldersWithItButNotTheRoot(t *testing.T) {
	root := t.TempDir()
	s := catalog.NewDir(root)
	put(t, s, "a/b/c/d", "content")
	put(t, s, "a/x", "content")
	for _, key := range []string{"a/b/c/d", "a/x"} {
		if err := s.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(root)
	if err != nil || len(entries) != 0 {
		t.Errorf("got %v, %v, want an empty root", entries, err)
	}
}

func TestAFailedPutLeavesNoFile(t *testing.T) {
	root := t.TempDir()
	s := catalog.NewDir(root)
	if err := s.Put(t.Context(), "a/k", io.MultiReader(strings.NewReader("x"), failing{})); !errors.Is(err, errPipe) {
		t.Errorf("got %v, want %v", err, errPipe)
	}
	put(t, s, "a/l", "content")
	if err := s.Put(t.Context(), "a/l", strings.NewReader("x")); !errors.Is(err, backup.ErrExists) {
		t.Errorf("got %v, want %v", err, backup.ErrExists)
	}
	if got := files(t, root); got != "a/l" {
		t.Errorf("got %q, want %q", got, "a/l")
	}
}

func TestAPutThatTheFilesystemCannotHoldLeavesNothing(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), "CATALOG_CHILD=full", "CATALOG_ROOT="+root)
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), unix.EFBIG.Error()) {
		t.Errorf("child: got %q, %v, want %q", out, err, unix.EFBIG)
	}
	if got := files(t, root); got != "" {
		t.Errorf("got %q, want no file", got)
	}
}

func TestAPutBelowAnotherObjectFailsAndHarmsNeither(t *testing.T) {
	root := t.TempDir()
	s := catalog.NewDir(root)
	put(t, s, "a", "content")
	if err := s.Put(t.Context(), "a/k", strings.NewReader("x")); err == nil || errors.Is(err, backup.ErrExists) {
		t.Errorf("got %v, want an error of the filesystem", err)
	}
	if got := files(t, root); got != "a" {
		t.Errorf("got %q, want %q", got, "a")
	}
}

func TestKillInTheMiddleOfAPutLeavesNothingUnderTheKey(t *testing.T) {
	for _, mode := range []string{"stall", "stall by link"} {
		t.Run(mode, func(t *testing.T) {
			root := t.TempDir()
			child := exec.CommandContext(t.Context(), os.Args[0])
			child.Env = append(os.Environ(), "CATALOG_CHILD="+mode, "CATALOG_ROOT="+root)
			out, err := child.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "written\n" {
				t.Errorf("child: got %q, %v, want written", line, err)
			}
			s := catalog.NewDir(root)
			if _, err := s.Get(t.Context(), "a/k"); !errors.Is(err, backup.ErrNotFound) {
				t.Errorf("before the kill: got %v, want %v", err, backup.ErrNotFound)
			}
			_ = child.Process.Kill()
			_ = child.Wait()

			if _, err := s.Get(t.Context(), "a/k"); !errors.Is(err, backup.ErrNotFound) {
				t.Errorf("get: got %v, want %v", err, backup.ErrNotFound)
			}
			if got := keys(t, s); got != "" {
				t.Errorf("list: got %q, want nothing", got)
			}
			if got := files(t, root); !strings.HasPrefix(got, "a/.put-") {
				t.Errorf("the child left %q, want one temporary file", got)
			}
			if n, err := s.Tidy(t.Context(), time.Hour); n != 0 || err != nil {
				t.Errorf("tidy of old files: got %d, %v, want none", n, err)
			}
			put(t, s, "a/k", "whole")
			if n, err := s.Tidy(t.Context(), 0); n != 1 || err != nil {
				t.Errorf("tidy: got %d, %v, want 1", n, err)
			}
			if got := files(t, root); got != "a/k" {
				t.Errorf("after tidy: got %q, want %q", got, "a/k")
			}
		})
	}
}

func TestKillAtAnyMomentLeavesOnlyWholeObjects(t *testing.T) {
	t.Parallel()
	seen := 0
	for range 8 {
		root := t.TempDir()
		child := exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), "CATALOG_CHILD=many", "CATALOG_ROOT="+root)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		// What the child said is put is put; how far it gets is chance.
		lines := bufio.NewScanner(out)
		promised := map[string]bool{}
		for range 1 + rand.IntN(10) {
			if !lines.Scan() {
				t.Fatal("the child ended by itself")
			}
			promised[lines.Text()] = true
		}
		_ = child.Process.Kill()
		for lines.Scan() {
			promised[lines.Text()] = true
		}
		_ = child.Wait()

		s := catalog.NewDir(root)
		objects, err := s.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			seen++
			sum := sha256.Sum256([]byte(get(t, s, o.Key)))
			if got := hex.EncodeToString(sum[:]); o.Key != "k/"+got {
				t.Errorf("%s is torn: %d bytes with digest %s", o.Key, o.Size, got)
			}
			delete(promised, o.Key)
		}
		for key := range promised {
			t.Errorf("%s was put and is gone", key)
		}
	}
	if seen == 0 {
		t.Error("no object was looked at")
	}
}

func TestTidySparesWhatIsBeingWritten(t *testing.T) {
	s := catalog.NewDir(t.TempDir())
	r, w := io.Pipe()
	done := make(chan error)
	go func() { done <- s.Put(t.Context(), "a/k", r) }()
	if _, err := io.WriteString(w, "content"); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Tidy(t.Context(), time.Hour); n != 0 || err != nil {
		t.Errorf("got %d, %v, want nothing removed", n, err)
	}
	_ = w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, "a/k"); got != "content" {
		t.Errorf("got %q, want %q", got, "content")
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	for _, location := range []string{dir, "file://" + dir, "file://localhost" + dir, dir + "/"} {
		s, err := catalog.Open(location)
		if err != nil {
			t.Errorf("%s: %v", location, err)
			continue
		}
		key := "k" + fmt.Sprint(len(location))
		put(t, s, key, "content")
		if got := get(t, catalog.NewDir(dir), key); got != "content" {
			t.Errorf("%s: got %q, want %q", location, got, "content")
		}
	}
	for location, want := range map[string]error{
		"s3://key:hidden@bucket": backup.ErrUsage, "s3:///prefix": backup.ErrUsage, "s3://bucket/../x": backup.ErrUsage, "s3://bucket/a//b": backup.ErrUsage,
		"s3://bucket/x?regoin=eu-central-1": backup.ErrUsage, "s3://bucket/x?path_style=yes": backup.ErrUsage, "s3://bucket/x?endpoint=localhost:9000": backup.ErrUsage,
		"s3://bucket/x?endpoint=https://u:hidden@h": backup.ErrUsage, "s3://bucket:80/x": backup.ErrUsage, "s3://bucket/x#y": backup.ErrUsage, "s3://bucket/x?%zz": backup.ErrUsage,
		"": backup.ErrUsage, "relative/path": backup.ErrUsage, "file:relative": backup.ErrUsage, "file://otherhost/path": backup.ErrUsage,
		"http://user:hidden@host/x": backup.ErrUsage, "file:///x?y=z": backup.ErrUsage, "ftp://user:hidden@host:x/%": backup.ErrUsage,
	} {
		s, err := catalog.Open(location)
		if s != nil || !errors.Is(err, want) || backup.HintOf(err) == "" {
			t.Errorf("%q: got %v, %v (hint %q), want %v with a hint", location, s, err, backup.HintOf(err), want)
		}
		if err != nil && strings.Contains(err.Error(), "hidden") {
			t.Errorf("%q: the error tells the password: %v", location, err)
		}
	}
	for _, location := range []string{"s3://bucket", "s3://bucket/", "s3://bucket/a/b/", "s3://b.u-c/p?region=eu-central-1&endpoint=https://10.0.0.1:9000&path_style=true"} {
		if s, err := catalog.Open(location); s == nil || err != nil {
			t.Errorf("%s: got %v, %v, want a store", location, s, err)
		}
	}
}

func FuzzCheckKey(f *testing.F) {
	for _, s := range []string{"a/b", "", "/", "..", "a/../b", "a//b", "ü/ö", "a\x00", "a/.b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if catalog.CheckKey(key) != nil {
			return
		}
		if path := filepath.Join("/root", key); path != "/root/"+key {
			t.Errorf("%q leads to %q", key, path)
		}
	})
}

// stall puts something whose end never comes.
func stall(s catalog.Store) {
	first := true
	err := s.Put(context.Background(), "a/k", reads(func(p []byte) (int, error) {
		if !first {
			fmt.Println("written")
			select {}
		}
		first = false
		return len(p), nil
	}))
	fmt.Println("not stalled:", err)
}

// full puts more than a file may hold, as if the filesystem were full.
func full(s catalog.Store) {
	signal.Ignore(unix.SIGXFSZ) // then write(2) answers EFBIG
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10_000, Max: 10_000}); err != nil {
		fmt.Println(err)
	}
	fmt.Println(s.Put(context.Background(), "a/k", bytes.NewReader(make([]byte, 100_000))))
}

// many puts objects named after their content until it is killed, and prints
// each name once it is durable.
func many(s catalog.Store) {
	for {
		content := bytes.Repeat([]byte{byte(rand.Int())}, rand.IntN(1<<20))
		content = fmt.Append(content, rand.Int())
		sum := sha256.Sum256(content)
		key := "k/" + hex.EncodeToString(sum[:])
		if err := s.Put(context.Background(), key, bytes.NewReader(content)); err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(key)
	}
}

var errPipe = errors.New("the pipe broke")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errPipe }

type reads func([]byte) (int, error)

func (r reads) Read(p []byte) (int, error) { return r(p) }

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
	b, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// keys returns all keys, with blanks between.
func keys(t *testing.T, s catalog.Store) string {
	t.Helper()
	objects, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, o := range objects {
		out = append(out, o.Key)
	}
	return strings.Join(out, " ")
}

// files returns every file there really is below root, with blanks between.
func files(t *testing.T, root string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			out = append(out, strings.TrimPrefix(path, root+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}
