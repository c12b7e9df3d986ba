package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"

	"cleancut/internal/backup"
)

// print writes the result: v as one JSON object, or what text prints.
func (a *app) print(v any, text func()) error {
	if !a.json {
		text()
		return nil
	}
	a.printed = true
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printError writes an error, what to do about it, and in JSON the exit status.
func (a *app) printError(err error, code int) {
	hint := backup.HintOf(err)
	if a.json && !a.printed { // one object, never two
		_ = json.NewEncoder(a.out).Encode(map[string]any{"ok": false, "error": err.Error(), "hint": hint, "exit": code})
	}
	fmt.Fprintf(a.err, "cleancut: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n  "))
	if hint != "" {
		fmt.Fprintf(a.err, "  what to do: %s\n", hint)
	}
}

// progress tells a person what is being done.
func (a *app) progress(phase, detail string) {
	if !a.json && !a.verbose {
		fmt.Fprintf(a.err, "  %-10s %s\n", phase, detail)
	}
}

func (a *app) line(format string, args ...any) { fmt.Fprintf(a.out, format+"\n", args...) }

// table prints rows with aligned columns.
func (a *app) table(rows [][]string) {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush() // the writer below reports its own errors at exit
}
