package local_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/provider/local"
)

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSidecarsOfEveryVersionAreRead(t *testing.T) {
	if v, err := local.DecodeVolume(golden(t, "volume-v1.json")); err != nil || v.Size != 8192 || !v.Ready {
		t.Errorf("got %+v, %v", v, err)
	}
	if s, err := local.DecodeSnapshot(golden(t, "snapshot-v1.json")); err != nil || s.Size != 4096 || s.State != "completed" {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestASidecarOfANewerProgramIsNamedAsSuch(t *testing.T) {
	_, err := local.DecodeVolume([]byte(`{"version": 2, "colour": "blue"}`))
	if !errors.Is(err, backup.ErrUnsupported) || backup.HintOf(err) == "" {
		t.Errorf("got %v, hint %q", err, backup.HintOf(err))
	}
}

func TestWhatDoesNotHoldTogetherIsRefused(t *testing.T) {
	volume, snapshot := golden(t, "volume-v1.json"), golden(t, "snapshot-v1.json")
	for sentence, change := range map[string][2]string{
		"cut short":                     {"}\n}", ""},
		"something after it":            {"}\n}", "}\n}{}"},
		"unknown key":                   {`"id"`, `"idea"`},
		"no version":                    {`"version": 1`, `"version": 0`},
		"an id that leads elsewhere":    {"vol-0123456789abcdef0", "../../etc/passwd"},
		"another id that leads further": {"snap-0123456789abcdef0", "snap-0123456789abcdef0/.."},
		"a size that is no multiple":    {`"size": `, `"size": 1`},
		"a negative size":               {`"size": `, `"size": -`},
	} {
		if got := bytes.ReplaceAll(volume, []byte(change[0]), []byte(change[1])); !bytes.Equal(got, volume) {
			if v, err := local.DecodeVolume(got); err == nil {
				t.Errorf("%s: volume %+v", sentence, v)
			}
		}
		if got := bytes.ReplaceAll(snapshot, []byte(change[0]), []byte(change[1])); !bytes.Equal(got, snapshot) {
			if s, err := local.DecodeSnapshot(got); err == nil {
				t.Errorf("%s: snapshot %+v", sentence, s)
			}
		}
	}
}

func FuzzSidecars(f *testing.F) {
	f.Add(golden(f, "volume-v1.json"))
	f.Add(golden(f, "snapshot-v1.json"))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := local.DecodeVolume(b); err == nil {
			text, err := local.Encode(v)
			if err != nil {
				t.Fatalf("%+v: %v", v, err)
			}
			if again, err := local.DecodeVolume(text); err != nil || again.ID != v.ID || again.Size != v.Size {
				t.Errorf("%s: read back as %+v, %v", text, again, err)
			}
		}
		if s, err := local.DecodeSnapshot(b); err == nil {
			text, err := local.Encode(s)
			if err != nil {
				t.Fatalf("%+v: %v", s, err)
			}
			if again, err := local.DecodeSnapshot(text); err != nil || again.ID != s.ID || again.State != s.State {
				t.Errorf("%s: read back as %+v, %v", text, again, err)
			}
		}
	})
}
