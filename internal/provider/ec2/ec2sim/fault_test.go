package ec2sim_test

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"cleancut/internal/backup"
	"cleancut/internal/provider/ec2/ec2sim"
)

func TestParseFaultReadsWhatStringWrites(t *testing.T) {
	for text, want := range map[string]ec2sim.Fault{
		"CreateSnapshot:throttle*3":                          {Action: "CreateSnapshot", Kind: ec2sim.Throttle, Times: 3},
		"CreateSnapshots@2:error=InternalError":              {Action: "CreateSnapshots", Kind: ec2sim.Refuse, Nth: 2, Code: "InternalError"},
		"AttachVolume:error=InvalidVolume.NotFound":          {Action: "AttachVolume", Kind: ec2sim.Refuse, Code: "InvalidVolume.NotFound"},
		"CreateSnapshot(DryRun):error=UnauthorizedOperation": {Action: "CreateSnapshot(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"},
		"CreateVolume@1:lose-answer":                         {Action: "CreateVolume", Kind: ec2sim.LoseAnswer, Nth: 1},
		"CreateVolume:stale=2":                               {Action: "CreateVolume", Kind: ec2sim.Stale, N: 2},
		"DescribeVolumes@2:delay=1.5s*4":                     {Action: "DescribeVolumes", Kind: ec2sim.DelayBefore, Nth: 2, Delay: 1500 * time.Millisecond, Times: 4},
		"CreateSnapshots:end-in-error":                       {Action: "CreateSnapshots", Kind: ec2sim.EndInError},
		"CreateSnapshots:end-in-error=2s":                    {Action: "CreateSnapshots", Kind: ec2sim.EndInError, Delay: 2 * time.Second},
		"CreateSnapshot:skew=1s":                             {Action: "CreateSnapshot", Kind: ec2sim.Skew, Delay: time.Second},
	} {
		got, err := ec2sim.ParseFault(text)
		if err != nil || !reflect.DeepEqual(got, want) || got.String() != text {
			t.Errorf("%s: got %+v (%s), %v", text, got, got, err)
		}
	}
}

func TestParseFaultRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":                        "",
		"no kind":                        "CreateSnapshot",
		"an action nobody knows":         "CreateSnapshoot:throttle",
		"a kind nobody knows":            "CreateSnapshot:throttles",
		"a kind of another action":       "AttachVolume:skew=1s",
		"a hook, which is a function":    "CreateSnapshot:hook",
		"an error without a code":        "CreateSnapshot:error",
		"a value where none goes":        "CreateSnapshot:throttle=3",
		"a duration that is none":        "CreateSnapshot:delay=3",
		"a delay back in time":           "CreateSnapshot:delay=-3s",
		"stale for no describe":          "CreateSnapshot:stale=0",
		"the call before the first":      "CreateSnapshot@0:throttle",
		"no times":                       "CreateSnapshot:throttle*0",
		"a dry run that takes something": "CreateSnapshots(DryRun):swap",
		"two":                            "CreateSnapshot:throttle,CreateSnapshot:throttle",
	} {
		t.Run(name, func(t *testing.T) {
			if f, err := ec2sim.ParseFault(text); !errors.Is(err, backup.ErrUsage) || backup.HintOf(err) == "" {
				t.Errorf("got %+v, %v", f, err)
			}
		})
	}
}

func FuzzParseFault(f *testing.F) {
	for _, s := range []string{"CreateSnapshot:throttle*3", "CreateSnapshots@2:error=InternalError", "DescribeVolumes:delay=1.5h3µs", "CreateVolume:stale=2", "CreateSnapshot(DryRun):error=X.Y", ":", "a@1:b=2*3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ec2sim.ParseFault(s)
		if err != nil {
			return
		}
		again, err := ec2sim.ParseFault(got.String())
		if err != nil || !reflect.DeepEqual(got, again) {
			t.Errorf("%q: %+v is written %q and read %+v, %v", s, got, got, again, err)
		}
	})
}
