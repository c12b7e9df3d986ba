package catalog

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"cleancut/internal/backup"
)

// Store keeps named objects that are written once. All methods may be called
// at the same time from several goroutines and processes. A key that CheckKey
// refuses is refused by every method before anything is touched. A ctx that
// is done gives its error (wrapped), also when it ends in the middle of Put or
// while the reader of Get is read.
type Store interface {
	// Put stores what r yields under key if nothing is there yet, else
	// backup.ErrExists and what is there stays as it was; r may then not have
	// been read. Of several Puts of one key at the same time exactly one wins.
	// When Put returns nil the object is durable. A reader never sees a part
	// of it. After an error of r, a done ctx or a crash nothing is under the
	// key; the one exception is a crash or a lost answer after the last byte,
	// when the whole object may be there.
	Put(ctx context.Context, key string, r io.Reader) error

	// Get opens an object for reading from its beginning, backup.ErrNotFound
	// if there is none. The caller closes it. A Delete meanwhile may end the
	// reading with an error but never shortens it in silence.
	Get(ctx context.Context, key string) (io.ReadCloser, error)

	// List returns the objects whose keys begin with prefix, sorted by key
	// (bytewise); "" means all. The prefix need not end at a slash. It shows
	// every object whose Put had returned when it was called, and nothing that
	// is still being written. No such object: empty. A store that is not there
	// at all: backup.ErrNotFound, never an empty list.
	List(ctx context.Context, prefix string) ([]Object, error)

	// Delete removes an object; nil if there is none, but backup.ErrNotFound
	// if the whole store is not there. After nil the object stays removed,
	// also over a crash. It may be called again after an error.
	Delete(ctx context.Context, key string) error
}

// Object is what List tells of one object.
type Object struct {
	Key      string
	Size     backup.Bytes
	Modified time.Time // when it was stored, by the store's clock
}

// CheckKey refuses what some store cannot keep or what could lead out of it:
// keys are parts joined by slashes, no part empty, longer than 255 bytes or
// beginning with a dot, no control character, valid UTF-8, 1024 bytes at most
// (S3's limit). One key must not be the folder of another ("a" and "a/b"):
// a directory cannot hold both. The error wraps backup.ErrUsage.
func CheckKey(key string) error {
	if why := unfit(key); why != "" {
		return fmt.Errorf("%w: key %q %s", backup.ErrUsage, key, why)
	}
	return nil
}

// CheckPrefix is CheckKey for List: "" and a slash at the end are fine too.
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	if why := unfit(strings.TrimSuffix(prefix, "/")); why != "" {
		return fmt.Errorf("%w: prefix %q %s", backup.ErrUsage, prefix, why)
	}
	return nil
}

func unfit(key string) string {
	if len(key) > 1024 {
		return "is longer than 1024 bytes"
	}
	if !utf8.ValidString(key) || strings.ContainsFunc(key, unicode.IsControl) {
		return "holds a control character or is no UTF-8"
	}
	for part := range strings.SplitSeq(key, "/") {
		switch {
		case part == "":
			return "has an empty part"
		case part[0] == '.':
			return "has a part that begins with a dot"
		case len(part) > 255:
			return "has a part longer than 255 bytes"
		}
	}
	return ""
}

// Open returns the store that location names: "file:///var/lib/cleancut", the
// plain absolute path, or "s3://bucket/prefix" with the parameters region,
// endpoint and path_style. It touches nothing yet. All else is
// backup.ErrUsage. Errors do not repeat a password that location may hold.
func Open(location string) (Store, error) {
	if filepath.IsAbs(location) {
		return NewDir(location), nil
	}
	u, err := url.Parse(location)
	if err != nil {
		return nil, backup.Hint(fmt.Errorf("%w: the catalog's location is no URL", backup.ErrUsage), hintLocation)
	}
	plain := u.User == nil && u.RawQuery == "" && u.Fragment == "" && (u.Host == "" || u.Host == "localhost")
	switch {
	case u.Scheme == "s3":
		at, err := parseBucket(u)
		if err != nil {
			return nil, err
		}
		return &S3{at: at, sizes: s3Sizes()}, nil
	case u.Scheme == "file" && plain && filepath.IsAbs(u.Path):
		return NewDir(u.Path), nil
	}
	return nil, backup.Hint(fmt.Errorf("%w: catalog %q", backup.ErrUsage, u.Redacted()), hintLocation)
}

const hintLocation = "give file:///an/absolute/path, the plain absolute path or s3://bucket/prefix"
