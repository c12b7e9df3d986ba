package ec2

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/smithy-go"

	"cleancut/internal/backup"
)

// errNotAllowed is what a refused permission wraps. It is no
// backup.ErrUnsupported: nobody falls back from it.
var errNotAllowed = errors.New("not allowed")

// errPending says that something has not reached its state in time.
var errPending = errors.New("not within the time")

// refusal is an error of EC2 in few words. Unwrap gives the SDK's.
type refusal struct {
	text  string
	cause error
}

func (r *refusal) Error() string { return r.text }

// Unwrap lets errors.Is and errors.As see the SDK's error.
func (r *refusal) Unwrap() error { return r.cause }

// codeOf returns EC2's error code, or "".
func codeOf(err error) string {
	var e smithy.APIError
	if errors.As(err, &e) {
		return e.ErrorCode()
	}
	return ""
}

// border turns an error of the SDK into ours, both wrapped (EC2 API reference,
// "Error codes for the Amazon EC2 API").
func border(ctx context.Context, action string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", action, errors.Join(ctx.Err(), silent{err}))
	}
	var e smithy.APIError
	if !errors.As(err, &e) {
		return backup.Hint(fmt.Errorf("%s: %w", action, err), "are there credentials, and is EC2's endpoint reachable from here? `cleancut doctor` asks")
	}
	message := e.ErrorMessage()
	// The rest can only be read with sts:DecodeAuthorizationMessage.
	if before, _, ok := strings.Cut(message, " Encoded authorization failure message"); ok {
		message = before
	}
	code := e.ErrorCode()
	var out error = &refusal{text: fmt.Sprintf("%s: %s: %s", action, code, message), cause: err}
	if s := sentinel(code); s != nil {
		out = fmt.Errorf("%w: %w", out, s)
	}
	if hint := advice(code, action); hint != "" {
		out = backup.Hint(out, hint)
	}
	return out
}

// silent hides the text of an error that only repeats that the context ended.
type silent struct{ error }

func (s silent) Error() string { return "the answer is unknown" }

func (s silent) Unwrap() error { return s.error }

func sentinel(code string) error {
	switch {
	case strings.HasSuffix(code, ".NotFound"):
		return backup.ErrNotFound
	case denied(code):
		return errNotAllowed
	}
	switch code {
	case "VolumeInUse", "InvalidSnapshot.InUse":
		return backup.ErrInUse
	case "IdempotentParameterMismatch":
		return backup.ErrExists
	case "UnsupportedOperation", "Unsupported", "UnsupportedHostConfiguration":
		return backup.ErrUnsupported
	}
	return nil
}

func denied(code string) bool {
	return code == "UnauthorizedOperation" || code == "AccessDenied" || code == "AccessDeniedException"
}

// advice is what an operator can do about a refusal; "" if nothing is known.
func advice(code, action string) string {
	switch code {
	case "UnauthorizedOperation", "AccessDenied", "AccessDeniedException":
		return "allow ec2:" + action + " to this host's role: docs/aws.md has the policies, `cleancut doctor` asks for each action"
	case "ExpiredToken", "ExpiredTokenException", "RequestExpired", "AuthFailure", "InvalidClientTokenId", "SignatureDoesNotMatch":
		return "the credentials have expired or are wrong, or this host's clock is: renew them (a role of the instance renews itself), check the clock, and repeat"
	case "RequestLimitExceeded", "Throttling", "ThrottlingException":
		return "another tool of the account and region uses up EC2's request rate: repeat later, or ask AWS for a higher rate"
	case "SnapshotCreationPerVolumeRateExceeded":
		return "EC2 allows about one snapshot of a volume in 15 s: repeat after that"
	case "ConcurrentSnapshotLimitExceeded":
		return "wait until earlier snapshots of the volume are completed (5 may be pending, 1 of st1 and sc1)"
	case "SnapshotLimitExceeded", "PendingSnapshotLimitExceeded", "ResourceLimitExceeded":
		return "the account's quota of snapshots is used up: delete old backups, or ask for a higher quota"
	case "VolumeLimitExceeded", "MaxIOPSLimitExceeded":
		return "the account's quota of storage or IOPS of this volume type is used up: remove copies, or ask for a higher quota"
	case "AttachmentLimitExceeded":
		return "the instance has no attachment left: many types have 28, shared with network interfaces and NVMe disks (docs/aws.md); end copies, or restore on a larger instance"
	case "InternalError", "InternalFailure", "Unavailable", "ServiceUnavailable":
		return "EC2 itself has failed, perhaps after it did what was asked; whatever it made carries our tags. Repeat, and see `cleancut sweep`"
	case "OptInRequired", "InvalidAction", "InvalidEndpointRequest":
		return "check region and endpoint"
	case "IncorrectState", "IncorrectInstanceState":
		return "wait until the volume or instance has settled, and repeat"
	}
	return ""
}
