package report

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// Facts writes values for people, in the order of their keys. A key says what
// its number counts: one with "bytes" or "seconds" in it, or with "_ms" at its
// end. Lists and maps have a line for each element; what has no JSON is written
// as its error.
func Facts(values map[string]any) []Fact {
	var out []Fact
	for _, k := range slices.Sorted(maps.Keys(values)) {
		var v any
		b, err := json.Marshal(values[k])
		if err == nil {
			err = json.Unmarshal(b, &v)
		}
		if err != nil {
			v = err.Error()
		}
		out = append(out, Fact{Name: strings.ReplaceAll(strings.TrimSuffix(k, "_ms"), "_", " "), Value: said(k, v)})
	}
	return out
}

func said(key string, v any) string {
	var lines []string
	switch v := v.(type) {
	case nil:
		return "none"
	case bool:
		return map[bool]string{true: "yes", false: "no"}[v]
	case float64:
		switch {
		case strings.Contains(key, "bytes"):
			return backup.Bytes(v).String()
		case strings.HasSuffix(key, "_ms"):
			return millis(time.Duration(v*float64(time.Millisecond))) + " ms"
		case strings.Contains(key, "seconds"):
			return seconds(v)
		}
		return number(v)
	case string:
		if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
			return t.UTC().Format("2006-01-02 15:04:05.000 UTC")
		}
		if v == "" {
			return "empty"
		}
		return v
	case []any:
		for _, e := range v {
			lines = append(lines, said(key, e))
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			lines = append(lines, fmt.Sprintf("%s: %s", k, said(key, v[k])))
		}
	}
	if len(lines) == 0 {
		return "none"
	}
	return strings.Join(lines, "\n")
}
