package ec2sim

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// imdsRole is the name of the role of every instance.
const imdsRole = "ec2sim"

type imdsToken struct {
	instance string
	expires  time.Time
}

// MetadataEndpoint is what AWS_EC2_METADATA_SERVICE_ENDPOINT is to an instance
// where the server has the address base ("http://127.0.0.1:4510"). The instance
// stands there twice: the SDK for Go (imds v1.20.7, serializeRequest) replaces
// the endpoint's path but sends its user, botocore keeps the path.
func MetadataEndpoint(base, instance string) string {
	scheme, host, _ := strings.Cut(base, "://")
	return scheme + "://" + instance + "@" + host + "/imds/" + instance
}

// serveIMDS serves version 2 of the instance metadata service
// (AWSEC2/latest/UserGuide/instancedata-data-retrieval.html).
func (s *Server) serveIMDS(w http.ResponseWriter, r *http.Request) {
	id, _, _ := r.BasicAuth()
	path, bare := strings.CutPrefix(r.URL.Path, "/latest/")
	if !bare {
		id, path, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/imds/"), "/latest/")
	}
	s.mu.Lock()
	i := s.instances[id]
	s.mu.Unlock()
	if i == nil {
		http.Error(w, "no instance "+strconv.Quote(id), http.StatusNotFound)
		return
	}
	if path == "api/token" {
		s.giveToken(w, r, id)
		return
	}
	if r.Method != http.MethodGet {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	s.mu.Lock()
	t, ok := s.imds[r.Header.Get("X-Aws-Ec2-Metadata-Token")]
	s.mu.Unlock()
	if !ok || t.instance != id || time.Now().After(t.expires) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	text, ok := s.metadata(i, strings.TrimSuffix(path, "/"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	_, _ = io.WriteString(w, text) // the client may have gone
}

func (s *Server) giveToken(w http.ResponseWriter, r *http.Request, id string) {
	const header = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	if r.Method != http.MethodPut {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	seconds, err := strconv.Atoi(r.Header.Get(header))
	if err != nil || seconds < 1 || seconds > 21600 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	secret := randomHex(28)
	s.mu.Lock()
	s.imds[secret] = imdsToken{id, time.Now().Add(time.Duration(seconds) * time.Second)}
	s.mu.Unlock()
	w.Header().Set(header, strconv.Itoa(seconds))
	_, _ = io.WriteString(w, secret)
}

func (s *Server) metadata(i *instance, path string) (string, bool) {
	switch path {
	case "dynamic/instance-identity/document":
		return asJSON(map[string]any{"accountId": Account, "architecture": "x86_64", "availabilityZone": i.Zone, "imageId": imageID, "instanceId": i.ID, "instanceType": i.kind(),
			"pendingTime": i.launched.Truncate(time.Second), "privateIp": "127.0.0.1", "region": s.opts.Region, "version": "2017-09-30"}), true
	case "meta-data/iam/security-credentials/" + imdsRole:
		return s.credentials(), true
	}
	text, ok := map[string]string{
		"meta-data/instance-id": i.ID, "meta-data/instance-type": i.kind(), "meta-data/ami-id": imageID, "meta-data/iam/security-credentials": imdsRole,
		"meta-data/placement/region": s.opts.Region, "meta-data/placement/availability-zone": i.Zone,
	}[path]
	return text, ok
}

// credentials are new at every request and good for Options.Session.
func (s *Server) credentials() string {
	now := time.Now().UTC()
	key, token := "ASIA"+strings.ToUpper(randomHex(8)), randomHex(32)
	s.mu.Lock()
	s.sessions[key] = session{token, now.Add(s.opts.Session)}
	s.mu.Unlock()
	return asJSON(map[string]any{"Code": "Success", "LastUpdated": now.Truncate(time.Second), "Type": "AWS-HMAC", "AccessKeyId": key, "SecretAccessKey": SecretKey, "Token": token,
		"Expiration": now.Add(s.opts.Session).Truncate(time.Second)})
}

func asJSON(v any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil { // a bug of ours: only strings and times
		panic(err)
	}
	return string(b)
}
