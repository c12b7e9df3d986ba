package ec2

import "time"

// Quick returns o with waits that fit a server whose states last
// milliseconds. limit is how long a state may take.
func Quick(o Options, limit time.Duration) Options {
	o.pace = pace{
		poll: 2 * time.Millisecond, pollMax: 20 * time.Millisecond, complete: 20 * time.Millisecond,
		settle: 2 * time.Second, change: limit, device: limit, rate: time.Nanosecond,
		backoffMax: 5 * time.Millisecond, attempts: 60, attempt: 20 * time.Second, credentials: time.Minute,
	}
	return o
}

// Attempt returns o with that limit for a call.
func Attempt(o Options, limit time.Duration) Options {
	o.pace.attempt = limit
	return o
}

// Lasting returns o with that much life of credentials demanded for a cut.
func Lasting(o Options, left time.Duration) Options {
	o.pace.credentials = left
	return o
}

// Pure functions.
var (
	ClientToken = clientToken
	Candidates  = candidates
	DeviceNames = deviceNames
	Literal     = literal
)
