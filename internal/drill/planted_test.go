package drill_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/drill"
	"cleancut/internal/flow"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/postgres/pgtest"
	"cleancut/internal/provider/local"
	"cleancut/internal/state"
)

// subject is a small production, and images of it to plant damage in.
type subject struct {
	t      *testing.T
	dir    string
	pool   string
	a, b   *flow.Flow
	server *pgtest.Server
	facts  load.Facts
	kept   load.Promise // of loads that are over
}

// image is a cut with its promise.
type image struct {
	manifest backup.Manifest
	promise  load.Promise
}

// newSubject puts data and WAL on volumes of their own, or with one volume
// both on it.
func newSubject(t *testing.T, volumes int, checksums bool) *subject {
	t.Helper()
	ctx := t.Context()
	s := &subject{t: t, dir: labtest.Folder(t), pool: labtest.Pool(t, "xfs", 6<<30)}
	if err := local.Init(ctx, s.pool); err != nil {
		t.Fatal(err)
	}
	p, err := local.Open(ctx, s.pool, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for i := range volumes {
		o := flow.StorageOptions{Name: []string{"data", "wal"}[i], Host: "a", Volumes: 1, Size: 320 << 20, Filesystem: "xfs", Mountpoint: filepath.Join(s.dir, []string{"data", "wal"}[i]),
			Fstab: filepath.Join(s.dir, "fstab"), MdadmConf: filepath.Join(s.dir, "mdadm.conf")}
		if _, err := flow.CreateStorage(ctx, p, o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := flow.DestroyStorage(labtest.Context(t), p, o); err != nil {
				t.Error(err)
			}
		})
	}
	o := pgtest.Options{Dir: pgtest.Mkdir(t, filepath.Join(s.dir, "run")), Data: filepath.Join(s.dir, "data/pg"), Sync: true, Checksums: checksums, Small: true,
		Settings: map[string]string{"autovacuum": "off", "checkpoint_timeout": "1h", "max_wal_size": "128MB", "full_page_writes": "on"}}
	if volumes > 1 {
		o.WALDir = filepath.Join(s.dir, "wal/pg")
	}
	s.server = pgtest.New(t, o)
	store := catalog.New(catalog.NewDir(filepath.Join(s.dir, "catalog")), "drill")
	for name, f := range map[string]**flow.Flow{"a": &s.a, "b": &s.b} {
		st, err := state.Open(filepath.Join(s.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		*f = &flow.Flow{Provider: p, Catalog: store, State: st, Cluster: "drill", Host: name, Tool: "test", Watchdog: labtest.Watchdog(t), Log: slog.New(slog.DiscardHandler)}
	}
	if s.facts, err = load.Create(ctx, s.server.Connect(t, "postgres"), load.Options{Rows: 2000, Accounts: 500}); err != nil {
		t.Fatal(err)
	}
	// What is frozen does not ask pg_xact any more.
	s.server.Exec(t, "VACUUM FREEZE", "CHECKPOINT")
	return s
}

func (s *subject) connect(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, s.server.DSN("postgres"))
}

// cut has rows acknowledged before and after a checkpoint, does something to
// production behind the load's back, and cuts.
func (s *subject) cut(behind ...string) image {
	s.t.Helper()
	ctx := s.t.Context()
	l, err := load.Start(ctx, s.connect, load.Which{Words: &load.WordsOptions{}, Transfers: &load.TransfersOptions{}})
	if err != nil {
		s.t.Fatal(err)
	}
	err = errors.Join(l.Words.Await(ctx, 200), l.Transfers.Await(ctx, 100))
	s.server.Exec(s.t, "CHECKPOINT", "SELECT pg_switch_wal()") // the last rows are in segments of their own
	err = errors.Join(err, l.Words.Await(ctx, l.Words.Count()+100))
	_, stopped := l.Stop()
	if err := errors.Join(err, stopped); err != nil {
		s.t.Fatal(err)
	}
	s.server.Exec(s.t, behind...)
	m, err := s.a.Backup(ctx, flow.BackupOptions{Target: postgres.Target{DSN: s.server.DSN("postgres")}, Mode: backup.ModeFreeze, Deadline: time.Minute, Quick: 5 * time.Second, Rounds: 10})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := s.a.DeleteLast(labtest.Context(s.t), m.ID); err != nil {
			s.t.Error(err)
		}
	})
	p := l.Promise(time.Now())
	p.Facts = &s.facts
	return image{m, p}
}

// file is the image of the filesystem on that mount point.
func (s *subject) file(i image, volume string) string {
	s.t.Helper()
	for _, sn := range i.manifest.Snapshots {
		if i.manifest.Topology.Filesystems[i.manifest.Topology.Members()[sn.Member].Filesystem].Mountpoint == filepath.Join(s.dir, volume) {
			return filepath.Join(s.pool, "snapshots", string(sn.ID)+".img")
		}
	}
	s.t.Fatalf("no snapshot of %s", volume)
	return ""
}

// judged plants damage in the image of a volume, judges the set, and puts the
// image right again.
func (s *subject) judged(t *testing.T, i image, volume string, plant func(file string)) (drill.Class, string, drill.Trial) {
	t.Helper()
	file := s.file(i, volume)
	pristine := filepath.Join(s.dir, "pristine.img")
	tool(t, "cp", "--sparse=always", file, pristine)
	defer tool(t, "cp", "--sparse=always", pristine, file)
	if plant != nil {
		plant(file)
	}
	start := time.Now()
	v, found, err := drill.JudgeImage(t.Context(), s.b, i.manifest.ID, drill.Way{Recovery: drill.Crash, Promise: &i.promise})
	if err != nil {
		t.Fatalf("not judged: %v", err)
	}
	class, reason := drill.Judge(v, found)
	t.Logf("%s in %.1f s: %s", class, time.Since(start).Seconds(), reason)
	return class, reason, drill.Trial{Class: class, Checks: v.Checks, Found: found}
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(labtest.Context(t), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// inside changes what the filesystem of an image holds.
func inside(t *testing.T, change func(device, dir string)) func(file string) {
	return func(file string) {
		t.Helper()
		device := tool(t, "losetup", "--find", "--show", "--sector-size", "4096", file)
		defer tool(t, "losetup", "--detach", device)
		dir := t.TempDir()
		tool(t, "mount", "-t", "xfs", "-o", "nouuid", device, dir)
		defer tool(t, "umount", dir)
		change(device, dir)
	}
}

func overwrite(t *testing.T, file string, offset int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// path is where a relation of the play database lies, below the volume.
func (s *subject) path(relation string) string {
	s.t.Helper()
	var path string
	if err := s.server.Connect(s.t, "postgres").QueryRow(s.t.Context(), "SELECT pg_relation_filepath($1::regclass)", relation).Scan(&path); err != nil {
		s.t.Fatal(err)
	}
	return filepath.Join("pg", path)
}

// zeroWAL empties the segments from the one on that is named first.
func zeroWAL(t *testing.T, dir, first string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if len(e.Name()) == 24 && e.Name() >= first {
			overwrite(t, filepath.Join(dir, e.Name()), 0, make([]byte, 1<<20))
		}
	}
}

func TestEachClassOfDamageIsFoundWhereItIsPlanted(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := newSubject(t, 2, true)
	i := s.cut()
	control := filepath.Join("pg/global/pg_control")
	people, index := s.path("play.people"), s.path("play.people_family")
	for _, c := range []struct {
		name   string
		volume string
		plant  func(t *testing.T) func(file string)
		want   drill.Class
		says   string
	}{
		{"nothing is planted", "data", nil, drill.Sound, ""},
		{"the superblock of XFS is overwritten", "data", func(t *testing.T) func(string) {
			return func(file string) { overwrite(t, file, 0, make([]byte, 64<<10)) }
		}, drill.NoMount, "no filesystem can be recognized"},
		{"the log of XFS is overwritten", "wal", func(t *testing.T) func(string) { return s.breakLog(t) }, drill.NoMount, "mount"},
		{"an inode counts blocks that it does not have", "data", func(t *testing.T) func(string) {
			return inodeBlocks(t, "pg/PG_VERSION")
		}, drill.FSDamage, "xfs check of the filesystem"},
		{"pg_control is zeroed", "data", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) { overwrite(t, filepath.Join(dir, control), 0, make([]byte, 512)) })
		}, drill.NoStart, "pg_control"},
		{"all WAL is zeroed", "wal", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) { zeroWAL(t, filepath.Join(dir, "pg"), "") })
		}, drill.NoStart, "could not locate a valid checkpoint record"},
		{"commits are hidden: pg_xact is zeroed", "data", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) { overwrite(t, filepath.Join(dir, "pg/pg_xact/0000"), 0, make([]byte, 8192)) })
		}, drill.Lost, "words acknowledged before the cut are missing"},
		{"the end of the WAL is zeroed", "wal", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) { zeroWAL(t, filepath.Join(dir, "pg"), s.lastSegment(i)) })
		}, drill.Lost, ""},
		{"a page of a table is overwritten", "data", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) { overwrite(t, filepath.Join(dir, people), 8192+4000, []byte("torn")) })
		}, drill.Silent, "pg_amcheck"},
		{"a page of an index is overwritten", "data", func(t *testing.T) func(string) {
			return inside(t, func(_, dir string) {
				overwrite(t, filepath.Join(dir, index), 8192+4000, bytes.Repeat([]byte{0xA5}, 2000))
			})
		}, drill.Silent, "pg_amcheck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var plant func(string)
			if c.plant != nil {
				plant = c.plant(t)
			}
			class, reason, trial := s.judged(t, i, c.volume, plant)
			if class != c.want || !strings.Contains(reason, c.says) {
				t.Errorf("got %q (%s), want %q (%s)", class, reason, c.want, c.says)
			}
			if n := checked(trial); class != drill.NoMount && n != 2 {
				t.Errorf("%d filesystems were checked, want data and WAL: %+v", n, trial.Checks)
			}
		})
	}
}

// checked counts the filesystems whose check could run.
func checked(trial drill.Trial) (n int) {
	for _, c := range trial.Checks {
		if c.OfFilesystem() && c.Name != backup.CheckReadable && c.Result != backup.CouldNotRun {
			n++
		}
	}
	return n
}

// lastSegment is the file of 1 MiB that holds the last flushed byte.
func (s *subject) lastSegment(i image) string {
	n := (uint64(i.manifest.Cut.FlushLSN) - 1) / (1 << 20)
	return fmt.Sprintf("%08X%08X%08X", i.manifest.Server.Timeline, n/4096, n%4096)
}

// xfsDB changes metadata with their checksums, as only a broken write order
// does: nothing but a look at the whole shows it.
func xfsDB(t *testing.T, file string, commands ...string) {
	t.Helper()
	args := []string{"-x"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	tool(t, "xfs_db", append(args, "-f", file)...)
}

// breakLog overwrites the middle of the log, in which a mount looks for the
// end.
func (s *subject) breakLog(t *testing.T) func(file string) {
	return func(file string) {
		t.Helper()
		geometry := map[string]int64{}
		for line := range strings.SplitSeq(tool(t, "xfs_db", "-r", "-f", "-c", "sb 0", "-c", "print logstart logblocks agblocks agblklog blocksize", file), "\n") {
			var name string
			var n int64
			if _, err := fmt.Sscanf(strings.ReplaceAll(line, "=", " "), "%s %d", &name, &n); err == nil {
				geometry[name] = n
			}
		}
		log := geometry["logstart"]
		ag, block := log>>geometry["agblklog"], log&(1<<geometry["agblklog"]-1)
		at := (ag*geometry["agblocks"] + block) * geometry["blocksize"]
		// Cycle numbers that run backwards in every sector: no end can be found.
		junk := make([]byte, 512<<10)
		for i := range junk {
			junk[i] = byte(i/512*37 + 11)
		}
		overwrite(t, file, at, junk)
	}
}

func inodeBlocks(t *testing.T, name string) func(file string) {
	return func(file string) {
		t.Helper()
		inode := ""
		inside(t, func(_, dir string) { inode = tool(t, "stat", "-c", "%i", filepath.Join(dir, name)) })(file)
		xfsDB(t, file, "inode "+inode, "write core.nblocks 77")
	}
}

func TestRowsThatWereNeverPromisedAreFound(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := newSubject(t, 1, true)
	for _, c := range []struct{ name, behind, says string }{
		{"a word that was never sent", "INSERT INTO play.words_said (stream, id, word, sum) VALUES (42, 1, 'ghost', md5('42/1/ghost')::uuid)", "1 words are there that were never sent"},
		{"a word that is torn", "DELETE FROM play.words_said WHERE stream = 42; UPDATE play.words_said SET word = 'half of' WHERE (stream, id) = (SELECT min(stream), 7 FROM play.words_said)", "1 words are torn"},
		{"half of a transaction", "UPDATE play.words_said SET sum = md5(stream || '/' || id || '/' || word)::uuid; UPDATE play.accounts SET balance = balance + 1 WHERE aid = 3", "1 branches whose sums differ"},
	} {
		t.Run(c.name, func(t *testing.T) {
			sub := *s
			sub.t = t
			i := sub.cutAfter(strings.Split(c.behind, "; "))
			if class, reason, _ := sub.judged(t, i, "data", nil); class != drill.Phantom || !strings.Contains(reason, c.says) {
				t.Errorf("got %q (%s), want %q (%s)", class, reason, drill.Phantom, c.says)
			}
		})
	}
}

// cutAfter cuts a production whose log of words was emptied before: its
// promises are of this cut alone.
func (s *subject) cutAfter(behind []string) image {
	s.server.Exec(s.t, "TRUNCATE play.words_said, play.transfers", "UPDATE play.branches SET balance = 0", "UPDATE play.tellers SET balance = 0", "UPDATE play.accounts SET balance = 0")
	return s.cut(behind...)
}

func TestWithoutPageChecksumsOnlyStructureIsSeen(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := newSubject(t, 1, false)
	i := s.cut()
	people, index := s.path("play.people"), s.path("play.people_family")
	t.Run("a page of an index is overwritten", func(t *testing.T) {
		class, reason, _ := s.judged(t, i, "data", inside(t, func(_, dir string) {
			overwrite(t, filepath.Join(dir, index), 8192+4000, bytes.Repeat([]byte{0xA5}, 2000))
		}))
		if class != drill.Silent || !strings.Contains(reason, "pg_amcheck") {
			t.Errorf("got %q (%s), want silent damage, found by pg_amcheck", class, reason)
		}
	})
	t.Run("line pointers of a table are overwritten: its rows are gone", func(t *testing.T) {
		class, reason, _ := s.judged(t, i, "data", inside(t, func(_, dir string) {
			overwrite(t, filepath.Join(dir, people), 8192+24, bytes.Repeat([]byte{0xFF}, 16))
		}))
		if class != drill.Lost || !strings.Contains(reason, "4 of 2000 rows of play.people are missing") {
			t.Errorf("got %q (%s), want lost rows", class, reason)
		}
	})
	t.Run("letters of a column without index are seen by nobody", func(t *testing.T) {
		class, reason, trial := s.judged(t, i, "data", inside(t, func(_, dir string) {
			overwrite(t, filepath.Join(dir, people), 2*8192-30, []byte("rotten"))
		}))
		if class != "" || !strings.Contains(reason, "data_checksums is off") {
			t.Errorf("got %q (%s), want not judged", class, reason)
		}
		for _, c := range trial.Checks {
			if c.Result == backup.Failed {
				t.Errorf("%s failed: %s", c.Name, c.Detail)
			}
		}
	})
	t.Run("pg_checksums could not run, so an image is not called sound", func(t *testing.T) {
		class, reason, _ := s.judged(t, i, "data", nil)
		if class != "" || !strings.Contains(reason, "data_checksums is off") {
			t.Errorf("got %q (%s), want not judged", class, reason)
		}
	})
}
