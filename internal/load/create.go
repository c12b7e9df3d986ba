package load

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

// Options says how large a play database is. Zero values mean the defaults.
type Options struct {
	Rows     int64 // people, and as many words, and a tenth as many documents; default 200,000, about 100 MB in all
	Seed     int64 // the same seed and size give the same rows; default 1
	Branches int   // of the bank that Transfers works on; default 10
	Accounts int   // of each branch; default 5,000

	// Progress, if set, is called after each portion with rows done and in all.
	Progress func(done, total int64)
}

// Facts is what Create made: the part of a promise that never changes.
type Facts struct {
	Seed   int64            `json:"seed"`
	Tables map[string]int64 `json:"tables"` // rows of each table whose number of rows no beater changes
	Bytes  backup.Bytes     `json:"bytes"`  // pg_database_size when it was made
}

const (
	defaultRows     = 200_000
	defaultBranches = 10
	defaultAccounts = 5_000
	tellersPerBank  = 10      // of a branch, as in pgbench
	portion         = 100_000 // rows of one statement of Create, so that progress shows and a cancel is obeyed
)

// schema holds the tables. documents.body is kept uncompressed (EXTERNAL), so
// that a long one is stored out of line whatever its text. words_said and
// transfers are the tables of the beaters Words and Transfers; bulk is Bulk's.
const schema = `
create schema play;
create table play.people    (id bigint not null, given text not null, family text not null, born date not null, email text not null, note text not null);
create table play.words     (id bigint not null, word text not null, weight int not null);
create table play.documents (id bigint not null, author bigint not null, title text not null, body text not null);
alter table play.documents alter column body set storage external;

create table play.bulk       (n bigint not null, person bigint not null, family text not null, note text not null);
create table play.words_said (stream bigint not null, id bigint not null, word text not null, sum uuid not null,
                              at timestamptz not null default clock_timestamp(), primary key (stream, id));
create table play.branches   (bid int primary key, balance bigint not null, filler text not null);
create table play.tellers    (tid int primary key, bid int not null, balance bigint not null, filler text not null);
create table play.accounts   (aid bigint primary key, bid int not null, balance bigint not null, filler text not null);
create table play.transfers  (stream bigint not null, id bigint not null, bid int not null, tid int not null, aid bigint not null, delta bigint not null,
                              at timestamptz not null default clock_timestamp(), primary key (stream, id));
create table play.markers    (n int primary key, note text not null, at timestamptz not null default clock_timestamp());
create index bulk_family on play.bulk (family)`

// indexes are built after the rows, as a loader would.
const indexes = `
alter table play.people    add primary key (id);
alter table play.words     add primary key (id);
alter table play.documents add primary key (id);
create index people_family on play.people (family, given);
create unique index people_email on play.people (email);
create index words_word on play.words (word);
create index documents_author on play.documents (author)`

// The filling statements take the first and last id, the seed, the word list
// and their own two numbers. hashint8extended (PostgreSQL 11) mixes the id
// with the seed plus a number that tells the columns apart.
const (
	pick = `($4::text[])[1 + abs(hashint8extended(%s, $3 + %d) %% cardinality($4::text[]))]`

	fillBranches = `insert into play.branches select i, 0, repeat('b', 80) from generate_series($1::int, $2::int) i`
	fillTellers  = `insert into play.tellers select i, 1 + (i - 1) / $3::int, 0, repeat('t', 60) from generate_series($1::int, $2::int) i`
	fillAccounts = `insert into play.accounts select i, 1 + (i - 1) / $3::bigint, 0, repeat('a', 60) from generate_series($1::bigint, $2::bigint) i`
)

func fillPeople() string {
	return fmt.Sprintf(`insert into play.people select i, initcap(`+pick+`), initcap(`+pick+`||`+pick+`),
		date '1930-01-01' + (abs(hashint8extended(i, $3 + 4) %% 30000))::int,
		`+pick+`||'.'||i||'@example.org',
		(select string_agg(`+pick+`, ' ') from generate_series(1, 10) j)
		from generate_series($1::bigint, $2::bigint) i`, "i", 1, "i", 2, "i", 3, "i", 5, "i * 16 + j", 6)
}

func fillWords() string {
	return fmt.Sprintf(`insert into play.words select i, `+pick+`||`+pick+`||`+pick+`, (abs(hashint8extended(i, $3 + 10) %% 1000))::int
		from generate_series($1::bigint, $2::bigint) i`, "i", 7, "i", 8, "i", 9)
}

// Every 20th document is some 9 kB long and so goes to the TOAST table.
func fillDocuments() string {
	return fmt.Sprintf(`insert into play.documents select i, 1 + abs(hashint8extended(i, $3 + 11) %% ($2::bigint)), initcap(`+pick+`)||' '||`+pick+`,
		(select string_agg(`+pick+`, ' ') from generate_series(1, case when i %% 20 = 0 then 1500 else 20 end) j)
		from generate_series($1::bigint, $2::bigint) i`, "i", 12, "i", 13, "i * 2048 + j", 14)
}

func (o Options) withDefaults() Options {
	if o.Rows <= 0 {
		o.Rows = defaultRows
	}
	if o.Seed == 0 {
		o.Seed = 1
	}
	if o.Branches <= 0 {
		o.Branches = defaultBranches
	}
	if o.Accounts <= 0 {
		o.Accounts = defaultAccounts
	}
	return o
}

// Create makes the play database in the schema "play" of the database that
// conn is connected to, server-side, and the empty tables of the beaters. The
// error wraps backup.ErrExists if the schema is there already. A failed or
// cancelled Create leaves a half-made schema: drop it or the database.
func Create(ctx context.Context, conn *pgx.Conn, o Options) (Facts, error) {
	o = o.withDefaults()
	facts := Facts{Seed: o.Seed, Tables: map[string]int64{}}
	if _, err := conn.Exec(ctx, schema); err != nil {
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == "42P06" { // duplicate_schema
			err = backup.Hint(fmt.Errorf("%w: %w", backup.ErrExists, err), "use an empty database, or drop schema play first")
		}
		return Facts{}, fmt.Errorf("create play database: %w", err)
	}
	documents := max(o.Rows/10, 1)
	steps := []struct {
		table string
		sql   string
		rows  int64
		args  []any // after the first and last id
	}{
		{"play.people", fillPeople(), o.Rows, []any{o.Seed, vocabulary()}},
		{"play.words", fillWords(), o.Rows, []any{o.Seed, vocabulary()}},
		{"play.documents", fillDocuments(), documents, []any{o.Seed, vocabulary()}},
		{"play.branches", fillBranches, int64(o.Branches), nil},
		{"play.tellers", fillTellers, int64(o.Branches) * tellersPerBank, []any{tellersPerBank}},
		{"play.accounts", fillAccounts, int64(o.Branches) * int64(o.Accounts), []any{int64(o.Accounts)}},
	}
	var done, total int64
	for _, s := range steps {
		total += s.rows
	}
	for _, s := range steps {
		for first := int64(1); first <= s.rows; first += portion {
			last := min(first+portion-1, s.rows)
			tag, err := conn.Exec(ctx, s.sql, append([]any{first, last}, s.args...)...)
			if err != nil {
				return Facts{}, fmt.Errorf("fill %s: %w", s.table, err)
			}
			facts.Tables[s.table] += tag.RowsAffected()
			done += tag.RowsAffected()
			if o.Progress != nil {
				o.Progress(done, total)
			}
		}
	}
	if _, err := conn.Exec(ctx, indexes); err != nil {
		return Facts{}, fmt.Errorf("index play database: %w", err)
	}
	if _, err := conn.Exec(ctx, `vacuum analyze`); err != nil {
		return Facts{}, fmt.Errorf("analyze play database: %w", err)
	}
	err := conn.QueryRow(ctx, `select pg_database_size(current_database())`).Scan(&facts.Bytes)
	if err != nil {
		return Facts{}, fmt.Errorf("size of play database: %w", err)
	}
	return facts, nil
}

// vocabulary is the list that names, words and texts are made of.
func vocabulary() []string {
	return []string{
		"amber", "anchor", "apple", "autumn", "badger", "barley", "basalt", "beacon", "birch", "blossom",
		"bramble", "breeze", "bridge", "candle", "canyon", "cedar", "chalk", "cherry", "cinder", "clover",
		"cobalt", "copper", "coral", "cotton", "cricket", "dapple", "delta", "drift", "eagle", "elder",
		"ember", "fable", "falcon", "fern", "fiddle", "flint", "forest", "fossil", "garnet", "ginger",
		"glacier", "granite", "hamlet", "harbour", "hazel", "heather", "heron", "hollow", "indigo", "iris",
		"ivory", "jasper", "juniper", "kestrel", "kindle", "lagoon", "lantern", "laurel", "lichen", "linden",
		"maple", "marble", "meadow", "mellow", "mirror", "morning", "moss", "nectar", "nettle", "nutmeg",
		"oak", "ocean", "olive", "onyx", "orchard", "otter", "paper", "pebble", "pepper", "pigeon",
		"plum", "prairie", "quarry", "quill", "quartz", "rabbit", "raven", "river", "rowan", "russet",
		"saffron", "sailor", "shadow", "silver", "sparrow", "spruce", "summit", "thistle", "timber", "umber",
		"valley", "velvet", "violet", "walnut", "willow", "winter", "wren", "yarrow", "yonder", "zephyr",
	}
}
