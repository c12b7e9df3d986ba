package catalog_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/catalog/catalogtest"
	"cleancut/internal/catalog/s3test"
)

// little fits into one request, much needs three parts.
const little = "content"

func much() string { return strings.Repeat("0123456789abcdef", catalogtest.Part()*5/2/16) }

// uploads counts the multipart uploads under clusters/ and ends them.
func uploads(t *testing.T, s *catalog.S3) int {
	t.Helper()
	n, err := s.Tidy(t.Context(), -time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestALostAnswerIsNoFailureAndNeverExists(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		for _, c := range []struct {
			name, content string
			fault         s3test.Fault
		}{
			{"put whose answer is lost once", little, s3test.Fault{Operation: "PutObject", Times: 1, Lose: true}},
			{"put whose answers are all lost", little, s3test.Fault{Operation: "PutObject", Times: 8, Lose: true}},
			{"put that is cut off before its effect", little, s3test.Fault{Operation: "PutObject", Times: 1, Cut: true}},
			{"part whose answer is lost", much(), s3test.Fault{Operation: "UploadPart", Times: 1, Lose: true}},
			{"completion whose answer is lost once", much(), s3test.Fault{Operation: "CompleteMultipartUpload", Times: 1, Lose: true}},
			{"completion whose answers are all lost", much(), s3test.Fault{Operation: "CompleteMultipartUpload", Times: 8, Lose: true}},
			{"beginning whose answer is lost", much(), s3test.Fault{Operation: "CreateMultipartUpload", Times: 1, Lose: true}},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := store(t, endpoint, strings.ReplaceAll(c.name, " ", "-"))
				front.Inject(c.fault)
				put(t, s, "clusters/main/k", c.content)
				if left := front.Left(); len(left) > 0 {
					t.Errorf("faults that no request met: %v", left)
				}
				if got := get(t, s, "clusters/main/k"); got != c.content {
					t.Errorf("got %d other bytes, want %d", len(got), len(c.content))
				}
				if err := s.Put(t.Context(), "clusters/main/k", strings.NewReader(c.content)); !errors.Is(err, backup.ErrExists) {
					t.Errorf("the same again: got %v, want %v", err, backup.ErrExists)
				}
				// A beginning that nobody heard of is what Tidy is for.
				if got, want := uploads(t, s), map[bool]int{true: 1}[c.fault.Operation == "CreateMultipartUpload"]; got != want {
					t.Errorf("got %d uploads left, want %d", got, want)
				}
			})
		}
	})
}

func TestALostAnswerNeverHidesOrOverwritesWhatAnotherPut(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		for operation, content := range map[string]string{"PutObject": little, "CompleteMultipartUpload": much()} {
			t.Run(operation, func(t *testing.T) {
				s, other := store(t, endpoint, operation), store(t, endpoint, operation)
				front.Inject(s3test.Fault{Operation: operation, Times: 1, Cut: true, Call: func() { put(t, other, "clusters/main/k", "another's") }})
				if err := s.Put(t.Context(), "clusters/main/k", strings.NewReader(content)); !errors.Is(err, backup.ErrExists) {
					t.Errorf("got %v, want %v", err, backup.ErrExists)
				}
				if got := get(t, s, "clusters/main/k"); got != "another's" {
					t.Errorf("got %.20q, want %q", got, "another's")
				}
				if n := uploads(t, s); n != 0 {
					t.Errorf("%d uploads are left", n)
				}
			})
		}
	})
}

func TestThrottlingIsWaitedOut(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		s := store(t, endpoint, "slow")
		for _, operation := range []string{"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "GetObject", "HeadObject", "ListObjectsV2", "DeleteObject", "ListMultipartUploads"} {
			front.Inject(s3test.Fault{Operation: operation, Times: 4, Status: 503, Code: "SlowDown"})
		}
		put(t, s, "clusters/main/little", little)
		put(t, s, "clusters/main/much", much())
		if get(t, s, "clusters/main/little") != little || get(t, s, "clusters/main/much") != much() {
			t.Error("what was put did not come back")
		}
		if got, want := keys(t, s), "clusters/main/little clusters/main/much"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if err := s.Delete(t.Context(), "clusters/main/little"); err != nil {
			t.Error(err)
		}
		if n := uploads(t, s); n != 0 {
			t.Errorf("%d uploads are left", n)
		}
		if left := front.Left(); len(left) > 0 {
			t.Errorf("faults that no request met: %v", left)
		}
	})
}

func TestThrottlingWithoutEndIsAnErrorThatLeavesNothing(t *testing.T) {
	environment(t)
	front, endpoint := fake(t)
	for operation, content := range map[string]string{"PutObject": little, "UploadPart": much(), "CompleteMultipartUpload": much()} {
		s := store(t, endpoint, operation)
		front.Inject(s3test.Fault{Operation: operation, Times: 8, Status: 503, Code: "SlowDown"})
		if err := s.Put(t.Context(), "clusters/main/k", strings.NewReader(content)); err == nil || errors.Is(err, backup.ErrExists) || !strings.Contains(err.Error(), "SlowDown") {
			t.Errorf("%s: got %v, want SlowDown", operation, err)
		}
		if got := keys(t, s); got != "" {
			t.Errorf("%s: %q is there", operation, got)
		}
		if n := uploads(t, s); n != 0 {
			t.Errorf("%s: %d uploads are left", operation, n)
		}
	}
}

func TestTheSDKsOwnVariableSaysHowOftenIsTried(t *testing.T) {
	environment(t)
	t.Setenv("AWS_MAX_ATTEMPTS", "3")
	front, endpoint := fake(t)
	front.Inject(s3test.Fault{Operation: "ListObjectsV2", Times: -1, Status: 503, Code: "SlowDown"})
	if _, err := store(t, endpoint, "x").List(t.Context(), ""); err == nil || front.Calls("ListObjectsV2") != 3 {
		t.Errorf("got %v after %d attempts, want 3", err, front.Calls("ListObjectsV2"))
	}
}

func TestACancelledPutTakesBackWhatTheServerFinished(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		for operation, content := range map[string]string{"PutObject": little, "CreateMultipartUpload": much(), "UploadPart": much(), "CompleteMultipartUpload": much()} {
			for _, lose := range []bool{false, true} {
				t.Run(operation+map[bool]string{true: " after its effect", false: " before its effect"}[lose], func(t *testing.T) {
					s := store(t, endpoint, operation)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					front.Inject(s3test.Fault{Operation: operation, Times: 1, Lose: lose, Cut: !lose, Call: cancel})
					if err := s.Put(ctx, "clusters/main/k", strings.NewReader(content)); !errors.Is(err, context.Canceled) {
						t.Errorf("got %v, want %v", err, context.Canceled)
					}
					if got := keys(t, s); got != "" {
						t.Errorf("%q is there", got)
					}
					// The answer to the beginning holds the name by which it could be ended.
					if n := uploads(t, s); n != 0 && operation != "CreateMultipartUpload" {
						t.Errorf("%d uploads are left", n)
					}
				})
			}
		}
	})
}

func TestAConflictWithADeletionIsTriedAgain(t *testing.T) {
	environment(t)
	front, endpoint := fake(t)
	s := store(t, endpoint, "x")
	front.Inject(s3test.Fault{Operation: "PutObject", Times: 3, Status: 409, Code: "ConditionalRequestConflict"})
	put(t, s, "clusters/main/k", little)
	front.Inject(s3test.Fault{Operation: "CompleteMultipartUpload", Times: 1, Status: 409, Code: "ConditionalRequestConflict"})
	err := s.Put(t.Context(), "clusters/main/l", strings.NewReader(much()))
	if err == nil || errors.Is(err, backup.ErrExists) || !strings.Contains(err.Error(), "ConditionalRequestConflict") {
		t.Errorf("got %v, want the conflict", err)
	}
	if got := keys(t, s); got != "clusters/main/k" {
		t.Errorf("got %q", got)
	}
	if n := uploads(t, s); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
}

func TestARefusalWhoseReasonCannotBeSeenIsNotTakenForExists(t *testing.T) {
	environment(t)
	front, endpoint := fake(t)
	s := store(t, endpoint, "x")
	front.Inject(s3test.Fault{Operation: "PutObject", Times: 1, Lose: true})
	front.Inject(s3test.Fault{Operation: "HeadObject", Times: 1, Status: 403, Code: "AccessDenied"})
	if err := s.Put(t.Context(), "clusters/main/k", strings.NewReader(little)); err == nil || errors.Is(err, backup.ErrExists) {
		t.Errorf("got %v, want an error that is not %v", err, backup.ErrExists)
	}
}

func TestADamagedOrShortAnswerIsAnError(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		s := store(t, endpoint, "x")
		for key, content := range map[string]string{"clusters/main/little": little, "clusters/main/much": much()} {
			put(t, s, key, content)
			for _, f := range []s3test.Fault{{Operation: "GetObject", Times: 1, Half: true}, {Operation: "GetObject", Times: 1, Spoil: true}} {
				front.Inject(f)
				r, err := s.Get(t.Context(), key)
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(r)
				_ = r.Close()
				if f.Spoil && strings.Contains(t.Name(), "gofakes3") && key == "clusters/main/much" {
					continue // it keeps no checksum of what came in parts
				}
				if err == nil {
					t.Errorf("%s: got %d bytes and no error (half %v)", key, len(b), f.Half)
				}
			}
		}
	})
}

func TestEveryObjectIsSentWithItsChecksumAndOnlyIfThereIsNone(t *testing.T) {
	inBoth(t, func(t *testing.T, front *s3test.Front, endpoint string) {
		s := store(t, endpoint, "x")
		put(t, s, "clusters/main/little", little)
		put(t, s, "clusters/main/much", much())
		for operation, condition := range map[string]string{"PutObject": "*", "UploadPart": "", "CompleteMultipartUpload": "*"} {
			headers := front.Headers(operation)
			if len(headers) == 0 {
				t.Errorf("no %s", operation)
			}
			for _, h := range headers {
				if h.Get("X-Amz-Checksum-Crc32") == "" || h.Get("If-None-Match") != condition || strings.Contains(h.Get("Content-Encoding"), "aws-chunked") {
					t.Errorf("%s: got %v", operation, h)
				}
			}
		}
	})
}

func TestErrorsOfS3SayWhatToDo(t *testing.T) {
	environment(t)
	front, endpoint := fake(t)
	for _, c := range []struct {
		name, location string
		fault          s3test.Fault
		is             error
		hint           string
	}{
		{"no bucket", "s3://other/x?path_style=true&region=us-east-1&endpoint=" + endpoint, s3test.Fault{}, backup.ErrNotFound, "aws s3 mb s3://other"},
		{"access denied", "", s3test.Fault{Status: 403, Code: "AccessDenied"}, nil, "s3:ListBucket"},
		{"wrong region", "", s3test.Fault{Status: 301, Code: "PermanentRedirect", Header: map[string]string{"X-Amz-Bucket-Region": "eu-west-3"}}, nil, "?region=eu-west-3"},
		{"signed for another region", "", s3test.Fault{Status: 400, Code: "AuthorizationHeaderMalformed"}, nil, "?region="},
		{"unknown key", "", s3test.Fault{Status: 403, Code: "InvalidAccessKeyId"}, nil, "AWS_ACCESS_KEY_ID"},
		{"wrong secret", "", s3test.Fault{Status: 403, Code: "SignatureDoesNotMatch"}, nil, "AWS_SECRET_ACCESS_KEY"},
		{"expired credentials", "", s3test.Fault{Status: 400, Code: "ExpiredToken"}, nil, "renew"},
		{"clock", "", s3test.Fault{Status: 403, Code: "RequestTimeTooSkewed"}, nil, "clock"},
		{"a server without it", "", s3test.Fault{Status: 501, Code: "NotImplemented"}, backup.ErrUnsupported, "conditional writes"},
		{"nobody answers", "s3://x/y?path_style=true&endpoint=http://127.0.0.1:1", s3test.Fault{}, nil, "path_style=true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			location := c.location
			if location == "" {
				location = s3test.Location(endpoint, "x")
			}
			opened, err := catalog.Open(location)
			if err != nil {
				t.Fatal(err)
			}
			s := catalog.Hasten(opened, 0, 0, 0)
			for _, operation := range []string{"PutObject", "ListObjectsV2", "GetObject", "DeleteObject"} {
				if c.fault.Code != "" {
					c.fault.Operation, c.fault.Times = operation, 1
					front.Inject(c.fault)
				}
			}
			_, errList := s.List(t.Context(), "")
			_, errGet := s.Get(t.Context(), "k")
			for method, err := range map[string]error{"list": errList, "get": errGet, "put": s.Put(t.Context(), "k", strings.NewReader("x")), "delete": s.Delete(t.Context(), "k")} {
				if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(backup.HintOf(err), c.hint) || errors.Is(err, backup.ErrExists) {
					t.Errorf("%s: got %v (hint %q), want %v and a hint with %q", method, err, backup.HintOf(err), c.is, c.hint)
				}
			}
			if left := front.Left(); len(left) > 0 {
				t.Errorf("faults that no request met: %v", left)
			}
		})
	}
}

func TestWithoutCredentialsOrRegionNothingIsSent(t *testing.T) {
	for name, c := range map[string]struct{ location, variable, want, hint string }{
		"no credentials": {"s3://bucket/x?region=eu-central-1", "AWS_SECRET_ACCESS_KEY", "no AWS credentials", "role"},
		"no region":      {"s3://bucket/x", "AWS_REGION", "no AWS region", "?region=REGION"},
	} {
		t.Run(name, func(t *testing.T) {
			environment(t)
			t.Setenv(c.variable, "")
			s, err := catalog.Open(c.location)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.List(t.Context(), "")
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(backup.HintOf(err), c.hint) {
				t.Errorf("got %v (hint %q), want %q and a hint with %q", err, backup.HintOf(err), c.want, c.hint)
			}
		})
	}
}

func TestTheSDKsOwnVariableNamesTheEndpoint(t *testing.T) {
	environment(t)
	_, endpoint := fake(t)
	t.Setenv("AWS_ENDPOINT_URL_S3", endpoint)
	s, err := catalog.Open("s3://" + s3test.Bucket + "/x?path_style=true")
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", little)
	if got := get(t, store(t, endpoint, "x"), "k"); got != little {
		t.Errorf("got %q", got)
	}
}

func TestAPrefixHidesWhatLiesBesideIt(t *testing.T) {
	environment(t)
	_, endpoint := fake(t)
	for _, prefix := range []string{"a", "a/b", "ab", ""} {
		put(t, store(t, endpoint, prefix), "clusters/of-"+strings.ReplaceAll(prefix, "/", "-"), little)
	}
	for prefix, want := range map[string]string{"a": "b/clusters/of-a-b clusters/of-a", "a/b": "clusters/of-a-b", "ab": "clusters/of-ab", "b": ""} {
		if got := keys(t, store(t, endpoint, prefix)); got != want {
			t.Errorf("%q: got %q, want %q", prefix, got, want)
		}
	}
	long := store(t, endpoint, strings.Repeat("p", 200))
	if err := long.Put(t.Context(), strings.TrimSuffix(strings.Repeat("kkkkkkkkk/", 90), "/"), strings.NewReader("x")); !errors.Is(err, backup.ErrUsage) {
		t.Errorf("a name of 1100 bytes: got %v, want %v", err, backup.ErrUsage)
	}
}

// clock is a server's clock that the test sets.
type clock struct{ now atomic.Pointer[time.Time] }

func (c *clock) Now() time.Time                  { return *c.now.Load() }
func (c *clock) Since(t time.Time) time.Duration { return c.Now().Sub(t) }

func TestTidyEndsOnlyOldUploadsOfACatalog(t *testing.T) {
	environment(t)
	now := time.Now()
	before := now.Add(-48 * time.Hour)
	server := &clock{}
	server.now.Store(&before)
	h, err := s3test.Fake(gofakes3.WithTimeSource(server), gofakes3.WithTimeSkewLimit(0))
	if err != nil {
		t.Fatal(err)
	}
	front := s3test.NewFront(h)
	endpoint, stop, err := s3test.Serve(front)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stop() }()
	s := store(t, endpoint, "p")
	begun := func(key string) (*io.PipeWriter, chan error) {
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() { done <- s.Put(t.Context(), key, r) }()
		if _, err := io.Copy(w, io.LimitReader(strings.NewReader(much()), int64(catalogtest.Part())+1)); err != nil {
			t.Fatal(err)
		}
		return w, done
	}
	sent := func(n int) {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for front.Answered("UploadPart") < n {
			<-tick.C
		}
	}
	// A long one that got its last part just now, one that died with its
	// process, and one of somebody else.
	long, longDone := begun("clusters/main/backups/x/dumps/long")
	sent(1)
	dead, deadDone := begun("clusters/main/backups/x/dumps/dead")
	sent(2)
	foreign, foreignDone := begun("theirs/k")
	sent(3)
	server.now.Store(&now)
	if _, err := long.Write(bytes.Repeat([]byte("x"), catalogtest.Part())); err != nil {
		t.Fatal(err)
	}
	sent(4)
	if n, err := s.Tidy(t.Context(), 24*time.Hour); n != 1 || err != nil {
		t.Errorf("got %d, %v, want 1", n, err)
	}
	for _, w := range []*io.PipeWriter{long, dead, foreign} {
		_ = w.Close()
	}
	if err := errors.Join(<-longDone, <-foreignDone); err != nil {
		t.Error(err)
	}
	if err := <-deadDone; err == nil || errors.Is(err, backup.ErrExists) {
		t.Errorf("the dead one came back to life: %v", err)
	}
	if got, want := keys(t, s), "clusters/main/backups/x/dumps/long theirs/k"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAnUploadGrowsItsPartsAndEndsAtTheirLimit(t *testing.T) {
	environment(t)
	_, endpoint := fake(t)
	opened, err := catalog.Open(s3test.Location(endpoint, "x"))
	if err != nil {
		t.Fatal(err)
	}
	s := catalog.Hasten(opened, 0, 1000, 100)
	// Ten parts of 1000 bytes, ninety of 2000.
	for size, fits := range map[int]bool{10_000: true, 10_001: true, 12_000: true, 17_005: true, 190_000: true, 190_001: false} {
		sent := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{}).Read(sent)
		key := fmt.Sprint("clusters/", size)
		err := s.Put(t.Context(), key, bytes.NewReader(sent))
		if fits && (err != nil || get(t, s, key) != string(sent)) {
			t.Errorf("%d bytes: got %v or other bytes", size, err)
		}
		if !fits && (!errors.Is(err, backup.ErrUnsupported) || !strings.Contains(backup.HintOf(err), "--to FILE")) {
			t.Errorf("%d bytes: got %v (hint %q), want %v", size, err, backup.HintOf(err), backup.ErrUnsupported)
		}
	}
	if n := uploads(t, s); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
}
