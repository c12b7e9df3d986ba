package catalog

import "time"

// NewDirByLink returns a Dir that behaves as on a filesystem without
// RENAME_NOREPLACE.
func NewDirByLink(root string) *Dir { return &Dir{root: root, link: true} }

// Hasten returns a store in S3 that waits only briefly before it tries again,
// lists page by page and sends parts of that size.
func Hasten(s Store, page int32, part int) *S3 {
	s3 := s.(*S3)
	return &S3{at: s3.at, page: page, part: part, pause: 5 * time.Millisecond}
}

// PartSize is the size of the first parts of a large object.
const PartSize = partSize
