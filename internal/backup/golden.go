package backup

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
)

// Golden says of which backup an image is: one that was recovered, checked, shut
// down and snapshotted again, so that copies of it start without recovery. Its
// places and mount points are production's, all identities below them are those
// of the copy it was cut from.
type Golden struct {
	Of     ID      `json:"of"`
	Digest string  `json:"manifest_sha256"` // of that backup's manifest
	Checks []Check `json:"checks"`          // of the copy it was cut from; none failed
}

func (g Golden) validate() error {
	if _, err := ParseID(string(g.Of)); err != nil {
		return fmt.Errorf("golden image: %w", err)
	}
	if b, err := hex.DecodeString(g.Digest); err != nil || len(b) != sha256.Size {
		return fmt.Errorf("golden image: digest %q", g.Digest)
	}
	if !(Verdict{Checks: g.Checks}).Good() {
		return fmt.Errorf("golden image of %s: no check passed, or one failed", g.Of)
	}
	return nil
}

// GoldenID is the one ID that the golden image of a backup has, given the digest
// of the backup's manifest: of its second, so that it sorts with the backup. That
// there is one only lets the catalog's put-if-absent decide between two hosts
// that make the image at once.
func GoldenID(of ID, digest string) ID {
	sum := sha256.Sum256([]byte("golden " + string(of) + " " + digest))
	return of[:len(of)-6] + ID(hex.EncodeToString(sum[:3]))
}

// GoldenCandidate is what PlanGolden knows of a golden image.
type GoldenCandidate struct {
	ID    ID
	Of    ID
	Begun string // an intent names it: somebody makes or deletes it, or did
	Held  string
	InUse string
}

// PlanGolden decides which golden images stay: those of the backups that stay,
// and those that are held or in use. It is pure.
func PlanGolden(all []GoldenCandidate, stays func(ID) bool) (keep, remove []Choice) {
	for _, g := range all {
		var why []string
		add := func(is bool, reason string) {
			if is {
				why = append(why, reason)
			}
		}
		add(stays(g.Of), "golden image of backup "+string(g.Of))
		add(g.Begun != "", "left alone: "+g.Begun)
		add(g.Held != "", g.Held)
		add(g.InUse != "", "in use: "+g.InUse)
		if len(why) > 0 {
			keep = append(keep, Choice{ID: g.ID, Why: why})
		} else {
			remove = append(remove, Choice{ID: g.ID, Why: []string{"golden image of backup " + string(g.Of) + ", which does not stay"}})
		}
	}
	slices.SortFunc(keep, byID)
	slices.SortFunc(remove, byID)
	return keep, remove
}

func byID(a, b Choice) int {
	if a.ID < b.ID {
		return -1
	}
	return 1
}
