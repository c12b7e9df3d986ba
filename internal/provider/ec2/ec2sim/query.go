package ec2sim

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"cleancut/internal/backup"
)

// apiError is what EC2 answers instead of a result.
type apiError struct {
	code, message string
	status        int
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

// refuse makes an error with the HTTP status that EC2 gives with its code
// (devguide/ec2-api-errors.html).
func refuse(code, format string, args ...any) *apiError {
	return &apiError{code, fmt.Sprintf(format, args...), statusOf(code)}
}

func statusOf(code string) int {
	switch code {
	case "AuthFailure":
		return http.StatusUnauthorized
	case "UnauthorizedOperation":
		return http.StatusForbidden
	case "DryRunOperation":
		return http.StatusPreconditionFailed
	case "RequestLimitExceeded", "Unavailable", "ServiceUnavailable", "SnapshotCreationThrottled":
		return http.StatusServiceUnavailable
	case "InternalError", "InternalFailure", "InsufficientVolumeCapacity":
		return http.StatusInternalServerError
	}
	return http.StatusBadRequest
}

// params are the parameters of one call. Every reader marks what it read; done
// refuses what nobody read, and keeps the first complaint.
type params struct {
	values url.Values
	read   map[string]bool
	err    *apiError
}

func newParams(v url.Values) *params {
	return &params{values: v, read: map[string]bool{"Action": true, "Version": true}}
}

func (p *params) complain(err *apiError) {
	if p.err == nil {
		p.err = err
	}
}

// done ends the reading.
func (p *params) done() *apiError {
	var left []string
	for name, values := range p.values {
		if len(values) > 1 {
			p.complain(refuse("InvalidParameterValue", "The parameter %s was given more than once", name))
		}
		if !p.read[name] {
			left = append(left, name)
		}
	}
	if len(left) > 0 {
		slices.Sort(left)
		return refuse("UnknownParameter", "The parameter %s is not recognized", left[0])
	}
	return p.err
}

func (p *params) has(name string) bool { return p.values.Has(name) }

func (p *params) str(name string) string {
	p.read[name] = true
	return p.values.Get(name)
}

func (p *params) needed(name string) string {
	v := p.str(name)
	if v == "" {
		p.complain(refuse("MissingParameter", "The request must contain the parameter %s", name))
	}
	return v
}

func (p *params) boolean(name string) bool {
	switch v := p.str(name); strings.ToLower(v) {
	case "true":
		return true
	case "false", "":
	default:
		p.complain(refuse("InvalidParameterValue", "Value (%s) for parameter %s is invalid. Expected true or false", v, name))
	}
	return false
}

func (p *params) integer(name string) int {
	v := p.str(name)
	if v == "" {
		return 0
	}
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil {
		p.complain(refuse("InvalidParameterValue", "Value (%s) for parameter %s is invalid. Expected an integer", v, name))
	}
	return int(n)
}

// count returns how many elements the list name.1, name.2 … has.
func (p *params) count(name string) int {
	n := 0
	for ; ; n++ {
		prefix := name + "." + strconv.Itoa(n+1)
		found := false
		for key := range p.values {
			found = found || key == prefix || strings.HasPrefix(key, prefix+".")
		}
		if !found {
			return n
		}
	}
}

func (p *params) list(name string) []string {
	var out []string
	for i := range p.count(name) {
		out = append(out, p.str(name+"."+strconv.Itoa(i+1)))
	}
	return out
}

// filter is one Filter.N of a Describe call: any of the values will do.
type filter struct {
	name   string
	values []string
}

func (p *params) filters() []filter {
	var out []filter
	for i := range p.count("Filter") {
		prefix := "Filter." + strconv.Itoa(i+1)
		f := filter{p.needed(prefix + ".Name"), p.list(prefix + ".Value")}
		if len(f.values) == 0 {
			p.complain(refuse("InvalidParameterValue", "The filter '%s' has no values", f.name))
		}
		out = append(out, f)
	}
	return out
}

func (p *params) tags(prefix string) backup.Tags {
	out := backup.Tags{}
	for i := range p.count(prefix) {
		at := prefix + "." + strconv.Itoa(i+1)
		key, value := p.needed(at+".Key"), p.str(at+".Value")
		if _, twice := out[key]; twice {
			p.complain(refuse("InvalidParameterValue", "Duplicate tag key '%s' specified.", key))
		}
		if strings.HasPrefix(strings.ToLower(key), "aws:") {
			p.complain(refuse("InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use"))
		}
		if len(key) > 128 || len(value) > 256 {
			p.complain(refuse("InvalidParameterValue", "Tag %s is too long. Keys have at most 128, values 256 characters", key))
		}
		out[key] = value
	}
	checkTagCount(p, out)
	return out
}

func checkTagCount(p *params, t backup.Tags) {
	if len(t) > 50 {
		p.complain(refuse("TagLimitExceeded", "The maximum number of Tags for a resource has been reached."))
	}
}

// tagSpecs reads TagSpecification.N for the one kind of resource that the
// action makes.
func (p *params) tagSpecs(resource string) backup.Tags {
	out := backup.Tags{}
	for i := range p.count("TagSpecification") {
		prefix := "TagSpecification." + strconv.Itoa(i+1)
		if kind := p.needed(prefix + ".ResourceType"); kind != resource {
			p.complain(refuse("InvalidParameterValue", "'%s' is not a valid taggable resource type for this operation.", kind))
		}
		for k, v := range p.tags(prefix + ".Tag") {
			out[k] = v
		}
	}
	checkTagCount(p, out)
	return out
}

// volumeID reads the id of a volume and refuses what has not its form.
func (p *params) volumeID(name string) string {
	id := p.needed(name)
	if id != "" && !volumePattern.MatchString(id) {
		p.complain(malformedVolume(id))
	}
	return id
}

func (p *params) instanceID(name string, needed bool) string {
	id := p.str(name)
	if needed {
		id = p.needed(name)
	}
	if id != "" && !instancePattern.MatchString(id) {
		p.complain(malformedInstance(id))
	}
	return id
}

func (p *params) snapshotID(id string) string {
	if id != "" && !snapshotPattern.MatchString(id) {
		p.complain(malformedSnapshot(id))
	}
	return id
}

func malformedVolume(id string) *apiError {
	return refuse("InvalidParameterValue", "Value (%s) for parameter volumeId is invalid. Expected: 'vol-...'.", id)
}

func malformedSnapshot(id string) *apiError {
	return refuse("InvalidParameterValue", "Value (%s) for parameter snapshotId is invalid. Expected: 'snap-...'.", id)
}

func malformedInstance(id string) *apiError {
	return refuse("InvalidInstanceID.Malformed", "Invalid id: \"%s\"", id)
}
