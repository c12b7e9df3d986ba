package demo

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/load"
	"cleancut/internal/report"
)

// writeReport writes the page of the run and, beside it, its data.
func (s *story) writeReport(res *Result) error {
	page := report.Page{
		Title: "cleancut demo", Subtitle: fmt.Sprintf("Four volumes, one atomic cut, restored and checked. %s, provider %s, mode %s, %s", res.Where, res.Provider, res.Mode, time.Now().UTC().Format("2006-01-02 15:04 UTC")),
		OK: res.OK, Said: res.Said(), Machine: s.machineFacts(), Throughput: s.throughput(), Marks: s.marks(),
		StallsSaid: "The longest time without an acknowledged single-row insert. A dot is two seconds of the run, from each second on, and in the second line the cut with a second before and after it.", Stalls: s.stalls(),
		Cut: "The cut of step 11.", Gantt: s.gantt(),
	}
	for _, st := range res.Steps {
		page.Steps = append(page.Steps, report.Step{N: st.N, Name: st.Name, OK: st.OK, Seconds: st.Seconds, Facts: report.Facts(st.Facts), Error: st.Error})
	}
	b, err := json.MarshalIndent(s.data(*res, page), "", " ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	f, err := os.Create(s.Report)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := errors.Join(page.Write(f), f.Close(), os.WriteFile(res.Data, append(b, '\n'), 0o644)); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

// data is what the page shows, and the manifest and verdict that it comes from.
func (s *story) data(res Result, page report.Page) any {
	res.Report, res.Data = "", "" // which may be moved
	out := struct {
		Result
		Machine    map[string]string       `json:"machine"`
		Manifest   backup.Manifest         `json:"manifest"`
		Verdict    backup.Verdict          `json:"verdict"`
		Throughput map[string][]load.Point `json:"throughput"` // acknowledged in each second
		Stalls     map[string][]float64    `json:"stalls_ms"`
	}{res, map[string]string{}, s.manifest, s.verdict, map[string][]load.Point{}, map[string][]float64{}}
	for _, f := range page.Machine {
		out.Machine[f.Name] = f.Value
	}
	if s.load != nil {
		out.Throughput["words"], out.Throughput["transfers"] = s.load.Words.Series(), s.load.Transfers.Series()
	}
	for _, l := range page.Stalls {
		for _, d := range l.Lengths {
			out.Stalls[l.Name] = append(out.Stalls[l.Name], float64(d)/float64(time.Millisecond))
		}
	}
	return out
}

// dataBeside is the file for the report's data.
func dataBeside(report string) string { return strings.TrimSuffix(report, ".html") + ".json" }

func (s *story) machineFacts() []report.Fact {
	var u unix.Utsname
	kernel := "unknown"
	if err := unix.Uname(&u); err == nil {
		kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	out := []report.Fact{{Name: "kernel", Value: kernel}, {Name: "processors", Value: fmt.Sprint(runtime.NumCPU())}}
	if host := guestOf(); host != "" {
		out = append(out, report.Fact{Name: "user-mode guest of", Value: host})
	}
	return append(out, report.Fact{Name: "cleancut", Value: s.Version}, report.Fact{Name: "PostgreSQL", Value: s.manifest.Server.Version},
		report.Fact{Name: "volumes", Value: "4 of " + s.VolumeSize.String() + ", md RAID 0, 64 KiB chunks, XFS"}, report.Fact{Name: "seed of the play database", Value: fmt.Sprint(s.facts.Seed)})
}

// guestOf is the host of a user-mode kernel, as that kernel names it, or "".
func guestOf() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "host" {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func (s *story) throughput() []report.Series {
	if s.load == nil {
		return nil
	}
	return []report.Series{series("Single-row inserts (beater B)", s.load.Words.Series()), series("Transfers (beater C)", s.load.Transfers.Series())}
}

func series(name string, points []load.Point) report.Series {
	out := report.Series{Name: name, Unit: "commits/s"}
	for _, p := range points[:max(0, len(points)-1)] { // the last may be of less than a second
		out.Points = append(out.Points, report.Point{T: p.At, V: float64(p.Count)})
	}
	return out
}

// stalls compares the cut with all the rest of the run, two seconds each, as
// around the cut.
func (s *story) stalls() []report.Stalls {
	if s.load == nil || len(s.manifest.Snapshots) == 0 {
		return nil
	}
	run, cut := report.Stalls{Name: "the whole run"}, report.Stalls{Name: "the cut"}
	points := s.load.Words.Series()
	for _, p := range points[:max(0, len(points)-2)] {
		run.Lengths = append(run.Lengths, s.load.Words.Stall(p.At, p.At.Add(2*time.Second)).Length)
	}
	first, last := s.manifest.Span()
	cut.Lengths = []time.Duration{s.load.Words.Stall(first.Add(-time.Second), last.Add(time.Second)).Length}
	return []report.Stalls{run, cut}
}

func (s *story) marks() []report.Mark {
	var out []report.Mark
	for _, p := range s.phases {
		out = append(out, report.Mark{From: p.from, To: p.to, Name: p.name})
	}
	if len(s.manifest.Snapshots) > 0 {
		first, last := s.manifest.Span()
		out = append(out, report.Mark{From: first, To: last, Name: "the cut"})
	}
	return out
}

func (s *story) gantt() []report.Bar {
	var snapshots []report.Snapshot
	for _, sn := range s.manifest.Snapshots {
		snapshots = append(snapshots, report.Snapshot{Name: fmt.Sprintf("volume %d", sn.Member), Requested: sn.Requested, Responded: sn.Responded})
	}
	return report.CutBars(s.manifest.Cut, snapshots)
}
