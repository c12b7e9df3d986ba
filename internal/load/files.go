package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// FilesOptions says how Files works. Zero values mean the defaults.
type FilesOptions struct {
	Folders   []string // one session each; made by Start, their parents must be there
	Seed      int64    // default 1
	PerSecond int      // operations of each session; default 200
	Keep      int      // files of a session that live at the same time; default 500
}

// Files is beater E: other programs at work on the filesystems of the server.
// It makes small files in many folders, writes and sometimes syncs them, moves
// them, makes them longer and removes them, so that the filesystem's own log is
// busy. It asks the server nothing and promises nothing. Its operations are
// those on files. What it made stays when it ends; that is at most Keep files
// of 24 KiB each a folder. Use each Files for one Start.
type Files struct {
	crew
	options FilesOptions
}

// NewFiles makes the beater; Start lets it work.
func NewFiles(o FilesOptions) *Files {
	if o.Seed == 0 {
		o.Seed = 1
	}
	if o.PerSecond <= 0 {
		o.PerSecond = 200
	}
	if o.Keep <= 0 {
		o.Keep = 500
	}
	return &Files{crew: crew{name: "files"}, options: o}
}

// Start makes the folders and sets the sessions going; cancelling ctx ends them
// cleanly. A folder that exists is an error. It does not connect.
func (f *Files) Start(ctx context.Context, _ Connect) error {
	works := make([]work, len(f.options.Folders))
	for i, dir := range f.options.Folders {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("start files: %w", err)
		}
		works[i] = f.churn
	}
	return f.launch(ctx, nil, nil, works...)
}

func (f *Files) churn(ctx context.Context, s *session) error {
	c := fileChurn{root: f.options.Folders[s.n], keep: f.options.Keep, random: rand.New(rand.NewPCG(uint64(f.options.Seed), uint64(s.n)))}
	every := time.Second / time.Duration(f.options.PerSecond)
	for due := time.Now(); !s.quitting() && ctx.Err() == nil; {
		s.send()
		if err := c.step(); err != nil {
			return err
		}
		s.ack(time.Now())
		if due = due.Add(every); time.Until(due) < 0 {
			due = time.Now() // what a freeze held up is not made up for
		}
		s.pause(ctx, time.Until(due))
	}
	return nil
}

const (
	filesPerFolder = 32
	fileBytes      = 8 << 10 // written at once, at most
	appends        = 2       // to one file, at most
)

// fileChurn is what one session has made.
type fileChurn struct {
	root   string
	keep   int
	random *rand.Rand
	made   int
	live   []file // oldest first
}

type file struct {
	path     string
	appended int
}

// step does one operation.
func (c *fileChurn) step() error {
	what := c.random.IntN(10)
	switch {
	case len(c.live) > c.keep:
		return c.remove(0)
	case len(c.live) == 0 || what < 5:
		return c.create()
	}
	i := c.random.IntN(len(c.live))
	switch {
	case what < 7:
		return c.move(i)
	case what < 8 && c.live[i].appended < appends:
		c.live[i].appended++
		return c.write(c.live[i].path, os.O_APPEND)
	}
	return c.remove(i)
}

// name is a new one, in the folder that is filled now.
func (c *fileChurn) name() (string, error) {
	dir := filepath.Join(c.root, fmt.Sprint(c.made/filesPerFolder))
	c.made++
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return filepath.Join(dir, fmt.Sprint(c.made)), nil
}

func (c *fileChurn) create() error {
	path, err := c.name()
	if err != nil {
		return err
	}
	c.live = append(c.live, file{path: path})
	return c.write(path, os.O_CREATE|os.O_EXCL)
}

// write adds some bytes; one in four is synced, with its name.
func (c *fileChurn) write(path string, flag int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flag, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(bytes.Repeat([]byte{byte(c.made)}, 1+c.random.IntN(fileBytes)))
	if err == nil && c.random.IntN(4) == 0 {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (c *fileChurn) move(i int) error {
	to, err := c.name()
	if err != nil {
		return err
	}
	from := c.live[i].path
	c.live[i].path = to
	return errors.Join(os.Rename(from, to), c.leave(from))
}

func (c *fileChurn) remove(i int) error {
	path := c.live[i].path
	c.live = append(c.live[:i], c.live[i+1:]...)
	return errors.Join(os.Remove(path), c.leave(path))
}

// leave removes the folder of a file that is gone from it, if it was the last
// one and no new one will come.
func (c *fileChurn) leave(path string) error {
	dir := filepath.Dir(path)
	if filepath.Base(dir) == fmt.Sprint(c.made/filesPerFolder) {
		return nil
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrExist) { // ENOTEMPTY
		return err
	}
	return nil
}
