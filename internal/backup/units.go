package backup

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// LSN is a position in the WAL, in bytes from its beginning. Its text form is
// PostgreSQL's: two hexadecimal halves, "16/B374D848" (type pg_lsn).
type LSN uint64

// ParseLSN reads PostgreSQL's text form.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	h, err1 := strconv.ParseUint(hi, 16, 32)
	l, err2 := strconv.ParseUint(lo, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("parse LSN %q: want the form 16/B374D848", s)
	}
	return LSN(h<<32 | l), nil
}

// String returns PostgreSQL's text form.
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

// MarshalText makes JSON hold the text form.
func (l LSN) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the text form.
func (l *LSN) UnmarshalText(b []byte) error {
	v, err := ParseLSN(string(b))
	if err == nil {
		*l = v
	}
	return err
}

// Bytes is a size. JSON holds the plain number; String is for people.
type Bytes int64

// String gives three significant digits in powers of 1024: "1.50 GiB"
// (four from 1000 on: "1023 MiB").
func (b Bytes) String() string {
	const units = "KMGTPE"
	if b < 1024 {
		return fmt.Sprintf("%d B", int64(b))
	}
	v, i := float64(b)/1024, 0
	for v >= 1023.5 && i < len(units)-1 { // what would round to 1024
		v, i = v/1024, i+1
	}
	decimals := 2
	if v >= 99.95 {
		decimals = 0
	} else if v >= 9.995 {
		decimals = 1
	}
	return fmt.Sprintf("%.*f %ciB", decimals, v, units[i])
}

// ParseBytes reads a size as people write it: "4G", "512MiB", "1048576".
// Units are powers of 1024. The error wraps ErrUsage.
func ParseBytes(s string) (Bytes, error) {
	t := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(s)), "B"), "I")
	shift := 0
	if n := len(t); n > 0 {
		if i := strings.IndexByte("KMGTP", t[n-1]); i >= 0 {
			shift, t = 10*(i+1), t[:n-1]
		}
	}
	v, err := strconv.ParseInt(strings.TrimSpace(t), 10, 64)
	if err != nil || v < 0 || v<<shift>>shift != v {
		return 0, fmt.Errorf("%w: size %q: want a number with an optional K, M, G or T", ErrUsage, s)
	}
	return Bytes(v << shift), nil
}

// SystemIdentifier is the number initdb gave the cluster. JSON holds it as a
// string, because it does not fit a JavaScript number.
type SystemIdentifier uint64

// MarshalJSON writes the decimal digits as a string.
func (s SystemIdentifier) MarshalJSON() ([]byte, error) {
	return json.Marshal(strconv.FormatUint(uint64(s), 10))
}

// UnmarshalJSON reads the decimal digits from a string.
func (s *SystemIdentifier) UnmarshalJSON(b []byte) error {
	var t string
	if err := json.Unmarshal(b, &t); err != nil {
		return fmt.Errorf("system identifier: %w", err)
	}
	v, err := strconv.ParseUint(t, 10, 64)
	if err != nil {
		return fmt.Errorf("system identifier: %w", err)
	}
	*s = SystemIdentifier(v)
	return nil
}
