package restore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
)

// Standby makes a standby of the copy instead of a server that is out of
// recovery. Copy.Standby is set.
type Standby struct {
	Password string
	Least    map[string]string // settings that are not to be smaller, besides those of the manifest
	// Hold lets the primary keep the WAL that the standby will ask for. It is
	// called before anything of the copy is made.
	Hold func(ctx context.Context) error
	// Forks is where the primary left the backup's timeline; 0: it has not.
	Forks backup.LSN
	// Was is where the primary's WAL ended when it was looked at, and from
	// where on it keeps it; 0: that is not known.
	Was     backup.LSN
	Command func(socket string) string // restore_command
	// Serve answers restore_command until the standby streams; nil: nobody does.
	Serve func(ctx context.Context, socket string, uid, gid uint32) (stop func() error, err error)
}

// standstill is how long a standby may come no further before it is given up.
const standstill = time.Minute

const lookPause = 50 * time.Millisecond

func walSocket(root string) string { return filepath.Join(root, postgres.Private, "wal") }

// ServerOf describes the standby's server to package postgres.
func (s *Standby) ServerOf(c backup.Copy) *postgres.Standby {
	if s == nil {
		return nil
	}
	return &postgres.Standby{Primary: c.Standby.Primary, Password: s.Password, Slot: c.Standby.Slot, Name: c.Standby.Name,
		Restore: s.Command(walSocket(c.Root)), Listen: c.Standby.Listen}
}

// Follow starts the server of a standby, serves it WAL and returns when it
// streams from its primary: the receiver has got WAL, and what it got was
// replayed. One that was promoted only starts. On an error the server is stopped.
func Follow(ctx context.Context, o Options, c backup.Copy) (_ *postgres.Instance, err error) {
	s := o.Standby
	server := o.Manifest.Server
	server.Settings = maps.Clone(server.Settings)
	for name, least := range s.Least {
		has, _ := strconv.Atoi(server.Settings[name])
		if n, err := strconv.Atoi(least); err == nil && n > has {
			server.Settings[name] = least
		}
	}
	stop := func() error { return nil }
	if s.Serve != nil {
		if stop, err = s.Serve(ctx, walSocket(c.Root), server.UID, server.GID); err != nil {
			return nil, err
		}
	}
	_, promoted := os.Stat(filepath.Join(c.DataDirectory, "standby.signal")) // gone: it was
	instance, err := postgres.Start(ctx, postgres.Copy{Root: c.Root, Data: c.DataDirectory, Server: server, Installation: o.Installation,
		Standby: s.ServerOf(c), Networked: true})
	if err != nil {
		return nil, errors.Join(blame(ctx, c.DataDirectory, err), stop())
	}
	if promoted == nil {
		o.Progress("follow", c.Standby.Name)
		err = s.await(ctx, instance, c, server.Timeline)
	}
	served := stop()
	if err == nil {
		return instance, nil // an archive that failed before no longer matters
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), standstill)
	defer cancel()
	return nil, errors.Join(err, served, postgres.Kill(undo, c.Root))
}

// await returns when the standby streams.
func (s *Standby) await(ctx context.Context, i *postgres.Instance, c backup.Copy, timeline uint32) error {
	tick := time.NewTicker(lookPause)
	defer tick.Stop()
	var first, last postgres.Following
	moved := time.Now()
	for began := false; ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if err := s.diverged(c, timeline); err != nil {
			return err
		}
		f, err := i.Following(ctx)
		switch {
		case !i.Alive():
			return fmt.Errorf("the standby's server ended: %s", postgres.LogTail(c.Root))
		case err == nil && !f.InRecovery:
			return fmt.Errorf("the standby left recovery by itself: %s", postgres.LogTail(c.Root))
		case err == nil && !began:
			first, began = f, true
		}
		// What the receiver got counts from where replay was, so of a primary
		// that writes nothing it got nothing: then replay is where that is.
		onward := f.Received > f.Begun && f.Replayed > first.Replayed
		there := f.Ahead > 0 && f.Replayed >= f.Ahead || s.Was > 0 && f.Replayed >= s.Was
		if err == nil && f.Streaming && (onward || there) {
			return nil
		}
		if f.Replayed > last.Replayed || f.Received > last.Received {
			last, moved = f, time.Now()
		}
		if time.Since(moved) > standstill {
			return backup.Hint(errors.Join(fmt.Errorf("the standby comes no further than %s and does not stream from its primary: %s", f.Replayed, postgres.LogTail(c.Root)), err),
				"its server runs as the owner of the data, sees the host's files read-only, and not the filesystems of production: can it reach the primary by that address and log in? Over TCP it can")
		}
	}
}

// diverged refuses an image that holds WAL which the primary has not: it
// left the image's timeline before that. The server itself writes how far the
// image's own WAL went when it has replayed it (SwitchIntoArchiveRecovery).
func (s *Standby) diverged(c backup.Copy, timeline uint32) error {
	if s.Forks == 0 {
		return nil
	}
	control, err := postgres.ReadControl(filepath.Join(c.DataDirectory, "global", "pg_control"))
	if err != nil {
		return err
	}
	if at := backup.LSN(control.MinRecoveryLSN); control.MinRecoveryTLI == timeline && at > s.Forks {
		return backup.Hint(fmt.Errorf("the backup holds WAL of timeline %d up to %s, and the primary left that timeline at %s: %w", timeline, at, s.Forks, backup.ErrUnsupported),
			"its last commits were never on this primary: take a backup of the primary as it is now")
	}
	return nil
}
