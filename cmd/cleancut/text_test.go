package main_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares text with a file below testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test ./cmd/cleancut -update writes it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test ./cmd/cleancut -update writes it); got:\n%s", file, got)
	}
}

// bare is a configuration that leads nowhere: for what needs no machine.
func bare(t *testing.T) *lab {
	t.Helper()
	dir := t.TempDir()
	return &lab{dir: dir, pool: filepath.Join(dir, "nopool"), catalog: filepath.Join(dir, "catalog"), state: filepath.Join(dir, "state"), host: "prod", dsn: "host=" + dir}
}

func TestHelpTexts(t *testing.T) {
	l := bare(t)
	help := func(command string) string {
		o := l.must(t, append(strings.Fields(command), "--help")...)
		if o.err != "" {
			t.Errorf("%s --help writes to standard error: %s", command, o.err)
		}
		golden(t, filepath.Join("help", "cleancut"+strings.ReplaceAll(" "+command, " ", "-")+".txt"), o.out)
		return o.out
	}
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z0-9]+) +[A-Z]`).FindAllStringSubmatch(help(""), -1) {
		if name := m[1]; name != "help" && name != "completion" {
			for _, sub := range regexp.MustCompile(`(?m)^  ([a-z]+) +[A-Z]`).FindAllStringSubmatch(help(name), -1) {
				help(name + " " + sub[1])
			}
		}
	}
}

// TestLogicalVolumesAreShown shows a manifest, with the same words in which
// `topology` shows a running cluster's.
func TestLogicalVolumesAreShown(t *testing.T) {
	l := bare(t)
	manifest, err := os.ReadFile("../../internal/backup/testdata/manifest-v5-lvm.json")
	if err != nil {
		t.Fatal(err)
	}
	const id = "20261201T021500Z-a10c4e"
	dir := filepath.Join(l.catalog, "clusters", "main", "backups", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	complete := `{"id": "` + id + `", "manifest_sha256": "` + backup.Digest(manifest) + `", "completed": "2026-12-01T02:15:09Z"}`
	for name, content := range map[string]string{"manifest.json": string(manifest), "complete.json": complete} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "show-lvm.txt", l.must(t, "show", id, "--cluster", "main").out)
}

func TestEveryCommandIsKnownToTheHelp(t *testing.T) {
	out := bare(t).must(t, "--help").out
	for _, c := range []string{"topology", "doctor", "list", "show", "storage", "backup", "restore", "verify", "dump", "golden", "standby", "clone", "wal", "nightly", "delete", "hold", "prune", "sweep", "catalog", "thaw", "demo", "drill", "ec2sim"} {
		if !regexp.MustCompile(`(?m)^  ` + c + ` `).MatchString(out) {
			t.Errorf("%s is not in the help", c)
		}
	}
}

func TestWrongRequestsExitWith2AndSayWhatIsWrong(t *testing.T) {
	const id = "20261122T211704Z-5f3a9c"
	for _, c := range []struct {
		args  string
		words string // separated by |
	}{
		{"frobnicate", "unknown command|frobnicate|what to do"},
		{"storage", "storage|what to do"},
		{"storage frobnicate", "frobnicate|what to do"},
		{"catalog", "catalog|what to do|catalog rebuild"},
		{"catalog frobnicate", "frobnicate|what to do"},
		{"wal", "wal|what to do"},
		{"wal frobnicate", "frobnicate|what to do"},
		{"wal push", "wants the path of a WAL file|usage: cleancut wal push PATH"},
		{"wal push /tmp/README", "no name of a WAL file"},
		{"wal stream --slot No-Slot", "No-Slot|a-z, 0-9 and _"},
		{"list --catalog s3://bucket/x?regoin=y", "regoin|?region=REGION"},
		{"list --catalog s3://key:hidden@bucket", "holds no password"},
		{"backup --frobnicate", "unknown flag|--frobnicate|cleancut backup --help"},
		{"list surplus", "takes no arguments|usage: cleancut list"},
		{"show", "wants the id of a backup|usage: cleancut show ID"},
		{"show nonsense", "nonsense|is no backup id|20261122T211704Z-5f3a9c"},
		{"show ../../etc/passwd", "is no backup id"},
		{"delete nonsense", "is no backup id"},
		{"verify nonsense", "is no backup id"},
		{"dump nonsense", "is no backup id"},
		{"golden", "wants the id of a backup|usage: cleancut golden ID"},
		{"golden nonsense", "is no backup id"},
		{"restore nonsense --to /tmp/x", "is no backup id"},
		{"restore " + id, "--to DIR|cleancut list"},
		{"restore --undo /tmp/x " + id, "--undo DIR stands alone"},
		{"restore " + id + " surplus --to /tmp/x", "restore"},
		{"standby", "--to DIR|promote"},
		{"standby " + id, "--to DIR"},
		{"standby frobnicate", "standby|--help"},
		{"standby nonsense --to /tmp/x", "is no backup id"},
		{"standby promote", "wants the folder of a standby"},
		{"clone", "clone|what to do"},
		{"clone frobnicate", "frobnicate|what to do"},
		{"clone create " + id, "--name"},
		{"clone create --name qa", "id of a backup|--latest"},
		{"clone create nonsense --name qa", "is no backup id"},
		{"clone create " + id + " --name qa --ttl soon", "is no length of time"},
		{"clone extend qa", "--ttl|--by"},
		{"clone reap --max 0", "--max"},
		{"verify --level everything " + id, "everything|start, rows or full"},
		{"dump --level 99 " + id, "99|1 to 22"},
		{"dump --format tar " + id, "tar|sql or per-database"},
		{"dump --archive tar " + id, "tar|custom or directory"},
		{"dump --jobs 0 " + id, "--jobs 0|1 to 64"},
		{"dump check", "wants the id of a backup, or --file|usage: cleancut dump check"},
		{"dump check nonsense", "is no backup id"},
		{"dump check --file /nonexistent/x", "/nonexistent/x"},
		{"backup --mode sideways", "sideways|auto, group, freeze or bracketed"},
		{"backup --mode group", "mode group|cannot cut several volumes|use --mode freeze"},
		{"backup --mode bracketed --checkpoint slow", "slow|spread or fast"},
		{"backup --mode freeze --checkpoint fast", "--mode bracketed|have none"},
		{"restore " + id + " --to /tmp/x --target tomorrow", "tomorrow|time=2026"},
		{"verify " + id + " --target time=2026-11-23T05:00:00", "its zone"},
		{"dump " + id + " --target lsn=1", "lsn=1"},
		{"backup --deadline soon", "deadline|soon|--help"},
		{"backup --deadline 0s", "--deadline"},
		{"backup --deadline -5s", "--deadline"},
		{"backup --sync-rounds 0", "--sync-rounds"},
		{"backup --max-sync 0s", "--max-sync"},
		{"list --cluster Bad/Name", "Bad/Name"},
		{"list --catalog ftp://x/y", "ftp://x/y"},
		{"sweep --provider tape", "tape|local or ec2"},
		{"sweep --pool=", "needs its pool|--pool DIR"},
		{"list --config /nonexistent.toml", "/nonexistent.toml"},
	} {
		t.Run(c.args, func(t *testing.T) {
			l := bare(t)
			o := l.run(t, strings.Fields(c.args)...)
			o.refused(t, 2, strings.Split(c.words, "|")...)
			if o.out != "" {
				t.Errorf("standard output is for results, got %q", o.out)
			}
			if _, err := os.Stat(l.catalog); err == nil {
				t.Error("a catalog was made")
			}
		})
	}
}

func TestNoCommandPrintsTheHelp(t *testing.T) {
	if o := bare(t).must(t); !strings.Contains(o.out, "Usage:") {
		t.Errorf("got %q", o.out)
	}
}

func TestConfigurationMistakesAreShownWithTheirLine(t *testing.T) {
	for _, c := range []struct{ name, text, words string }{
		{"an unknown key", "catalog = \"file:///x\"\n\n[cluster.main]\ndns = \"host=/tmp\"\n", "unknown key|4|dns = |~~~"},
		{"an unknown table", "[provider.tape]\npool = \"x\"\n", "unknown key|tape|~~~"},
		{"a value of the wrong kind", "catalog = 5\n", "1|catalog = 5|~"},
		{"no TOML", "catalog = \"file:///x\"\nthis is no toml\n", "2|this is no toml|~"},
		{"a cluster's name that is none", "[cluster.\"Bad/Name\"]\ndsn = \"x\"\n", "Bad/Name"},
		{"two clusters and none chosen", "[cluster.a]\n[cluster.b]\n", "clusters a, b|--cluster"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := bare(t)
			file := filepath.Join(l.dir, "c.toml")
			if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			o := l.run(t, "list", "--config", file)
			o.refused(t, 2, strings.Split(c.words, "|")...)
			if c.name != "two clusters and none chosen" && !strings.Contains(o.err, file) {
				t.Errorf("the file is not named:\n%s", o.err)
			}
		})
	}
	t.Run("a cluster that the file does not have", func(t *testing.T) {
		l := bare(t)
		file := filepath.Join(l.dir, "c.toml")
		if err := os.WriteFile(file, []byte("[cluster.a]\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		l.run(t, "list", "--config", file, "--cluster", "b").refused(t, 2, `no cluster "b"`, "only a")
	})
}

func TestWhatIsNotThereIsAnErrorThatSaysWhatToDo(t *testing.T) {
	const id = "20261122T211704Z-5f3a9c"
	for _, c := range []struct{ args, words string }{
		{"list", "catalog|not found|is its filesystem mounted"},
		{"show " + id, "not found"},
		{"delete " + id, "open pool|nopool|no such file|what to do"},
		{"backup", "open pool|nopool|what to do"},
		{"sweep --provider ec2", "no region|[provider.ec2]"},
		{"thaw /nonexistent", "/nonexistent"},
	} {
		t.Run(c.args, func(t *testing.T) {
			l := bare(t)
			l.base = []string{"AWS_EC2_METADATA_DISABLED=true"} // nothing but loopback is asked
			l.run(t, strings.Fields(c.args)...).refused(t, 1, strings.Split(c.words, "|")...)
		})
	}
}

func TestErrorsInJSONAreOneObjectWithTheExitCode(t *testing.T) {
	for args, code := range map[string]int{"show --json nonsense": 2, "list --json": 1, "frobnicate --json": 2, "backup --json --frobnicate": 2} {
		t.Run(args, func(t *testing.T) {
			o := bare(t).run(t, strings.Fields(args)...)
			var got struct {
				OK    *bool
				Error string
				Exit  int
			}
			dec := json.NewDecoder(strings.NewReader(o.out))
			if err := dec.Decode(&got); err != nil || dec.More() {
				t.Fatalf("%v: %q", err, o.out)
			}
			if got.OK == nil || *got.OK || got.Error == "" || got.Exit != code || o.code != code {
				t.Errorf("exit %d, object %+v, want %d", o.code, got, code)
			}
		})
	}
}

func TestThawWithoutAnythingSaysSo(t *testing.T) {
	if o := bare(t).must(t, "thaw"); !strings.Contains(o.out, "never froze anything") {
		t.Errorf("got %q", o.out)
	}
}

// shape lists the paths of all keys in a JSON text, sorted, each once.
func shape(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	var out []string
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, inner := range v {
				if path == ".manifest.server.settings" {
					k = "NAME"
				}
				walk(path+"."+k, inner)
			}
		case []any:
			for _, inner := range v {
				walk(path+"[]", inner)
			}
			if path == ".manifest.cut.notes" { // there where the watchdog lacks a capability
				out = slices.DeleteFunc(out, func(s string) bool { return strings.HasPrefix(s, path) })
			} else if len(v) == 0 {
				out = append(out, path+"[]")
			}
		default:
			kind := map[bool]string{true: "null"}[v == nil]
			switch v.(type) {
			case string:
				kind = "string"
			case float64:
				kind = "number"
			case bool:
				kind = "bool"
			}
			out = append(out, path+" "+kind)
		}
	}
	walk("", v)
	slices.Sort(out)
	return strings.Join(slices.Compact(out), "\n") + "\n"
}
