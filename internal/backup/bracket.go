package backup

import (
	"errors"
	"fmt"
	"time"
)

// Bracket is the backup mode around a cut whose filesystems were each cut at
// one instant, but not all at the same one. Recovery begins at the label's
// checkpoint and must reach End; domain.md 1.2 to 1.6 have the reasons.
type Bracket struct {
	StartLSN LSN       `json:"start_lsn"` // the redo position of the checkpoint in Label
	StopLSN  LSN       `json:"stop_lsn"`  // as pg_backup_stop returned it
	Timeline uint32    `json:"timeline"`  // of both
	Started  time.Time `json:"started"`   // its start was asked for
	Stopping time.Time `json:"stopping"`  // its end was asked for: what was acknowledged before lies before StopLSN
	Stopped  time.Time `json:"stopped"`   // its end had come
	// Label and Map are backup_label and tablespace_map, byte for byte as the
	// server gave them; Map is empty without tablespaces.
	Label []byte `json:"label"`
	Map   []byte `json:"tablespace_map,omitempty"`
	// Control is pg_control of a standby, read after the last of the cuts. A
	// standby writes no end of backup into the WAL; there its minimum recovery
	// point is the end, which the image's own pg_control may be too old to know.
	Control []byte `json:"pg_control,omitempty"`
	// End is where recovery becomes consistent: StopLSN, or the minimum recovery
	// point of Control.
	End LSN `json:"end_lsn"`
	// WAL names the segments from StartLSN to End, which lie beside the
	// manifest in the catalog: the backup needs no archive.
	WAL []string `json:"wal"`
}

// Standby: the backup was taken from a standby.
func (b Bracket) Standby() bool { return len(b.Control) > 0 }

// validate checks what a reader relies on.
func (b Bracket) validate() error {
	switch {
	case len(b.Label) == 0:
		return errors.New("bracket without a label")
	case b.StartLSN == 0 || b.StopLSN < b.StartLSN || b.End < b.StartLSN:
		return fmt.Errorf("bracket from %s to %s, consistent at %s", b.StartLSN, b.StopLSN, b.End)
	case b.Timeline == 0:
		return errors.New("bracket without a timeline")
	case len(b.WAL) == 0:
		return errors.New("bracket without WAL")
	case b.Stopping.Before(b.Started) || b.Stopped.Before(b.Stopping):
		return fmt.Errorf("bracket from %s to %s", b.Started, b.Stopped)
	}
	return nil
}
