package load_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"cleancut/internal/load"
)

// listing is every path below dir with its size.
func listing(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			out[path] = info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFilesComeAndGoInTheirFoldersAndStayFew(t *testing.T) {
	dir := t.TempDir()
	o := load.FilesOptions{Folders: []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}, PerSecond: 1_000_000, Keep: 40}
	l, err := load.Start(t.Context(), nil, load.Which{Files: &o})
	if err != nil {
		t.Fatal(err)
	}
	err = l.Files.Await(t.Context(), 3000)
	s, stopped := l.Stop()
	if err := errors.Join(err, stopped); err != nil {
		t.Fatal(err)
	}
	if s.FileOperations < 3000 || l.Files.Sent() != l.Files.Count() {
		t.Errorf("%d operations of %d begun", s.FileOperations, l.Files.Sent())
	}
	found := listing(t, dir)
	if len(found) < 20 || len(found) > 2*41 {
		t.Errorf("%d files: want more than a few, and no more than are to be kept", len(found))
	}
	for path, size := range found {
		if size == 0 || size > 24<<10 {
			t.Errorf("%s has %d bytes", path, size)
		}
	}
	for _, folder := range o.Folders {
		entries, err := os.ReadDir(folder)
		if err != nil || len(entries) < 2 || len(entries) > 42 {
			t.Errorf("%s: %d folders (%v): want some, and the empty ones gone", folder, len(entries), err)
		}
	}
	if _, err := load.Start(t.Context(), nil, load.Which{Files: &o}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v, want a refusal of folders that exist", err)
	}
}

func TestFilesThatCannotBeWrittenEndTheLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a")
	l, err := load.Start(t.Context(), nil, load.Which{Files: &load.FilesOptions{Folders: []string{dir}, PerSecond: 1_000_000}})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Files.Await(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+" elsewhere"); err != nil {
		t.Fatal(err)
	}
	<-l.Files.Done()
	if _, err := l.Stop(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want the file that is not there", err)
	}
}
