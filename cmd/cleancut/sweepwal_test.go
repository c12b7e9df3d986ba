package main_test

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
)

// outOfBackupMode waits until the server has no session of the program but
// those of the test's own writer, and none of its temporary slots: backup mode
// has ended.
func (p *production) outOfBackupMode(t *testing.T) {
	t.Helper()
	conn := p.server.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	eventually(t, "backup mode, the receiver and its slot end with the backup", func() bool {
		var left int
		err := conn.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cleancut' AND pid <> pg_backend_pid() AND query !~ '^(WITH a AS|$)')
			+ (SELECT count(*) FROM pg_replication_slots WHERE temporary)`).Scan(&left)
		return err == nil && left == 0
	})
}

func TestABracketedBackupStoppedAnywhereLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newLab(t, "xfs", 8<<30)
	p := l.cluster(t, pgtest.Options{Small: true})
	p.writer(t)
	// retries: an error of the receiver after the end of the window is none of the backup.
	p.underFaults(t, flowUnderFault{retries: true, of: []string{"replication.", "postgres.backup.", "catalog.put wal", "local.clone", "host.freeze"},
		args: func(t *testing.T) []string {
			p.outOfBackupMode(t)
			return []string{"backup", "--mode", "bracketed", "--checkpoint", "fast", "--json"}
		},
		removes: func(t *testing.T, o outcome) {
			t.Helper()
			p.must(t, "delete", string(p.manifestOf(t, o).ID))
		}})
	p.outOfBackupMode(t)
	id := string(p.manifestOf(t, p.must(t, "backup", "--mode", "bracketed", "--checkpoint", "fast", "--json")).ID)
	p.must(t, "verify", "--level", "start", id)
	p.clean(t)
}

func TestARecoveryToATargetStoppedAnywhereLeavesNothing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	l := newLab(t, "xfs", 8<<30)
	p := l.cluster(t, pgtest.Options{Small: true})
	w := &walLab{lab: *p.lab, server: p.server}
	running := w.stream(t, nil)
	eventually(t, "it receives", func() bool { return w.status(t).State == "receiving" })
	id := string(p.backup(t))
	p.server.Exec(t, "INSERT INTO ledger VALUES (-3000, 'behind the backup')", "SELECT pg_create_restore_point('here')", "DELETE FROM ledger WHERE n = -3000")
	w.stored(t, p.server, 1)
	root := filepath.Join(p.dir, "copy", "a")
	of := []string{"archive.", "catalog.get system", "catalog.get wal", "catalog.list wal", "postgres.start"}
	t.Run("restore", func(t *testing.T) { // retries: what is fetched ahead may fail
		p.underFaults(t, flowUnderFault{retries: true, of: of,
			args: func(*testing.T) []string { return []string{"restore", id, "--to", root, "--target", "name=here"} },
			removes: func(t *testing.T, _ outcome) {
				t.Helper()
				p.must(t, "restore", "--undo", root)
			}})
	})
	t.Run("verify", func(t *testing.T) {
		p.underFaults(t, flowUnderFault{retries: true, of: []string{"archive.serve", "catalog.get wal done"},
			args: func(*testing.T) []string { return []string{"verify", id, "--level", "start", "--target", "name=here"} },
			removes: func(t *testing.T, o outcome) {
				t.Helper()
				if !strings.Contains(o.out, "GOOD") {
					t.Errorf("the verdict:\n%s", o.out)
				}
			}})
	})
	if o := running.stop(t, syscall.SIGTERM); o.code != 0 {
		t.Errorf("wal stream: exit %d\n%s", o.code, o.err)
	}
}
