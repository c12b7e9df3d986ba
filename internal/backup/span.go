package backup

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Span is a length of time as people write it for keeping things: "7d",
// "36h", "1d12h". A day is 24 hours.
type Span time.Duration

// maxDays keeps a Span far from what a Duration can hold (106,751 days).
const maxDays = 36500

// ParseSpan reads whole days, what time.ParseDuration reads, or the one before
// the other; "0" is none. It is not below zero and 36500 days at most. The
// error wraps ErrUsage.
func ParseSpan(s string) (Span, error) {
	days, rest, found := strings.Cut(s, "d")
	if !found {
		days, rest = "0", s
	}
	n, err := strconv.ParseUint(days, 10, 32)
	d := time.Duration(0)
	if err == nil && (rest != "" || !found) {
		d, err = time.ParseDuration(rest)
	}
	if err != nil || n > maxDays || d < 0 || d > maxDays*24*time.Hour || time.Duration(n)*24*time.Hour+d > maxDays*24*time.Hour {
		return 0, fmt.Errorf("%w: %q is no length of time: want days (7d), hours (36h) or both (1d12h), %d days at most", ErrUsage, s, maxDays)
	}
	return Span(time.Duration(n)*24*time.Hour + d), nil
}

// String is what ParseSpan reads.
func (s Span) String() string {
	days, rest := time.Duration(s)/(24*time.Hour), time.Duration(s)%(24*time.Hour)
	switch {
	case days == 0:
		return rest.String()
	case rest == 0:
		return fmt.Sprintf("%dd", days)
	}
	return fmt.Sprintf("%dd%s", days, rest)
}

// MarshalText makes JSON hold what String gives.
func (s Span) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSpan.
func (s *Span) UnmarshalText(b []byte) error {
	v, err := ParseSpan(string(b))
	if err == nil {
		*s = v
	}
	return err
}
