// Package backup holds the words of cleancut: plain data that every other
// package shares, and pure functions over it. It imports nothing of ours,
// touches nothing outside the process and keeps no state.
//
//	Topology → Cut → Manifest → Verdict
//
// What is written to JSON here is a format: see docs/manifest.md.
package backup
