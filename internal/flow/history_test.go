package flow_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

const segment = 1 << 20 // of the production that histories run on

// rows is all that the database holds: "a" stands for table a, "a 7" for its
// row 7, and its value is what that row holds.
type rows map[string]string

// transaction is one that was begun. Its effects count from its commit on.
type transaction struct {
	conn    *pgx.Conn
	xid     uint32
	gid     string // once it is prepared
	effects []func(rows)
	touched map[string]bool // tables and rows, which others leave alone
}

// ending is an acknowledged end of a transaction.
type ending struct {
	xid       uint32
	commit    bool
	when      time.Time  // of a commit, by pg_xact_commit_timestamp
	low, high backup.LSN // insert positions before and after it
	after     rows
}

// branch is what a server has gone through along its timeline and those before.
type branch struct {
	timeline uint32
	rows     rows
	ends     []ending
	begun    map[uint32]bool         // transactions of ours
	gids     map[uint32]string       // of all that were ever prepared
	prepared map[string]*transaction // those in doubt
}

func (b branch) clone() branch {
	b.rows, b.ends, b.begun, b.gids, b.prepared = maps.Clone(b.rows), slices.Clone(b.ends), maps.Clone(b.begun), maps.Clone(b.gids), maps.Clone(b.prepared)
	return b
}

// taken is a backup and what was known around it.
type taken struct {
	backup.Manifest
	timeline uint32
	behind   backup.LSN // insert position after it
}

// history drives one production, statement after statement, and remembers what
// was acknowledged.
type history struct {
	t       *testing.T
	p       *production
	r       *rand.Rand
	log     []string
	base    backup.LSN // before everything
	now     branch
	open    *transaction // one that waits, in a session of its own
	conn    *pgx.Conn
	mark    *branch // as it was when the files in markDir were copied
	markDir string
	lines   map[uint32]line // by timeline; filled when it ends
	backups []taken
	names   []string // of restore points
	count   int
}

// newHistory starts a production on one volume and streams its WAL.
func newHistory(t *testing.T, p *production, r *rand.Rand) *history {
	t.Helper()
	h := &history{t: t, p: p, r: r, lines: map[uint32]line{}, markDir: filepath.Join(p.server.Dir, "mark"),
		now: branch{timeline: 1, rows: rows{"a": "", "b": ""}, begun: map[uint32]bool{}, gids: map[uint32]string{}, prepared: map[string]*transaction{}}}
	p.server.Exec(t, "CREATE EXTENSION pg_walinspect", "CREATE TABLE a (id int PRIMARY KEY, v text, pad text)", "CREATE TABLE b (LIKE a INCLUDING ALL)")
	h.conn = h.connect()
	h.base = h.lsn()
	p.shipping()
	return h
}

func historyOptions(data string) pgtest.Options {
	return pgtest.Options{Data: filepath.Join(data, "pg"), Small: true, Settings: map[string]string{
		"track_commit_timestamp": "on", "max_prepared_transactions": "10", "autovacuum": "off", "wal_keep_size": "600MB", "checkpoint_timeout": "1h",
		"max_wal_size": "600MB", "restore_command": "false", "recovery_target_timeline": "current", "lock_timeout": "60s"}}
}

func (h *history) connect() *pgx.Conn {
	h.t.Helper()
	conn, err := pgx.Connect(h.t.Context(), h.p.server.DSN("postgres")+" default_query_exec_mode=simple_protocol timezone=UTC")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(h.t.Context())) })
	return conn
}

func (h *history) note(format string, a ...any) {
	h.log = append(h.log, fmt.Sprintf("%3d ", len(h.log))+fmt.Sprintf(format, a...))
}

func (h *history) exec(conn *pgx.Conn, sql string) {
	h.t.Helper()
	if _, err := conn.Exec(h.t.Context(), sql); err != nil {
		h.t.Fatalf("%s: %v\n%s", sql, err, strings.Join(h.log, "\n"))
	}
}

func (h *history) ask(conn *pgx.Conn, sql string, to ...any) {
	h.t.Helper()
	if err := conn.QueryRow(h.t.Context(), sql).Scan(to...); err != nil {
		h.t.Fatalf("%s: %v", sql, err)
	}
}

func (h *history) lsn() (out backup.LSN) {
	h.t.Helper()
	h.ask(h.conn, "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint", &out)
	return out
}

// pick returns one of all at random; there must be one.
func pick[T any](r *rand.Rand, all []T) T { return all[r.IntN(len(all))] }

// run draws and does about n things, among them backups of both modes, a crash
// and two ways to a new timeline.
func (h *history) run(n int) {
	h.t.Helper()
	todo := make([]func(), n)
	for i := range todo {
		todo[i] = h.anything
	}
	at := h.r.Perm(n) // where the rare ones come, some of them in order
	order := slices.Sorted(slices.Values(at[:2]))
	modes := []backup.Mode{backup.ModeFreeze, backup.ModeBracketed, pick(h.r, []backup.Mode{backup.ModeFreeze, backup.ModeBracketed})}
	for i, mode := range modes {
		todo[at[2+i]] = func() { h.backup(mode) }
	}
	todo[order[0]], todo[order[1]] = h.copyFiles, h.fallBack
	todo[at[5]], todo[at[6]] = h.crash, h.promote
	todo[0] = func() { h.backup(pick(h.r, modes)) }
	for _, do := range todo {
		do()
	}
	h.note("end")
	h.endLine(h.ship())
}

// anything does one of the frequent things.
func (h *history) anything() {
	switch n := h.r.IntN(20); {
	case n < 2 && h.open != nil:
		h.end(h.open, h.r.IntN(4) > 0)
		h.open = nil
	case n < 6 && len(h.now.prepared) > 0:
		h.end(h.now.prepared[pick(h.r, slices.Sorted(maps.Keys(h.now.prepared)))], h.r.IntN(3) > 0)
	case n == 6, n == 7:
		h.restorePoint()
	case n == 8:
		h.note("CHECKPOINT")
		h.exec(h.conn, "CHECKPOINT")
	case n == 9:
		h.note("pg_switch_wal")
		h.exec(h.conn, "SELECT pg_switch_wal()")
	default:
		h.transaction()
	}
}

// restorePoint makes one; now and then its name is there already, and then the
// first counts.
func (h *history) restorePoint() {
	name := fmt.Sprintf("p%d", len(h.names))
	if len(h.names) > 2 && h.r.IntN(6) == 0 {
		name = pick(h.r, h.names)
	}
	h.names = append(h.names, name)
	h.note("restore point %s", name)
	h.exec(h.conn, "SELECT pg_create_restore_point('"+name+"')")
}

// transaction makes one of up to four statements, and ends it or leaves it.
func (h *history) transaction() {
	tx := &transaction{conn: h.conn, touched: map[string]bool{}}
	fate := pick(h.r, []string{"commit", "commit", "commit", "commit", "commit", "commit", "rollback", "prepare", "prepare", "open"})
	switch {
	case fate == "open" && h.open == nil:
		tx.conn, h.open = h.connect(), tx
	case fate == "open", fate == "prepare" && len(h.now.prepared) > 2:
		fate = "commit"
	}
	h.exec(tx.conn, "BEGIN")
	h.ask(tx.conn, "SELECT pg_current_xact_id()::text::bigint", &tx.xid)
	h.now.begun[tx.xid] = true
	h.note("BEGIN %d, to %s", tx.xid, fate)
	for range 1 + h.r.IntN(4) {
		if h.r.IntN(4) > 0 {
			h.statement(tx, fate == "commit" || fate == "rollback")
			continue
		}
		keep := len(tx.effects)
		h.exec(tx.conn, "SAVEPOINT s")
		h.statement(tx, false)
		if h.r.IntN(2) == 0 {
			h.note("  ROLLBACK TO s")
			h.exec(tx.conn, "ROLLBACK TO s")
			tx.effects = tx.effects[:keep]
		}
	}
	switch fate {
	case "prepare":
		h.count++
		tx.gid = fmt.Sprintf("g%d", h.count)
		h.exec(tx.conn, "PREPARE TRANSACTION '"+tx.gid+"'")
		h.now.prepared[tx.gid], h.now.gids[tx.xid] = tx, tx.gid
	case "commit", "rollback":
		h.end(tx, fate == "commit")
	}
}

// end commits or rolls back.
func (h *history) end(tx *transaction, commit bool) {
	e := ending{xid: tx.xid, commit: commit, low: h.lsn()}
	sql := map[bool]string{true: "COMMIT", false: "ROLLBACK"}[commit]
	conn := tx.conn
	if tx.gid != "" {
		sql += " PREPARED '" + tx.gid + "'"
		conn = h.conn
		delete(h.now.prepared, tx.gid)
	}
	h.exec(conn, sql)
	if conn != h.conn {
		_ = conn.Close(h.t.Context())
	}
	e.high = h.lsn()
	if commit {
		for _, effect := range tx.effects {
			effect(h.now.rows)
		}
		h.ask(h.conn, fmt.Sprintf("SELECT pg_xact_commit_timestamp('%d')", tx.xid), &e.when)
	}
	e.after = maps.Clone(h.now.rows)
	h.now.ends = append(h.now.ends, e)
	h.note("%s of %d, %s to %s %s", sql, tx.xid, e.low, e.high, e.when.Format("15:04:05.000000"))
}

// statement changes a few rows; ddl allows it to take a table for itself.
func (h *history) statement(tx *transaction, ddl bool) {
	view := maps.Clone(h.now.rows)
	for _, effect := range tx.effects {
		effect(view)
	}
	others := map[string]bool{}
	for _, o := range append(slices.Collect(maps.Values(h.now.prepared)), h.open) {
		if o != nil && o != tx {
			maps.Copy(others, o.touched)
		}
	}
	var tables, free []string
	for _, key := range slices.Sorted(maps.Keys(view)) {
		if table, _, isRow := strings.Cut(key, " "); !isRow {
			tables = append(tables, table)
		} else if !others[key] {
			free = append(free, key)
		}
	}
	kind := h.r.IntN(9)
	table := pick(h.r, tables)
	switch {
	case kind == 0 && ddl:
		h.count++
		table = fmt.Sprintf("t%d", h.count)
		h.effect(tx, fmt.Sprintf("CREATE TABLE %s (LIKE a INCLUDING ALL)", table), table, func(s rows) { s[table] = "" })
		h.insert(tx, table)
	case kind == 1 && ddl && table[0] == 't' && !others[table]:
		drop := h.r.IntN(2) == 0
		h.effect(tx, map[bool]string{true: "DROP TABLE ", false: "TRUNCATE "}[drop]+table, table, func(s rows) {
			maps.DeleteFunc(s, func(k, _ string) bool { return strings.HasPrefix(k, table+" ") || drop && k == table })
		})
	case kind < 4 && len(free) > 0:
		key := pick(h.r, free)
		table, id, _ := strings.Cut(key, " ")
		h.effect(tx, fmt.Sprintf("DELETE FROM %s WHERE id = %s", table, id), key, func(s rows) { delete(s, key) })
	case kind < 6 && len(free) > 0:
		key := pick(h.r, free)
		table, id, _ := strings.Cut(key, " ")
		h.count++
		v := fmt.Sprintf("u%d", h.count)
		h.effect(tx, fmt.Sprintf("UPDATE %s SET v = '%s', pad = '' WHERE id = %s", table, v, id), key, func(s rows) { s[key] = v + "/0" })
	default:
		h.insert(tx, table)
	}
}

// insert inserts up to 40 rows of up to 4 kB.
func (h *history) insert(tx *transaction, table string) {
	first, n, pad := h.count+1, 1, h.r.IntN(4000)
	if h.r.IntN(3) == 0 {
		n = 1 + h.r.IntN(40)
	}
	h.count += n
	sql := fmt.Sprintf("INSERT INTO %s SELECT i, 'i' || i, repeat('x', %d) FROM generate_series(%d, %d) i", table, pad, first, h.count)
	h.effect(tx, sql, table, func(s rows) {
		for i := first; i < first+n; i++ {
			s[fmt.Sprintf("%s %d", table, i)] = fmt.Sprintf("i%d/%d", i, pad)
		}
	})
}

func (h *history) effect(tx *transaction, sql, key string, do func(rows)) {
	h.note("  %d: %s", tx.xid, sql)
	h.exec(tx.conn, sql)
	tx.effects = append(tx.effects, do)
	table, _, _ := strings.Cut(key, " ")
	tx.touched[table], tx.touched[key] = true, true
}

// backup takes one while some of the frequent things go on.
func (h *history) backup(mode backup.Mode) {
	h.t.Helper()
	h.note("backup %s begins", mode)
	b := taken{timeline: h.now.timeline}
	failed, reached, goOn := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() {
		var err error
		b.Manifest, err = h.p.flow.Backup(h.t.Context(), flow.BackupOptions{Target: postgres.Target{DSN: h.p.server.DSN("postgres")}, Mode: mode, FastCheckpoint: true,
			Deadline: time.Minute, Quick: time.Minute, Rounds: 10, BeforeFreeze: func(context.Context) error { close(reached); <-goOn; return nil }})
		failed <- err
	}()
	some := func() {
		for range h.r.IntN(8) {
			h.anything()
		}
	}
	some()
	select {
	case err := <-failed:
		h.t.Fatalf("backup %s: %v", mode, err)
	case <-reached: // in backup mode, if it is bracketed
	}
	some()
	close(goOn)
	some()
	if err := <-failed; err != nil {
		h.t.Fatalf("backup %s: %v", mode, err)
	}
	b.behind = h.lsn()
	h.backups = append(h.backups, b)
	h.note("backup %s is %s, from %s, behind it %s", mode, b.ID, b.Cut.FlushLSN, b.behind)
}

// down kills the server; what was begun and not prepared is lost.
func (h *history) down() {
	h.t.Helper()
	h.p.server.Crash(h.t)
	h.open = nil
}

func (h *history) up() {
	h.t.Helper()
	h.p.server.Start(h.t)
	h.conn = h.connect()
}

func (h *history) crash() {
	h.note("crash")
	h.down()
	h.up()
}

// promote ends the timeline where it is and begins the next one.
func (h *history) promote() {
	h.t.Helper()
	h.note("promoted after a crash")
	h.endLine(h.lsn())
	h.down()
	h.begin(h.now, true)
}

// begin starts the server on what lies there, which is of branch b, with a
// timeline that is newer than all. promoted: the one before ends there.
func (h *history) begin(b branch, promoted bool) {
	h.t.Helper()
	pgtest.Append(h.t, filepath.Join(h.p.server.DataDirectory, "recovery.signal"), "")
	h.up()
	h.p.until("recovery ends", func() bool { return h.p.value("SELECT pg_is_in_recovery()") == "false" })
	parent := b.timeline
	h.now = b
	h.now.timeline = uint32(len(h.lines)) + 1
	var fork backup.LSN
	history, err := os.ReadFile(filepath.Join(h.p.server.DataDirectory, "pg_wal", fmt.Sprintf("%08X.history", h.now.timeline)))
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(history)) { // "parent LSN reason"; the last line is the parent's
		if f := strings.Fields(line); len(f) > 1 && f[0] == fmt.Sprint(parent) {
			if fork, err = backup.ParseLSN(f[1]); err != nil {
				h.t.Fatal(err)
			}
		}
	}
	h.lines[h.now.timeline] = line{parent: parent, fork: fork}
	if old := h.lines[parent]; promoted { // its last segment goes on in the new timeline
		old.reach = fork / segment * segment
		h.lines[parent] = old
	}
	h.note("timeline %d forks from %d at %s", h.now.timeline, parent, fork)
}

// copyFiles keeps the files of the crashed server, as a standby that falls
// behind would.
func (h *history) copyFiles() {
	h.t.Helper()
	h.note("files copied after a crash")
	h.down()
	h.files("cp", "-a", h.p.server.DataDirectory, h.markDir)
	mark := h.now.clone()
	h.mark = &mark
	h.up()
}

// fallBack replaces the server by that copy, on a timeline of its own: what was
// committed since is on another one.
func (h *history) fallBack() {
	h.t.Helper()
	h.note("back to the copied files")
	h.endLine(h.ship())
	h.down()
	pgWAL := filepath.Join(h.p.server.DataDirectory, "pg_wal")
	histories, err := filepath.Glob(filepath.Join(pgWAL, "*.history"))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, file := range histories { // no timeline is to be chosen twice
		h.files("cp", "-a", file, filepath.Join(h.markDir, "pg_wal"))
	}
	h.files("rm", "-r", h.p.server.DataDirectory)
	h.files("cp", "-a", h.markDir, h.p.server.DataDirectory)
	h.begin(h.mark.clone(), false)
}

func (h *history) files(tool string, args ...string) {
	h.t.Helper()
	if out, err := exec.CommandContext(h.t.Context(), tool, args...).CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v: %s", tool, err, out)
	}
}

// ship ends the segment, waits until it is in the catalog and returns its end.
func (h *history) ship() backup.LSN {
	h.t.Helper()
	h.exec(h.conn, "SELECT pg_logical_emit_message(false, 'x', 'x')")
	at := wal.At(wal.Timeline(h.now.timeline), h.lsn()-1, segment)
	h.exec(h.conn, "SELECT pg_switch_wal()")
	h.p.until("the WAL is shipped", func() bool {
		files, err := h.p.flow.Catalog.WAL().List(h.t.Context())
		if err != nil {
			h.t.Fatal(err)
		}
		for _, f := range files {
			if f.File == at.File(segment) {
				return true
			}
		}
		return false
	})
	return at.End(segment)
}
