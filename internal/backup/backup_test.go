package backup_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cleancut/internal/backup"
)

func TestMembersAreTheVolumesOnceInOrderOfFilesystemsAndSlots(t *testing.T) {
	for name, test := range map[string]struct {
		topology backup.Topology
		want     string
	}{
		"members of an array in slot order":        {raid0().Topology, "v-7c1e0000@loop0/0#0 v-7c1e0001@loop1/0#1 v-7c1e0002@loop2/0#2 v-7c1e0003@loop3/0#3"},
		"a volume with two partitions counts once": {separate().Topology, "vol-0a1b2c3d4e5f60718@nvme1n1/0#0 vol-0b1b2c3d4e5f60719@nvme2n1/1#1 vol-0c1b2c3d4e5f6071a@nvme3n1/3#2"},
		"physical volumes that several logical volumes share count once, those that none lies on too": {lvm().Topology,
			"v-3d9a0000@loop0/0#0 v-3d9a0001@loop1/0#1 v-3d9a0002@loop2/0#2 v-3d9a0003@loop3/0#3 v-3d9a0004@loop4/0#4"},
		"an empty topology has none":                  {backup.Topology{}, ""},
		"slot order is the array's, not the alphabet": {backup.Topology{Filesystems: []backup.Filesystem{{Device: array("z", "a", "m")}}}, "z@z/0#0 a@a/0#1 m@m/0#2"},
		"an array of arrays is walked depth first": {backup.Topology{Filesystems: []backup.Filesystem{{
			Device: backup.Device{Kind: backup.DeviceArray, Members: []backup.Device{array("c", "d"), array("a", "b")}},
		}}}, "c@c/0#0 d@d/0#1 a@a/0#2 b@b/0#3"},
	} {
		t.Run(name, func(t *testing.T) {
			var out []string
			for _, m := range test.topology.Members() {
				out = append(out, fmt.Sprintf("%s@%s/%d#%d", m.Volume.ID, m.Device, m.Filesystem, m.Index))
			}
			if got := strings.Join(out, " "); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

func array(ids ...string) backup.Device {
	d := backup.Device{Kind: backup.DeviceArray, Name: "md0", Array: &backup.Array{Level: "raid0"}}
	for _, id := range ids {
		d.Members = append(d.Members, backup.Device{Kind: backup.DeviceVolume, Name: id, Volume: volume(id, 1<<30)})
	}
	return d
}

func TestTheFilesystemWithTheWALIsFrozenLast(t *testing.T) {
	three := make([]backup.Filesystem, 3)
	for name, test := range map[string]struct {
		places []backup.Place
		want   []int
	}{
		"wal on its own":           {[]backup.Place{{Kind: backup.PlaceData}, {Kind: backup.PlaceWAL, Filesystem: 1}, {Kind: backup.PlaceTablespace, Filesystem: 2}}, []int{0, 2, 1}},
		"wal beside the data":      {[]backup.Place{{Kind: backup.PlaceData}, {Kind: backup.PlaceWAL}, {Kind: backup.PlaceTablespace, Filesystem: 2}}, []int{1, 2, 0}},
		"no place of its own":      {[]backup.Place{{Kind: backup.PlaceTablespace, Filesystem: 2}, {Kind: backup.PlaceData}}, []int{1, 2, 0}},
		"nothing is known of both": {nil, []int{0, 1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := (backup.Topology{Filesystems: three, Places: test.places}).FreezeOrder(); !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestFilesystemsThatShareAVolumeAreOneUnit(t *testing.T) {
	for name, test := range map[string]struct {
		topology backup.Topology
		want     [][]int
		members  [][]int
	}{
		"a stripe":                        {raid0().Topology, [][]int{{0}}, [][]int{{0, 1, 2, 3}}},
		"two partitions of one volume":    {separate().Topology, [][]int{{0, 2}, {3}, {1}}, [][]int{{0}, {2}, {1}}},
		"two volumes of one volume group": {lvm().Topology, [][]int{{0, 1}}, [][]int{{0, 1, 2, 3, 4}}},
	} {
		t.Run(name, func(t *testing.T) {
			units := test.topology.Units()
			var members [][]int
			for _, u := range units {
				var of []int
				for _, m := range test.topology.MembersOf(u) {
					of = append(of, m.Index)
				}
				members = append(members, of)
			}
			if !reflect.DeepEqual(units, test.want) || !reflect.DeepEqual(members, test.members) {
				t.Errorf("got %v on members %v, want %v on %v", units, members, test.want, test.members)
			}
		})
	}
}

func TestASetNeedsOneSnapshotForEachMemberAndNoneBeside(t *testing.T) {
	members := raid0().Topology.Members()
	for name, change := range map[string]func([]backup.Snapshot) []backup.Snapshot{
		"a member without a snapshot": func(s []backup.Snapshot) []backup.Snapshot { return s[:3] },
		"no snapshot":                 func([]backup.Snapshot) []backup.Snapshot { return nil },
		"a member with two":           func(s []backup.Snapshot) []backup.Snapshot { s[3].Member, s[3].Volume = 2, s[2].Volume; return s },
		"one more than members":       func(s []backup.Snapshot) []backup.Snapshot { return append(s, s[3]) },
		"the same id twice":           func(s []backup.Snapshot) []backup.Snapshot { s[1].ID = s[0].ID; return s },
		"no id":                       func(s []backup.Snapshot) []backup.Snapshot { s[1].ID = ""; return s },
		"two volumes that swapped their slots": func(s []backup.Snapshot) []backup.Snapshot {
			s[0].Volume, s[1].Volume = s[1].Volume, s[0].Volume
			return s
		},
		"a volume that is no member": func(s []backup.Snapshot) []backup.Snapshot { s[0].Volume.ID = "v-other"; return s },
		"a slot below the first":     func(s []backup.Snapshot) []backup.Snapshot { s[0].Member = -1; return s },
		"a slot past the last":       func(s []backup.Snapshot) []backup.Snapshot { s[0].Member = 4; return s },
	} {
		t.Run(name, func(t *testing.T) {
			if err := backup.CheckSet(members, change(raid0().Snapshots)); !errors.Is(err, backup.ErrVoid) {
				t.Errorf("got %v, want %v", err, backup.ErrVoid)
			}
		})
	}
	snaps := raid0().Snapshots
	slices.Reverse(snaps)
	if err := backup.CheckSet(members, snaps); err != nil {
		t.Errorf("a whole set in another order: %v", err)
	}
}

func TestDecodeManifestRefuses(t *testing.T) {
	whole, err := backup.EncodeManifest(raid0())
	if err != nil {
		t.Fatal(err)
	}
	replaced := func(old, new string) []byte {
		if !strings.Contains(string(whole), old) {
			t.Fatalf("the manifest has no %s", old)
		}
		return []byte(strings.Replace(string(whole), old, new, 1))
	}
	for name, test := range map[string]struct {
		b    []byte
		text string
	}{
		"nothing":                            {nil, "cut short"},
		"a torn file":                        {whole[:len(whole)/2], "cut short"},
		"a newer version, whatever is in it": {[]byte(`{"version": 6, "nowhere": {"to": "be found"}}`), "version 6"},
		"no version":                         {replaced(`"version": 5`, `"version": 0`), "no version"},
		"an unknown key":                     {replaced(`"tool":`, `"tol":`), "tol"},
		"something after the end":            {append(slices.Clone(whole), '}'), "cut short"},
		"two manifests":                      {append(slices.Clone(whole), whole...), "cut short"},
		"an id that is none":                 {replaced("5f3a9c", "5f3a9x"), "backup id"},
		"a cluster that leads elsewhere":     {replaced(`"cluster": "main"`, `"cluster": "../main"`), "cluster name"},
		"a consistency nobody knows":         {replaced(`"atomic"`, `"lucky"`), "lucky"},
		"a place without its filesystem":     {replaced(`"filesystem": 0`, `"filesystem": 1`), "filesystem 1 of 1"},
		"no data directory":                  {replaced(`"kind": "data"`, `"kind": "wal"`), "no data directory"},
		"a device kind without its details":  {replaced(`"kind": "array"`, `"kind": "partition"`), "without its description"},
		"a snapshot too few":                 {replaced(`"member": 1`, `"member": 0`), "fits no member"},
		"a system identifier as a number":    {replaced(`"7442618403113921842"`, `7442618403113921842`), "system identifier"},
		"an LSN in one half":                 {replaced(`"3/A91C07F8"`, `"3A91C07F8"`), "LSN"},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := backup.DecodeManifest(test.b)
			if err == nil || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %+v, %v, want an error with %q", m, err, test.text)
			}
		})
	}
	_, err = backup.DecodeManifest([]byte(`{"version": 6}`))
	if !errors.Is(err, backup.ErrUnsupported) || backup.HintOf(err) == "" {
		t.Errorf("newer version: got %v (hint %q), want %v with a hint", err, backup.HintOf(err), backup.ErrUnsupported)
	}
}

func TestEncodeManifestWritesNothingThatCannotBeRead(t *testing.T) {
	for name, change := range map[string]func(*backup.Manifest){
		"no version":          func(m *backup.Manifest) { m.Version = 0 },
		"a version to come":   func(m *backup.Manifest) { m.Version = backup.ManifestVersion + 1 },
		"no id":               func(m *backup.Manifest) { m.ID = "" },
		"no cluster":          func(m *backup.Manifest) { m.Cluster = "" },
		"no consistency":      func(m *backup.Manifest) { m.Cut.Achieved = "" },
		"no filesystem":       func(m *backup.Manifest) { m.Topology.Filesystems = nil },
		"a snapshot missing":  func(m *backup.Manifest) { m.Snapshots = m.Snapshots[1:] },
		"a bracket too many":  func(m *backup.Manifest) { m.Bracket = bracketed().Bracket },
		"no bracket":          func(m *backup.Manifest) { m.Cut.Achieved = backup.Bracketed },
		"no label":            func(m *backup.Manifest) { *m = bracketed(); m.Bracket.Label = nil },
		"no WAL":              func(m *backup.Manifest) { *m = bracketed(); m.Bracket.WAL = nil },
		"an end before":       func(m *backup.Manifest) { *m = bracketed(); m.Bracket.End = m.Bracket.StartLSN - 1 },
		"golden, not still":   func(m *backup.Manifest) { m.Golden = golden().Golden },
		"still, not golden":   func(m *backup.Manifest) { m.Cut.How = backup.ModeStill },
		"golden of none":      func(m *backup.Manifest) { *m = golden(); m.Golden.Of = "" },
		"golden, no digest":   func(m *backup.Manifest) { *m = golden(); m.Golden.Digest = "" },
		"golden, unchecked":   func(m *backup.Manifest) { *m = golden(); m.Golden.Checks = nil },
		"golden, damaged":     func(m *backup.Manifest) { *m = golden(); m.Golden.Checks[0].Result = backup.Failed },
		"a number that isn't": func(m *backup.Manifest) { m.Cut.FreezeMS = math.NaN() },
	} {
		t.Run(name, func(t *testing.T) {
			m := raid0()
			change(&m)
			if b, err := backup.EncodeManifest(m); err == nil {
				t.Errorf("got %d bytes, want an error", len(b))
			}
		})
	}
}

func TestATopologyNestedWithoutEndIsRefused(t *testing.T) {
	d := array("a")
	for range 20 {
		d = backup.Device{Kind: backup.DeviceArray, Array: &backup.Array{}, Members: []backup.Device{d}}
	}
	top := backup.Topology{Filesystems: []backup.Filesystem{{Device: d}}, Places: []backup.Place{{Kind: backup.PlaceData}}}
	if err := top.Validate(); err == nil {
		t.Error("got nil, want an error")
	}
}

func TestTagsMatchWhenEveryWantedOneHasItsValue(t *testing.T) {
	tags := backup.Tags{"a": "1", "b": "2", "empty": ""}
	for name, test := range map[string]struct {
		want  backup.Tags
		match bool
	}{
		"one of them":               {backup.Tags{"a": "1"}, true},
		"all of them":               {backup.Tags{"a": "1", "b": "2", "empty": ""}, true},
		"another value":             {backup.Tags{"a": "1", "b": "3"}, false},
		"one that is missing":       {backup.Tags{"c": "1"}, false},
		"an empty filter":           {backup.Tags{}, false},
		"no filter":                 {nil, false},
		"an empty value that is":    {backup.Tags{"empty": ""}, true},
		"a key by another spelling": {backup.Tags{"A": "1"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tags.Match(test.want); got != test.match {
				t.Errorf("got %v, want %v", got, test.match)
			}
		})
	}
	if (backup.Tags)(nil).Match(nil) {
		t.Error("nothing matches nothing: got true")
	}
}

func TestTagsWithLeavesTheOldOnesAlone(t *testing.T) {
	old := backup.Tags{"a": "1"}
	if got := old.With("a", "2").With("b", "3"); got["a"] != "2" || got["b"] != "3" || len(old) != 1 || old["a"] != "1" {
		t.Errorf("got %v and %v", got, old)
	}
	if got := (backup.Tags)(nil).With("a", "1"); got["a"] != "1" {
		t.Errorf("with on nil: got %v", got)
	}
}

func TestSnapshotTagsFitEC2(t *testing.T) {
	members := separate().Topology.Members()
	got := backup.SnapshotTags("20261123T020009Z-00c0de", "main", members[2], len(members))
	want := backup.Tags{
		backup.TagBackup: "20261123T020009Z-00c0de", backup.TagCluster: "main", backup.TagMember: "2", backup.TagMembers: "3",
		backup.TagVolume: "vol-0c1b2c3d4e5f6071a",
	}
	if len(got) != len(want) || !got.Match(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestIDsSortByAgeAndKeepTheirTime(t *testing.T) {
	moment := time.Date(2026, 11, 22, 22, 17, 4, 999, time.FixedZone("CET", 3600))
	id := backup.NewID(moment)
	if _, err := backup.ParseID(string(id)); err != nil {
		t.Error(err)
	}
	if got, want := id.Time(), moment.Truncate(time.Second); !got.Equal(want) {
		t.Errorf("time: got %v, want %v", got, want)
	}
	if later := backup.NewID(moment.Add(time.Second)); later <= id {
		t.Errorf("%s does not sort after %s", later, id)
	}
	if other := backup.NewID(moment); other == id {
		t.Errorf("twice the same: %s", id)
	}
}

func TestParseIDRefusesWhatIsNone(t *testing.T) {
	for _, s := range []string{
		"", "latest", "20261122T211704Z", "20261122T211704Z-5F3A9C", "20261122T211704Z-5f3a9", "20261122T211704Z-5f3a9c7",
		"20261122T211704Z-5f3a9c\n", "../20261122T211704Z-5f3a9c", " 20261122T211704Z-5f3a9c", "٢0261122T211704Z-5f3a9c",
	} {
		if id, err := backup.ParseID(s); !errors.Is(err, backup.ErrUsage) || id != "" {
			t.Errorf("%q: got %q, %v, want %v", s, id, err, backup.ErrUsage)
		}
	}
	for _, id := range []backup.ID{"", "short", "20261322T211704Z-5f3a9c"} {
		if got := id.Time(); !got.IsZero() {
			t.Errorf("time of %q: got %v, want the zero time", id, got)
		}
	}
}

func TestClusterNames(t *testing.T) {
	for _, name := range []string{"main", "a", "0", "shop-eu.prod_1", strings.Repeat("a", 63)} {
		if err := backup.CheckClusterName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "Main", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "ä", strings.Repeat("a", 64)} {
		if err := backup.CheckClusterName(name); !errors.Is(err, backup.ErrUsage) {
			t.Errorf("%q: got %v, want %v", name, err, backup.ErrUsage)
		}
	}
}

func TestBytesReadAsPeopleSayThem(t *testing.T) {
	for b, want := range map[backup.Bytes]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 10 << 10: "10.0 KiB", 10239: "10.0 KiB", 100 << 10: "100 KiB",
		1000 << 10: "1000 KiB", 1023 << 10: "1023 KiB", 1<<20 - 1: "1.00 MiB", 3 << 29: "1.50 GiB", 1 << 40: "1.00 TiB", math.MaxInt64: "8.00 EiB", -5: "-5 B",
	} {
		if got := b.String(); got != want {
			t.Errorf("%d: got %q, want %q", int64(b), got, want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]backup.Bytes{
		"0": 0, "1048576": 1 << 20, "4G": 4 << 30, "4g": 4 << 30, "512MiB": 512 << 20, "512 MiB": 512 << 20, " 1K ": 1 << 10, "2TB": 2 << 40, "1p": 1 << 50,
		"17B": 17, "9223372036854775807": math.MaxInt64, "8191P": 8191 << 50,
	} {
		if got, err := backup.ParseBytes(s); got != want || err != nil {
			t.Errorf("%q: got %d, %v, want %d", s, int64(got), err, int64(want))
		}
	}
	for _, s := range []string{"", "G", "B", "-1", "-1G", "1.5G", "1GG", "1X", "8192P", "9223372036854775808", "9007199254740992K", "0x10", "1_000", "four"} {
		if got, err := backup.ParseBytes(s); !errors.Is(err, backup.ErrUsage) || got != 0 {
			t.Errorf("%q: got %d, %v, want %v", s, int64(got), err, backup.ErrUsage)
		}
	}
}

func TestLSNs(t *testing.T) {
	for s, want := range map[string]backup.LSN{"0/0": 0, "16/B374D848": 0x16_B374D848, "16/b374d848": 0x16_B374D848, "FFFFFFFF/FFFFFFFF": math.MaxUint64, "0/60": 0x60} {
		got, err := backup.ParseLSN(s)
		if got != want || err != nil {
			t.Errorf("%q: got %v, %v, want %v", s, got, err, want)
		}
		if text := got.String(); !strings.EqualFold(text, s) {
			t.Errorf("text of %q: got %q", s, text)
		}
	}
	for _, s := range []string{"", "/", "1", "1/", "/1", "1/2/3", "-1/0", "+1/0", "1 /2", "100000000/0", "0/100000000", "x/y", "0x1/2"} {
		if got, err := backup.ParseLSN(s); err == nil {
			t.Errorf("%q: got %v, want an error", s, got)
		}
	}
}

func TestASystemIdentifierIsAStringInJSON(t *testing.T) {
	b, err := json.Marshal(backup.SystemIdentifier(math.MaxUint64))
	if err != nil || string(b) != `"18446744073709551615"` {
		t.Errorf("got %s, %v", b, err)
	}
	var s backup.SystemIdentifier
	if err := json.Unmarshal(b, &s); err != nil || s != math.MaxUint64 {
		t.Errorf("got %d, %v", s, err)
	}
	for _, bad := range []string{`7`, `""`, `"-1"`, `"18446744073709551616"`, `null`} {
		if err := json.Unmarshal([]byte(bad), &s); err == nil {
			t.Errorf("%s: got nil, want an error", bad)
		}
	}
}

func TestHints(t *testing.T) {
	cause := errors.New("cause")
	err := fmt.Errorf("outer: %w", backup.Hint(fmt.Errorf("inner: %w", backup.Hint(cause, "first")), "second"))
	if got := backup.HintOf(err); got != "second" {
		t.Errorf("the outermost hint: got %q, want %q", got, "second")
	}
	if !errors.Is(err, cause) || err.Error() != "outer: inner: cause" {
		t.Errorf("a hint hides the error: %v", err)
	}
	if got := backup.HintOf(errors.Join(cause, err)); got != "second" {
		t.Errorf("in a joined error: got %q, want %q", got, "second")
	}
	if backup.Hint(nil, "hint") != nil || backup.HintOf(nil) != "" || backup.HintOf(cause) != "" {
		t.Error("a hint came out of nothing")
	}
}

func TestAVerdictIsGoodWhenSomethingPassedAndNothingFailed(t *testing.T) {
	check := func(results ...backup.CheckResult) backup.Verdict {
		var v backup.Verdict
		for _, r := range results {
			v.Checks = append(v.Checks, backup.Check{Result: r})
		}
		return v
	}
	for name, test := range map[string]struct {
		v    backup.Verdict
		word string
	}{
		"all passed":               {check(backup.Passed, backup.Passed), "good"},
		"one failed":               {check(backup.Passed, backup.Failed), "damaged"},
		"one could not run":        {check(backup.Passed, backup.CouldNotRun), "good"},
		"none could run":           {check(backup.CouldNotRun), "damaged"},
		"nothing was checked":      {check(), "damaged"},
		"a result nobody knows":    {check("perhaps"), "damaged"},
		"failed after all passed":  {check(backup.Failed, backup.Passed), "damaged"},
		"failed and could not run": {check(backup.CouldNotRun, backup.Failed), "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.v.Word(); got != test.word || test.v.Good() != (test.word == "good") {
				t.Errorf("got %q, want %q", got, test.word)
			}
		})
	}
}

func TestTheMajorVersion(t *testing.T) {
	if got := (backup.Server{VersionNum: 150018}).Major(); got != 15 {
		t.Errorf("got %d, want 15", got)
	}
}

func TestALogicalVolumeThatDoesNotHoldTogetherIsRefused(t *testing.T) {
	for name, change := range map[string]func(*backup.Device){
		"no physical volumes":                      func(d *backup.Device) { d.LogicalVolume.PhysicalVolumes = nil },
		"a member without its physical volume":     func(d *backup.Device) { d.Members = d.Members[:1] },
		"no members at all":                        func(d *backup.Device) { d.Members, d.LogicalVolume.PhysicalVolumes = nil, nil },
		"no segment":                               func(d *backup.Device) { d.LogicalVolume.Segments = nil },
		"a segment of another type":                func(d *backup.Device) { d.LogicalVolume.Segments[0].Type = "raid1" },
		"a segment on a member that is none":       func(d *backup.Device) { d.LogicalVolume.Segments[0].Stripes[1].Member = 3 },
		"a segment on nothing":                     func(d *backup.Device) { d.LogicalVolume.Segments[0].Stripes = nil },
		"a linear segment on two":                  func(d *backup.Device) { d.LogicalVolume.Segments[0].Type = backup.SegmentLinear },
		"a gap before the first segment":           func(d *backup.Device) { d.LogicalVolume.Segments[0].Start = 512 },
		"a segment of no size":                     func(d *backup.Device) { d.LogicalVolume.Segments[0].Size = 0 },
		"no group":                                 func(d *backup.Device) { d.LogicalVolume.Group.UUID = "" },
		"the kind without its description":         func(d *backup.Device) { d.LogicalVolume = nil },
		"another kind's description beside no own": func(d *backup.Device) { d.Kind = backup.DeviceArray },
	} {
		t.Run(name, func(t *testing.T) {
			top := lvm().Topology
			change(&top.Filesystems[0].Device)
			if err := top.Validate(); err == nil {
				t.Error("got nil, want an error")
			}
		})
	}
	if err := lvm().Topology.Validate(); err != nil {
		t.Error(err)
	}
}
