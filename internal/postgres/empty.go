package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// Empty says what a new, empty cluster is like.
type Empty struct {
	Root         string // folder for everything of it; it must be there
	Installation Installation
	Superuser    string // the role that initdb makes
	Locale       backup.Locale
	UID          uint32            // whom it belongs to where cleancut is root and the host knows that user; else postgres
	Settings     map[string]string // of the server that its content comes from
}

// Init makes an empty cluster with initdb below Root and returns it as a copy
// that Start runs with the same isolation as any other. It is thrown away in
// any case: nothing of it is synced. What it made stays for the caller to
// remove with Root, also after an error.
func Init(ctx context.Context, e Empty) (c Copy, err error) {
	fail := func(err error) (Copy, error) {
		return Copy{}, fmt.Errorf("make an empty server in %s: %w", e.Root, err)
	}
	initdb, err := e.Installation.Tool(ctx, "initdb")
	if err != nil {
		return fail(err)
	}
	uid, gid, err := e.owner()
	if err != nil {
		return fail(err)
	}
	if e.Root, err = filepath.EvalSymlinks(e.Root); err != nil {
		return fail(err)
	}
	root, err := os.OpenRoot(e.Root)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	for _, dir := range []string{"data", Private, Private + "/tmp"} {
		if err := errors.Join(root.Mkdir(dir, 0o700), root.Lchown(dir, uid, gid)); err != nil {
			return fail(err)
		}
	}
	args := []string{"-D", filepath.Join(e.Root, "data"), "-U", e.Superuser, "-A", "trust", "-N", "-E", e.Locale.Encoding, "--lc-collate=" + e.Locale.Collate, "--lc-ctype=" + e.Locale.Ctype}
	if e.Installation.Major >= 15 && e.Locale.Provider != "" {
		args = append(args, "--locale-provider="+e.Locale.Provider)
	}
	if e.Locale.Name != "" {
		args = append(args, "--"+e.Locale.Provider+"-locale="+e.Locale.Name)
	}
	cmd := exec.CommandContext(ctx, initdb, args...)
	cmd.Dir = "/"
	instance := Instance{SocketDir: filepath.Join(e.Root, Private), Installation: e.Installation, UID: uint32(uid), GID: uint32(gid)}
	cmd.Env = instance.environment()
	cmd.SysProcAttr = childAttributes(instance.credential())
	if err := effect(ctx, "initdb", func() error {
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("initdb: %w: %s", err, strings.Join(strings.Fields(string(out)), " "))
		}
		return nil
	}); err != nil {
		return fail(err)
	}
	for name, content := range map[string]string{"postgresql.conf": configFile(e.Settings), "pg_hba.conf": hbaFile, "pg_ident.conf": ""} {
		if err := writeOwned(root, Private+"/"+name, content, uid, gid); err != nil {
			return fail(err)
		}
	}
	server := backup.Server{VersionNum: e.Installation.Major * 10000, Superuser: e.Superuser, Settings: e.Settings}
	return Copy{Root: e.Root, Data: filepath.Join(e.Root, "data"), Server: server, Installation: e.Installation, NoFsync: true, NoAutovacuum: true}, nil
}

// owner is who the server runs as. initdb wants a user that the host knows.
func (e Empty) owner() (uid, gid int, err error) {
	if os.Geteuid() != 0 {
		return os.Geteuid(), os.Getegid(), nil
	}
	u, err := user.LookupId(strconv.FormatUint(uint64(e.UID), 10))
	if err != nil || e.UID == 0 {
		u, err = user.Lookup("postgres")
	}
	if err != nil {
		return 0, 0, backup.Hint(fmt.Errorf("no user to run a server as: %w", err), "make a user postgres on this host")
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return uid, gid, errors.Join(err1, err2)
}
