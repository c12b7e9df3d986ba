// Package ec2sim plays the part of EC2 and EBS that cleancut uses, over the
// volumes of a local pool: what it attaches is a real block device with the
// real bytes. A test starts it in its own process, `cleancut ec2sim` runs it
// alone.
//
//	POST / → signature → parameters → faults → effect in the pool → XML
//
// What always holds: a parameter it does not know is refused, never ignored; a
// snapshot's point in time lies inside its API call; the members of a
// CreateSnapshots are all suspended before the first is cloned, or the call is
// refused; Close takes away every device, volume and snapshot it made, or names
// it.
//
// What it does not do, so that nothing is proved of it: IAM (any action is
// allowed unless a fault denies it; a signature is looked at, not computed),
// quotas and throttling by token bucket (only by fault), persistence (its
// memory ends with it), KMS, Outposts, Multi-Attach, instance life cycles,
// lazy loading (a volume from a snapshot is fast from the first read) and the
// NVMe vendor bytes. docs/ec2sim.md has the whole list.
package ec2sim
