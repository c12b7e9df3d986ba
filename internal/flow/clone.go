package flow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/fault"
	"cleancut/internal/flow/restore"
	"cleancut/internal/postgres"
)

// CloneOptions says what to make a clone of and for whom.
type CloneOptions struct {
	ID            backup.ID
	Root          string // its folder; "": clones/NAME below the state folder
	Name          string // unique on this host
	Owner         string
	Purpose       string      // free text
	TTL           backup.Span // 0: backup.DefaultTTL, or MaxTTL where that is shorter
	MaxTTL        backup.Span // 0: backup.DefaultMaxTTL
	Most          int         // clones that may stand on this host; 0: backup.DefaultClones
	Golden        bool        // make it of the golden image of the backup, which is made if there is none
	Mask          []string    // files that are run before anybody else can connect
	KeepPasswords bool        // of the roles
	Listen        string      // ADDRESS:PORT for clients with passwords; "": only the socket
}

// now is the clock of leases.
func (f *Flow) now() time.Time {
	if f.Now != nil {
		return f.Now().UTC()
	}
	return time.Now().UTC()
}

// CreateClone makes a copy that people use until its lease ends:
//
//	refused what can be → golden image → Restore → disarm → mask → gate open → ready
//
// The ledger has its name and lease before the first volume is made. Nobody
// can connect before all masks ran. On an error nothing of it is left (a golden
// image stays), or the error wraps backup.ErrLeft.
func (f *Flow) CreateClone(ctx context.Context, o CloneOptions) (s CloneStatus, err error) {
	if err := f.checkClone(&o); err != nil {
		return s, err
	}
	release, err := f.State.Lock("clone-" + o.Name)
	if err != nil {
		return s, backup.Hint(fmt.Errorf("clone %s is just being made: %w", o.Name, err), "choose another name")
	}
	defer release()
	if err := f.roomForClone(o); err != nil {
		return s, err
	}
	of := o.ID
	if o.Golden {
		if of, err = f.Golden(ctx, o.ID); err != nil {
			return s, err
		}
	}
	clone := &backup.Clone{Name: o.Name, Owner: o.Owner, Purpose: o.Purpose, Of: o.ID, Golden: o.Golden, Masked: []string{}, Listen: o.Listen}
	if clone.Expires, clone.Longest, err = backup.Lease(f.now(), o.TTL, o.MaxTTL); err != nil {
		return s, err
	}
	r, unlock, err := f.Restore(ctx, RestoreOptions{ID: of, Root: o.Root, Purpose: backup.ForClone, Listen: o.Listen, clone: clone,
		first: func(c backup.Copy) error { return f.claim(ctx, o, c) },
		finish: func(ctx context.Context, i *postgres.Instance, c *backup.Copy) error {
			return f.handOver(ctx, o, i, c)
		}})
	if err != nil {
		return s, err
	}
	unlock()
	return f.describeClone(r.Copy), nil
}

// checkClone fills in what is left out and refuses what cannot be. It looks at
// no other clone.
func (f *Flow) checkClone(o *CloneOptions) error {
	o.MaxTTL, o.Most = cmp.Or(o.MaxTTL, backup.DefaultMaxTTL), cmp.Or(o.Most, backup.DefaultClones)
	o.TTL = cmp.Or(o.TTL, min(backup.DefaultTTL, o.MaxTTL))
	if err := errors.Join(backup.CheckCloneName(o.Name), postgres.CheckMask(o.Mask)); err != nil {
		return err
	}
	if o.Listen != "" {
		if err := postgres.CheckListen(o.Listen); err != nil {
			return err
		}
	}
	if _, _, err := backup.Lease(f.now(), o.TTL, o.MaxTTL); err != nil {
		return err
	}
	if o.Root == "" {
		o.Root = filepath.Join(f.State.Path(), "clones", o.Name)
	}
	var err error
	if o.Root, err = filepath.Abs(o.Root); err != nil {
		return err
	}
	return postgres.CheckRoot(o.Root)
}

// roomForClone refuses a name that is taken and one clone too many.
func (f *Flow) roomForClone(o CloneOptions) error {
	copies, err := f.State.Copies()
	if err != nil {
		return err
	}
	n := 0
	for _, c := range copies {
		if c.Clone == nil {
			continue
		}
		n++
		if c.Clone.Name == o.Name {
			return backup.Hint(fmt.Errorf("clone %s: %w: at %s, of backup %s of cluster %s", o.Name, backup.ErrExists, c.Root, c.Backup, c.Cluster), "choose another name, or end it with `cleancut clone destroy "+o.Name+"`")
		}
	}
	if n >= o.Most {
		return backup.Hint(fmt.Errorf("%d clones stand on this host, of %d at most: %w", n, o.Most, backup.ErrInUse), "end one of them (`cleancut clone list`, `cleancut clone reap`); max under [clone] in the configuration")
	}
	return nil
}

// claim writes the ledger of a new clone for the first time. Between the look
// at the others and that nobody else does the same.
func (f *Flow) claim(ctx context.Context, o CloneOptions, c backup.Copy) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		release, err := f.State.Lock("clones")
		if err == nil {
			defer release()
			break
		}
		if !errors.Is(err, backup.ErrInUse) {
			return err
		}
		select { // who holds it reads a few files and writes one
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := f.roomForClone(o); err != nil {
		return err
	}
	return f.save(c)
}

// handOver is all that is done between recovery and the first client.
func (f *Flow) handOver(ctx context.Context, o CloneOptions, i *postgres.Instance, c *backup.Copy) error {
	disarmed, err := i.Disarm(ctx)
	for _, done := range disarmed {
		f.tell("disarm", done)
	}
	if err != nil {
		return fmt.Errorf("disarm clone %s: %w", o.Name, err)
	}
	f.tell("mask", fmt.Sprintf("%d files", len(o.Mask)))
	if err = fault.Point(ctx, "clone.mask"); err == nil {
		err = i.Mask(ctx, postgres.MaskOptions{Files: o.Mask, KeepPasswords: o.KeepPasswords, Log: f.Log})
	}
	if err != nil {
		return fmt.Errorf("mask clone %s: %w", o.Name, err)
	}
	for _, file := range o.Mask {
		c.Clone.Masked = append(c.Clone.Masked, filepath.Base(file))
	}
	if err = fault.Point(ctx, "clone.gate"); err == nil {
		err = open(ctx, i, *c)
	}
	if err == nil {
		err = fault.Point(ctx, "clone.gate.done")
	}
	if err != nil {
		return fmt.Errorf("open clone %s: %w", o.Name, err)
	}
	return nil
}

// open lets clients in over TCP, if they are to come that way.
func open(ctx context.Context, i *postgres.Instance, c backup.Copy) error {
	if c.Clone.Listen == "" {
		return nil
	}
	return i.OpenGate(ctx, c.Clone.Listen)
}

// StartClone brings a clone up again whose server is down, also after a reboot:
// its volumes are attached, assembled, mounted and its server is started. One
// that answers is left alone. On an error the clone stays.
func (f *Flow) StartClone(ctx context.Context, name string) (s CloneStatus, err error) {
	c, release, err := f.readyClone(name)
	if err != nil {
		return s, err
	}
	defer release()
	inv, err := f.Provider.List(ctx, c.Tags())
	if err != nil {
		return s, err
	}
	if s = f.cloneStatus(ctx, c, inv.Volumes); s.Down == "" {
		return s, nil
	}
	entry, err := f.Catalog.Backup(ctx, c.Backup)
	if err != nil {
		return s, fmt.Errorf("start clone %s: %w", name, err)
	}
	inst, err := postgres.FindInstallation(ctx, c.Major, f.BinDirs)
	if err != nil {
		return s, err
	}
	c, i, err := restore.Reopen(ctx, f.Provider, restore.Options{Manifest: entry.Manifest, Copy: c, Installation: inst, Listen: c.Clone.Listen, Program: f.Program, Save: f.save, Progress: f.tell})
	if err == nil {
		err = open(ctx, i, c)
	}
	if err != nil {
		return s, backup.Hint(fmt.Errorf("clone %s stays down: %w", name, err), cmp.Or(backup.HintOf(err), "try again, or end it: cleancut clone destroy "+name))
	}
	return f.describeClone(c), nil
}

// ExtendClone lets a clone stand for ttl from now on or, with by, for ttl longer
// than so far. The latest possible moment was set when it was made.
func (f *Flow) ExtendClone(ctx context.Context, name string, ttl backup.Span, by bool) (s CloneStatus, err error) {
	c, release, err := f.readyClone(name)
	if err != nil {
		return s, err
	}
	defer release()
	from := f.now()
	if by {
		from = c.Clone.Expires
	}
	inv, err := f.Provider.List(ctx, c.Tags())
	if err != nil {
		return s, err
	}
	if err := c.Clone.Extend(f.now(), from.Add(time.Duration(ttl))); err != nil {
		return s, err
	}
	if err := f.save(c); err != nil {
		return s, err
	}
	return f.cloneStatus(ctx, c, inv.Volumes), nil
}

// DestroyClone removes a clone. One with sessions, or whose server runs and
// cannot be asked for them, is refused unless force is given.
func (f *Flow) DestroyClone(ctx context.Context, name string, force bool) (backup.Copy, error) {
	c, release, err := f.lockedClone(name)
	if err != nil {
		return c, err
	}
	defer release()
	if used := f.usedBy(ctx, c); used != "" && !force {
		return c, backup.Hint(fmt.Errorf("clone %s: %w: %s", name, backup.ErrInUse, used), "let them end, or use --force")
	}
	return c, f.undoCopy(ctx, c)
}

// ClonePsql returns what to replace this process with to talk to a clone.
func (f *Flow) ClonePsql(ctx context.Context, name string, args []string) (path string, argv, env []string, err error) {
	c, err := f.cloneNamed(name)
	if err != nil {
		return "", nil, nil, err
	}
	if !c.Ready {
		return "", nil, nil, fmt.Errorf("clone %s is half made or half removed: %w", name, backup.ErrIncomplete)
	}
	i, err := openSoon(ctx, c)
	if err != nil {
		return "", nil, nil, backup.Hint(err, "bring it up again: cleancut clone start "+name)
	}
	return i.Psql(ctx, args, os.Environ())
}

// LatestProven returns the newest backup whose last verdict is good.
func (f *Flow) LatestProven(ctx context.Context) (backup.ID, error) {
	entries, err := f.Catalog.Backups(ctx)
	if err != nil {
		return "", err
	}
	var best backup.ID
	for _, e := range entries {
		if proven(e) && e.Manifest.Golden == nil && e.ID > best {
			best = e.ID
		}
	}
	if best == "" {
		return "", backup.Hint(fmt.Errorf("no backup of cluster %s has a good verdict: %w", f.Cluster, backup.ErrNotFound), "`cleancut verify ID`, or name one")
	}
	return best, nil
}
