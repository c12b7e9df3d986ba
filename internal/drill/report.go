package drill

import (
	"encoding/json"
	"os"
)

// writeReport writes the page and, beside it, its data.
func (o Options) writeReport(st *store, s Summary) error {
	data := struct {
		Summary
		Trials []Trial         `json:"trials"`
		Runs   []ProductionRun `json:"runs"`
	}{s, st.trials, st.runs}
	return writeFile(s.JSON, func(f *os.File) error {
		enc := json.NewEncoder(f)
		enc.SetIndent("", " ")
		return enc.Encode(data)
	})
}
