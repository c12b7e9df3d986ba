package provider

// Grant is whether an action is allowed to this host.
type Grant string

// The grants. Unasked: the question itself found no answer, so nothing is
// known.
const (
	Allowed Grant = "allowed"
	Denied  Grant = "denied"
	Unasked Grant = "could not be asked"
)

// Permission is one action of a provider's API and whether this host may use
// it, asked without doing it. A list of them is the result of an optional
// power, Permissions(ctx) []Permission, which doctor asks for.
type Permission struct {
	Action string   `json:"action"` // as a policy names it: ec2:CreateSnapshot
	Grant  Grant    `json:"grant"`
	For    string   `json:"for"`   // what it is needed for, in a few words
	Roles  []string `json:"roles"` // hosts that need it, as docs/aws.md calls them
	Note   string   `json:"note,omitempty"`
}
