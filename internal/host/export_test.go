package host

import (
	"fmt"

	"cleancut/internal/backup"
)

// DescribeVolume returns the logical volume GROUP/NAME of a report of lvm, as
// Tree describes it, and the numbers of its members' devices.
func DescribeVolume(report []byte, group, name string) (backup.LogicalVolume, [][2]int, error) {
	groups, err := parseReport(report)
	if err != nil {
		return backup.LogicalVolume{}, nil, err
	}
	for _, g := range groups {
		for uuid, lv := range g.logical {
			if g.name == group && lv.name == name {
				return g.describe(uuid)
			}
		}
	}
	return backup.LogicalVolume{}, nil, fmt.Errorf("%s/%s in %d groups: %w", group, name, len(groups), backup.ErrNotFound)
}

// DescribeAll describes whatever a report holds.
func DescribeAll(report []byte) (out []backup.LogicalVolume, err error) {
	groups, err := parseReport(report)
	for _, g := range groups {
		for uuid := range g.logical {
			if lv, _, err := g.describe(uuid); err == nil {
				out = append(out, lv)
			}
		}
	}
	return out, err
}

// ParseTable reads a device mapper table.
func ParseTable(table string, devices [][2]int) ([]backup.Segment, error) {
	return parseTable(table, devices)
}
