package host_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/host"
)

// The files in testdata/lvm are reports of LVM 2.03.16 and tables of Linux 6.1,
// made by testdata/lvm/make.
func lvmFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "lvm", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// mapText writes a map in a line: type, start+size in MiB, stripe size in KiB,
// member@start in MiB.
func mapText(segments []backup.Segment) string {
	var out []string
	for _, s := range segments {
		text := fmt.Sprintf("%s %d+%d", s.Type, s.Start>>20, s.Size>>20)
		if s.StripeBytes > 0 {
			text += fmt.Sprintf(" %dK", s.StripeBytes>>10)
		}
		for _, st := range s.Stripes {
			text += fmt.Sprintf(" %d@%d", st.Member, st.Start>>20)
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func TestLogicalVolumesAreDescribedWithTheirGroup(t *testing.T) {
	report, table := lvmFile(t, "ordinary.json"), lvmFile(t, "ordinary.table")
	for _, c := range []struct{ name, maps, devices string }{
		{"data", "striped 0+80 64K 0@1 1@1", "[[7 2] [7 0] [7 1]]"},                      // stripe order, then the rest of the group
		{"wal", "linear 0+20 0@41, linear 20+12 1@41", "[[7 0] [7 2] [7 1]]"},            // two segments
		{"mixed", "linear 0+16 0@1, striped 16+16 16K 0@17 1@53", "[[7 1] [7 2] [7 0]]"}, // of two types
	} {
		t.Run(c.name, func(t *testing.T) {
			got, devices, err := host.DescribeVolume([]byte(report), "vg-pg", c.name)
			if err != nil {
				t.Fatal(err)
			}
			if mapText(got.Segments) != c.maps || fmt.Sprint(devices) != c.devices {
				t.Errorf("got  %s on %v\nwant %s on %s", mapText(got.Segments), devices, c.maps, c.devices)
			}
			if got.Name != c.name || got.Group.Name != "vg-pg" || len(got.UUID) != 38 || len(got.Group.UUID) != 38 || len(got.PhysicalVolumes) != 3 {
				t.Errorf("got %+v", got)
			}
			var lines []string
			for line := range strings.Lines(table) {
				if rest, ok := strings.CutPrefix(line, "vg--pg-"+c.name+": "); ok {
					lines = append(lines, rest)
				}
			}
			live, err := host.ParseTable(strings.Join(lines, ""), devices)
			if err != nil || !reflect.DeepEqual(live, got.Segments) {
				t.Errorf("the kernel has %s, %v; LVM says %s", mapText(live), err, mapText(got.Segments))
			}
		})
	}
}

func TestWhatLVMMakesBesidesLinearAndStripedIsRefusedByName(t *testing.T) {
	ordinary := lvmFile(t, "ordinary.json")
	changed := func(old, new string) string {
		if !strings.Contains(ordinary, old) {
			t.Fatalf("the report has no %s", old)
		}
		return strings.ReplaceAll(ordinary, old, new)
	}
	for _, c := range []struct{ name, report, volume, say string }{
		{"the origin of a snapshot", lvmFile(t, "snapshot.json"), "data", "origin"},
		{"a snapshot", lvmFile(t, "snapshot.json"), "before", "snapshot"},
		{"a thin volume", lvmFile(t, "thin.json"), "data", "of kind thin,sparse"},
		{"a thin pool", lvmFile(t, "thin.json"), "pool", "of kind thin,pool"},
		{"a mirror", lvmFile(t, "mirror.json"), "data", "of kind mirror"},
		{"raid1", lvmFile(t, "raid1.json"), "data", "of kind raid,raid1"},
		{"raid5", lvmFile(t, "raid5.json"), "data", "of kind raid,raid5"},
		{"a cached volume", lvmFile(t, "cache.json"), "data", "of kind cache"},
		{"a group that lacks a physical volume", lvmFile(t, "missing.json"), "wal", "1 of its physical volumes are missing"},
		{"an exported group", lvmFile(t, "exported.json"), "data", "it is exported"},
		{"a partial group", changed(`"vg_partial":""`, `"vg_partial":"partial"`), "data", "it is partial"},
		{"a clustered group", changed(`"vg_clustered":""`, `"vg_clustered":"clustered"`), "data", "shared with other hosts"},
		{"a shared group", changed(`"vg_lock_type":""`, `"vg_lock_type":"sanlock"`), "data", "lock type sanlock"},
		{"a group of one host alone", changed(`"vg_systemid":""`, `"vg_systemid":"db1"`), "data", "system ID db1"},
		{"a suspended volume", changed(`"-wi-a-----"`, `"-wi-s-----"`), "data", "suspended"},
		{"a volume in bad health", changed(`"-wi-a-----"`, `"-wi-a---p-"`), "data", "not healthy"},
		{"a segment of a type to come", changed(`"segtype":"striped"`, `"segtype":"writecache"`), "data", "type writecache"},
		{"a segment on what is being moved", changed(`/dev/loop2:0-9`, `pvmove0:0-9`), "data", "pvmove0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := host.DescribeVolume([]byte(c.report), "vg-pg", c.volume)
			refusal(t, err, backup.ErrUnsupported, c.say, "vg-pg")
		})
	}
	t.Run("a group without volumes and a volume of another group", func(t *testing.T) {
		for _, r := range []string{lvmFile(t, "empty.json"), ordinary} {
			if _, _, err := host.DescribeVolume([]byte(r), "other", "data"); !errors.Is(err, backup.ErrNotFound) {
				t.Errorf("got %v", err)
			}
		}
	})
}

func TestATableThatIsNotTheMetadatasIsNoMap(t *testing.T) {
	devices := [][2]int{{7, 0}, {7, 2}}
	for name, table := range map[string]string{
		"another target":      "0 8192 crypt aes-xts-plain64 :64:logon:x 0 7:0 4096",
		"another device":      "0 8192 linear 7:1 2048",
		"a device as a path":  "0 8192 linear /dev/loop0 2048",
		"a line cut short":    "0 8192 linear",
		"a snapshot's origin": "0 8192 snapshot-origin 253:2",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := host.ParseTable(table, devices)
			refusal(t, err, backup.ErrUnsupported)
		})
	}
	got, err := host.ParseTable("0 8192 striped 2 128 7:2 2048 7:0 4096\n8192 8192 linear 7:0 40960\n", devices)
	if want := "striped 0+4 64K 1@1 0@2, linear 4+4 0@20"; err != nil || mapText(got) != want {
		t.Errorf("got %s and %v, want %s", mapText(got), err, want)
	}
}

func FuzzReportOfLVM(f *testing.F) {
	files, err := filepath.Glob("testdata/lvm/*.json")
	if err != nil || len(files) < 9 {
		f.Fatalf("reports: %v, %v", files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, lvmFile(f, strings.TrimSuffix(filepath.Base(file), ".json")+".table"))
	}
	f.Fuzz(func(t *testing.T, report []byte, table string) {
		described, err := host.DescribeAll(report)
		if err != nil && len(described) > 0 {
			t.Errorf("%v beside %v", described, err)
		}
		for _, lv := range described {
			for _, s := range lv.Segments {
				for _, st := range s.Stripes {
					if st.Member < 0 || st.Member >= len(lv.PhysicalVolumes) {
						t.Errorf("%+v of %d members", s, len(lv.PhysicalVolumes))
					}
				}
			}
		}
		_, _ = host.ParseTable(table, [][2]int{{7, 0}, {7, 1}})
	})
}
