package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
)

// listed is one backup in the JSON of list and show.
type listed struct {
	ID       backup.ID          `json:"id"`
	Cluster  string             `json:"cluster"`
	State    string             `json:"state"` // complete, incomplete, unreadable
	Error    string             `json:"error,omitempty"`
	Achieved backup.Consistency `json:"achieved,omitempty"`
	How      backup.Mode        `json:"how,omitempty"`
	Volumes  int                `json:"volumes"`
	Size     backup.Bytes       `json:"size"` // of all volumes
	FreezeMS float64            `json:"freeze_ms"`
	Verdict  string             `json:"verdict"`               // good, damaged, none
	Dumps    int                `json:"dumps"`                 // whole ones
	Newest   string             `json:"newest_dump,omitempty"` // of them: "3 of 4 databases"
	Held     bool               `json:"held"`
	Age      float64            `json:"age_seconds"`
	GoldenOf backup.ID          `json:"golden_of,omitempty"` // it is the golden image of that backup
}

func entryLine(e catalog.Entry) listed {
	l := listed{ID: e.ID, Cluster: e.Manifest.Cluster, State: "complete", Achieved: e.Manifest.Cut.Achieved, How: e.Manifest.Cut.How,
		Volumes: len(e.Manifest.Snapshots), FreezeMS: e.Manifest.Cut.FreezeMS, Verdict: "none", Age: time.Since(e.ID.Time()).Seconds(), Held: e.Held(time.Now()) != ""}
	for _, s := range e.Manifest.Snapshots {
		l.Size += s.Volume.Size
	}
	if e.Complete == nil {
		l.State = "incomplete"
	}
	if e.Err != nil {
		l.State, l.Error = "unreadable", e.Err.Error()
		if e.Manifest.ID != "" {
			l.State = "incomplete"
		}
	}
	if g := e.Manifest.Golden; g != nil {
		l.GoldenOf = g.Of
	}
	if n := len(e.Verdicts); n > 0 {
		l.Verdict = e.Verdicts[n-1].Word() + " (" + string(e.Verdicts[n-1].Level) + ")"
	}
	return l
}

func (a *app) listCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", GroupID: "look", Args: exactly(0, ""), Aliases: []string{"ls"},
		Short: "List the backups of the cluster, oldest first",
		RunE: func(c *cobra.Command, _ []string) error {
			cat, s, err := a.catalog()
			if err != nil {
				return err
			}
			entries, err := cat.Backups(c.Context())
			if err != nil {
				return err
			}
			out := []listed{}
			for _, e := range entries {
				l := entryLine(e)
				if l.Dumps, l.Newest, err = countDumps(c.Context(), cat, e); err != nil {
					return err
				}
				out = append(out, l)
			}
			return a.print(map[string]any{"cluster": s.name, "backups": out}, func() { a.listText(s, out) })
		},
	}
}

func (a *app) listText(s settings, out []listed) {
	if len(out) == 0 {
		a.line("no backups of cluster %s in %s", s.name, s.Catalog)
		return
	}
	rows := [][]string{{"BACKUP", "AGE", "STATE", "CUT", "FROZEN", "VOLUMES", "SIZE", "VERDICT", "DUMPS", "HOLD"}}
	for _, l := range out {
		hold := "-"
		if l.Held {
			hold = "held"
		}
		how := strings.TrimSpace(fmt.Sprintf("%s %s", l.Achieved, l.How))
		if l.GoldenOf != "" {
			how = "golden of " + string(l.GoldenOf)
		}
		rows = append(rows, []string{string(l.ID), age(l.Age), l.State, how, fmt.Sprintf("%.0f ms", l.FreezeMS),
			fmt.Sprint(l.Volumes), l.Size.String(), l.Verdict, strings.TrimSpace(fmt.Sprint(l.Dumps, " ", l.Newest)), hold})
	}
	a.table(rows)
	if s.cluster.Provider == "local" {
		a.line("\nThese backups share the storage of production (provider local): a lost pool loses both.")
	}
	for _, l := range out {
		if l.Error != "" {
			a.line("%s: %s", l.ID, l.Error)
		}
	}
}

func age(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func (a *app) showCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", GroupID: "look", Args: exactly(1, "the id of a backup"),
		Short: "Show one backup in full",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := backup.ParseID(args[0])
			if err != nil {
				return err
			}
			cat, _, err := a.catalog()
			if err != nil {
				return err
			}
			e, err := cat.Backup(c.Context(), id)
			if err != nil {
				return err
			}
			dumps, err := a.shownDumps(c.Context(), cat, e)
			if err != nil {
				return err
			}
			return a.print(map[string]any{"manifest": e.Manifest, "complete": e.Complete, "verdicts": e.Verdicts, "dumps": dumps, "holds": shownHolds(e.Holds)}, func() { a.showText(e, dumps) })
		},
	}
}

func (a *app) showText(e catalog.Entry, dumps []shownDump) {
	m := e.Manifest
	a.line("backup %s of cluster %s, cut on %s at %s by cleancut %s", m.ID, m.Cluster, m.Host, m.Created.Format(time.RFC3339), m.Tool)
	a.line("\ncut: %s (%s), frozen %.1f ms, requests within %.1f ms, syncfs rounds %.0f ms", m.Cut.Achieved, m.Cut.How, m.Cut.FreezeMS, m.Cut.SpreadMS, m.Cut.SyncRounds)
	if g := m.Golden; g != nil {
		a.line("golden image of backup %s (its manifest: %s): recovered, checked, shut down at %s on timeline %d", g.Of, g.Digest, m.Cut.FlushLSN, m.Server.Timeline)
		a.checksText(g.Checks)
	} else if b := m.Bracket; b != nil {
		a.line("  backup mode from %s to %s on timeline %d, consistent at %s, %s of WAL kept with it", b.StartLSN, b.StopLSN, b.Timeline, b.End, plural(len(b.WAL), "segment"))
		if b.Standby() {
			a.line("  of a standby, with its pg_control")
		}
	} else {
		a.line("  flushed WAL before the freeze: %s on timeline %d", m.Cut.FlushLSN, m.Server.Timeline)
	}
	a.line("server: %s, system identifier %d, checksums %v", m.Server.Version, m.Server.SystemIdentifier, m.Server.DataChecksums)
	for _, d := range m.Server.Databases {
		a.line("  database %s, %s", d.Name, d.Size)
	}
	a.topologyText(m.Topology)
	a.notes(append(m.Server.Notes, m.Cut.Notes...))
	a.line("\nsnapshots:")
	rows := [][]string{}
	for _, s := range m.Snapshots {
		rows = append(rows, []string{"  " + fmt.Sprint(s.Member), string(s.ID), "of " + string(s.Volume.ID), s.Volume.Size.String(), s.Requested.Format("15:04:05.000000")})
	}
	a.table(rows)
	for _, v := range e.Verdicts {
		a.verdictText(v)
	}
	a.holdsText(e)
	for _, d := range dumps {
		a.dumpText(d)
	}
}

// catalog opens only the catalog: enough for looking.
func (a *app) catalog() (*catalog.Catalog, settings, error) {
	s, err := a.settings()
	if err != nil {
		return nil, s, err
	}
	store, err := catalog.Open(s.Catalog)
	if err != nil {
		return nil, s, err
	}
	return catalog.New(store, s.name), s, nil
}
