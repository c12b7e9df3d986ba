package backup_test

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"cleancut/internal/backup"
)

func TestSpans(t *testing.T) {
	for text, want := range map[string]time.Duration{"7d": 168 * time.Hour, "0d": 0, "0": 0, "36h": 36 * time.Hour, "1d12h": 36 * time.Hour, "1d0h30m": 24*time.Hour + 30*time.Minute, "36500d": 36500 * 24 * time.Hour, "90s": 90 * time.Second} {
		if got, err := backup.ParseSpan(text); err != nil || time.Duration(got) != want {
			t.Errorf("%q: got %s, %v, want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"", "d", "7", "7 d", "-7d", "+7d", "-1h", "1d-1h", "7days", "1h1d", "1w", "1.5d", "36501d", "36500d1ns", "9999999h", "18446744073709551617d", "1dd"} {
		if got, err := backup.ParseSpan(text); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: got %s, %v, want a usage error", text, got, err)
		}
	}
	b, err := json.Marshal(backup.Span(36 * time.Hour))
	if err != nil || string(b) != `"1d12h0m0s"` {
		t.Errorf("as JSON %s, %v", b, err)
	}
}

func FuzzParseSpan(f *testing.F) {
	for _, s := range []string{"7d", "1d12h", "36h", "0", "d", "1d-1h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := backup.ParseSpan(text)
		if err != nil {
			return
		}
		if s < 0 || time.Duration(s) > 36500*24*time.Hour {
			t.Errorf("%q is %s", text, s)
		}
		if back, err := backup.ParseSpan(s.String()); err != nil || back != s {
			t.Errorf("%q is written as %s and read as %s, %v", text, s, back, err)
		}
	})
}
