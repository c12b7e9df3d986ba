// Package local is the provider whose volumes are files on a filesystem with
// reflinks (XFS or btrfs), attached as loop devices.
//
//	vol-….img ─LOOP_CONFIGURE→ /dev/loopN      snap-….img ←FICLONE─ vol-….img
//
// What always holds: every .img has a .json beside it (its sidecar), which is
// made before it and removed after it, so that whatever a crash leaves is
// listed and can be deleted; a sidecar is never seen half written; whether a
// volume is attached is never stored, it is read from the kernel. Several
// processes may use one pool at the same time.
//
//	POOL/pool.json   format version and a random id; makes the folder a pool
//	POOL/lock        flock(2) taken while a token is looked up
//	POOL/freed       its time is that of the last deletion
//	POOL/volumes/    vol-<17 hex>.img and .json
//	POOL/snapshots/  snap-<17 hex>.img and .json
package local
