package backup

import (
	"fmt"
	"slices"
)

// Topology says where a cluster's bytes live: cluster → filesystems → logical
// volumes and arrays → member devices → volumes.
type Topology struct {
	Filesystems []Filesystem `json:"filesystems"`
	Places      []Place      `json:"places"`
	NotCovered  []string     `json:"not_covered,omitempty"` // files the cluster uses that no volume of it holds
}

// PlaceKind says what part of a cluster a place holds.
type PlaceKind string

// The three kinds of place.
const (
	PlaceData       PlaceKind = "data"
	PlaceWAL        PlaceKind = "wal"
	PlaceTablespace PlaceKind = "tablespace"
)

// Place is one directory of the cluster.
type Place struct {
	Kind       PlaceKind `json:"kind"`
	OID        uint32    `json:"oid,omitempty"`  // of a tablespace
	Path       string    `json:"path"`           // real absolute path, no links in it
	Link       string    `json:"link,omitempty"` // the symbolic link that leads there, below the data directory
	Filesystem int       `json:"filesystem"`     // index into Topology.Filesystems
	Rel        string    `json:"rel"`            // path below the filesystem's mount point, "." for the mount point itself
}

// Filesystem is one mounted filesystem and what it lies on.
type Filesystem struct {
	Type       string   `json:"type"` // xfs, ext4, …
	UUID       string   `json:"uuid"`
	Label      string   `json:"label,omitempty"`
	Mountpoint string   `json:"mountpoint"`
	Options    []string `json:"options"` // as mounted, fit for mount -o
	Size       Bytes    `json:"size"`
	Device     Device   `json:"device"`
}

// DeviceKind says what a node of the device tree is.
type DeviceKind string

// The kinds of device.
const (
	DeviceArray         DeviceKind = "array"          // md
	DeviceLogicalVolume DeviceKind = "logical volume" // LVM
	DevicePartition     DeviceKind = "partition"      // of a volume
	DeviceVolume        DeviceKind = "volume"         // the provider's
)

// Device is a node of the tree under a filesystem. Exactly the field that
// belongs to Kind is set.
type Device struct {
	Kind          DeviceKind     `json:"kind"`
	Name          string         `json:"name"` // the kernel's name when it was looked at: md0, dm-3, loop3p1
	Size          Bytes          `json:"size"`
	Array         *Array         `json:"array,omitempty"`
	LogicalVolume *LogicalVolume `json:"logical_volume,omitempty"`
	Partition     *Partition     `json:"partition,omitempty"`
	Volume        *Volume        `json:"volume,omitempty"`
	// Members are in member order; of a partition: the one device it is on; of
	// a logical volume: every physical volume of its group, those it lies on
	// first, as LVM cannot bring up a group that lacks one.
	Members []Device `json:"members,omitempty"`
}

// Array is the identity of an md array.
type Array struct {
	UUID       string `json:"uuid"` // mdadm's form, four groups of eight hex digits
	Name       string `json:"name,omitempty"`
	Level      string `json:"level"` // raid0, linear
	Metadata   string `json:"metadata"`
	ChunkBytes Bytes  `json:"chunk_bytes"`
	Layout     int    `json:"layout"`
}

// LogicalVolume is the identity of a logical volume of LVM and its map.
type LogicalVolume struct {
	UUID            string      `json:"uuid"` // LVM's form, seven groups of letters and digits
	Name            string      `json:"name"`
	Group           VolumeGroup `json:"group"`
	PhysicalVolumes []string    `json:"physical_volumes"` // UUID of each of the device's members
	Segments        []Segment   `json:"segments"`         // in order, without gaps
}

// VolumeGroup is the identity of a volume group of LVM.
type VolumeGroup struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`
}

// SegmentType says how a segment of a logical volume lies on its members.
type SegmentType string

// The types of segment that a cut and a restore keep.
const (
	SegmentLinear  SegmentType = "linear"
	SegmentStriped SegmentType = "striped"
)

// Segment is a run of a logical volume's bytes.
type Segment struct {
	Type        SegmentType `json:"type"`
	Start       Bytes       `json:"start"` // in the logical volume
	Size        Bytes       `json:"size"`
	StripeBytes Bytes       `json:"stripe_bytes,omitempty"` // written to one member before the next has its turn
	Stripes     []Stripe    `json:"stripes"`                // one for a linear segment
}

// Stripe is the part of a segment that lies on one member.
type Stripe struct {
	Member int   `json:"member"` // index into the device's members
	Start  Bytes `json:"start"`  // on that member
}

// Stripes returns on how many members the first segment is striped, and in
// what size; 1 and 0 for a linear one.
func (l LogicalVolume) Stripes() (int, Bytes) {
	if len(l.Segments) == 0 || l.Segments[0].Type != SegmentStriped {
		return 1, 0
	}
	return len(l.Segments[0].Stripes), l.Segments[0].StripeBytes
}

// Partition is the place of a partition on its volume.
type Partition struct {
	Number int   `json:"number"`
	Start  Bytes `json:"start"`
	Size   Bytes `json:"size"`
}

// Volume is a provider's block device.
type Volume struct {
	ID       VolumeID `json:"id"`
	Provider string   `json:"provider"` // local, ec2
	Size     Bytes    `json:"size"`
}

// Member is one volume of a topology and its slot in it. A volume that
// carries several filesystems (partitions) is one member.
type Member struct {
	Volume     Volume `json:"volume"`
	Device     string `json:"device"`     // the kernel's name when it was looked at: loop3
	Filesystem int    `json:"filesystem"` // of the first filesystem that needs it
	Index      int    `json:"index"`      // among all members of the topology
}

// Members lists every volume once, in the order of filesystems and array
// slots.
func (t Topology) Members() []Member {
	var out []Member
	seen := map[VolumeID]bool{}
	for i, fs := range t.Filesystems {
		fs.Device.walk(func(d Device) {
			if d.Volume == nil || seen[d.Volume.ID] {
				return
			}
			seen[d.Volume.ID] = true
			out = append(out, Member{Volume: *d.Volume, Device: d.Name, Filesystem: i, Index: len(out)})
		})
	}
	return out
}

func (d Device) walk(visit func(Device)) {
	visit(d)
	for _, m := range d.Members {
		m.walk(visit)
	}
}

// Place returns the first place of that kind.
func (t Topology) Place(kind PlaceKind) (Place, bool) {
	for _, p := range t.Places {
		if p.Kind == kind {
			return p, true
		}
	}
	return Place{}, false
}

// FreezeOrder returns the indexes of the filesystems, the one with the WAL
// last: they are frozen together and thawed in reverse, so that commits go on
// first. Without a place of its own the WAL is in the data directory.
func (t Topology) FreezeOrder() []int {
	p, ok := t.Place(PlaceWAL)
	if !ok {
		p, ok = t.Place(PlaceData)
	}
	wal := -1
	if ok {
		wal = p.Filesystem
	}
	order := make([]int, 0, len(t.Filesystems))
	for i := range t.Filesystems {
		if i != wal {
			order = append(order, i)
		}
	}
	if wal >= 0 {
		order = append(order, wal)
	}
	return order
}

// Units returns the filesystems that must be cut at one instant with each
// other, in FreezeOrder: those that share a volume. A filesystem that shares
// none is a unit of its own.
func (t Topology) Units() [][]int {
	var units [][]int
	for _, i := range t.FreezeOrder() {
		unit := []int{i}
		rest := units[:0:0]
		for _, u := range units {
			if slices.ContainsFunc(u, func(j int) bool { return t.share(i, j) }) {
				unit = append(slices.Clone(u), unit...)
			} else {
				rest = append(rest, u)
			}
		}
		units = append(rest, unit)
	}
	return units
}

// share: both filesystems lie on one volume, or parts of it.
func (t Topology) share(i, j int) bool {
	on := map[VolumeID]bool{}
	t.Filesystems[i].Device.walk(func(d Device) {
		if d.Volume != nil {
			on[d.Volume.ID] = true
		}
	})
	shared := false
	t.Filesystems[j].Device.walk(func(d Device) {
		shared = shared || d.Volume != nil && on[d.Volume.ID]
	})
	return shared
}

// MembersOf lists the members that the filesystems lie on.
func (t Topology) MembersOf(filesystems []int) []Member {
	on := map[VolumeID]bool{}
	for _, i := range filesystems {
		t.Filesystems[i].Device.walk(func(d Device) {
			if d.Volume != nil {
				on[d.Volume.ID] = true
			}
		})
	}
	return slices.DeleteFunc(t.Members(), func(m Member) bool { return !on[m.Volume.ID] })
}

// Validate checks that indexes and trees hold together, as a manifest read
// from outside may not.
func (t Topology) Validate() error {
	if len(t.Filesystems) == 0 || len(t.Places) == 0 {
		return fmt.Errorf("topology names no filesystem or no place")
	}
	for _, p := range t.Places {
		if p.Filesystem < 0 || p.Filesystem >= len(t.Filesystems) {
			return fmt.Errorf("topology: place %s is on filesystem %d of %d", p.Path, p.Filesystem, len(t.Filesystems))
		}
	}
	if _, ok := t.Place(PlaceData); !ok {
		return fmt.Errorf("topology has no data directory")
	}
	for _, fs := range t.Filesystems {
		if err := fs.Device.validate(0); err != nil {
			return fmt.Errorf("topology: %s: %w", fs.Mountpoint, err)
		}
	}
	return nil
}

func (d Device) validate(depth int) error {
	want := map[DeviceKind]bool{DeviceArray: d.Array != nil, DeviceLogicalVolume: d.LogicalVolume != nil, DevicePartition: d.Partition != nil, DeviceVolume: d.Volume != nil}
	switch {
	case depth > 16:
		return fmt.Errorf("devices nested deeper than 16")
	case !want[d.Kind]:
		return fmt.Errorf("device %s: kind %q without its description", d.Name, d.Kind)
	case d.Kind == DeviceVolume && len(d.Members) > 0, d.Kind == DevicePartition && len(d.Members) != 1, d.Kind == DeviceArray && len(d.Members) == 0:
		return fmt.Errorf("device %s: %d members", d.Name, len(d.Members))
	case d.Kind == DeviceLogicalVolume:
		if err := d.LogicalVolume.validate(d.Members); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	for _, m := range d.Members {
		if err := m.validate(depth + 1); err != nil {
			return err
		}
	}
	return nil
}

func (l LogicalVolume) validate(members []Device) error {
	if len(members) == 0 || len(members) != len(l.PhysicalVolumes) || len(l.Segments) == 0 || l.UUID == "" || l.Group.UUID == "" {
		return fmt.Errorf("logical volume %q of %d segments on %d members, %d physical volumes", l.UUID, len(l.Segments), len(members), len(l.PhysicalVolumes))
	}
	var end Bytes
	for _, s := range l.Segments {
		if s.Type != SegmentLinear && s.Type != SegmentStriped || s.Start != end || s.Size <= 0 ||
			len(s.Stripes) == 0 || s.Type == SegmentLinear && len(s.Stripes) > 1 {
			return fmt.Errorf("segment %+v of logical volume %s", s, l.Name)
		}
		for _, st := range s.Stripes {
			if st.Member < 0 || st.Member >= len(members) {
				return fmt.Errorf("logical volume %s: segment on member %d of %d", l.Name, st.Member, len(members))
			}
		}
		end += s.Size
	}
	return nil
}
