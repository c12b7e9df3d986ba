package host_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cleancut/internal/host"
)

// The goldens in testdata/superblock are the 4 KiB superblocks of members of
// real arrays (Linux 6.1 as User Mode Linux, mdadm 4.2), named
// ARRAY-METADATA-WHAT-MEMBER, each with its `mdadm --examine` and, for a
// running array, the array's `mdadm --detail`. Members are 40 MiB, loop3 seven
// sectors more.
const superblockDir = "testdata/superblock"

func goldenSuperblocks(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(superblockDir, "*.superblock"))
	if err != nil || len(paths) < 25 {
		t.Fatalf("golden superblocks: %d found, error %v", len(paths), err)
	}
	return paths
}

func goldenBlock(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || len(b) != 4096 {
		t.Fatalf("read %s: %d bytes, error %v", path, len(b), err)
	}
	return b
}

// examined returns the "key : value" lines of an `mdadm --examine`.
func examined(t testing.TB, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(line, " : "); ok {
			said[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
	return said
}

// sectors reads "2048 sectors (...)" as bytes; nothing is 0, as mdadm omits it.
func sectors(said string) string {
	n, _, _ := strings.Cut(said, " ")
	v, _ := strconv.ParseInt(n, 10, 64)
	return fmt.Sprint(v * 512)
}

// examineText holds the fields in the words of `mdadm --examine`; sizes in bytes.
func examineText(sb host.Superblock) map[string]string {
	level := fmt.Sprintf("raid%d", sb.Level)
	if sb.Level == -1 {
		level = "linear"
	}
	layout := map[string]string{"raid0 1": "original", "raid5 2": "left-symmetric", "raid10 513": "far=2"}
	role := fmt.Sprintf("Active device %d", sb.Role)
	switch {
	case sb.Journal:
		role = "Journal"
	case sb.Role < 0:
		role = "spare"
	}
	text := map[string]string{
		"Version":        fmt.Sprintf("1.%d", sb.Version),
		"Feature Map":    fmt.Sprintf("%#x", sb.FeatureMap),
		"Array UUID":     sb.SetUUID.String(),
		"Name":           sb.SetName,
		"Creation Time":  sb.CreationTime.Format(time.ANSIC),
		"Raid Level":     level,
		"Raid Devices":   fmt.Sprint(sb.RaidDisks),
		"Layout":         layout[fmt.Sprintf("%s %d", level, sb.Layout)],
		"Chunk Size":     "",
		"Device UUID":    sb.DeviceUUID.String(),
		"Device Role":    role,
		"Events":         fmt.Sprint(sb.Events),
		"Data Offset":    fmt.Sprint(sb.DataOffset),
		"Avail Dev Size": fmt.Sprint(sb.DataSize),
	}
	if sb.ChunkBytes != 0 {
		text["Chunk Size"] = fmt.Sprintf("%dK", sb.ChunkBytes/1024)
	}
	return text
}

func TestParseSuperblockReadsWhatMdadmExaminePrints(t *testing.T) {
	for _, path := range goldenSuperblocks(t) {
		name := strings.TrimSuffix(path, ".superblock")
		t.Run(filepath.Base(name), func(t *testing.T) {
			sb, err := host.ParseSuperblock(goldenBlock(t, path))
			if err != nil {
				t.Fatal(err)
			}
			want := examined(t, name+".examine")
			want["Data Offset"], want["Avail Dev Size"] = sectors(want["Data Offset"]), sectors(want["Avail Dev Size"])
			want["Name"], _, _ = strings.Cut(want["Name"], "  (local to host")
			for key, got := range examineText(sb) {
				if got != want[key] {
					t.Errorf("%s: got %q, want %q", key, got, want[key])
				}
			}
			if _, want := want["Internal Bitmap"]; sb.Bitmap != want {
				t.Errorf("Bitmap: got %t, want %t", sb.Bitmap, want)
			}
			if _, want := want["Reshape pos'n"]; sb.Reshaping != want {
				t.Errorf("Reshaping: got %t, want %t", sb.Reshaping, want)
			}
			if sb.Journal && sb.Role != -1 {
				t.Errorf("Role of a journal: got %d, want -1", sb.Role)
			}
		})
	}
}

func TestParseSuperblockKnowsTheDeviceNumberMdadmDetailPrints(t *testing.T) {
	compared := 0
	for _, path := range goldenSuperblocks(t) {
		cut := strings.LastIndex(path, "-")
		detail, err := os.ReadFile(path[:cut] + ".detail")
		if errors.Is(err, os.ErrNotExist) {
			continue // the array was stopped
		}
		if err != nil {
			t.Fatal(err)
		}
		sb, err := host.ParseSuperblock(goldenBlock(t, path))
		if err != nil {
			t.Fatal(err)
		}
		device := "/dev/" + strings.TrimSuffix(path[cut+1:], ".superblock")
		for line := range strings.Lines(string(detail)) {
			row := strings.Fields(line) // Number Major Minor RaidDevice State... /dev/X
			if len(row) < 6 || row[len(row)-1] != device {
				continue
			}
			compared++
			if got := fmt.Sprint(sb.DeviceNumber); got != row[0] {
				t.Errorf("%s: got device number %s, want %s", path, got, row[0])
			}
		}
	}
	if compared < 20 {
		t.Errorf("compared %d device numbers, want at least 20", compared)
	}
}

func TestAnArrayAssembledWithANewUUIDDiffersInNothingElse(t *testing.T) {
	before, err := host.ParseSuperblock(goldenBlock(t, superblockDir+"/raid0-64k-1.2-stopped-loop0.superblock"))
	if err != nil {
		t.Fatal(err)
	}
	after, err := host.ParseSuperblock(goldenBlock(t, superblockDir+"/raid0-64k-1.2-new-uuid-loop0.superblock"))
	if err != nil {
		t.Fatal(err)
	}
	if before.SetUUID == after.SetUUID {
		t.Errorf("both have array UUID %s", after.SetUUID)
	}
	after.SetUUID = before.SetUUID
	if got, want := after, before; got != want {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

// resum stores the checksum that fits: the sum of all words, in the words of
// the format's own description rather than of the code under test.
func resum(b []byte) []byte {
	b = append([]byte(nil), b...)
	copy(b[216:220], []byte{0, 0, 0, 0})
	size := 256 + 2*int(binary.LittleEndian.Uint32(b[220:]))
	padded := append(append([]byte(nil), b[:size]...), 0, 0)
	var sum uint64
	for i := 0; i < size; i += 4 {
		sum += uint64(binary.LittleEndian.Uint32(padded[i:]))
	}
	binary.LittleEndian.PutUint32(b[216:], uint32(sum&0xffffffff+sum>>32))
	return b
}

func TestParseSuperblockRefuses(t *testing.T) {
	good := goldenBlock(t, superblockDir+"/raid0-64k-1.2-stopped-loop0.superblock")
	changed := func(at int, v ...byte) []byte {
		b := append([]byte(nil), good...)
		copy(b[at:], v)
		return b
	}
	cases := map[string]struct {
		b    []byte
		want error
	}{
		"nothing":                                {nil, host.ErrNoSuperblock},
		"a block of zeroes":                      {make([]byte, 4096), host.ErrNoSuperblock},
		"a header cut short":                     {good[:255], host.ErrNoSuperblock},
		"roles cut short":                        {good[:300], host.ErrNoSuperblock},
		"metadata 0.90":                          {resum(changed(4, 0)), host.ErrNoSuperblock},
		"more roles than a block holds":          {changed(220, 0xff, 0xff, 0xff, 0xff), host.ErrNoSuperblock},
		"data that starts beyond any device":     {resum(changed(128+7, 0x7f)), host.ErrNoSuperblock},
		"more data than any device holds":        {resum(changed(136+7, 0x7f)), host.ErrNoSuperblock},
		"a flipped bit in the array UUID":        {changed(16, good[16]^1), host.ErrSuperblockChecksum},
		"a flipped bit in the last role":         {changed(256+2*128-1, 0xfe), host.ErrSuperblockChecksum},
		"a flipped bit in the checksum":          {changed(216, good[216]^1), host.ErrSuperblockChecksum},
		"another number of roles than was meant": {changed(220, 127), host.ErrSuperblockChecksum},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := host.ParseSuperblock(c.b)
			if !errors.Is(err, c.want) {
				t.Errorf("got error %v, want %v", err, c.want)
			}
			if got != (host.Superblock{}) {
				t.Errorf("got %+v beside the error", got)
			}
		})
	}
}

func TestParseSuperblockRoles(t *testing.T) {
	good := goldenBlock(t, superblockDir+"/raid0-64k-1.2-stopped-loop3.superblock")
	cases := []struct {
		name    string
		number  uint32
		role    uint16
		want    int
		journal bool
	}{
		{"an active member has its position", 3, 2, 2, false},
		{"the highest position", 3, 0xfeff, 0xfeff, false},
		{"a journal has none", 3, 0xfffd, -1, true},
		{"a faulty member has none", 3, 0xfffe, -1, false},
		{"a spare has none", 3, 0xffff, -1, false},
		{"a value kept for later has none", 3, 0xff00, -1, false},
		{"a number without a role is a spare", 128, 0, -1, false},
		{"so is the highest number", 0xffffffff, 0, -1, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := append([]byte(nil), good...)
			binary.LittleEndian.PutUint32(b[160:], c.number)
			binary.LittleEndian.PutUint16(b[256+2*3:], c.role)
			sb, err := host.ParseSuperblock(resum(b))
			if err != nil {
				t.Fatal(err)
			}
			if sb.Role != c.want || sb.Journal != c.journal || sb.DeviceNumber != int(c.number) {
				t.Errorf("got role %d, journal %t, number %d; want %d, %t, %d", sb.Role, sb.Journal, sb.DeviceNumber, c.want, c.journal, c.number)
			}
		})
	}
}

// member writes a sparse file of a device's size with blocks at their places.
func member(t *testing.T, size int64, blocks map[int64][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "member")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for at, b := range blocks {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadSuperblock(t *testing.T) {
	block := func(name string) []byte { return goldenBlock(t, superblockDir+"/"+name+".superblock") }
	const loop0, loop3, end = 40 << 20, 40<<20 + 7*512, 81904 * 512
	older, newer := block("raid0-64k-1.2-stopped-loop0"), block("raid1-1.0-loop0") // created at 21:37:17 and 21:37:4x
	damaged := append([]byte(nil), older...)
	damaged[20] ^= 1
	cases := []struct {
		name   string
		size   int64
		blocks map[int64][]byte
		want   string
		err    error
	}{
		{"1.2 lies at 4096", loop0, map[int64][]byte{4096: older}, "1.2 level 0", nil},
		{"1.1 lies at the start", loop0, map[int64][]byte{0: block("raid0-512k-1.1-loop0")}, "1.1 level 0", nil},
		{"1.0 lies at the end", loop0, map[int64][]byte{end: block("raid0-512k-1.0-loop0")}, "1.0 level 0", nil},
		{"1.0 lies at a multiple of 4096 of an odd size", loop3, map[int64][]byte{end: block("raid0-512k-1.0-loop3")}, "1.0 level 0", nil},
		{"of two the newer array wins", loop0, map[int64][]byte{4096: older, end: newer}, "1.0 level 1", nil},
		{"a damaged one does not hide a sound one", loop0, map[int64][]byte{4096: damaged, end: newer}, "1.0 level 1", nil},
		{"a damaged one is told", loop0, map[int64][]byte{4096: damaged}, "", host.ErrSuperblockChecksum},
		{"one at another's place is none", loop0, map[int64][]byte{0: older}, "", host.ErrNoSuperblock},
		{"one of a device that was larger is none", loop0 - 1<<20, map[int64][]byte{end - 1<<20: newer}, "", host.ErrNoSuperblock},
		{"an empty device has none", loop0, nil, "", host.ErrNoSuperblock},
		{"a device of 4 KiB has none", 4096, nil, "", host.ErrNoSuperblock},
		{"a device of no size has none", 0, nil, "", host.ErrNoSuperblock},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := member(t, c.size, c.blocks)
			sb, err := host.ReadSuperblock(path)
			if !errors.Is(err, c.err) {
				t.Fatalf("got error %v, want %v", err, c.err)
			}
			if err != nil {
				if !strings.Contains(err.Error(), path) || sb != (host.Superblock{}) {
					t.Errorf("got %+v and error %q, want nothing and the path", sb, err)
				}
				return
			}
			if got := fmt.Sprintf("1.%d level %d", sb.Version, sb.Level); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	t.Run("a missing device is told apart", func(t *testing.T) {
		if _, err := host.ReadSuperblock(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want not exist", err)
		}
	})
}

func FuzzParseSuperblock(f *testing.F) {
	for _, path := range goldenSuperblocks(f) {
		f.Add(goldenBlock(f, path)[:768])
	}
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		first, err := host.ParseSuperblock(b)
		if errors.Is(err, host.ErrNoSuperblock) {
			return
		}
		sb, err2 := host.ParseSuperblock(resum(b))
		if err2 != nil {
			if errors.Is(err2, host.ErrSuperblockChecksum) {
				t.Fatalf("refused a right checksum: %v", err2)
			}
			return
		}
		if err == nil && sb != first {
			t.Fatalf("the same bytes read as %+v and %+v", first, sb)
		}
		if sb.DataOffset < 0 || sb.DataSize < 0 || sb.ChunkBytes < 0 || sb.Role < -1 || sb.Role >= 0xff00 || len(sb.SetName) > 32 {
			t.Fatalf("out of range: %+v", sb)
		}
		if got := len(sb.SetUUID.String()); got != 35 {
			t.Fatalf("UUID of %d characters", got)
		}
		changed := resum(b)
		changed[16] ^= 0x10
		if _, err := host.ParseSuperblock(changed); !errors.Is(err, host.ErrSuperblockChecksum) {
			t.Fatalf("a flipped bit went unseen: %v", err)
		}
	})
}
