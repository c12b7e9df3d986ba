package postgres_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

// dangerPlan crashes s, copies its data directory and starts it again. The
// copies of one server may be many.
func dangerPlan(t *testing.T, s *pgtest.Server) postgres.Plan {
	t.Helper()
	server := backup.Server{}
	if s.PID() != 0 {
		server = inspect(t, s).Server
		s.Crash(t)
		defer s.Start(t)
	} else {
		server = dangerServer(t, s)
	}
	root := filepath.Join(pgtest.Folder(t), "copy")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", s.DataDirectory, root).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	return postgres.Plan{
		Root: root, Data: filepath.Join(root, filepath.Base(s.DataDirectory)), Server: server,
		Map: func(path string) (string, bool) {
			rel, ok := strings.CutPrefix(path, filepath.Dir(s.DataDirectory)+"/")
			return filepath.Join(root, rel), ok
		},
	}
}

// dangerServer is what a manifest would say of a server that is down.
func dangerServer(t *testing.T, s *pgtest.Server) backup.Server {
	t.Helper()
	control, err := postgres.ReadControl(filepath.Join(s.DataDirectory, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	return backup.Server{VersionNum: s.Installation.Major * 10000, SystemIdentifier: backup.SystemIdentifier(control.SystemIdentifier), Superuser: "postgres", DataDirectory: s.DataDirectory}
}
