package backup_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
)

func TestLease(t *testing.T) {
	made := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	hours := func(n int) time.Time { return made.Add(time.Duration(n) * time.Hour) }
	span := func(s string) backup.Span {
		v, err := backup.ParseSpan(s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, ttl := range []string{"0", "3d1s"} {
		if _, _, err := backup.Lease(made, span(ttl), span("3d")); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("a lease of %s of at most 3d: %v", ttl, err)
		}
	}
	c := backup.Clone{Name: "qa"}
	var err error
	if c.Expires, c.Longest, err = backup.Lease(made, backup.DefaultTTL, span("3d")); err != nil || !c.Expires.Equal(hours(8)) || !c.Longest.Equal(hours(72)) {
		t.Fatalf("a lease of 8h of at most 3d: until %s, at most %s, %v", c.Expires, c.Longest, err)
	}
	for n, want := range map[int]bool{7: false, 8: true, 9: true} {
		if c.Expired(hours(n)) != want {
			t.Errorf("expired after %d h: %v", n, !want)
		}
	}
	for _, x := range []struct {
		now, until int
		says       string // "": it is extended
	}{
		{1, 9, ""},
		{1, 9, "stands until 2026-11-23T21:00:00Z already"},
		{1, 5, "stands until"},
		{20, 15, "that has passed"},
		{20, 73, "2026-11-26T12:00:00Z is the latest possible moment"},
		{20, 72, ""}, // it had expired
		{20, 72, "already"},
	} {
		before := c
		err := c.Extend(hours(x.now), hours(x.until))
		switch {
		case x.says == "" && (err != nil || !c.Expires.Equal(hours(x.until))):
			t.Errorf("at %d h until %d h: %v, until %s", x.now, x.until, err, c.Expires)
		case x.says != "" && (!errors.Is(err, backup.ErrUsage) || !strings.Contains(err.Error(), x.says) || !c.Expires.Equal(before.Expires)):
			t.Errorf("at %d h until %d h: %v, until %s; want an error with %q", x.now, x.until, err, c.Expires, x.says)
		}
	}
}

func TestCloneNames(t *testing.T) {
	for name, good := range map[string]bool{"qa-1": true, "a": true, "": false, "QA": false, "../x": false, ".x": false, "a/b": false, strings.Repeat("a", 64): false} {
		if err := backup.CheckCloneName(name); (err == nil) != good || err != nil && !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
