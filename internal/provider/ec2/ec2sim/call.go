package ec2sim

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"

	"cleancut/internal/backup"
)

// call is one EC2 call on its way through the server.
type call struct {
	action string // with "(DryRun)" where it is one
	dryRun bool
	*params
	struck []strike // faults that hit it, in their order
}

// handler serves an action: it reads all parameters (and calls ready), checks
// and acts. What it returns is encoded as the answer. It must not touch
// anything before ready returns nil.
type handler func(ctx context.Context, c *call) (any, error)

func (s *Server) handlers() map[string]handler {
	return map[string]handler{
		"AttachVolume": s.attachVolume, "CreateSnapshot": s.createSnapshot, "CreateSnapshots": s.createSnapshots, "CreateTags": s.createTags,
		"CreateVolume": s.createVolume, "DeleteSnapshot": s.deleteSnapshot, "DeleteTags": s.deleteTags, "DeleteVolume": s.deleteVolume, "DescribeInstances": s.describeInstances,
		"DescribeSnapshots": s.describeSnapshots, "DescribeVolumeStatus": s.describeVolumeStatus, "DescribeVolumes": s.describeVolumes,
		"DetachVolume": s.detachVolume,
	}
}

// Actions are the names of the EC2 actions that the server knows, sorted.
func Actions() []string {
	return slices.Sorted(maps.Keys((&Server{}).handlers()))
}

// ServeHTTP serves the EC2 query protocol at POST / and IMDSv2 of each
// instance at MetadataEndpoint.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.enter() {
		writeError(w, refuse("Unavailable", "The server is being closed"))
		return
	}
	defer s.work.Done()
	if strings.HasPrefix(r.URL.Path, "/imds/") || strings.HasPrefix(r.URL.Path, "/latest/") {
		s.serveIMDS(w, r)
		return
	}
	if r.URL.Path != "/" && r.URL.Path != "" {
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodPost {
		writeError(w, refuse("InvalidRequest", "The request must be a POST"))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
	if err := r.ParseForm(); err != nil {
		writeError(w, refuse("MalformedQueryString", "The body is no form: %v", err))
		return
	}
	c := &call{action: r.PostForm.Get("Action"), params: newParams(r.PostForm)}
	body, err := s.serve(r.Context(), r, c)
	var api *apiError
	switch {
	case errors.Is(err, errLost):
		panic(http.ErrAbortHandler) // net/http closes the connection without an answer
	case errors.As(err, &api):
		s.log.DebugContext(r.Context(), "refused", slog.String(keyAction, c.action), slog.String(keyError, api.Error()))
		writeError(w, api)
	case err != nil:
		s.log.ErrorContext(r.Context(), "call", slog.String(keyAction, c.action), slog.Any(keyError, err))
		writeError(w, refuse("InternalError", "An internal error has occurred: %v", err))
	default:
		s.log.DebugContext(r.Context(), "answered", slog.String(keyAction, c.action))
		writeXML(w, strings.TrimSuffix(c.action, "(DryRun)"), body)
	}
}

// enter makes Close wait for a request, unless it has begun.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.work.Add(1)
	}
	return !s.closing
}

// serve finds the handler and lays the faults around it.
func (s *Server) serve(ctx context.Context, r *http.Request, c *call) (any, error) {
	handle := s.handlers()[c.action]
	if handle == nil || c.values.Get("Version") != apiVersion {
		s.count("InvalidAction")
		return nil, refuse("InvalidAction", "The action %s is not valid for this web service.", c.action)
	}
	if c.dryRun = c.boolean("DryRun"); c.dryRun {
		c.action += "(DryRun)"
	}
	s.count(c.action)
	if err := s.authenticate(r); err != nil {
		return nil, err
	}
	if s.opts.Latency > 0 {
		if err := pause(ctx, s.opts.Latency); err != nil {
			return nil, err
		}
	}
	c.struck = s.strike(c.action)
	defer s.endStrike(c)
	if err := before(ctx, c.struck); err != nil {
		return nil, err
	}
	// An effect that has begun is finished, whether or not somebody waits: as
	// in EC2, where the caller's going away undoes nothing.
	effect := context.WithoutCancel(ctx)
	body, err := handle(effect, c)
	if err != nil {
		return nil, err
	}
	return body, after(effect, c.struck)
}

func (s *Server) count(action string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[action]++
}

// ready ends the reading of the parameters.
func (c *call) ready() error {
	if err := c.done(); err != nil {
		return err
	}
	return nil
}

// permitted answers a dry run. Handlers call it when they have found what the
// call names, as EC2 needs that to judge, and before they look at states.
func (c *call) permitted() error {
	if c.dryRun {
		return refuse("DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
	}
	return nil
}

func (s *Server) createTags(_ context.Context, c *call) (any, error) {
	return s.changeTags(c, true, func(t backup.Tags, key, value string, _ bool) { t[key] = value })
}

func (s *Server) deleteTags(_ context.Context, c *call) (any, error) {
	return s.changeTags(c, false, func(t backup.Tags, key, value string, any bool) {
		if any || t[key] == value {
			delete(t, key)
		}
	})
}

// changeTags looks all resources up before it changes one.
func (s *Server) changeTags(c *call, adding bool, change func(t backup.Tags, key, value string, any bool)) (any, error) {
	ids, tags := c.list("ResourceId"), c.tags("Tag")
	anyValue := map[string]bool{}
	for i := range c.count("Tag") {
		prefix := "Tag." + itoa(i+1)
		anyValue[c.str(prefix+".Key")] = !c.has(prefix + ".Value")
	}
	if len(ids) == 0 {
		c.complain(refuse("MissingParameter", "The request must contain the parameter resourceIdSet"))
	}
	if adding && len(tags) == 0 {
		c.complain(refuse("MissingParameter", "The request must contain the parameter tagSet"))
	}
	if err := c.ready(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	stale, isStale := c.hitBy(Stale)
	var found []*backup.Tags
	var blurs []func()
	for _, id := range ids {
		v, _ := s.findVolume(id)
		m, _ := s.findSnapshot(id)
		switch {
		case v != nil:
			found, blurs = append(found, &v.tags), append(blurs, func() { v.blur.keep(v.seen(), stale.N) })
		case m != nil:
			found, blurs = append(found, &m.tags), append(blurs, func() { m.blur.keep(m.seen(), stale.N) })
		case volumePattern.MatchString(id):
			return nil, noVolume(id)
		case snapshotPattern.MatchString(id):
			return nil, noSnapshot(id)
		default:
			return nil, refuse("InvalidID", "The ID '%s' is not valid", id)
		}
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	for i, t := range found {
		if isStale {
			blurs[i]()
		}
		next := maps.Clone(*t)
		if next == nil {
			next = backup.Tags{}
		}
		for k, v := range tags {
			change(next, k, v, anyValue[k])
		}
		if len(next) > 50 {
			return nil, refuse("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.")
		}
		*t = next
	}
	return trueXML{true}, nil
}
