package local

// The parsers of the sidecars, for their fuzz tests.
var (
	DecodeVolume   = decodeVolume
	DecodeSnapshot = decodeSnapshot
	Encode         = encode
)
