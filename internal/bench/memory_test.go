package bench_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
)

// measureMemory runs the program itself and looks at the peak of its resident
// memory, and of its watchdog's.
func (p *production) measureMemory(b *testing.B) {
	b.Helper()
	var table []string
	var whole, dog float64
	measure := func(args ...string) []byte {
		own, watchdog, out := p.peak(b, args...)
		whole, dog = max(whole, own), max(dog, watchdog)
		line := fmt.Sprintf("%-60s %5.1f MiB", strings.Join(args, " "), own)
		if watchdog > 0 {
			line += fmt.Sprintf(", its watchdog %.1f MiB", watchdog)
		}
		table = append(table, line)
		return out
	}
	var m backup.Manifest
	if err := json.Unmarshal(measure("backup", "--json"), &m); err != nil {
		b.Fatal(err)
	}
	root := filepath.Join(p.dir, "restored")
	measure("restore", string(m.ID), "--to", root)
	p.removeCopy(b, root)
	measure("verify", string(m.ID), "--level", "full")
	var dumped struct {
		Result struct {
			SQL backup.Bytes `json:"sql_bytes"`
		} `json:"result"`
	}
	if err := json.Unmarshal(measure("dump", string(m.ID), "--json"), &dumped); err != nil {
		b.Fatal(err)
	}
	measure("dump", string(m.ID), "--format", "per-database", "--jobs", "2")
	measure("dump", "check", string(m.ID))
	b.ReportMetric(whole, "tool-MiB")
	b.ReportMetric(dog, "watchdog-MiB")
	b.Log(strings.Join(append(table, fmt.Sprintf("databases of %s, a dump of %s of SQL", databases(m), dumped.Result.SQL)), "\n"))
}

func databases(m backup.Manifest) (sum backup.Bytes) {
	for _, d := range m.Server.Databases {
		sum += d.Size
	}
	return sum
}

// peak runs the program and returns VmHWM of it and of its watchdog in MiB
// (proc(5)). wait4's ru_maxrss will not do: it begins with the peak of the
// process that forked, and takes in the children that were waited for, a
// PostgreSQL server among them. It is read every few milliseconds, as it goes
// away with the process.
func (p *production) peak(b *testing.B, args ...string) (own, watchdog float64, out []byte) {
	b.Helper()
	cmd := p.command(b.Context(), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	dog := 0
	for {
		select {
		case err := <-ended:
			if err != nil || own == 0 {
				b.Fatalf("cleancut %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
			}
			return own, watchdog, stdout.Bytes()
		case <-tick.C:
		}
		own = max(own, highWater(cmd.Process.Pid))
		if dog == 0 && args[0] == "backup" {
			dog = watchdogOf(cmd.Process.Pid)
		}
		if dog != 0 {
			watchdog = max(watchdog, highWater(dog))
		}
	}
}

// highWater returns VmHWM of a process in MiB, 0 when it is gone.
func highWater(pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib / 1024
		}
	}
	return 0
}

// watchdogOf finds the child that runs `cleancut watchdog`.
func watchdogOf(parent int) int {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range all {
		line, _ := os.ReadFile(file)
		status, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "status"))
		if bytes.Contains(line, []byte("\x00watchdog\x00")) && bytes.Contains(status, fmt.Appendf(nil, "\nPPid:\t%d\n", parent)) {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			return pid
		}
	}
	return 0
}
