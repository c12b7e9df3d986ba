package uml

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	modulesDir = "/usr/lib/uml/modules"
	searchPath = "/usr/sbin:/usr/bin:/sbin:/bin"
)

// Missing lists what this host lacks to run guests, each with the Debian package that brings it; empty means guests can run.
func Missing() []string {
	var missing []string
	if _, err := kernelPath(); err != nil {
		missing = append(missing, "linux.uml (package user-mode-linux)")
	} else if release, err := kernelRelease(context.Background()); err != nil {
		missing = append(missing, fmt.Sprintf("a linux.uml that runs: %v (package user-mode-linux)", err))
	} else if _, err := os.Stat(modulePath(release, "fs/overlayfs/overlay")); err != nil {
		missing = append(missing, fmt.Sprintf("%s/%s with overlay.ko (package user-mode-linux)", modulesDir, release))
	}
	// init.sh names no others.
	packages := [][2]string{
		{"bash", "bash"}, {"mount", "mount"}, {"umount", "mount"}, {"pivot_root", "util-linux"}, {"setsid", "util-linux"},
		{"modprobe", "kmod"}, {"env", "coreutils"}, {"perl", "perl-base"},
	}
	for _, p := range packages {
		if _, err := lookSystem(p[0]); err != nil {
			missing = append(missing, fmt.Sprintf("%s (package %s)", p[0], p[1]))
		}
	}
	// 3 forbids ptrace even on one's own child (Documentation/admin-guide/LSM/Yama.rst); linux.uml lives by it.
	if scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && strings.TrimSpace(string(scope)) == "3" {
		missing = append(missing, "ptrace (kernel.yama.ptrace_scope is 3, which only a reboot changes)")
	}
	return missing
}

// Inside reports whether this process runs in a guest.
func Inside() bool {
	if _, err := os.Stat("/" + markerFile); err != nil {
		return false
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && strings.Contains(string(cpu), "User Mode Linux")
}

// lookSystem finds a program in the system's own folders, whatever PATH says: an ordinary user's has no sbin.
func lookSystem(name string) (string, error) {
	for dir := range strings.SplitSeq(searchPath, ":") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("find %s: %w", name, exec.ErrNotFound)
}

func kernelPath() (string, error) { return lookSystem("linux.uml") }

// kernelRelease asks the kernel for its own release, which names its module folder.
func kernelRelease(ctx context.Context) (string, error) {
	path, err := kernelPath()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its release: %w", path, err)
	}
	release := strings.TrimSpace(string(out))
	if release == "" || strings.ContainsAny(release, "/ \n") {
		return "", fmt.Errorf("ask %s for its release: got %q", path, release)
	}
	return release, nil
}

// defaultModules are those every guest loads, by name.
func defaultModules(release string) []string {
	modules := []string{"overlay"}
	for _, path := range []string{"block/loop", "md/md-mod", "md/raid0", "md/linear", "md/dm-mod"} {
		if _, err := os.Stat(modulePath(release, "drivers/"+path)); err == nil { // else built in, or gone: linear went in 6.8
			modules = append(modules, filepath.Base(path))
		}
	}
	return modules
}

func modulePath(release, name string) string {
	return filepath.Join(modulesDir, release, "kernel", name+".ko")
}
