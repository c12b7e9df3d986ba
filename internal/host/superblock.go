package host

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"
	"time"
)

// ErrNoSuperblock and ErrSuperblockChecksum are what can be wrong with the
// bytes of a Linux md superblock.
var (
	// ErrNoSuperblock: no magic number, not version 1, or a field that no
	// device could have; not a member of an md array.
	ErrNoSuperblock = errors.New("no md superblock")
	// ErrSuperblockChecksum: a superblock whose checksum is wrong; damaged, or
	// read while the kernel was writing it.
	ErrSuperblockChecksum = errors.New("md superblock has a wrong checksum")
)

const (
	sectorBytes        = 512
	superblockBytes    = 4096       // what a superblock may fill
	superblockHead     = 256        // sizeof(struct mdp_superblock_1)
	superblockMagic    = 0xa92b4efc // MD_SB_MAGIC
	superblockRoles    = (superblockBytes - superblockHead) / 2
	mdRoleMax          = 0xff00 // MD_DISK_ROLE_MAX: spare, faulty and journal lie above
	mdRoleJournal      = 0xfffd // MD_DISK_ROLE_JOURNAL
	mdFeatureBitmap    = 1      // MD_FEATURE_BITMAP_OFFSET
	mdFeatureReshape   = 4      // MD_FEATURE_RESHAPE_ACTIVE
	mdTimeSeconds      = 1<<40 - 1
	superblockVersions = 3
)

// MDUUID is a UUID as md stores it: 16 bytes in the order they are printed.
type MDUUID [16]byte

// String returns mdadm's form: four groups of eight hexadecimal digits, with
// colons between them.
func (u MDUUID) String() string {
	return fmt.Sprintf("%x:%x:%x:%x", u[0:4], u[4:8], u[8:12], u[12:16])
}

// Superblock is what one member says of its md array and of itself: struct
// mdp_superblock_1 of Linux include/uapi/linux/raid/md_p.h. Each member has its
// own, written at different moments: the one with the most Events is right, and
// a member that failed still says what it last knew.
type Superblock struct {
	Version      int       // the minor one: 0 at the end of the device, 1 at its start, 2 at 4096
	SetUUID      MDUUID    // of the array; mdadm prints it as "Array UUID"
	SetName      string    // HOST:NAME or NAME, at most 32 bytes
	CreationTime time.Time // of the array; UTC, to the microsecond
	Level        int       // 0, 1, 4, 5, 6, 10; -1 linear, -4 multipath
	Layout       uint32    // by level; RAID 0: 1 original, 2 alternate, 0 unset
	ChunkBytes   int64     // 0 where the level has none
	RaidDisks    int       // members of the whole array, without spares and journals
	FeatureMap   uint32    // MD_FEATURE_ bits; mdadm's "Feature Map"
	Bitmap       bool      // a write-intent bitmap lies on this member
	Reshaping    bool      // a reshape has begun and has not ended

	DeviceUUID   MDUUID // of this member
	DeviceNumber int    // of this member; stays, whatever its role becomes; mdadm's "Number"
	Role         int    // position in the array from 0; -1: spare, faulty or journal
	Journal      bool   // this member is the write journal of the array
	DataOffset   int64  // bytes from the start of the device to the array's data
	DataSize     int64  // bytes of this device that the array may use
	Events       uint64 // updates of the superblock; stays 0 in RAID 0 and linear
}

// ParseSuperblock reads an md superblock of version 1.0, 1.1 or 1.2 that starts
// at b[0]; a block of 4096 bytes is always enough. The minor version follows
// from the place the superblock names as its own, which the caller should hold
// against where b was read. It returns ErrNoSuperblock or ErrSuperblockChecksum
// (calc_sb_1_csum of Linux drivers/md/md.c and of mdadm's super1.c).
func ParseSuperblock(b []byte) (Superblock, error) {
	sb, _, err := parseSuperblockAt(b)
	return sb, err
}

// parseSuperblockAt also returns the byte of the device at which the
// superblock says it lies.
func parseSuperblockAt(b []byte) (sb Superblock, at int64, err error) {
	le := binary.LittleEndian
	if len(b) < superblockHead {
		return sb, 0, fmt.Errorf("%w in %d bytes", ErrNoSuperblock, len(b))
	}
	if le.Uint32(b[0:]) != superblockMagic || le.Uint32(b[4:]) != 1 {
		return sb, 0, fmt.Errorf("%w of version 1", ErrNoSuperblock)
	}
	roles := le.Uint32(b[220:])
	if roles > superblockRoles || superblockHead+2*int(roles) > len(b) {
		return sb, 0, fmt.Errorf("%w: %d roles do not fit", ErrNoSuperblock, roles)
	}
	b = b[:superblockHead+2*int(roles)]
	if stored, computed := le.Uint32(b[216:]), superblockChecksum(b); stored != computed {
		return sb, 0, fmt.Errorf("%w: %08x stored, %08x computed", ErrSuperblockChecksum, stored, computed)
	}
	offset, size, super := le.Uint64(b[128:]), le.Uint64(b[136:]), le.Uint64(b[144:])
	if max(offset, size, super) > math.MaxInt64/sectorBytes {
		return sb, 0, fmt.Errorf("%w: data of %d sectors at %d, superblock at %d", ErrNoSuperblock, size, offset, super)
	}
	return decodeSuperblock(b), int64(super) * sectorBytes, nil
}

// superblockChecksum adds up all 32-bit words but the checksum itself, an odd
// role at the end as 16 bits, and folds the carry in once.
func superblockChecksum(b []byte) uint32 {
	var sum uint64
	for i := 0; i+4 <= len(b); i += 4 {
		if i != 216 {
			sum += uint64(binary.LittleEndian.Uint32(b[i:]))
		}
	}
	if len(b)%4 == 2 {
		sum += uint64(binary.LittleEndian.Uint16(b[len(b)-2:]))
	}
	return uint32(sum) + uint32(sum>>32)
}

// decodeSuperblock reads the fields of b, which ends with the last role.
func decodeSuperblock(b []byte) Superblock {
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	created, number := u64(b[64:]), u32(b[160:])
	name, _, _ := bytes.Cut(b[32:64], []byte{0})
	sb := Superblock{
		SetUUID:      MDUUID(b[16:32]),
		SetName:      string(name),
		CreationTime: time.Unix(int64(created&mdTimeSeconds), int64(created>>40)*1000).UTC(),
		Level:        int(int32(u32(b[72:]))),
		Layout:       u32(b[76:]),
		ChunkBytes:   int64(u32(b[88:])) * sectorBytes,
		RaidDisks:    int(u32(b[92:])),
		FeatureMap:   u32(b[8:]),
		DeviceUUID:   MDUUID(b[168:184]),
		DeviceNumber: int(number),
		Role:         -1,
		DataOffset:   int64(u64(b[128:])) * sectorBytes,
		DataSize:     int64(u64(b[136:])) * sectorBytes,
		Events:       u64(b[200:]),
	}
	sb.Bitmap = sb.FeatureMap&mdFeatureBitmap != 0
	sb.Reshaping = sb.FeatureMap&mdFeatureReshape != 0
	switch u64(b[144:]) { // super_offset, in sectors
	case 0:
		sb.Version = 1
	case 8:
		sb.Version = 2
	}
	// A number without a role is a spare, as in mdadm's super1.c.
	if at := superblockHead + 2*int64(number); at+2 <= int64(len(b)) {
		role := binary.LittleEndian.Uint16(b[at:])
		sb.Journal = role == mdRoleJournal
		if role < mdRoleMax {
			sb.Role = int(role)
		}
	}
	return sb
}

// ReadSuperblock finds and reads the md superblock of a block device, or of a
// file that holds one's bytes. It looks at the three places a superblock of
// version 1 can be and takes only one that names the place it was found at; of
// several, the array created last wins, as in load_super1 of mdadm's super1.c.
// A block device is read past its page cache, which the kernel's own writes of
// the superblock leave stale (tried: Events 0 there, 4 on the disk). It returns
// ErrNoSuperblock, ErrSuperblockChecksum when the only one found is damaged, or
// the error of opening or reading.
func ReadSuperblock(path string) (sb Superblock, err error) {
	f, err := openDevice(path)
	if err != nil {
		return Superblock{}, fmt.Errorf("read md superblock: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return Superblock{}, fmt.Errorf("read md superblock: %w", err)
	}
	// Direct reads need aligned memory: a mapping is.
	block, err := syscall.Mmap(-1, 0, superblockBytes, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return Superblock{}, fmt.Errorf("read md superblock of %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, syscall.Munmap(block)) }()

	found, reason := false, fmt.Errorf("read %s: %w", path, ErrNoSuperblock)
	for minor := range superblockVersions {
		at := superblockPlace(minor, size)
		if at < 0 || at+superblockBytes > size {
			continue
		}
		if _, err := f.ReadAt(block, at); err != nil {
			return Superblock{}, fmt.Errorf("read md superblock: %w", err)
		}
		candidate, place, err := parseSuperblockAt(block)
		switch {
		case errors.Is(err, ErrSuperblockChecksum):
			reason = fmt.Errorf("read %s at %d: %w", path, at, err)
		case err == nil && place == at && (!found || candidate.CreationTime.After(sb.CreationTime)):
			sb, found = candidate, true
			sb.Version = minor
		}
	}
	if !found {
		return Superblock{}, reason
	}
	return sb, nil
}

// superblockPlace returns where version 1.MINOR keeps its superblock on a
// device of size bytes: super_1_load of Linux drivers/md/md.c. It is negative
// when the device is too small.
func superblockPlace(minor int, size int64) int64 {
	switch minor {
	case 0:
		if size < 24*sectorBytes { // mdadm's load_super1
			return -1
		}
		return (size/sectorBytes - 16) &^ 7 * sectorBytes
	case 1:
		return 0
	}
	return 8 * sectorBytes
}

// openDevice opens a block device for direct reads, and anything else for
// ordinary ones: not every filesystem knows O_DIRECT, and a file has one cache.
func openDevice(path string) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Type() == os.ModeDevice {
		return os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECT, 0)
	}
	return os.Open(path)
}
