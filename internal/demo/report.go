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

	"cleancut/internal/load"
	"cleancut/internal/report"
)

// writeReport writes the page of the run.
func (s *story) writeReport(res *Result) error {
	page := report.Page{
		Title: "cleancut demo", Subtitle: fmt.Sprintf("%s, provider %s, mode %s, %s", res.Where, res.Provider, res.Mode, time.Now().UTC().Format("2006-01-02 15:04 UTC")),
		OK: res.OK, Said: res.Said(), Machine: s.machineFacts(), Throughput: s.throughput(), Marks: s.marks(), Gantt: s.gantt(),
	}
	for _, st := range res.Steps {
		if !st.NotThere {
			page.Steps = append(page.Steps, report.Step{N: st.N, Name: st.Name, OK: st.OK, Seconds: st.Seconds, Facts: factList(st.Facts), Error: st.Error})
		}
	}
	f, err := os.Create(s.Report)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return errors.Join(page.Write(f), f.Close())
}

func factList(facts map[string]any) []report.Fact {
	var out []report.Fact
	for _, k := range sortedKeys(facts) {
		b, err := json.Marshal(facts[k])
		if err != nil {
			b = []byte(err.Error())
		}
		out = append(out, report.Fact{Name: strings.ReplaceAll(k, "_", " "), Value: strings.Trim(string(b), `"`)})
	}
	return out
}

func (s *story) machineFacts() []report.Fact {
	var u unix.Utsname
	kernel := "unknown"
	if err := unix.Uname(&u); err == nil {
		kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	return []report.Fact{
		{Name: "kernel", Value: kernel}, {Name: "processors", Value: fmt.Sprint(runtime.NumCPU())}, {Name: "cleancut", Value: s.Version},
		{Name: "PostgreSQL", Value: s.manifest.Server.Version}, {Name: "volumes", Value: "4 of " + s.VolumeSize.String() + ", md RAID 0, 64 KiB chunks, XFS"},
	}
}

func (s *story) throughput() []report.Series {
	if s.load == nil {
		return nil
	}
	return []report.Series{series("beater B: single-row inserts", s.load.Words.Series()), series("beater C: transfers", s.load.Transfers.Series())}
}

func series(name string, points []load.Point) report.Series {
	out := report.Series{Name: name, Unit: "commits/s"}
	for _, p := range points[:max(0, len(points)-1)] { // the last may be of less than a second
		out.Points = append(out.Points, report.Point{T: p.At, V: float64(p.Count)})
	}
	return out
}

func (s *story) marks() []report.Mark {
	var out []report.Mark
	for _, p := range s.phases {
		out = append(out, report.Mark{From: p.from, To: p.to, Name: p.name})
	}
	return out
}

// gantt draws the cut: each freeze from its call to its thaw, each snapshot
// from its request to its answer.
func (s *story) gantt() []report.Bar {
	var out []report.Bar
	for _, f := range s.manifest.Cut.Frozen {
		out = append(out, report.Bar{Lane: "freeze", Name: "FIFREEZE", From: f.Called, To: f.Held},
			report.Bar{Lane: "frozen", Name: "held", From: f.Held, To: f.Thawed})
	}
	for _, sn := range s.manifest.Snapshots {
		out = append(out, report.Bar{Lane: fmt.Sprintf("snapshot %d", sn.Member), Name: string(sn.Volume.ID), From: sn.Requested, To: sn.Responded})
	}
	return out
}
