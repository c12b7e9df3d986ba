package postgres

import "slices"

// Layer is one thing that is done to a copy so that it harms nobody. The
// settings of a layer are in the table of rules; other layers are steps of
// Prepare, namespaces of Start, or calls on the running copy.
type Layer string

// The layers of the isolation.
const (
	layerArchiving     Layer = "archiving is off"
	layerRecovery      Layer = "no recovery commands"
	layerFollowing     Layer = "no primary"
	layerSynchronous   Layer = "no synchronous standbys"
	layerSubscriptions Layer = "no logical replication workers"
	layerLibraries     Layer = "libraries that act are not preloaded"
	layerListening     Layer = "no TCP"
	layerSockets       Layer = "a socket of its own"
	layerClosed        Layer = "a folder closed to others"
	layerFiles         Layer = "logs and pid files of its own"
	layerIdentity      Layer = "a name of its own"
	layerTriggers      Layer = "no event triggers"
	layerRuns          Layer = "" // nothing outside is in danger: without it the copy would not run, or not be readable
	layerConfiguration Layer = "a configuration of its own"
	layerSignals       Layer = "signal files removed"
	layerSlots         Layer = "slots removed"
	layerLinks         Layer = "links rewritten"
	layerMounts        Layer = "mount namespace"
	layerNetwork       Layer = "network namespace"
	layerDisarm        Layer = "Disarm"
)

// Danger is something that a copy would do to production, or on its behalf, if
// it were just started.
type Danger struct {
	Name   string  // as docs/isolation.md has it
	Does   string  // what the copy would do
	Layers []Layer // each of which keeps it away by itself, as far as it reaches
	Since  int     // first major version that has it, 0 for all
	Source string  // where it is known from
}

// Dangers lists what a copy is kept from, in the order of docs/isolation.md.
// For each there is a test that a copy does not do it, and does when exactly
// these layers are taken away (TestEveryDanger…).
func Dangers() []Danger {
	return []Danger{
		{Name: "archive_command", Does: "puts WAL segments of production's names into production's archive",
			Layers: []Layer{layerArchiving, layerConfiguration, layerMounts}, Source: "pgarch.c; pgBackRest, --archive-mode=off"},
		{Name: "archive_library", Does: "the same through a library", Since: 15,
			Layers: []Layer{layerArchiving, layerConfiguration, layerMounts}, Source: "pgarch.c, 15+"},
		{Name: "restore_command and recovery_end_command", Does: "run scripts that fetch from, move or delete in the archive, or call a cluster manager",
			Layers: []Layer{layerRecovery, layerSignals, layerConfiguration, layerMounts}, Source: "xlogarchive.c"},
		{Name: "archive_cleanup_command", Does: "a standby deletes from production's archive",
			Layers: []Layer{layerRecovery, layerConfiguration, layerMounts}, Source: "xlogarchive.c; CreateRestartPoint"},
		{Name: "timelines", Does: "picks up a history file that another one pushed, and pushes one of its own",
			Layers: []Layer{layerRecovery, layerArchiving, layerSignals, layerConfiguration, layerMounts}, Source: "timeline.c, findNewestTimeLine; pgBackRest issue 2283"},
		{Name: "primary_conninfo and primary_slot_name", Does: "connects to production as a standby and takes the real one's slot",
			Layers: []Layer{layerFollowing, layerSignals, layerConfiguration}, Source: "walreceiver.c"},
		{Name: "sync_replication_slots", Does: "a standby connects to production to copy its slots", Since: 17,
			Layers: []Layer{layerFollowing, layerConfiguration}, Source: "slotsync.c, 17+"},
		{Name: "replication slots", Does: "keeps WAL and dead rows for ever for standbys that never come",
			Layers: []Layer{layerSlots}, Source: "slot.c; backup.sgml, \"Backing Up the Data Directory\""},
		{Name: "synchronous_standby_names", Does: "every commit waits for ever",
			Layers: []Layer{layerSynchronous, layerConfiguration}, Source: "syncrep.c"},
		{Name: "logical subscriptions", Does: "consume the changes of other servers through production's own slots",
			Layers: []Layer{layerSubscriptions}, Source: "launcher.c; pgsql-hackers 2025-08"},
		{Name: "preloaded workers", Does: "pg_cron and its like run production's jobs",
			Layers: []Layer{layerLibraries}, Source: "pg_cron.c; table workers"},
		{Name: "absolute links", Does: "recovers in production's own pg_wal and tablespaces",
			Layers: []Layer{layerLinks, layerMounts}, Source: "tablespace.c; xlog.c"},
		{Name: "listen_addresses", Does: "clients and poolers reach the copy at production's address",
			Layers: []Layer{layerListening, layerConfiguration, layerNetwork}, Source: "postmaster.c"},
		{Name: "connections to other hosts", Does: "dblink, foreign tables and programs of the copy reach other servers",
			Layers: []Layer{layerNetwork}, Source: "network_namespaces(7)"},
		{Name: "unix sockets", Does: "takes the place of production's socket",
			Layers: []Layer{layerSockets, layerConfiguration, layerMounts}, Source: "pqcomm.c, Lock_AF_UNIX"},
		{Name: "other users of the host", Does: "anybody may log in as any role, superusers too",
			Layers: []Layer{layerClosed}, Source: "unix(7); pqcomm.c"},
		{Name: "log and pid files outside", Does: "logs into production's directory, and replaces its pid file",
			Layers: []Layer{layerFiles, layerConfiguration, layerMounts}, Source: "syslogger.c; postmaster.c"},
		{Name: "configuration outside and includes", Does: "reads files of production's host, or does not start without them",
			Layers: []Layer{layerConfiguration}, Source: "guc-file.l; guc.c, SelectConfigFiles"},
		{Name: "ALTER SYSTEM", Does: "what production set last beats its files",
			Layers: []Layer{layerConfiguration}, Source: "guc.c, PG_AUTOCONF_FILENAME"},
		{Name: "production's name", Does: "process list, syslog and monitoring take the copy for production",
			Layers: []Layer{layerIdentity, layerConfiguration}, Source: "ps_status.c; elog.c"},
		{Name: "event triggers", Does: "triggers on login and DDL act, with effects outside", Since: 17,
			Layers: []Layer{layerTriggers, layerConfiguration}, Source: "event_trigger.c, 17+"},
		{Name: "writes to the host", Does: "COPY TO, programs and untrusted languages write where the owner of the data may",
			Layers: []Layer{layerMounts}, Source: "mount_setattr(2)"},
		{Name: "prepared transactions", Does: "keep their locks, and hold back VACUUM, for a coordinator that settles production's",
			Layers: []Layer{layerDisarm}, Source: "twophase.c"},
		{Name: "subscriptions that somebody starts", Does: "a clone whose settings were changed consumes production's changes",
			Layers: []Layer{layerDisarm}, Source: "subscriptioncmds.c, DropSubscription"},
	}
}

// without says which layers a test took away, to see that they are needed.
type without []Layer

func (w without) has(l Layer) bool { return l != layerRuns && slices.Contains(w, l) }
