package archive

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"cleancut/internal/catalog"
	"cleancut/internal/postgres/replication"
)

// TestWhatIsStoredDoesNotEndTheTroubleOfReceiving, nor the other way around.
func TestWhatIsStoredDoesNotEndTheTroubleOfReceiving(t *testing.T) {
	dir := t.TempDir()
	s := &stream{o: StreamOptions{Dir: dir, WAL: catalog.WAL{}, Log: slog.New(slog.DiscardHandler)}}
	told := func() Status {
		t.Helper()
		s.tell(func() {}, true)
		st, err := ReadStatus(dir)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	s.fails(&s.receiving, errors.New("the server is away"))
	since := told().Failing
	s.fails(&s.storing, errors.New("the catalog is full"))
	if st := told(); st.Error != "the server is away; the catalog is full" || !st.Failing.Equal(*since) {
		t.Errorf("both fail: %+v", st)
	}
	s.stores()
	s.fails(&s.receiving, errors.New("the server is still away"))
	if st := told(); st.State != "waiting" || st.Error != "the server is still away" || !st.Failing.Equal(*since) {
		t.Errorf("what waited is stored, the server still away since %s: %+v", since, st)
	}
	s.fails(&s.storing, errors.New("the catalog is full"))
	s.progress(replication.Position{})
	if st := told(); st.State != "receiving" || st.Error != "the catalog is full" || st.Failing.Before(*since) {
		t.Errorf("it receives and cannot store: %+v", st)
	}
	s.stores()
	if st := told(); st.Error != "" || st.Failing != nil {
		t.Errorf("all is well: %+v", st)
	}
	if _, err := ReadStatus(filepath.Join(dir, "other")); err == nil {
		t.Error("a status where no stream ever ran")
	}
}
