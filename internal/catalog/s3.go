package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"cleancut/internal/backup"
)

// S3 is a Store in a bucket of S3 or of a server that speaks its protocol: a
// key is the name of an S3 object, below the prefix of the location. The
// bucket must exist. The server must honour If-None-Match on PutObject and
// CompleteMultipartUpload, by which it is decided who is first, and show what
// was written at once; Amazon S3 does both.
//
// Needed permissions: s3:ListBucket, s3:ListBucketMultipartUploads,
// s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and
// s3:ListMultipartUploadParts.
//
// Checksums: CRC32 of every object and part, computed here and sent as a
// header, with the CRC32 of the whole at the end of a multipart upload; what
// the server returns of them is checked while an object is read. A server that
// knows none ignores them; then TLS alone guards the way.
type S3 struct {
	at    bucket
	page  int32         // most objects in one answer; 0: the server's choice
	pause time.Duration // longest pause between two attempts; 0: the SDK's
	sizes sizes

	mu     sync.Mutex // guards client
	client *s3.Client
}

// bucket is what the location of a catalog in S3 says.
type bucket struct {
	name      string
	prefix    string // "" or ending in a slash
	endpoint  string
	region    string
	pathStyle bool
}

const hintS3 = "give s3://BUCKET/PREFIX, with ?region=REGION, ?endpoint=https://HOST:PORT and ?path_style=true where they are needed, and no password: the SDK finds credentials itself"

// parseBucket reads "s3://bucket/prefix?region=…&endpoint=…&path_style=true".
func parseBucket(u *url.URL) (bucket, error) {
	b := bucket{name: u.Host, prefix: strings.Trim(u.Path, "/")}
	wrong := func(format string, args ...any) (bucket, error) {
		return bucket{}, backup.Hint(fmt.Errorf("%w: catalog %s: "+format, append([]any{backup.ErrUsage, "s3://" + u.Host + u.Path}, args...)...), hintS3)
	}
	query, err := url.ParseQuery(u.RawQuery)
	switch {
	case u.User != nil:
		return wrong("a location holds no password")
	case b.name == "" || u.Port() != "" || strings.ContainsAny(b.name, "%:"):
		return wrong("bucket %q", b.name)
	case u.Fragment != "" || err != nil:
		return wrong("no URL of a bucket")
	}
	if b.prefix != "" {
		if err := CheckKey(b.prefix); err != nil {
			return wrong("its prefix: %w", err)
		}
		b.prefix += "/"
	}
	for name, values := range query {
		value := values[len(values)-1]
		switch name {
		case "region":
			b.region = value
		case "endpoint":
			b.endpoint = value
			if e, err := url.Parse(value); err != nil || e.Host == "" || e.User != nil || e.Scheme != "http" && e.Scheme != "https" {
				return wrong("endpoint is no URL like https://HOST:PORT")
			}
		case "path_style":
			if b.pathStyle = value == "true"; value != "true" && value != "false" {
				return wrong("path_style=%q is neither true nor false", value)
			}
		default:
			return wrong("unknown parameter %q", name)
		}
	}
	return b, nil
}

// fit is CheckKey for the whole name: S3's limit holds for prefix and key.
func (s *S3) fit(key string) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if n := len(s.at.prefix) + len(key); n > 1024 {
		return fmt.Errorf("%w: key %q with its prefix has %d bytes, S3 takes 1024", backup.ErrUsage, key, n)
	}
	return nil
}

// Put sends what r yields as one object, in parts if it is large, on the
// condition that there is none yet. Each Put marks its object with a token of
// its own, by which it knows it again after a lost answer. A Put whose ctx
// ends takes back what the server has finished by then; what it finishes still
// later stays, as after a lost answer.
func (s *S3) Put(ctx context.Context, key string, r io.Reader) error {
	if err := check(ctx, s.fit(key)); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	client, err := s.open(ctx)
	if err == nil {
		err = newUpload(client, s.at.name, s.at.prefix+key, s.sizes).put(ctx, r)
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, s.explain(ctx, err))
	}
	return nil
}

// Get opens the object. The checksum, if the server gives one, is compared at
// its end; one that differs is the last Read's error.
func (s *S3) Get(ctx context.Context, key string) (io.ReadCloser, error) {
	if err := check(ctx, s.fit(key)); err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	client, err := s.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, s.explain(ctx, err))
	}
	out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.at.name, Key: aws.String(s.at.prefix + key)})
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, s.explain(ctx, err))
	}
	return struct {
		io.Reader
		io.Closer
	}{reader{ctx, out.Body}, out.Body}, nil
}

// List asks page by page. Objects whose names are no keys are other people's.
func (s *S3) List(ctx context.Context, prefix string) ([]Object, error) {
	if err := check(ctx, CheckPrefix(prefix)); err != nil {
		return nil, fmt.Errorf("list %q: %w", prefix, err)
	}
	client, err := s.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("list %q: %w", prefix, s.explain(ctx, err))
	}
	in := &s3.ListObjectsV2Input{Bucket: &s.at.name, Prefix: aws.String(s.at.prefix + prefix), EncodingType: types.EncodingTypeUrl}
	if s.page > 0 {
		in.MaxKeys = &s.page
	}
	var out []Object
	for pages := s3.NewListObjectsV2Paginator(client, in); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", prefix, s.explain(ctx, err))
		}
		for _, o := range page.Contents {
			name, err := decoded(aws.ToString(o.Key), page.EncodingType)
			key, below := strings.CutPrefix(name, s.at.prefix)
			if err != nil || !below || CheckKey(key) != nil {
				continue
			}
			out = append(out, Object{Key: key, Size: backup.Bytes(aws.ToInt64(o.Size)), Modified: aws.ToTime(o.LastModified)})
		}
	}
	slices.SortFunc(out, func(a, b Object) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// decoded undoes the encoding of names in lists, without which a name with a
// control character of somebody else makes the whole answer unreadable XML.
func decoded(name string, e types.EncodingType) (string, error) {
	if e != types.EncodingTypeUrl {
		return name, nil
	}
	return url.QueryUnescape(name)
}

// Delete deletes the object. In a bucket with versions the old one stays as a
// version.
func (s *S3) Delete(ctx context.Context, key string) error {
	if err := check(ctx, s.fit(key)); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	client, err := s.open(ctx)
	if err == nil {
		_, err = client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.at.name, Key: aws.String(s.at.prefix + key)})
	}
	if err != nil && code(err) != "NoSuchKey" {
		return fmt.Errorf("delete %s: %w", key, s.explain(ctx, err))
	}
	return nil
}

// catalogFolder is where every key of a Catalog begins.
const catalogFolder = "clusters/"

// Tidy ends the multipart uploads of catalog objects that were begun, and got
// their last part, more than olderThan ago, and returns how many. It leaves
// what lies elsewhere in the bucket alone. A Put that is still at work but
// stalled for that long fails; a day is safe.
func (s *S3) Tidy(ctx context.Context, olderThan time.Duration) (int, error) {
	client, err := s.open(ctx)
	if err != nil {
		return 0, fmt.Errorf("tidy: %w", s.explain(ctx, err))
	}
	removed := 0
	in := &s3.ListMultipartUploadsInput{Bucket: &s.at.name, Prefix: aws.String(s.at.prefix + catalogFolder)}
	for pages := s3.NewListMultipartUploadsPaginator(client, in); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if code(err) == "NoSuchUpload" { // what gofakes3 says of a bucket that never had one
			return removed, nil
		}
		if err != nil {
			return removed, fmt.Errorf("tidy: %w", s.explain(ctx, err))
		}
		for _, u := range page.Uploads {
			if !strings.HasPrefix(aws.ToString(u.Key), *in.Prefix) {
				continue
			}
			gone, err := s.tidyOne(ctx, client, u, olderThan)
			if err != nil {
				return removed, fmt.Errorf("tidy %s: %w", aws.ToString(u.Key), s.explain(ctx, err))
			}
			if gone {
				removed++
			}
		}
	}
	return removed, nil
}

// tidyOne ends one upload if it is old. A long one is as old as its last part.
func (s *S3) tidyOne(ctx context.Context, client *s3.Client, u types.MultipartUpload, olderThan time.Duration) (bool, error) {
	last := aws.ToTime(u.Initiated)
	if time.Since(last) < olderThan {
		return false, nil
	}
	in := &s3.ListPartsInput{Bucket: &s.at.name, Key: u.Key, UploadId: u.UploadId}
	for pages := s3.NewListPartsPaginator(client, in); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if code(err) == "NoSuchUpload" { // ended since it was listed
			return false, nil
		}
		if err != nil {
			return false, err
		}
		for _, p := range page.Parts {
			if t := aws.ToTime(p.LastModified); t.After(last) {
				last = t
			}
		}
	}
	if time.Since(last) < olderThan {
		return false, nil
	}
	_, err := client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.at.name, Key: u.Key, UploadId: u.UploadId})
	if err != nil && code(err) != "NoSuchUpload" {
		return false, err
	}
	return true, nil
}

var _ Store = (*S3)(nil)

// errNoRegion and errNoCredentials are said before the first call.
var (
	errNoRegion      = errors.New("no AWS region is set")
	errNoCredentials = errors.New("no AWS credentials")
)
