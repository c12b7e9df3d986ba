// Package report is a machine: it writes one run of the demo or the drill as
// one HTML file for people.
//
//	Page → view (numbers, positions, words) → template → one file
//
// What always holds:
//   - The file is complete: it works from file://, offline, and its content
//     security policy forbids every request and every script but the one that
//     this package wrote.
//   - What a page is given is text. It cannot become markup or code, whatever
//     it holds.
//   - A picture never says what the text beside it does not: without
//     JavaScript, on paper or read aloud the page tells the same.
//   - No data is told as "no data", a second without a measurement is a gap
//     and not a zero, and a run without a checked step has not passed.
package report
