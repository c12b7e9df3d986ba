package demo

import (
	"context"
	"slices"
)

// Step 21.
func (s *story) figures(_ context.Context, facts map[string]any) error {
	sum := s.load.Summary()
	var before, during []int64
	cut, _ := s.manifest.Span()
	for _, p := range s.load.Series() {
		if p.At.Before(cut) {
			before = append(before, p.Count)
		} else {
			during = append(during, p.Count)
		}
	}
	facts["seconds_of_load"], facts["words_per_second"], facts["transfers_per_second"] = sum.Duration.Seconds(), sum.WordsPerSecond, sum.TransfersPerSecond
	facts["median_commits_per_second_before_the_cut"] = median(before)
	facts["median_commits_per_second_from_the_cut_on"] = median(during)
	facts["longest_stall_ms"] = sum.LongestStall.Length.Milliseconds()
	if len(before) < 2 || len(during) < 2 {
		return errStep("the load ran %d seconds before and %d after the cut: too short for a figure", len(before), len(during))
	}
	return nil
}

func median(v []int64) int64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// Step 22.
func (s *story) removeAll(ctx context.Context, facts map[string]any) error {
	facts["undone"] = len(s.undo)
	if err := s.cleanUp(ctx); err != nil {
		return err
	}
	facts["checked"] = s.checked
	return nil
}
