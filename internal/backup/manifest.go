package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// ManifestVersion is the version this program writes. docs/manifest.md
// describes every version ever written.
const ManifestVersion = 5

// Consistency is what a cut achieved; design.md, "two sound ways".
type Consistency string

// The three outcomes. Torn is made by the drill only and restored by nothing
// else.
const (
	Atomic    Consistency = "atomic"
	Bracketed Consistency = "bracketed"
	Torn      Consistency = "torn"
)

// Mode is a way of cutting.
type Mode string

// The modes. ModeNone cuts without any protection and belongs to the drill;
// nobody asks for ModeStill.
const (
	ModeAuto      Mode = "auto"
	ModeGroup     Mode = "group"
	ModeFreeze    Mode = "freeze"
	ModeBracketed Mode = "bracketed"
	ModeNone      Mode = "none"
	ModeStill     Mode = "still" // a golden image's: nothing is mounted, so nobody writes
)

// Manifest is the record of one backup's cut: all that a restore needs to
// know besides the snapshots themselves. Written once, after the thaw.
type Manifest struct {
	Version   int        `json:"version"`
	ID        ID         `json:"id"`
	Cluster   string     `json:"cluster"`
	Tool      string     `json:"tool"` // version of cleancut
	Host      string     `json:"host"`
	Created   time.Time  `json:"created"`
	Server    Server     `json:"server"`
	Topology  Topology   `json:"topology"`
	Cut       Cut        `json:"cut"`
	Bracket   *Bracket   `json:"bracket,omitempty"` // of a bracketed cut, and only there
	Snapshots []Snapshot `json:"snapshots"`
	SideFiles []SideFile `json:"side_files,omitempty"`
	Golden    *Golden    `json:"golden,omitempty"` // of a golden image, and only there
}

// Server is what was known of the running server when it was cut.
type Server struct {
	SystemIdentifier SystemIdentifier  `json:"system_identifier"`
	VersionNum       int               `json:"version_num"` // server_version_num
	Version          string            `json:"version"`
	Timeline         uint32            `json:"timeline"`
	BlockSize        Bytes             `json:"block_size"`
	WALBlockSize     Bytes             `json:"wal_block_size"`
	WALSegmentSize   Bytes             `json:"wal_segment_size"`
	DataChecksums    bool              `json:"data_checksums"`
	DataDirectory    string            `json:"data_directory"` // real path
	UID              uint32            `json:"uid"`            // numeric owner of the data directory
	GID              uint32            `json:"gid"`
	User             string            `json:"user,omitempty"` // name of that owner on the server's host, if it has one
	Superuser        string            `json:"superuser"`      // role the backup connected as
	Settings         map[string]string `json:"settings"`       // settings that differ from the built-in defaults, secrets left out
	Databases        []Database        `json:"databases"`
	Unlogged         []string          `json:"unlogged,omitempty"` // database.schema.table; they come back empty
	Notes            []string          `json:"notes,omitempty"`    // what preflight found worth telling
}

// Major returns the major version: 15 for 15.18.
func (s Server) Major() int { return s.VersionNum / 10000 }

// Database is one database of the cluster.
type Database struct {
	Name string `json:"name"`
	Size Bytes  `json:"size"`
}

// Cut is what was achieved and how, never what was asked for.
type Cut struct {
	Achieved Consistency `json:"achieved"`
	How      Mode        `json:"how"` // freeze, group, bracketed, none, still
	// FlushLSN is the end of a WAL record that was flushed before the freeze
	// began, in a bracketed cut the bracket's End, of a golden image the
	// checkpoint of its shutdown. Recovery must reach it: below it acknowledged
	// commits are lost.
	FlushLSN   LSN           `json:"flush_lsn"`
	Deadline   time.Duration `json:"deadline_ns"`
	SyncRounds []float64     `json:"sync_rounds_ms"` // syncfs before the freeze, milliseconds
	Frozen     []Frozen      `json:"frozen,omitempty"`
	FreezeMS   float64       `json:"freeze_ms"` // first FIFREEZE called to last FITHAW returned; bracketed: the longest of the cuts
	SpreadMS   float64       `json:"spread_ms"` // first to last snapshot request
	Notes      []string      `json:"notes,omitempty"`
}

// Frozen is the freeze of one filesystem.
type Frozen struct {
	Mountpoint string    `json:"mountpoint"`
	Called     time.Time `json:"called"` // FIFREEZE called
	Held       time.Time `json:"held"`   // FIFREEZE returned
	Thawed     time.Time `json:"thawed"` // FITHAW returned
}

// Snapshot is the image of one member.
type Snapshot struct {
	ID        SnapshotID `json:"id"`
	Volume    Volume     `json:"volume"`
	Member    int        `json:"member"` // Member.Index in the topology
	Requested time.Time  `json:"requested"`
	Responded time.Time  `json:"responded"`
}

// Span is the interval that holds the backup's one instant: the freeze, in a
// group the provider's call, in a bracketed one the end of backup mode. What
// was acknowledged before its beginning is in the backup, what was sent after
// its end is not.
func (m Manifest) Span() (from, to time.Time) {
	if m.Bracket != nil {
		return m.Bracket.Stopping, m.Bracket.Stopped
	}
	widen := func(a, b time.Time) {
		if from.IsZero() || a.Before(from) {
			from = a
		}
		if b.After(to) {
			to = b
		}
	}
	for _, f := range m.Cut.Frozen {
		widen(f.Called, f.Thawed)
	}
	if len(m.Cut.Frozen) == 0 {
		for _, s := range m.Snapshots {
			widen(s.Requested, s.Responded)
		}
	}
	return from, to
}

// SideFile is a file of the cluster that no volume of it holds, kept in the
// catalog beside the manifest.
type SideFile struct {
	Path   string `json:"path"` // where it was
	Name   string `json:"name"` // below the backup's files/ in the catalog
	SHA256 string `json:"sha256"`
	// Mode is the file's permissions, octal, UID and GID its owner. Mode is
	// empty in manifests before version 4, which do not know them.
	Mode string `json:"mode,omitempty"`
	UID  uint32 `json:"uid,omitempty"`
	GID  uint32 `json:"gid,omitempty"`
}

// Complete is the second fact of a backup: every snapshot is durable.
type Complete struct {
	ID        ID        `json:"id"`
	Digest    string    `json:"manifest_sha256"`
	Completed time.Time `json:"completed"`
}

// EncodeManifest returns the bytes to store, which Digest is taken of.
func EncodeManifest(m Manifest) ([]byte, error) {
	if m.Version != ManifestVersion {
		return nil, fmt.Errorf("encode manifest: version %d, this cleancut writes %d", m.Version, ManifestVersion)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// Digest returns the SHA-256 of a stored manifest in hexadecimal.
func Digest(manifest []byte) string {
	sum := sha256.Sum256(manifest)
	return hex.EncodeToString(sum[:])
}

// DecodeManifest reads every version ever written. A newer version, unknown
// keys, bytes cut short or contents that do not hold together are errors; the
// version is looked at first, so that a newer manifest is named as such.
func DecodeManifest(b []byte) (Manifest, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return Manifest{}, fmt.Errorf("manifest is cut short or no JSON: %w", err)
	}
	if head.Version > ManifestVersion {
		return Manifest{}, Hint(fmt.Errorf("manifest version %d, this cleancut reads up to %d: %w", head.Version, ManifestVersion, ErrUnsupported),
			"use the cleancut that wrote it, or a newer one")
	}
	if head.Version < 1 {
		return Manifest{}, fmt.Errorf("manifest has no version")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var m Manifest
	if err := dec.Decode(&m); err != nil {
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	if dec.More() {
		return Manifest{}, fmt.Errorf("manifest: more than one JSON value")
	}
	return m, m.Validate()
}

// Validate checks that the manifest holds together: one snapshot for every
// member, known consistency, a topology whose indexes fit.
func (m Manifest) Validate() error {
	if _, err := ParseID(string(m.ID)); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	if err := CheckClusterName(m.Cluster); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	if err := m.Topology.Validate(); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	if a := m.Cut.Achieved; a != Atomic && a != Bracketed && a != Torn {
		return fmt.Errorf("manifest: consistency %q", a)
	}
	if (m.Cut.Achieved == Bracketed) != (m.Bracket != nil) {
		return fmt.Errorf("manifest: the cut is %s, and there is a bracket: %t", m.Cut.Achieved, m.Bracket != nil)
	}
	if m.Bracket != nil {
		if err := m.Bracket.validate(); err != nil {
			return fmt.Errorf("manifest: %w", err)
		}
	}
	if (m.Cut.How == ModeStill) != (m.Golden != nil) {
		return fmt.Errorf("manifest: cut by %q, and it is of a golden image: %t", m.Cut.How, m.Golden != nil)
	}
	if m.Golden != nil {
		if err := m.Golden.validate(); err != nil {
			return fmt.Errorf("manifest: %w", err)
		}
	}
	return CheckSet(m.Topology.Members(), m.Snapshots)
}

// CheckSet demands exactly one snapshot for every member and none beside. The
// error wraps ErrVoid.
func CheckSet(members []Member, snaps []Snapshot) error {
	have := map[int]SnapshotID{}
	ids := map[SnapshotID]bool{}
	for _, s := range snaps {
		if s.Member < 0 || s.Member >= len(members) || members[s.Member].Volume.ID != s.Volume.ID {
			return fmt.Errorf("snapshot %s of volume %s fits no member: %w", s.ID, s.Volume.ID, ErrVoid)
		}
		if have[s.Member] != "" || s.ID == "" || ids[s.ID] {
			return fmt.Errorf("member %d has more than one snapshot or a repeated one (%q): %w", s.Member, s.ID, ErrVoid)
		}
		have[s.Member], ids[s.ID] = s.ID, true
	}
	for _, m := range members {
		if have[m.Index] == "" {
			return fmt.Errorf("volume %s (member %d of %d) has no snapshot: %w", m.Volume.ID, m.Index, len(members), ErrVoid)
		}
	}
	return nil
}
