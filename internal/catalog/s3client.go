package catalog

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"cleancut/internal/backup"
)

const (
	// attempts at one request, unless AWS_MAX_ATTEMPTS or the profile says
	// otherwise: about half a minute of throttling.
	attempts = 8
	// headerTime is how long a server may think before it answers: some put
	// the parts of a large object together meanwhile. Without a limit a dead
	// one would hold a backup for ever.
	headerTime = 10 * time.Minute
	// regionTime is how long the instance may take to say where it is.
	regionTime = 5 * time.Second
)

// open makes the client when it is needed first: Open touches nothing, and
// a failure may have passed by the next call.
func (s *S3) open(ctx context.Context) (*s3.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client != nil {
		return s.client, nil
	}
	cfg, err := s.config(ctx)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) {
		o.UsePathStyle = s.at.pathStyle
		o.Retryer = s.retryer(cfg.RetryMaxAttempts)
		o.DisableLogOutputChecksumValidationSkipped = true
		if s.at.endpoint != "" {
			o.BaseEndpoint = &s.at.endpoint
		}
		if o.Region == "" && o.BaseEndpoint != nil {
			o.Region = "us-east-1" // other servers want one to be signed, and care little which
		}
	})
	if client.Options().Region == "" {
		return nil, errNoRegion
	}
	if _, err := cfg.Credentials.Retrieve(ctx); err != nil { // cached
		return nil, fmt.Errorf("%w: %w", errNoCredentials, err)
	}
	s.client = client
	return client, nil
}

// config is the SDK's own chain: environment, profiles, instance.
func (s *S3) config(ctx context.Context) (aws.Config, error) {
	load := func(ctx context.Context, more ...func(*config.LoadOptions) error) (aws.Config, error) {
		options := []func(*config.LoadOptions) error{
			config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.ResponseHeaderTimeout = headerTime })),
		}
		if s.at.region != "" {
			options = append(options, config.WithRegion(s.at.region))
		}
		return config.LoadDefaultConfig(ctx, append(options, more...)...)
	}
	cfg, err := load(ctx)
	if err != nil || cfg.Region != "" || s.at.endpoint != "" {
		return cfg, err
	}
	instance, stop := context.WithTimeout(ctx, regionTime)
	defer stop()
	if there, err := load(instance, config.WithEC2IMDSRegion()); err == nil {
		return there, nil
	}
	return cfg, ctx.Err() // AWS_ENDPOINT_URL_S3 needs none
}

// retryer is the SDK's standard one. configured is 0 if the user does not say
// how often to try.
func (s *S3) retryer(configured int) aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) {
		if o.MaxAttempts = attempts; configured > 0 {
			o.MaxAttempts = configured
		}
		if s.pause > 0 {
			o.MaxBackoff = s.pause
		}
	})
}

// code returns the error code of the server's answer, "" if there is none.
// HeadObject has no body: there it is made of the status.
func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return ""
}

// status returns the HTTP status of the answer, 0 if there was none.
func status(err error) int {
	var answer *smithyhttp.ResponseError
	if errors.As(err, &answer) {
		return answer.HTTPStatusCode()
	}
	return 0
}

// explain turns an error of the SDK into ours, with what to do about it. What
// the caller's own reader said stays as it is.
func (s *S3) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	var dial *net.OpError
	var source sourceError
	switch c := code(err); {
	case ctx.Err() != nil, errors.Is(err, backup.ErrExists), errors.As(err, &source):
		return err
	case errors.Is(err, errNoRegion):
		return backup.Hint(err, "add ?region=REGION to the catalog's location, or set AWS_REGION")
	case errors.Is(err, errNoCredentials):
		return backup.Hint(err, "give the instance a role that may use the bucket, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for the user that runs cleancut")
	case c == "NoSuchBucket":
		return backup.Hint(fmt.Errorf("%w: bucket %s: %w", backup.ErrNotFound, s.at.name, err),
			"mend the bucket's name in the catalog's location, or make it (`aws s3 mb s3://"+s.at.name+"`): cleancut makes no buckets")
	case c == "NoSuchKey" || c == "NotFound":
		return fmt.Errorf("%w: %w", backup.ErrNotFound, err)
	case status(err) == http.StatusMovedPermanently, c == "PermanentRedirect", c == "TemporaryRedirect", c == "AuthorizationHeaderMalformed", c == "IllegalLocationConstraintException":
		return backup.Hint(err, s.hintRegion(err))
	case c == "ExpiredToken", c == "ExpiredTokenException", c == "TokenRefreshRequired":
		return backup.Hint(err, "the credentials have expired: renew them, or use the instance's role, which renews itself")
	case c == "InvalidAccessKeyId", c == "SignatureDoesNotMatch", c == "InvalidToken", c == "InvalidClientTokenId":
		return backup.Hint(err, "these credentials are not the server's: see AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN of the user that runs cleancut")
	case c == "RequestTimeTooSkewed":
		return backup.Hint(err, "set this host's clock")
	case status(err) == http.StatusForbidden:
		return backup.Hint(err, "the role or user needs s3:ListBucket and s3:ListBucketMultipartUploads on the bucket, and s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListMultipartUploadParts on its objects (and the KMS key, if it is encrypted with one)")
	case status(err) == http.StatusNotImplemented:
		return backup.Hint(fmt.Errorf("%w: %w", backup.ErrUnsupported, err), "the server must know conditional writes (If-None-Match) and multipart uploads")
	case status(err) == 0 && errors.As(err, &dial):
		return backup.Hint(err, "is the endpoint right and does it answer? Servers other than Amazon's mostly need ?path_style=true as well")
	}
	return err
}

func (s *S3) hintRegion(err error) string {
	region := "REGION"
	var answer *smithyhttp.ResponseError
	if errors.As(err, &answer) && answer.Response != nil {
		if r := answer.Response.Header.Get("X-Amz-Bucket-Region"); r != "" {
			region = r
		}
	}
	return "the bucket is in another region: add ?region=" + region + " to the catalog's location"
}
