package backup

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// DumpVersion is the version of a dump's manifest that this program writes;
// docs/dump.md describes it.
const DumpVersion = 1

// DumpFormat is what a dump is made of.
type DumpFormat string

// The formats.
const (
	DumpSQL         DumpFormat = "sql"          // pg_dumpall, one stream
	DumpPerDatabase DumpFormat = "per-database" // globals, and an archive of pg_dump for each database
)

// DumpArchive is the kind of a database's archive.
type DumpArchive string

// The archives.
const (
	ArchiveCustom    DumpArchive = "custom"    // pg_dump -Fc, streamed
	ArchiveDirectory DumpArchive = "directory" // pg_dump -Fd --jobs, packed by tar
)

// DumpManifest is the record of one dump, written last: a dump without it is
// incomplete.
type DumpManifest struct {
	Version    int         `json:"version"`
	Name       string      `json:"name"` // of the dump among those of the backup
	Tool       string      `json:"tool"` // version of cleancut
	Host       string      `json:"host"`
	Backup     ID          `json:"backup"`
	Cluster    string      `json:"cluster"`
	Created    time.Time   `json:"created"`
	Target     string      `json:"target,omitempty"` // of the recovery, as ParseTarget reads it; empty: the end of the backup
	Format     DumpFormat  `json:"format"`
	Archive    DumpArchive `json:"archive,omitempty"` // of DumpPerDatabase
	Server     DumpServer  `json:"server"`
	PgDump     string      `json:"pg_dump"` // what pg_dump --version says
	Level      int         `json:"level"`   // of zstd
	Recipients []string    `json:"recipients,omitempty"`
	// ChosenDatabases and ChosenSchemas are the names or patterns that were
	// asked for; empty: all.
	ChosenDatabases []string         `json:"chosen_databases,omitempty"`
	ChosenSchemas   []string         `json:"chosen_schemas,omitempty"`
	Parts           []DumpPart       `json:"parts"`
	Databases       []DumpedDatabase `json:"databases"`
	NotHeld         []string         `json:"not_held,omitempty"` // what the dump lacks, for people
	Seconds         float64          `json:"seconds"`
}

// DumpServer is what an empty server must be like to take the dump.
type DumpServer struct {
	Version    string `json:"version"`
	VersionNum int    `json:"version_num"`
	Superuser  string `json:"superuser"` // that initdb made, which exists in every cluster
	Locale     Locale `json:"locale"`    // of template0
	// Preload is shared_preload_libraries as the copy had it.
	Preload string `json:"preload,omitempty"`
}

// Major returns the major version.
func (s DumpServer) Major() int { return s.VersionNum / 10000 }

// Locale is what initdb fixes for a database.
type Locale struct {
	Encoding string `json:"encoding"`
	Provider string `json:"provider"` // libc, icu or builtin
	Collate  string `json:"collate"`
	Ctype    string `json:"ctype"`
	Name     string `json:"name,omitempty"` // of providers icu and builtin
}

// DumpPart is one stored object of a dump.
type DumpPart struct {
	Name      string `json:"name"`
	Database  string `json:"database,omitempty"` // empty: globals, or everything
	Size      Bytes  `json:"size"`               // as stored
	SHA256    string `json:"sha256"`
	PlainSize Bytes  `json:"plain_size"` // what PostgreSQL's program wrote
	// PlainHash is the XXH64 of those bytes: a tenth of the work of a SHA-256,
	// which is for the stored bytes.
	PlainHash string `json:"plain_xxh64"`
}

// DumpedDatabase is what is known of one database of a dump.
type DumpedDatabase struct {
	Name string `json:"name"`
	// Error is why the dump does not hold it; empty: it does.
	Error             string            `json:"error,omitempty"`
	Seconds           float64           `json:"seconds,omitempty"`
	Encoding          string            `json:"encoding"`
	CollationVersion  string            `json:"collation_version,omitempty"` // of its default collation, PostgreSQL 15+
	Counted           bool              `json:"counted"`                     // Tables have rows and hashes
	Tables            []DumpedTable     `json:"tables"`
	Sequences         []DumpedSequence  `json:"sequences,omitempty"`
	Extensions        []DumpedExtension `json:"extensions,omitempty"`
	MaterializedViews []string          `json:"materialized_views,omitempty"` // that are populated; they are computed anew
	ForeignTables     []string          `json:"foreign_tables,omitempty"`     // whose rows lie elsewhere
	LargeObjects      int64             `json:"large_objects"`
}

// DumpedTable is a table whose rows are in the dump.
type DumpedTable struct {
	Schema   string   `json:"schema"`
	Name     string   `json:"name"`
	Columns  []string `json:"columns"` // in the order of the dump
	Rows     int64    `json:"rows"`
	Hash     string   `json:"hash,omitempty"`     // sum of the XXH64 of every row's COPY text
	Unlogged bool     `json:"unlogged,omitempty"` // its rows are never in a backup: it is empty
}

// DumpedSequence is the state of a sequence.
type DumpedSequence struct {
	Schema string `json:"schema"`
	Name   string `json:"name"`
	Last   *int64 `json:"last_value"` // null: it gave none yet
}

// DumpedExtension is an extension that a database needs.
type DumpedExtension struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// DumpBegun is the first object of a dump in the catalog: who makes it. Sweep
// removes by it what a killed process left.
type DumpBegun struct {
	Backup ID        `json:"backup"`
	Name   string    `json:"name"`
	Host   string    `json:"host"`
	PID    int       `json:"pid"`
	Time   time.Time `json:"time"`
}

// DumpCheck is the recorded result of restoring a dump into an empty server.
type DumpCheck struct {
	Backup  ID        `json:"backup"`
	Dump    string    `json:"dump"`
	Tool    string    `json:"tool"`
	Host    string    `json:"host"`
	Time    time.Time `json:"time"`
	Seconds float64   `json:"seconds"`
	Server  int       `json:"server_major"` // that it was restored into; 0: none
	Tables  int       `json:"tables"`       // compared
	Rows    int64     `json:"rows"`         // of these
	Checks  []Check   `json:"checks"`
}

// Result is the worst of the checks; without any it could not run.
func (c DumpCheck) Result() CheckResult {
	has := func(r CheckResult) bool {
		return slices.ContainsFunc(c.Checks, func(k Check) bool { return k.Result == r })
	}
	switch {
	case has(Failed):
		return Failed
	case has(CouldNotRun) || !has(Passed):
		return CouldNotRun
	}
	return Passed
}

// Failed lists the databases that are not in the dump.
func (m DumpManifest) Failed() (out []DumpedDatabase) {
	for _, d := range m.Databases {
		if d.Error != "" {
			out = append(out, d)
		}
	}
	return out
}

// Held is how much of the cluster is in it: "3 of 4 databases".
func (m DumpManifest) Held() string {
	return fmt.Sprintf("%d of %d databases", len(m.Databases)-len(m.Failed()), len(m.Databases))
}

// Sizes sums up the parts.
func (m DumpManifest) Sizes() (plain, stored Bytes) {
	for _, p := range m.Parts {
		plain, stored = plain+p.PlainSize, stored+p.Size
	}
	return plain, stored
}

// Rows sums up the tables.
func (m DumpManifest) Rows() (tables int, rows int64) {
	for _, d := range m.Databases {
		for _, t := range d.Tables {
			tables, rows = tables+1, rows+t.Rows
		}
	}
	return tables, rows
}

// Validate checks that the manifest holds together.
func (m DumpManifest) Validate() error {
	if _, err := ParseID(string(m.Backup)); err != nil {
		return fmt.Errorf("dump manifest: %w", err)
	}
	if err := CheckClusterName(m.Cluster); err != nil {
		return fmt.Errorf("dump manifest: %w", err)
	}
	if m.Format != DumpSQL && m.Format != DumpPerDatabase || (m.Format == DumpSQL) != (m.Archive == "") ||
		m.Archive != "" && m.Archive != ArchiveCustom && m.Archive != ArchiveDirectory {
		return fmt.Errorf("dump manifest: format %q, archive %q", m.Format, m.Archive)
	}
	databases, parts := map[string]bool{}, map[string]bool{}
	for _, d := range m.Databases {
		if d.Name == "" || databases[d.Name] {
			return fmt.Errorf("dump manifest: database %q comes twice or has no name", d.Name)
		}
		databases[d.Name] = true
	}
	held := map[string]bool{}
	for _, p := range m.Parts {
		if p.Name == "" || parts[p.Name] || strings.ContainsAny(p.Name, "/\x00") || p.Name[0] == '.' || p.Database != "" && (!databases[p.Database] || held[p.Database]) {
			return fmt.Errorf("dump manifest: part %q of database %q", p.Name, p.Database)
		}
		parts[p.Name], held[p.Database] = true, true
	}
	if m.Format == DumpPerDatabase {
		for _, d := range m.Databases {
			if held[d.Name] != (d.Error == "") {
				return fmt.Errorf("dump manifest: database %q has a part: %t, an error: %q", d.Name, held[d.Name], d.Error)
			}
		}
	}
	return nil
}

// EncodeDumpManifest returns the bytes to store.
func EncodeDumpManifest(m DumpManifest) ([]byte, error) {
	if m.Version != DumpVersion {
		return nil, fmt.Errorf("encode dump manifest: version %d, this cleancut writes %d", m.Version, DumpVersion)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode dump manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// DecodeDumpManifest reads what EncodeDumpManifest wrote. A newer version is
// ErrUnsupported; unknown keys, bytes cut short or contents that do not hold
// together are errors.
func DecodeDumpManifest(b []byte) (DumpManifest, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return DumpManifest{}, fmt.Errorf("dump manifest is cut short or no JSON: %w", err)
	}
	if head.Version > DumpVersion {
		return DumpManifest{}, Hint(fmt.Errorf("dump manifest version %d, this cleancut reads up to %d: %w", head.Version, DumpVersion, ErrUnsupported),
			"use the cleancut that wrote it, or a newer one")
	}
	if head.Version < 1 {
		return DumpManifest{}, fmt.Errorf("dump manifest has no version")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var m DumpManifest
	if err := dec.Decode(&m); err != nil {
		return DumpManifest{}, fmt.Errorf("dump manifest: %w", err)
	}
	if dec.More() {
		return DumpManifest{}, fmt.Errorf("dump manifest: more than one JSON value")
	}
	return m, m.Validate()
}

// PartName is the name under which a database's archive is stored: letters,
// digits, - and _ as they are, every other byte as %XX, so that any name of a
// database is one part of a key and no two are the same.
func PartName(database string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for _, c := range []byte(database) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(hex[c>>4])
			b.WriteByte(hex[c&15])
		}
	}
	return b.String()
}
