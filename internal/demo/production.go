package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/flow"
	"cleancut/internal/host"
	"cleancut/internal/lab"
	"cleancut/internal/load"
	"cleancut/internal/postgres"
	"cleancut/internal/state"
)

// productionHost is the name that production's volumes and backups carry.
const productionHost = "production"

// Step 1.
func (s *story) makeStorage(ctx context.Context, facts map[string]any) error {
	p, err := s.ground.provider(ctx)
	if err != nil {
		return err
	}
	s.options = flow.StorageOptions{Name: "pg", Host: productionHost, Volumes: 4, Size: s.VolumeSize, Level: "raid0", Chunk: 64 << 10, Filesystem: "xfs",
		Mountpoint: s.mnt, MountOptions: []string{"noatime"}, Fstab: s.fstab(), MdadmConf: s.mdadmConf()}
	s.later("storage", func(ctx context.Context) error {
		return errors.Join(flow.DestroyStorage(ctx, p, s.options), os.RemoveAll(s.mnt))
	})
	if s.storage, err = flow.CreateStorage(ctx, p, s.options); err != nil {
		return err
	}
	var resolved []string
	for i, dev := range s.storage.Devices {
		v, err := p.Resolve(ctx, dev)
		if err != nil {
			return err
		}
		if v.ID != s.storage.Volumes[i] {
			return errStep("%s resolves to %s, not to %s", dev, v.ID, s.storage.Volumes[i])
		}
		resolved = append(resolved, fmt.Sprintf("%s = %s", dev, v.ID))
	}
	if len(resolved) != 4 {
		return errStep("%d volumes instead of 4", len(resolved))
	}
	facts["volumes"] = resolved
	facts["size_bytes"] = s.VolumeSize
	return nil
}

// Step 2.
func (s *story) checkStorage(ctx context.Context, facts map[string]any) error {
	if err := s.lookAtStorage(ctx, facts); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.mnt, "kept"), []byte("over a reboot"), 0o600); err != nil {
		return err
	}
	if err := s.reboot(ctx); err != nil {
		return err
	}
	if err := s.lookAtStorage(ctx, facts); err != nil {
		return fmt.Errorf("after the reboot: %w", err)
	}
	if b, err := os.ReadFile(filepath.Join(s.mnt, "kept")); err != nil || string(b) != "over a reboot" {
		return errStep("the file written before the reboot reads %q (%v)", b, err)
	}
	return os.Remove(filepath.Join(s.mnt, "kept"))
}

func (s *story) lookAtStorage(ctx context.Context, facts map[string]any) error {
	m, err := host.MountOf(s.mnt)
	if err != nil {
		return err
	}
	if m.Mountpoint != s.mnt || m.Type != "xfs" || !slices.Contains(m.Options, "noatime") {
		return errStep("%s is mounted as %s with %v", s.mnt, m.Type, m.Options)
	}
	out, err := host.Run(ctx, "mdadm", "--detail", m.Source)
	if err != nil {
		return err
	}
	state := ""
	for line := range strings.SplitSeq(string(out), "\n") {
		if k, v, ok := strings.Cut(line, " : "); ok && strings.TrimSpace(k) == "State" {
			state = strings.TrimSpace(v)
		}
	}
	if state != "clean" {
		return errStep("mdadm --detail says state %q", state)
	}
	id, err := host.Identify(ctx, m.Source)
	if err != nil {
		return err
	}
	if id.Label != "pg" || id.UUID != s.storage.Filesystem {
		return errStep("%s holds filesystem %s with label %q", m.Source, id.UUID, id.Label)
	}
	facts["array"], facts["state"], facts["array_uuid"], facts["label"] = m.Source, state, s.storage.ArrayUUID, id.Label
	facts["mount_options"] = strings.Join(m.AllOptions(), ",")
	return nil
}

// reboot does what a reboot does to storage: everything is taken away, the
// volumes come back (as a cloud attaches them at boot), and only the lines in
// mdadm.conf and fstab bring the rest.
func (s *story) reboot(ctx context.Context) error {
	p, err := s.ground.provider(ctx)
	if err != nil {
		return err
	}
	if err := host.Unmount(ctx, s.mnt); err != nil {
		return err
	}
	if err := host.Release(ctx, s.storage.Devices); err != nil {
		return err
	}
	for _, v := range s.storage.Volumes {
		if err := p.Detach(ctx, v); err != nil {
			return err
		}
	}
	for _, v := range slices.Backward(s.storage.Volumes) { // another order of devices than before
		if _, err := p.Attach(ctx, v); err != nil {
			return err
		}
	}
	res, err := flow.AttachStorage(ctx, p, s.options)
	if err != nil {
		return err
	}
	s.storage.Devices = res.Devices
	return nil
}

// Step 3.
func (s *story) makeCluster(ctx context.Context, facts map[string]any) error {
	inbox := filepath.Join(s.work, "inbox")
	if err := os.MkdirAll(inbox, 0o700); err != nil {
		return err
	}
	uid, gid, err := lab.PostgresUser()
	if err != nil {
		return err
	}
	if err := os.Chown(inbox, int(uid), int(gid)); err != nil {
		return err
	}
	s.server, err = lab.NewServer(ctx, lab.ServerOptions{Template: s.template(), Data: filepath.Join(s.mnt, "data"), Socket: filepath.Join(s.work, "sock"), Conf: []string{
		"archive_mode = on", "archive_command = 'cp %p " + inbox + "/%f'", "wal_level = replica", "shared_buffers = 128MB",
		"max_wal_size = 512MB", "checkpoint_timeout = 5min"}})
	if err != nil {
		return err
	}
	s.later("production server", s.server.Stop)
	if err := s.server.Start(ctx); err != nil {
		return err
	}
	if err := s.streamWAL(ctx); err != nil {
		return err
	}
	facts["wal_stream_slot"] = walSlot
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var version, sums, archive string
	err = conn.QueryRow(ctx, "SELECT current_setting('server_version'), current_setting('data_checksums'), current_setting('archive_mode')").Scan(&version, &sums, &archive)
	facts["version"], facts["data_checksums"], facts["archive_mode"] = version, sums, archive
	if err == nil && (sums != "on" || archive != "on") {
		return errStep("checksums are %s, archiving is %s", sums, archive)
	}
	return err
}

// Step 4.
func (s *story) loadDatabase(ctx context.Context, facts map[string]any) error {
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if s.facts, err = load.Create(ctx, conn, load.Options{Rows: s.Rows}); err != nil {
		return err
	}
	facts["rows"], facts["bytes"] = s.facts.Tables, s.facts.Bytes
	return nil
}

// Step 5.
func (s *story) rebootAll(ctx context.Context, facts map[string]any) error {
	if err := s.server.Stop(ctx); err != nil {
		return err
	}
	if err := s.reboot(ctx); err != nil {
		return err
	}
	if err := s.server.Start(ctx); err != nil {
		return err
	}
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	found, err := load.Judge(ctx, conn, load.Promise{Facts: &s.facts})
	if err != nil {
		return err
	}
	if p := found.Problems(); len(p) > 0 {
		return errStep("after the restart: %s", strings.Join(p, "; "))
	}
	facts["tables"] = len(found.Tables)
	return nil
}

func (s *story) connect(ctx context.Context) (*pgx.Conn, error) { return s.server.Connect(ctx) }

// Step 6.
func (s *story) startBulk(ctx context.Context, facts map[string]any) error {
	which := load.All()
	// Slow enough that no copy recovers for long, and still writing at the cut;
	// with a small database it may be full and wait by then.
	which.Bulk = &load.BulkOptions{MaxBytes: max(8<<20, min(64<<20, backup.Bytes(s.facts.Tables["play.people"])*640)), BatchRows: 500, RowsPerSecond: 3000}
	which.Churn.SwitchEvery = 20 * time.Second
	s.began = time.Now()
	var err error
	if s.load, err = load.Start(ctx, s.connect, which); err != nil {
		return err
	}
	s.later("load", func(context.Context) error { _, err := s.load.Stop(); return err })
	if err := s.load.Bulk.Await(ctx, 1); err != nil {
		return err
	}
	facts["rows_so_far"] = s.load.Bulk.Rows()
	return nil
}

// Step 7.
func (s *story) startWords(ctx context.Context, facts map[string]any) error {
	start, had := time.Now(), s.load.Words.Count()
	if err := s.load.Words.Await(ctx, had+500); err != nil {
		return err
	}
	facts["acknowledged"] = s.load.Words.Count()
	facts["per_second"] = float64(int(float64(s.load.Words.Count()-had) / time.Since(start).Seconds()))
	return nil
}

// Step 8.
func (s *story) startRest(ctx context.Context, facts map[string]any) error {
	if err := errors.Join(s.load.Transfers.Await(ctx, 200), s.load.Churn.Await(ctx, 3)); err != nil {
		return err
	}
	facts["transfers"], facts["tables_churned"] = s.load.Transfers.Count(), s.load.Churn.Count()
	return s.load.Err()
}

func (s *story) mark(ctx context.Context, n int, facts map[string]any) error {
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	facts["marker"], facts["committed"] = n, time.Now().UTC()
	return load.Mark(ctx, conn, n)
}

// Step 9.
func (s *story) markerBefore(ctx context.Context, facts map[string]any) error {
	return s.mark(ctx, 1, facts)
}

// Step 10. The backup runs beside the story; when all is armed it waits for
// marker 2 to be committed, which is therefore after its beginning and before
// the cut.
func (s *story) backupBegins(ctx context.Context, facts map[string]any) error {
	f, err := s.flow(ctx)
	if err != nil {
		return err
	}
	o := flow.BackupOptions{Target: postgres.Target{DSN: s.server.DSN("postgres")}, Mode: s.Mode, Deadline: 60 * time.Second,
		FastCheckpoint: s.Mode == backup.ModeBracketed, // a spread one takes minutes
		Quick:          500 * time.Millisecond, Rounds: 100, KeepAway: s.ground.keepAway(),
		BeforeFreeze: func(ctx context.Context) error {
			close(s.cutReady)
			select {
			case <-s.cutGo:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}
	s.backupBegan = time.Now()
	go func() {
		var err error
		s.manifest, err = f.Backup(ctx, o)
		s.backupRun <- err
	}()
	select {
	case <-s.cutReady:
	case err := <-s.backupRun:
		return fmt.Errorf("the backup ended before the cut: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}
	return s.mark(ctx, 2, facts)
}

// flow wires what the production host has.
func (s *story) flow(ctx context.Context) (*flow.Flow, error) {
	p, err := s.ground.provider(ctx)
	if err != nil {
		return nil, err
	}
	store, err := s.ground.store(ctx)
	if err != nil {
		return nil, err
	}
	st, err := state.Open(filepath.Join(s.work, "a"))
	if err != nil {
		return nil, err
	}
	return &flow.Flow{Provider: p, Catalog: catalog.New(store, "demo"), State: st, Cluster: "demo", Host: productionHost,
		Tool: s.Version, Watchdog: []string{s.Program, "watchdog"}, Program: s.Program, Log: s.Log}, nil
}

// Step 11.
func (s *story) theCut(ctx context.Context, facts map[string]any) error {
	close(s.cutGo)
	if err := <-s.backupRun; err != nil {
		return err
	}
	m := s.manifest
	s.later("backup", func(ctx context.Context) error {
		f, err := s.flow(ctx)
		if err != nil {
			return err
		}
		return f.DeleteLast(ctx, m.ID)
	})
	s.phases = append(s.phases, phase{"backup", s.backupBegan, time.Now()})
	first, last := m.Span()
	s.promise = s.load.PromiseUntil(first, last)
	s.promise.Facts, s.promise.Present, s.promise.Absent = &s.facts, []int{1, 2}, []int{3}
	if err := s.load.Words.Await(ctx, s.load.Words.Count()+10); err != nil { // the stall has an end
		return err
	}
	s.stall = s.load.Words.Stall(first.Add(-time.Second), time.Now())
	facts["backup"], facts["achieved"], facts["how"] = m.ID, m.Cut.Achieved, m.Cut.How
	facts["freeze_ms"], facts["request_spread_ms"], facts["sync_rounds_ms"] = m.Cut.FreezeMS, m.Cut.SpreadMS, m.Cut.SyncRounds
	facts["longest_stall_of_beater_b_ms"] = s.stall.Length.Milliseconds()
	facts["flush_lsn"] = m.Cut.FlushLSN
	want := backup.Atomic
	if s.Mode == backup.ModeBracketed {
		want = backup.Bracketed
	}
	if m.Cut.Achieved != want || len(m.Snapshots) != 4 {
		return errStep("the cut is %s with %d snapshots", m.Cut.Achieved, len(m.Snapshots))
	}
	return s.load.Err()
}

// Step 12. In bracketed mode backup mode has ended by now. The bulk load and
// the churn end here; words and transfers go on while the other host restores.
func (s *story) markerAfter(ctx context.Context, facts map[string]any) error {
	if b := s.manifest.Bracket; b != nil {
		facts["backup_mode"] = map[string]any{"start_lsn": b.StartLSN, "stop_lsn": b.StopLSN, "ended": b.Stopped, "wal_kept": len(b.WAL)}
	}
	if err := s.mark(ctx, 3, facts); err != nil {
		return err
	}
	conn, err := s.server.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if err := conn.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&s.moment); err != nil {
		return err
	}
	s.shipped = s.load.PromiseUntil(s.moment, s.moment)
	s.shipped.Facts, s.shipped.Present = &s.facts, []int{1, 2, 3}
	facts["moment_for_step_20"] = s.moment.UTC()
	facts["bulk_rows_uncommitted"] = s.load.Bulk.Rows()
	return errors.Join(s.load.Bulk.Stop(), s.load.Churn.Stop(), s.load.Err())
}
