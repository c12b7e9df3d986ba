package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiemap is struct fiemap (linux/fiemap.h) without room for extents in its
// array: so the kernel only counts.
type fiemap struct {
	start, length                  uint64
	flags, mapped, count, reserved uint32
}

const fsIocFiemap = 0xC020660B

// Extents counts the extents of a file.
func Extents(path string) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	m := fiemap{length: ^uint64(0)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		return 0, fmt.Errorf("FIEMAP of %s: %w", path, errno)
	}
	return int(m.mapped), nil
}

// Age brings a volume of the local provider, mounted somewhere, into at least
// so many extents, as years of backups do: a clone of its image is kept as the
// new file `kept` while every second block of a file on it is written anew. It
// needs 4.5 KiB of the volume for each extent.
func Age(mount, image, kept string, extents int) error {
	const block = 4096
	blocks := extents + extents/8
	f, err := os.OpenFile(filepath.Join(mount, ".filler"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600) // hidden: not foreign data
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// Memory of a mapping is aligned to pages, as O_DIRECT wants it.
	buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("age: %w", err)
	}
	defer func() { _ = unix.Munmap(buffer) }()
	for i := range buffer {
		buffer[i] = byte(i * 7)
	}
	for at := 0; at < block*blocks; at += len(buffer) {
		if _, err := f.WriteAt(buffer, int64(at)); err != nil {
			return err
		}
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("age: %w", err)
	}
	if err := Clone(image, kept); err != nil {
		return err
	}
	const writers = 4
	errs := make([]error, writers)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := 2 * w; i < blocks && errs[w] == nil; i += 2 * writers {
				_, errs[w] = f.WriteAt(buffer[:block], int64(i)*block)
			}
		})
	}
	all.Wait()
	if err := errors.Join(append(errs, f.Sync())...); err != nil {
		return err
	}
	n, err := Extents(image)
	if err == nil && n < extents {
		err = fmt.Errorf("age: the volume has %d extents, wanted are %d", n, extents)
	}
	return err
}

// Clone makes a reflink of a file under a new name.
func Clone(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = source.Close() }()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = target.Close() }()
	if err := unix.IoctlFileClone(int(target.Fd()), int(source.Fd())); err != nil {
		return fmt.Errorf("clone %s: %w", from, err)
	}
	return target.Sync()
}
