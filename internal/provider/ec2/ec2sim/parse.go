package ec2sim

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cleancut/internal/backup"
)

// value is what stands behind the = of a kind.
type value int

const (
	noValue value = iota
	codeValue
	numberValue
	delayValue
	optionalDelay
)

// kindInfo is what a kind takes and of which actions; none: of all.
type kindInfo struct {
	value   value
	actions []string
}

func kinds() map[Kind]kindInfo {
	group, snapshots := []string{"CreateSnapshots"}, []string{"CreateSnapshot", "CreateSnapshots"}
	return map[Kind]kindInfo{
		Throttle: {}, Refuse: {value: codeValue}, FailAfter: {value: codeValue}, LoseAnswer: {},
		DelayBefore: {value: delayValue}, DelayAfter: {value: delayValue},
		Stale:      {numberValue, []string{"AttachVolume", "CreateSnapshot", "CreateSnapshots", "CreateTags", "CreateVolume", "DeleteSnapshot", "DeleteTags", "DeleteVolume", "DetachVolume"}},
		EndInError: {optionalDelay, snapshots}, NeverComplete: {actions: snapshots}, NeverAttach: {actions: []string{"AttachVolume"}},
		Skew:        {delayValue, []string{"CreateSnapshot"}},
		ExtraMember: {actions: group}, MissingMember: {actions: group}, SwapAnswer: {actions: group}, SwapBytes: {actions: group},
	}
}

// The parts of a fault in text, and of an error code.
var (
	faultText = regexp.MustCompile(`^([A-Za-z]+(?:\(DryRun\))?)(?:@([0-9]{1,6}))?:([a-z-]+)(?:=([A-Za-z0-9.µ]+))?(?:\*([0-9]{1,6}))?$`)
	codeText  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9.]*$`)
)

// ParseFault reads ACTION[@NTH]:KIND[=VALUE][*TIMES]:
//
//	CreateSnapshot:throttle*3          the first three calls
//	CreateSnapshots@2:error=InternalError   the second call
//	CreateVolume@1:lose-answer         the first call
//	DescribeVolumes:delay=300ms        every call
//	CreateSnapshot:skew=1s
//
// VALUE is an error code, a number of describes or a duration, as the kind
// has it. Anything else is an error that wraps backup.ErrUsage.
func ParseFault(text string) (Fault, error) {
	f, err := parseFault(text)
	if err != nil {
		return Fault{}, backup.Hint(fmt.Errorf("fault %q: %w: %w", text, backup.ErrUsage, err), "write ACTION[@NTH]:KIND[=VALUE][*TIMES]; docs/ec2sim.md has the kinds")
	}
	return f, nil
}

func parseFault(text string) (Fault, error) {
	m := faultText.FindStringSubmatch(text)
	if m == nil {
		return Fault{}, fmt.Errorf("not of the form ACTION[@NTH]:KIND[=VALUE][*TIMES]")
	}
	f := Fault{Action: m[1], Kind: Kind(m[3])}
	action := strings.TrimSuffix(f.Action, "(DryRun)")
	if !slices.Contains(Actions(), action) {
		return Fault{}, fmt.Errorf("no action %s; there are %s", action, strings.Join(Actions(), ", "))
	}
	info, ok := kinds()[f.Kind]
	if !ok {
		return Fault{}, fmt.Errorf("no kind %s; there are %s", f.Kind, joinKinds())
	}
	if len(info.actions) > 0 && !slices.Contains(info.actions, f.Action) {
		return Fault{}, fmt.Errorf("%s is of %s only", f.Kind, strings.Join(info.actions, ", "))
	}
	var err error
	if f.Nth, err = positive(m[2]); err != nil {
		return Fault{}, fmt.Errorf("NTH: %w", err)
	}
	if f.Times, err = positive(m[5]); err != nil {
		return Fault{}, fmt.Errorf("TIMES: %w", err)
	}
	return f, f.setValue(info.value, m[4])
}

func joinKinds() string {
	var names []string
	for _, k := range slices.Sorted(maps.Keys(kinds())) {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// positive reads a number from 1 on; "" is 0.
func positive(text string) (int, error) {
	if text == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err == nil && n == 0 {
		err = fmt.Errorf("counted from 1")
	}
	return n, err
}

func (f *Fault) setValue(kind value, text string) (err error) {
	switch kind {
	case noValue:
		if text != "" {
			return fmt.Errorf("%s takes no value", f.Kind)
		}
	case codeValue:
		if f.Code = text; !codeText.MatchString(text) {
			return fmt.Errorf("%s wants an error code", f.Kind)
		}
	case numberValue:
		f.N, err = positive(text)
		if err != nil || f.N == 0 || len(text) > 6 {
			return fmt.Errorf("%s wants a number of describes", f.Kind)
		}
	case optionalDelay, delayValue:
		if kind == optionalDelay && text == "" {
			return nil
		}
		f.Delay, err = time.ParseDuration(text)
		if err != nil || f.Delay <= 0 {
			return fmt.Errorf("%s wants a duration, such as 300ms", f.Kind)
		}
	}
	return nil
}

// String is the form that ParseFault reads. Hooks have none.
func (f Fault) String() string {
	out := f.Action
	if f.Nth > 0 {
		out += "@" + itoa(f.Nth)
	}
	out += ":" + string(f.Kind)
	switch {
	case f.Code != "":
		out += "=" + f.Code
	case f.N > 0:
		out += "=" + itoa(f.N)
	case f.Delay > 0:
		out += "=" + f.Delay.String()
	}
	if f.Times > 0 {
		out += "*" + itoa(f.Times)
	}
	return out
}
