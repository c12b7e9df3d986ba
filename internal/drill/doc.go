// Package drill repeats the experiment: production under load is cut under
// chosen conditions, many times, and every image is judged on the image alone.
//
//	grid → trials not yet done → production run: load, cuts → images judged → line in trials.jsonl → counts, intervals, report
//
// What always holds: a trial is one line, written when it was judged and never
// changed, so a drill that was stopped goes on where it was; each trial of a
// cell comes from a production run of its own, so trials of a cell are
// independent; what is not judged is not counted, neither as sound nor as
// damaged. Conditions (load, order of the cells, moment of the cuts) follow
// from the seed; how the machine schedules them does not.
package drill
