package ec2sim

import (
	"net/http"
	"regexp"
	"time"
)

// authorization is the header of Signature Version 4.
var authorization = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([A-Z0-9]{16,128})/(\d{8})/([a-z0-9-]+)/([a-z0-9]+)/aws4_request, ?SignedHeaders=[a-z0-9;-]+, ?Signature=[0-9a-f]{64}$`)

// session is what IMDS gave out under an access key id.
type session struct {
	token   string
	expires time.Time
}

// authenticate checks the form of the signature, its scope and that the key is
// known and has not expired. The signature itself is not computed.
func (s *Server) authenticate(r *http.Request) error {
	m := authorization.FindStringSubmatch(r.Header.Get("Authorization"))
	if m == nil {
		return refuse("AuthFailure", "AWS was not able to validate the provided access credentials")
	}
	if m[3] != s.opts.Region || m[4] != "ec2" {
		return refuse("AuthFailure", "Credential should be scoped to region %s and service ec2, not %s and %s", s.opts.Region, m[3], m[4])
	}
	if m[1] == AccessKey {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.sessions[m[1]]
	switch {
	case !ok || known.token != r.Header.Get("X-Amz-Security-Token"):
		return refuse("AuthFailure", "AWS was not able to validate the provided access credentials")
	case time.Now().After(known.expires):
		return refuse("RequestExpired", "Request has expired.")
	}
	return nil
}
