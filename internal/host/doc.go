// Package host is this Linux box: mounts, block devices, md arrays,
// filesystems, and the freeze with its watchdog.
//
//	path → MountOf → Tree → volumes            (discover)
//	Freezer: arm → Freeze → Thaw               (cut)
//	AssembleArray → Mount … Unmount → StopArray (restore and its undo)
//
// What always holds: what takes has an undo beside it that can be called
// again; devices are named by what is on them, never by what they happen to
// be called; nothing reaches a shell.
package host
