package ec2sim_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

// command is `cleancut ec2sim` in a process of its own.
type command struct {
	*exec.Cmd
	errs *bytes.Buffer
	URL  string `json:"url"`
}

func play(t *testing.T, pool string, args ...string) *command {
	t.Helper()
	c := &command{errs: &bytes.Buffer{}}
	c.Cmd = exec.CommandContext(labtest.Context(t), labtest.Binary(t), append([]string{"ec2sim", "--json", "--listen", "127.0.0.1:0", "--pool", pool}, args...)...)
	c.Stderr = c.errs
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if c.ProcessState == nil {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	})
	if err := json.NewDecoder(out).Decode(c); err != nil {
		t.Fatalf("%v\n%s", err, c.errs)
	}
	return c
}

// interrupt ends the command as a person does.
func (c *command) interrupt(t *testing.T) {
	t.Helper()
	if err := errors.Join(c.Process.Signal(syscall.SIGINT), c.Wait()); err != nil {
		t.Errorf("%v\n%s", err, c.errs)
	}
}

// cli runs the stock AWS CLI and decodes what it prints.
func cli(t *testing.T, url string, args ...string) map[string]any {
	t.Helper()
	path, err := exec.LookPath("aws")
	if err != nil {
		t.Fatal("the AWS CLI is missing: apt install awscli, or scripts/install-deps")
	}
	// The option and not AWS_ENDPOINT_URL_EC2, which Debian's version does not know.
	cmd := exec.CommandContext(t.Context(), path, append([]string{"--endpoint-url", url, "--region", "eu-central-1", "--output", "json", "ec2"}, args...)...)
	cmd.Env = append(os.Environ(), "AWS_ACCESS_KEY_ID="+ec2sim.AccessKey, "AWS_SECRET_ACCESS_KEY="+ec2sim.SecretKey, "AWS_PAGER=", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	decoded := map[string]any{"stderr": errs.String()}
	if err != nil {
		decoded["failed"] = true
		return decoded
	}
	if err := json.Unmarshal(out.Bytes(), &decoded); err != nil && out.Len() > 0 {
		t.Fatalf("aws %v printed %v: %s", args, err, out.String())
	}
	return decoded
}

// at walks into decoded JSON: names and indices.
func at(t *testing.T, v any, path ...any) any {
	t.Helper()
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, ok := v.(map[string]any)
			if !ok || m[p] == nil {
				t.Fatalf("no %v in %v", path, v)
			}
			v = m[p]
		case int:
			l, ok := v.([]any)
			if !ok || p >= len(l) {
				t.Fatalf("no %v in %v", path, v)
			}
			v = l[p]
		}
	}
	return v
}

func text(t *testing.T, v any, path ...any) string {
	t.Helper()
	s, ok := at(t, v, path...).(string)
	if !ok {
		t.Fatalf("%v is no text in %v", path, v)
	}
	return s
}

func TestTheStockCLICanUseTheCommand(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	pool := labtest.Pool(t, "xfs", 512<<20)
	c := play(t, pool, "--rate-window", "1ns")
	v := text(t, cli(t, c.URL, "create-volume", "--availability-zone", zone, "--size", "1", "--volume-type", "gp3", "--tag-specifications", "ResourceType=volume,Tags=[{Key=name,Value=one}]"), "VolumeId")
	if got := cli(t, c.URL, "describe-volumes", "--filters", "Name=tag:name,Values=one"); text(t, got, "Volumes", 0, "VolumeId") != v || text(t, got, "Volumes", 0, "VolumeType") != "gp3" {
		t.Errorf("got %v", got)
	}
	until(t, "available", func() bool {
		return text(t, cli(t, c.URL, "describe-volumes", "--volume-ids", v), "Volumes", 0, "State") == "available"
	})
	if got := cli(t, c.URL, "attach-volume", "--volume-id", v, "--instance-id", instanceA, "--device", "/dev/sdf"); text(t, got, "State") != "attaching" {
		t.Errorf("got %v", got)
	}
	snap := text(t, cli(t, c.URL, "create-snapshot", "--volume-id", v, "--description", "by hand"), "SnapshotId")
	until(t, "completed", func() bool {
		return text(t, cli(t, c.URL, "describe-snapshots", "--owner-ids", "self", "--snapshot-ids", snap), "Snapshots", 0, "State") == "completed"
	})
	if got := text(t, cli(t, c.URL, "detach-volume", "--volume-id", v, "--instance-id", instanceB), "stderr"); !strings.Contains(got, "InvalidAttachment.NotFound") {
		t.Errorf("got %s", got)
	}
	c.interrupt(t)
	if left, err := filepath.Glob(filepath.Join(pool, "*s", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the pool: %v, %v", left, err)
	}
}

func groupByCLI(t *testing.T) {
	s := start(t, ec2sim.Options{})
	volumes := []string{s.create(), s.create()}
	for i, v := range volumes {
		s.attach(v, instanceA, "/dev/sd"+string(rune('f'+i)))
	}
	got := cli(t, s.url, "create-snapshots", "--instance-specification", "InstanceId="+instanceA+",ExcludeBootVolume=true,ExcludeDataVolumeIds="+volumes[0], "--copy-tags-from-source", "volume", "--description", "group")
	if text(t, got, "Snapshots", 0, "VolumeId") != volumes[1] || text(t, got, "Snapshots", 0, "State") != "pending" || len(at(t, got, "Snapshots").([]any)) != 1 {
		t.Errorf("got %v", got)
	}
}

func groupOfTheKilled(t *testing.T) {
	pool := labtest.Pool(t, "xfs", 2<<30)
	killed := play(t, pool, "--rate-window", "1ns")
	s := &sim{Client: client(killed.URL, ec2sim.AccessKey), t: t}
	v := *must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(1)})).VolumeId
	until(t, "available", func() bool { return s.volume(v).State == types.VolumeStateAvailable })
	if err := s.attachErr(v, instanceA, "/dev/sdf"); err != nil {
		t.Fatal(err)
	}
	until(t, "attached", func() bool { return s.volume(v).Attachments[0].State == types.VolumeAttachmentStateAttached })
	if err := s.snapshotErr(v); err != nil {
		t.Fatal(err)
	}
	name := dmName(t)
	run(t, "dmsetup", "suspend", name) // killed in the middle of a group
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = killed.Wait()
	next := start(t, ec2sim.Options{Pool: pool})
	if left, err := filepath.Glob(filepath.Join(pool, "*s", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the pool: %v, %v", left, err)
	}
	if left := dmName(t); left != "" {
		t.Errorf("left: %s", left)
	}
	_, err := next.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{VolumeIds: []string{v}})
	refused(t, err, "InvalidVolume.NotFound")
}

// dmName is the name of the only dm device, or "".
func dmName(t *testing.T) string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/dm-*/dm/name")
	if err != nil || len(names) > 1 {
		t.Fatal(names, err)
	}
	if len(names) == 0 {
		return ""
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
