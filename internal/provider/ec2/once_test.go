package ec2_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
)

// rawEC2 answers what Prepare asks and lets misbehave answer the calls of the
// cut, which it counts by volume ("" for CreateSnapshots). It is plain HTTP, so
// that what the SDK and net/http would repeat is seen on the wire.
type rawEC2 struct {
	misbehave func(w http.ResponseWriter, r *http.Request)
	others    int // volumes of the instance beside the first, if more than the usual ones

	mu    sync.Mutex
	calls map[string]int
}

const rawVolumes = 4

func rawID(i int) string { return fmt.Sprintf("vol-%017d", i) }

func rawTags() backup.Tags {
	return backup.Tags{backup.TagBackup: "20261123T000000Z-abcdef", backup.TagCluster: "raw"}
}

func (s *rawEC2) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(strings.NewReader(string(body)))
	if err := r.ParseForm(); err != nil {
		return
	}
	action := r.PostForm.Get("Action")
	if strings.HasPrefix(action, "CreateSnapshot") {
		if r.PostForm.Get("DryRun") == "true" {
			rawError(w, http.StatusPreconditionFailed, "DryRunOperation")
			return
		}
		s.mu.Lock()
		s.calls[r.PostForm.Get("VolumeId")]++
		s.mu.Unlock()
		s.misbehave(w, r)
		return
	}
	inner := ""
	switch action {
	case "DescribeVolumes":
		for i := range rawVolumes {
			inner += fmt.Sprintf(`<item><volumeId>%s</volumeId><size>1</size><status>in-use</status><volumeType>gp3</volumeType><attachmentSet><item><volumeId>%s</volumeId><instanceId>%s</instanceId><device>/dev/sd%c</device><status>attached</status></item></attachmentSet></item>`, rawID(i), rawID(i), instanceA, 'f'+i)
		}
		inner = "<volumeSet>" + inner + "</volumeSet>"
	case "DescribeInstances":
		for i := range max(rawVolumes, 1+s.others) {
			inner += fmt.Sprintf(`<item><deviceName>/dev/sd%c</deviceName><ebs><volumeId>%s</volumeId><status>attached</status></ebs></item>`, 'f'+i, rawID(i))
		}
		inner = `<reservationSet><item><instancesSet><item><instanceId>` + instanceA + `</instanceId><rootDeviceName>/dev/xvda</rootDeviceName><blockDeviceMapping>` + inner + `</blockDeviceMapping></item></instancesSet></item></reservationSet>`
	case "DescribeSnapshots":
		inner = "<snapshotSet/>"
	}
	_, _ = fmt.Fprintf(w, `<%sResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>r</requestId>%s</%sResponse>`, action, inner, action)
}

func rawError(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `<Response><Errors><Error><Code>%s</Code><Message>as planned</Message></Error></Errors><RequestID>r</RequestID></Response>`, code)
}

// cutConnection closes a connection without an answer, with a reset or not.
func cutConnection(w http.ResponseWriter, reset bool) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok && reset {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// misdeeds are all that the SDK, or net/http below it, might answer with
// another request.
func misdeeds() map[string]func(w http.ResponseWriter, r *http.Request) {
	status := func(code int, name string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { rawError(w, code, name) }
	}
	redirect := func(code int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://"+r.Host+"/elsewhere")
			rawError(w, code, "Redirect")
		}
	}
	return map[string]func(w http.ResponseWriter, r *http.Request){
		"500":                  status(500, "InternalError"),
		"502 without a body":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) },
		"503":                  status(503, "Unavailable"),
		"429 with Retry-After": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Retry-After", "0"); w.WriteHeader(429) },
		"throttled":            status(503, "RequestLimitExceeded"),
		"throttled otherwise":  status(400, "Throttling"),
		"expired credentials":  status(400, "RequestExpired"),
		"expired token":        status(403, "ExpiredToken"),
		"too often":            status(400, "SnapshotCreationPerVolumeRateExceeded"),
		"307":                  redirect(307),
		"308":                  redirect(308),
		"302":                  redirect(302),
		"connection closed":    func(w http.ResponseWriter, _ *http.Request) { cutConnection(w, false) },
		"connection reset":     func(w http.ResponseWriter, _ *http.Request) { cutConnection(w, true) },
		"half an answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "999")
			_, _ = io.WriteString(w, "<Crea")
		},
		"an answer that is no XML":  func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "moved to the cloud") },
		"an answer without content": func(w http.ResponseWriter, _ *http.Request) {},
		"a clock that is off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat))
			rawError(w, 403, "SignatureDoesNotMatch")
		},
		"no answer": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	}
}

// TestNoCallOfACutIsSentTwice is the promise that the whole design rests on:
// CreateSnapshot has no client token, so a second request is a second snapshot.
func TestNoCallOfACutIsSentTwice(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAEC2SIM0000000000")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "none")
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	// Whatever the environment asks for.
	t.Setenv("AWS_MAX_ATTEMPTS", "9")
	t.Setenv("AWS_RETRY_MODE", "adaptive")
	for name, misbehave := range misdeeds() {
		for _, group := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, group %v", name, group), func(t *testing.T) {
				s := &rawEC2{misbehave: misbehave, calls: map[string]int{}}
				h := httptest.NewServer(s)
				defer h.Close()
				limit := 20 * time.Second
				if name == "no answer" {
					limit = 200 * time.Millisecond
				}
				err := takeOnce(t, ec2.Attempt(ec2.Quick(ec2.Options{Region: region, Endpoint: h.URL, Instance: instanceA}, time.Second), limit), group)
				if err == nil {
					t.Error("no error")
				}
				h.Close() // every request has been seen
				want := rawVolumes
				if group {
					want = 1
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				if len(s.calls) != want {
					t.Errorf("calls: %v", s.calls)
				}
				for volume, n := range s.calls {
					if n != 1 {
						t.Errorf("%d requests for %q", n, volume)
					}
				}
			})
		}
	}
}

func takeOnce(t *testing.T, o ec2.Options, group bool) error {
	t.Helper()
	p, err := ec2.Open(t.Context(), o, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	set := provider.Set{Group: group}
	for i := range rawVolumes {
		set.Members = append(set.Members, provider.Member{Volume: backup.VolumeID(rawID(i)), Tags: rawTags().With(backup.TagMember, fmt.Sprint(i))})
	}
	c, err := p.Prepare(t.Context(), set)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Take(context.WithoutCancel(t.Context()))
	if closed := c.Close(); closed != nil {
		t.Error(closed)
	}
	return err
}
