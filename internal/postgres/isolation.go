package postgres

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Setting is one setting a copy is started with, and why.
type Setting struct {
	Name   string
	Value  string
	Danger string // what it keeps away
	Source string // where that is known from
}

// rule is a row of the isolation table.
type rule struct {
	name, value string
	since       int    // first major version that knows the name, 0 for all
	until       int    // last one, 0 for all
	library     string // only where it is preloaded
	layer       Layer
	danger      string
	source      string
}

// rules is what keeps a copy from hurting production, or from being taken for
// it. They are given on the command line, which beats postgresql.conf and
// ALTER SYSTEM (config.sgml, 20.1.4).
func rules() []rule {
	return []rule{
		{name: "archive_mode", layer: layerArchiving, value: "off", danger: "same-named WAL segments in production's archive", source: "pgBackRest --archive-mode=off; an empty command alone would pile WAL up"},
		{name: "archive_command", layer: layerArchiving, value: "", danger: "the same, should somebody switch archive_mode on", source: "pgarch.c"},
		{name: "archive_library", layer: layerArchiving, value: "", since: 15, danger: "the same through a library", source: "pgarch.c, 15+"},
		{name: "restore_command", layer: layerRecovery, value: "", danger: "scripts that move or delete in the archive", source: "xlogarchive.c"},
		{name: "archive_cleanup_command", layer: layerRecovery, value: "", danger: "deletes from production's archive", source: "xlogarchive.c"},
		{name: "recovery_end_command", layer: layerRecovery, value: "", danger: "promotion scripts: move an address, call a cluster manager", source: "xlogarchive.c"},
		{name: "promote_trigger_file", layer: layerRecovery, value: "", until: 15, danger: "a file of production's promotes the copy", source: "gone in 16"},
		{name: "primary_conninfo", layer: layerFollowing, value: "", danger: "connects to production as a standby", source: "walreceiver.c"},
		{name: "primary_slot_name", layer: layerFollowing, value: "", danger: "takes the real standby's slot", source: "walreceiver.c"},
		{name: "synchronous_standby_names", layer: layerSynchronous, value: "", danger: "every commit of the copy waits for ever", source: "syncrep.c"},
		{name: "sync_replication_slots", layer: layerFollowing, value: "off", since: 17, danger: "connects to production to copy its slots", source: "slotsync.c, 17+"},
		{name: "max_logical_replication_workers", layer: layerSubscriptions, value: "0", danger: "subscriptions consume production's changes through the same slots", source: "launcher.c returns early at 0; hackers 2025-08"},
		{name: "listen_addresses", layer: layerListening, value: "", danger: "clients or poolers reach the copy", source: "postmaster.c"},
		{name: "unix_socket_permissions", layer: layerClosed, value: "0700", danger: "other users of the host reach the copy", source: "pqcomm.c"},
		{name: "unix_socket_group", layer: layerClosed, value: "", danger: "the same", source: "pqcomm.c"},
		{name: "bonjour", layer: layerListening, value: "off", danger: "announces the copy on the network", source: "postmaster.c"},
		{name: "ssl", value: "off", danger: "needs key files that lie outside", source: "be-secure-openssl.c"},
		{name: "cluster_name", layer: layerIdentity, value: "cleancut copy", danger: "a process list or a monitoring takes the copy for production", source: "ps_status.c"},
		{name: "logging_collector", layer: layerFiles, value: "off", danger: "writes into production's log directory", source: "syslogger.c"},
		{name: "log_destination", layer: layerFiles, value: "stderr", danger: "syslog lines under production's name", source: "elog.c"},
		{name: "syslog_ident", layer: layerIdentity, value: "cleancut-copy", danger: "the same", source: "elog.c"},
		{name: "event_triggers", layer: layerTriggers, value: "off", since: 17, danger: "login and DDL triggers with effects outside", source: "event_trigger.c, 17+"},
		{name: "huge_pages", value: "off", danger: "takes the huge pages that were set aside for production", source: "sysv_shmem.c"},
		{name: "lc_messages", value: "C", danger: "a log that cleancut cannot read", source: "elog.c"},
		{name: "log_line_prefix", value: "%m [%p] ", danger: "the same", source: "elog.c"},
		{name: "log_min_messages", value: "warning", danger: "the same: 'redo done' is written at this level", source: "xlogrecovery.c"},
		{name: "hot_standby", value: "on", danger: "no answer while archive recovery runs", source: "postmaster.c"},
		{name: "wal_level", value: "replica", danger: "minimal refuses max_wal_senders and archive recovery", source: "postmaster.c"},
		{name: "recovery_init_sync_method", value: "syncfs", since: 14, danger: "opens and syncs every file before redo: hours on lazily loaded volumes", source: "SyncDataDirectory, 14+"},
		{name: "cron.launch_active_jobs", layer: layerLibraries, value: "off", library: "pg_cron", danger: "production's jobs run on the copy", source: "pg_cron 1.6"},
		{name: "timescaledb.max_background_workers", layer: layerLibraries, value: "0", library: "timescaledb", danger: "production's jobs and policies run on the copy", source: "timescaledb loader"},
		{name: "timescaledb.telemetry_level", layer: layerLibraries, value: "off", library: "timescaledb", danger: "reports to the outside", source: "timescaledb"},
		{name: "citus.recover_2pc_interval", layer: layerLibraries, value: "-1", library: "citus", danger: "settles prepared transactions on production's workers", source: "citus maintenance daemon"},
		{name: "citus.enable_statistics_collection", layer: layerLibraries, value: "off", library: "citus", danger: "reports to the outside", source: "citus"},
	}
}

// workers are the libraries whose background workers act by themselves. A copy
// does not preload them; all others it does, because a library may own table
// access methods, types or settings without which a dump fails.
func workers() map[string]string {
	return map[string]string{
		"pg_cron":           "runs production's jobs",
		"pg_partman_bgw":    "makes and drops partitions",
		"pg_net":            "sends HTTP requests from a queue table",
		"pglogical":         "consumes changes of other servers",
		"bdr":               "consumes changes of other servers",
		"spock":             "consumes changes of other servers",
		"pg_failover_slots": "connects to the primary",
		"pgautofailover":    "checks and commands production's nodes",
		"repmgr":            "makes the copy a node of production's cluster",
		"pg_keeper":         "promotes by itself",
		"pg_squeeze":        "rewrites tables",
		"pg_task":           "runs production's tasks",
		"pg_dbms_job":       "runs production's jobs",
		"pg_later":          "runs queued statements",
		"vectorize":         "calls services outside",
		"powa":              "takes snapshots of its own",
		"pg_prewarm":        "reads the whole cache list from the volumes at the start",
		"pgsodium":          "runs a script that fetches a key",
		"babelfishpg_tds":   "listens on a port of its own",
		"worker_spi":        "writes tables by itself",
	}
}

// PreloadLibraries splits production's shared_preload_libraries into what a
// copy loads too, in the same order, and what it does not because it acts by
// itself.
func PreloadLibraries(production string) (keep, dropped []string) {
	for _, item := range strings.Split(production, ",") {
		item = strings.Trim(strings.TrimSpace(item), `"`)
		if item == "" {
			continue
		}
		name := strings.TrimSuffix(filepath.Base(item), ".so")
		if _, acts := workers()[name]; acts {
			dropped = append(dropped, item)
			continue
		}
		keep = append(keep, item)
	}
	return keep, dropped
}

// Isolation lists the settings that c is started with, in order; where a name
// comes twice the later one holds. control is of the image: a server in
// archive recovery refuses to run with less than it names
// (CheckRequiredParameterValues).
func Isolation(c Copy, control Control) []Setting {
	keep, dropped := PreloadLibraries(c.Server.Settings["shared_preload_libraries"])
	if c.without.has(layerLibraries) {
		keep = append(keep, dropped...)
	}
	major := c.Server.Major()
	var out []Setting
	for _, r := range append(rules(), c.places(keep)...) {
		if c.without.has(r.layer) || major < r.since || (r.until != 0 && major > r.until) || (r.library != "" && !slices.Contains(keep, r.library)) {
			continue
		}
		out = append(out, Setting{r.name, r.value, r.danger, r.source})
	}
	for _, m := range []struct {
		name string
		has  int
	}{
		{"max_connections", control.MaxConnections},
		{"max_worker_processes", control.MaxWorkerProcesses},
		{"max_wal_senders", control.MaxWALSenders},
		{"max_prepared_transactions", control.MaxPreparedXacts},
		{"max_locks_per_transaction", control.MaxLocksPerXact},
		// Not in pg_control: origins of subscriptions need a place each, and too
		// few end recovery with a PANIC (StartupReplicationOrigin; 18 gave them a
		// setting of their own).
		{"max_replication_slots", 0},
		{"max_active_replication_origins", 0},
	} {
		recorded, _ := strconv.Atoi(c.Server.Settings[m.name])
		if v := max(m.has, recorded); v > 0 || m.name == "max_prepared_transactions" {
			out = append(out, Setting{m.name, strconv.Itoa(v), "recovery refuses smaller ones", "CheckRequiredParameterValues"})
		}
	}
	if c.NoAutovacuum {
		out = append(out, Setting{"autovacuum", "off", "writes that nobody asked for", "option"})
	}
	if c.NoFsync {
		out = append(out, Setting{"fsync", "off", "slow", "option: the copy is thrown away"})
	}
	if host := c.address(); host != "" {
		out = append(out, Setting{"listen_addresses", host, "", "asked for"})
	}
	settings := maps.Clone(c.Settings)
	if c.Standby != nil {
		settings = c.Standby.settings()
		maps.Copy(settings, c.Settings)
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		out = append(out, Setting{name, settings[name], "", "asked for"})
	}
	return out
}

// places are the rules whose values lie below the copy's root. keep is what it
// preloads.
func (c Copy) places(keep []string) []rule {
	private := c.privateDir()
	return []rule{
		{name: "config_file", layer: layerConfiguration, value: filepath.Join(private, "postgresql.conf"), danger: "production's configuration, with absolute paths", source: "guc.c, SelectConfigFiles"},
		{name: "hba_file", layer: layerConfiguration, value: filepath.Join(private, "pg_hba.conf"), danger: "production's clients are let in", source: "guc.c"},
		{name: "ident_file", layer: layerConfiguration, value: filepath.Join(private, "pg_ident.conf"), danger: "the same", source: "guc.c"},
		{name: "unix_socket_directories", layer: layerSockets, value: private, danger: "production's socket is replaced", source: "pqcomm.c"},
		{name: "port", layer: layerSockets, value: strconv.Itoa(c.port()), danger: "the same", source: "pqcomm.c"},
		{name: "external_pid_file", layer: layerFiles, value: filepath.Join(private, "external.pid"), danger: "production's pid file is replaced", source: "postmaster.c; empty is no name to it"},
		{name: "log_directory", layer: layerFiles, value: filepath.Join(private, "log"), danger: "logs in production's directory", source: "syslogger.c"},
		{name: "shared_preload_libraries", value: quoteList(keep), danger: "background workers that act by themselves", source: "table workers"},
	}
}

// quoteList writes names as a list setting takes them (SplitDirectoriesString).
func quoteList(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = `"` + n + `"`
	}
	return strings.Join(quoted, ", ")
}

// carried are the settings of production that a copy needs to give the same
// answers: they go into its configuration file, so that ALTER SYSTEM on a
// clone can still change them.
func carried() []string {
	return []string{
		"DateStyle", "IntervalStyle", "TimeZone", "timezone_abbreviations", "extra_float_digits", "bytea_output",
		"lc_monetary", "lc_numeric", "lc_time", "default_text_search_config", "search_path",
		"array_nulls", "backslash_quote", "standard_conforming_strings", "transform_null_equals", "escape_string_warning",
		"xmlbinary", "xmloption", "default_toast_compression", "default_table_access_method", "quote_all_identifiers",
	}
}

// configFile writes the copy's postgresql.conf.
func configFile(production map[string]string) string {
	var b strings.Builder
	b.WriteString("# Written by cleancut. What isolates the copy is on the command line and beats this file.\n")
	for _, name := range carried() {
		v, ok := production[name]
		if !ok || strings.ContainsAny(v, "\n\r\x00") {
			continue
		}
		fmt.Fprintf(&b, "%s = '%s'\n", name, strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(v))
	}
	return b.String()
}

// hbaFile lets in whoever reaches the socket: it lies in a directory with mode
// 0700 that belongs to the copy's uid, so that is this uid and root. peer would
// shut root out, and needs a passwd entry that the uid may not have here.
const hbaFile = "# Written by cleancut: the directory of the socket lets only its owner and root in.\nlocal all all trust\n"
