package backup

import (
	"path/filepath"
	"strings"
	"time"
)

// Purpose says why a copy exists, and so whether it may go when its maker is
// dead.
type Purpose string

// The purposes. Copies for verify, dump and golden are removed by whoever made them,
// or by sweep.
const (
	ForRestore Purpose = "restore" // stays until it is removed on request
	ForVerify  Purpose = "verify"
	ForDump    Purpose = "dump"
	ForStandby Purpose = "standby" // stays, like ForRestore, and follows a primary
	ForClone   Purpose = "clone"   // stays until its lease ends, see Clone
	ForGolden  Purpose = "golden"  // a golden image is cut from it
)

// Copy is a cluster made from a backup on some host. It is written to the
// host's state before the first volume is made and updated along the way: it
// is the ledger by which the copy is taken down again.
type Copy struct {
	ID            ID               `json:"id"`
	Backup        ID               `json:"backup"`
	Cluster       string           `json:"cluster"`
	Host          string           `json:"host"`
	Purpose       Purpose          `json:"purpose"`
	Root          string           `json:"root"` // folder below which everything of the copy is
	Created       time.Time        `json:"created"`
	Ready         bool             `json:"ready"` // recovered and handed over; before that, sweep may remove it
	Volumes       []CopyVolume     `json:"volumes"`
	Filesystems   []CopyFilesystem `json:"filesystems"`
	DataDirectory string           `json:"data_directory"`
	Major         int              `json:"major"`
	SocketDir     string           `json:"socket_dir"`
	Port          int              `json:"port"`
	Superuser     string           `json:"superuser"`
	EndOfRecovery LSN              `json:"end_of_recovery"`
	FirstQuery    float64          `json:"seconds_to_first_query"`         // from the server's start
	Answered      float64          `json:"seconds_restore_to_first_query"` // from Created
	Hydrated      *Hydration       `json:"hydrated"`                       // nil: nobody read the volumes through
	Production    *Production      `json:"production,omitempty"`           // only ForProduction
	Standby       *Standby         `json:"standby,omitempty"`              // of ForStandby
	Clone         *Clone           `json:"clone,omitempty"`                // of ForClone
}

// Standby is what makes a copy follow a primary.
type Standby struct {
	// Primary is a connection string (libpq) without a password; where there is
	// one, the string names a passfile below the copy's root.
	Primary string           `json:"primary"`
	System  SystemIdentifier `json:"system_identifier"` // of the primary
	Slot    string           `json:"slot"`              // replication slot on the primary; "": it is dropped
	Name    string           `json:"name"`              // application_name, and cluster_name
	Listen  string           `json:"listen,omitempty"`  // ADDRESS:PORT
}

// Hydration is how far the volumes of a copy were read through.
type Hydration struct {
	Complete     bool             `json:"complete"`                              // every byte of every volume
	Size         Bytes            `json:"size"`                                  // of all volumes
	Bytes        Bytes            `json:"bytes"`                                 // that were read
	Seconds      float64          `json:"seconds"`                               // of the reading
	SinceRestore float64          `json:"seconds_restore_to_hydrated,omitempty"` // from Copy.Created; only when complete
	Volumes      []HydratedVolume `json:"volumes"`
}

// HydratedVolume is one volume of a Hydration.
type HydratedVolume struct {
	Volume  VolumeID `json:"volume"`
	Device  string   `json:"device"`
	Size    Bytes    `json:"size"`
	Bytes   Bytes    `json:"bytes"`
	Seconds float64  `json:"seconds"`
	Error   string   `json:"error,omitempty"`
}

// CopyVolume is one member of a copy.
type CopyVolume struct {
	Member   int        `json:"member"`
	Snapshot SnapshotID `json:"snapshot"`
	Volume   VolumeID   `json:"volume"`
	Device   string     `json:"device"`
}

// CopyFilesystem is one filesystem of a copy, in the order of the topology.
type CopyFilesystem struct {
	Type       string `json:"type"`
	Device     string `json:"device"`
	Mountpoint string `json:"mountpoint"`
}

// Path returns where a path of the original is in the copy: everything keeps
// its place below the copy's root.
func (c Copy) Path(original string) string { return filepath.Join(c.Root, original) }

// Original returns what a path in the copy is on production; a path that is
// not in the copy is returned as it is.
func (c Copy) Original(inCopy string) string {
	if rel, ok := strings.CutPrefix(inCopy, c.Root+"/"); ok {
		return "/" + rel
	}
	return inCopy
}

// Stays reports whether the copy is handed over and goes only when somebody
// asks for it.
func (c Copy) Stays() bool {
	return c.Ready && (c.Purpose == ForRestore || c.Purpose == ForStandby || c.Purpose == ForClone)
}

// PrivateDir is the folder for what cleancut itself puts beside the cluster:
// socket, configuration, log.
func (c Copy) PrivateDir() string { return filepath.Join(c.Root, ".cleancut") }

// Tags is what every volume of the copy carries.
func (c Copy) Tags() Tags {
	return Tags{TagCopy: string(c.ID), TagBackup: string(c.Backup), TagCluster: c.Cluster, TagHost: c.Host}
}
