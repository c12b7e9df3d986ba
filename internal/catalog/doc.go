// Package catalog keeps the records of backups and finds them again. It does
// not touch snapshots or volumes.
//
//	Manifest → PutManifest → PutComplete → Backups, Backup → … → Remove
//
// A Store holds named objects that are written once (Dir, S3), a Catalog
// knows what the objects of one cluster mean:
//
//	clusters/NAME/backups/ID/manifest.json       the cut
//	clusters/NAME/backups/ID/complete.json       every snapshot is durable
//	clusters/NAME/backups/ID/verdicts/TIME.json  what verification found
//	clusters/NAME/backups/ID/files/N             side files of the manifest
//	clusters/NAME/backups/ID/dumps/DUMP/         dumps made of the backup; docs/dump.md
//	clusters/NAME/backups/ID/holds/TIME.json     who keeps it whatever retention says
//	clusters/NAME/backups/ID/wal/FILE.zst        WAL captured with the backup
//	clusters/NAME/intents/ID.json                what is being made or deleted
//	clusters/NAME/wal/system.json                whose WAL is kept here
//	clusters/NAME/wal/TIMELINE/FILE.zst          segments, history files, …
//
// What always holds: nothing is overwritten; a backup counts only while its
// complete.json names the very bytes of its manifest.json; complete.json is
// the first object to go.
package catalog
