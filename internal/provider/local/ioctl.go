package local

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/fs.h and linux/fiemap.h; golang.org/x/sys has neither.
const (
	fsIocFiemap     = 0xc020660b
	fsIocFsgetxattr = 0x801c581f
	fsIocFssetxattr = 0x401c5820

	fsXflagExtsize = 0x00000800
)

// fiemap is struct fiemap without extents.
type fiemap struct {
	start, length                            uint64
	flags, mapped, extentCount, reservedPart uint32
}

// fsxattr is struct fsxattr.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	pad                                           [8]byte
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		return nil
	}
}

// extents counts the extents of a file (FIEMAP with room for none only
// counts: Documentation/filesystems/fiemap.rst).
func extents(f *os.File) (int64, error) {
	m := fiemap{length: ^uint64(0)}
	if err := ioctl(f, fsIocFiemap, unsafe.Pointer(&m)); err != nil {
		return 0, fmt.Errorf("count extents of %s (FIEMAP): %w", f.Name(), err)
	}
	return int64(m.mapped), nil
}

// hintExtents makes XFS allocate so many bytes at once when blocks are first
// written, which is possible only while the file has no extents. Measured,
// random 8 KiB writes into 256 MiB: the clone took 68 ms instead of 97 ms, and
// after five snapshots 105 ms instead of 198 ms, as unwritten pieces cost it
// less than holes between scattered blocks. The hint for shared blocks
// (cowextsize) is left alone: from 64 KiB to 8 MiB it changed neither the
// number of extents nor the time.
func hintExtents(f *os.File, bytes uint32) error {
	var x fsxattr
	if err := ioctl(f, fsIocFsgetxattr, unsafe.Pointer(&x)); err != nil {
		return err
	}
	x.xflags |= fsXflagExtsize
	x.extsize = bytes
	return ioctl(f, fsIocFssetxattr, unsafe.Pointer(&x))
}

// clone clones all of source into target (ioctl_ficlone(2)).
func clone(target, source *os.File) error {
	if err := unix.IoctlFileClone(int(target.Fd()), int(source.Fd())); err != nil {
		return fmt.Errorf("clone %s: %w", source.Name(), err)
	}
	return nil
}
