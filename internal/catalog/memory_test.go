package catalog_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/catalog"
	"cleancut/internal/catalog/s3test"
)

// heap is what the whole program may take (design.md), and growth how much
// more a large object may need than a small one of many parts.
const (
	heap   = 64 << 20
	growth = 8 << 20
)

// bottomless is an S3 server that keeps nothing: gofakes3 would keep all.
func bottomless(size int64) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("ETag", `"x"`)
		switch s3test.Operation(r) {
		case "HeadObject":
			w.WriteHeader(http.StatusNotFound)
		case "CreateMultipartUpload":
			_, _ = io.WriteString(w, `<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>`)
		case "CompleteMultipartUpload":
			_, _ = io.WriteString(w, `<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>`)
		case "GetObject":
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
			_, _ = io.Copy(w, io.LimitReader(zeros{}, size))
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestMemoryDoesNotGrowWithTheObject(t *testing.T) {
	if testing.Short() {
		t.Skip("moves gigabytes: run `make test`")
	}
	for _, mode := range []string{"s3 put", "s3 get"} {
		peak := map[int64]int64{}
		sizes := []int64{48 << 20, 2 << 30}
		for _, size := range sizes {
			endpoint, stop, err := s3test.Serve(bottomless(size))
			if err != nil {
				t.Fatal(err)
			}
			child := exec.CommandContext(t.Context(), os.Args[0])
			child.Env = append(os.Environ(), "CATALOG_CHILD="+mode, "CATALOG_LOCATION="+s3test.Location(endpoint, "x"), fmt.Sprint("CATALOG_SIZE=", size))
			for k, v := range s3test.Environment() {
				child.Env = append(child.Env, k+"="+v)
			}
			out, err := child.CombinedOutput()
			if err != nil {
				t.Fatalf("%s of %v: %v\n%s", mode, backup.Bytes(size), err, out)
			}
			if peak[size], err = strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64); err != nil {
				t.Fatalf("%s of %v: %s", mode, backup.Bytes(size), out)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			t.Logf("NOTE %s of %v: the process took %v at most", mode, backup.Bytes(size), backup.Bytes(peak[size]))
		}
		if a, b := peak[sizes[0]], peak[sizes[1]]; b > heap || b-a > growth {
			t.Errorf("%s: %v for %v and %v for %v, want at most %v and %v more", mode, backup.Bytes(a), backup.Bytes(sizes[0]), backup.Bytes(b), backup.Bytes(sizes[1]), backup.Bytes(heap), backup.Bytes(growth))
		}
	}
}

// putMuch and getMuch are the children: they print their peak.
func putMuch() {
	s, size := ordered()
	report(s.Put(context.Background(), "clusters/main/k", io.LimitReader(zeros{}, size)))
}

func getMuch() {
	s, size := ordered()
	r, err := s.Get(context.Background(), "clusters/main/k")
	if err == nil {
		var n int64
		if n, err = io.Copy(io.Discard, r); err == nil && n != size {
			err = fmt.Errorf("got %d bytes, want %d", n, size)
		}
	}
	report(err)
}

func ordered() (catalog.Store, int64) {
	s, err := catalog.Open(os.Getenv("CATALOG_LOCATION"))
	size, err2 := strconv.ParseInt(os.Getenv("CATALOG_SIZE"), 10, 64)
	if err != nil || err2 != nil {
		report(fmt.Errorf("%w %w", err, err2))
	}
	return s, size
}

func report(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			fmt.Println(kib << 10)
		}
	}
	os.Exit(0)
}
