// Package bench measures what design and README promise in numbers, on real
// storage and a real server. It holds benchmarks only; docs/benchmarks.md says
// what each of them does and what came out.
//
//	pool → four volumes → cluster → load → cut, copy, dump → figures
//
// What always holds: nothing passes or fails by time; figures that are compared
// come from one run; all that is made goes away with the benchmark.
package bench
