// Package ec2 is the provider whose volumes are EBS volumes, attached to the
// EC2 instance this process runs on.
//
//	NVMe serial → volume → DryRun → CreateSnapshot(s), one attempt → wait → volumes → devices
//
// What always holds: a call inside the cut is sent at most once (neither
// CreateSnapshot nor CreateSnapshots has a client token, so a retry could make
// a second, later snapshot); the members of a cut share a tag of their own
// (backup.TagCut), and Complete demands exactly one snapshot of each volume
// with it; nothing is deleted before a fresh description has shown its tags; a
// device is a volume by its serial number or its attachment, never by the
// order of names. All other calls are repeated for minutes when EC2 throttles.
//
// Sources: the EC2 API reference (each method names its actions), the EBS user
// guide for device names, limits and NVMe identity.
package ec2
