package demo

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/lab"
	"cleancut/internal/provider"
	"cleancut/internal/provider/local"
)

// ground is what the story stands on: who owns the volumes, where the catalog
// is, and how the other host gets to both.
type ground interface {
	// provider is production's.
	provider(ctx context.Context) (provider.Provider, error)
	// store is where production keeps its catalog.
	store(ctx context.Context) (catalog.Store, error)
	// keepAway lists what must not lie on production's volumes.
	keepAway() []string
	// hide lists folders that the other host must not see.
	hide() []string
	// admit lets the other host, whose holder has that process id, reach the
	// provider and the catalog.
	admit(ctx context.Context, pid int) error
	// arguments and environment of the program on the other host.
	arguments() []string
	environment() []string
	// calls counts what was asked of the provider's service, nil if it has
	// none.
	calls() map[string]int
}

// newGround makes the ground and pushes its removal on the story's undo.
func (s *story) newGround(ctx context.Context) error {
	undoPool, err := lab.Pool(ctx, s.pool, "xfs", 5*s.VolumeSize+2<<30)
	if err != nil {
		return err
	}
	s.later("pool", func(context.Context) error { return undoPool() })
	if err := local.Init(ctx, s.pool); err != nil {
		return err
	}
	s.later("empty pool", s.poolEmpty)
	if s.Provider == "ec2" {
		s.ground, err = s.newCloud(ctx)
		return err
	}
	s.ground = &files{s}
	return nil
}

// poolEmpty demands that no volume and no snapshot is left in the pool.
func (s *story) poolEmpty(ctx context.Context) error {
	p, err := local.Open(ctx, s.pool, s.Log)
	if err != nil {
		return err
	}
	if err := isEmpty(ctx, p); err != nil {
		return fmt.Errorf("the pool: %w", err)
	}
	s.checked = append(s.checked, "no volume and no snapshot in the pool")
	return nil
}

func isEmpty(ctx context.Context, p provider.Provider) error {
	inv, err := p.List(ctx, nil)
	if err != nil {
		return err
	}
	if len(inv.Volumes)+len(inv.Snapshots) > 0 {
		return errStep("there are still %d volumes and %d snapshots", len(inv.Volumes), len(inv.Snapshots))
	}
	return nil
}

// files is the local ground: volumes are files of a pool, the catalog is a
// folder.
type files struct{ *story }

func (f *files) provider(ctx context.Context) (provider.Provider, error) {
	return local.Open(ctx, f.pool, f.Log)
}

func (f *files) folder() string { return filepath.Join(f.work, "catalog") }

func (f *files) store(context.Context) (catalog.Store, error) {
	return catalog.NewDir(f.folder()), nil
}

func (f *files) keepAway() []string               { return []string{f.folder(), f.pool} }
func (f *files) hide() []string                   { return nil }
func (f *files) admit(context.Context, int) error { return nil }
func (f *files) environment() []string            { return nil }
func (f *files) calls() map[string]int            { return nil }
func (f *files) arguments() []string {
	return []string{"--catalog", "file://" + f.folder(), "--pool", f.pool}
}

// checkGround refuses what no ground can give.
func checkGround(o Options) error {
	switch {
	case o.Provider != "local" && o.Provider != "ec2":
		return fmt.Errorf("%w: provider %q: local or ec2", backup.ErrUsage, o.Provider)
	case !slices.Contains([]backup.Mode{backup.ModeAuto, backup.ModeFreeze, backup.ModeGroup, backup.ModeBracketed}, o.Mode):
		return fmt.Errorf("%w: mode %q: auto, group, freeze or bracketed", backup.ErrUsage, o.Mode)
	case o.Provider == "local" && o.Mode == backup.ModeGroup:
		return backup.Hint(fmt.Errorf("%w: the local provider has no group", backup.ErrUsage), "--mode freeze, or --provider ec2")
	case o.Provider == "local" && (o.Latency != 0 || o.Skew != 0):
		return fmt.Errorf("%w: --latency and --skew are faults of the EC2 test server: they need --provider ec2", backup.ErrUsage)
	case o.Latency < 0 || o.Skew < 0:
		return fmt.Errorf("%w: --latency and --skew cannot be negative", backup.ErrUsage)
	}
	return nil
}
