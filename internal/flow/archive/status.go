package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/postgres/replication"
	"cleancut/internal/wal"
)

const (
	statusFile = "status.json"
	statusMost = time.Second // it is written at most so often
)

// Status is how far a stream has come. It lies in its folder for others.
type Status struct {
	Updated  time.Time    `json:"updated"`
	PID      int          `json:"pid"`
	State    string       `json:"state"` // connecting, receiving, waiting
	Error    string       `json:"error,omitempty"`
	Failing  *time.Time   `json:"failing_since,omitempty"`
	Slot     string       `json:"slot,omitempty"`
	Timeline wal.Timeline `json:"timeline,omitempty"`
	Server   backup.LSN   `json:"server_lsn"`  // end of the server's WAL, as it said last
	Durable  backup.LSN   `json:"durable_lsn"` // end of what is on this host's disk
	Stored   backup.LSN   `json:"stored_lsn"`  // end of what is in the catalog, and of what the server may forget
	Lag      backup.Bytes `json:"lag_bytes"`   // from Durable to Server
	Unstored backup.Bytes `json:"unstored_bytes"`
	Pending  int          `json:"pending_files"` // wait for the catalog
}

// ReadStatus reads the status that a stream left in its folder.
// backup.ErrNotFound: none ever ran with it.
func ReadStatus(dir string) (s Status, err error) {
	b, err := os.ReadFile(filepath.Join(dir, statusFile))
	if errors.Is(err, os.ErrNotExist) {
		return s, fmt.Errorf("status of the stream: %w", backup.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}

// progress is told by the session.
func (s *stream) progress(p replication.Position) {
	s.tell(func() {
		if s.status.State != "receiving" {
			s.status.State = "receiving"
			s.receiving = trouble{}
		}
		s.status.Timeline, s.status.Durable, s.status.Server = p.Timeline, p.Durable, max(p.Server, s.status.Server)
		if p.Durable < s.status.Stored { // another timeline, or begun anew
			s.status.Server = p.Server
		}
	}, false)
}

// trouble is what one of the two halves of a stream waits for. Each has its
// own: what is stored says nothing of a server that is away.
type trouble struct {
	reason string
	since  time.Time
}

// fails notes what one half, receiving or storing, waits for.
func (s *stream) fails(half *trouble, err error) {
	s.o.Log.Warn("waiting", "reason", err)
	s.tell(func() {
		s.status.State, half.reason = "waiting", err.Error()
		if half.since.IsZero() {
			half.since = time.Now().UTC()
		}
	}, true)
}

// stores notes that a file went into the catalog.
func (s *stream) stores() {
	s.tell(func() { s.storing = trouble{} }, false)
}

// troubles are the reasons of both halves, and since when the first has one.
func (s *stream) troubles() (reasons string, since *time.Time) {
	for _, half := range []trouble{s.receiving, s.storing} {
		switch {
		case half.reason == "":
			continue
		case since == nil:
			reasons, since = half.reason, &half.since
		default:
			reasons += "; " + half.reason
			if half.since.Before(*since) {
				since = &half.since
			}
		}
	}
	return reasons, since
}

// tell changes the status and writes it, if it was not written just now.
func (s *stream) tell(change func(), now bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	if !now && time.Since(s.written) < statusMost {
		return
	}
	s.written = time.Now()
	st := s.status
	if st.State != "stopped" { // else the error it ended with, if any
		st.Error, st.Failing = s.troubles()
	}
	st.Updated, st.Stored, st.Pending = time.Now().UTC(), s.stored(), len(s.pending)
	st.Lag, st.Unstored = bytesTo(st.Server, st.Durable), bytesTo(st.Server, st.Stored)
	s.status.Stored = st.Stored
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return
	}
	// Not durable and not missed: a full disk must not stop the stream.
	path := filepath.Join(s.o.Dir, statusFile)
	if os.WriteFile(path+".tmp", append(b, '\n'), 0o600) == nil {
		_ = os.Rename(path+".tmp", path)
	}
}

func bytesTo(to, from backup.LSN) backup.Bytes {
	if to < from || from == 0 {
		return 0
	}
	return backup.Bytes(to - from)
}
