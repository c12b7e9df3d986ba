package flow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider"
	"cleancut/internal/wal"
)

// apart is production with data, WAL and a tablespace on volumes of their own.
func apart(t *testing.T, p provider.Provider) *production {
	t.Helper()
	dir := labtest.Folder(t)
	data, wal, space := storage(t, p, dir, flow.StorageOptions{Name: "data", Volumes: 1}), storage(t, p, dir, flow.StorageOptions{Name: "wal", Volumes: 1}),
		storage(t, p, dir, flow.StorageOptions{Name: "space", Volumes: 1})
	a := serve(t, p, p, dir, pgtest.Options{Data: filepath.Join(data, "pg"), WALDir: filepath.Join(wal, "pg")})
	a.server.Exec(t, fmt.Sprintf("CREATE TABLESPACE elsewhere LOCATION '%s'", pgtest.Mkdir(t, filepath.Join(space, `a back\slash`))))
	a.server.Exec(t, "ALTER DATABASE postgres SET default_tablespace = elsewhere")
	return a
}

func TestFilesystemsCutSecondsApartAreSoundWhenBracketed(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	p := apart(t, localPool(t))
	p.create()
	stop := p.beat()
	p.skew = 2 * time.Second
	m, promise := p.cut(backup.ModeBracketed)
	stop()
	b := m.Bracket
	if m.Cut.Achieved != backup.Bracketed || b == nil || m.Cut.SpreadMS < 2*float64(p.skew.Milliseconds()) || m.Cut.FlushLSN != b.StopLSN || b.Standby() ||
		!strings.Contains(string(b.Map), `a back\\slash`) || len(m.Cut.Frozen) != 3 {
		t.Fatalf("got %+v, %+v", m.Cut, b)
	}
	if err := p.judge(m, promise); err != nil {
		t.Errorf("judged damaged: %v", err)
	}
	// It stands on its own: the catalog's WAL is all there is, and without it
	// nothing is restored.
	folder := filepath.Join(filepath.Dir(p.flow.State.Path()), "catalog", "clusters", "lab", "backups", string(m.ID), "wal")
	if left, err := filepath.Glob(filepath.Join(p.flow.State.Path(), "capture-*")); err != nil || len(left) > 0 {
		t.Errorf("left of the receiver: %v, %v", left, err)
	}
	last := filepath.Join(folder, b.WAL[len(b.WAL)-1]+".zst")
	p.spoilt(m, last)
	if err := os.Truncate(last, 1000); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.other.Restore(t.Context(), flow.RestoreOptions{ID: m.ID, Purpose: backup.ForVerify}); !errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrLeft) {
		t.Errorf("with a segment cut short: got %v, want damage and nothing left", err)
	}
	if err := os.Remove(last); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.other.Restore(t.Context(), flow.RestoreOptions{ID: m.ID, Purpose: backup.ForVerify}); !errors.Is(err, backup.ErrIncomplete) || !strings.Contains(err.Error(), b.WAL[len(b.WAL)-1]) {
		t.Errorf("with a segment gone: got %v, want its name and that the backup is incomplete", err)
	}
	if err := p.flow.DeleteLast(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(folder); err == nil && len(left) > 0 {
		t.Errorf("left of the backup's WAL: %v", left)
	}
}

// spoilt puts another content into the last of the WAL that was kept with a
// bracketed backup: sound for the catalog, and without the record that ends the
// backup, or with a record that is not whole. Nothing is made of it.
func (p *production) spoilt(m backup.Manifest, last string) {
	p.t.Helper()
	sound, err := os.ReadFile(last)
	if err != nil {
		p.t.Fatal(err)
	}
	file, err := wal.ParseFile(m.Bracket.WAL[len(m.Bracket.WAL)-1])
	if err != nil {
		p.t.Fatal(err)
	}
	size := m.Server.WALSegmentSize
	var content bytes.Buffer
	if err := p.flow.Catalog.BackupWAL(m.ID).Get(p.t.Context(), file, wal.System{Identifier: m.Server.SystemIdentifier, SegmentSize: size}, &content); err != nil {
		p.t.Fatal(err)
	}
	end := int(uint64(m.Bracket.End) % uint64(size))
	for what, change := range map[string]func(b []byte){
		"the record that ends the backup is zeroed": func(b []byte) { clear(b[end-40 : end]) },
		"a bit of the record before it is flipped":  func(b []byte) { b[end-60] ^= 1 },
	} {
		other := bytes.Clone(content.Bytes())
		change(other)
		err := os.Remove(last)
		if err := errors.Join(err, p.flow.Catalog.BackupWAL(m.ID).Put(p.t.Context(), file, bytes.NewReader(other), int64(size))); err != nil {
			p.t.Fatal(err)
		}
		_, _, err = p.other.Restore(p.t.Context(), flow.RestoreOptions{ID: m.ID, Purpose: backup.ForVerify})
		if !errors.Is(err, backup.ErrDamage) || errors.Is(err, backup.ErrLeft) || !strings.Contains(err.Error(), "not whole") {
			p.t.Errorf("%s: got %v, want that the WAL is not whole", what, err)
		}
		p.nothingWasMade()
	}
	if err := os.WriteFile(last, sound, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// nothingWasMade: not even the lock of a copy, whose file stays.
func (p *production) nothingWasMade() {
	p.t.Helper()
	locks, err := filepath.Glob(filepath.Join(p.other.State.Path(), "locks", "copy*"))
	if err != nil || len(locks) > 1 { // that of the judgement before
		p.t.Errorf("locks of copies: %v, %v", locks, err)
	}
}

func TestAStandbyIsBackedUpBracketed(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := localPool(t)
	primary := pgtest.New(t, pgtest.Options{Sync: true, Checksums: true})
	dir := labtest.Folder(t)
	data, wal := storage(t, pool, dir, flow.StorageOptions{Name: "data", Volumes: 1}), storage(t, pool, dir, flow.StorageOptions{Name: "wal", Volumes: 1})
	p := serve(t, pool, pool, dir, pgtest.Options{Data: filepath.Join(data, "pg"), WALDir: filepath.Join(wal, "pg"), NoStart: true})
	for _, dir := range []string{p.server.DataDirectory, filepath.Join(wal, "pg")} { // initdb's
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		pgtest.Mkdir(t, dir)
	}
	if out, err := primary.Command(t.Context(), "pg_basebackup", "-D", p.server.DataDirectory, "--waldir", filepath.Join(wal, "pg"), "-R", "-c", "fast").CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	pgtest.Append(t, filepath.Join(p.server.DataDirectory, "postgresql.conf"), "unix_socket_directories = '"+p.server.SocketDir+"'\n")
	p.server.Start(t)
	connect := func(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, primary.DSN("postgres")) }
	conn, err := connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := load.Create(t.Context(), conn, load.Options{Rows: 2000}); err != nil {
		t.Fatal(err)
	}
	if p.load, err = load.Start(t.Context(), connect, load.Which{Words: &load.WordsOptions{}, Transfers: &load.TransfersOptions{}}); err != nil {
		t.Fatal(err)
	}
	defer p.load.Stop()
	if err := p.load.Words.Await(t.Context(), 200); err != nil {
		t.Fatal(err)
	}
	p.skew = time.Second
	o := flow.BackupOptions{Target: postgres.Target{DSN: p.server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: time.Minute, Quick: time.Minute, Rounds: 10}
	if _, err := p.flow.Backup(t.Context(), o); !errors.Is(err, backup.ErrUnsupported) || !strings.Contains(backup.HintOf(err), "--mode bracketed") {
		t.Errorf("frozen: got %v (%s)", err, backup.HintOf(err))
	}
	m, _ := p.cut(backup.ModeBracketed)
	if m.Bracket == nil || !m.Bracket.Standby() || m.Cut.FlushLSN != m.Bracket.End {
		t.Fatalf("got %+v", m.Bracket)
	}
	if err := p.judge(m, load.Promise{}); err != nil { // a standby promises no row
		t.Errorf("judged damaged: %v", err)
	}
	// It is promoted inside the window.
	o.Mode, o.FastCheckpoint = backup.ModeBracketed, true
	o.BeforeFreeze = p.server.Promote
	if m, err := p.flow.Backup(t.Context(), o); !errors.Is(err, backup.ErrVoid) || errors.Is(err, backup.ErrLeft) {
		t.Errorf("promoted inside the window: got %s, %v", m.ID, err)
	}
	if intents, err := p.flow.Catalog.Intents(t.Context()); err != nil || len(intents) > 0 {
		t.Errorf("left: %v, %v", intents, err)
	}
}
