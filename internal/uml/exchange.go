package uml

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed init.sh
var initScript string // embedding needs a variable; nothing writes it

const (
	exchangePrefix = "cleancut-guest-"
	consoleLines   = 100 // of the console, in an error
	guestExchange  = "run/cleancut/exchange"
	guestOldRoot   = "run/cleancut/oldroot"
	markerFile     = "run/cleancut/guest"
)

// exchange is the private folder through which host and guest talk. The lock on it lives as long as this process: a folder that can be
// locked by another is left over.
type exchange struct {
	dir     string
	lock    *os.File
	scratch *os.File // unlinked; nil if there is none
}

// newExchange makes and fills the folder: init, lists, mount table, pipes, scratch disk.
func newExchange(g Guest, release string) (x *exchange, err error) {
	parent, err := filepath.EvalSymlinks(g.ScratchDir)
	if err != nil {
		return nil, err
	}
	if parent, err = filepath.Abs(parent); err != nil {
		return nil, err
	}
	sweep(parent)
	dir, err := os.MkdirTemp(parent, exchangePrefix)
	if err != nil {
		return nil, err
	}
	x = &exchange{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.remove())
		}
	}()
	// The kernel's command line knows quotes but no escapes (kernel/params.c: next_arg).
	if strings.ContainsAny(dir, "\"\n\\") {
		return x, fmt.Errorf("folder %q: a quote, a backslash or a newline in its path cannot be passed to a kernel", dir)
	}
	if x.lock, err = os.Open(dir); err != nil {
		return x, err
	}
	if err = syscall.Flock(int(x.lock.Fd()), syscall.LOCK_EX); err != nil {
		return x, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err = x.fill(g, release); err != nil {
		return x, err
	}
	return x, x.makeScratch(g.Scratch)
}

// sweep removes exchange folders whose runner and guard were both killed. Young ones are left alone: their runner may not have locked them yet.
func sweep(parent string) {
	left, _ := filepath.Glob(filepath.Join(parent, exchangePrefix+"*"))
	for _, dir := range left {
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		f, err := os.Open(dir)
		if err != nil {
			continue // another user's
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			os.RemoveAll(dir)
		}
		f.Close()
	}
}

// fill writes what init.sh reads.
func (x *exchange) fill(g Guest, release string) error {
	shares, err := realFolders(g.Share)
	if err != nil {
		return err
	}
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "guest"
	}
	modules := append(defaultModules(release), g.Modules...)
	lists := map[string][]string{
		"args":     g.Args,
		"env":      g.Env,
		"modules":  modules,
		"settings": {g.Dir, hostname, strconv.Itoa(len(shares))},
	}
	for name, list := range lists {
		if err := x.writeList(name, list); err != nil {
			return err
		}
	}
	files := map[string]string{"fstab": x.fstab(shares), "stdout": "", "stderr": ""}
	for name, text := range files {
		if err := os.WriteFile(x.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	for _, name := range []string{"stdout.pipe", "stderr.pipe"} {
		if err := syscall.Mkfifo(x.path(name), 0o666); err != nil {
			return fmt.Errorf("make pipe %s: %w", name, err)
		}
		// Beyond the umask: a guest program that gave up root may open /dev/stderr anew.
		if err := os.Chmod(x.path(name), 0o666); err != nil {
			return err
		}
	}
	if err := os.Mkdir(x.path("mnt"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(x.path("init"), []byte(initScript), 0o700); err != nil {
		return err
	}
	return x.makeSkeleton(release)
}

// writeList writes strings, each ended by a NUL, as mapfile -d ” reads them.
func (x *exchange) writeList(name string, list []string) error {
	var b strings.Builder
	for _, s := range list {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf("%s: %q holds a NUL", name, s)
		}
		b.WriteString(s)
		b.WriteByte(0)
	}
	return os.WriteFile(x.path(name), []byte(b.String()), 0o600)
}

// makeSkeleton lays out what is copied into the guest's root once its filesystems are mounted, and the module tree for modprobe -d.
func (x *exchange) makeSkeleton(release string) error {
	skeleton := x.path("skeleton")
	links := map[string]string{
		x.path("lib/modules/" + release): filepath.Join(modulesDir, release),
		skeleton + "/dev/fd":             "/proc/self/fd",
		skeleton + "/dev/stdin":          "/proc/self/fd/0",
		skeleton + "/dev/stdout":         "/proc/self/fd/1",
		skeleton + "/dev/stderr":         "/proc/self/fd/2",
	}
	if _, err := os.Lstat("/usr/lib/modules/" + release); err != nil {
		links[skeleton+"/usr/lib/modules/"+release] = filepath.Join(modulesDir, release)
	}
	for link, target := range links {
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, link); err != nil {
			return err
		}
	}
	for _, dir := range []string{"run/lock", guestOldRoot} {
		if err := os.MkdirAll(filepath.Join(skeleton, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(skeleton, markerFile), []byte(release+"\n"), 0o644); err != nil {
		return err
	}
	return openModes(skeleton)
}

// openModes makes a tree readable to all users of the guest, whatever the runner's umask.
func openModes(root string) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Type()&fs.ModeSymlink != 0 {
			return err
		}
		mode := fs.FileMode(0o644)
		if entry.IsDir() {
			mode = 0o755
		}
		if entry.Name() == "lock" {
			mode = 0o777 | fs.ModeSticky
		}
		return os.Chmod(path, mode)
	})
}

// fstab is the guest's mount table (fstab(5)), in mounting order, below the overlay's mount point.
func (x *exchange) fstab(shares []string) string {
	const plain = "nosuid,nodev,noexec"
	var b strings.Builder
	add := func(source, target, kind, options string) {
		escape := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`, "#", `\043`)
		fmt.Fprintf(&b, "%s %s %s %s,X-mount.mkdir 0 0\n",
			escape.Replace(source), escape.Replace(filepath.Join(x.path("mnt/root"), target)), kind, options)
	}
	add("proc", "proc", "proc", plain)
	add("sysfs", "sys", "sysfs", plain)
	add("cgroup2", "sys/fs/cgroup", "cgroup2", plain)
	add("devtmpfs", "dev", "devtmpfs", "nosuid,mode=0755")
	add("devpts", "dev/pts", "devpts", "nosuid,noexec,gid=5,mode=0620,ptmxmode=0666")
	add("tmpfs", "dev/shm", "tmpfs", "nosuid,nodev,mode=1777")
	add("tmpfs", "run", "tmpfs", "nosuid,nodev,mode=0755")
	if u, err := user.Lookup("postgres"); err == nil { // Debian's default socket folder
		add("tmpfs", "run/postgresql", "tmpfs", fmt.Sprintf("nosuid,nodev,size=1m,mode=2775,uid=%s,gid=%s", u.Uid, u.Gid))
	}
	add(x.dir, guestExchange, "none", "bind")
	for _, dir := range shares {
		add(dir, dir, "none", "bind")
	}
	return b.String()
}

// realFolders resolves symbolic links, because mount would resolve them in the wrong root, and puts parents first.
func realFolders(dirs []string) ([]string, error) {
	var out []string
	for _, dir := range dirs {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			real, err = filepath.Abs(real)
		}
		if err != nil {
			return nil, fmt.Errorf("share %s: %w", dir, err)
		}
		info, err := os.Stat(real)
		if err != nil {
			return nil, fmt.Errorf("share %s: %w", dir, err)
		}
		if !info.IsDir() {
			return nil, fmt.Errorf("share %s: not a folder", dir)
		}
		out = append(out, real)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// makeScratch makes the scratch disk and unlinks it at once: it lives as long as its descriptor.
func (x *exchange) makeScratch(size int64) error {
	if size == 0 {
		return nil
	}
	f, err := os.OpenFile(x.path("scratch"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	x.scratch = f
	return errors.Join(f.Truncate(size), os.Remove(f.Name()))
}

func (x *exchange) path(name string) string { return filepath.Join(x.dir, name) }

// started says whether the guest came as far as starting the program.
func (x *exchange) started() bool {
	_, err := os.Stat(x.path("started"))
	return err == nil
}

// exitStatus reads the program's exit status; the error says how far the guest came instead.
func (x *exchange) exitStatus() (int, error) {
	text, err := os.ReadFile(x.path("exit"))
	if err == nil {
		return strconv.Atoi(strings.TrimSpace(string(text)))
	}
	if !x.started() {
		return 0, fmt.Errorf("boot guest: it ended before the program was started%s", x.complaint())
	}
	return 0, errors.New("run guest: it ended before the program did")
}

// complaint returns the last words of init.sh, if it had any.
func (x *exchange) complaint() string {
	text, _ := os.ReadFile(x.path("console.log"))
	_, said, found := strings.Cut(string(text), "cleancut-init: ")
	if !found {
		return ""
	}
	line, _, _ := strings.Cut(said, "\n")
	return ": " + strings.TrimSpace(line)
}

// consoleTail returns the last lines of the kernel's console for an error message.
func (x *exchange) consoleTail() string {
	text, err := os.ReadFile(x.path("console.log"))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "; end of its console:\n\t" + strings.Join(lines[max(0, len(lines)-consoleLines):], "\n\t")
}

// remove takes the folder away; the scratch disk goes with its descriptor.
func (x *exchange) remove() error {
	err := os.RemoveAll(x.dir)
	for _, f := range []*os.File{x.scratch, x.lock} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}
