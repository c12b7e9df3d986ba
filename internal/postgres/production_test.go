package postgres_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
)

func TestSettingsInAConfigurationFile(t *testing.T) {
	file := []byte("# archive_command = 'no'\narchive_command 'first'\nArchive_Command = 'it''s \\'two\\' %p' # with a comment\nport=5433 # 5432\ninclude_dir 'a'\ninclude_dir='b'\n")
	for name, want := range map[string][]string{
		"archive_command": {"first", "it's 'two' %p"}, "port": {"5433"}, "include_dir": {"a", "b"}, "archive_mode": nil,
	} {
		if got := postgres.SettingsIn(file, name); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

// TestWhatOverridesIsWhatTheServerWillUse: awkward values, beside what ALTER
// SYSTEM set before, as the server's own programs read them.
func TestWhatOverridesIsWhatTheServerWillUse(t *testing.T) {
	s := pgtest.New(t, pgtest.Options{})
	s.Exec(t, "ALTER SYSTEM SET work_mem = '9MB'", "ALTER SYSTEM SET archive_command = 'of before'")
	s.Stop(t)
	const command = `a\b 'c' "d" %p # e`
	for range 2 {
		if err := postgres.Override(t.Context(), s.DataDirectory, map[string]string{"archive_command": command, "archive_mode": "on"}); err != nil {
			t.Fatal(err)
		}
	}
	site := postgres.Site{Data: s.DataDirectory, Installation: s.Installation}
	for name, want := range map[string]string{"archive_command": command, "archive_mode": "on", "work_mem": "9216"} {
		if got, err := site.Effective(t.Context(), name); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	s.Start(t)
	auto, err := os.ReadFile(filepath.Join(s.DataDirectory, "postgresql.auto.conf"))
	if err != nil || len(postgres.SettingsIn(auto, "archive_command")) != 1 {
		t.Errorf("%v\n%s", err, auto)
	}
}

func TestWhoAnswers(t *testing.T) {
	s := pgtest.New(t, pgtest.Options{HBA: "local all postgres trust\n"})
	other := pgtest.New(t, pgtest.Options{})
	control, err := postgres.ReadControl(filepath.Join(s.DataDirectory, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	system := backup.SystemIdentifier(control.SystemIdentifier)
	for _, c := range []struct {
		name   string
		target postgres.Target
		want   []postgres.Voice
	}{
		{"it does", postgres.Target{DSN: s.DSN("postgres")}, []postgres.Voice{postgres.Wanted}},
		{"it does, by its data directory", postgres.Target{DataDirectory: s.DataDirectory}, []postgres.Voice{postgres.Wanted}},
		{"another cluster does", postgres.Target{DSN: other.DSN("postgres")}, []postgres.Voice{postgres.Other}},
		{"it does and does not let in", postgres.Target{DSN: "host=" + s.SocketDir + " port=5432 user=nobody dbname=postgres"}, []postgres.Voice{postgres.Unclear}},
		{"nobody does", postgres.Target{DSN: "host=" + s.SocketDir + " port=1 user=postgres"}, []postgres.Voice{postgres.Silent}},
		{"no server runs there", postgres.Target{DataDirectory: t.TempDir()}, []postgres.Voice{postgres.Silent}},
		{"two addresses, one of them it", postgres.Target{DSN: "host=" + other.SocketDir + "," + s.SocketDir + " port=5432,5432 user=postgres"}, []postgres.Voice{postgres.Other, postgres.Wanted}},
	} {
		t.Run(c.name, func(t *testing.T) {
			answers, err := postgres.Ask(t.Context(), c.target, system)
			var got []postgres.Voice
			for _, a := range answers {
				got = append(got, a.Voice)
			}
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %+v, %v, want %v", answers, err, c.want)
			}
		})
	}
	s.Stop(t)
	answers, err := postgres.Ask(t.Context(), postgres.Target{DSN: s.DSN("postgres")}, system)
	if err != nil || len(answers) != 1 || answers[0].Voice != postgres.Silent {
		t.Errorf("stopped: got %+v, %v", answers, err)
	}
}
