package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/uml"
)

// The ioctls of Linux include/uapi/linux/userfaultfd.h that are used here.
const (
	uffdioAPI      = 0xc018aa3f
	uffdioRegister = 0xc020aa00
	uffdioZeropage = 0xc020aa04
)

// longWrite begins a write(2) to a new file that stays in the kernel until end
// is called: its buffer is a page that nobody provides (userfaultfd(2)).
// Meanwhile the file's filesystem can begin to freeze, not end it.
func longWrite(t *testing.T, file string) (end func()) {
	t.Helper()
	call := func(fd uintptr, request uintptr, arg *[4]uint64) {
		t.Helper()
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(arg))); e != 0 {
			t.Fatalf("userfaultfd: ioctl %#x: %v", request, e)
		}
	}
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if e == unix.ENOSYS {
		if !uml.Inside() { // there a skip would fail the test outside
			t.Skip("this kernel has no userfaultfd")
		}
		t.Log("NOT TESTED: the guest's kernel has no userfaultfd")
		return nil
	}
	if e != 0 {
		t.Fatalf("userfaultfd: %v", e)
	}
	call(fd, uffdioAPI, &[4]uint64{0xAA})
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	where := uint64(uintptr(unsafe.Pointer(&page[0])))
	call(fd, uffdioRegister, &[4]uint64{where, 4096, 1}) // UFFDIO_REGISTER_MODE_MISSING
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := unix.Write(int(f.Fd()), page)
		done <- err
	}()
	var once sync.Once
	end = func() {
		once.Do(func() {
			call(fd, uffdioZeropage, &[4]uint64{where, 4096})
			if err := <-done; err != nil {
				t.Errorf("the long write: %v", err)
			}
			_ = unix.Close(int(fd))
			_ = f.Close()
			_ = os.Remove(file)
		})
	}
	t.Cleanup(end)
	return end
}

// TestABackupKilledWhileItsFreezeStillFlushes: FIFREEZE of one filesystem
// waits behind a long write and cannot be killed; another is frozen already. At the deadline it is thawed, the other as soon as the kernel
// lets go of it.
func TestABackupKilledWhileItsFreezeStillFlushes(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	end := longWrite(t, filepath.Join(p.mounts[2], ".long"))
	if end == nil {
		return
	}
	o, reached := p.stopped(t, "host.freeze done\n", nil, func(cmd *exec.Cmd) {
		defer end()
		kill(cmd)
		wrote := make(chan error, 1)
		began := time.Now()
		go func() { wrote <- writeDurably(filepath.Join(p.mounts[0], ".probe")) }()
		select {
		case err := <-wrote:
			t.Logf("the first filesystem took a write again after %s", time.Since(began))
			if err != nil {
				t.Error(err)
			}
		case <-time.After(30 * time.Second):
			_ = thaw(p.mounts[0])
			t.Error("the first filesystem was not thawed at the deadline")
		}
		if len(processes(p.dir, "watchdog")) == 0 {
			t.Error("the watchdog went though a freeze is under way")
		}
	}, "backup", "--deadline", "2s")
	if !reached || o.code != -1 {
		t.Fatalf("exit %d, want it killed inside the freeze\n%s", o.code, o.err)
	}
	p.flows(t)
	p.answers(t)
	p.swept(t)
}

// TestABackupWhoseFreezeDoesNotEndIsVoid is the same without a kill: the
// deadline passes, production goes on, the backup is thrown away.
func TestABackupWhoseFreezeDoesNotEndIsVoid(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := newProduction(t)
	stop := p.writer(t)
	end := longWrite(t, filepath.Join(p.mounts[2], ".long"))
	if end == nil {
		return
	}
	o, reached := p.stopped(t, "host.freeze done\n", nil, func(*exec.Cmd) {
		defer end()
		if err := writeDurably(filepath.Join(p.mounts[0], ".probe")); err != nil { // waits for the deadline
			t.Error(err)
		}
	}, "backup", "--deadline", "1s")
	if !reached {
		t.Fatalf("exit %d\n%s", o.code, o.err)
	}
	o.refused(t, 3, "the cut is void")
	stop()
	p.clean(t)
}
