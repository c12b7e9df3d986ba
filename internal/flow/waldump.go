package flow

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/wal"
)

// walDump looks with pg_waldump into the WAL of a way, before anything is made
// by it. Two segments at most lie in its folder, because a record may begin in
// one and end in the next. All have names of the way's own timeline, which
// pg_waldump takes as it comes, so that it reads over a fork as recovery does.
type walDump struct {
	flow    *Flow
	tool    string
	system  wal.System
	history wal.History
	first   uint64 // segment that recovery may ask for first
	final   uint64 // last one that there is
	dir     *os.File
	have    []uint64
}

const walDumpPrefix = "waldump-"

func (f *Flow) openWALDump(tool string, list WALList, way WALWay, first uint64) (*walDump, error) {
	i := slices.IndexFunc(list.histories, func(h wal.History) bool { return h.Timeline == way.Timeline })
	dir, err := f.walDumpFolder()
	if err != nil {
		return nil, err
	}
	return &walDump{flow: f, tool: tool, system: *list.System, history: list.histories[i], first: first,
		final: wal.At(0, way.To-1, list.System.SegmentSize).Number, dir: dir}, nil
}

// Close removes the folder.
func (d *walDump) Close() { closeWALDump(d.dir) }

// walDumpFolder makes a folder for WAL that is only looked at. While it is open
// sweep leaves it alone.
func (f *Flow) walDumpFolder() (*os.File, error) {
	dir, err := f.lockedFolder(walDumpPrefix)
	if err != nil {
		return nil, fmt.Errorf("look into the WAL: %w", err)
	}
	return dir, nil
}

func closeWALDump(dir *os.File) {
	_, _ = os.RemoveAll(dir.Name()), dir.Close() // what stays is sweep's
}

// dumped is a line of pg_waldump (pg_waldump.c, XLogDumpDisplayRecord).
var dumped = regexp.MustCompile(`^rmgr: \S+ .*?, tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*?desc: (.*)`)

// each calls do for the records that begin in a segment and end in the WAL that
// there is, of one resource manager or of all ("").
func (d *walDump) each(ctx context.Context, number uint64, rmgr string, do func(lsn backup.LSN, xid uint32, text string)) error {
	if err := d.fetch(ctx, number); err != nil {
		return err
	}
	begin := wal.Segment{Number: number}
	// Without an end pg_waldump waits five seconds for the segment after the last (WALDumpOpenSegment).
	end := wal.Segment{Number: d.have[len(d.have)-1]}.End(d.system.SegmentSize)
	args := []string{"--path=" + d.dir.Name(), "--timeline=" + strconv.FormatUint(uint64(d.history.Timeline), 10),
		"--start=" + begin.Start(d.system.SegmentSize).String(), "--end=" + end.String()}
	if rmgr != "" {
		args = append(args, "--rmgr="+rmgr)
	}
	cmd := exec.CommandContext(ctx, d.tool, args...)
	cmd.Env = []string{"TZ=UTC", "LC_ALL=C"}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("look into the WAL: %w", err)
	}
	lines := bufio.NewReaderSize(out, 1<<16)
	for err == nil {
		var line []byte
		line, err = lines.ReadBytes('\n')
		m := dumped.FindSubmatch(line)
		if m == nil {
			continue
		}
		lsn, _ := backup.ParseLSN(string(m[2]))
		xid, _ := strconv.ParseUint(string(m[1]), 10, 32)
		if lsn < begin.End(d.system.SegmentSize) {
			do(lsn, uint32(xid), string(m[3]))
		}
	}
	_ = cmd.Wait() // ends with an error where the WAL does, which is normal
	return context.Cause(ctx)
}

// fetch brings a segment and the next one into the folder, and nothing else.
func (d *walDump) fetch(ctx context.Context, number uint64) error {
	path := func(n uint64) string {
		return filepath.Join(d.dir.Name(), wal.Segment{Timeline: d.history.Timeline, Number: n}.File(d.system.SegmentSize).String())
	}
	var want []uint64
	for n := number; n <= min(number+1, d.final); n++ {
		want = append(want, n)
	}
	for _, n := range d.have {
		if !slices.Contains(want, n) {
			if err := os.Remove(path(n)); err != nil {
				return fmt.Errorf("look into the WAL: %w", err)
			}
		}
	}
	for _, n := range want {
		if slices.Contains(d.have, n) {
			continue
		}
		f, err := os.OpenFile(path(n), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return fmt.Errorf("look into the WAL: %w", err)
		}
		file := d.history.Path(n, d.system.SegmentSize).File(d.system.SegmentSize)
		if err := errors.Join(d.flow.Catalog.WAL().Get(ctx, file, d.system, f), f.Close()); err != nil {
			return fmt.Errorf("look into the WAL: %w", err)
		}
	}
	d.have = want
	return nil
}

// backwards looks at segment after segment, the last one first, until found.
func (d *walDump) backwards(ctx context.Context, rmgr string, found func() bool, do func(lsn backup.LSN, xid uint32, text string)) error {
	for n := d.final; n >= d.first && !found(); n-- {
		if err := d.each(ctx, n, rmgr, do); err != nil {
			return err
		}
	}
	return nil
}

// last returns where the last record begins.
func (d *walDump) last(ctx context.Context) (last backup.LSN, err error) {
	err = d.backwards(ctx, "", func() bool { return last != 0 }, func(lsn backup.LSN, _ uint32, _ string) { last = lsn })
	return last, err
}

// ended is what xact_desc of xactdesc.c says of the end of a transaction; of
// one that was prepared, its own number stands here and not before.
var ended = regexp.MustCompile(`^(?:COMMIT|ABORT)(?:_PREPARED)? (?:(\d+): )?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC`)

// lastEnd returns when the last transaction ended; zero if none did.
func (d *walDump) lastEnd(ctx context.Context) (last time.Time, err error) {
	var bad error
	err = d.backwards(ctx, "Transaction", func() bool { return !last.IsZero() }, func(_ backup.LSN, _ uint32, text string) {
		if m := ended.FindStringSubmatch(text); m != nil {
			last, bad = time.Parse("2006-01-02 15:04:05.999999", m[2])
		}
	})
	return last, errors.Join(err, bad)
}

// find looks for the end of a transaction, or for a restore point, that begins
// at from or later.
func (d *walDump) find(ctx context.Context, target backup.Target, from backup.LSN) (found bool, err error) {
	rmgr := "Transaction"
	if target.Kind == backup.TargetName {
		rmgr = "XLOG"
	}
	for n := d.first; n <= d.final && !found; n++ {
		err := d.each(ctx, n, rmgr, func(lsn backup.LSN, xid uint32, text string) {
			if lsn >= from && isTarget(target, xid, text) {
				found = true
			}
		})
		if err != nil {
			return false, err
		}
	}
	return found, nil
}

func isTarget(target backup.Target, xid uint32, text string) bool {
	if target.Kind == backup.TargetName {
		return text == "RESTORE_POINT "+target.Name
	}
	m := ended.FindStringSubmatch(text)
	if m != nil && m[1] != "" {
		n, _ := strconv.ParseUint(m[1], 10, 32)
		xid = uint32(n)
	}
	return m != nil && xid == target.XID
}
