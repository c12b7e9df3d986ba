package load

import (
	"context"
	"errors"
	"time"
)

// Which says which beaters run; nil means not.
type Which struct {
	Bulk      *BulkOptions
	Words     *WordsOptions
	Transfers *TransfersOptions
	Churn     *ChurnOptions
	Files     *FilesOptions
}

// All is every beater of the server with its defaults. Bulk has no limit then:
// on a small disk give it one. Files wants to be told where.
func All() Which {
	return Which{Bulk: &BulkOptions{}, Words: &WordsOptions{}, Transfers: &TransfersOptions{}, Churn: &ChurnOptions{}}
}

// Load is several beaters at work. Those not asked for are nil.
type Load struct {
	Bulk      *Bulk
	Words     *Words
	Transfers *Transfers
	Churn     *Churn
	Files     *Files

	crews []*crew
}

// Summary is what a load came to. Rates are means over the whole run.
type Summary struct {
	Duration           time.Duration `json:"duration_ns"`
	BulkRows           int64         `json:"bulk_rows"`
	Words              int64         `json:"words"`
	WordsPerSecond     float64       `json:"words_per_second"`
	Transfers          int64         `json:"transfers"`
	TransfersPerSecond float64       `json:"transfers_per_second"`
	ChurnTables        int64         `json:"churn_tables"`
	FileOperations     int64         `json:"file_operations,omitempty"`
	LongestStall       Stall         `json:"longest_stall"` // of Words
}

// Start starts the beaters one after the other. Cancelling ctx ends them
// cleanly. If one cannot start, those that did are stopped.
func Start(ctx context.Context, connect Connect, which Which) (*Load, error) {
	l := &Load{}
	var starts []func(context.Context, Connect) error
	if which.Bulk != nil {
		l.Bulk = NewBulk(*which.Bulk)
		l.crews, starts = append(l.crews, &l.Bulk.crew), append(starts, l.Bulk.Start)
	}
	if which.Words != nil {
		l.Words = NewWords(*which.Words)
		l.crews, starts = append(l.crews, &l.Words.crew), append(starts, l.Words.Start)
	}
	if which.Transfers != nil {
		l.Transfers = NewTransfers(*which.Transfers)
		l.crews, starts = append(l.crews, &l.Transfers.crew), append(starts, l.Transfers.Start)
	}
	if which.Churn != nil {
		l.Churn = NewChurn(*which.Churn)
		l.crews, starts = append(l.crews, &l.Churn.crew), append(starts, l.Churn.Start)
	}
	if which.Files != nil {
		l.Files = NewFiles(*which.Files)
		l.crews, starts = append(l.crews, &l.Files.crew), append(starts, l.Files.Start)
	}
	for _, start := range starts {
		if err := start(ctx, connect); err != nil {
			_, stopped := l.Stop()
			return nil, errors.Join(err, stopped)
		}
	}
	return l, nil
}

// Stop stops all beaters at the same time, waits for them and sums up. The
// error is Err. Calling it again gives the same.
func (l *Load) Stop() (Summary, error) {
	stopped := make(chan struct{})
	for _, c := range l.crews {
		go func() {
			_ = c.Stop() // Err tells it again
			stopped <- struct{}{}
		}()
	}
	for range l.crews {
		<-stopped
	}
	return l.Summary(), l.Err()
}

// Err joins the errors of the beaters.
func (l *Load) Err() error {
	var errs []error
	for _, c := range l.crews {
		errs = append(errs, c.Err())
	}
	return errors.Join(errs...)
}

// Summary sums up so far.
func (l *Load) Summary() Summary {
	var s Summary
	for _, c := range l.crews {
		from, to := c.span()
		s.Duration = max(s.Duration, to.Sub(from))
	}
	seconds := max(s.Duration.Seconds(), 1e-9)
	if l.Bulk != nil {
		s.BulkRows = l.Bulk.Rows()
	}
	if l.Words != nil {
		s.Words = l.Words.Count()
		s.WordsPerSecond = float64(s.Words) / seconds
		s.LongestStall = l.Words.Stall(time.Time{}, time.Time{})
	}
	if l.Transfers != nil {
		s.Transfers = l.Transfers.Count()
		s.TransfersPerSecond = float64(s.Transfers) / seconds
	}
	if l.Churn != nil {
		s.ChurnTables = l.Churn.Count()
	}
	if l.Files != nil {
		s.FileOperations = l.Files.Count()
	}
	return s
}

// Series is the throughput of every second since the first beater's start:
// the commits of Words and Transfers together. The last point may be of less
// than a second.
func (l *Load) Series() []Point {
	var from, to time.Time
	var journals []*journal
	for _, c := range l.crews {
		first, last := c.span()
		if first.IsZero() {
			continue
		}
		if from.IsZero() || first.Before(from) {
			from = first
		}
		if last.After(to) {
			to = last
		}
		if c.name == wordsName || c.name == transfersName {
			journals = append(journals, c.list()...)
		}
	}
	return series(from, to, journals)
}

// Promise joins the promises of Words and Transfers; see Words.Promise. Facts
// and markers are the caller's to add.
func (l *Load) Promise(before time.Time) Promise { return l.PromiseUntil(before, time.Time{}) }

// PromiseUntil is Promise for a copy that holds nothing later than until.
func (l *Load) PromiseUntil(before, until time.Time) Promise {
	p := Promise{Before: before}
	if l.Words != nil {
		p.Words = l.Words.streams(before, until)
	}
	if l.Transfers != nil {
		p.Transfers = l.Transfers.streams(before, until)
	}
	return p
}
