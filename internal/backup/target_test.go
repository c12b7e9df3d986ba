package backup_test

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"cleancut/internal/backup"
)

func TestParseTarget(t *testing.T) {
	moment := time.Date(2026, 11, 23, 5, 0, 0, 250_000_000, time.UTC)
	for s, want := range map[string]backup.Target{
		"end":                               {Kind: backup.TargetEnd},
		"latest":                            {Kind: backup.TargetLatest},
		"immediate":                         {Kind: backup.TargetImmediate},
		"time=2026-11-23T05:00:00.25Z":      {Kind: backup.TargetTime, Time: moment},
		"time=2026-11-23T06:00:00.25+01:00": {Kind: backup.TargetTime, Time: moment},
		"time=2026-11-23 06:00:00.25+01":    {Kind: backup.TargetTime, Time: moment},
		"lsn=1A/2B":                         {Kind: backup.TargetLSN, LSN: 0x1A_0000_002B},
		"name=before the deploy = 7":        {Kind: backup.TargetName, Name: "before the deploy = 7"},
		"xid=4294967295":                    {Kind: backup.TargetXID, XID: 4294967295},
	} {
		got, err := backup.ParseTarget(s)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %+v, %v, want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "now", "end=", "end=1", "time=", "time=2026-11-23 05:00:00", "time=05:00Z", "lsn=", "lsn=0/0", "lsn=1", "name=", "name=a\nb", "xid=2", "xid=-1", "xid=4294967296", "xid=1x"} {
		got, err := backup.ParseTarget(s)
		if !errors.Is(err, backup.ErrUsage) || backup.HintOf(err) == "" {
			t.Errorf("%q: got %+v, %v, want a usage error with a hint", s, got, err)
		}
	}
}

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"end", "time=2026-11-23 06:00:00.25+01", "time=0000-01-01T00:00:00Z", "lsn=1A/2B", "name=a=b", "xid=77"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		target, err := backup.ParseTarget(s)
		if err != nil {
			return
		}
		again, err := backup.ParseTarget(target.String())
		if err != nil || !reflect.DeepEqual(again, target) {
			t.Errorf("%q is %+v, written as %q it is %+v, %v", s, target, target, again, err)
		}
		if len(target.Settings()) == 0 {
			t.Errorf("%q has no settings", s)
		}
	})
}
