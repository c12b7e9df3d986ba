// Package state is what this host remembers: which copies stand on it, what
// was ever frozen here, and who is at work now.
//
//	Lock → PutCopy … RemoveCopy
//
// A lock is the kernel's (flock), so it ends with the process that holds it,
// however that dies. Files are written whole: temporary name, fsync, rename,
// fsync of the folder.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// Dir is the state folder of one host.
type Dir struct{ path string }

// Open makes the folder if it is missing.
func Open(path string) (*Dir, error) {
	// Throwaway copies are mounted below mnt; their servers' uid must pass
	// through the folders, though not read them.
	for _, sub := range []struct {
		name string
		mode os.FileMode
	}{{".", 0o711}, {"mnt", 0o711}, {"copies", 0o700}, {"locks", 0o700}} {
		if err := os.MkdirAll(filepath.Join(path, sub.name), sub.mode); err != nil {
			return nil, backup.Hint(fmt.Errorf("state folder: %w", err), "run as root, or choose another folder with --state")
		}
	}
	return &Dir{path: path}, nil
}

// Path returns the state folder.
func (d *Dir) Path() string { return d.path }

// Lock takes the lock of that name or fails at once with ErrInUse. It is
// released by the returned function or by the end of the process.
func (d *Dir) Lock(name string) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(d.path, "locks", name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = backup.ErrInUse
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() {
		// A child that another goroutine is just forking has the file open, too.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		_ = f.Close()
	}, nil
}

// PutCopy writes or updates the ledger of a copy.
func (d *Dir) PutCopy(c backup.Copy) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("ledger of copy %s: %w", c.ID, err)
	}
	return d.write(filepath.Join("copies", string(c.ID)+".json"), b)
}

// Copies returns the ledgers of this host, oldest first. Unreadable ones are
// named in the error; the others are returned all the same.
func (d *Dir) Copies() ([]backup.Copy, error) {
	entries, err := os.ReadDir(filepath.Join(d.path, "copies"))
	if err != nil {
		return nil, fmt.Errorf("list copies: %w", err)
	}
	var out []backup.Copy
	var errs []error
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		var c backup.Copy
		b, err := os.ReadFile(filepath.Join(d.path, "copies", e.Name()))
		if err == nil {
			err = json.Unmarshal(b, &c)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("ledger %s: %w", e.Name(), err))
			continue
		}
		out = append(out, c)
	}
	return out, errors.Join(errs...)
}

// RemoveCopy forgets a copy. Not there: nil.
func (d *Dir) RemoveCopy(id backup.ID) error {
	err := os.Remove(filepath.Join(d.path, "copies", string(id)+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// RecordFreeze remembers mount points before they are frozen, for Frozen.
func (d *Dir) RecordFreeze(mountpoints []string) error {
	known, err := d.Frozen()
	if err != nil {
		return err
	}
	all := slices.Clone(known)
	for _, m := range mountpoints {
		if !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	if len(all) == len(known) {
		return nil
	}
	b, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("record of freezes: %w", err)
	}
	return d.write("frozen.json", b)
}

// Frozen returns every mount point that was ever frozen from here.
func (d *Dir) Frozen() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(d.path, "frozen.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("record of freezes: %w", err)
	}
	var out []string
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("record of freezes: %w", err)
	}
	return out, nil
}

func (d *Dir) write(name string, b []byte) error {
	path := filepath.Join(d.path, name)
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(append(b, '\n'))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
