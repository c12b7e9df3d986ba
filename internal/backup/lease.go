package backup

import (
	"fmt"
	"time"
)

// What holds of clones where the configuration says nothing else.
const (
	DefaultTTL    = Span(8 * time.Hour)
	DefaultMaxTTL = Span(7 * 24 * time.Hour) // from its creation, extensions included
	DefaultClones = 10                       // on one host at the same time
)

// Clone is what makes a copy one that people use: a name, an owner and a
// lease. It goes when its lease has ended, or on request.
type Clone struct {
	Name    string    `json:"name"` // unique among the host's clones
	Owner   string    `json:"owner,omitempty"`
	Purpose string    `json:"purpose,omitempty"` // what it is for, free text
	Of      ID        `json:"of"`                // backup that was asked for; Copy.Backup is what it was made of
	Golden  bool      `json:"golden"`            // made of the golden image of that backup
	Expires time.Time `json:"expires"`
	Longest time.Time `json:"longest"` // Expires is never later
	Masked  []string  `json:"masked"`  // names of the mask files that were run
	Listen  string    `json:"listen,omitempty"`
}

// CheckCloneName refuses names that cannot be a folder. The error wraps
// ErrUsage.
func CheckCloneName(name string) error {
	if !clusterPattern.MatchString(name) {
		return fmt.Errorf("%w: clone name %q: use 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit", ErrUsage, name)
	}
	return nil
}

// Lease gives a clone that is made now its end and the latest end it can ever
// have. The error wraps ErrUsage.
func Lease(now time.Time, ttl, longest Span) (expires, latest time.Time, err error) {
	latest = now.Add(time.Duration(longest))
	switch {
	case ttl <= 0:
		return expires, latest, fmt.Errorf("%w: a lease of %s: it must be above zero", ErrUsage, ttl)
	case ttl > longest:
		return expires, latest, Hint(fmt.Errorf("%w: a lease of %s is longer than %s, the longest here", ErrUsage, ttl, longest), "the administrator sets it: max_ttl under [clone] in the configuration")
	}
	return now.Add(time.Duration(ttl)), latest, nil
}

// Expired reports whether the lease has ended at that moment.
func (c Clone) Expired(now time.Time) bool { return !now.Before(c.Expires) }

// Extend lets the clone stand until a moment that is later than its end so far
// and later than now. One that has expired and still stands can be extended.
// The error wraps ErrUsage and names the latest possible moment.
func (c *Clone) Extend(now, until time.Time) error {
	latest := c.Longest.UTC().Format(time.RFC3339)
	switch {
	case until.After(c.Longest):
		return Hint(fmt.Errorf("%w: clone %s cannot stand until %s: %s is the latest possible moment", ErrUsage, c.Name, until.UTC().Format(time.RFC3339), latest),
			"make another clone, or ask the administrator: max_ttl under [clone] in the configuration counts from the creation")
	case !until.After(now):
		return fmt.Errorf("%w: clone %s until %s: that has passed (%s is the latest possible moment)", ErrUsage, c.Name, until.UTC().Format(time.RFC3339), latest)
	case !until.After(c.Expires):
		return fmt.Errorf("%w: clone %s stands until %s already, which is not before %s", ErrUsage, c.Name, c.Expires.UTC().Format(time.RFC3339), until.UTC().Format(time.RFC3339))
	}
	c.Expires = until
	return nil
}
