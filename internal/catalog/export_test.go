package catalog

import "time"

// NewDirByLink returns a Dir that behaves as on a filesystem without
// RENAME_NOREPLACE.
func NewDirByLink(root string) *Dir { return &Dir{root: root, link: true} }

// Hasten returns a store in S3 that waits only briefly before it tries again,
// lists page by page and sends parts of that size (0: the real one); at most
// parts of them, of which a tenth are small (0: as S3 has it).
func Hasten(s Store, page int32, part, parts int) *S3 {
	s3 := s.(*S3)
	out := &S3{at: s3.at, page: page, sizes: s3.sizes, pause: 5 * time.Millisecond}
	if part > 0 {
		out.sizes.part = part
	}
	if parts > 0 {
		out.sizes.smallParts, out.sizes.maxParts = parts/10, parts
	}
	return out
}
