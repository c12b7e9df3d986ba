package ec2_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cleancut/internal/backup"
	"cleancut/internal/lab/labtest"
	"cleancut/internal/provider"
	"cleancut/internal/provider/ec2"
	"cleancut/internal/provider/ec2/ec2sim"
)

// TestActionsAreThoseThatTheCodeCalls looks for the input of every action: no
// call of the SDK goes without.
func TestActionsAreThoseThatTheCodeCalls(t *testing.T) {
	fset := token.NewFileSet()
	got := map[string]bool{}
	files, err := fs.Glob(os.DirFS("."), "*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "ec2" {
				if action, ok := strings.CutSuffix(s.Sel.Name, "Input"); ok {
					got[action] = true
				}
			}
			return true
		})
	}
	var want []string
	for _, a := range ec2.Actions() {
		want = append(want, a.Name)
		if a.For == "" || len(a.Roles) == 0 {
			t.Errorf("%s: for what, and for whom?", a.Name)
		}
	}
	if got := slices.Sorted(maps.Keys(got)); !slices.Equal(got, want) {
		t.Errorf("the code calls\n%v, Actions are\n%v", got, want)
	}
}

// policy is an IAM policy.
type policy struct {
	Version   string
	Statement []struct {
		Sid, Effect string
		Action      oneOrMore
		Resource    oneOrMore
		Condition   map[string]map[string]oneOrMore
	}
}

// oneOrMore is a string or a list of them.
type oneOrMore []string

func (o *oneOrMore) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*o = oneOrMore{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(o))
}

// TestThePoliciesInTheManualAllowWhatTheCodeCalls and nothing else.
func TestThePoliciesInTheManualAllowWhatTheCodeCalls(t *testing.T) {
	text, err := os.ReadFile("../../../docs/aws.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{ec2.RoleBackup, ec2.RoleRestore, ec2.RoleReadOnly} {
		t.Run(role, func(t *testing.T) {
			block := regexp.MustCompile("(?s)### Policy: " + role + "\n.*?```json\n(.*?)```").FindSubmatch(text)
			if block == nil {
				t.Fatal("docs/aws.md has none")
			}
			var p policy
			decoder := json.NewDecoder(strings.NewReader(string(block[1])))
			decoder.DisallowUnknownFields()
			if err := decoder.Decode(&p); err != nil {
				t.Fatal(err)
			}
			got := map[string]bool{}
			for _, s := range p.Statement {
				for _, action := range s.Action {
					got[action] = true
					deletes := strings.HasPrefix(action, "ec2:Delete") || strings.HasPrefix(action, "ec2:DetachVolume")
					if deletes && len(s.Condition) == 0 && !slices.Equal(s.Resource, oneOrMore{"arn:aws:ec2:*:*:instance/*"}) {
						t.Errorf("%s is allowed without a condition", action)
					}
				}
				if s.Effect != "Allow" || s.Sid == "" || len(s.Resource) == 0 {
					t.Errorf("got %+v", s)
				}
			}
			var want []string
			for _, a := range ec2.Actions() {
				if slices.Contains(a.Roles, role) {
					want = append(want, "ec2:"+a.Name)
				}
			}
			if got := slices.Sorted(maps.Keys(got)); !slices.Equal(got, want) {
				t.Errorf("it allows\n%v, needed are\n%v", got, want)
			}
		})
	}
}

func TestPermissionsAreAskedWithoutDoing(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	f := newField(t, ec2sim.Options{})
	grants := func() map[provider.Grant][]string {
		out := map[provider.Grant][]string{}
		for _, p := range f.p.Permissions(f.Context()) {
			out[p.Grant] = append(out[p.Grant], strings.TrimPrefix(p.Action, "ec2:"))
			if p.For == "" || p.Grant != provider.Allowed && p.Note == "" {
				f.Errorf("got %+v", p)
			}
		}
		return out
	}
	if got := fmt.Sprint(grants()[provider.Unasked]); got != "[AttachVolume CreateTags DeleteSnapshot DeleteVolume DetachVolume]" {
		t.Errorf("without anything of ours, not asked: %s", got)
	}
	taken, err := f.take(f.set(f.volumes(1)...))
	f.must(err)
	before := f.Calls()
	if got := grants(); len(got[provider.Allowed]) != len(ec2.Actions()) {
		t.Errorf("got %v", got)
	}
	for action, n := range f.Calls() {
		dry := strings.HasSuffix(action, "(DryRun)") || strings.HasPrefix(action, "Describe")
		if !dry && n != before[action] {
			t.Errorf("%s was called", action)
		}
	}
	f.Inject(ec2sim.Fault{Action: "CreateSnapshots(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"}, ec2sim.Fault{Action: "CreateVolume(DryRun)", Kind: ec2sim.Refuse, Code: "UnauthorizedOperation"},
		ec2sim.Fault{Action: "DescribeVolumes(DryRun)", Kind: ec2sim.Refuse, Code: "InvalidParameterValue"})
	got := grants()
	if fmt.Sprint(got[provider.Denied]) != "[CreateSnapshots CreateVolume]" || fmt.Sprint(got[provider.Unasked]) != "[DescribeVolumes]" {
		t.Errorf("got %v", got)
	}
	f.must(f.p.DeleteSnapshots(f.Context(), idsOf(taken), f.owner))
}

func TestExamineTellsWhatACutWouldMeet(t *testing.T) {
	if !labtest.Here(t, labtest.Root) {
		return
	}
	f := newField(t, ec2sim.Options{})
	all := f.volumes(3)
	x, err := f.p.Examine(f.Context(), all[:2])
	f.must(err)
	notes := strings.Join(x.Notes, "\n")
	for _, want := range []string{"a group cut is possible", "without " + string(all[2]) + ", the root volume", "serial", "4 volumes are attached", "gp3", "initialization_rate"} {
		if !strings.Contains(notes, want) {
			t.Errorf("%q is not in\n%s", want, notes)
		}
	}
	if len(x.Volumes) != 2 || x.Volumes[0].ID != all[0] {
		t.Errorf("got %+v", x)
	}
	if _, err := f.p.Examine(f.Context(), []backup.VolumeID{"vol-0123456789abcdef0"}); !errors.Is(err, backup.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}
