package host_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
)

const fstab = "# /etc/fstab\nUUID=1 / ext4 defaults 0 1\n\n  \nUUID=2 /home xfs defaults 0 2\n"

func TestLinesOfTables(t *testing.T) {
	file := filepath.Join(t.TempDir(), "etc", "fstab")
	is := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("got %q and %v, want %q", got, err, want)
		}
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	ok(host.RemoveLine(file, "a"))
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("removing made the file: %v", err)
	}
	ok(host.AddLine(file, "a", "one"))
	is("# cleancut storage a\none\n# end of cleancut storage a\n")
	ok(host.RemoveLine(file, "a"))
	is("")

	ok(os.WriteFile(file, []byte(fstab), 0o640))
	ok(os.Chmod(file, 0o640))
	ok(host.AddLine(file, "a", "one"))
	ok(host.AddLine(file, "ab", "two"))
	ok(host.AddLine(file, "a", "three"))
	is(fstab + "# cleancut storage ab\ntwo\n# end of cleancut storage ab\n# cleancut storage a\nthree\n# end of cleancut storage a\n")
	ok(host.RemoveLine(file, "b"))
	ok(host.RemoveLine(file, "ab"))
	ok(host.RemoveLine(file, "a"))
	ok(host.RemoveLine(file, "a"))
	is(fstab)
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o640 {
		t.Errorf("mode: got %v and %v, want 0640", st.Mode(), err)
	}

	link := filepath.Join(filepath.Dir(file), "link")
	ok(os.Symlink("fstab", link))
	ok(host.AddLine(link, "a", "one"))
	if to, err := os.Readlink(link); err != nil || to != "fstab" {
		t.Errorf("the link became %q, %v", to, err)
	}
	is(fstab + "# cleancut storage a\none\n# end of cleancut storage a\n")

	// Whatever people did to our lines, theirs stay.
	for _, c := range []struct{ name, was, want string }{
		{"our line was deleted", "# cleancut storage a\n# end of cleancut storage a\nUUID=1 /\n", "UUID=1 /\n"},
		{"our line and its end were deleted", "# cleancut storage a\nUUID=1 /\n", "UUID=1 /\n"},
		{"our line was changed", "x\n# cleancut storage a\nchanged\n# end of cleancut storage a\ny\n", "x\ny\n"},
		{"lines were put in between", "# cleancut storage a\none\ntheirs\n# end of cleancut storage a\n", "one\ntheirs\n# end of cleancut storage a\n"},
		{"no newline at the end", "x", "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ok(os.WriteFile(file, []byte(c.was), 0o640))
			ok(host.RemoveLine(file, "a"))
			is(c.want)
		})
	}
	refusal(t, host.AddLine(file, "a", "one\ntwo"), backup.ErrUsage, "not one line")
	refusal(t, host.AddLine(file, "a\nb", "one"), backup.ErrUsage, "not one line")
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 2 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func FuzzLinesOfOthersStay(f *testing.F) {
	f.Add(fstab, "pg", "UUID=3 /srv xfs defaults 0 0")
	f.Add("no newline", "a b", "")
	f.Add("# cleancut storage x\nmine\n# end of cleancut storage x\n\n", "y", "# cleancut storage x")
	f.Add("\r\n\n\n", "", "#")
	f.Fuzz(func(t *testing.T, old, name, line string) {
		file := filepath.Join(t.TempDir(), "table")
		if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
		err := host.AddLine(file, name, line)
		if strings.ContainsAny(name+line, "\r\n") {
			if !errors.Is(err, backup.ErrUsage) {
				t.Fatalf("got %v, want ErrUsage", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		added, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(string(added), "\n"+line+"\n# end of cleancut storage "+name+"\n") {
			t.Fatalf("the line is missing at the end of %q", added)
		}
		if err := host.AddLine(file, name, line); err != nil {
			t.Fatal(err)
		}
		if again, err := os.ReadFile(file); err != nil || string(again) != string(added) {
			t.Fatalf("added twice: %q, once: %q (%v)", again, added, err)
		}
		if err := host.RemoveLine(file, name); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(old, "# cleancut storage "+name+"\n") || strings.HasSuffix(old, "# cleancut storage "+name) {
			return // there were lines of that name: they went, too
		}
		if got := strings.TrimSuffix(string(left), "\n"); got != strings.TrimSuffix(old, "\n") {
			t.Fatalf("got %q, want %q", left, old)
		}
	})
}

func TestAFstabLineIsReadBackAsItWasMeant(t *testing.T) {
	at := "/srv/a b\tc\\d#e"
	file := filepath.Join(t.TempDir(), "fstab")
	if err := host.AddLine(file, "x", host.FstabLine("1-2", at, "xfs", []string{"defaults", "nofail"})); err != nil {
		t.Fatal(err)
	}
	out, err := host.Run(t.Context(), "findmnt", "--tab-file", file, "--noheadings", "--raw", "--output", "SOURCE,FSTYPE,OPTIONS,TARGET")
	if want := `UUID=1-2 xfs defaults,nofail /srv/a\x20b\x09c\x5cd#e` + "\n"; err != nil || string(out) != want {
		t.Errorf("got %q, %v, want %q", out, err, want)
	}
}
