package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
)

// volumeUUID is what LVM names its own device mapper devices by: the UUIDs of
// the group and of the logical volume without their hyphens (lvm2,
// lib/activate/dev_manager.c). What LVM keeps below a logical volume has an
// ending more (-cow, -real, -tpool, …).
var volumeUUID = regexp.MustCompile(`^LVM-([0-9A-Za-z]{32})([0-9A-Za-z]{32})(-.*)?$`)

// ordinaryVolume is the first letter of lv_attr of a logical volume that is no
// snapshot, origin, thin, cached, mirrored or virtual one (lvs(8)).
const ordinaryVolume = '-'

// volumeGroup is what LVM's metadata says of one volume group.
type volumeGroup struct {
	uuid, name string
	refused    string // why nothing of it can be restored; "" if it can
	extent     backup.Bytes
	physical   []physicalVolume
	logical    map[string]logicalVolume // by UUID
}

type physicalVolume struct {
	uuid, name string
	number     [2]int // major, minor; zeros for one that is missing
	data       backup.Bytes
}

type logicalVolume struct {
	uuid, name, attr, layout, role string
	segments                       []segment
}

type segment struct {
	kind                string
	start, size, stripe backup.Bytes
	ranges              string // /dev/loop0:0-49 /dev/loop1:0-49
}

// keepNothing is a configuration for --config: no copies of metadata on this
// host, which LVM otherwise makes.
const keepNothing = "backup { backup=0 archive=0 }"

// reportArgs ask for what parseReport reads: lvmreport(7).
func reportArgs() []string {
	return []string{"fullreport", "--reportformat", "json", "--units", "b", "--nosuffix",
		"--configreport", "vg", "-o", "vg_uuid,vg_name,vg_extent_size,vg_lock_type,vg_systemid,vg_missing_pv_count,vg_exported,vg_partial,vg_clustered,vg_shared",
		"--configreport", "pv", "-o", "pv_uuid,pv_name,pv_major,pv_minor,pe_start,pv_missing",
		"--configreport", "lv", "-o", "lv_uuid,lv_name,lv_attr,lv_layout,lv_role",
		"--configreport", "seg", "-o", "lv_uuid,segtype,stripe_size,seg_start,seg_size,seg_pe_ranges",
		"--configreport", "pvseg", "-o", "pv_uuid"}
}

// parseReport reads the groups of `lvm fullreport`. Rows that no group owns
// (devices without one) are passed over.
func parseReport(b []byte) ([]volumeGroup, error) {
	type row = map[string]string
	var report struct {
		Report []struct{ VG, PV, LV, Seg []row }
	}
	if err := json.Unmarshal(b, &report); err != nil {
		return nil, fmt.Errorf("report of lvm: %w", err)
	}
	var out []volumeGroup
	for _, r := range report.Report {
		if len(r.VG) == 0 || r.VG[0]["vg_uuid"] == "" {
			continue
		}
		vg := r.VG[0]
		n := numbers{row: vg}
		g := volumeGroup{uuid: vg["vg_uuid"], name: vg["vg_name"], refused: refusedGroup(vg), extent: n.bytes("vg_extent_size"), logical: map[string]logicalVolume{}}
		for _, pv := range r.PV {
			n.row = pv
			p := physicalVolume{uuid: pv["pv_uuid"], name: pv["pv_name"]}
			if pv["pv_missing"] == "" {
				p.number, p.data = [2]int{int(n.bytes("pv_major")), int(n.bytes("pv_minor"))}, n.bytes("pe_start")
			}
			g.physical = append(g.physical, p)
		}
		for _, lv := range r.LV {
			g.logical[lv["lv_uuid"]] = logicalVolume{uuid: lv["lv_uuid"], name: lv["lv_name"], attr: lv["lv_attr"], layout: lv["lv_layout"], role: lv["lv_role"]}
		}
		for _, seg := range r.Seg {
			n.row = seg
			lv := g.logical[seg["lv_uuid"]]
			lv.segments = append(lv.segments, segment{kind: seg["segtype"], start: n.bytes("seg_start"), size: n.bytes("seg_size"),
				stripe: n.bytes("stripe_size"), ranges: seg["seg_pe_ranges"]})
			g.logical[seg["lv_uuid"]] = lv
		}
		if n.err != nil {
			return nil, fmt.Errorf("report of lvm, group %s: %w", g.name, n.err)
		}
		out = append(out, g)
	}
	return out, nil
}

// numbers reads numbers from rows and keeps the first error.
type numbers struct {
	row map[string]string
	err error
}

func (n *numbers) bytes(field string) backup.Bytes {
	v, err := strconv.ParseInt(n.row[field], 10, 64)
	if err == nil && v < 0 {
		err = strconv.ErrRange
	}
	if err != nil && n.err == nil {
		n.err = fmt.Errorf("%s %q: %w", field, n.row[field], err)
	}
	return backup.Bytes(v)
}

func refusedGroup(vg map[string]string) string {
	switch {
	case vg["vg_missing_pv_count"] != "0":
		return vg["vg_missing_pv_count"] + " of its physical volumes are missing"
	case vg["vg_partial"] != "":
		return "it is partial"
	case vg["vg_exported"] != "":
		return "it is exported"
	case vg["vg_clustered"] != "", vg["vg_shared"] != "", vg["vg_lock_type"] != "" && vg["vg_lock_type"] != "none":
		return "it is shared with other hosts (lock type " + vg["vg_lock_type"] + ")"
	case vg["vg_systemid"] != "":
		return "it has the system ID " + vg["vg_systemid"] + ", without which no other host may use it"
	}
	return ""
}

// describe returns a logical volume of the group in the words of a manifest,
// and the device numbers of its members in their order: those it lies on
// first, as its map names them, then the rest of the group. It refuses by name
// what is not made of linear and striped segments alone.
func (g volumeGroup) describe(uuid string) (backup.LogicalVolume, [][2]int, error) {
	lv, ok := g.logical[uuid]
	out := backup.LogicalVolume{UUID: uuid, Name: lv.name, Group: backup.VolumeGroup{UUID: g.uuid, Name: g.name}}
	switch {
	case g.refused != "":
		return out, nil, fmt.Errorf("volume group %s: %s: %w", g.name, g.refused, backup.ErrUnsupported)
	case !ok:
		return out, nil, fmt.Errorf("logical volume %s in volume group %s: %w", uuid, g.name, backup.ErrNotFound)
	case len(lv.attr) < 9 || lv.attr[0] != ordinaryVolume:
		return out, nil, fmt.Errorf("logical volume %s/%s is of kind %s, %s (ordinary linear and striped ones are done): %w", g.name, lv.name, lv.layout, lv.role, backup.ErrUnsupported)
	case lv.attr[4] == 's' || lv.attr[8] != '-':
		return out, nil, fmt.Errorf("logical volume %s/%s is suspended or not healthy (lv_attr %q): %w", g.name, lv.name, lv.attr, backup.ErrUnsupported)
	}
	slices.SortStableFunc(lv.segments, func(a, b segment) int { return int((a.start - b.start) >> 9) })
	var order []physicalVolume
	for _, s := range lv.segments {
		made, err := g.segment(s, &order)
		if err != nil {
			return out, nil, fmt.Errorf("logical volume %s/%s: %w", g.name, lv.name, err)
		}
		out.Segments = append(out.Segments, made)
	}
	for _, p := range g.physical {
		if !slices.ContainsFunc(order, func(o physicalVolume) bool { return o.uuid == p.uuid }) {
			order = append(order, p)
		}
	}
	var devices [][2]int
	for _, p := range order {
		if p.number == [2]int{} {
			return out, nil, fmt.Errorf("physical volume %s of volume group %s is missing: %w", p.uuid, g.name, backup.ErrUnsupported)
		}
		out.PhysicalVolumes, devices = append(out.PhysicalVolumes, p.uuid), append(devices, p.number)
	}
	return out, devices, nil
}

// segment translates extents into bytes; what lies on a physical volume that
// order does not have yet is added to it.
func (g volumeGroup) segment(s segment, order *[]physicalVolume) (backup.Segment, error) {
	out := backup.Segment{Type: backup.SegmentType(s.kind), Start: s.start, Size: s.size, StripeBytes: s.stripe}
	if out.Type != backup.SegmentLinear && out.Type != backup.SegmentStriped {
		return out, fmt.Errorf("a segment of type %s (linear and striped are done): %w", s.kind, backup.ErrUnsupported)
	}
	for r := range strings.FieldsSeq(s.ranges) {
		colon := strings.LastIndexByte(r, ':')
		first, _, _ := strings.Cut(r[colon+1:], "-")
		extent, err := strconv.ParseInt(first, 10, 32)
		i := slices.IndexFunc(g.physical, func(p physicalVolume) bool { return colon > 0 && p.name == r[:colon] })
		if err != nil || extent < 0 || i < 0 {
			return out, fmt.Errorf("a segment at %q, which is no physical volume: %w", r, backup.ErrUnsupported)
		}
		p := g.physical[i]
		member := slices.IndexFunc(*order, func(o physicalVolume) bool { return o.uuid == p.uuid })
		if member < 0 {
			member = len(*order)
			*order = append(*order, p)
		}
		out.Stripes = append(out.Stripes, backup.Stripe{Member: member, Start: p.data + backup.Bytes(extent)*g.extent})
	}
	if len(out.Stripes) == 0 || out.Type == backup.SegmentLinear && len(out.Stripes) != 1 {
		return out, fmt.Errorf("a %s segment on %d physical volumes: %w", s.kind, len(out.Stripes), backup.ErrUnsupported)
	}
	return out, nil
}

// parseTable reads what `dmsetup table` says of one device: lines of linear
// and striped targets on devices of the given numbers (the kernel's
// Documentation/admin-guide/device-mapper/linear.rst and striped.rst).
func parseTable(table string, devices [][2]int) ([]backup.Segment, error) {
	var out []backup.Segment
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 5 || f[2] != "linear" && f[2] != "striped" {
			return nil, fmt.Errorf("the kernel maps it by %q: %w", strings.TrimSpace(line), backup.ErrUnsupported)
		}
		s := backup.Segment{Type: backup.SegmentType(f[2]), Start: sectors(f[0]), Size: sectors(f[1])}
		on := f[3:]
		if s.Type == backup.SegmentStriped {
			s.StripeBytes, on = sectors(f[4]), f[5:]
		}
		for ; len(on) >= 2; on = on[2:] {
			major, minor, _ := strings.Cut(on[0], ":")
			a, err1 := strconv.Atoi(major)
			b, err2 := strconv.Atoi(minor)
			member := slices.Index(devices, [2]int{a, b})
			if err := errors.Join(err1, err2); err != nil || member < 0 {
				return nil, fmt.Errorf("the kernel maps it to device %s, which LVM does not name: %w", on[0], backup.ErrUnsupported)
			}
			s.Stripes = append(s.Stripes, backup.Stripe{Member: member, Start: sectors(on[1])})
		}
		out = append(out, s)
	}
	return out, nil
}

// sectors returns -1 for what is no number: no segment has that.
func sectors(s string) backup.Bytes {
	n, err := strconv.ParseInt(s, 10, 54)
	if err != nil {
		return -1
	}
	return backup.Bytes(n) * sectorBytes
}

// checkMap demands that the kernel maps the logical volume at dev as its
// metadata says, onto just these devices.
func checkMap(ctx context.Context, dev string, lv backup.LogicalVolume, devices [][2]int) error {
	out, err := lvmTool(ctx, "dmsetup", "table", readString("/sys/block", filepath.Base(dev), "dm/name"))
	if err != nil {
		return err
	}
	live, err := parseTable(string(out), devices)
	if err == nil && !sameMap(live, lv.Segments) {
		err = fmt.Errorf("the kernel maps it as %+v, LVM's metadata say %+v: %w", live, lv.Segments, backup.ErrUnsupported)
	}
	if err != nil {
		return backup.Hint(fmt.Errorf("logical volume %s/%s at %s: %w", lv.Group.Name, lv.Name, dev, err), "`lvchange --refresh` loads what the metadata say")
	}
	return nil
}

func sameMap(a, b []backup.Segment) bool {
	return slices.EqualFunc(a, b, func(x, y backup.Segment) bool {
		return x.Type == y.Type && x.Start == y.Start && x.Size == y.Size && x.StripeBytes == y.StripeBytes && slices.Equal(x.Stripes, y.Stripes)
	})
}

// hyphens gives 32 letters the form in which LVM prints a UUID.
func hyphens(u string) string {
	out := u[:6]
	for i := 6; i < 26; i += 4 {
		out += "-" + u[i:i+4]
	}
	return out + "-" + u[26:]
}

// logicalTree describes a logical volume: names and identities from LVM, held
// against the map that the kernel has.
func logicalTree(ctx context.Context, d backup.Device, uuid []string, resolve Resolve) (backup.Device, error) {
	if uuid[3] != "" {
		return d, fmt.Errorf("%s is a part that LVM keeps to itself (%s): %w", d.Name, uuid[3], backup.ErrUnsupported)
	}
	// A report of LVM's writes the copies of metadata that /etc/lvm lacks.
	out, err := lvmTool(ctx, "lvm", append(reportArgs(), "--config", keepNothing)...)
	if err != nil {
		return d, err
	}
	groups, err := parseReport(out)
	if err != nil {
		return d, err
	}
	i := slices.IndexFunc(groups, func(g volumeGroup) bool { return g.uuid == hyphens(uuid[1]) })
	if i < 0 {
		return d, backup.Hint(fmt.Errorf("volume group %s of %s is unknown to lvm: %w", hyphens(uuid[1]), d.Name, backup.ErrUnsupported),
			"see what `lvm fullreport` shows; the filter or the devices file of LVM must not hide the group")
	}
	lv, devices, err := groups[i].describe(hyphens(uuid[2]))
	if err != nil {
		return d, err
	}
	if err := checkMap(ctx, "/dev/"+d.Name, lv, devices); err != nil {
		return d, err
	}
	d.Kind, d.LogicalVolume = backup.DeviceLogicalVolume, &lv
	for _, n := range devices {
		m, err := Tree(ctx, n[0], n[1], resolve)
		if err != nil {
			return d, fmt.Errorf("physical volume of %s: %w", lv.Group.Name, err)
		}
		if err := refuseBelow(d, m); err != nil {
			return d, err
		}
		d.Members = append(d.Members, m)
	}
	return d, nil
}

// refuseBelow refuses a logical volume below another device: nested groups and
// arrays of logical volumes were not tried.
func refuseBelow(d, member backup.Device) error {
	if member.Kind == backup.DeviceLogicalVolume {
		return fmt.Errorf("%s lies on the logical volume %s/%s (one must lie right under the filesystem): %w",
			d.Name, member.LogicalVolume.Group.Name, member.LogicalVolume.Name, backup.ErrUnsupported)
	}
	return nil
}

// lvmTool runs lvm or dmsetup. They wait for udev to make and remove device
// nodes; where nobody is there to do it, they are told to do it themselves.
func lvmTool(ctx context.Context, tool string, args ...string) ([]byte, error) {
	env := []string{"LVM_SUPPRESS_FD_WARNINGS=1"}
	if !udevRuns() {
		env = append(env, "DM_DISABLE_UDEV=1")
	}
	return runWith(ctx, env, tool, args...)
}

// udevRuns asks whether somebody listens at udevd's socket; the socket itself
// outlives a udevd that was killed.
func udevRuns() bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Connect(fd, &unix.SockaddrUnix{Name: "/run/udev/control"}) == nil
}
