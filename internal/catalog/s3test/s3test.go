// Package s3test starts S3 servers for tests and breaks their answers on
// command.
//
//	Fake | Gateway (a real process) → Front (counts, faults) → http.Server
//
// What always holds: a Front passes on what no fault meets, unchanged.
package s3test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// Bucket is the bucket that every server of this package has.
const Bucket = "catalog"

// Fake returns gofakes3 in memory with one empty bucket. Version 1.2.0 of it
// ignores If-None-Match on CompleteMultipartUpload: here its backend refuses
// every object that is there already, and a request that forgot the condition
// is answered 400.
func Fake(options ...gofakes3.Option) (http.Handler, error) {
	objects := s3mem.New()
	if err := objects.CreateBucket(Bucket); err != nil {
		return nil, fmt.Errorf("make bucket: %w", err)
	}
	server := gofakes3.New(once{objects}, options...).Server()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if op := Operation(r); (op == "PutObject" || op == "CompleteMultipartUpload") && r.Header.Get("If-None-Match") != "*" {
			http.Error(w, "a catalog's object is only put if there is none", http.StatusBadRequest)
			return
		}
		server.ServeHTTP(w, r)
	}), nil
}

// once is a backend in which nothing can be overwritten.
type once struct{ *s3mem.Backend }

func (o once) PutObject(bucket, object string, meta map[string]string, r io.Reader, size int64, _ *gofakes3.PutConditions) (gofakes3.PutObjectResult, error) {
	any := "*"
	return o.Backend.PutObject(bucket, object, meta, r, size, &gofakes3.PutConditions{IfNoneMatch: &any})
}

// Operation names the S3 action that a request in path style asks for, "" for
// one that a catalog has no use for.
func Operation(r *http.Request) string {
	q := r.URL.Query()
	_, object, _ := strings.Cut(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case object == "" && r.Method == http.MethodGet && q.Has("uploads"):
		return "ListMultipartUploads"
	case object == "" && r.Method == http.MethodGet && q.Get("list-type") == "2":
		return "ListObjectsV2"
	case object == "":
		return ""
	case r.Method == http.MethodPost && q.Has("uploads"):
		return "CreateMultipartUpload"
	case r.Method == http.MethodPost && q.Has("uploadId"):
		return "CompleteMultipartUpload"
	case r.Method == http.MethodPut && q.Has("partNumber"):
		return "UploadPart"
	case r.Method == http.MethodDelete && q.Has("uploadId"):
		return "AbortMultipartUpload"
	case r.Method == http.MethodGet && q.Has("uploadId"):
		return "ListParts"
	}
	return map[string]string{http.MethodPut: "PutObject", http.MethodGet: "GetObject", http.MethodHead: "HeadObject", http.MethodDelete: "DeleteObject"}[r.Method]
}

// Fault says what happens to the next requests of an operation.
type Fault struct {
	Operation string // as Operation names it
	Times     int    // how many requests; negative: all
	// One of these: the effect happens and the answer is lost with its
	// connection; the effect does not happen and the connection is cut; a byte
	// of the answer is another one; half of the answer comes; or the answer is
	// an error of S3 with this status and code.
	Lose, Cut, Spoil, Half bool
	Status                 int
	Code                   string
	Header                 map[string]string // of the error
	// Call is called before the answer or its loss: with Lose after the effect,
	// which then happens also if the client is gone. It may be nil.
	Call func()
}

// Front stands before a server. It may be used by many requests at once.
type Front struct {
	next http.Handler

	mu       sync.Mutex
	faults   []Fault
	calls    map[string]int
	answered map[string]int
	seen     []*http.Request
}

// NewFront puts a Front before next.
func NewFront(next http.Handler) *Front {
	return &Front{next: next, calls: map[string]int{}, answered: map[string]int{}}
}

// Inject adds a fault.
func (f *Front) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fault)
}

// Calls returns how many requests there were of an operation, faulted ones
// too.
func (f *Front) Calls(operation string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[operation]
}

// Answered returns how many requests of an operation came to their end.
func (f *Front) Answered(operation string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.answered[operation]
}

// Left returns the operations of faults that still wait for requests.
func (f *Front) Left() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, fault := range f.faults {
		if fault.Times > 0 {
			out = append(out, fault.Operation)
		}
	}
	return out
}

// Headers returns the headers of every request of an operation.
func (f *Front) Headers(operation string) []http.Header {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []http.Header
	for _, r := range f.seen {
		if Operation(r) == operation {
			out = append(out, r.Header)
		}
	}
	return out
}

func (f *Front) meet(r *http.Request) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	op := Operation(r)
	f.calls[op]++
	f.seen = append(f.seen, &http.Request{Method: r.Method, URL: r.URL, Header: r.Header.Clone()})
	for i := range f.faults {
		fault := &f.faults[i]
		if fault.Operation != op || fault.Times == 0 {
			continue
		}
		fault.Times--
		return *fault, true
	}
	return Fault{}, false
}

// ServeHTTP passes the request on unless a fault meets it.
func (f *Front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, hit := f.meet(r)
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.answered[Operation(r)]++
	}()
	if !hit {
		f.next.ServeHTTP(w, r)
		return
	}
	if fault.Lose {
		f.next.ServeHTTP(lost{http.Header{}}, r.WithContext(context.WithoutCancel(r.Context())))
	}
	if fault.Call != nil {
		fault.Call()
	}
	switch {
	case fault.Lose:
		panic(http.ErrAbortHandler) // cuts the connection without an answer
	case fault.Cut:
		panic(http.ErrAbortHandler)
	case fault.Spoil, fault.Half:
		f.next.ServeHTTP(&damaging{w, fault}, r)
		if fault.Half {
			panic(http.ErrAbortHandler)
		}
		return
	case fault.Status == 0:
		f.next.ServeHTTP(w, r)
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
	for k, v := range fault.Header {
		w.Header().Set(k, v)
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(fault.Status)
	_, _ = fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>as the test wants it</Message><RequestId>0</RequestId></Error>`, fault.Code)
}

// lost takes an answer that nobody gets.
type lost struct{ header http.Header }

func (l lost) Header() http.Header         { return l.header }
func (l lost) Write(p []byte) (int, error) { return len(p), nil }
func (l lost) WriteHeader(int)             {}

// damaging changes the first byte of each piece of an answer, or drops every
// second half.
type damaging struct {
	http.ResponseWriter
	fault Fault
}

func (d *damaging) Write(p []byte) (int, error) {
	if d.fault.Half {
		_, err := d.ResponseWriter.Write(p[:len(p)/2])
		return len(p), errors.Join(err, http.NewResponseController(d.ResponseWriter).Flush())
	}
	return d.ResponseWriter.Write(append([]byte{p[0] ^ 1}, p[1:]...))
}

// Serve serves h on a loopback port until stop, which also waits for the end.
func Serve(h http.Handler) (endpoint string, stop func() error, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)} // gofakes3 writes some headers twice
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	return "http://" + l.Addr().String(), func() error {
		err := server.Close()
		if e := <-ended; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	}, nil
}

// Environment is what the SDK needs to be let in by the servers of this
// package and by nobody else.
func Environment() map[string]string {
	return map[string]string{"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": secretKey, "AWS_SESSION_TOKEN": "", "AWS_PROFILE": "", "AWS_REGION": "",
		"AWS_DEFAULT_REGION": "", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_S3": "", "AWS_MAX_ATTEMPTS": "", "AWS_WEB_IDENTITY_TOKEN_FILE": ""}
}

// What the servers are given as their user. It opens nothing else.
const (
	accessKey = "testaccess"
	secretKey = "testsecret"
)

// Location returns the location of a catalog for catalog.Open.
func Location(endpoint, prefix string) string {
	return "s3://" + Bucket + "/" + prefix + "?endpoint=" + endpoint + "&region=us-east-1&path_style=true"
}
