package flow

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/postgres"
	"cleancut/internal/provider"
)

// Health is the result of one of doctor's checks.
type Health string

// The four results. Bad: what was asked for will fail or be refused. Warn: it
// works, with a loss that is named.
const (
	Healthy Health = "ok"
	Warning Health = "warn"
	Bad     Health = "bad"
	Unknown Health = "could not run"
)

// Finding is one line of doctor.
type Finding struct {
	Name   string `json:"name"`
	Result Health `json:"result"`
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"` // what to type or to change
}

// wantedCapabilities are those that Diagnose knows a reason for.
func wantedCapabilities() []string {
	return []string{"CAP_SYS_ADMIN", "CAP_IPC_LOCK", "CAP_SYS_RESOURCE", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL"}
}

// Diagnose judges what Examine saw. It is pure.
func Diagnose(x Condition) []Finding {
	d := &diagnosis{Condition: x}
	d.host()
	d.tools()
	d.state()
	d.pool()
	d.permissions()
	d.catalog()
	if x.For != ForRestore {
		d.watchdog()
		d.server()
		d.topology()
		d.volumes()
	}
	if x.For != ForBackup {
		d.programs()
	}
	d.left()
	return d.out
}

type diagnosis struct {
	Condition
	out []Finding
}

func (d *diagnosis) say(r Health, name, mend, detail string, a ...any) {
	text := strings.Join(strings.Fields(strings.ReplaceAll(fmt.Sprintf(detail, a...), "\n", "; ")), " ")
	d.out = append(d.out, Finding{Name: name, Result: r, Detail: text, Mend: mend})
}

// failed says an error with its own hint, or with mend if it has none.
func (d *diagnosis) failed(r Health, name string, err error, mend string) {
	if hint := backup.HintOf(err); hint != "" {
		mend = hint
	}
	d.say(r, name, mend, "%v", err)
}

func (d *diagnosis) host() {
	if d.UID == 0 {
		d.say(Healthy, "root", "", "runs as root")
	} else {
		d.say(Bad, "root", "sudo cleancut doctor", "runs as uid %d; freezes, loop devices, mounts and servers of another uid need root", d.UID)
	}
	d.capabilities()
	switch {
	case d.For == ForBackup:
		d.say(Healthy, "kernel", "", "Linux %s", d.Kernel.Release)
	case d.Kernel.AtLeast(5, 12):
		d.say(Healthy, "kernel", "", "Linux %s; a copy's server is confined to its folder", d.Kernel.Release)
	default:
		d.say(Bad, "kernel", "boot a newer kernel", "Linux %s; 5.12 is the oldest that can confine a copy's server (mount_setattr)", d.Kernel.Release)
	}
	switch {
	case !d.Local:
	case d.Loop:
		d.say(Healthy, "loop devices", "", "/dev/loop-control is there")
	default:
		d.say(Bad, "loop devices", "modprobe loop", "no /dev/loop-control; volumes of the local provider are loop devices")
	}
	switch {
	case d.MD:
		d.say(Healthy, "md arrays", "", "this kernel has md")
	case d.Needs.Arrays:
		d.say(Bad, "md arrays", "modprobe md-mod raid0", "this kernel has no md, and a cluster here or in the catalog is striped")
	default:
		d.say(Healthy, "md arrays", "", "this kernel has no md; nothing seen here needs it")
	}
}

func (d *diagnosis) capabilities() {
	why := map[string]string{
		"CAP_SYS_ADMIN": "no freeze, no mount, no loop device", "CAP_SETUID": "no server or session as the cluster's owner", "CAP_SETGID": "the same",
		"CAP_CHOWN": "no files for the cluster's owner", "CAP_DAC_OVERRIDE": "no reading in the data directory", "CAP_KILL": "no ending of a copy's server",
		"CAP_IPC_LOCK": "the watchdog cannot be locked in memory", "CAP_SYS_RESOURCE": "the watchdog is not exempt from the OOM killer",
	}
	if d.UID != 0 {
		return // one cause, said already
	}
	ok := true
	for _, c := range d.Missing {
		result := Bad
		switch {
		case d.For == ForRestore && (c == "CAP_IPC_LOCK" || c == "CAP_SYS_RESOURCE"):
			continue // only a backup has a watchdog
		case c == "CAP_SYS_RESOURCE" && d.WatchdogNote != "":
			continue // the watchdog's own line says it
		case c == "CAP_IPC_LOCK" && d.Watchdog == nil, c == "CAP_SYS_RESOURCE":
			result = Warning // locked by its limit; the manifest notes the other
		}
		ok = false
		d.say(result, "capability", "run cleancut outside of the container, or give it "+c, "%s is missing: %s", c, why[c])
	}
	if ok {
		d.say(Healthy, "capabilities", "", "all that are needed")
	}
}

// systemTools are the programs that some cluster needs.
func systemTools() []string {
	return []string{"blkid", "mount", "mdadm", "lvm", "dmsetup", "xfs_repair", "e2fsck"}
}

func (d *diagnosis) tools() {
	needs := map[string]Health{"blkid": Bad}
	if d.For != ForBackup {
		needs["mount"] = Bad
		if slices.Contains(d.Needs.Filesystems, "xfs") {
			needs["xfs_repair"] = Warning
		}
		if slices.Contains(d.Needs.Filesystems, "ext4") {
			needs["e2fsck"] = Warning
		}
	}
	if d.Needs.Arrays {
		needs["mdadm"] = Bad
	}
	if d.Needs.LVM {
		needs["lvm"], needs["dmsetup"] = Bad, Bad
	}
	ok := true
	for _, tool := range systemTools() {
		pkg, missing := d.Missed[tool]
		if !missing || needs[tool] == "" {
			continue
		}
		ok = false
		what := ""
		if needs[tool] == Warning {
			what = "; `verify --level full` cannot check such a filesystem without it"
		}
		d.say(needs[tool], "tool "+tool, "apt install "+pkg, "not installed%s", what)
	}
	if ok {
		d.say(Healthy, "system tools", "", "all that are needed")
	}
}

// socketLimit is the longest path of a unix socket (unix(7)).
const socketLimit = 107

func (d *diagnosis) state() {
	const name = "state folder"
	if d.State != nil {
		d.failed(Bad, name, d.State, "run as root, or choose another folder with --state")
		return
	}
	// What a throwaway copy's socket is called, see makeRoot and postgres.Start.
	socket := filepath.Join(d.StatePath, "mnt", string(backup.NewID(time.Time{})), postgres.Private, ".s.PGSQL.5432")
	if len(socket) > socketLimit && d.For != ForBackup {
		d.say(Bad, name, "choose a shorter folder with --state", "%s is so long that the socket of a copy for verify or dump has %d bytes of at most %d", d.StatePath, len(socket), socketLimit)
		return
	}
	if d.StateBlocked != "" && d.For != ForBackup {
		d.say(Bad, name, "chmod o+x "+d.StateBlocked, "the server of a copy for verify or dump cannot pass through %s", d.StateBlocked)
		return
	}
	d.say(Healthy, name, "", "%s is writable", d.StatePath)
}

func (d *diagnosis) pool() {
	const name = "provider"
	x := d.Examined
	switch {
	case d.Provider != nil:
		d.failed(Bad, name, d.Provider, "see docs/configuration.md, [provider.local]")
		return
	case d.Examination != nil:
		d.failed(Bad, name, d.Examination, "")
		return
	case x == nil:
		d.say(Unknown, name, "", "it opens, and cannot tell more before a cut")
		return
	}
	d.say(Healthy, name, "", "%s", x.Kind)
	if x.Size == 0 {
		for _, n := range x.Notes {
			d.say(Healthy, name, "", "%s", n)
		}
		return
	}
	detail := fmt.Sprintf("%s of %s free, a cut wants at least %s", x.Free, x.Size, x.Need)
	switch mend := "delete old backups (`cleancut list`, `cleancut delete ID`), or enlarge the pool's filesystem"; {
	case x.Free >= x.Need:
		d.say(Healthy, "free space", "", "%s", detail)
	case d.For == ForRestore:
		d.say(Warning, "free space", mend, "%s; a copy needs space for what it overwrites", detail)
	default:
		d.say(Bad, "free space", mend, "%s", detail)
	}
	for _, n := range x.Notes {
		d.say(Warning, "provider", "", "%s", n)
	}
}

// permissions judges those that this host's part needs.
func (d *diagnosis) permissions() {
	var allowed []string
	for _, p := range d.Permissions {
		if d.For != ForAll && !slices.ContainsFunc(p.Roles, func(role string) bool { return strings.HasPrefix(role, string(d.For)) }) {
			continue
		}
		name := "permission " + p.Action
		switch p.Grant {
		case provider.Allowed:
			allowed = append(allowed, p.Action)
		case provider.Denied:
			d.say(Bad, name, "allow it in the policy of this host's role: docs/aws.md has the whole policy", "denied; it is needed to %s: %s", p.For, p.Note)
		default:
			d.say(Unknown, name, "", "needed to %s: %s", p.For, p.Note)
		}
	}
	if len(allowed) > 0 {
		d.say(Healthy, "permissions", "", "allowed, by dry run: %s", strings.Join(allowed, ", "))
	}
}

func (d *diagnosis) catalog() {
	const name = "catalog"
	switch {
	case d.CatalogNew && d.For == ForRestore:
		d.say(Bad, name, "mount its filesystem, or name the right one with --catalog", "%v", d.Catalog)
		return
	case d.CatalogNew:
		d.say(Warning, name, "if it should be there, mount it", "not there yet; the first backup makes it")
		return
	case d.Catalog != nil:
		d.failed(Bad, name, d.Catalog, "see that it can be read, or name another with --catalog")
		return
	}
	n := map[BackupState]int{}
	for _, s := range d.Backups {
		n[s]++
	}
	said := fmt.Sprintf("%d complete, %d incomplete, %d unreadable", n[Complete], n[Incomplete], n[Doubtful])
	switch {
	case n[Doubtful] > 0:
		d.say(Warning, name, "cleancut list", "backups: %s", said)
	case n[Complete] == 0 && d.For == ForRestore:
		d.say(Warning, name, "name the right one with --catalog and --cluster", "no backup to restore: %s", said)
	default:
		d.say(Healthy, name, "", "backups: %s", said)
	}
	switch mend := "see that root may write there and that the disk is not full"; {
	case d.CatalogReadOnly == nil:
		d.say(Healthy, "catalog writable", "", "an object was written, read back and deleted")
	case d.For == ForRestore:
		d.say(Warning, "catalog writable", mend, "restore works, verdicts and dumps cannot be kept: %v", d.CatalogReadOnly)
	default:
		d.failed(Bad, "catalog writable", d.CatalogReadOnly, mend)
	}
}

func (d *diagnosis) watchdog() {
	switch {
	case d.Watchdog != nil:
		d.failed(Bad, "watchdog", d.Watchdog, "without it nothing is frozen; run cleancut as root of the machine, outside of a container")
	case d.WatchdogNote != "":
		d.say(Warning, "watchdog", "give cleancut CAP_SYS_RESOURCE", "armed and let go again; %s", d.WatchdogNote)
	default:
		d.say(Healthy, "watchdog", "", "armed and let go again, nothing was frozen")
	}
}

func (d *diagnosis) server() {
	if d.Server != nil {
		d.failed(Bad, "server", d.Server, "start it, or name it with --dsn or --data-directory")
		d.out[len(d.out)-1].Mend += "; on a host that only restores: cleancut doctor --for restore"
		return
	}
	version, _, _ := strings.Cut(d.Version, " on ") // version() goes on with the compiler
	d.say(Healthy, "server", "", "%s", version)
	if !slices.ContainsFunc(d.Findings, func(f postgres.Finding) bool { return f.Refuse }) {
		d.say(Healthy, "preflight", "", "nothing that a backup refuses")
	}
	for _, f := range d.Findings {
		result := Warning
		if f.Refuse {
			result = Bad
		}
		d.say(result, "preflight", f.Hint, "%s", f.Text)
	}
}

func (d *diagnosis) topology() {
	const name = "topology"
	switch {
	case d.Server != nil:
		d.say(Unknown, name, "", "the server could not be asked")
	case d.Provider != nil:
		d.say(Unknown, name, "", "the provider could not be opened")
	case d.Topology != nil:
		d.failed(Bad, name, d.Topology, "cleancut topology")
	default:
		d.say(Healthy, name, "", "%s on %s, all covered", count(d.Filesystems, "filesystem"), count(d.Members, "volume"))
		if d.KeepAway != nil {
			d.failed(Bad, "own files", d.KeepAway, "")
		} else if d.State == nil {
			d.say(Healthy, "own files", "", "state, catalog and pool are on none of them")
		}
	}
}

func (d *diagnosis) volumes() {
	if d.Examined == nil {
		return
	}
	for _, v := range d.Examined.Volumes {
		if v.Extents == 0 && v.Estimate == 0 { // the provider cannot tell
			continue
		}
		said := fmt.Sprintf("%d extents, its snapshot is expected to take %s inside the freeze (deadline %s)", v.Extents, v.Estimate.Round(time.Millisecond), d.Deadline)
		mend := "stop the server and copy its files to new storage (`cleancut storage create`), or accept a longer stop with --deadline " + (2*v.Estimate + time.Second).Truncate(time.Second).String()
		switch name := "volume " + string(v.ID); {
		case v.Estimate > d.Deadline/2: // what a cut refuses
			d.say(Bad, name, mend, "%s; more than half of the deadline is refused", said)
		case v.Estimate > d.Deadline/10:
			d.say(Warning, name, mend, "%s", said)
		default:
			d.say(Healthy, name, "", "%s", said)
		}
	}
}

func (d *diagnosis) programs() {
	if len(d.Majors) == 0 {
		d.say(Unknown, "PostgreSQL programs", "", "neither a server nor a complete backup says of which version")
	}
	for _, m := range d.Majors {
		name := fmt.Sprintf("PostgreSQL %d programs", m.Major)
		switch {
		case m.Found != nil:
			d.failed(Bad, name, m.Found, fmt.Sprintf("apt install postgresql-%d", m.Major))
		case slices.Contains(m.Missing, "pg_dumpall") || slices.Contains(m.Missing, "pg_dump"):
			d.say(Bad, name, m.Hint, "%s lacks %s; there is no dump without them", m.Bin, strings.Join(m.Missing, ", "))
		case len(m.Missing) > 0:
			d.say(Warning, name, m.Hint, "%s lacks %s; `verify --level full` cannot run these checks", m.Bin, strings.Join(m.Missing, ", "))
		default:
			d.say(Healthy, name, "", "all in %s", m.Bin)
		}
	}
}

func (d *diagnosis) left() {
	var remove []string
	for _, a := range d.Plan {
		if a.Kind != OnlyList {
			remove = append(remove, a.Name)
		}
	}
	switch kept := len(d.Plan) - len(remove); {
	case d.Sweep != nil && d.CatalogNew:
		d.say(Healthy, "left-overs", "", "no catalog yet, so nothing was ever left")
	case d.Sweep != nil:
		d.failed(Unknown, "left-overs", errors.New(d.Sweep.Error()), "")
	case len(remove) > 0:
		d.say(Warning, "left-overs", "cleancut sweep", "something was interrupted: %s", strings.Join(remove, ", "))
	case kept > 0:
		d.say(Healthy, "left-overs", "", "nothing to remove; %s in use or left alone (`cleancut sweep --dry-run` lists them)", count(kept, "thing"))
	default:
		d.say(Healthy, "left-overs", "", "none")
	}
	if len(d.Frozen) > 0 {
		d.say(Unknown, "still frozen?", "if writers hang: cleancut thaw", "the kernel only tells by a freeze, which doctor does not do; were frozen at some time: %s", strings.Join(d.Frozen, ", "))
	} else if d.State == nil {
		d.say(Healthy, "still frozen?", "", "nothing was ever frozen from this state folder")
	}
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
