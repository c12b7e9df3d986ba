package backup_test

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

func aDump() backup.DumpManifest {
	last := int64(7)
	return backup.DumpManifest{Version: backup.DumpVersion, Name: "20261122T230000Z", Backup: "20261122T211704Z-5f3a9c", Cluster: "main", Format: backup.DumpPerDatabase, Archive: backup.ArchiveCustom,
		Parts: []backup.DumpPart{{Name: "globals.sql.zst", Size: 5}, {Name: "app.custom.zst", Database: "app", Size: 9}},
		Databases: []backup.DumpedDatabase{{Name: "app", Counted: true, Tables: []backup.DumpedTable{{Schema: "public", Name: "t", Columns: []string{"a"}, Rows: 3, Hash: "00"}},
			Sequences: []backup.DumpedSequence{{Schema: "public", Name: "s", Last: &last}}}, {Name: "broken", Error: "pg_dump: exit status 1", Tables: []backup.DumpedTable{}}}}
}

func TestADumpManifestThatDoesNotHoldTogetherIsRefused(t *testing.T) {
	if err := aDump().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*backup.DumpManifest){
		"no backup":              func(m *backup.DumpManifest) { m.Backup = "x" },
		"no cluster":             func(m *backup.DumpManifest) { m.Cluster = "" },
		"no format":              func(m *backup.DumpManifest) { m.Format = "tar" },
		"no archive":             func(m *backup.DumpManifest) { m.Archive = "" },
		"an archive of sql":      func(m *backup.DumpManifest) { m.Format = backup.DumpSQL },
		"a path for a part":      func(m *backup.DumpManifest) { m.Parts[1].Name = "../x" },
		"a part twice":           func(m *backup.DumpManifest) { m.Parts[1].Name = m.Parts[0].Name },
		"a part of no database":  func(m *backup.DumpManifest) { m.Parts[1].Database = "other" },
		"a database twice":       func(m *backup.DumpManifest) { m.Databases[1].Name = "app" },
		"a database without one": func(m *backup.DumpManifest) { m.Databases[1].Error = "" },
		"a failed one with one":  func(m *backup.DumpManifest) { m.Databases[0].Error = "x" },
	} {
		m := aDump()
		change(&m)
		if err := m.Validate(); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := backup.EncodeDumpManifest(m); err == nil {
			t.Errorf("%s: it is written", name)
		}
	}
	for text, want := range map[string]error{`{"version": 2}`: backup.ErrUnsupported, `{"version": 1, "unknown": 1}`: nil, `{}`: nil, `{"version": 1`: nil} {
		if _, err := backup.DecodeDumpManifest([]byte(text)); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if m := aDump(); m.Held() != "1 of 2 databases" || len(m.Failed()) != 1 {
		t.Errorf("it holds %s", m.Held())
	}
}

func TestTheResultOfADumpsCheckIsTheWorstOfItsChecks(t *testing.T) {
	for want, results := range map[backup.CheckResult][][]backup.CheckResult{
		backup.Passed:      {{backup.Passed, backup.Passed}},
		backup.CouldNotRun: {{}, {backup.CouldNotRun}, {backup.Passed, backup.CouldNotRun}},
		backup.Failed:      {{backup.Passed, backup.CouldNotRun, backup.Failed}},
	} {
		for _, all := range results {
			var k backup.DumpCheck
			for _, r := range all {
				k.Checks = append(k.Checks, backup.Check{Result: r})
			}
			if k.Result() != want {
				t.Errorf("%q: %s, want %s", all, k.Result(), want)
			}
		}
	}
}

func FuzzDecodeDumpManifest(f *testing.F) {
	b, err := backup.EncodeDumpManifest(aDump())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := backup.DecodeDumpManifest(b)
		if err != nil {
			return
		}
		once, err := backup.EncodeDumpManifest(m)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := backup.DecodeDumpManifest(once)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if twice, err := backup.EncodeDumpManifest(again); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("written twice: %v", err)
		}
	})
}

func TestEveryKeyOfADumpIsDescribed(t *testing.T) {
	doc, err := os.ReadFile("../../docs/dump.md")
	if err != nil {
		t.Fatal(err)
	}
	types := 0
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch {
		case typ.Kind() == reflect.Slice || typ.Kind() == reflect.Pointer:
			walk(typ.Elem())
		case typ.Kind() == reflect.Struct && strings.HasPrefix(typ.PkgPath(), "cleancut/"):
			types++
			for f := range typ.Fields() {
				key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				if key == "" || !strings.Contains(string(doc), "`"+key+"`") {
					t.Errorf("docs/dump.md does not describe `%s` of %s", key, typ.Name())
				}
				walk(f.Type)
			}
		}
	}
	for _, v := range []any{backup.DumpManifest{}, backup.DumpBegun{}, backup.DumpCheck{}} {
		walk(reflect.TypeOf(v))
	}
	if types < 10 {
		t.Errorf("only %d types were looked at", types)
	}
}
