// Package cleancut_test reads the whole source tree and breaks the build where it leaves the shape that CONTRIBUTING.md
// describes.
//
//	files → tree → rule → findings
//
// It reads source text only (every build tag, no type information), so it also works while a package does not compile, and
// each rule is itself tested on planted text in this file.
package cleancut_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "cleancut"

// The levels of the tree. Imports go down, never up or sideways; wrongImport has the exceptions.
const (
	unknown = iota
	words   // plain data and pure functions; import only words
	machine // touch the outside; never import each other
	support // starts and checks machines for tests and mouths
	step    // do one thing each with machines
	flow    // joins the steps
	mouth   // ask for a flow and print
)

// levelOf knows every place where a package may lie. "" and unknown stand for a place nobody has thought of yet.
func levelOf(dir string) (name string, level int) {
	for _, l := range []struct {
		name    string
		level   int
		folders string
	}{
		{"words", words, "internal/backup internal/fault internal/wal"},
		{"test support", support, "internal/lab internal/*/*test internal/*/*/*test internal/provider/ec2/ec2sim"},
		{"machine", machine, "internal/catalog internal/host internal/postgres internal/provider internal/state internal/uml internal/load internal/report"},
		{"machine", machine, "internal/catalog/* internal/host/* internal/postgres/* internal/provider/* internal/state/* internal/uml/* internal/load/* internal/report/*"},
		{"step", step, "internal/flow/*"},
		{"flow", flow, "internal/flow"},
		{"mouth", mouth, "internal/demo internal/bench internal/bench/impact internal/drill internal/evidence internal/daemon internal/web cmd/*"},
		{"mouth", mouth, "."}, // tests of the whole
	} {
		for _, pattern := range strings.Fields(l.folders) {
			if ok, _ := path.Match(pattern, dir); ok {
				return l.name, l.level
			}
		}
	}
	return "", unknown
}

// wrongImport says what is wrong with the import of folder `to` by file s, or "".
func wrongImport(s source, to string) string {
	fromName, from := levelOf(s.dir)
	toName, level := levelOf(to)
	both := fmt.Sprintf("%s %s imports %s %s", fromName, s.dir, toName, to)
	switch {
	case s.dir == to: // a black-box test and its own package
		return ""
	case from == unknown || level == unknown: // another rule names the folder
		return ""
	case level == words:
		return ""
	case from == words:
		return both + ": words import only words"
	case level == support:
		if s.test || from == support || from == mouth {
			return ""
		}
		return both + ": only tests, mouths and other test support may"
	case level == step:
		if s.dir == "internal/flow" || s.test && from == mouth {
			return ""
		}
		return both + ": only package internal/flow joins steps; a test over several steps belongs to internal/flow"
	case from == machine && level == machine:
		if s.test || path.Dir(s.dir) == to { // provider/local fulfils provider
			return ""
		}
		return both + ": machines never import each other; what both need is a word, who joins them is a step"
	case from == mouth && level == mouth:
		// A program may join mouths, and evidence tells what the drill counted.
		if s.program() && !strings.HasPrefix(to, "cmd/") || s.test || s.dir == "internal/evidence" && to == "internal/drill" {
			return ""
		}
		return both + ": sideways"
	case level >= from:
		return both + ": imports go down"
	}
	return ""
}

type source struct {
	path string // below the root, with slashes
	dir  string
	test bool
	text []byte
	file *ast.File
}

// program: a package main.
func (s source) program() bool { return s.file.Name.Name == "main" }

type tree struct {
	fset    *token.FileSet
	sources []source
	texts   map[string]string // go.mod and the pages that rules look at, by path
}

func newTree() *tree { return &tree{fset: token.NewFileSet(), texts: map[string]string{}} }

func (t *tree) add(name string, text []byte) error {
	if !strings.HasSuffix(name, ".go") {
		t.texts[name] = string(text)
		return nil
	}
	file, err := parser.ParseFile(t.fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	t.sources = append(t.sources, source{path: name, dir: path.Dir(name), test: strings.HasSuffix(name, "_test.go"), text: text, file: file})
	return nil
}

func readTree(t *testing.T) *tree {
	t.Helper()
	out := newTree()
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		base := filepath.Base(name)
		switch {
		case err != nil && os.IsNotExist(err): // written by somebody just now, and gone
			return nil
		case err != nil:
			return err
		case d.IsDir() && name != ".":
			_, nested := os.Stat(filepath.Join(name, "go.mod"))
			if nested == nil || strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || slices.Contains([]string{"bin", "testdata", "vendor", "node_modules"}, base) {
				return fs.SkipDir
			}
			return nil
		case !d.Type().IsRegular():
			return nil
		}
		slashed := filepath.ToSlash(name)
		if !strings.HasSuffix(name, ".go") && slashed != "go.mod" && slashed != "docs/dependencies.md" && path.Dir(slashed) != "changelog/unreleased" {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := out.add(slashed, text); err != nil {
			t.Errorf("parse: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (t *tree) at(n ast.Node) string {
	p := t.fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

func (t *tree) lines(n ast.Node) int {
	return t.fset.Position(n.End()).Line - t.fset.Position(n.Pos()).Line + 1
}

// product returns the sources that are not tests, tests the others.
func (t *tree) product() []source {
	return slices.DeleteFunc(slices.Clone(t.sources), func(s source) bool { return s.test })
}

func (t *tree) tests() []source {
	return slices.DeleteFunc(slices.Clone(t.sources), func(s source) bool { return !s.test })
}

// imports maps the name by which s knows a package to the package's path.
func (s source) imports() map[string]string {
	out := map[string]string{}
	for _, i := range s.file.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		name := path.Base(p)
		if i.Name != nil {
			name = i.Name.Name
		}
		out[name] = p
	}
	return out
}

// ours lists the folders of this module that s imports.
func (s source) ours() []string {
	var out []string
	for _, i := range s.file.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		if rest, ok := strings.CutPrefix(p, module+"/"); ok {
			out = append(out, rest)
		}
	}
	return out
}

// uses calls visit for each name of another package, as "os/exec.Command".
func (s source) uses(root ast.Node, visit func(n ast.Node, name string)) {
	imports := s.imports()
	ast.Inspect(root, func(n ast.Node) bool {
		if name := qualified(n, imports); name != "" {
			visit(n, name)
		}
		return true
	})
}

func qualified(n ast.Node, imports map[string]string) string {
	sel, ok := n.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	x, ok := sel.X.(*ast.Ident)
	if !ok || imports[x.Name] == "" {
		return ""
	}
	return imports[x.Name] + "." + sel.Sel.Name
}

// used lists where sources use one of the names.
func (t *tree) used(sources []source, names ...string) []string {
	var out []string
	for _, s := range sources {
		s.uses(s.file, func(n ast.Node, name string) {
			if slices.Contains(names, name) {
				out = append(out, t.at(n)+": "+name)
			}
		})
	}
	return out
}

func importsDown(t *tree) []string {
	var out []string
	for _, s := range t.sources {
		for _, to := range s.ours() {
			if complaint := wrongImport(s, to); complaint != "" {
				out = append(out, s.path+": "+complaint)
			}
		}
	}
	return out
}

func knownPlaces(t *tree) []string {
	var out []string
	for _, s := range t.sources {
		if _, level := levelOf(s.dir); level == unknown {
			out = append(out, s.path+": give "+s.dir+" a level in levelOf, or another place")
		}
	}
	return out
}

func plainNames(t *tree) []string {
	var out []string
	for _, s := range t.sources {
		name := strings.TrimSuffix(s.file.Name.Name, "_test")
		if !regexp.MustCompile(`^[a-z][a-z0-9]*$`).MatchString(name) || slices.Contains(strings.Fields("util utils common helpers models types base manager"), name) {
			out = append(out, s.path+": package "+name)
		}
	}
	return out
}

func noInit(t *tree) []string {
	var out []string
	for _, s := range t.sources {
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				out = append(out, t.at(f))
			}
		}
	}
	return out
}

func exitInMain(t *tree) []string {
	libraries := slices.DeleteFunc(t.product(), source.program)
	return t.used(libraries, "os.Exit", "syscall.Exit", "golang.org/x/sys/unix.Exit", "log.Fatal", "log.Fatalf", "log.Fatalln")
}

func noVariables(t *tree) []string {
	var out []string
	for _, s := range t.product() {
		for _, d := range s.file.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, spec := range g.Specs {
				v := spec.(*ast.ValueSpec)
				if !allowedVariable(s, v) && !embeds(g.Doc) && !embeds(v.Doc) {
					out = append(out, fmt.Sprintf("%s: var %s", t.at(v), v.Names[0].Name))
				}
			}
		}
	}
	return out
}

func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

// allowedVariable: errors, patterns, interface assertions, and the version that the linker writes into a program.
func allowedVariable(s source, v *ast.ValueSpec) bool {
	if v.Names[0].Name == "_" || s.program() && v.Names[0].Name == "version" {
		return true
	}
	for _, value := range v.Values {
		call, ok := value.(*ast.CallExpr)
		if !ok || !slices.Contains([]string{"errors.New", "fmt.Errorf", "regexp.MustCompile"}, qualified(call.Fun, s.imports())) {
			return false
		}
	}
	return len(v.Values) > 0
}

func packageComments(t *tree) []string {
	documented, first := map[string]bool{}, map[string]string{}
	for _, s := range t.product() {
		documented[s.dir] = documented[s.dir] || s.file.Doc.Text() != ""
		if first[s.dir] == "" {
			first[s.dir] = s.path
		}
	}
	var out []string
	for dir, name := range first {
		if !documented[dir] {
			out = append(out, name+": package "+dir+" has no comment")
		}
	}
	return out
}

func exportedComments(t *tree) []string {
	var out []string
	for _, s := range t.product() {
		for _, d := range s.file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				known := d.Recv != nil && slices.Contains(strings.Fields("Error String Unwrap Len Less Swap"), d.Name.Name)
				if d.Doc.Text() == "" && !known && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
					out = append(out, t.at(d)+": func "+d.Name.Name)
				}
			case *ast.GenDecl:
				out = append(out, t.bareSpecs(d)...)
			}
		}
	}
	return out
}

// receiver returns the name of the type that f is a method of, or "".
func receiver(f *ast.FuncDecl) string {
	name := ""
	if f.Recv != nil {
		ast.Inspect(f.Recv.List[0].Type, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && name == "" {
				name = id.Name
			}
			return name == ""
		})
	}
	return name
}

// bareSpecs lists exported types, constants and variables without a comment. One comment over a group of constants or
// variables is enough; each type needs its own.
func (t *tree) bareSpecs(d *ast.GenDecl) []string {
	var out []string
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			if spec.Name.IsExported() && spec.Doc.Text() == "" && (d.Doc.Text() == "" || len(d.Specs) > 1) {
				out = append(out, t.at(spec)+": type "+spec.Name.Name)
			}
		case *ast.ValueSpec:
			if i := slices.IndexFunc(spec.Names, (*ast.Ident).IsExported); i >= 0 && spec.Doc.Text()+spec.Comment.Text()+d.Doc.Text() == "" {
				out = append(out, t.at(spec)+": "+d.Tok.String()+" "+spec.Names[i].Name)
			}
		}
	}
	return out
}

func commandsWithContext(t *tree) []string { return t.used(t.product(), "os/exec.Command") }

func noShell(t *tree) []string {
	line := regexp.MustCompile(`(^|[\s/"'])(ba|da|z|k)?sh\s+-[a-z]*c(\s|$)`)
	shell := regexp.MustCompile(`(^|/)(ba|da|z|k)?sh$`)
	flag := regexp.MustCompile(`^-[a-z]*c$`)
	var out []string
	for _, s := range t.product() {
		if s.path == "internal/uml/guard.go" {
			continue // a script of our own, constant; what varies reaches it as an argument
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			var list []ast.Expr
			switch n := n.(type) {
			case *ast.CallExpr:
				list = n.Args
			case *ast.CompositeLit:
				list = n.Elts
			case *ast.BasicLit:
				if strings.Contains(n.Value, "sh") && line.MatchString(literal(n)) {
					out = append(out, t.at(n)+": "+n.Value)
				}
			}
			for i := 1; i < len(list); i++ {
				if shell.MatchString(literal(list[i-1])) && flag.MatchString(literal(list[i])) {
					out = append(out, t.at(list[i])+": a shell")
				}
			}
			return true
		})
	}
	return out
}

func literal(n ast.Node) string {
	l, ok := n.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return ""
	}
	s, _ := strconv.Unquote(l.Value)
	return s
}

// noSleeps allows time.Sleep in a bubble of testing/synctest, where it takes no time.
func noSleeps(t *tree) []string {
	var out []string
	for _, s := range t.tests() {
		imports := s.imports()
		var bubbles []ast.Node
		ast.Inspect(s.file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok && qualified(call.Fun, imports) == "testing/synctest.Test" {
				bubbles = append(bubbles, call)
			}
			return true
		})
		s.uses(s.file, func(n ast.Node, name string) {
			inside := slices.ContainsFunc(bubbles, func(b ast.Node) bool { return b.Pos() <= n.Pos() && n.End() <= b.End() })
			if name == "time.Sleep" && !inside {
				out = append(out, t.at(n)+": time.Sleep")
			}
		})
	}
	return out
}

func onlyMouthsPrint(t *tree) []string {
	silent := slices.DeleteFunc(t.product(), func(s source) bool {
		return s.program() || s.dir == "internal/demo"
	})
	return t.used(silent, "fmt.Print", "fmt.Printf", "fmt.Println", "os.Stdout")
}

// contextsPassThrough lets an adapter to io.Reader or io.Writer keep one: those methods cannot be given a context.
func contextsPassThrough(t *tree) []string {
	adapters := map[string]bool{}
	for _, s := range t.product() {
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv != nil && (f.Name.Name == "Read" || f.Name.Name == "Write") {
				adapters[s.dir+"."+receiver(f)] = true
			}
		}
	}
	var out []string
	for _, s := range t.product() {
		imports := s.imports()
		ast.Inspect(s.file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok && adapters[s.dir+"."+spec.Name.Name] {
				return false
			}
			if st, ok := n.(*ast.StructType); ok {
				for _, f := range st.Fields.List {
					if qualified(f.Type, imports) == "context.Context" {
						out = append(out, t.at(f)+": a context in a struct")
					}
				}
			}
			return true
		})
	}
	return out
}

// dependenciesHaveReasons looks at the modules that our sources import, that go.mod calls direct, and that hold its tools.
func dependenciesHaveReasons(t *tree) []string {
	required, wanted := map[string]bool{}, map[string]bool{}
	holder := func(pkg string) string {
		best := ""
		for m := range required {
			if (pkg == m || strings.HasPrefix(pkg, m+"/")) && len(m) > len(best) {
				best = m
			}
		}
		return best
	}
	require := regexp.MustCompile(`(?m)^(?:require)?\s+(\S+\.\S+) v\S+(.*)$`)
	for _, m := range require.FindAllStringSubmatch(t.texts["go.mod"], -1) {
		required[m[1]] = true
		wanted[m[1]] = !strings.Contains(m[2], "// indirect")
	}
	tool := regexp.MustCompile(`(?m)^(?:tool)?\s+(\S+\.\S+/\S+)$`)
	for _, m := range tool.FindAllStringSubmatch(t.texts["go.mod"], -1) {
		wanted[holder(m[1])] = true
	}
	for _, s := range t.sources {
		for _, p := range s.imports() {
			wanted[holder(p)] = true
		}
	}
	var out []string
	for m := range wanted {
		if m != "" && wanted[m] && !strings.Contains(t.texts["docs/dependencies.md"], "`"+m+"`") {
			out = append(out, "go.mod: "+m+" has no line in docs/dependencies.md")
		}
	}
	return out
}

func fragmentsHaveKinds(t *tree) []string {
	var out []string
	for name, text := range t.texts {
		if path.Dir(name) == "changelog/unreleased" && !regexp.MustCompile(`^(Bugfix|Enhancement|Change|Security): \S`).MatchString(text) {
			out = append(out, name+": see changelog/TEMPLATE")
		}
	}
	return out
}

// alarms are thresholds to look at, not to obey.
func alarms(t *tree) []string {
	var out []string
	lines, ours := map[string]int{}, map[string]map[string]bool{}
	for _, s := range t.product() {
		n := bytes.Count(s.text, []byte("\n"))
		lines[s.dir] += n
		if n > 400 {
			out = append(out, fmt.Sprintf("%s: file of %d lines (400)", s.path, n))
		}
		if ours[s.dir] == nil {
			ours[s.dir] = map[string]bool{}
		}
		for _, to := range s.ours() {
			ours[s.dir][to] = true
		}
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && t.lines(f) > 60 {
				out = append(out, fmt.Sprintf("%s: func %s of %d lines (60)", t.at(f), f.Name.Name, t.lines(f)))
			}
		}
	}
	for dir, n := range lines {
		limit := 2000
		if dir == "internal/backup" {
			limit = 800
		}
		if n > limit {
			out = append(out, fmt.Sprintf("%s: package of %d lines (%d)", dir, n, limit))
		}
		if _, level := levelOf(dir); len(ours[dir]) > 6 && level != flow && !strings.HasPrefix(dir, "cmd/") {
			out = append(out, fmt.Sprintf("%s: imports %d packages of ours (6)", dir, len(ours[dir])))
		}
	}
	for _, s := range t.tests() {
		if !strings.HasSuffix(s.file.Name.Name, "_test") && path.Base(s.path) != "export_test.go" {
			out = append(out, s.path+": tests from inside the package (black-box x_test is the habit)")
		}
	}
	return out
}

type files map[string]string

// A rule finds what is wrong in a tree. Each text of planted must be found, none of innocent.
type rule struct {
	sentence string
	find     func(*tree) []string
	planted  []files
	innocent []files
}

// in gives one file with a package clause, imports and a body.
func in(name, imports, body string) files {
	text := "package " + strings.ReplaceAll(path.Base(path.Dir(name)), ".", "x") + "\n"
	if strings.HasPrefix(name, "cmd/") {
		text = "package main\n"
	}
	for _, i := range strings.Fields(imports) {
		text += "import " + strconv.Quote(i) + "\n"
	}
	return files{name: text + body + "\n"}
}

func rules() []rule {
	const b, f, h, p, local, lab = "cleancut/internal/backup", "cleancut/internal/fault", "cleancut/internal/host", "cleancut/internal/provider", "cleancut/internal/provider/local", "cleancut/internal/lab"
	const cut, fl, demo = "cleancut/internal/flow/cut", "cleancut/internal/flow", "cleancut/internal/demo"
	return []rule{
		{"imports go down the tree, never up or sideways", importsDown,
			[]files{
				in("internal/backup/a.go", h, ""), in("internal/fault/a_test.go", h, ""), in("internal/wal/a.go", "cleancut/internal/catalog", ""),
				in("internal/host/a.go", "cleancut/internal/postgres", ""), in("internal/host/a.go", p, ""), in("internal/host/a.go", cut, ""), in("internal/host/a_test.go", cut, ""),
				in("internal/provider/a.go", local, ""), in("internal/provider/faulty/a.go", local, ""), in("internal/provider/local/a.go", h, ""), in("internal/provider/local/a.go", "cleancut/internal/uml", ""),
				in("internal/postgres/a.go", "cleancut/internal/postgres/pgtest", ""), in("internal/flow/cut/a.go", lab, ""), in("internal/flow/a.go", "cleancut/internal/provider/providertest", ""),
				in("internal/lab/a.go", cut, ""), in("internal/postgres/pgtest/a.go", fl, ""),
				in("internal/flow/cut/a.go", "cleancut/internal/flow/verify", ""), in("internal/flow/cut/a_test.go", "cleancut/internal/flow/verify", ""), in("internal/flow/cut/a.go", fl, ""),
				in("cmd/cleancut/a.go", cut, ""), in("internal/flow/flow.go", demo, ""),
				in("internal/drill/a.go", demo, ""), in("internal/demo/a.go", "cleancut/cmd/cleancut", ""), in("internal/evidence/a.go", demo, ""), in("internal/drill/a.go", "cleancut/internal/evidence", ""),
				{"internal/bench/impact/a.go": "package main\nimport _ \"cleancut/cmd/cleancut\""},
			},
			[]files{
				in("internal/backup/a_test.go", b, ""), in("internal/wal/a.go", b, ""), in("internal/host/a.go", b+" "+f+" os", ""), in("internal/provider/local/a.go", p+" "+b, ""), in("internal/provider/local/a_test.go", h+" "+lab+" "+local, ""),
				in("internal/provider/providertest/a.go", p+" "+b, ""), in("internal/lab/a.go", h+" "+local+" cleancut/internal/uml cleancut/internal/postgres/pgtest", ""),
				in("internal/flow/cut/a.go", h+" "+p+" "+b, ""), in("internal/flow/cut/a_test.go", lab+" "+cut, ""), in("internal/flow/flow.go", cut+" cleancut/internal/flow/verify "+h, ""), in("internal/flow/flow_test.go", cut+" "+lab, ""),
				in("internal/demo/a.go", fl+" "+lab+" "+h, ""), in("cmd/cleancut/a.go", fl+" "+demo+" "+local, ""),
				in("internal/evidence/a.go", "cleancut/internal/drill", ""), {"internal/bench/impact/a.go": "package main\nimport _ \"cleancut/internal/evidence\""},
			}},
		{"every package has a place in the tree", knownPlaces,
			[]files{in("internal/stuff/a.go", "", ""), in("pkg/a.go", "", ""), in("internal/provider/local/deep/a.go", "", "")},
			[]files{in("internal/provider/gcp/a.go", "", ""), in("internal/flow/clone/a.go", "", ""), in("internal/host/hosttest/a.go", "", ""), in("internal/provider/local/localtest/a.go", "", ""), in("cmd/cleancut/a.go", "", "")}},
		{"a package is named by one lower-case word that says something", plainNames,
			[]files{in("internal/util/a.go", "", ""), in("internal/two_words/a.go", "", ""), {"internal/host/a.go": "package hostHelpers"}},
			[]files{in("internal/host/a.go", "", ""), {"internal/host/a_test.go": "package host_test"}}},
		{"nothing runs before main: no func init", noInit,
			[]files{in("internal/host/a.go", "", "func init() {}"), in("internal/host/a_test.go", "", "func init() {}")},
			[]files{in("internal/host/a.go", "", "type t struct{}\nfunc (t) init() {}\nfunc initial() {}")}},
		{"only package main ends the process", exitInMain,
			[]files{in("internal/host/a.go", "os", "func f() { os.Exit(1) }"), in("internal/demo/a.go", "log", "func f() { log.Fatalf(``) }"), {"internal/host/a.go": "package host\nimport o \"os\"\nvar exit = o.Exit"}},
			[]files{in("cmd/cleancut/main.go", "os", "func f() { os.Exit(1) }"), in("internal/host/a_test.go", "os", "func f() { os.Exit(1) }")}},
		{"packages keep no variables but errors, patterns, embedded files and interface assertions", noVariables,
			[]files{in("internal/host/a.go", "", "var cache = map[string]int{}"), in("internal/host/a.go", "errors", "var (\n\tErrA = errors.New(``)\n\tcount int\n)"), in("internal/host/a.go", "", "var ErrB error"), in("internal/host/a.go", "", "var version = ``")},
			[]files{in("internal/host/a.go", "errors fmt regexp embed io", "var (\n\tErrA = errors.New(``)\n\tErrB = fmt.Errorf(`%w`, ErrA)\n\tp = regexp.MustCompile(``)\n\t_ io.Reader = (*T)(nil)\n\t//go:embed x\n\tx embed.FS\n)\n//go:embed y\nvar y string"),
				in("cmd/cleancut/a.go", "", "var version = `dev`"), in("internal/host/a_test.go", "flag", "var update = flag.Bool(``, false, ``)")}},
		{"every package has a comment", packageComments,
			[]files{in("internal/host/a.go", "", "")},
			[]files{{"internal/host/a.go": "package host", "internal/host/doc.go": "// Package host does things.\npackage host"}, {"internal/host/a_test.go": "package host_test"}}},
		{"every exported name has a comment", exportedComments,
			[]files{in("internal/host/a.go", "", "func F() {}"), in("internal/host/a.go", "", "type T struct{}"), in("internal/host/a.go", "", "const A = 1"), in("internal/host/a.go", "", "// T is.\ntype T[K any] struct{}\nfunc (t *T[K]) M() {}"), in("internal/host/a.go", "", "// Many.\ntype (\n\tT int\n\tU int\n)")},
			[]files{in("internal/host/a.go", "", "// F does.\nfunc F() {}\n// The kinds.\nconst (\n\tA = 1\n\tB = 2\n)\nconst (\n\tC = 3 // three\n)\ntype t struct{}\nfunc (t) M() {}\n// E is.\ntype E struct{}\nfunc (E) Error() string { return `` }"), in("internal/host/a_test.go", "", "func F() {}")}},
		{"programs are run with a context", commandsWithContext,
			[]files{in("internal/host/a.go", "os/exec", "func f() { exec.Command(`ls`) }")},
			[]files{in("internal/host/a.go", "os/exec context", "func f() { exec.CommandContext(context.TODO(), `ls`) }"), in("internal/host/a_test.go", "os/exec", "func f() { exec.Command(`ls`) }")}},
		{"no program is run through a shell", noShell,
			[]files{in("internal/host/a.go", "", "func f() { g(ctx, `sh`, `-c`, `x`) }"), in("internal/host/a.go", "", "func f() { g([]string{`/bin/bash`, `-ec`, `x`}) }"), in("internal/host/a.go", "", "const c = `sudo sh -c x`")},
			[]files{in("internal/host/a.go", "", "func f() { g(`psql`, `-c`, `x`); g(`flush`, `x`); g(`push -c x`) }"), in("internal/host/a_test.go", "", "func f() { g(`sh`, `-c`) }")}},
		{"tests do not sleep", noSleeps,
			[]files{in("internal/host/a_test.go", "time", "func f() { time.Sleep(1) }")},
			[]files{in("internal/host/a_test.go", "time testing/synctest", "func f() { synctest.Test(t, func(t *testing.T) { time.Sleep(1) }) }"), in("internal/host/a.go", "time", "func f() { time.Sleep(1) }")}},
		{"only programs and the demo print", onlyMouthsPrint,
			[]files{in("internal/host/a.go", "fmt", "func f() { fmt.Println() }"), in("internal/flow/cut/a.go", "fmt os", "func f() { fmt.Fprintf(os.Stdout, ``) }"), in("internal/bench/a.go", "fmt", "func f() { fmt.Println() }")},
			[]files{in("internal/host/a.go", "fmt io", "func f(w io.Writer) { fmt.Fprintln(w, fmt.Sprint()) }"), in("cmd/cleancut/a.go", "fmt", "func f() { fmt.Println() }"), in("internal/demo/a.go", "fmt", "func f() { fmt.Println() }")}},
		{"a context is passed on, never kept in a struct", contextsPassThrough,
			[]files{in("internal/host/a.go", "context", "type t struct { ctx context.Context }"), in("internal/host/a.go", "context", "type t struct { context.Context }")},
			[]files{in("internal/host/a.go", "context", "type t struct { stop context.CancelFunc; run func(context.Context) }"), in("internal/host/a.go", "context", "type t struct { ctx context.Context }\nfunc (t *t) Read([]byte) (int, error) { return 0, nil }")}},
		{"every direct module has its reason in docs/dependencies.md", dependenciesHaveReasons,
			[]files{{"go.mod": "module x\n\nrequire example.com/a v1.0.0\n"}, {"go.mod": "require (\n\texample.com/a v1.0.0\n)\n", "docs/dependencies.md": "`example.com/ab`"},
				{"go.mod": "require (\n\texample.com/a v1.0.0 // indirect\n)\n", "internal/host/a.go": "package host\nimport \"example.com/a/sub\""}, {"go.mod": "require (\n\texample.com/a v1.0.0 // indirect\n)\n\ntool example.com/a/cmd/x\n"}},
			[]files{{"go.mod": "require (\n\texample.com/a v1.0.0 // indirect\n)\n"}, {"go.mod": "require example.com/a v1.0.0\n\ntool example.com/a/cmd/x\n", "docs/dependencies.md": "| `example.com/a` | because |"}}},
		{"every changelog fragment begins with its kind", fragmentsHaveKinds,
			[]files{{"changelog/unreleased/0002-x.md": "We mended it"}},
			[]files{{"changelog/unreleased/0002-x.md": "Bugfix: Mend it\n"}}},
	}
}

func alarmRule() rule {
	long := strings.Repeat("\n", 61)
	return rule{"large things are told, not refused", alarms,
		[]files{in("internal/host/a.go", "", "func f() {"+long+"}"), in("internal/host/a.go", "", strings.Repeat("\n", 400)), in("internal/host/a_test.go", "", ""),
			{"internal/backup/a.go": "package backup\n" + strings.Repeat("\n", 390), "internal/backup/b.go": "package backup\n" + strings.Repeat("\n", 390), "internal/backup/c.go": "package backup\n" + strings.Repeat("\n", 390)},
			in("internal/flow/cut/a.go", "cleancut/a cleancut/b cleancut/c cleancut/d cleancut/e cleancut/f cleancut/g", "")},
		[]files{in("internal/host/a.go", "", "func f() {\n}"+long), {"internal/host/a_test.go": "package host_test" + strings.Repeat("\n", 500), "internal/host/export_test.go": "package host"}, in("internal/flow/flow.go", "cleancut/a cleancut/b cleancut/c cleancut/d cleancut/e cleancut/f cleancut/g", "")}}
}

// TestASkippedTestFailsInCI feeds scripts/testlog, through which make test runs, with the event that go test -json writes.
func TestASkippedTestFailsInCI(t *testing.T) {
	if _, err := exec.LookPath("jq"); err != nil {
		t.Skip("jq is missing (make deps)")
	}
	const skipped = `{"Action":"output","Package":"p","Test":"TestX","Output":"    x_test.go:1: no md here\n"}
{"Action":"skip","Package":"p","Test":"TestX","Elapsed":0}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.01s\n"}
{"Action":"pass","Package":"p"}
{"Action":"skip","Package":"without tests"}
`
	for _, c := range []struct {
		name, ci, input string
		ok              bool
	}{
		{"a skip in CI", "true", skipped, false},
		{"a skip on a developer's machine", "", skipped, true},
		{"a package without tests in CI", "true", strings.ReplaceAll(skipped, `"skip","Package":"p"`, `"pass","Package":"p"`), true},
		{"nothing ran", "", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "scripts/testlog")
			cmd.Env = append(os.Environ(), "CI="+c.ci)
			cmd.Stdin = strings.NewReader(c.input)
			out, err := cmd.CombinedOutput()
			if got := err == nil; got != c.ok {
				t.Errorf("succeeded: got %v, want %v\n%s", got, c.ok, out)
			}
			if c.input != "" && !strings.Contains(string(out), "ok  \tp\t0.01s\n") {
				t.Errorf("go test's own line is missing in:\n%s", out)
			}
			if c.input == skipped && !strings.Contains(string(out), "SKIPPED p TestX: x_test.go:1: no md here") {
				t.Errorf("the skipped test is not named in:\n%s", out)
			}
		})
	}
}

func TestTheTree(t *testing.T) {
	got := readTree(t)
	if len(got.sources) == 0 || got.texts["go.mod"] == "" {
		t.Fatalf("read %d sources and a go.mod of %d bytes: not in the root of the repository", len(got.sources), len(got.texts["go.mod"]))
	}
	for _, r := range rules() {
		t.Run(r.sentence, func(t *testing.T) {
			found := r.find(got)
			slices.Sort(found)
			for _, f := range found {
				t.Error(f)
			}
		})
	}
	r := alarmRule()
	t.Run(r.sentence, func(t *testing.T) {
		found := r.find(got)
		slices.Sort(found)
		for _, f := range found {
			t.Log("ALARM " + f)
		}
	})
}

func TestEachRuleCatchesAPlantedViolation(t *testing.T) {
	for _, r := range append(rules(), alarmRule()) {
		t.Run(r.sentence, func(t *testing.T) {
			for _, text := range r.planted {
				if found := r.find(plant(t, text)); len(found) == 0 {
					t.Errorf("not caught: %v", text)
				}
			}
			for _, text := range r.innocent {
				if found := r.find(plant(t, text)); len(found) > 0 {
					t.Errorf("wrongly caught: %q in %v", found, text)
				}
			}
		})
	}
}

func plant(t *testing.T, texts files) *tree {
	t.Helper()
	out := newTree()
	for name, text := range texts {
		if err := out.add(name, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	return out
}
