package postgres_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"cleancut/internal/postgres"
)

const goodLabel = `START WAL LOCATION: 1A/2000028 (file 000000050000001A00000002)
CHECKPOINT LOCATION: 1A/2000060
BACKUP METHOD: streamed
BACKUP FROM: standby
START TIME: 2026-11-22 10:00:00 UTC
LABEL: cleancut 20261122: x
START TIMELINE: 5
`

func TestALabelIsReadAsTheServerWroteIt(t *testing.T) {
	got, err := postgres.ParseLabel([]byte(goodLabel))
	want := postgres.Label{StartLSN: 0x1A_02000028, Segment: "000000050000001A00000002", CheckpointLSN: 0x1A_02000060, Standby: true,
		StartTime: "2026-11-22 10:00:00 UTC", Text: "cleancut 20261122: x", Timeline: 5}
	if err != nil || got != want {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	for _, word := range []string{"primary", "master"} { // the latter of 13
		if got, err := postgres.ParseLabel([]byte(strings.ReplaceAll(goodLabel, "standby", word))); err != nil || got.Standby {
			t.Errorf("%s: got %+v, %v", word, got, err)
		}
	}
	// WAL files of 1 MiB
	small := strings.ReplaceAll(goodLabel, "1A00000002)", "1A00000020)")
	if got, err := postgres.ParseLabel([]byte(small)); err != nil || got.Segment != "000000050000001A00000020" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestALabelThatRecoveryWouldMisreadIsRefused(t *testing.T) {
	for name, c := range map[string][2]string{
		"with line ends of Windows":              {"\n", "\r\n"},
		"without its last line feed":             {"TIMELINE: 5\n", "TIMELINE: 5"},
		"with a line of an incremental backup":   {"TIMELINE: 5\n", "TIMELINE: 5\nINCREMENTAL FROM LSN: 0/1\n"},
		"without its timeline":                   {"START TIMELINE: 5\n", ""},
		"of an exclusive backup":                 {"streamed", "pg_start_backup"},
		"from somewhere else":                    {"standby", "elsewhere"},
		"whose file is of another timeline":      {"00000005", "00000006"},
		"whose file does not hold the LSN":       {"00000002)", "00000003)"},
		"whose file is not closed":               {"00000002)", "00000002"},
		"whose file has small letters":           {"1A00000002)", "1a00000002)"},
		"that starts at no LSN":                  {"1A/2000028", "1A2000028"},
		"that starts at 0/0":                     {"1A/2000028 (file 000000050000001A", "0/0 (file 0000000500000000"},
		"whose checkpoint lies before its start": {"1A/2000060", "1A/2000020"},
		"on timeline 0":                          {"TIMELINE: 5", "TIMELINE: 0"},
		"with a signed timeline":                 {"TIMELINE: 5", "TIMELINE: +5"},
		"with two spaces":                        {"LABEL: ", "LABEL : "},
	} {
		bad := strings.ReplaceAll(goodLabel, c[0], c[1])
		if l, err := postgres.ParseLabel([]byte(bad)); bad == goodLabel || !errors.Is(err, postgres.ErrLabel) {
			t.Errorf("a label %s: got %+v, %v", name, l, err)
		}
	}
	if _, err := postgres.ParseLabel(nil); !errors.Is(err, postgres.ErrLabel) {
		t.Errorf("an empty label: got %v", err)
	}
}

// FuzzParseLabel: what is accepted is what the server would write of it.
func FuzzParseLabel(f *testing.F) {
	f.Add([]byte(goodLabel))
	f.Add([]byte(strings.ReplaceAll(goodLabel, "standby", "primary")))
	f.Add([]byte(strings.Repeat("\n", 7)))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := postgres.ParseLabel(b)
		if err != nil {
			if !errors.Is(err, postgres.ErrLabel) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("error %q", err)
			}
			return
		}
		from := "standby"
		if !l.Standby {
			from = "primary"
			b = bytes.Replace(b, []byte("FROM: master"), []byte("FROM: primary"), 1)
		}
		again := fmt.Sprintf("START WAL LOCATION: %s (file %s)\nCHECKPOINT LOCATION: %s\nBACKUP METHOD: streamed\nBACKUP FROM: %s\nSTART TIME: %s\nLABEL: %s\nSTART TIMELINE: %d\n",
			l.StartLSN, l.Segment, l.CheckpointLSN, from, l.StartTime, l.Text, l.Timeline)
		if !bytes.Equal(b, []byte(again)) {
			t.Fatalf("accepted %q, which the server would write as %q", b, again)
		}
	})
}
