package backup

import (
	"maps"
	"strconv"
)

// Tags describe what cleancut makes outside, so that it can be found and
// understood without the catalog. Keys and values fit EC2's limits (128 and
// 256 characters).
type Tags map[string]string

// The keys of our tags.
const (
	TagBackup  = "cleancut:backup"  // ID of the backup a snapshot or volume belongs to
	TagCluster = "cleancut:cluster" // name of the cluster
	TagMember  = "cleancut:member"  // index of the volume among the backup's members
	TagMembers = "cleancut:members" // how many members the backup has
	TagVolume  = "cleancut:volume"  // volume the snapshot was cut from
	TagDigest  = "cleancut:digest"  // SHA-256 of manifest.json, added when the set is complete
	TagCopy    = "cleancut:copy"    // ID of the copy a volume was made for
	TagHost    = "cleancut:host"    // host the volume was made for
	TagStorage = "cleancut:storage" // name given to `storage create`
	TagCut     = "cleancut:cut"     // one value for all snapshots of one cut, and for no others
)

// SnapshotTags describes member m of count members of the backup id.
func SnapshotTags(id ID, cluster string, m Member, count int) Tags {
	return Tags{
		TagBackup:  string(id),
		TagCluster: cluster,
		TagMember:  strconv.Itoa(m.Index),
		TagMembers: strconv.Itoa(count),
		TagVolume:  string(m.Volume.ID),
	}
}

// Match reports whether t has every tag of want with the same value. An empty
// want matches nothing, so that a lost filter never selects everything; a tag
// that is missing does not match an empty value.
func (t Tags) Match(want Tags) bool {
	for k, v := range want {
		if got, ok := t[k]; !ok || got != v {
			return false
		}
	}
	return len(want) > 0
}

// With returns a copy of t that also has key = value.
func (t Tags) With(key, value string) Tags {
	out := maps.Clone(t)
	if out == nil {
		out = Tags{}
	}
	out[key] = value
	return out
}
