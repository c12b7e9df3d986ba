package backup_test

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

func TestEveryKeyThatIsWrittenIsDescribed(t *testing.T) {
	doc, err := os.ReadFile("../../docs/manifest.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		if seen[typ] {
			return
		}
		seen[typ] = true
		switch typ.Kind() {
		case reflect.Slice, reflect.Pointer:
			walk(typ.Elem())
		case reflect.Struct:
			if !strings.HasPrefix(typ.PkgPath(), "cleancut/") {
				return
			}
			for f := range typ.Fields() {
				key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				if key == "" {
					t.Errorf("%s.%s has no JSON key", typ.Name(), f.Name)
				} else if !strings.Contains(string(doc), "`"+key+"`") {
					t.Errorf("docs/manifest.md does not describe `%s` of %s", key, typ.Name())
				}
				walk(f.Type)
			}
		}
	}
	for _, v := range []any{backup.Manifest{}, backup.Complete{}, backup.Verdict{}, backup.Intent{}, backup.Hold{}} {
		walk(reflect.TypeOf(v))
	}
	if len(seen) < 12 {
		t.Errorf("only %d types were looked at", len(seen))
	}
}
