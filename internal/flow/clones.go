package flow

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/flow/restore"
	"cleancut/internal/host"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// The states of a clone.
const (
	CloneReady        = "ready"
	CloneExpired      = "expired" // its lease has ended; Down may say more
	CloneDown         = "down"    // Down says what is not there
	CloneBeingMade    = "being made"
	CloneBeingRemoved = "being removed"
	CloneHalfMade     = "half made"    // nobody is at it; sweep removes it
	CloneHalfRemoved  = "half removed" // the same
	CloneLedgerLost   = "ledger lost"  // sweep removes it, or puts the ledger back where somebody uses it
)

// CloneStatus is what there is to know of a clone.
type CloneStatus struct {
	Name    string    `json:"name"`
	State   string    `json:"state"`
	Down    string    `json:"down,omitempty"` // why its server does not answer; "" where it does
	ID      backup.ID `json:"id"`             // of the copy
	Backup  backup.ID `json:"backup"`         // that was asked for
	MadeOf  backup.ID `json:"made_of"`        // the same, or its golden image
	Golden  bool      `json:"golden"`
	Cluster string    `json:"cluster"`
	Owner   string    `json:"owner"`
	Purpose string    `json:"purpose"`
	Masked  []string  `json:"masked"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Longest time.Time `json:"longest"` // it cannot be extended beyond
	// Sessions is nil where its server runs and could not be asked.
	Sessions      *postgres.Sessions `json:"sessions"`
	Root          string             `json:"root"`
	DataDirectory string             `json:"data_directory"`
	SocketDir     string             `json:"socket_dir"`
	Port          int                `json:"port"`
	Superuser     string             `json:"superuser"`
	Major         int                `json:"major"`
	Listen        string             `json:"listen,omitempty"`
	Answered      float64            `json:"seconds_restore_to_first_query"`
}

// Clones returns the status of every clone of this cluster on this host, oldest
// first; those whose ledger is lost come last. Unreadable ledgers are named in
// the error, with the others returned all the same.
func (f *Flow) Clones(ctx context.Context) ([]CloneStatus, error) {
	out := []CloneStatus{}
	inv, err := f.Provider.List(ctx, nil) // before the ledgers, which are older: see SweepFacts
	if err != nil {
		return out, err
	}
	copies, unread := f.State.Copies()
	for _, c := range copies {
		if c.Clone != nil && c.Cluster == f.Cluster {
			out = append(out, f.cloneStatus(ctx, c, volumesOf(inv, c.ID)))
		}
	}
	lost, err := f.lost(ctx, inv, copies)
	if err != nil {
		return out, errors.Join(err, unread)
	}
	for _, l := range lost {
		s := f.cloneStatus(ctx, l.Copy, volumesOf(inv, l.Copy.ID))
		s.State = CloneLedgerLost
		out = append(out, s)
	}
	slices.SortStableFunc(out, func(a, b CloneStatus) int {
		return cmp.Or(cmp.Compare(btoi(a.State == CloneLedgerLost), btoi(b.State == CloneLedgerLost)), a.Created.Compare(b.Created))
	})
	return out, unread
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Clone returns the status of one, also where its ledger is lost.
func (f *Flow) Clone(ctx context.Context, name string) (CloneStatus, error) {
	list, err := f.Clones(ctx)
	if i := slices.IndexFunc(list, func(s CloneStatus) bool { return s.Name == name }); i >= 0 {
		return list[i], ctx.Err()
	}
	_, missing := f.cloneNamed(name)
	return CloneStatus{}, errors.Join(missing, err)
}

// cloneStatus looks at one clone. That its server does not answer is part of
// the answer.
func (f *Flow) cloneStatus(ctx context.Context, c backup.Copy, volumes []provider.Volume) CloneStatus {
	s := f.describeClone(c)
	if !c.Ready {
		s.State = f.halfState(c)
		return s
	}
	asked, err := f.sessions(ctx, c)
	if s.Down = restore.Down(c, volumes); s.Down == "" && err != nil {
		s.Down = err.Error()
	}
	if asked == nil && err == nil {
		asked, s.Down = &postgres.Sessions{}, cmp.Or(s.Down, "its server does not run")
	}
	s.Sessions = asked
	if s.Down != "" && s.State == CloneReady {
		s.State = CloneDown
	}
	return s
}

// describeClone is the status of a clone whose server has just answered and that
// nobody uses yet.
func (f *Flow) describeClone(c backup.Copy) CloneStatus {
	s := CloneStatus{Name: c.Clone.Name, State: CloneReady, ID: c.ID, Backup: c.Clone.Of, MadeOf: c.Backup, Golden: c.Clone.Golden, Cluster: c.Cluster, Owner: c.Clone.Owner, Purpose: c.Clone.Purpose,
		Masked: c.Clone.Masked, Created: c.Created, Expires: c.Clone.Expires, Longest: c.Clone.Longest, Sessions: &postgres.Sessions{}, Root: c.Root, DataDirectory: c.DataDirectory,
		SocketDir: c.SocketDir, Port: c.Port, Superuser: c.Superuser, Major: c.Major, Listen: c.Clone.Listen, Answered: c.Answered}
	if c.Clone.Expired(f.now()) {
		s.State = CloneExpired
	}
	return s
}

// halfState tells how far a clone is that is not ready. The ledger has a port
// only of one that was ready once.
func (f *Flow) halfState(c backup.Copy) string {
	busy, idle := CloneBeingMade, CloneHalfMade
	if c.Port != 0 {
		busy, idle = CloneBeingRemoved, CloneHalfRemoved
	}
	release, err := f.State.Lock(lockCopy(c.ID))
	if err != nil {
		return busy
	}
	release()
	return idle
}

// sessions asks a clone who uses it; nil: no server runs there.
func (f *Flow) sessions(ctx context.Context, c backup.Copy) (*postgres.Sessions, error) {
	runs, err := postgres.Runs(c.Root)
	if err != nil || !runs {
		return nil, err
	}
	i, err := openSoon(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("its server runs and does not answer: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, standbyPatience)
	defer cancel()
	s, err := i.Sessions(ctx)
	if err != nil {
		return nil, fmt.Errorf("its server runs and does not answer: %w", err)
	}
	return &s, nil
}

// openSoon opens the server of a copy that should answer at once.
func openSoon(ctx context.Context, c backup.Copy) (*postgres.Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, standbyPatience)
	defer cancel()
	return postgres.Open(ctx, c.Root)
}

// usedBy says what keeps a clone from being ended without force; "": nothing.
func (f *Flow) usedBy(ctx context.Context, c backup.Copy) string {
	s, err := f.sessions(ctx, c)
	switch {
	case err != nil && c.Ready:
		return err.Error()
	case s != nil && s.Count > 0:
		return sessionsText(*s)
	}
	return ""
}

func sessionsText(s postgres.Sessions) string {
	return fmt.Sprintf("%d sessions, the newest query %s ago", s.Count, time.Duration(*s.Newest*float64(time.Second)).Round(time.Second))
}

// cloneNamed finds a clone of this cluster and does not lock it.
func (f *Flow) cloneNamed(name string) (backup.Copy, error) {
	copies, err := f.State.Copies()
	for _, c := range copies {
		if c.Clone == nil || c.Clone.Name != name {
			continue
		}
		if c.Cluster != f.Cluster {
			return c, backup.Hint(fmt.Errorf("clone %s is of cluster %s: %w", name, c.Cluster, backup.ErrNotFound), "say --cluster "+c.Cluster)
		}
		return c, nil
	}
	return backup.Copy{}, errors.Join(backup.Hint(fmt.Errorf("no clone %s on this host: %w", name, backup.ErrNotFound), "`cleancut clone list` shows them; one whose ledger is lost is for `cleancut sweep`"), err)
}

// lockedClone finds and locks a clone. The ledger is as it is under the lock.
func (f *Flow) lockedClone(name string) (backup.Copy, func(), error) {
	c, err := f.cloneNamed(name)
	if err != nil {
		return c, nil, err
	}
	release, err := f.State.Lock(lockCopy(c.ID))
	if err != nil {
		return c, nil, fmt.Errorf("clone %s is being worked on: %w", name, err)
	}
	if c, err = f.cloneNamed(name); err != nil {
		release()
		return c, nil, err
	}
	return c, release, nil
}

func (f *Flow) readyClone(name string) (backup.Copy, func(), error) {
	c, release, err := f.lockedClone(name)
	if err == nil && !c.Ready {
		release()
		err = backup.Hint(fmt.Errorf("clone %s is half made or half removed: %w", name, backup.ErrIncomplete), "`cleancut sweep` removes it")
	}
	return c, release, err
}

func volumesOf(inv provider.Inventory, id backup.ID) []provider.Volume {
	return slices.DeleteFunc(slices.Clone(inv.Volumes), func(v provider.Volume) bool { return v.Tags[backup.TagCopy] != string(id) })
}

// record is what lies in a clone's own folder beside its ledger.
type record struct {
	State string `json:"state"` // folder with the ledger
	backup.Copy
}

func recordOf(root string) string { return filepath.Join(root, postgres.Private, "copy.json") }

// save writes a copy's ledger and, of a clone, the record in its own folder, by
// which it is known should the ledger be lost.
func (f *Flow) save(c backup.Copy) error {
	if err := f.State.PutCopy(c); err != nil || c.Clone == nil {
		return err
	}
	b, err := json.MarshalIndent(record{State: f.State.Path(), Copy: c}, "", "  ")
	if err != nil {
		return fmt.Errorf("record of copy %s: %w", c.ID, err)
	}
	if err := os.Mkdir(c.PrivateDir(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("record of copy %s: %w", c.ID, err)
	}
	return host.PlaceFile(recordOf(c.Root), append(b, '\n'), 0o600, os.Geteuid(), os.Getegid())
}

// LostCopy is a clone without a ledger.
type LostCopy struct {
	Copy backup.Copy
	Used bool // somebody works with it, or that cannot be told
}

// lost finds the clones of this host whose ledger is missing: by the tags of
// their volumes, whose mounts, or the folders for clones, lead to the record
// that lies beside each. A volume that leads to none proves nothing and is not
// among them.
func (f *Flow) lost(ctx context.Context, inv provider.Inventory, ledgers []backup.Copy) (map[backup.ID]LostCopy, error) {
	out := map[backup.ID]LostCopy{}
	devices := map[backup.ID][]string{}
	for _, v := range inv.Volumes {
		id := backup.ID(v.Tags[backup.TagCopy])
		if id == "" || v.Tags[backup.TagHost] != f.Host || v.Tags[backup.TagCluster] != f.Cluster || v.Tags[backup.TagStorage] != "" ||
			slices.ContainsFunc(ledgers, func(c backup.Copy) bool { return c.ID == id }) {
			continue
		}
		devices[id] = append(devices[id], v.Attached)
	}
	if len(devices) == 0 {
		return out, nil
	}
	standard, err := filepath.Glob(filepath.Join(f.State.Path(), "clones", "*"))
	if err != nil {
		return out, err
	}
	for id, attached := range devices {
		attached = slices.DeleteFunc(attached, func(d string) bool { // attached nowhere, to another host, or gone since
			_, err := os.Stat(d)
			return !strings.HasPrefix(d, "/dev/") || err != nil
		})
		mounts, err := host.MountsOver(attached)
		if err != nil {
			return out, fmt.Errorf("volumes of copy %s: %w", id, err)
		}
		roots := slices.Clone(standard)
		for _, m := range mounts {
			for dir := m.Mountpoint; dir != "/"; dir = filepath.Dir(dir) {
				roots = append(roots, dir)
			}
		}
		for _, root := range roots {
			if c, ok := f.recorded(root, id); ok {
				out[id] = LostCopy{Copy: c, Used: f.usedBy(ctx, c) != ""}
				break
			}
		}
	}
	return out, nil
}

// recorded reads the record below root and returns it if it is of that copy and
// that folder, and was written by this program: the folder belongs to the
// clone's server, who can put files there but none of ours. A record whose
// ledger is there, in another state folder, is of a clone that is not lost.
func (f *Flow) recorded(root string, id backup.ID) (c backup.Copy, ok bool) {
	file, err := os.OpenFile(recordOf(root), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return c, false
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return c, false
	}
	if st, is := info.Sys().(*syscall.Stat_t); !is || int(st.Uid) != os.Geteuid() {
		return c, false
	}
	b, err := io.ReadAll(io.LimitReader(file, 1<<20))
	var r record
	if err != nil || json.Unmarshal(b, &r) != nil || r.ID != id || r.Root != root || r.Host != f.Host || r.Cluster != f.Cluster || r.Clone == nil || r.Production != nil {
		return c, false
	}
	_, err = os.Stat(filepath.Join(r.State, "copies", string(id)+".json"))
	return r.Copy, errors.Is(err, os.ErrNotExist)
}
