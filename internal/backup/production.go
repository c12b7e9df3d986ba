package backup

import "strconv"

// ForProduction is the purpose of what is restored in the place of a cluster
// that was lost. Until it is in service it is undone like any other copy; from
// then on nothing of cleancut removes it but `storage destroy`.
const ForProduction Purpose = "production"

// Production is what a restore in production's place makes on the host beside
// the volumes. It is written to the ledger before the effects.
type Production struct {
	// InService: the cluster has taken production's place. Never undone.
	InService bool `json:"in_service"`
	// Storages are the names under which `storage attach` finds the volumes, by
	// filesystem of the topology; "" for one that shares all its volumes with
	// those before it.
	Storages  []string `json:"storages"`
	Fstab     string   `json:"fstab"`
	MdadmConf string   `json:"mdadm_conf"`
	// Lines are the names under which lines were added to the two files.
	FstabLines []string     `json:"fstab_lines,omitempty"`
	MdadmLines []string     `json:"mdadm_lines,omitempty"`
	Folders    []string     `json:"folders,omitempty"` // that were made, outer ones first
	Files      []PlacedFile `json:"files,omitempty"`
}

// PlacedFile is a file of the lost host that was put to its path.
type PlacedFile struct {
	Path   string `json:"path"`
	KeptAs string `json:"kept_as,omitempty"` // what had been there; "" for nothing
	SHA256 string `json:"sha256"`            // of what was put there
}

// InService: the copy has become production.
func (c Copy) InService() bool { return c.Production != nil && c.Production.InService }

// VolumeTags is what the volume of one member carries.
func (c Copy) VolumeTags(m Member) Tags {
	tags := c.Tags().With(TagMember, strconv.Itoa(m.Index))
	if c.Production != nil {
		tags = tags.With(TagStorage, c.Production.Storages[m.Filesystem])
	}
	return tags
}

// NameStorages gives every filesystem of a topology the name under which its
// volumes are found: name for the only one, else name-1, name-2, …
func NameStorages(name string, t Topology) []string {
	out := make([]string, len(t.Filesystems))
	for _, m := range t.Members() {
		out[m.Filesystem] = name
		if len(out) > 1 {
			out[m.Filesystem] = name + "-" + strconv.Itoa(m.Filesystem+1)
		}
	}
	return out
}
