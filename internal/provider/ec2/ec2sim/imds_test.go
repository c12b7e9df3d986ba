package ec2sim_test

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"

	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider/ec2/ec2sim"
)

func TestAnInstanceLearnsWhoItIsAndHowToSign(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{Session: time.Second, Instances: []ec2sim.Instance{{ID: instanceA}, {ID: instanceB, Zone: "eu-central-1b"}}})
	ctx := t.Context()
	meta := imds.New(imds.Options{Endpoint: ec2sim.MetadataEndpoint(s.url, instanceB), EnableFallback: aws.FalseTernary})
	doc := must[*imds.GetInstanceIdentityDocumentOutput](t)(meta.GetInstanceIdentityDocument(ctx, &imds.GetInstanceIdentityDocumentInput{}))
	if doc.InstanceID != instanceB || doc.Region != "eu-central-1" || doc.AvailabilityZone != "eu-central-1b" || doc.AccountID != ec2sim.Account {
		t.Errorf("got %+v", doc)
	}
	if out, err := meta.GetRegion(ctx, &imds.GetRegionInput{}); err != nil || out.Region != "eu-central-1" {
		t.Errorf("region: %+v, %v", out, err)
	}
	for path, want := range map[string]string{"instance-id": instanceB, "placement/availability-zone": "eu-central-1b", "placement/region": "eu-central-1"} {
		out := must[*imds.GetMetadataOutput](t)(meta.GetMetadata(ctx, &imds.GetMetadataInput{Path: path}))
		if b, err := io.ReadAll(out.Content); err != nil || string(b) != want {
			t.Errorf("%s: got %q, %v", path, b, err)
		}
	}
	role := ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = meta })
	got := must[aws.Credentials](t)(role.Retrieve(ctx))
	as := ec2.New(ec2.Options{Region: "eu-central-1", BaseEndpoint: &s.url, RetryMaxAttempts: 1, Credentials: aws.CredentialsProviderFunc(
		func(context.Context) (aws.Credentials, error) { return got, nil })})
	describe := func() error { _, err := as.DescribeInstances(ctx, &ec2.DescribeInstancesInput{}); return err }
	if err := describe(); err != nil {
		t.Errorf("with the role's credentials: %v", err)
	}
	until(t, "expired", func() bool { return describe() != nil })
	refused(t, describe(), "RequestExpired")
	got.SessionToken = "of another session"
	refused(t, describe(), "AuthFailure")
}

func TestMetadataWantATokenOfTheirInstance(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	s := start(t, ec2sim.Options{})
	ask := func(method, path string, header map[string]string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, s.url+"/imds/"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range header {
			r.Header.Set(k, v)
		}
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
	const ttl, sent = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
	_, token := ask("PUT", instanceA+"/latest/api/token", map[string]string{ttl: "60"})
	for _, c := range []struct {
		name, method, path string
		header             map[string]string
		want               int
	}{
		{"with a token", "GET", instanceA + "/latest/meta-data/instance-id", map[string]string{sent: token}, 200},
		{"without", "GET", instanceA + "/latest/meta-data/instance-id", nil, 401},
		{"with that of another instance", "GET", instanceB + "/latest/meta-data/instance-id", map[string]string{sent: token}, 401},
		{"what is not there", "GET", instanceA + "/latest/meta-data/colour", map[string]string{sent: token}, 404},
		{"of no instance", "GET", "i-1/latest/meta-data/instance-id", map[string]string{sent: token}, 404},
		{"a token without an end", "PUT", instanceA + "/latest/api/token", nil, 400},
		{"a token for too long", "PUT", instanceA + "/latest/api/token", map[string]string{ttl: "21601"}, 400},
		{"a token by GET", "GET", instanceA + "/latest/api/token", map[string]string{ttl: "60"}, 405},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, body := ask(c.method, c.path, c.header); got != c.want {
				t.Errorf("got %d %s, want %d", got, body, c.want)
			}
		})
	}
}
