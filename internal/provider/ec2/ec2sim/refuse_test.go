package ec2sim_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

const (
	noVolume   = "vol-0123456789abcdef0"
	noSnapshot = "snap-0123456789abcdef0"
	noInstance = "i-0123456789abcdef0"
)

func (s *sim) attachErr(volume, instance, name string) error {
	_, err := s.AttachVolume(s.t.Context(), &ec2.AttachVolumeInput{VolumeId: &volume, InstanceId: &instance, Device: &name})
	return err
}

func (s *sim) detachErr(volume, instance string) error {
	in := &ec2.DetachVolumeInput{VolumeId: &volume}
	if instance != "" {
		in.InstanceId = &instance
	}
	_, err := s.DetachVolume(s.t.Context(), in)
	return err
}

func (s *sim) deleteErr(volume string) error {
	_, err := s.DeleteVolume(s.t.Context(), &ec2.DeleteVolumeInput{VolumeId: &volume})
	return err
}

func (s *sim) snapshotErr(volume string) error {
	_, err := s.CreateSnapshot(s.t.Context(), &ec2.CreateSnapshotInput{VolumeId: &volume})
	return err
}

func (s *sim) createErr(change func(in *ec2.CreateVolumeInput)) error {
	in := &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(1)}
	change(in)
	_, err := s.CreateVolume(s.t.Context(), in)
	return err
}

// root is the root volume of an instance.
func (s *sim) root(instance string) string {
	s.t.Helper()
	out := must[*ec2.DescribeInstancesOutput](s.t)(s.DescribeInstances(s.t.Context(), &ec2.DescribeInstancesInput{InstanceIds: []string{instance}}))
	i := out.Reservations[0].Instances[0]
	for _, m := range i.BlockDeviceMappings {
		if *m.DeviceName == *i.RootDeviceName {
			return *m.Ebs.VolumeId
		}
	}
	s.t.Fatalf("%s has no root volume", instance)
	return ""
}

func TestRefusalsHaveTheCodesOfEC2(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{Completion: time.Hour, Instances: []ec2sim.Instance{{ID: instanceA, MaxVolumes: 3}, {ID: instanceB, Zone: "eu-central-1b"}}})
	ctx := t.Context()
	used, free, third := s.create(), s.create(), s.create()
	s.attach(used, instanceA, "/dev/sdf")
	rootA := s.root(instanceA)
	waiting := *must[*ec2.CreateSnapshotOutput](t)(s.CreateSnapshot(ctx, &ec2.CreateSnapshotInput{VolumeId: &free})).SnapshotId
	token := func(size int32) error {
		return s.createErr(func(in *ec2.CreateVolumeInput) { in.ClientToken, in.Size = aws.String("same"), &size })
	}
	if err := token(1); err != nil {
		t.Fatal(err)
	}
	snapshots := func(instance string, exclude ...string) error {
		_, err := s.CreateSnapshots(ctx, &ec2.CreateSnapshotsInput{InstanceSpecification: &types.InstanceSpecification{InstanceId: &instance, ExcludeDataVolumeIds: exclude}})
		return err
	}
	describe := func(in *ec2.DescribeVolumesInput) error { _, err := s.DescribeVolumes(ctx, in); return err }
	tags := func(id string, n int) error {
		in := &ec2.CreateTagsInput{Resources: []string{id}}
		for i := range n {
			in.Tags = append(in.Tags, types.Tag{Key: aws.String(fmt.Sprint("k", i)), Value: aws.String("v")})
		}
		_, err := s.CreateTags(ctx, in)
		return err
	}
	describeSnapshots := func(id string) error {
		_, err := s.DescribeSnapshots(ctx, &ec2.DescribeSnapshotsInput{SnapshotIds: []string{id}})
		return err
	}
	describeInstances := func(id string) error {
		_, err := s.DescribeInstances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
		return err
	}
	deleteSnapshot := func(id string) error {
		_, err := s.DeleteSnapshot(ctx, &ec2.DeleteSnapshotInput{SnapshotId: &id})
		return err
	}
	for _, c := range []struct {
		name, code string
		err        error
	}{
		{"attach a volume that is not", "InvalidVolume.NotFound", s.attachErr(noVolume, instanceA, "/dev/sdg")},
		{"attach to an instance that is not", "InvalidInstanceID.NotFound", s.attachErr(free, noInstance, "/dev/sdg")},
		{"attach twice", "VolumeInUse", s.attachErr(used, instanceA, "/dev/sdg")},
		{"attach across zones", "InvalidVolume.ZoneMismatch", s.attachErr(free, instanceB, "/dev/sdg")},
		{"attach where another is", "InvalidParameterValue", s.attachErr(free, instanceA, "/dev/sdf")},
		{"attach where another is, by Xen's name", "InvalidParameterValue", s.attachErr(free, instanceA, "/dev/xvdf")},
		{"attach as no device", "InvalidParameterValue", s.attachErr(free, instanceA, "/dev/nvme1n1")},
		{"attach what is no volume", "InvalidParameterValue", s.attachErr("vol-xyz", instanceA, "/dev/sdg")},
		{"attach to what is no instance", "InvalidInstanceID.Malformed", s.attachErr(free, "i-xyz", "/dev/sdg")},
		{"detach what is not attached", "IncorrectState", s.detachErr(free, "")},
		{"detach from another instance", "InvalidAttachment.NotFound", s.detachErr(used, instanceB)},
		{"detach from an instance that is not", "InvalidInstanceID.NotFound", s.detachErr(used, noInstance)},
		{"detach a root volume", "OperationNotPermitted", s.detachErr(rootA, "")},
		{"detach what is not", "InvalidVolume.NotFound", s.detachErr(noVolume, "")},
		{"delete what is attached", "VolumeInUse", s.deleteErr(used)},
		{"delete what is not", "InvalidVolume.NotFound", s.deleteErr(noVolume)},
		{"snapshot of what is not", "InvalidVolume.NotFound", s.snapshotErr(noVolume)},
		{"delete a snapshot that is not", "InvalidSnapshot.NotFound", deleteSnapshot(noSnapshot)},
		{"delete what is no snapshot", "InvalidParameterValue", deleteSnapshot("snap-1")},
		{"describe a volume that is not", "InvalidVolume.NotFound", describe(&ec2.DescribeVolumesInput{VolumeIds: []string{used, noVolume}})},
		{"describe a snapshot that is not", "InvalidSnapshot.NotFound", describeSnapshots(noSnapshot)},
		{"describe an instance that is not", "InvalidInstanceID.NotFound", describeInstances(noInstance)},
		{"describe what is no instance", "InvalidInstanceID.Malformed", describeInstances("i-1")},
		{"describe by a filter that is none", "InvalidParameterValue", describe(&ec2.DescribeVolumesInput{Filters: []types.Filter{{Name: aws.String("volumeid"), Values: []string{used}}}})},
		{"a page too small", "InvalidParameterValue", describe(&ec2.DescribeVolumesInput{MaxResults: aws.Int32(4)})},
		{"a page of chosen ids", "InvalidParameterCombination", describe(&ec2.DescribeVolumesInput{MaxResults: aws.Int32(5), VolumeIds: []string{used}})},
		{"a page of nowhere", "InvalidParameterValue", describe(&ec2.DescribeVolumesInput{NextToken: aws.String("x")})},
		{"a token for something else", "IdempotentParameterMismatch", token(2)},
		{"a zone that is not", "InvalidZone.NotFound", s.createErr(func(in *ec2.CreateVolumeInput) { in.AvailabilityZone = aws.String("mars-1a") })},
		{"no size", "MissingParameter", s.createErr(func(in *ec2.CreateVolumeInput) { in.Size = nil })},
		{"from a snapshot that is not", "InvalidSnapshot.NotFound", s.createErr(func(in *ec2.CreateVolumeInput) { in.SnapshotId = aws.String(noSnapshot) })},
		{"from a snapshot that is pending", "IncorrectState", s.createErr(func(in *ec2.CreateVolumeInput) { in.SnapshotId = &waiting })},
		{"IOPS of gp2, which is the default", "InvalidParameterCombination", s.createErr(func(in *ec2.CreateVolumeInput) { in.Iops = aws.Int32(3000) })},
		{"io2 without IOPS", "MissingParameter", s.createErr(func(in *ec2.CreateVolumeInput) { in.VolumeType, in.Size = types.VolumeTypeIo2, aws.Int32(4) })},
		{"too many IOPS for the size", "InvalidParameterValue", s.createErr(func(in *ec2.CreateVolumeInput) {
			in.VolumeType, in.Iops = types.VolumeTypeGp3, aws.Int32(4000)
		})},
		{"too much throughput for the IOPS", "InvalidParameterValue", s.createErr(func(in *ec2.CreateVolumeInput) {
			in.VolumeType, in.Throughput = types.VolumeTypeGp3, aws.Int32(1000)
		})},
		{"too small for its type", "InvalidParameterValue", s.createErr(func(in *ec2.CreateVolumeInput) { in.VolumeType = types.VolumeTypeSt1 })},
		{"an initialization rate of a blank volume", "InvalidParameterCombination", s.createErr(func(in *ec2.CreateVolumeInput) { in.VolumeInitializationRate = aws.Int32(200) })},
		{"a key without encryption", "InvalidParameterDependency", s.createErr(func(in *ec2.CreateVolumeInput) { in.KmsKeyId = aws.String("alias/x") })},
		{"tags for another resource", "InvalidParameterValue", s.createErr(func(in *ec2.CreateVolumeInput) {
			in.TagSpecifications = []types.TagSpecification{{ResourceType: types.ResourceTypeSnapshot, Tags: []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}}}
		})},
		{"a parameter that is not simulated", "UnknownParameter", s.createErr(func(in *ec2.CreateVolumeInput) { in.OutpostArn = aws.String("arn:x") })},
		{"too many tags", "TagLimitExceeded", tags(used, 51)},
		{"tags for nothing", "InvalidVolume.NotFound", tags(noVolume, 1)},
		{"a group of an instance that is not", "InvalidInstanceID.NotFound", snapshots(noInstance)},
		{"a group without 41", "InvalidParameterValue", snapshots(instanceA, strings.Split(strings.Repeat(","+used, 41)[1:], ",")...)},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, c.err, c.code) })
	}
	s.attach(free, instanceA, "/dev/sdg")
	refused(t, s.attachErr(third, instanceA, "/dev/sdh"), "AttachmentLimitExceeded")
	if s.GroupCuts() != "" {
		refused(t, snapshots(instanceA), "UnsupportedOperation")
	}
	var all *awshttp.ResponseError
	if err := snapshots(noInstance); !errors.As(err, &all) || all.ServiceRequestID() == "" {
		t.Errorf("no request id in %v", err)
	}
}

func TestSnapshotsOfAVolumeAreLimited(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{Completion: time.Hour})
	v := s.create()
	for range 5 {
		if err := s.snapshotErr(v); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, s.snapshotErr(v), "ConcurrentSnapshotLimitExceeded")

	s = start(t, ec2sim.Options{RateWindow: time.Hour})
	v = s.create()
	if err := s.snapshotErr(v); err != nil {
		t.Fatal(err)
	}
	refused(t, s.snapshotErr(v), "SnapshotCreationPerVolumeRateExceeded")
	if err := s.snapshotErr(s.create()); err != nil {
		t.Errorf("another volume: %v", err)
	}
}

// post sends a form with these headers and returns the status and the body.
func post(t *testing.T, address string, form url.Values, header http.Header) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header.Clone()
	if r.Header == nil {
		r.Header = http.Header{}
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestACallThatIsNotWholeIsRefused(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	signed := http.Header{"Authorization": {"AWS4-HMAC-SHA256 Credential=" + ec2sim.AccessKey + "/20261122/eu-central-1/ec2/aws4_request, SignedHeaders=host, Signature=" + strings.Repeat("0", 64)}}
	elsewhere := http.Header{"Authorization": {strings.Replace(signed.Get("Authorization"), "eu-central-1", "us-east-1", 1)}}
	stranger := http.Header{"Authorization": {strings.Replace(signed.Get("Authorization"), ec2sim.AccessKey, "AKIAIOSFODNN7EXAMPLE", 1)}}
	form := func(pairs ...string) url.Values {
		v := url.Values{"Action": {"DescribeVolumes"}, "Version": {"2016-11-15"}}
		for i := 0; i < len(pairs); i += 2 {
			v.Add(pairs[i], pairs[i+1])
		}
		return v
	}
	for _, c := range []struct {
		name   string
		form   url.Values
		header http.Header
		status int
		code   string
	}{
		{"no signature", form(), nil, 401, "AuthFailure"},
		{"a key that nobody gave out", form(), stranger, 401, "AuthFailure"},
		{"a signature for another region", form(), elsewhere, 401, "AuthFailure"},
		{"an action that is not simulated", url.Values{"Action": {"RunInstances"}, "Version": {"2016-11-15"}}, signed, 400, "InvalidAction"},
		{"another version", url.Values{"Action": {"DescribeVolumes"}, "Version": {"2010-01-01"}}, signed, 400, "InvalidAction"},
		{"a parameter nobody knows", form("Colour", "red"), signed, 400, "UnknownParameter"},
		{"a list with a gap", form("VolumeId.2", noVolume), signed, 400, "UnknownParameter"},
		{"a parameter twice", form("DryRun", "true", "DryRun", "false"), signed, 400, "InvalidParameterValue"},
		{"a flag that is none", form("DryRun", "maybe"), signed, 400, "InvalidParameterValue"},
		{"a filter without values", form("Filter.1.Name", "volume-id"), signed, 400, "InvalidParameterValue"},
		{"a filter without a name", form("Filter.1.Value.1", noVolume), signed, 400, "MissingParameter"},
		{"no volume to delete", url.Values{"Action": {"DeleteVolume"}, "Version": {"2016-11-15"}}, signed, 400, "MissingParameter"},
		{"a dry run", form("DryRun", "true"), signed, 412, "DryRunOperation"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body := post(t, s.url, c.form, c.header)
			if status != c.status || !strings.Contains(body, "<Response><Errors><Error><Code>"+c.code+"</Code>") {
				t.Errorf("got %d %s", status, body)
			}
		})
	}
	want := map[string]int{"DescribeVolumes": 8, "DescribeVolumes(DryRun)": 2, "DeleteVolume": 1, "InvalidAction": 2}
	if got := s.Calls(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("counted %v, want %v", got, want)
	}
}

func TestADryRunHasNoEffectAndIsCountedByItself(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	v := s.create()
	_, err := s.CreateSnapshot(t.Context(), &ec2.CreateSnapshotInput{VolumeId: &v, DryRun: aws.Bool(true)})
	refused(t, err, "DryRunOperation")
	s.Inject(ec2sim.Fault{Action: "CreateSnapshot(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"})
	_, err = s.CreateSnapshot(t.Context(), &ec2.CreateSnapshotInput{VolumeId: &v, DryRun: aws.Bool(true)})
	refused(t, err, "UnauthorizedOperation")
	out := must[*ec2.DescribeSnapshotsOutput](t)(s.DescribeSnapshots(t.Context(), &ec2.DescribeSnapshotsInput{OwnerIds: []string{"self"}}))
	if c := s.Calls(); len(out.Snapshots) != 0 || c["CreateSnapshot"] != 0 || c["CreateSnapshot(DryRun)"] != 2 {
		t.Errorf("%d snapshots; counted %v", len(out.Snapshots), c)
	}
	s.snapshot(v)
}

func TestAVolumeIsMadeAsItWasAskedFor(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	ctx := context.WithoutCancel(t.Context())
	plain := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(ctx, &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(1)}))
	if plain.VolumeType != types.VolumeTypeGp2 || *plain.Encrypted {
		t.Errorf("the default is %s, encrypted %v", plain.VolumeType, *plain.Encrypted)
	}
	in := &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), Size: aws.Int32(20), VolumeType: types.VolumeTypeGp3, Iops: aws.Int32(6000), Throughput: aws.Int32(500),
		Encrypted: aws.Bool(true), KmsKeyId: aws.String("alias/ours"), ClientToken: aws.String("one"),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: []types.Tag{{Key: aws.String("owner"), Value: aws.String("a&b <c>")}}}}}
	first := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(ctx, in))
	again := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(ctx, in))
	if *first.VolumeId != *again.VolumeId {
		t.Errorf("one token made %s and %s", *first.VolumeId, *again.VolumeId)
	}
	v := s.volume(*first.VolumeId)
	if *v.Iops != 6000 || *v.Throughput != 500 || *v.KmsKeyId != "alias/ours" || !*v.Encrypted || *v.Size != 20 || len(v.Tags) != 1 || *v.Tags[0].Value != "a&b <c>" {
		t.Errorf("got %+v", v)
	}
	until(t, "available", func() bool { return s.volume(*first.VolumeId).State == types.VolumeStateAvailable })
	snap := s.snapshot(*first.VolumeId)
	refused(t, s.createErr(func(in *ec2.CreateVolumeInput) { in.SnapshotId, in.Size = &snap, aws.Int32(19) }), "InvalidParameterValue")
	refused(t, s.createErr(func(in *ec2.CreateVolumeInput) {
		in.SnapshotId, in.Size, in.VolumeInitializationRate = &snap, nil, aws.Int32(301)
	}), "InvalidParameterValue")
	copied := must[*ec2.CreateVolumeOutput](t)(s.CreateVolume(ctx, &ec2.CreateVolumeInput{AvailabilityZone: aws.String(zone), SnapshotId: &snap, VolumeType: types.VolumeTypeGp3, VolumeInitializationRate: aws.Int32(300)}))
	if c := s.volume(*copied.VolumeId); *c.Size != 20 || !*c.Encrypted || *c.KmsKeyId != "alias/ours" || *c.VolumeInitializationRate != 300 || *c.SnapshotId != snap {
		t.Errorf("the copy is %+v", c)
	}
}
