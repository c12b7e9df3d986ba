package backup

import "time"

// Intent is written to the catalog before the first call that creates
// something outside, and removed when all of it is accounted for. What an
// intent without a running owner names, sweep removes.
type Intent struct {
	ID      ID        `json:"id"` // of the backup
	Cluster string    `json:"cluster"`
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Tags    Tags      `json:"tags"`                // what the provider's things carry
	Deletes bool      `json:"deletes"`             // true: the backup was being deleted
	Mounts  []string  `json:"mounts,omitempty"`    // that may be frozen
	Golden  ID        `json:"golden_of,omitempty"` // the backup is a golden image of this one
}
