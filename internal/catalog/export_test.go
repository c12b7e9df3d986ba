package catalog

// NewDirByLink returns a Dir that behaves as on a filesystem without
// RENAME_NOREPLACE.
func NewDirByLink(root string) *Dir { return &Dir{root: root, link: true} }
