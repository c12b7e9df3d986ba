package flow

import (
	"context"

	"cleancut/internal/flow/storage"
	"cleancut/internal/provider"
)

// StorageOptions describes storage to make or destroy.
type StorageOptions = storage.Options

// StorageResult is what was made.
type StorageResult = storage.Result

// CreateStorage makes volumes, an array or a logical volume, a filesystem, the lines that bring it
// back after a reboot, and mounts it. It needs a provider and nothing else.
func CreateStorage(ctx context.Context, p provider.Provider, o StorageOptions) (StorageResult, error) {
	return storage.Create(ctx, p, o)
}

// AttachStorage brings it back after a reboot.
func AttachStorage(ctx context.Context, p provider.Provider, o StorageOptions) (StorageResult, error) {
	return storage.Attach(ctx, p, o)
}

// DestroyStorage removes what CreateStorage made under that name on that host.
func DestroyStorage(ctx context.Context, p provider.Provider, o StorageOptions) error {
	return storage.Destroy(ctx, p, o)
}
