package postgres

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// ErrLabel: not the backup_label of a backup that was taken by StartBackup.
var ErrLabel = errors.New("not a backup_label")

// Label is what a backup_label says (build_backup_content of
// src/backend/access/transam/xlogbackup.c, before 15 do_pg_start_backup of
// xlog.c). It does not hold the LSN at which the backup ends.
type Label struct {
	StartLSN      backup.LSN // where recovery starts: the redo position of the checkpoint
	Segment       string     // the WAL file of StartLSN, 24 hexadecimal digits
	CheckpointLSN backup.LSN // where the record of that checkpoint starts
	Standby       bool       // taken of a standby: BACKUP FROM
	StartTime     string     // as the server writes it, in its log_timezone
	Text          string     // the free text given at the start
	Timeline      uint32
}

// ParseLabel reads a backup_label of PostgreSQL 13 to 18 as strictly as the
// server does (read_backup_label of xlogrecovery.c): seven lines in this order,
// each ended by a line feed, and nothing else. Labels of exclusive backups
// (BACKUP METHOD: pg_start_backup) and of incremental ones (17+, INCREMENTAL
// FROM) are refused. Errors wrap ErrLabel.
func ParseLabel(b []byte) (Label, error) {
	rest, ended := strings.CutSuffix(string(b), "\n")
	lines := strings.Split(rest, "\n")
	names := []string{"START WAL LOCATION", "CHECKPOINT LOCATION", "BACKUP METHOD", "BACKUP FROM", "START TIME", "LABEL", "START TIMELINE"}
	if !ended || len(lines) != len(names) {
		return Label{}, fmt.Errorf("%w: it does not have %d whole lines", ErrLabel, len(names))
	}
	values := make([]string, len(names))
	for i, name := range names {
		var ok bool
		if values[i], ok = strings.CutPrefix(lines[i], name+": "); !ok || strings.ContainsAny(values[i], "\r\x00") {
			return Label{}, fmt.Errorf("%w: line %d is not %q and a value", ErrLabel, i+1, name)
		}
	}
	l := Label{StartTime: values[4], Text: values[5]}
	timeline, err := decimal(values[6])
	if err != nil {
		return Label{}, err
	}
	l.Timeline = timeline
	if err := l.readPlaces(values[0], values[1]); err != nil {
		return Label{}, err
	}
	if values[2] != "streamed" {
		return Label{}, fmt.Errorf("%w: the backup method is %q, not streamed", ErrLabel, values[2])
	}
	switch values[3] {
	case "primary", "master": // the word of 13
	case "standby":
		l.Standby = true
	default:
		return Label{}, fmt.Errorf("%w: the backup is from %q", ErrLabel, values[3])
	}
	return l, nil
}

// readPlaces reads "0/2000028 (file 000000010000000000000002)" and "0/2000060".
// The file's name must fit the LSN, whatever the size of a WAL file is.
func (l *Label) readPlaces(start, checkpoint string) (err error) {
	lsn, file, _ := strings.Cut(start, " (file ")
	if l.StartLSN, err = labelLSN(lsn); err != nil {
		return err
	}
	if l.CheckpointLSN, err = labelLSN(checkpoint); err != nil {
		return err
	}
	if l.CheckpointLSN < l.StartLSN {
		return fmt.Errorf("%w: the checkpoint's record at %s lies before its redo position %s", ErrLabel, l.CheckpointLSN, l.StartLSN)
	}
	l.Segment = strings.TrimSuffix(file, ")")
	for size := backup.LSN(1 << 20); size <= 1<<30; size *= 2 { // WalSegMinSize to WalSegMaxSize
		if fmt.Sprintf("%08X%08X%08X)", l.Timeline, uint64(l.StartLSN>>32), uint64(l.StartLSN&0xFFFFFFFF/size)) == file {
			return nil
		}
	}
	return fmt.Errorf("%w: no WAL file %q of timeline %d holds %s", ErrLabel, l.Segment, l.Timeline, l.StartLSN)
}

// labelLSN reads an LSN that is a possible position of a record, not 0/0.
func labelLSN(s string) (backup.LSN, error) {
	lsn, err := backup.ParseLSN(s)
	if err != nil || lsn == 0 {
		return 0, fmt.Errorf("%w: %q is no LSN", ErrLabel, s)
	}
	return lsn, nil
}

func decimal(s string) (uint32, error) {
	v, err := strconv.ParseUint(s, 10, 32)
	if err != nil || v == 0 || strconv.FormatUint(v, 10) != s {
		return 0, fmt.Errorf("%w: %q is no timeline", ErrLabel, s)
	}
	return uint32(v), nil
}
