// Package evidence turns what was measured into docs/evidence.md.
//
//	docs/evidence/*.json → Data → Page → docs/evidence.md
//
// What always holds: every figure on the page is computed from the data; none
// is typed. A test compares the page with its data.
package evidence
