package uml

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// follower copies the growing output files of the program to its writers. One goroutine serves both, so that one writer may be both.
type follower struct {
	files   [2]*os.File
	writers [2]io.Writer
	quit    chan struct{}
	ended   sync.WaitGroup
	err     error // of the goroutine, to be read when it ended
}

// follow opens the output files; nothing is copied before start.
func (x *exchange) follow(stdout, stderr io.Writer) (*follower, error) {
	f := &follower{quit: make(chan struct{}), writers: [2]io.Writer{stdout, stderr}}
	for i, name := range []string{"stdout", "stderr"} {
		if f.writers[i] == nil {
			f.writers[i] = io.Discard
		}
		var err error
		if f.files[i], err = os.Open(x.path(name)); err != nil {
			return nil, errors.Join(err, f.stop())
		}
	}
	return f, nil
}

// start copies until stop; failed is called once if a writer fails.
func (f *follower) start(failed func(error)) {
	f.ended.Go(func() {
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		for {
			if f.err = f.drain(); f.err != nil {
				failed(f.err)
				return
			}
			select {
			case <-f.quit:
				f.err = f.drain()
				return
			case <-tick.C:
			}
		}
	})
}

// drain copies what has come since the last time.
func (f *follower) drain() error {
	for i, file := range f.files {
		// The struct hides the file's WriteTo and the writer's ReadFrom: plain reads to the present end.
		if _, err := io.Copy(struct{ io.Writer }{f.writers[i]}, struct{ io.Reader }{file}); err != nil {
			return err
		}
	}
	return nil
}

// stop copies the rest and closes the files. It returns the first error of reading or writing.
func (f *follower) stop() error {
	close(f.quit)
	f.ended.Wait()
	err := f.err
	for _, file := range f.files {
		if file != nil {
			err = errors.Join(err, file.Close())
		}
	}
	return err
}
