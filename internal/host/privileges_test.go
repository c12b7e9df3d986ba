package host_test

import (
	"slices"
	"testing"

	"cleancut/internal/host"
)

func TestKernelsCompareByMajorThenMinor(t *testing.T) {
	for _, c := range []struct {
		major, minor int
		want         bool
	}{{5, 12, true}, {5, 13, true}, {6, 0, true}, {5, 11, false}, {4, 19, false}, {0, 0, false}} {
		if got := (host.Kernel{Major: c.major, Minor: c.minor}).AtLeast(5, 12); got != c.want {
			t.Errorf("%d.%d is at least 5.12: got %v, want %v", c.major, c.minor, got, c.want)
		}
	}
	if k, err := host.RunningKernel(); err != nil || !k.AtLeast(3, 0) {
		t.Errorf("running kernel: got %+v, %v", k, err)
	}
}

func TestMissingCapabilitiesNeverPassesOverANameItDoesNotKnow(t *testing.T) {
	if got, err := host.MissingCapabilities([]string{"CAP_KILL", "CAP_NONSENSE"}); err == nil {
		t.Errorf("got %v and no error", got)
	}
	missing, err := host.MissingCapabilities([]string{"CAP_SYS_ADMIN", "CAP_KILL"})
	if err != nil || slices.ContainsFunc(missing, func(s string) bool { return s != "CAP_SYS_ADMIN" && s != "CAP_KILL" }) {
		t.Errorf("got %v, %v", missing, err)
	}
}
