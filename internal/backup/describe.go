package backup

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// The tags by which the snapshots of a backup carry its manifest. They are
// added with TagDigest, when the set is complete.
const (
	TagPieces = "cleancut:pieces"    // into how many pieces the manifest was cut
	tagPiece  = "cleancut:manifest." // and the number of the piece, from 0: base64 of zstd
)

const (
	pieceSize      = 250     // of EC2's 256 characters a value
	piecesMember   = 38      // of EC2's 50 tags a resource; the rest are ours and the owner's
	maxDescription = 8 << 20 // of the manifest; a damaged one shall not fill the memory
)

// ManifestTags cuts the bytes of a stored manifest, compressed, into tags for
// its snapshots: one Tags for each of the members, in any order, TagDigest
// among them. Keys, values and their number fit EC2's limits (CreateTags: 50
// a resource, 128 and 256 characters of letters, digits and +-=._:/@). The
// error wraps ErrUnsupported if they cannot hold it.
func ManifestTags(manifest []byte, digest string, members int) ([]Tags, error) {
	if got := Digest(manifest); got != digest || members < 1 {
		return nil, fmt.Errorf("%w: a manifest with digest %s, not %s, of %d members", ErrUsage, got, digest, members)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, fmt.Errorf("compress the manifest: %w", err)
	}
	text := base64.StdEncoding.EncodeToString(enc.EncodeAll(manifest, nil))
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("compress the manifest: %w", err)
	}
	pieces := (len(text) + pieceSize - 1) / pieceSize
	if pieces > members*piecesMember || len(manifest) > maxDescription {
		return nil, fmt.Errorf("a manifest of %v does not fit into the tags of %d snapshots: %w", Bytes(len(manifest)), members, ErrUnsupported)
	}
	out := make([]Tags, members)
	for i := range out {
		out[i] = Tags{TagDigest: digest, TagPieces: strconv.Itoa(pieces)}
	}
	for i := range pieces {
		out[i%members][tagPiece+strconv.Itoa(i)] = text[i*pieceSize : min(len(text), (i+1)*pieceSize)]
	}
	return out, nil
}

// ManifestFromTags puts together what ManifestTags cut: the very bytes of the
// manifest, proved by TagDigest, from the tags of all snapshots of a backup in
// any order; other tags are passed over. ErrIncomplete: they never got
// TagDigest, so the backup was interrupted. ErrNotFound: they carry no
// manifest, for it did not fit or an older cleancut made them. ErrDamage:
// pieces are missing or changed, or the snapshots contradict each other.
func ManifestFromTags(tags []Tags) ([]byte, error) {
	digest, err := common(tags, TagDigest)
	if err != nil {
		return nil, err
	}
	if digest == "" {
		return nil, fmt.Errorf("%w: its snapshots have no tag %s", ErrIncomplete, TagDigest)
	}
	count, err := common(tags, TagPieces)
	if err != nil {
		return nil, err
	}
	if count == "" {
		return nil, fmt.Errorf("the manifest is not in the tags: %w", ErrNotFound)
	}
	text, err := joined(tags, count)
	if err != nil {
		return nil, err
	}
	manifest, err := unpacked(text)
	if err != nil {
		return nil, fmt.Errorf("the manifest in the tags: %w: %w", ErrDamage, err)
	}
	if got := Digest(manifest); got != digest {
		return nil, fmt.Errorf("the manifest in the tags: %w: its digest is %s, tag %s says %s", ErrDamage, got, TagDigest, digest)
	}
	return manifest, nil
}

// common returns the one value that all have for key, "" if none has it.
func common(tags []Tags, key string) (string, error) {
	values := map[string]int{}
	for _, t := range tags {
		if v, ok := t[key]; ok && v != "" {
			values[v]++
		}
	}
	switch {
	case len(values) == 0:
		return "", nil
	case len(values) > 1:
		return "", fmt.Errorf("%w: its snapshots have different tags %s: %s", ErrDamage, key, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
	}
	for v, n := range values {
		if n == len(tags) {
			return v, nil
		}
	}
	return "", fmt.Errorf("%w: only some of its snapshots have the tag %s", ErrIncomplete, key)
}

// joined returns the pieces one after the other, each there once.
func joined(tags []Tags, count string) (string, error) {
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > len(tags)*piecesMember {
		return "", fmt.Errorf("%w: tag %s is %q", ErrDamage, TagPieces, count)
	}
	pieces := make([]string, n)
	for _, t := range tags {
		for key, value := range t {
			number, ours := strings.CutPrefix(key, tagPiece)
			if !ours {
				continue
			}
			i, err := strconv.Atoi(number)
			if err != nil || i < 0 || i >= n || value == "" || pieces[i] != "" {
				return "", fmt.Errorf("%w: tag %s is out of place", ErrDamage, key)
			}
			pieces[i] = value
		}
	}
	if i := slices.Index(pieces, ""); i >= 0 {
		return "", fmt.Errorf("%w: tag %s%d is missing", ErrDamage, tagPiece, i)
	}
	return strings.Join(pieces, ""), nil
}

func unpacked(text string) ([]byte, error) {
	packed, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(bytes.NewReader(nil), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxDescription))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	manifest, err := dec.DecodeAll(packed, nil)
	if err == nil && len(manifest) == 0 {
		err = errors.New("it is empty")
	}
	return manifest, err
}
