package postgres

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"
)

// ErrControlSize, ErrControlCRC and ErrControlVersion are what can be wrong
// with the bytes of a global/pg_control.
var (
	// ErrControlSize: not the 8192 bytes PostgreSQL always writes
	// (PG_CONTROL_FILE_SIZE); truncated, or not a pg_control.
	ErrControlSize = errors.New("pg_control does not have 8192 bytes")
	// ErrControlCRC: the CRC-32C stored in the file is not that of its
	// content; damaged, or read while the server was writing it.
	ErrControlCRC = errors.New("pg_control has a wrong CRC")
	// ErrControlVersion: a format this reader does not know; the wrapping
	// error names its number.
	ErrControlVersion = errors.New("unknown pg_control version")
)

const (
	controlSize       = 8192                  // PG_CONTROL_FILE_SIZE
	controlReads      = 10                    // tries of get_controlfile
	controlReadsPause = 10 * time.Millisecond // its pg_usleep between them
)

// ControlState is the status a server left in its control file: DBState of
// src/include/catalog/pg_control.h, numbers included.
type ControlState uint32

// The states of a cluster. A copy taken of a running server holds
// ControlInProduction, or ControlInArchiveRecovery when it was a standby.
const (
	ControlStartingUp         ControlState = 0
	ControlShutDown           ControlState = 1
	ControlShutDownInRecovery ControlState = 2
	ControlShuttingDown       ControlState = 3
	ControlInCrashRecovery    ControlState = 4
	ControlInArchiveRecovery  ControlState = 5
	ControlInProduction       ControlState = 6
)

// String returns the words pg_controldata prints as "Database cluster state".
func (s ControlState) String() string {
	switch s {
	case ControlStartingUp:
		return "starting up"
	case ControlShutDown:
		return "shut down"
	case ControlShutDownInRecovery:
		return "shut down in recovery"
	case ControlShuttingDown:
		return "shutting down"
	case ControlInCrashRecovery:
		return "in crash recovery"
	case ControlInArchiveRecovery:
		return "in archive recovery"
	case ControlInProduction:
		return "in production"
	}
	return "unrecognized status code"
}

// WALLevel is the setting wal_level: WalLevel of src/include/access/xlog.h,
// numbers included.
type WALLevel int32

// The levels of WAL, each holding what the one before it holds.
const (
	WALMinimal WALLevel = 0
	WALReplica WALLevel = 1
	WALLogical WALLevel = 2
)

// String returns the word pg_controldata prints as "wal_level setting".
func (l WALLevel) String() string {
	switch l {
	case WALMinimal:
		return "minimal"
	case WALReplica:
		return "replica"
	case WALLogical:
		return "logical"
	}
	return "unrecognized wal_level"
}

// Control is the content of global/pg_control (ControlFileData of
// src/include/catalog/pg_control.h) as far as a backup needs it. LSNs are byte
// positions in the WAL; 0 means none ("0/0"). Times are UTC, to the second.
type Control struct {
	// SystemIdentifier is made by initdb and shared by all copies of a cluster.
	SystemIdentifier uint64
	ControlVersion   uint32 // PG_CONTROL_VERSION: 1300 (13 to 16), 1700, 1800
	CatalogVersion   uint32 // CATALOG_VERSION_NO, one for each major version
	State            ControlState
	Time             time.Time // when the file was last written

	CheckpointLSN  uint64    // where the record of the last checkpoint starts
	RedoLSN        uint64    // where recovery from that checkpoint starts
	TimeLine       uint32    // of that checkpoint
	PrevTimeLine   uint32    // differs where that checkpoint began TimeLine
	FullPageWrites bool      // as of that checkpoint
	NextXID        uint64    // FullTransactionId: epoch << 32 | XID
	CheckpointTime time.Time // when that checkpoint began

	MinRecoveryLSN    uint64 // a copy is consistent only from here on
	MinRecoveryTLI    uint32 // the timeline of MinRecoveryLSN; 0 when none
	BackupStartLSN    uint64 // redo of the backup being recovered; 0 once its end is reached
	BackupEndLSN      uint64 // known only for a backup taken of a standby
	BackupEndRequired bool   // recovery must meet the end-of-backup record

	// The settings that recovery checks (CheckRequiredParameterValues): a
	// standby or an archive recovery refuses to run with smaller ones.
	WALLevel           WALLevel
	MaxConnections     int
	MaxWorkerProcesses int
	MaxWALSenders      int
	MaxPreparedXacts   int
	MaxLocksPerXact    int

	BlockSize           uint32 // bytes in a page of data
	SegmentBlocks       uint32 // pages in a file of a large relation (relseg_size)
	WALBlockSize        uint32 // bytes in a page of WAL
	WALSegmentSize      uint32 // bytes in a WAL file
	DataChecksumVersion uint32 // 0: pages have no checksums
}

// ParseControl reads the 8192 bytes of a global/pg_control written by
// PostgreSQL 13 to 18 on a little-endian 64-bit machine. It returns
// ErrControlSize, ErrControlVersion or ErrControlCRC, checked in this order as
// in ReadControlFile of src/backend/access/transam/xlog.c: the version says
// where the CRC lies.
func ParseControl(b []byte) (Control, error) {
	if len(b) != controlSize {
		return Control{}, fmt.Errorf("%w but %d", ErrControlSize, len(b))
	}
	le := binary.LittleEndian
	version := le.Uint32(b[8:])
	crcAt := controlCRCOffset(version)
	if crcAt == 0 {
		return Control{}, fmt.Errorf("%w %d (known: 1300, 1700, 1800)", ErrControlVersion, version)
	}
	stored, computed := le.Uint32(b[crcAt:]), crc32.Checksum(b[:crcAt], crc32.MakeTable(crc32.Castagnoli))
	if stored != computed {
		return Control{}, fmt.Errorf("%w: %08x stored, %08x computed", ErrControlCRC, stored, computed)
	}
	return decodeControl(b), nil
}

// controlCRCOffset returns where the CRC lies, which covers all bytes before
// it; 0 for a version not known. 1700 put the checkpoint's wal_level into
// padding of 1300; 1800 grew by default_char_signedness, behind every field
// read here.
func controlCRCOffset(version uint32) int {
	switch version {
	case 1300, 1700:
		return 288
	case 1800:
		return 292
	}
	return 0
}

// decodeControl reads the fields, whose offsets (those of the C struct, with
// its alignment) are the same in all versions known.
func decodeControl(b []byte) Control {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	setting := func(at int) int { return int(int32(u32(b[at:]))) }
	stamp := func(at int) time.Time { return time.Unix(int64(u64(b[at:])), 0).UTC() }
	return Control{
		SystemIdentifier: u64(b[0:]),
		ControlVersion:   u32(b[8:]),
		CatalogVersion:   u32(b[12:]),
		State:            ControlState(u32(b[16:])),
		Time:             stamp(24),
		CheckpointLSN:    u64(b[32:]),

		// checkPointCopy, 88 bytes from 40
		RedoLSN:        u64(b[40:]),
		TimeLine:       u32(b[48:]),
		PrevTimeLine:   u32(b[52:]),
		FullPageWrites: b[56] != 0,
		NextXID:        u64(b[64:]),
		CheckpointTime: stamp(104),

		MinRecoveryLSN:    u64(b[136:]),
		MinRecoveryTLI:    u32(b[144:]),
		BackupStartLSN:    u64(b[152:]),
		BackupEndLSN:      u64(b[160:]),
		BackupEndRequired: b[168] != 0,

		WALLevel:           WALLevel(u32(b[172:])),
		MaxConnections:     setting(180),
		MaxWorkerProcesses: setting(184),
		MaxWALSenders:      setting(188),
		MaxPreparedXacts:   setting(192),
		MaxLocksPerXact:    setting(196),

		BlockSize:           u32(b[216:]),
		SegmentBlocks:       u32(b[220:]),
		WALBlockSize:        u32(b[224:]),
		WALSegmentSize:      u32(b[228:]),
		DataChecksumVersion: u32(b[252:]),
	}
}

// ReadControl reads and parses the file at path (DATADIR/global/pg_control).
// A server may be writing it: not every filesystem makes reads and writes
// atomic, so after a wrong CRC the file is read again, 10 ms later and at most
// ten times, until two reads agree (get_controlfile of
// src/common/controldata_utils.c). Errors are those of ParseControl and of
// opening and reading the file, with its path.
func ReadControl(path string) (Control, error) {
	_, c, err := ReadLiveControl(path)
	return c, err
}

// ReadLiveControl is ReadControl for who needs the bytes, too: the end of a
// backup of a standby is the minimum recovery point in its pg_control, which
// therefore must be read after the last cut and put in place of the image's
// (do_pg_backup_stop of xlog.c: "We assume that pg_control was backed up last").
func ReadLiveControl(path string) ([]byte, Control, error) {
	var last string
	for try := 1; ; try++ {
		b, err := readControlOnce(path)
		if err != nil {
			return nil, Control{}, err
		}
		c, err := ParseControl(b)
		if err == nil {
			return b, c, nil
		}
		if !errors.Is(err, ErrControlCRC) || string(b) == last || try == controlReads {
			return nil, Control{}, fmt.Errorf("read %s: %w", path, err)
		}
		last = string(b)
		time.Sleep(controlReadsPause)
	}
}

// readControlOnce reads the 8192 bytes in one system call, so that a torn read
// is least likely, and at most one byte more, which tells a longer file.
func readControlOnce(path string) (b []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read pg_control: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b = make([]byte, controlSize+1)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read pg_control: %w", err)
	}
	return b[:n], nil
}
