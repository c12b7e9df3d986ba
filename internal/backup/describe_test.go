package backup_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

// fits checks EC2's limits for tags (User Guide, "Tag restrictions").
func fits(t *testing.T, tags []backup.Tags) {
	t.Helper()
	value := regexp.MustCompile(`^[A-Za-z0-9 +=._:/@-]*$`)
	for i, member := range tags {
		m := backup.Member{Index: i, Volume: backup.Volume{ID: "vol-0123456789abcdef0"}}
		all := backup.SnapshotTags("20261122T211704Z-5f3a9c", strings.Repeat("c", 63), m, len(tags))
		maps.Copy(all, member)
		if len(all) > 46 { // a cut's tag, a name and two of the owner must have room
			t.Errorf("member %d has %d tags", i, len(all))
		}
		for k, v := range all {
			if len(k) > 128 || len(v) > 256 || !value.MatchString(k) || !value.MatchString(v) {
				t.Errorf("tag %q = %q", k, v)
			}
		}
	}
}

func TestEveryManifestComesBackFromItsTagsByteForByte(t *testing.T) {
	files, err := filepath.Glob("testdata/manifest-v*.json")
	if err != nil || len(files) < 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		manifest, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, members := range []int{1, 2, 4, 64} {
			tags, err := backup.ManifestTags(manifest, backup.Digest(manifest), members)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			fits(t, tags)
			rand.Shuffle(len(tags), func(i, j int) { tags[i], tags[j] = tags[j], tags[i] })
			got, err := backup.ManifestFromTags(tags)
			if err != nil || !bytes.Equal(got, manifest) {
				t.Errorf("%s over %d members: got %d bytes, %v", file, members, len(got), err)
			}
			most := 0
			for _, m := range tags {
				most = max(most, len(m))
			}
			t.Logf("NOTE %s: %d bytes are %d tags a member of %d", file, len(manifest), most, members)
		}
	}
}

func TestAManifestThatDoesNotFitIsRefusedAsAWhole(t *testing.T) {
	r := rand.NewChaCha8([32]byte{1})
	noise := make([]byte, 7100) // 38 pieces of 250 hold 7,125 bytes
	_, _ = r.Read(noise)
	if tags, err := backup.ManifestTags(noise, backup.Digest(noise), 1); err != nil {
		t.Errorf("7100 bytes: %v", err)
	} else {
		fits(t, tags)
	}
	noise = append(noise, noise[:100]...)
	_, _ = r.Read(noise)
	if tags, err := backup.ManifestTags(noise, backup.Digest(noise), 1); tags != nil || !errors.Is(err, backup.ErrUnsupported) {
		t.Errorf("7200 bytes in one member: got %d tags, %v, want %v", len(tags), err, backup.ErrUnsupported)
	}
	if _, err := backup.ManifestTags(noise, backup.Digest(noise), 2); err != nil {
		t.Errorf("7200 bytes in two members: %v", err)
	}
	if _, err := backup.ManifestTags(noise, "another digest", 2); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("another digest: got %v", err)
	}
}

func TestWhatHappenedToTheTagsIsTold(t *testing.T) {
	manifest, err := os.ReadFile("testdata/manifest-v1-raid0.json")
	if err != nil {
		t.Fatal(err)
	}
	const piece = "cleancut:manifest."
	for _, c := range []struct {
		name string
		harm func(tags []backup.Tags) []backup.Tags
		want error
	}{
		{"no tags of completeness at all", func([]backup.Tags) []backup.Tags { return []backup.Tags{{"a": "b"}, {}} }, backup.ErrIncomplete},
		{"no snapshot at all", func([]backup.Tags) []backup.Tags { return nil }, backup.ErrIncomplete},
		{"one member was not tagged yet", func(x []backup.Tags) []backup.Tags { x[1] = backup.Tags{}; return x }, backup.ErrIncomplete},
		{"only digests, as when it does not fit", func(x []backup.Tags) []backup.Tags {
			for i := range x {
				x[i] = backup.Tags{backup.TagDigest: x[i][backup.TagDigest]}
			}
			return x
		}, backup.ErrNotFound},
		{"a member is missing", func(x []backup.Tags) []backup.Tags { return x[:3] }, backup.ErrDamage},
		{"a piece is missing", func(x []backup.Tags) []backup.Tags { delete(x[2], piece+"2"); return x }, backup.ErrDamage},
		{"a character of a piece is another", func(x []backup.Tags) []backup.Tags {
			x[2][piece+"2"] = strings.Replace(x[2][piece+"2"], x[2][piece+"2"][7:8], "-", 1)
			return x
		}, backup.ErrDamage},
		{"a letter of a piece is another", func(x []backup.Tags) []backup.Tags {
			v := []byte(x[2][piece+"2"])
			v[9] = map[bool]byte{true: 'B', false: 'A'}[v[9] == 'A']
			x[2][piece+"2"] = string(v)
			return x
		}, backup.ErrDamage},
		{"two pieces have changed places", func(x []backup.Tags) []backup.Tags {
			x[0][piece+"0"], x[1][piece+"1"] = x[1][piece+"1"], x[0][piece+"0"]
			return x
		}, backup.ErrDamage},
		{"the digest is another", func(x []backup.Tags) []backup.Tags {
			for i := range x {
				x[i][backup.TagDigest] = strings.Repeat("0", 64)
			}
			return x
		}, backup.ErrDamage},
		{"a member of another backup", func(x []backup.Tags) []backup.Tags { x[3][backup.TagDigest] = strings.Repeat("0", 64); return x }, backup.ErrDamage},
		{"a piece twice", func(x []backup.Tags) []backup.Tags { x[3][piece+"0"] = x[0][piece+"0"]; return x }, backup.ErrDamage},
		{"a piece too many", func(x []backup.Tags) []backup.Tags { x[3][piece+"999"] = "AAAA"; return x }, backup.ErrDamage},
		{"an absurd count", func(x []backup.Tags) []backup.Tags {
			for i := range x {
				x[i][backup.TagPieces] = "999999999"
			}
			return x
		}, backup.ErrDamage},
	} {
		t.Run(c.name, func(t *testing.T) {
			tags, err := backup.ManifestTags(manifest, backup.Digest(manifest), 4)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := backup.ManifestFromTags(c.harm(tags)); got != nil || !errors.Is(err, c.want) {
				t.Errorf("got %d bytes, %v, want %v", len(got), err, c.want)
			}
		})
	}
}

func FuzzManifestTags(f *testing.F) {
	f.Add([]byte("{}"), 1)
	f.Add(bytes.Repeat([]byte(`{"key":"value"}`), 300), 4)
	f.Fuzz(func(t *testing.T, manifest []byte, members int) {
		if members = members&63 + 1; len(manifest) == 0 {
			return
		}
		tags, err := backup.ManifestTags(manifest, backup.Digest(manifest), members)
		if errors.Is(err, backup.ErrUnsupported) && len(manifest) > members*7000 {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		fits(t, tags)
		if got, err := backup.ManifestFromTags(tags); err != nil || !bytes.Equal(got, manifest) {
			t.Errorf("got %d bytes, %v, want %d", len(got), err, len(manifest))
		}
	})
}

func FuzzManifestFromTags(f *testing.F) {
	manifest := []byte("{}\n")
	tags, err := backup.ManifestTags(manifest, backup.Digest(manifest), 1)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(backup.Digest(manifest), "1", tags[0]["cleancut:manifest.0"], "")
	f.Add("", "2", "KLUv/QQA", "AAAA")
	f.Fuzz(func(t *testing.T, digest, count, first, second string) {
		one := backup.Tags{backup.TagDigest: digest, backup.TagPieces: count, "cleancut:manifest.0": first}
		if second != "" {
			one[fmt.Sprint("cleancut:manifest.", 1)] = second
		}
		got, err := backup.ManifestFromTags([]backup.Tags{one})
		if err == nil && backup.Digest(got) != digest {
			t.Errorf("bytes that no digest proves: %d", len(got))
		}
	})
}
