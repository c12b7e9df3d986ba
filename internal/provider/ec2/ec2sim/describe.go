package ec2sim

import (
	"cmp"
	"context"
	"encoding/base64"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// page reads MaxResults and NextToken, and the ids that do not go with them.
type page struct {
	max, offset int
	ids         []string
}

func (c *call) page(idList string) page {
	p := page{max: c.integer("MaxResults"), ids: c.list(idList)}
	for _, id := range p.ids {
		switch {
		case idList == "VolumeId" && !volumePattern.MatchString(id):
			c.complain(malformedVolume(id))
		case idList == "SnapshotId" && !snapshotPattern.MatchString(id):
			c.complain(malformedSnapshot(id))
		case idList == "InstanceId" && !instancePattern.MatchString(id):
			c.complain(malformedInstance(id))
		}
	}
	next := c.str("NextToken")
	switch {
	case c.has("MaxResults") && len(p.ids) > 0:
		c.complain(refuse("InvalidParameterCombination", "The parameter %s cannot be used with the parameter maxResults", idList))
	case c.has("MaxResults") && p.max < 5:
		c.complain(refuse("InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. Expecting a value greater than 5.", p.max))
	}
	if next != "" {
		text, err := base64.RawURLEncoding.DecodeString(next)
		n, convErr := strconv.Atoi(strings.TrimPrefix(string(text), "ec2sim:"))
		if err != nil || convErr != nil || n < 0 {
			c.complain(refuse("InvalidParameterValue", "Unable to parse pagination token"))
		}
		p.offset = n
	}
	p.max = min(p.max, 1000)
	return p
}

// cutPage takes a page from all candidates. Filters come after it, so that a page may
// be empty though more follow, as in EC2.
func cutPage[T any](p page, all []T) (_ []T, next string) {
	all = all[min(p.offset, len(all)):]
	if p.max == 0 || len(all) <= p.max {
		return all, ""
	}
	return all[:p.max], base64.RawURLEncoding.EncodeToString([]byte("ec2sim:" + strconv.Itoa(p.offset+p.max)))
}

// matches reports whether every filter is met. attribute returns the values of
// a filter's name; known is false for a name that is not a filter.
func matches(filters []filter, attribute func(name string) (values []string, known bool)) (bool, error) {
	all := true
	for _, f := range filters {
		values, known := attribute(f.name)
		if !known {
			return false, refuse("InvalidParameterValue", "The filter '%s' is invalid", f.name)
		}
		all = all && slices.ContainsFunc(values, func(v string) bool {
			return slices.ContainsFunc(f.values, func(pattern string) bool { return like(pattern, v) })
		})
	}
	return all, nil
}

// like matches with * and ?, which a backslash makes plain
// (AWSEC2/latest/UserGuide/Using_Filtering.html).
func like(pattern, value string) bool {
	var re strings.Builder
	re.WriteString("(?s)^")
	escaped := false
	for _, r := range pattern {
		switch {
		case escaped:
			re.WriteString(regexp.QuoteMeta(string(r)))
			escaped = false
		case r == '\\':
			escaped = true
		case r == '*':
			re.WriteString(".*")
		case r == '?':
			re.WriteString(".")
		default:
			re.WriteString(regexp.QuoteMeta(string(r)))
		}
	}
	re.WriteString("$")
	ok, err := regexp.MatchString(re.String(), value)
	return err == nil && ok
}

// tagFilter serves tag:KEY and tag-key.
func tagFilter(name string, tags set[tagXML]) ([]string, bool) {
	key, byKey := strings.CutPrefix(name, "tag:")
	if !byKey && name != "tag-key" {
		return nil, false
	}
	var out []string
	for _, t := range tags.Items {
		switch {
		case !byKey:
			out = append(out, t.Key)
		case t.Key == key:
			out = append(out, t.Value)
		}
	}
	return out, true
}

func (t stamp) String() string { b, _ := t.MarshalText(); return string(b) }

func volumeFilter(v volumeXML) func(string) ([]string, bool) {
	return func(name string) ([]string, bool) {
		if values, ok := tagFilter(name, v.Tags); ok {
			return values, true
		}
		one := map[string]string{"volume-id": v.VolumeID, "status": v.Status, "availability-zone": v.AvailabilityZone, "snapshot-id": v.SnapshotID, "volume-type": v.VolumeType,
			"size": itoa(v.Size), "encrypted": strconv.FormatBool(v.Encrypted), "create-time": v.CreateTime.String()}
		if value, ok := one[name]; ok {
			return []string{value}, true
		}
		var a attachmentXML
		if len(v.Attachments.Items) > 0 {
			a = v.Attachments.Items[0]
		}
		of := map[string]string{"attachment.instance-id": a.InstanceID, "attachment.device": a.Device, "attachment.status": a.Status,
			"attachment.delete-on-termination": strconv.FormatBool(a.DeleteOnTermination)}
		value, ok := of[name]
		if !ok || a.InstanceID == "" {
			return nil, ok
		}
		return []string{value}, true
	}
}

func snapshotFilter(m snapshotXML) func(string) ([]string, bool) {
	return func(name string) ([]string, bool) {
		if values, ok := tagFilter(name, m.Tags); ok {
			return values, true
		}
		value, ok := map[string]string{"snapshot-id": m.SnapshotID, "volume-id": m.VolumeID, "status": m.Status, "owner-id": m.OwnerID, "description": m.Description,
			"start-time": m.StartTime.String(), "volume-size": itoa(m.VolumeSize), "encrypted": strconv.FormatBool(m.Encrypted), "progress": m.Progress, "storage-tier": m.StorageTier}[name]
		return []string{value}, ok
	}
}

func instanceFilter(i instanceXML) func(string) ([]string, bool) {
	return func(name string) ([]string, bool) {
		if values, ok := tagFilter(name, i.Tags); ok {
			return values, true
		}
		one := map[string]string{"instance-id": i.InstanceID, "instance-state-name": i.State.Name, "availability-zone": i.Placement.AvailabilityZone, "instance-type": i.InstanceType,
			"hypervisor": i.Hypervisor, "root-device-name": i.RootDeviceName, "owner-id": Account}
		if value, ok := one[name]; ok {
			return []string{value}, true
		}
		var out []string
		for _, m := range i.Mappings.Items {
			switch name {
			case "block-device-mapping.volume-id":
				out = append(out, m.Ebs.VolumeID)
			case "block-device-mapping.device-name":
				out = append(out, m.DeviceName)
			case "block-device-mapping.status":
				out = append(out, m.Ebs.Status)
			}
		}
		return out, slices.Contains([]string{"block-device-mapping.volume-id", "block-device-mapping.device-name", "block-device-mapping.status"}, name)
	}
}

// seenVolumes looks at volumes as a describe does: which uses up blurs. ids:
// only those, each of which must be seen; none: all.
func (s *Server) seenVolumes(ids []string) ([]volumeXML, error) {
	all := slices.SortedFunc(maps.Values(s.volumes), func(a, b *volume) int { return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.id, b.id)) })
	var out []volumeXML
	missing := slices.Clone(ids)
	for _, v := range all {
		if len(ids) > 0 && !slices.Contains(ids, v.id) {
			continue
		}
		if x, ok := v.blur.look(v.seen()); ok {
			out = append(out, x)
			missing = slices.DeleteFunc(missing, func(id string) bool { return id == v.id })
		}
	}
	if len(missing) > 0 {
		return nil, noVolume(missing[0])
	}
	return out, nil
}

func (s *Server) describeVolumes(_ context.Context, c *call) (any, error) {
	p, filters := c.page("VolumeId"), c.filters()
	if err := c.ready(); err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.seenVolumes(p.ids)
	if err != nil {
		return nil, err
	}
	var answer volumesXML
	all, answer.NextToken = cutPage(p, all)
	answer.Volumes.Items, err = filtered(all, filters, volumeFilter)
	return answer, err
}

// filtered also checks the filters' names when there is nothing to filter.
func filtered[T any](all []T, filters []filter, attributes func(T) func(string) ([]string, bool)) (out []T, err error) {
	var none T
	if _, err := matches(filters, attributes(none)); err != nil {
		return nil, err
	}
	for _, x := range all {
		ok, err := matches(filters, attributes(x))
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, x)
		}
	}
	return out, nil
}

func (s *Server) describeSnapshots(_ context.Context, c *call) (any, error) {
	p, filters, owners, restorable := c.page("SnapshotId"), c.filters(), c.list("Owner"), c.list("RestorableBy")
	if err := c.ready(); err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.SortedFunc(maps.Values(s.snapshots), func(a, b *snapshot) int { return cmp.Or(a.started.Compare(b.started), cmp.Compare(a.id, b.id)) })
	var seen []snapshotXML
	missing := slices.Clone(p.ids)
	ours := func(accounts []string) bool {
		return len(accounts) == 0 || slices.Contains(accounts, "self") || slices.Contains(accounts, Account)
	}
	for _, m := range all {
		if len(p.ids) > 0 && !slices.Contains(p.ids, m.id) {
			continue
		}
		if m.gone && m.blur.left == 0 {
			delete(s.snapshots, m.id)
			continue
		}
		if x, ok := m.blur.look(m.seen()); ok {
			missing = slices.DeleteFunc(missing, func(id string) bool { return id == m.id })
			if ours(owners) && ours(restorable) {
				seen = append(seen, x)
			}
		}
	}
	if len(missing) > 0 {
		return nil, noSnapshot(missing[0])
	}
	var answer snapshotsXML
	var err error
	seen, answer.NextToken = cutPage(p, seen)
	answer.Snapshots.Items, err = filtered(seen, filters, snapshotFilter)
	return answer, err
}

func (s *Server) describeInstances(_ context.Context, c *call) (any, error) {
	p, filters := c.page("InstanceId"), c.filters()
	if err := c.ready(); err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	volumes, err := s.seenVolumes(nil)
	if err != nil {
		return nil, err
	}
	var all []instanceXML
	missing := slices.Clone(p.ids)
	for _, id := range slices.Sorted(maps.Keys(s.instances)) {
		if len(p.ids) == 0 || slices.Contains(p.ids, id) {
			all = append(all, s.instances[id].seen(volumes))
			missing = slices.DeleteFunc(missing, func(other string) bool { return other == id })
		}
	}
	if len(missing) > 0 {
		return nil, noInstance(missing[0])
	}
	var answer instancesXML
	all, answer.NextToken = cutPage(p, all)
	all, err = filtered(all, filters, instanceFilter)
	for _, i := range all {
		answer.Reservations.Items = append(answer.Reservations.Items, reservationXML{ReservationID: "r-" + strings.TrimPrefix(i.InstanceID, "i-"), OwnerID: Account, Instances: set[instanceXML]{[]instanceXML{i}}})
	}
	return answer, err
}

// seen says xen of Nitro too, as EC2 does (API Instance, hypervisor).
func (i *instance) seen(volumes []volumeXML) instanceXML {
	x := instanceXML{InstanceID: i.ID, ImageID: imageID, State: stateXML{16, "running"}, InstanceType: i.kind(), LaunchTime: stamp(i.launched), Placement: placementXML{i.Zone, "default"},
		Hypervisor: "xen", Virtualization: "hvm", Architecture: "x86_64", RootDeviceName: "/dev/xvda", RootDeviceType: "ebs", EbsOptimized: !i.Xen}
	for _, v := range volumes {
		for _, a := range v.Attachments.Items {
			if a.InstanceID == i.ID {
				x.Mappings.Items = append(x.Mappings.Items, mappingXML{a.Device, ebsXML{a.VolumeID, a.Status, a.AttachTime, a.DeleteOnTermination}})
			}
		}
	}
	return x
}

// kind is an instance type of that hypervisor.
func (i *instance) kind() string {
	if i.Xen {
		return "m4.2xlarge"
	}
	return "m5.2xlarge"
}

// describeVolumeStatus has no lazy loading to tell of: a volume from a
// snapshot is initialized for as long as it is being created.
func (s *Server) describeVolumeStatus(_ context.Context, c *call) (any, error) {
	p, filters := c.page("VolumeId"), c.filters()
	if err := c.ready(); err != nil {
		return nil, err
	}
	if err := c.permitted(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.seenVolumes(p.ids)
	if err != nil {
		return nil, err
	}
	var answer volumeStatusesXML
	all, answer.NextToken = cutPage(p, all)
	if all, err = filtered(all, filters, volumeFilter); err != nil {
		return nil, err
	}
	for _, v := range all {
		x := volumeStatusXML{VolumeID: v.VolumeID, AvailabilityZone: v.AvailabilityZone, Status: statusXML{"ok"}}
		if v.SnapshotID != "" {
			x.Initialization = &initializationXML{Type: "default", Progress: 100}
			if v.InitializationRate > 0 {
				x.Initialization.Type = "provisioned-rate"
			}
			if v.Status == creating {
				x.Initialization.Progress, x.Initialization.Estimate = 0, 1
			}
		}
		answer.Statuses.Items = append(answer.Statuses.Items, x)
	}
	return answer, nil
}

const imageID = "ami-0ec2510000000000a"
