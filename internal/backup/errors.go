package backup

import "errors"

// The errors that somebody decides by: cmd turns them into exit codes, sweep
// and the undo paths into "already gone". Machines wrap them beside the
// foreign cause.
var (
	// ErrUsage: the request itself is wrong; nothing was done (exit 2).
	ErrUsage = errors.New("usage")
	// ErrVoid: the cut did not hold (thawed early, skewed, incomplete). What
	// it made was deleted and production is thawed (exit 3).
	ErrVoid = errors.New("the cut is void")
	// ErrDamage: verification found damage (exit 4).
	ErrDamage = errors.New("damage found")
	// ErrLeft: something was left behind and is named; run `cleancut sweep` (exit 5).
	ErrLeft = errors.New("left behind")

	// ErrNotFound: the named thing does not exist (any more).
	ErrNotFound = errors.New("not found")
	// ErrExists: put-if-absent found the name taken.
	ErrExists = errors.New("exists already")
	// ErrInUse: the thing is attached, mounted or locked by somebody.
	ErrInUse = errors.New("in use")
	// ErrNotOurs: the thing does not carry our tag, so it is not touched.
	ErrNotOurs = errors.New("not ours")
	// ErrUnsupported: this kind of thing is known and refused.
	ErrUnsupported = errors.New("not supported")
	// ErrNotThere: planned, and not built yet.
	ErrNotThere = errors.New("not there yet")
	// ErrIncomplete: a backup without its complete.json, or a torn one.
	ErrIncomplete = errors.New("incomplete backup")
)

// Hinted is an error that also says what to do next.
type Hinted struct {
	Err  error
	Hint string
}

// Hint adds to err what the operator can do about it. It returns nil for nil.
func Hint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &Hinted{Err: err, Hint: hint}
}

func (h *Hinted) Error() string { return h.Err.Error() }

// Unwrap lets errors.Is and errors.As see the cause.
func (h *Hinted) Unwrap() error { return h.Err }

// HintOf returns the outermost hint in err's chain, or "".
func HintOf(err error) string {
	var h *Hinted
	if errors.As(err, &h) {
		return h.Hint
	}
	return ""
}
