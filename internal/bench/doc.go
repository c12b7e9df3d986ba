// Package bench measures what design and README promise in numbers, on real
// storage and a real server. It holds benchmarks, which docs/benchmarks.md
// tells, and what they share with the program impact, whose figures are in
// docs/evidence.md.
//
//	pool → four volumes → cluster → load → cut, copy, dump → figures
//
// What always holds: nothing passes or fails by time; figures that are compared
// come from one run; all that is made goes away with the benchmark.
package bench
