package backup

import "fmt"

// Topology says where a cluster's bytes live: cluster → filesystems → arrays
// → member devices → volumes.
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
	DeviceArray     DeviceKind = "array"     // md
	DevicePartition DeviceKind = "partition" // of a volume
	DeviceVolume    DeviceKind = "volume"    // the provider's
)

// Device is a node of the tree under a filesystem. Exactly the field that
// belongs to Kind is set.
type Device struct {
	Kind      DeviceKind `json:"kind"`
	Name      string     `json:"name"` // the kernel's name when it was looked at: md0, loop3p1
	Size      Bytes      `json:"size"`
	Array     *Array     `json:"array,omitempty"`
	Partition *Partition `json:"partition,omitempty"`
	Volume    *Volume    `json:"volume,omitempty"`
	Members   []Device   `json:"members,omitempty"` // in member order; of a partition: the one device it is on
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
	want := map[DeviceKind]bool{DeviceArray: d.Array != nil, DevicePartition: d.Partition != nil, DeviceVolume: d.Volume != nil}
	switch {
	case depth > 16:
		return fmt.Errorf("devices nested deeper than 16")
	case !want[d.Kind]:
		return fmt.Errorf("device %s: kind %q without its description", d.Name, d.Kind)
	case d.Kind == DeviceVolume && len(d.Members) > 0, d.Kind == DevicePartition && len(d.Members) != 1, d.Kind == DeviceArray && len(d.Members) == 0:
		return fmt.Errorf("device %s: %d members", d.Name, len(d.Members))
	}
	for _, m := range d.Members {
		if err := m.validate(depth + 1); err != nil {
			return err
		}
	}
	return nil
}
