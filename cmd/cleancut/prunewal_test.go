package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/wal"
)

// prunedWAL is what the tests look at of the WAL part of prune's JSON.
type prunedWAL struct {
	WAL struct {
		Window       string
		Anchor       backup.ID
		Since        time.Time `json:"recoverable_since"`
		Doubt        string
		Keep, Remove []wal.Part
		Bytes        backup.Bytes
		Backups      []wal.Reach
		Deleted      int
		Done         bool
	}
}

func (o outcome) prunedWAL(t *testing.T) (p prunedWAL) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.out), &p); err != nil {
		t.Fatalf("%v: exit %d\n%s%s", err, o.code, o.out, o.err)
	}
	return p
}

// archived lists the files of WAL in the catalog.
func (l *lab) archived(t testing.TB) []wal.File {
	t.Helper()
	store, err := catalog.Open("file://" + l.catalog)
	if err != nil {
		t.Fatal(err)
	}
	files, err := catalog.New(store, "main").WAL().List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []wal.File
	for _, f := range files {
		out = append(out, f.File)
	}
	return out
}

// shipped ends the segment and waits until the catalog has it.
func (p *production) shipped(t testing.TB, tl wal.Timeline) {
	t.Helper()
	p.server.Exec(t, "SELECT pg_logical_emit_message(true, 'x', 'x')")
	conn := p.server.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	var name string
	if err := conn.QueryRow(t.Context(), "SELECT pg_walfile_name(pg_switch_wal())").Scan(&name); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.catalog, "clusters", "main", "wal", tl.String(), name+".zst")
	eventually(t, name+" is in the catalog", func() bool { _, err := os.Stat(file); return err == nil })
}

// say adds a row, and returns a moment after its commit and before whatever
// follows.
func (p *production) say(t testing.TB, word string) string {
	t.Helper()
	p.server.Exec(t, "INSERT INTO public.said VALUES ('"+word+"')")
	conn := p.server.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	var at time.Time
	if err := conn.QueryRow(t.Context(), "SELECT clock_timestamp()").Scan(&at); err != nil {
		t.Fatal(err)
	}
	return at.UTC().Format(time.RFC3339Nano)
}

// words restores a backup and returns what its copy was told.
func (p *production) words(t *testing.T, args ...string) string {
	t.Helper()
	root := filepath.Join(p.dir, "copy", "a")
	var c backup.Copy
	if err := json.Unmarshal([]byte(p.must(t, append([]string{"restore", "--json", "--to", root}, args...)...).out), &c); err != nil {
		t.Fatal(err)
	}
	defer p.must(t, "restore", "--undo", root)
	copied := &pgtest.Server{SocketDir: c.SocketDir, Port: c.Port}
	conn := copied.Connect(t, "postgres")
	defer func() { _ = conn.Close(t.Context()) }()
	var out string
	if err := conn.QueryRow(t.Context(), "SELECT string_agg(word, ' ' ORDER BY word) FROM public.said").Scan(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestWALFollowsTheBackups has three backups and a promotion, of which a window
// that began a moment ago needs the last backup.
func TestWALFollowsTheBackups(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	if err := os.Chmod(filepath.Dir(binary(t)), 0o755); err != nil { // a copy's restore_command runs it as the server's user
		t.Fatal(err)
	}
	l := newLab(t, "xfs", 8<<30)
	p := l.cluster(t, pgtest.Options{Small: true})
	p.server.Exec(t, "CREATE TABLE public.said (word text)")
	cmd, result := p.command(t, nil, "wal", "stream")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
	t.Cleanup(stop)
	eventually(t, "the slot is there", func() bool {
		conn := p.server.Connect(t, "postgres")
		defer func() { _ = conn.Close(t.Context()) }()
		var n int
		return conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_replication_slots WHERE active").Scan(&n) == nil && n == 1
	})
	p.shipped(t, 1)
	var ids []backup.ID
	var moments []string
	for _, word := range []string{"a", "b", "c"} {
		ids = append(ids, p.backup(t))
		moments = append(moments, p.say(t, word))
		for range 3 {
			p.shipped(t, 1)
		}
	}
	p.must(t, "verify", "--level", "start", string(ids[2]))
	p.server.Stop(t)
	pgtest.Append(t, filepath.Join(p.server.DataDirectory, "standby.signal"), "")
	p.server.Start(t)
	if err := p.server.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	moments = append(moments, p.say(t, "d"))
	p.say(t, "e")
	p.shipped(t, 2)
	stop()
	if o := result(); o.code != 0 {
		t.Errorf("wal stream: exit %d\n%s", o.code, o.err)
	}
	before := p.archived(t)
	t.Run("without a window every kept backup recovers as before", func(t *testing.T) {
		got := p.must(t, "prune", "--keep-last", "2", "--dry-run", "--json")
		plan := got.prunedWAL(t)
		if plan.WAL.Anchor != ids[1] || len(plan.WAL.Remove) == 0 || plan.WAL.Done || len(plan.WAL.Backups) != 2 || len(plan.WAL.Backups[0].After) != 2 {
			t.Errorf("got %s", got.out)
		}
		if left := p.archived(t); !slices.Equal(left, before) {
			t.Errorf("a dry run left %v of %v", left, before)
		}
		p.must(t, "prune", "--keep-last", "2")
		if got := p.words(t, string(ids[1]), "--target", "time="+moments[1]); got != "a b" {
			t.Errorf("the oldest backup to a moment after it: got %q", got)
		}
	})
	t.Run("stopped at its points", func(t *testing.T) { p.stoppedPrune(t) })
	t.Run("with a window only the last one recovers further than to its end", func(t *testing.T) {
		dry := p.must(t, "prune", "--keep-last", "2", "--wal-window", "1ms", "--dry-run")
		for _, words := range [][]string{{"keep", string(ids[2]), "the promised window of 1ms begins with it"}, {"delete", "were cut later"}, {"keep", "00000002.history", "history files stay"},
			{string(ids[1]), "recovers to its own end only"}, {"every moment since 20"}} {
			if !slices.ContainsFunc(strings.Split(dry.out, "\n"), func(line string) bool { return hasAll(line, words) }) {
				t.Errorf("no line with %q:\n%s", words, dry.out)
			}
		}
		for _, at := range []time.Time{time.Unix(1, 0), time.Now().AddDate(70, 0, 0)} { // the catalog's clock stood wrong
			stored, err := filepath.Glob(filepath.Join(p.catalog, "clusters", "main", "wal", "0*", "*"))
			if err != nil || len(stored) < 5 {
				t.Fatalf("%v, %v", stored, err)
			}
			for _, file := range stored {
				if err := os.Chtimes(file, at, at); err != nil {
					t.Fatal(err)
				}
			}
			if again := p.must(t, "prune", "--keep-last", "2", "--wal-window", "1ms", "--dry-run"); again.out != dry.out {
				t.Errorf("stored at %s the plan is another:\n%s", at, again.out)
			}
		}
		t.Logf("NOTE the plan:\n%s", dry.out)
		planned := p.must(t, "prune", "--keep-last", "2", "--wal-window", "1ms", "--dry-run", "--json").prunedWAL(t).WAL
		o := p.with("CLEANCUT_WAL_WINDOW=1ms").must(t, "prune", "--keep-last", "2", "--json")
		golden(t, "json/prune-wal.txt", shape(t, o.out))
		done := o.prunedWAL(t).WAL
		if fmt.Sprint(planned.Keep, planned.Remove, planned.Bytes) != fmt.Sprint(done.Keep, done.Remove, done.Bytes) || !done.Done || done.Deleted == 0 {
			t.Errorf("planned %+v, done %+v", planned, done)
		}
		if done.Anchor != ids[2] || done.Since.IsZero() {
			t.Errorf("got %s", o.out)
		}
		if list := p.must(t, "wal", "list"); !strings.Contains(list.out, "every moment since "+done.Since.Format(time.RFC3339)+" can be recovered") {
			t.Errorf("wal list does not tell:\n%s", list.out)
		}
		for moment, want := range map[string]string{moments[2]: "a b c", moments[3]: "a b c d"} {
			if got := p.words(t, string(ids[2]), "--target", "time="+moment); got != want {
				t.Errorf("to %s: got %q, want %q", moment, got, want)
			}
		}
		p.run(t, "restore", "--to", filepath.Join(p.dir, "copy", "a"), "--target", "time="+moments[1]).
			refused(t, 1, "does not have the WAL that follows the backup's own", "every moment since "+done.Since.Format(time.RFC3339Nano))
		if got := p.words(t, string(ids[1])); got != "a" {
			t.Errorf("the one before stands alone: got %q", got)
		}
		if again := p.must(t, "prune", "--keep-last", "2", "--wal-window", "1ms", "--json").prunedWAL(t).WAL; again.Deleted > 0 || len(again.Remove) > 0 {
			t.Errorf("again it deletes %+v", again)
		}
	})
	t.Run("the configuration", func(t *testing.T) {
		file := filepath.Join(p.dir, "c.toml")
		if err := os.WriteFile(file, []byte("[retention]\nlast = 2\nwal_window = \"7d\"\n[cluster.main.retention]\nwal_window = \"1d12h\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			env, flag, want string
		}{{"", "", "1d12h0m0s"}, {"CLEANCUT_WAL_WINDOW=3d", "", "3d"}, {"CLEANCUT_WAL_WINDOW=3d", "0", "0s"}} {
			args := []string{"prune", "--dry-run", "--json", "--config", file}
			if c.flag != "" {
				args = append(args, "--wal-window", c.flag)
			}
			if got := p.with(c.env).must(t, args...).prunedWAL(t).WAL.Window; got != c.want {
				t.Errorf("%+v: got %s", c, got)
			}
		}
	})
	p.server.Exec(t, "SELECT pg_drop_replication_slot('cleancut')")
}

// stoppedPrune stops a prune of WAL in every way at every deletion, and at each
// of its other calls to the catalog, and lets the next one go on. The WAL is put
// back each time.
func (p *production) stoppedPrune(t *testing.T) {
	folder := filepath.Join(p.catalog, "clusters", "main", "wal")
	saved := filepath.Join(p.dir, "wal.saved")
	tool(t, "cp", "-a", folder, saved)
	put := func() {
		tool(t, "rm", "-rf", folder)
		tool(t, "cp", "-a", saved, folder)
	}
	args := []string{"prune", "--keep-last", "2", "--wal-window", "1ms"}
	points := p.must(t, args...).points
	want := p.archived(t)
	seen := map[string]bool{}
	begun := slices.Index(points, "catalog.list wal")
	ran := 0
	for n := begun; n < len(points); n++ {
		deletes := strings.HasPrefix(points[n], "catalog.delete")
		for _, action := range []string{"kill", "error", "cancel"} {
			if !strings.HasPrefix(points[n], "catalog.") || seen[action+points[n]] && !(deletes && action == "kill") {
				continue
			}
			seen[action+points[n]] = true
			put()
			o := p.runWith(t, []string{fmt.Sprintf("CLEANCUT_FAULT=%s@%d", action, n+1)}, args...)
			ran++
			if action == "kill" && o.code != -1 || action != "kill" && o.code != 0 && o.code != 1 {
				t.Errorf("%s@%d %s: exit %d\n%s", action, n+1, points[n], o.code, o.err)
			}
			left := p.archived(t)
			for _, f := range want {
				if !slices.Contains(left, f) {
					t.Errorf("%s@%d %s: %s is gone", action, n+1, points[n], f)
				}
			}
			if rows := wal.NewSet(left, mega).Ranges(); len(rows) != 2 {
				t.Errorf("%s@%d %s: left %v", action, n+1, points[n], rows)
			}
			p.must(t, args...)
			if again := p.archived(t); !slices.Equal(again, want) {
				t.Errorf("%s@%d %s, and again: left %v, want %v", action, n+1, points[n], again, want)
			}
		}
	}
	t.Logf("NOTE prune stopped %d times at %d points", ran, len(points)-begun)
	if ran < 20 || !seen["killcatalog.delete wal"] {
		t.Errorf("stopped only %d times: %v", ran, seen)
	}
	put()
	tool(t, "rm", "-rf", saved)
}
