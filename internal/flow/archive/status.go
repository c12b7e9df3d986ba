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
			if len(s.pending) == 0 {
				s.status.Error, s.status.Failing = "", nil
			}
		}
		s.status.Timeline, s.status.Durable, s.status.Server = p.Timeline, p.Durable, max(p.Server, s.status.Server)
		if p.Durable < s.status.Stored { // another timeline, or begun anew
			s.status.Server = p.Server
		}
	}, false)
}

// fails notes what is waited for.
func (s *stream) fails(err error) {
	s.o.Log.Warn("waiting", "reason", err)
	s.tell(func() {
		s.status.State, s.status.Error = "waiting", err.Error()
		if s.status.Failing == nil {
			now := time.Now().UTC()
			s.status.Failing = &now
		}
	}, true)
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
