package backup

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"regexp"
	"time"
)

// ID names a backup or a copy: UTC time to the second and a random tail,
// "20261122T211704Z-5f3a9c", so that names sort by age. That of a golden image
// is GoldenID.
type ID string

// VolumeID is the provider's name of a block volume.
type VolumeID string

// SnapshotID is the provider's name of a snapshot of one volume.
type SnapshotID string

var (
	idPattern      = regexp.MustCompile(`^\d{8}T\d{6}Z-[0-9a-f]{6}$`)
	clusterPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
)

// NewID returns a fresh ID for the moment now.
func NewID(now time.Time) ID {
	tail := make([]byte, 3)
	_, _ = rand.Read(tail) // crypto/rand.Read never returns an error (Go 1.24)
	return ID(now.UTC().Format("20060102T150405Z") + "-" + hex.EncodeToString(tail))
}

// ParseID checks that s has the form of an ID. The error wraps ErrUsage.
func ParseID(s string) (ID, error) {
	if !idPattern.MatchString(s) {
		return "", fmt.Errorf("%w: %q is no backup id (they look like 20261122T211704Z-5f3a9c; see `cleancut list`)", ErrUsage, s)
	}
	return ID(s), nil
}

// Time returns the moment the ID was made for, to the second; the zero time
// if the ID is malformed.
func (id ID) Time() time.Time {
	if len(id) < 16 {
		return time.Time{}
	}
	t, err := time.Parse("20060102T150405Z", string(id[:16]))
	if err != nil {
		return time.Time{}
	}
	return t
}

// CheckClusterName refuses names that cannot be a folder, an object key and a
// tag value alike. The error wraps ErrUsage.
func CheckClusterName(name string) error {
	if !clusterPattern.MatchString(name) {
		return fmt.Errorf("%w: cluster name %q: use 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit", ErrUsage, name)
	}
	return nil
}
