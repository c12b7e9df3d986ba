package provider

import (
	"time"

	"cleancut/internal/backup"
)

// Examination is what a provider can tell beforehand about cuts to come. It is
// the result of an optional power: doctor asks providers that have it.
type Examination struct {
	Kind    string           `json:"kind"` // where snapshots are kept, in a few words
	Free    backup.Bytes     `json:"free"` // there; 0 with Size 0: no limit
	Size    backup.Bytes     `json:"size"`
	Need    backup.Bytes     `json:"need"` // with less than this free, Prepare refuses
	Volumes []ExaminedVolume `json:"volumes"`
	Notes   []string         `json:"notes,omitempty"`
}

// ExaminedVolume is what was seen of one volume.
type ExaminedVolume struct {
	ID       backup.VolumeID `json:"id"`
	Extents  int64           `json:"extents"`
	Estimate time.Duration   `json:"estimate"` // of its snapshot; Cut.Estimate is the largest
}
