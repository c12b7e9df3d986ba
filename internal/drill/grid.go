package drill

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
)

// Checkpoint says whether a checkpoint ends right before the cut.
const (
	CheckpointBefore = "before"
	CheckpointNone   = "none"
)

// The order in which members are cut: forward is data, WAL, tablespaces, or
// the slots of a stripe.
const (
	Forward  = "forward"
	Backward = "backward"
)

// How an image is recovered before it is judged. Crash is the image alone, as
// after a power failure; of a bracketed backup too, whose label and WAL are then
// left aside. Archive is with WAL from outside the image: of a bracketed backup
// what was kept with it, of any other what was shipped into the catalog, to a
// moment after the cut.
const (
	Crash   = "crash"
	Archive = "archive"
)

// Who owns the volumes.
const (
	Local = "local"
	EC2   = "ec2" // our test server of that name, over the same pool
)

// Grid is the conditions to be combined: each value of one list with each of
// every other.
type Grid struct {
	Provider    string // Local, EC2; "" is Local
	Modes       []backup.Mode
	Skews       []time.Duration // between members: from the answer for one to the request for the next
	Orders      []string
	Volumes     []int
	Chunks      []backup.Bytes // of stripes
	Layouts     []string
	Filesystems []string
	Loads       []string
	Checkpoints []string
	Recoveries  []string // Crash, Archive: the same image is judged in each way
}

// Cell is one combination of conditions, and where it ran.
type Cell struct {
	Where      string       `json:"where"`              // native or uml
	Provider   string       `json:"provider,omitempty"` // "": local
	Layout     string       `json:"layout"`
	Volumes    int          `json:"volumes"`
	Chunk      backup.Bytes `json:"chunk_bytes"` // 0: the layout has none
	Filesystem string       `json:"fs"`
	Load       string       `json:"load"`
	Checkpoint string       `json:"checkpoint,omitempty"`
	Mode       backup.Mode  `json:"mode"`
	SkewMS     int64        `json:"skew_ms"`
	Order      string       `json:"order,omitempty"`    // "": forward
	Recovery   string       `json:"recovery,omitempty"` // "": in lines of early drills, see whole; of a cut, that has none yet
}

// Skew is the time between two members.
func (c Cell) Skew() time.Duration { return time.Duration(c.SkewMS) * time.Millisecond }

// whole names the way in which an image of an early drill, whose lines do not
// tell it, was recovered: the only one there was.
func (c Cell) whole() Cell {
	if c.Recovery == "" {
		c.Recovery = Crash
		if c.Mode == backup.ModeBracketed {
			c.Recovery = Archive
		}
	}
	return c
}

// cut is the part of a cell that the cut is made of: cells with the same cut
// are judged by the same image.
func (c Cell) cut() Cell {
	c.Recovery = ""
	return c
}

// ground is the part of a cell that production itself is made of: cells with
// the same ground are cut in the same production run.
func (c Cell) ground() Cell {
	c.Mode, c.SkewMS, c.Order, c.Checkpoint, c.Recovery = "", 0, "", "", ""
	return c
}

// Conditions is the cell in words.
func (c Cell) Conditions() string {
	words := []string{string(c.Mode), c.Skew().String() + " apart"}
	switch {
	case c.SkewMS == 0 && c.inTurn():
		words[1] = "one right after the other"
	case c.SkewMS == 0:
		words[1] = "all at once"
	}
	if c.Order != "" {
		words = append(words, c.Order)
	}
	if c.Checkpoint == CheckpointBefore {
		words = append(words, "checkpoint before")
	}
	if c.Recovery != "" {
		words = append(words, c.Recovery+" recovery")
	}
	return strings.Join(append(words, c.Ground()), ", ")
}

// Ground is what the cell's production is, in words.
func (c Cell) Ground() string {
	layout := fmt.Sprintf("%s of %d", c.Layout, c.Volumes)
	if c.Chunk > 0 {
		layout += fmt.Sprintf(" × %d KiB", c.Chunk>>10)
	}
	words := []string{layout, c.Filesystem, c.Load + " load"}
	if c.Provider != "" {
		words = append(words, c.Provider)
	}
	return strings.Join(append(words, c.Where), ", ")
}

// Protected: cleancut vouches for a cut like that and for this recovery of it,
// so damage in it is a bug. It does not for the images of a bracketed backup of
// several filesystems alone.
func (c Cell) Protected() bool {
	return c.Mode != backup.ModeNone && (c.Recovery != Crash || !c.inTurn())
}

// inTurn: each filesystem is cut at an instant of its own.
func (c Cell) inTurn() bool { return c.Mode == backup.ModeBracketed && c.Layout == "separate" }

// What of a kernel some cells need, beside loop devices and root.
const (
	needsMD = "md arrays"
	needsDM = "device mapper"
)

// layout is one way to put a cluster on volumes.
type layout struct {
	name   string
	needs  string // of the kernel; "": nothing
	chunks bool   // it stripes
	// storages lists what to make: the first holds the data directory; with
	// more, the second holds the WAL and each other one a tablespace.
	storages func(c Cell, size backup.Bytes) []flow.StorageOptions
}

// layouts lists them; all but separate are levels of `storage create`.
func layouts() []layout {
	return []layout{
		{"separate", "", false, apart},
		{"raid0", needsMD, true, joined},
		{"linear", needsMD, false, joined},
		{"lvm", needsDM, false, joined},
		{"lvm-striped", needsDM, true, joined},
	}
}

func apart(c Cell, size backup.Bytes) []flow.StorageOptions {
	var out []flow.StorageOptions
	for i := range c.Volumes {
		name := []string{"data", "wal"}[min(i, 1)]
		if i > 1 {
			name = fmt.Sprintf("space%d", i-1)
		}
		out = append(out, flow.StorageOptions{Name: name, Volumes: 1, Size: size, Filesystem: c.Filesystem})
	}
	return out
}

func joined(c Cell, size backup.Bytes) []flow.StorageOptions {
	return []flow.StorageOptions{{Name: "data", Volumes: c.Volumes, Size: size, Level: c.Layout, Chunk: c.Chunk, Filesystem: c.Filesystem}}
}

// layoutNames lists them for people.
func layoutNames() string {
	var out []string
	for _, l := range layouts() {
		out = append(out, l.name)
	}
	return strings.Join(out, ", ")
}

func layoutOf(name string) (layout, bool) {
	i := slices.IndexFunc(layouts(), func(l layout) bool { return l.name == name })
	if i < 0 {
		return layout{}, false
	}
	return layouts()[i], true
}

// Refusal is a cell that cannot be done here, and why.
type Refusal struct {
	Cell string
	Why  string
}

// Cells combines the grid. where says for what a cell needs of the kernel the
// place that has it all, or the reason why there is none. A combination that
// differs from another one in nothing but a chunk size that does not exist, a
// skew in a group, which is one call, or an order without a skew, comes once. If any cell is refused,
// nothing should be run.
func (g Grid) Cells(where func(needs []string) (place, why string)) (cells []Cell, refused []Refusal) {
	for _, c := range g.all() {
		l, known := layoutOf(c.Layout)
		if known && !l.chunks {
			c.Chunk = 0
		}
		if c.Mode == backup.ModeGroup || c.Mode == backup.ModeBracketed && !c.inTurn() { // one call; one filesystem
			c.SkewMS = 0
		}
		if c.SkewMS == 0 || c.Order == Forward {
			c.Order = ""
		}
		why := c.wrong(l, known)
		if why == "" {
			c.Where, why = where(g.needs(l))
		}
		if why != "" {
			r := Refusal{strings.TrimSuffix(c.cut().Conditions(), ", "), why}
			if !slices.Contains(refused, r) {
				refused = append(refused, r)
			}
			continue
		}
		if !slices.Contains(cells, c) {
			cells = append(cells, c)
		}
	}
	return cells, refused
}

// needs is what the cells of a layout need of their kernel. The test server
// cuts a group by suspending dm devices; where a grid has groups, all its cells
// run in a kernel that can, so that they are of the same production runs.
func (g Grid) needs(l layout) (out []string) {
	if l.needs != "" {
		out = append(out, l.needs)
	}
	if slices.Contains(g.Modes, backup.ModeGroup) && l.needs != needsDM {
		out = append(out, needsDM)
	}
	return out
}

func (g Grid) all() []Cell {
	out := []Cell{{Provider: g.Provider}}
	if g.Provider == Local {
		out[0].Provider = ""
	}
	out = cross(out, g.Layouts, func(c *Cell, v string) { c.Layout = v })
	out = cross(out, g.Volumes, func(c *Cell, v int) { c.Volumes = v })
	out = cross(out, g.Chunks, func(c *Cell, v backup.Bytes) { c.Chunk = v })
	out = cross(out, g.Filesystems, func(c *Cell, v string) { c.Filesystem = v })
	out = cross(out, g.Loads, func(c *Cell, v string) { c.Load = v })
	out = cross(out, g.Modes, func(c *Cell, v backup.Mode) { c.Mode = v })
	out = cross(out, g.Skews, func(c *Cell, v time.Duration) { c.SkewMS = v.Milliseconds() })
	out = cross(out, g.Orders, func(c *Cell, v string) { c.Order = v })
	out = cross(out, g.Checkpoints, func(c *Cell, v string) { c.Checkpoint = v })
	return cross(out, g.Recoveries, func(c *Cell, v string) { c.Recovery = v })
}

func cross[T any](cells []Cell, values []T, set func(*Cell, T)) []Cell {
	var out []Cell
	for _, c := range cells {
		for _, v := range values {
			set(&c, v)
			out = append(out, c)
		}
	}
	return out
}

// wrong says what is wrong with a cell on any machine, or "".
func (c Cell) wrong(l layout, known bool) string {
	_, loaded := presetOf(c.Load)
	switch {
	case c.Provider != "" && c.Provider != EC2:
		return fmt.Sprintf("provider %q: local or ec2", c.Provider)
	case !known:
		return fmt.Sprintf("layout %q: %s", c.Layout, layoutNames())
	case c.Mode == backup.ModeGroup && c.Provider != EC2:
		return "the local provider has no group; the EC2 test server has: --provider ec2"
	case !slices.Contains([]backup.Mode{backup.ModeFreeze, backup.ModeNone, backup.ModeGroup, backup.ModeBracketed}, c.Mode):
		return fmt.Sprintf("mode %q: freeze, bracketed, none or, with --provider ec2, group", c.Mode)
	case c.Volumes < 2 || c.Volumes > 16:
		return fmt.Sprintf("%d volumes: want 2 to 16", c.Volumes)
	case l.chunks && (c.Chunk < 4<<10 || c.Chunk > 1<<20 || c.Chunk&(c.Chunk-1) != 0):
		return fmt.Sprintf("a chunk of %s: want a power of two from 4K to 1M", c.Chunk)
	case c.Filesystem != "xfs" && c.Filesystem != "ext4":
		return fmt.Sprintf("filesystem %q: xfs or ext4", c.Filesystem)
	case c.SkewMS < 0 || c.SkewMS > 600_000:
		return fmt.Sprintf("a skew of %s: want 0 to 10m", c.Skew())
	case c.Order != "" && c.Order != Backward:
		return fmt.Sprintf("order %q: forward or backward", c.Order)
	case !loaded:
		return fmt.Sprintf("load %q: light, heavy or metadata", c.Load)
	case c.Checkpoint != CheckpointBefore && c.Checkpoint != CheckpointNone:
		return fmt.Sprintf("checkpoint %q: before or none", c.Checkpoint)
	case c.Recovery != Crash && c.Recovery != Archive:
		return fmt.Sprintf("recovery %q: crash or archive", c.Recovery)
	}
	return ""
}
