package postgres_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
)

func TestConninfoHasNoPassword(t *testing.T) {
	for _, v := range []string{"PGPASSWORD", "PGHOST", "PGUSER", "PGSERVICE", "PGSSLMODE", "PGPORT", "PGPASSFILE"} {
		t.Setenv(v, "")
	}
	const certificate = "/etc/ssl/certs/ca-certificates.crt"
	if _, err := os.Stat(certificate); err != nil {
		t.Skip("no certificates here")
	}
	for _, c := range []struct{ name, dsn, want, password string }{
		{"words", `host=db.example port=5433 user=rep password=se\'cret dbname=x application_name=y sslmode=require sslrootcert='/etc/ssl/certs/ca-certificates.crt'`,
			`host='db.example' port='5433' user='rep' sslmode='require' sslrootcert='/etc/ssl/certs/ca-certificates.crt' application_name='me'`, "se'cret"},
		{"a URL", `postgres://rep:se%27cret@db.example:5433/x?sslmode=disable`, `host='db.example' port='5433' user='rep' sslmode='disable' application_name='me'`, "se'cret"},
		{"two hosts", `host=a,b port=1,2 user=rep sslmode=prefer`, `host='a,b' port='1,2' user='rep' sslmode='prefer' application_name='me'`, ""},
		{"a socket", `host=/run/pg user=rep`, `host='/run/pg' port='5432' user='rep' application_name='me'`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, password, err := postgres.Conninfo(postgres.Target{DSN: c.dsn}, "me")
			if err != nil || got != c.want || password != c.password {
				t.Errorf("got %s, %q, %v, want %s, %q", got, password, err, c.want, c.password)
			}
			if strings.Contains(got, "cret") {
				t.Error("the password is in it")
			}
		})
	}
	t.Setenv("PGSSLMODE", "verify-full")
	t.Setenv("PGPASSWORD", "of the environment")
	if got, password, err := postgres.Conninfo(postgres.Target{DSN: "host=db user=rep sslrootcert=system"}, "me"); err != nil || !strings.Contains(got, "sslmode='verify-full'") || password != "of the environment" {
		t.Errorf("from the environment: got %s, %q, %v", got, password, err)
	}
	for _, dsn := range []string{"host=db user=rep options='-c x=y'", "host=db user=rep sslpassword=x sslmode=disable", "postgres://db/?work_mem=5"} {
		if got, _, err := postgres.Conninfo(postgres.Target{DSN: dsn}, "me"); !errors.Is(err, backup.ErrUsage) || strings.Contains(err.Error(), "=x") {
			t.Errorf("%s: got %q, %v", dsn, got, err)
		}
	}
}

func TestSynchronousNames(t *testing.T) {
	for _, c := range []struct {
		names string
		want  bool
	}{
		{"", false}, {"other", false}, {"me", true}, {"ME", true}, {`"me"`, true}, {"*", true}, {`"*"`, true}, {"FIRST 2 (a, me)", true}, {"ANY 1 (a,b)", false}, {"2 (a,Me)", true},
		{`"a ""quoted"" name", me`, true}, {`"not me"`, false}, {"meme", false},
	} {
		if got := postgres.Synchronous(c.names, "me"); got != c.want {
			t.Errorf("%q: got %t", c.names, got)
		}
	}
}
