package postgres

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"
)

// kept is recorded even where it has its built-in default, because Preflight
// judges it, or because recovery demands it of the copy
// (CheckRequiredParameterValues) or of what takes production's place.
func kept() []string {
	return []string{
		"fsync", "full_page_writes", "synchronous_commit", "wal_writer_delay", "wal_level", "wal_log_hints", "archive_mode",
		"max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions", "max_locks_per_transaction",
		"shared_preload_libraries",
		// Where the server is found again, and what a restore in its place needs to know.
		"config_file", "port", "listen_addresses", "unix_socket_directories", "synchronous_standby_names", "track_commit_timestamp",
	}
}

// hidden is left out of the manifest: it lasts longer and travels further than
// the server's own files.
func hidden() []struct{ part, why string } {
	return []struct{ part, why string }{
		{"conninfo", "primary_conninfo holds passwords"},
		{"_command", "archive_command, restore_command, ssl_passphrase_command and their like hold credentials and name production's archive"},
		{"passphrase", "a secret, or what prints one"},
		{"password", "a secret; password_encryption is no loss"},
		{"secret", "a secret"},
		{"token", "a secret"},
		{"credential", "a secret"},
		{"_key", "key files, key scripts and keys of extensions"},
		{".key", "keys of extensions"},
		{"key_", "keys of extensions"},
		{"getkey", "pgsodium's script"},
		{"license", "a secret of some extensions"},
		{"dsn", "a connection string"},
		{"_url", "may hold user:password@"},
		{"_uri", "may hold user:password@"},
		{"krb_", "krb_server_keyfile: identity of the service"},
		{"primary_slot_name", "identity: a copy that carried it could take a standby's slot"},
	}
}

// hiddenSetting reports whether the value of a setting must not leave the server's
// own files.
func hiddenSetting(name string) bool {
	for _, h := range hidden() {
		if strings.Contains(name, h.part) {
			return true
		}
	}
	return false
}

// askSettings records what differs from the built-in defaults, in the notation
// of postgresql.conf. Settings that SET changed for this session (the guards)
// are recorded with the value the server gives to others. Placeholders of
// libraries that are not loaded do not show in pg_settings, so secrets that
// applications put there (app.jwt_secret) stay out.
func askSettings(ctx context.Context, conn *pgx.Conn, r *Running) error {
	rows, err := conn.Query(ctx, `SELECT name, CASE WHEN source IN ('session', 'client') THEN reset_val || coalesce(unit, '') ELSE current_setting(name) END
		FROM pg_settings
		WHERE name = ANY($1) OR (context <> 'internal' AND (
			source NOT IN ('default', 'override', 'session', 'client') OR
			(source = 'session' AND reset_val IS DISTINCT FROM boot_val)))`, kept())
	if err != nil {
		return err
	}
	r.Server.Settings = map[string]string{}
	var name, value string
	_, err = pgx.ForEachRow(rows, []any{&name, &value}, func() error {
		if !hiddenSetting(name) {
			r.Server.Settings[name] = value
		}
		return nil
	})
	return err
}
