package postgres

import (
	"errors"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

func FuzzTablespaceMap(f *testing.F) {
	for _, s := range []string{"", "16385 /data/fast\n", "1 /a\n4294967295 /with space/and\\\\backslash\n", "5 /new\\\nline\n", "x /a\n", "1\n", "1 /a", "-1 /a\n", "4294967296 /a\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		spaces, err := parseTablespaceMap([]byte(s), true)
		if err != nil {
			if !errors.Is(err, backup.ErrDamage) {
				t.Errorf("%q: got %v, want damage", s, err)
			}
			return
		}
		written := formatTablespaceMap(spaces, true)
		again, err := parseTablespaceMap([]byte(written), true)
		if err != nil || len(again) != len(spaces) {
			t.Fatalf("%q written as %q: got %v, %v", s, written, again, err)
		}
		for i := range spaces {
			if again[i] != spaces[i] {
				t.Errorf("%q written as %q: got %v, want %v", s, written, again, spaces)
			}
		}
	})
}

func TestTheMapGetsTheCopysPaths(t *testing.T) {
	c := &image{rootPath: t.TempDir(), plan: Plan{Server: backup.Server{VersionNum: 140000}, Map: func(original string) (string, bool) {
		rest, ok := strings.CutPrefix(original, "/srv/")
		return "/copy/" + rest, ok
	}}}
	got, err := c.relocateMap([]byte("16385 /srv/fast\n16386 /srv/a\\\\b\n"))
	if want := "16385 /copy/fast\n16386 /copy/a\\\\b\n"; err != nil || got != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	c.plan.Server.VersionNum = 130000 // writes a backslash as it is
	got, err = c.relocateMap([]byte("16386 /srv/a\\b\n16387 /srv/new\\\nline\n"))
	if want := "16386 /copy/a\\b\n16387 /copy/new\\\nline\n"; err != nil || got != want {
		t.Errorf("of 13: got %q, %v, want %q", got, err, want)
	}
	if got, err := c.relocateMap([]byte("16385 /elsewhere\n")); !errors.Is(err, backup.ErrUnsupported) {
		t.Errorf("got %q, %v for a path that no filesystem of the copy holds", got, err)
	}
	for _, damaged := range []string{"16385\n", "/srv/fast\n", "16385 /srv/fast"} {
		if got, err := c.relocateMap([]byte(damaged)); !errors.Is(err, backup.ErrDamage) {
			t.Errorf("%q: got %q, %v", damaged, got, err)
		}
	}
}
