package dump

import (
	"bytes"
	"strings"
	"testing"
)

func TestTablespacesGetProductionsPathsInTheGlobalsOnly(t *testing.T) {
	const globals = "CREATE ROLE x;\nCREATE TABLESPACE \"o'dd\" OWNER postgres LOCATION '/copy/srv/it''s';\n\\connect template1\n"
	const data = "CREATE TABLESPACE a OWNER b LOCATION '/copy/srv/text in a row';\nno end"
	want := strings.Replace(globals, "/copy/srv/it", "/srv/it", 1) + data
	for size := 1; size <= len(globals)+len(data); size++ { // whatever the pieces
		var out bytes.Buffer
		r := &relocate{w: &out, original: func(p string) string { return strings.TrimPrefix(p, "/copy") }}
		for rest := []byte(globals + data); len(rest) > 0; {
			n := min(size, len(rest))
			if _, err := r.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if got := out.String(); got != want {
			t.Fatalf("in pieces of %d: got %q, want %q", size, got, want)
		}
	}
}
