package backup_test

import (
	"bytes"
	"testing"

	"cleancut/internal/backup"
)

func FuzzDecodeManifest(f *testing.F) {
	for _, m := range []backup.Manifest{raid0(), separate(), lvm()} {
		b, err := backup.EncodeManifest(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)/3])
	}
	f.Add([]byte(`{"version":4}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := backup.DecodeManifest(b)
		if err != nil {
			return
		}
		m.Version = backup.ManifestVersion // older ones are read, not written
		once, err := backup.EncodeManifest(m)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		m, err = backup.DecodeManifest(once)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		twice, err := backup.EncodeManifest(m)
		if err != nil || !bytes.Equal(once, twice) {
			t.Errorf("written twice: %v\n%s\n%s", err, once, twice)
		}
		if order := m.Topology.FreezeOrder(); len(order) != len(m.Topology.Filesystems) {
			t.Errorf("freeze order %v of %d filesystems", order, len(m.Topology.Filesystems))
		}
	})
}

func FuzzParseLSN(f *testing.F) {
	for _, s := range []string{"0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF", "1/2/3", "-1/0", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := backup.ParseLSN(s)
		if err != nil {
			return
		}
		if back, err := backup.ParseLSN(l.String()); err != nil || back != l {
			t.Errorf("%q: %v came back as %v, %v", s, l, back, err)
		}
	})
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"0", "4G", "512MiB", "8192P", "-1", "1 K", "B"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := backup.ParseBytes(s)
		if err == nil && b < 0 {
			t.Errorf("%q: got %d", s, int64(b))
		}
		_ = b.String()
	})
}
