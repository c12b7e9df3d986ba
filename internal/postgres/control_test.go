package postgres_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cleancut/internal/postgres"
)

// The goldens in testdata/control are pg_control files of real clusters, named
// MAJOR-WHAT, each with what pg_controldata 15 prints for the same bytes (it
// knows every layout but the CRC of 18) and, where a server was running that
// could say it, the SQL functions pg_control_*() and pg_settings as JSON.
const controlDir = "testdata/control"

func goldenControls(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(controlDir, "*.pg_control"))
	if err != nil || len(paths) < 20 {
		t.Fatalf("golden pg_control files: %d found, error %v", len(paths), err)
	}
	return paths
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// controlText holds the fields of a control file as pg_controldata prints them.
func controlText(c postgres.Control) map[string]string {
	onOff := map[bool]string{true: "on", false: "off"}
	yesNo := map[bool]string{true: "yes", false: "no"}
	return map[string]string{
		"pg_control version number":            fmt.Sprint(c.ControlVersion),
		"Catalog version number":               fmt.Sprint(c.CatalogVersion),
		"Database system identifier":           fmt.Sprint(c.SystemIdentifier),
		"Database cluster state":               c.State.String(),
		"pg_control last modified":             c.Time.Format(time.ANSIC),
		"Latest checkpoint location":           lsn(c.CheckpointLSN),
		"Latest checkpoint's REDO location":    lsn(c.RedoLSN),
		"Latest checkpoint's TimeLineID":       fmt.Sprint(c.TimeLine),
		"Latest checkpoint's PrevTimeLineID":   fmt.Sprint(c.PrevTimeLine),
		"Latest checkpoint's full_page_writes": onOff[c.FullPageWrites],
		"Latest checkpoint's NextXID":          fmt.Sprintf("%d:%d", c.NextXID>>32, uint32(c.NextXID)),
		"Time of latest checkpoint":            c.CheckpointTime.Format(time.ANSIC),
		"Minimum recovery ending location":     lsn(c.MinRecoveryLSN),
		"Min recovery ending loc's timeline":   fmt.Sprint(c.MinRecoveryTLI),
		"Backup start location":                lsn(c.BackupStartLSN),
		"Backup end location":                  lsn(c.BackupEndLSN),
		"End-of-backup record required":        yesNo[c.BackupEndRequired],
		"wal_level setting":                    c.WALLevel.String(),
		"max_connections setting":              fmt.Sprint(c.MaxConnections),
		"max_worker_processes setting":         fmt.Sprint(c.MaxWorkerProcesses),
		"max_wal_senders setting":              fmt.Sprint(c.MaxWALSenders),
		"max_prepared_xacts setting":           fmt.Sprint(c.MaxPreparedXacts),
		"max_locks_per_xact setting":           fmt.Sprint(c.MaxLocksPerXact),
		"Database block size":                  fmt.Sprint(c.BlockSize),
		"Blocks per segment of large relation": fmt.Sprint(c.SegmentBlocks),
		"WAL block size":                       fmt.Sprint(c.WALBlockSize),
		"Bytes per WAL segment":                fmt.Sprint(c.WALSegmentSize),
		"Data page checksum version":           fmt.Sprint(c.DataChecksumVersion),
	}
}

func lsn(v uint64) string { return fmt.Sprintf("%X/%X", v>>32, uint32(v)) }

func TestParseControlReadsWhatPgControldataPrints(t *testing.T) {
	states := map[string]bool{}
	for _, path := range goldenControls(t) {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".pg_control"), func(t *testing.T) {
			c, err := postgres.ParseControl(readFile(t, path))
			if err != nil {
				t.Fatal(err)
			}
			states[c.State.String()] = true
			want := map[string]string{}
			text := string(readFile(t, strings.TrimSuffix(path, "pg_control")+"controldata"))
			for line := range strings.Lines(text) {
				if key, value, ok := strings.Cut(line, ":"); ok {
					want[key] = strings.TrimSpace(value)
				}
			}
			for key, got := range controlText(c) {
				if got != want[key] {
					t.Errorf("%s: got %q, want %q", key, got, want[key])
				}
			}
		})
	}
	for _, state := range []string{"shut down", "shut down in recovery", "shutting down",
		"in crash recovery", "in archive recovery", "in production"} {
		if !states[state] {
			t.Errorf("no golden file in state %q", state)
		}
	}
}

// serverView is what a running server said about its own control file.
type serverView struct {
	System struct {
		SystemIdentifier json.Number `json:"system_identifier"`
		CatalogVersion   uint32      `json:"catalog_version_no"`
		ControlVersion   uint32      `json:"pg_control_version"`
		Modified         time.Time   `json:"pg_control_last_modified"`
	}
	Checkpoint struct {
		Checkpoint   string    `json:"checkpoint_lsn"`
		Redo         string    `json:"redo_lsn"`
		TimeLine     uint32    `json:"timeline_id"`
		PrevTimeLine uint32    `json:"prev_timeline_id"`
		FPW          bool      `json:"full_page_writes"`
		NextXID      string    `json:"next_xid"`
		Time         time.Time `json:"checkpoint_time"`
	}
	Init struct {
		BlockSize     uint32 `json:"database_block_size"`
		SegmentBlocks uint32 `json:"blocks_per_segment"`
		WALBlockSize  uint32 `json:"wal_block_size"`
		WALSegment    uint32 `json:"bytes_per_wal_segment"`
		Checksums     uint32 `json:"data_page_checksum_version"`
	}
	Recovery struct {
		MinLSN      string `json:"min_recovery_end_lsn"`
		MinTLI      uint32 `json:"min_recovery_end_timeline"`
		BackupStart string `json:"backup_start_lsn"`
		BackupEnd   string `json:"backup_end_lsn"`
		EndRequired bool   `json:"end_of_backup_record_required"`
	}
	InRecovery bool `json:"in_recovery"`
	Settings   map[string]string
}

// text is the view in the words of controlText.
func (v serverView) text() map[string]string {
	state, set := "in production", v.Settings
	if v.InRecovery {
		state = "in archive recovery"
	}
	onOff := map[bool]string{true: "on", false: "off"}
	yesNo := map[bool]string{true: "yes", false: "no"}
	return map[string]string{
		"pg_control version number":            fmt.Sprint(v.System.ControlVersion),
		"Catalog version number":               fmt.Sprint(v.System.CatalogVersion),
		"Database system identifier":           v.System.SystemIdentifier.String(),
		"Database cluster state":               state,
		"pg_control last modified":             v.System.Modified.UTC().Format(time.ANSIC),
		"Latest checkpoint location":           v.Checkpoint.Checkpoint,
		"Latest checkpoint's REDO location":    v.Checkpoint.Redo,
		"Latest checkpoint's TimeLineID":       fmt.Sprint(v.Checkpoint.TimeLine),
		"Latest checkpoint's PrevTimeLineID":   fmt.Sprint(v.Checkpoint.PrevTimeLine),
		"Latest checkpoint's full_page_writes": onOff[v.Checkpoint.FPW],
		"Latest checkpoint's NextXID":          v.Checkpoint.NextXID,
		"Time of latest checkpoint":            v.Checkpoint.Time.UTC().Format(time.ANSIC),
		"Minimum recovery ending location":     v.Recovery.MinLSN,
		"Min recovery ending loc's timeline":   fmt.Sprint(v.Recovery.MinTLI),
		"Backup start location":                v.Recovery.BackupStart,
		"Backup end location":                  v.Recovery.BackupEnd,
		"End-of-backup record required":        yesNo[v.Recovery.EndRequired],
		"wal_level setting":                    set["wal_level"],
		"max_connections setting":              set["max_connections"],
		"max_worker_processes setting":         set["max_worker_processes"],
		"max_wal_senders setting":              set["max_wal_senders"],
		"max_prepared_xacts setting":           set["max_prepared_transactions"],
		"max_locks_per_xact setting":           set["max_locks_per_transaction"],
		"Database block size":                  fmt.Sprint(v.Init.BlockSize),
		"Blocks per segment of large relation": fmt.Sprint(v.Init.SegmentBlocks),
		"WAL block size":                       fmt.Sprint(v.Init.WALBlockSize),
		"Bytes per WAL segment":                fmt.Sprint(v.Init.WALSegment),
		"Data page checksum version":           fmt.Sprint(v.Init.Checksums),
	}
}

func TestParseControlReadsWhatTheServerSaysOfItself(t *testing.T) {
	majors := map[string]bool{}
	for _, path := range goldenControls(t) {
		name := strings.TrimSuffix(path, ".pg_control")
		said, err := os.ReadFile(name + ".json")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		t.Run(filepath.Base(name), func(t *testing.T) {
			var view serverView
			if err := json.Unmarshal(said, &view); err != nil {
				t.Fatal(err)
			}
			c, err := postgres.ParseControl(readFile(t, path))
			if err != nil {
				t.Fatal(err)
			}
			majors[filepath.Base(name)[:2]] = true
			want := view.text()
			for key, got := range controlText(c) {
				if got != want[key] {
					t.Errorf("%s: got %q, want %q", key, got, want[key])
				}
			}
		})
	}
	if len(majors) != 6 {
		t.Errorf("majors with a server's own words: %v, want 13 to 18", majors)
	}
}

func TestParseControlRefuses(t *testing.T) {
	good := readFile(t, controlDir+"/15-fresh.pg_control")
	changed := func(at int, v byte) []byte {
		b := append([]byte(nil), good...)
		b[at] = v
		return b
	}
	pg12 := append([]byte(nil), good...)
	binary.LittleEndian.PutUint32(pg12[8:], 1201)
	cases := map[string]struct {
		b    []byte
		want error
		says string
	}{
		"an empty file":                      {nil, postgres.ErrControlSize, "but 0"},
		"a file cut short after its fields":  {good[:300], postgres.ErrControlSize, "but 300"},
		"a file with a byte too many":        {append(good[:8192:8192], 0), postgres.ErrControlSize, "but 8193"},
		"a page of zeroes":                   {make([]byte, 8192), postgres.ErrControlVersion, "version 0 "},
		"the format of PostgreSQL 12 (1201)": {pg12, postgres.ErrControlVersion, "version 1201 "},
		"a flipped bit in the last field":    {changed(287, good[287]^1), postgres.ErrControlCRC, "stored"},
		"a flipped bit in the CRC":           {changed(288, good[288]^1), postgres.ErrControlCRC, "computed"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := postgres.ParseControl(c.b)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got error %v, want %v saying %q", err, c.want, c.says)
			}
			if got != (postgres.Control{}) {
				t.Errorf("got %+v beside the error", got)
			}
		})
	}
}

func TestReadControl(t *testing.T) {
	good := readFile(t, controlDir+"/15-fresh.pg_control")
	torn := func(n byte) []byte {
		b := append([]byte(nil), good...)
		b[40] ^= n
		return b
	}
	cases := []struct {
		name     string
		versions [][]byte // what the file holds in the first, second, ... 10 ms
		want     error
		wantTime time.Duration
	}{
		{"a sound file is read once", [][]byte{good}, nil, 0},
		{"a torn read is repeated until it is whole", [][]byte{torn(1), torn(2), good}, nil, 20 * time.Millisecond},
		{"a damaged file is not waited for", [][]byte{torn(1)}, postgres.ErrControlCRC, 10 * time.Millisecond},
		{"ten torn reads are enough", [][]byte{torn(1), torn(2), torn(3), torn(4), torn(5), torn(6), torn(7), torn(8), torn(9),
			torn(10), good}, postgres.ErrControlCRC, 90 * time.Millisecond},
		{"a short file is not read again", [][]byte{good[:100], good}, postgres.ErrControlSize, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pg_control")
			synctest.Test(t, func(t *testing.T) {
				write := func(b []byte) {
					if err := os.WriteFile(path, b, 0o600); err != nil {
						t.Error(err)
					}
				}
				write(c.versions[0])
				var writer sync.WaitGroup
				defer writer.Wait()
				writer.Go(func() {
					time.Sleep(5 * time.Millisecond)
					for _, b := range c.versions[1:] {
						write(b)
						time.Sleep(10 * time.Millisecond)
					}
				})
				start := time.Now()
				got, err := postgres.ReadControl(path)
				if !errors.Is(err, c.want) {
					t.Errorf("got error %v, want %v", err, c.want)
				}
				if err != nil && !strings.Contains(err.Error(), path) {
					t.Errorf("error %q does not name %s", err, path)
				}
				if err == nil && got.State != postgres.ControlShutDown {
					t.Errorf("got state %v, want shut down", got.State)
				}
				if took := time.Since(start); took != c.wantTime {
					t.Errorf("took %v, want %v", took, c.wantTime)
				}
			})
		})
	}
}

func TestReadControlTellsAMissingFileApart(t *testing.T) {
	if _, err := postgres.ReadControl(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
}

// FuzzParseControl works on the part that holds fields; what follows in a real
// file are zeroes, which would only slow it down.
func FuzzParseControl(f *testing.F) {
	for _, path := range goldenControls(f) {
		f.Add(readFile(f, path)[:300], uint16(40))
	}
	f.Add([]byte("short"), uint16(0))
	f.Fuzz(func(t *testing.T, head []byte, at uint16) {
		if _, err := postgres.ParseControl(head); err == nil && len(head) != 8192 {
			t.Fatalf("accepted %d bytes", len(head))
		}
		b := make([]byte, 8192)
		copy(b, head)
		first, err := postgres.ParseControl(b)
		if errors.Is(err, postgres.ErrControlVersion) {
			return
		}
		crcAt := 288
		if binary.LittleEndian.Uint32(b[8:]) == 1800 {
			crcAt = 292
		}
		fixed := append([]byte(nil), b...)
		binary.LittleEndian.PutUint32(fixed[crcAt:], crc32.Checksum(b[:crcAt], crc32.MakeTable(crc32.Castagnoli)))
		c, err2 := postgres.ParseControl(fixed)
		if err2 != nil {
			t.Fatalf("refused a right CRC: %v", err2)
		}
		if err == nil && c != first {
			t.Fatalf("the same bytes read as %+v and %+v", first, c)
		}
		_, _ = c.State.String(), c.WALLevel.String()
		fixed[int(at)%(crcAt+4)] ^= 0x40
		if _, err := postgres.ParseControl(fixed); err == nil {
			t.Fatalf("a flipped bit at %d went unseen", int(at)%(crcAt+4))
		}
	})
}
