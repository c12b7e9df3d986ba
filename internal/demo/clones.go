package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
)

// clone is what the story reads of `cleancut clone`.
type clone struct {
	Name      string    `json:"name"`
	Root      string    `json:"root"`
	SocketDir string    `json:"socket_dir"`
	Port      int       `json:"port"`
	Superuser string    `json:"superuser"`
	State     string    `json:"state"`
	Expires   time.Time `json:"expires"`
}

// maskSQL is what the masked clone's words become.
const maskSQL = "\\set ON_ERROR_STOP on\nUPDATE play.words_said SET word = 'masked';\n"

// Step 19. The load has ended, so that nothing but the clones' own writers
// changes anything.
func (s *story) clones(ctx context.Context, facts map[string]any) error {
	mask := filepath.Join(s.work, "mask.sql")
	if err := os.WriteFile(mask, []byte(maskSQL), 0o644); err != nil {
		return err
	}
	production, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer production.Close(ctx)
	original, err := s.copyConn(ctx)
	if err != nil {
		return err
	}
	defer original.Close(ctx)
	others := map[string]*pgx.Conn{"production": production, "the restored copy": original}
	before, err := fingerprints(ctx, others)
	if err != nil {
		return err
	}
	made, err := s.twoClones(ctx, mask)
	if err != nil {
		return err
	}
	if facts["masked_rows"], err = s.useClones(ctx, made); err != nil {
		return err
	}
	all, err := s.listClones(ctx)
	if err != nil {
		return err
	}
	if len(all) != 2 || slices.ContainsFunc(all, func(c clone) bool { return c.State != "ready" || !c.Expires.After(time.Now()) }) {
		return errStep("clone list: %+v", all)
	}
	facts["clones"], facts["expires"] = []string{made[0].Root, made[1].Root}, made[0].Expires
	for n, c := range made {
		if err := s.cleancut(ctx, nil, "clone", "destroy", c.Name); err != nil {
			return err
		}
		if all, err = s.listClones(ctx); err != nil {
			return err
		}
		if len(all) != len(made)-n-1 {
			return errStep("after the end of clone %s: %+v", c.Name, all)
		}
	}
	after, err := fingerprints(ctx, others)
	if err != nil {
		return err
	}
	facts["unaffected"] = after
	if fmt.Sprint(before) != fmt.Sprint(after) {
		return errStep("clones were written to, and another changed: %v before, %v after", before, after)
	}
	return nil
}

// twoClones makes both at once: one as it is, one masked.
func (s *story) twoClones(ctx context.Context, mask string) ([]clone, error) {
	made := make([]clone, 2)
	ended := make(chan error)
	for n, more := range [][]string{nil, {"--mask", mask}} {
		name := fmt.Sprintf("qa%d", n+1)
		s.later("clone "+name, func(ctx context.Context) error { return s.endClone(ctx, name) })
		args := append([]string{"clone", "create", string(s.manifest.ID), "--name", name, "--ttl", "1h", "--purpose", "step 19"}, more...)
		go func() { ended <- s.cleancut(ctx, &made[n], args...) }()
	}
	return made, errors.Join(<-ended, <-ended)
}

func (s *story) listClones(ctx context.Context) ([]clone, error) {
	var out struct {
		Clones []clone `json:"clones"`
	}
	err := s.cleancut(ctx, &out, "clone", "list")
	return out.Clones, err
}

// endClone destroys a clone, if it is still there.
func (s *story) endClone(ctx context.Context, name string) error {
	all, err := s.listClones(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(c clone) bool { return c.Name == name }) {
		return nil
	}
	return s.cleancut(ctx, nil, "clone", "destroy", "--force", name)
}

// useClones writes to both: what is written to one is not in the other. It
// returns how many rows the mask has changed.
func (s *story) useClones(ctx context.Context, made []clone) (masked int64, err error) {
	var conns []*pgx.Conn
	for _, c := range made {
		conn, err := connectTo(ctx, backup.Copy{SocketDir: c.SocketDir, Port: c.Port, Superuser: c.Superuser})
		if err != nil {
			return 0, err
		}
		defer conn.Close(ctx)
		conns = append(conns, conn)
	}
	var plain, left, own int64
	const words = "SELECT count(*), count(*) FILTER (WHERE word = 'masked') FROM play.words_said"
	for _, sql := range []string{"DELETE FROM play.words_said", "CREATE TABLE only_here AS SELECT 1", "CHECKPOINT"} {
		if _, err := conns[0].Exec(ctx, sql); err != nil {
			return 0, err
		}
	}
	if err := conns[1].QueryRow(ctx, words).Scan(&plain, &masked); err != nil {
		return 0, err
	}
	if plain == 0 || plain != masked || plain != int64(s.finding.Words.Found) {
		return 0, errStep("the masked clone has %d rows of beater B, %d of them masked; the backup has %d", plain, masked, s.finding.Words.Found)
	}
	for n, conn := range conns {
		if err := conn.QueryRow(ctx, "SELECT (SELECT count(*) FROM play.words_said), (SELECT count(*) FROM pg_class WHERE relname = 'only_here')").Scan(&left, &own); err != nil {
			return 0, err
		}
		if want := []int64{0, plain}[n]; left != want || own != int64(1-n) {
			return 0, errStep("clone %s has %d rows, want %d, and %d tables of the first one's", made[n].Name, left, want, own)
		}
	}
	return masked, nil
}

// fingerprints are the counts of all tables, and one hash of what beater B
// wrote.
func fingerprints(ctx context.Context, of map[string]*pgx.Conn) (map[string]string, error) {
	out := map[string]string{}
	for name, conn := range of {
		counts, err := rowCounts(ctx, conn)
		if err != nil {
			return nil, err
		}
		var hash string
		if err := conn.QueryRow(ctx, "SELECT coalesce(md5(string_agg(w::text, ',' ORDER BY w::text)), '') FROM play.words_said w").Scan(&hash); err != nil {
			return nil, err
		}
		out[name] = fmt.Sprintf("%v %s", counts, hash)
	}
	return out, nil
}
