package catalog_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"cleancut/internal/catalog"
	"cleancut/internal/catalog/catalogtest"
	"cleancut/internal/catalog/s3test"
)

// gateway builds versitygw once for all tests of this process.
type gateway struct {
	once sync.Once
	dir  string
	err  error
}

var built gateway

func (g *gateway) binary(t *testing.T) string {
	t.Helper()
	g.once.Do(func() {
		if g.dir, g.err = os.MkdirTemp("", "cleancut-versitygw-"); g.err == nil {
			g.err = s3test.BuildGateway(context.WithoutCancel(t.Context()), filepath.Join("..", ".."), filepath.Join(g.dir, "versitygw"))
		}
	})
	if g.err != nil {
		t.Fatal(g.err)
	}
	return filepath.Join(g.dir, "versitygw")
}

// environment lets the SDK into the test servers and nowhere else.
func environment(t *testing.T) {
	t.Helper()
	for k, v := range s3test.Environment() {
		t.Setenv(k, v)
	}
}

// fake starts gofakes3 behind a Front.
func fake(t *testing.T) (*s3test.Front, string) {
	t.Helper()
	h, err := s3test.Fake()
	if err != nil {
		t.Fatal(err)
	}
	front := s3test.NewFront(h)
	endpoint, stop, err := s3test.Serve(front)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return front, endpoint
}

// versity starts versitygw, and a Front before it.
func versity(t *testing.T) (*s3test.Front, string) {
	t.Helper()
	g, err := s3test.StartGateway(context.WithoutCancel(t.Context()), built.binary(t), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Stop(); err != nil {
			t.Error(err)
		}
	})
	target, err := url.Parse(g.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	// The signature is over the Host that the client saw.
	front := s3test.NewFront(&httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host
	}})
	endpoint, stop, err := s3test.Serve(front)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return front, endpoint
}

// inBoth runs a test on both servers.
func inBoth(t *testing.T, test func(t *testing.T, front *s3test.Front, endpoint string)) {
	t.Run("gofakes3", func(t *testing.T) {
		environment(t)
		front, endpoint := fake(t)
		test(t, front, endpoint)
	})
	t.Run("versitygw", func(t *testing.T) {
		if testing.Short() {
			t.Skip("builds versitygw: run `make test`")
		}
		environment(t)
		front, endpoint := versity(t)
		test(t, front, endpoint)
	})
}

func store(t *testing.T, endpoint, prefix string) *catalog.S3 {
	t.Helper()
	s, err := catalog.Open(s3test.Location(endpoint, prefix))
	if err != nil {
		t.Fatal(err)
	}
	return catalog.Hasten(s, 3, catalogtest.Part(), 0)
}

func TestS3IsAStore(t *testing.T) {
	inBoth(t, func(t *testing.T, _ *s3test.Front, endpoint string) {
		n := 0
		catalogtest.Run(t, func(t *testing.T) catalog.Store {
			n++
			return store(t, endpoint, fmt.Sprintf("%d/be low+", n))
		})
	})
}
