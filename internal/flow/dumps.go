package flow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cleancut/internal/backup"
	"cleancut/internal/flow/dump"
	"cleancut/internal/postgres"
)

// DumpOptions says what to dump and where it goes.
type DumpOptions struct {
	ID backup.ID
	Recovery
	Format     backup.DumpFormat  // empty: DumpSQL, or DumpPerDatabase where databases or schemas are chosen
	Archive    backup.DumpArchive // empty: ArchiveCustom. Only DumpPerDatabase
	Databases  []string           // names or globs; empty: all
	Schemas    []string           // names or globs; empty: all
	Jobs       int
	Level      int      // of zstd, 1 to 22
	Recipients []string // age1…
	// RecipientFiles hold more recipients, one a line.
	RecipientFiles []string
	NoCounts       bool
	Spool          string // folder for ArchiveDirectory; empty: below the state folder
	// To is the file (DumpSQL) or the folder that gets the dump, which must not
	// be there; empty puts it into the catalog.
	To       string
	Progress func(DumpProgress)
}

// DumpProgress is how far a dump is.
type DumpProgress = dump.Progress

// DumpResult is a dump that is stored.
type DumpResult struct {
	Manifest backup.DumpManifest `json:"manifest"`
	To       string              `json:"to"` // the file or folder; empty: the catalog
}

// ErrPartialDump: the dump is stored and lacks databases, which its manifest
// names with the reason.
var ErrPartialDump = errors.New("the dump is not whole")

// dumpPlace is where a dump goes. Nothing is there before begin; finish makes
// it whole; undo removes it.
type dumpPlace struct {
	begin  func(ctx context.Context) error
	put    func(ctx context.Context, part string, r io.Reader) error
	finish func(ctx context.Context, m backup.DumpManifest) error
	undo   func(ctx context.Context) error
}

// Dump restores a backup into a throwaway copy, dumps it and removes the copy.
// Where single databases could not be dumped it returns what is stored, and an
// error that wraps ErrPartialDump. After any other error nothing is stored, or
// the error wraps backup.ErrLeft.
func (f *Flow) Dump(ctx context.Context, o DumpOptions) (res DumpResult, err error) {
	if o.Format == "" {
		o.Format = backup.DumpSQL
		if len(o.Databases)+len(o.Schemas) > 0 {
			o.Format = backup.DumpPerDatabase
		}
	}
	switch {
	case o.Format == backup.DumpSQL && (len(o.Databases)+len(o.Schemas) > 0 || o.Archive != ""):
		return res, fmt.Errorf("%w: format sql holds everything: databases, schemas and archives go with per-database", backup.ErrUsage)
	case o.Format == backup.DumpPerDatabase:
		o.Archive = cmp.Or(o.Archive, backup.ArchiveCustom)
	}
	recipients, text, err := dump.ParseRecipients(o.Recipients, o.RecipientFiles)
	if err != nil {
		return res, err
	}
	begun := backup.DumpBegun{Backup: o.ID, Name: time.Now().UTC().Format("20060102T150405Z"), Host: f.Host, PID: os.Getpid(), Time: time.Now().UTC()}
	release, err := f.State.Lock(lockDump(begun))
	if err != nil {
		return res, err
	}
	defer release()
	place := f.catalogPlace(begun)
	if o.To != "" {
		if place, err = pathPlace(o.To, o.Format); err != nil {
			return res, err
		}
	}
	r, releaseCopy, err := f.Restore(ctx, RestoreOptions{ID: o.ID, Purpose: backup.ForDump, Recovery: o.Recovery})
	if err != nil {
		return res, err
	}
	defer releaseCopy()
	defer func() { err = errors.Join(err, f.undoCopy(ctx, r.Copy)) }()
	f.tell("dump", string(o.Format))
	options := dump.Options{Instance: r.Instance, Original: r.Copy.Original, Format: o.Format, Archive: o.Archive, Databases: o.Databases, Schemas: o.Schemas,
		Jobs: o.Jobs, Level: o.Level, Recipients: recipients, NoCounts: o.NoCounts, Progress: o.Progress}
	if o.Archive == backup.ArchiveDirectory {
		spool, remove, failed := f.workFolder(ctx, dumpSpoolPrefix, o.Spool)
		if failed != nil {
			return res, fmt.Errorf("folder for the dump: %w", failed)
		}
		defer func() { err = errors.Join(err, remove(ctx)) }()
		if os.Geteuid() == 0 {
			if err := os.Lchown(spool, int(r.Instance.UID), int(r.Instance.GID)); err != nil {
				return res, fmt.Errorf("folder for the dump: %w", err)
			}
		}
		options.Spool = spool
	}
	whole := func(m *backup.DumpManifest) {
		m.Name, m.Tool, m.Host, m.Backup, m.Cluster, m.Created, m.Recipients = begun.Name, f.Tool, f.Host, o.ID, f.Cluster, begun.Time, text
		if o.Target.Kind != "" && o.Target.Kind != backup.TargetEnd {
			m.Target = o.Target.String()
		}
	}
	res.Manifest, err = f.dumpTo(ctx, place, options, whole)
	res.To = o.To
	if failed := res.Manifest.Failed(); err == nil && len(failed) > 0 {
		var why []string
		for _, d := range failed {
			why = append(why, d.Name+": "+d.Error)
		}
		err = backup.Hint(fmt.Errorf("%w: it holds %s; %s", ErrPartialDump, res.Manifest.Held(), strings.Join(why, "; ")), "what it holds is stored; look at those databases in a copy (`cleancut restore`), or verify the backup")
	}
	return res, err
}

// dumpTo runs the dump into a place. Nothing is made there before the dump has
// its first part.
func (f *Flow) dumpTo(ctx context.Context, place dumpPlace, o dump.Options, whole func(*backup.DumpManifest)) (m backup.DumpManifest, err error) {
	begun := false
	defer func() {
		if err == nil || !begun {
			return
		}
		undo, cancel := undoing(ctx)
		defer cancel()
		if e := place.undo(undo); e != nil {
			err = errors.Join(err, fmt.Errorf("the interrupted dump: %w: %w", backup.ErrLeft, e))
		}
	}()
	o.Put = func(ctx context.Context, part string, r io.Reader) error { // the first call is over before there is a second one
		if !begun {
			begun = true
			if err := place.begin(ctx); err != nil {
				return err
			}
		}
		return place.put(ctx, part, r)
	}
	if m, err = dump.Run(ctx, o); err != nil {
		return m, err
	}
	whole(&m)
	return m, place.finish(ctx, m)
}

func (f *Flow) catalogPlace(b backup.DumpBegun) dumpPlace {
	return dumpPlace{
		begin: func(ctx context.Context) error { return f.Catalog.BeginDump(ctx, b) },
		put: func(ctx context.Context, part string, r io.Reader) error {
			return f.Catalog.PutDumpPart(ctx, b.Backup, b.Name, part, r)
		},
		finish: func(ctx context.Context, m backup.DumpManifest) error { return f.Catalog.PutDumpManifest(ctx, m) },
		undo:   func(ctx context.Context) error { return f.Catalog.RemoveDump(ctx, b.Backup, b.Name) },
	}
}

// pathPlace is a file with its manifest beside it as PATH.json, or a folder
// with its manifest in it. Both get their names when they are whole.
func pathPlace(to string, format backup.DumpFormat) (dumpPlace, error) {
	for _, path := range []string{to, to + ".json"} {
		if _, err := os.Lstat(path); err == nil {
			return dumpPlace{}, fmt.Errorf("%w: %s exists already", backup.ErrUsage, path)
		}
	}
	if info, err := os.Stat(filepath.Dir(to)); err != nil || !info.IsDir() {
		return dumpPlace{}, fmt.Errorf("%w: dump: no folder %s", backup.ErrUsage, filepath.Dir(to))
	}
	work := ""
	p := dumpPlace{
		begin: func(context.Context) (err error) {
			work, err = os.MkdirTemp(filepath.Dir(to), ".cleancut-*")
			return err
		},
		put: func(_ context.Context, part string, r io.Reader) error {
			return writeFile(filepath.Join(work, part), r)
		},
		undo: func(context.Context) error {
			if work == "" {
				return nil
			}
			return os.RemoveAll(work)
		},
	}
	p.finish = func(_ context.Context, m backup.DumpManifest) error {
		b, err := backup.EncodeDumpManifest(m)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(work, "manifest.json"), strings.NewReader(string(b))); err != nil {
			return err
		}
		if format == backup.DumpSQL { // a link never overwrites, unlike a rename
			if err = os.Link(filepath.Join(work, "manifest.json"), to+".json"); err != nil {
				return err
			}
			if err = os.Link(filepath.Join(work, m.Parts[0].Name), to); err != nil {
				return errors.Join(err, os.Remove(to+".json"))
			}
			err = os.RemoveAll(work)
		} else {
			if err = errors.Join(syncFolder(work), os.Mkdir(to, 0o700)); err != nil {
				return err
			}
			if err = unix.Rename(work, to); err != nil { // an empty folder is replaced, and nothing else
				return errors.Join(err, os.Remove(to))
			}
		}
		return errors.Join(err, syncFolder(filepath.Dir(to)))
	}
	return p, nil
}

func writeFile(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// CheckDumpOptions says which dump to check.
type CheckDumpOptions struct {
	ID         backup.ID
	Name       string   // of the dump; empty: the newest whole one
	File       string   // a dump outside of the catalog: what DumpOptions.To made; beats ID and Name
	Identities []string // files with age identities
	Jobs       int
	ServerBin  string // PostgreSQL's programs for the empty server; empty: of the dump's major version, else of the next newer one here
	Folder     string // where the server's files go; empty: below the state folder
}

// storedDump is a dump to be read.
type storedDump struct {
	m    backup.DumpManifest
	open func(ctx context.Context, part string) (io.ReadCloser, error)
}

// CheckDump proves a dump: every stored byte by its checksum, then all of it by
// loading it into an empty server that is removed afterwards, where every
// table's rows are counted and hashed. The result is recorded in the catalog
// beside the dump. What differs is an error that wraps backup.ErrDamage; where
// the check could not run to its end that is an error, too.
func (f *Flow) CheckDump(ctx context.Context, o CheckDumpOptions) (k backup.DumpCheck, err error) {
	start := time.Now()
	d, err := f.findDump(ctx, o)
	if err != nil {
		return k, err
	}
	identities, err := dump.ReadIdentities(o.Identities)
	if err != nil {
		return k, err
	}
	options := dump.CheckOptions{Manifest: d.m, Open: d.open, Identities: identities, Jobs: o.Jobs, Progress: func(what string) { f.tell("check", what) }}
	if k = f.checkStored(ctx, d); k.Result() == backup.Passed {
		stored := k.Checks
		if k, err = f.loadDump(ctx, o, options); err != nil && errors.Is(err, backup.ErrLeft) {
			return k, err
		}
		k.Checks = append(stored, k.Checks...)
		if err != nil {
			k.Checks = append(k.Checks, backup.Check{Name: "empty server", Result: backup.CouldNotRun, Detail: err.Error()})
		}
	}
	if ctx.Err() != nil {
		return k, ctx.Err()
	}
	k.Backup, k.Dump, k.Tool, k.Host, k.Time, k.Seconds = d.m.Backup, d.m.Name, f.Tool, f.Host, start.UTC(), time.Since(start).Seconds()
	if o.File == "" {
		if err := f.Catalog.PutDumpCheck(ctx, k); err != nil {
			return k, err
		}
	}
	switch k.Result() {
	case backup.Failed:
		return k, fmt.Errorf("dump %s of backup %s: %w", k.Dump, k.Backup, backup.ErrDamage)
	case backup.CouldNotRun:
		i := slices.IndexFunc(k.Checks, func(c backup.Check) bool { return c.Result == backup.CouldNotRun })
		return k, backup.Hint(fmt.Errorf("dump %s of backup %s: the check could not run: %s: %s", k.Dump, k.Backup, k.Checks[i].Name, k.Checks[i].Detail), backup.HintOf(err))
	}
	return k, nil
}

// findDump looks up the dump to check.
func (f *Flow) findDump(ctx context.Context, o CheckDumpOptions) (d storedDump, err error) {
	if o.File != "" {
		return dumpAt(o.File)
	}
	name := o.Name
	if name == "" {
		dumps, err := f.Catalog.Dumps(ctx, o.ID)
		if err != nil {
			return d, err
		}
		for _, one := range dumps {
			if one.Complete && !one.File {
				name = one.Name
			}
		}
		if name == "" {
			return d, backup.Hint(fmt.Errorf("a dump of backup %s that can be checked: %w", o.ID, backup.ErrNotFound), "make one: cleancut dump "+string(o.ID))
		}
	}
	d.open = func(ctx context.Context, part string) (io.ReadCloser, error) {
		return f.Catalog.DumpPart(ctx, o.ID, name, part)
	}
	if d.m, err = f.Catalog.DumpManifest(ctx, o.ID, name); errors.Is(err, backup.ErrNotFound) {
		err = backup.Hint(fmt.Errorf("dump %s of backup %s: %w: it has no manifest", name, o.ID, err), "see `cleancut show "+string(o.ID)+"`: an interrupted dump is no dump, and those of earlier versions hold nothing to compare with")
	}
	return d, err
}

// dumpAt reads the manifest of a dump outside of the catalog.
func dumpAt(path string) (d storedDump, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return d, fmt.Errorf("%w: %w", backup.ErrUsage, err)
	}
	manifest := path + ".json"
	if info.IsDir() {
		manifest = filepath.Join(path, "manifest.json")
	}
	b, err := os.ReadFile(manifest)
	if err != nil {
		return d, backup.Hint(fmt.Errorf("%w: %w", backup.ErrUsage, err), "a dump is checked against its manifest, which `cleancut dump --to` writes beside it")
	}
	if d.m, err = backup.DecodeDumpManifest(b); err != nil && !errors.Is(err, backup.ErrUnsupported) {
		err = fmt.Errorf("%s: %w: %v", manifest, backup.ErrDamage, err)
	}
	d.open = func(_ context.Context, part string) (io.ReadCloser, error) {
		file := path
		if info.IsDir() {
			file = filepath.Join(path, part)
		}
		r, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: %w", backup.ErrNotFound, err)
		}
		return r, err
	}
	return d, err
}

// checkStored compares every stored byte with the manifest.
func (f *Flow) checkStored(ctx context.Context, d storedDump) (k backup.DumpCheck) {
	f.tell("check", "stored checksums")
	start := time.Now()
	c := backup.Check{Name: "stored checksums", Result: backup.Passed}
	var wrong []string
	for _, p := range d.m.Parts {
		err := dump.CheckStored(ctx, p, d.open)
		switch {
		case errors.Is(err, backup.ErrDamage):
			c.Result = backup.Failed
		case err != nil && c.Result != backup.Failed:
			c.Result = backup.CouldNotRun
		}
		if err != nil {
			wrong = append(wrong, err.Error())
		}
	}
	_, stored := d.m.Sizes()
	c.Detail, c.Seconds = fmt.Sprintf("%d parts, %s", len(d.m.Parts), stored), time.Since(start).Seconds()
	if len(wrong) > 0 {
		c.Detail = strings.Join(wrong, "; ")
	}
	k.Checks = []backup.Check{c}
	return k
}

// loadDump makes an empty server, checks the dump in it, and removes it.
func (f *Flow) loadDump(ctx context.Context, o CheckDumpOptions, options dump.CheckOptions) (k backup.DumpCheck, err error) {
	m := options.Manifest
	inst, tools, err := f.dumpPrograms(ctx, m.Server.Major(), o.ServerBin)
	if err != nil {
		return k, err
	}
	root, remove, err := f.workFolder(ctx, checkPrefix, o.Folder)
	if err != nil {
		return k, fmt.Errorf("folder for the empty server: %w", err)
	}
	defer func() { err = errors.Join(err, remove(ctx)) }()
	var fs unix.Statfs_t
	plain, _ := m.Sizes()
	if err := unix.Statfs(root, &fs); err != nil {
		return k, fmt.Errorf("%s: %w", root, err)
	}
	if free := backup.Bytes(fs.Bavail) * backup.Bytes(fs.Bsize); free < plain {
		return k, backup.Hint(fmt.Errorf("%s has %s free, the dump holds %s", root, free, plain), "choose a roomier folder with --folder")
	}
	f.tell("server", fmt.Sprintf("PostgreSQL %d, empty", inst.Major))
	empty, err := postgres.Init(ctx, postgres.Empty{Root: root, Installation: inst, Superuser: m.Server.Superuser, Locale: m.Server.Locale,
		Settings: map[string]string{"shared_preload_libraries": m.Server.Preload}})
	if err != nil {
		return k, err
	}
	if options.Instance, err = postgres.Start(ctx, empty); err != nil {
		return k, err
	}
	options.Tools = tools
	return dump.Check(ctx, options)
}

// dumpPrograms finds a server of that major version or the next newer one, or
// that in bin, and an installation with psql and pg_restore: the same, else
// that which made the dump.
func (f *Flow) dumpPrograms(ctx context.Context, major int, bin string) (server, tools postgres.Installation, err error) {
	dirs := f.BinDirs
	if bin != "" {
		dirs = []string{bin}
	}
	err = backup.Hint(fmt.Errorf("%w: %s has no PostgreSQL %d or newer", backup.ErrUsage, bin, major), "name the folder with its programs: initdb, postgres")
	for newer := major; newer <= major+10; newer++ {
		found, e := postgres.FindInstallation(ctx, newer, dirs)
		if e == nil && (bin == "" || found.Bin == bin) {
			server, err = found, nil
			break
		}
		if newer == major && bin == "" {
			err = e
		}
	}
	if err != nil {
		return server, tools, err
	}
	tools = server
	_, err1 := server.Tool(ctx, "psql")
	_, err2 := server.Tool(ctx, "pg_restore")
	if err1 != nil || err2 != nil {
		if older, err := postgres.FindInstallation(ctx, major, f.BinDirs); err == nil {
			tools = older
		}
	}
	return server, tools, nil
}
